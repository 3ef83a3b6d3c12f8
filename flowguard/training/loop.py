r"""The short way to train an image model: a model and its batches."""

__all__ = ["TrainingResult", "train"]

import itertools
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from flowguard.hosts import install
from flowguard.models import LowLightFlow, SuperResolutionFlow
from flowguard.models.base import ImageModel


@dataclass(frozen=True)
class TrainingResult:
    r"""What a training run did.

    Attributes:
        losses: The loss of each step, in bits per dimension.
        seconds: How long it took.
        skipped: How many steps were left out because loss or gradients were not finite.

    Example:
        >>> result = TrainingResult(losses=[3.2, 2.9, 2.7], seconds=1.5, skipped=0)
        >>> f"{result.losses[-1]:.1f} bits per dimension after {len(result.losses)} steps"
        '2.7 bits per dimension after 3 steps'
    """

    losses: list[float]  # bits per dimension of each step
    seconds: float
    skipped: int  # steps left out because loss or gradients were not finite
    cpu_seconds: float = math.nan  # of all threads of this process


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    r"""Creates the first batches of a stream.

    Arguments:
        batches: The batches.
        count: How many.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
        self.batches, self.count = batches, count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pair in itertools.islice(self.batches, self.count):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                got = (
                    f"{len(pair)} of them"
                    if isinstance(pair, tuple | list)
                    else type(pair).__name__
                )
                raise ValueError(
                    f"each of the batches must be a pair of targets and conditions; got {got}"
                )
            yield pair[0], pair[1]


def train(
    model: SuperResolutionFlow | LowLightFlow,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float = 2e-3,
    clip: float = 10.0,
    name: str = "training",
    progress: bool = True,
) -> TrainingResult:
    r"""Trains a model by maximum likelihood, in place.

    Adam, with a short warm-up and a cosine decay of the learning rate. A step whose loss or
    gradients are not finite changes nothing and is counted. ``flowguard train`` does the same for
    folders of pictures, with validation, averaged weights, and nothing lost when it is stopped;
    this keeps nothing on disk.

    What a step draws follows from one number that is drawn from torch's generator, which is left
    as it was but for that.

    Arguments:
        model: The model. It is put in training mode and left in evaluation mode.
        batches: Pairs of targets and conditions (HR and LR images, or bright and dark ones), with
            shapes :math:`(B, 3, sH, sW)` and :math:`(B, 3, H, W)`, at least `steps` of them.
        steps: The number of steps.
        lr: The greatest learning rate.
        clip: The greatest norm of the gradient.
        name: What the progress bar is called.
        progress: Whether to show a progress bar, with the loss in bits per dimension.

    Raises:
        ImportError: If Lightning is not installed.
        RuntimeError: If it is called within :func:`torch.inference_mode`.
        TypeError: If the model is no image model, the batches are not iterable, or an option is no
            number.
        ValueError: If there are fewer batches than steps, one is no pair, an option is out of
            range, or no parameter of the model requires a gradient.

    Example:
        >>> model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
        >>> pairs = [(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4)) for _ in range(2)]
        >>> len(train(model, pairs, steps=2, progress=False).losses)
        2
    """
    _check_model(model)
    if not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be an iterable of pairs of targets and conditions; got"
            f" {type(batches).__name__}"
        )
    try:
        import lightning.pytorch as pl
    except ImportError as error:
        raise ImportError(f"training needs Lightning: {install('train')}") from error
    from torch.utils.data import DataLoader

    from flowguard.training.callbacks import Progress, StepLog
    from flowguard.training.module import FlowModule, Optimization
    from flowguard.training.run import interruptible, quiet

    seed = int(torch.randint(2**62, ()))
    optimization = Optimization(steps, lr, clip=clip, seed=seed, most_skipped=1.0)
    module, log = FlowModule(model, optimization), StepLog(None)
    device = next(model.parameters()).device
    quiet()
    with warnings.catch_warnings(), torch.random.fork_rng(), interruptible():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1 if device.index is None else [device.index],
            max_steps=steps,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[log, Progress(name)] if progress else [log],
        )
        model.train()
        began = time.process_time()
        try:
            trainer.fit(module, DataLoader(Stream(batches, steps), batch_size=None))
        finally:
            model.to(device).eval()
    cpu_seconds = time.process_time() - began
    done = trainer.global_step
    if done < steps:
        raise ValueError(f"there must be a batch for each of the {steps} steps; got {done}")
    return TrainingResult(log.losses, log.seconds, module.skipped, cpu_seconds)


def _check_model(model: object) -> None:
    r"""Refuses what cannot be trained."""
    if not isinstance(model, ImageModel):
        got = model.__name__ if isinstance(model, type) else f"an object of {type(model).__name__}"
        raise TypeError(
            f"model must be an image model, such as a SuperResolutionFlow; got {got}: make one, or"
            " load it from its folder by flowguard.models.load"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model must have a parameter that requires a gradient; got none:"
            " model.requires_grad_() lets all be trained"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "training needs gradients; got a call within torch.inference_mode(): leave it before"
        )
