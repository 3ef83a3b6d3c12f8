r"""The training of an image model as Lightning runs it."""

__all__ = ["Diverged", "FlowModule", "Optimization", "StepTold", "draws_of_all", "seed_of"]

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flowguard.models.base import Given, ImageCondition, ImageModel
from flowguard.training.encoders import groups
from flowguard.training.kept import KeptMaps
from flowguard.training.validation import Measured, measure

SCHEDULES = ("cosine", "steps", "constant")
PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
#: Where the learning rate is halved by the schedule ``"steps"``, as shares of the run.
HALVED = (0.5, 0.75, 0.9, 0.95)
DRAWS = {torch.rand_like, torch.randn_like}
DRAWS_BY_SIZE = {torch.rand, torch.randn}


class Diverged(RuntimeError):
    r"""Raised when too many steps of a training are not finite."""


@dataclass(frozen=True)
class Optimization:
    r"""How a model is optimised: by Adam, with a warm-up and a schedule.

    Arguments:
        steps: The number of steps.
        lr: The greatest learning rate.
        warmup: The steps in which it is reached. If :py:`None`, 50, or a tenth of the run.
        schedule: What it does then: ``"cosine"`` to zero, ``"steps"``, halved after 50, 75, 90
            and 95 % of the run, or ``"constant"``.
        clip: The greatest norm of the gradient.
        seed: The seed of all that is drawn in training.
        encoder_lr: The greatest learning rate of the encoder. If :py:`None`, the same. One that is
            not to be trained is frozen; see :meth:`ImageModel.freeze_encoder`.
        most_skipped: The share of steps that may be not finite; one is always forgiven.
        pixel_weight: How much the error of the image of no noise, that of latents that are zero,
            counts beside the bits per dimension (the pixel loss of HCFlow: Liang et al., ICCV
            2021). A step of it computes the flow both ways.
        pixel_loss: That error: ``"l1"``, the mean absolute one, as in HCFlow, or ``"l2"``, the mean
            squared one, which PSNR is made of.

    Raises:
        TypeError: If a value is no number, or the steps are no whole one.
        ValueError: If a value is out of range.

    Example:
        >>> o = Optimization(steps=100, lr=1.0, warmup=2)
        >>> [round(o.factor(step), 3) for step in (0, 1, 2, 51, 100)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    steps: int
    lr: float = 2e-3
    warmup: int | None = None
    schedule: str = "cosine"
    clip: float = 10.0
    seed: int = 0
    most_skipped: float = 0.01
    encoder_lr: float | None = None
    pixel_weight: float = 0.0
    pixel_loss: str = "l1"

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, Integral):
            raise TypeError(f"steps must be a whole number; got {self.steps!r}")
        for name in ("lr", "clip", "pixel_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number; got {value!r}")
        if self.steps < 1 or not 0 < self.lr < math.inf or not self.clip > 0:
            raise ValueError(
                f"steps, lr and clip must be positive; got {self.steps}, {self.lr} and {self.clip}"
            )
        if self.encoder_lr is not None and not 0 < self.encoder_lr < math.inf:
            raise ValueError(f"encoder_lr must be positive; got {self.encoder_lr}")
        if not 0 <= self.pixel_weight < math.inf:
            raise ValueError(
                f"pixel_weight must be finite and not negative; got {self.pixel_weight}"
            )
        for name, known in (("schedule", SCHEDULES), ("pixel_loss", PIXEL_LOSSES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")

    def factor(self, step: int) -> float:
        r"""Returns what the greatest learning rate is multiplied by in a step.

        Arguments:
            step: The number of steps before it.
        """
        warmup = max(1, min(50, self.steps // 10)) if self.warmup is None else self.warmup
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "cosine":
            done = (step - warmup) / max(1, self.steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.schedule == "steps":
            return 0.5 ** sum(step >= share * self.steps for share in HALVED)
        return 1.0


class StepTold(NamedTuple):
    r"""What is told of a step."""

    step: int  # the number of steps after it
    loss: float  # bits per dimension, over all processes
    lr: float
    norm: float  # of the gradient, before it is clipped
    skipped: bool


def seed_of(*numbers: int) -> int:
    r"""Returns one seed for several numbers.

    Arguments:
        numbers: The numbers, none of them negative.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class draws_of_all(TorchFunctionMode):  # a context, called like a function
    r"""Draws random numbers for the rows of all processes within, and takes those of this one.

    Together, the processes then draw what one alone would draw for all of their rows.

    Arguments:
        rows: The rows of this process; what is drawn for another number is left alone.
        rank: The number of the process.
        world: How many there are.
    """

    def __init__(self, rows: int, rank: int, world: int) -> None:
        super().__init__()
        self.rows, self.rank, self.world = rows, rank, world

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS and args[0].dim() and len(args[0]) == self.rows:
            everyone = args[0].new_empty(self.world * self.rows, *args[0].shape[1:])
            return self._own(func(everyone, *args[1:], **kwargs))
        if func in DRAWS_BY_SIZE and args:
            size = args if isinstance(args[0], int) else tuple(args[0])
            if size and size[0] == self.rows:
                return self._own(func(self.world * self.rows, *size[1:], **kwargs))
        return func(*args, **kwargs)

    def _own(self, drawn: Tensor) -> Tensor:
        return drawn.tensor_split(self.world)[self.rank]


class FlowModule(pl.LightningModule):
    r"""Creates the training of an image model: maximum likelihood, in bits per dimension.

    All that a step draws is a function of the seed and the number of the step: a run that was
    stopped goes on as if it had not been, and several processes draw what one would draw for all
    of their rows. A step whose loss or gradient is not finite changes nothing and is counted.

    Arguments:
        model: The model.
        optimization: How it is optimised.
        compiled: Whether the likelihood is compiled, once the first batch has initialised it.
        keep: The number of bytes of a frozen encoder's maps that are kept from one validation to
            the next.

    Attributes:
        told: What is known of the last step; :py:`None` before it.
        skipped: The number of steps that were not finite.
        ask: Called once in a step; where any process is answered :py:`True`, all set `asked`.
        asked: Whether any process was answered so.
    """

    told: StepTold | None = None

    def __init__(
        self,
        model: ImageModel,
        optimization: Optimization,
        *,
        compiled: bool = False,
        keep: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimization = optimization
        self.to_compile = compiled
        self.skipped = 0
        self.asked = False
        self.ask: Callable[[], bool] | None = None
        self.kept = KeptMaps(keep)
        self._losses: list[Tensor] = []

    # -- the step --------------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Given) -> Tensor:
        r"""Returns the bits per dimension of each image, with shape :math:`(B)`."""
        bits: Tensor = self.model(x, y)
        return bits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        r"""Returns the mean bits per dimension of a batch of targets and conditions."""
        x, y = batch
        if self.to_compile and self.global_step > 0:
            # Compiled code draws other numbers than eager code, unless it is told not to.
            self.model.compile(options={"fallback_random": True})
            self.to_compile = False
        parts = self.trainer.accumulate_grad_batches
        torch.manual_seed(seed_of(self.optimization.seed, self.global_step, batch_idx % parts))
        world, alone = self.trainer.world_size, self.trainer.world_size == 1
        together = (
            contextlib.nullcontext() if alone else draws_of_all(len(x), self.global_rank, world)
        )
        weight = self.optimization.pixel_weight
        with together:
            # Once for both ways; but the first batch initialises weights on its way.
            given = self.model.condition(y) if weight and self.global_step else y
            loss = self(x, given).mean()
            error = self._error(given, x) if weight else 0.0
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        self._losses.append(loss.detach())
        return loss + weight * error

    def _error(self, given: Given, x: Tensor) -> Tensor:
        r"""The error of the images of latents that are zero."""
        like = given.images if isinstance(given, ImageCondition) else given
        shapes = self.model.latent_shapes(given)
        images = self.model.decode([like.new_zeros(len(like), *s) for s in shapes], given)
        return PIXEL_LOSSES[self.optimization.pixel_loss](images, x)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Measured:
        r"""Returns what is measured of a validation picture."""
        # As each training step draws by its own seed, nothing has to be brought back.
        torch.manual_seed(seed_of(self.optimization.seed, 0))
        encoder = self.model.conditioner.get_submodule("encoder")
        with self.kept.serving(encoder) if self.model.frozen else contextlib.nullcontext():
            return measure(self.model, *batch)

    def on_validation_epoch_start(self) -> None:
        r"""Forgets the maps that were kept, if they are of other weights."""
        if self.model.frozen:
            self.kept.renew(self.model.conditioner.get_submodule("encoder"))

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        r"""Clips the gradient; takes it away where it, or the loss, is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optimization.clip)
        loss = torch.stack(self._losses).mean()
        self._losses.clear()
        asked = self.ask is not None and self.ask()
        numbers = torch.stack([loss, norm.to(loss), loss.new_tensor(float(asked))])
        if self.trainer.world_size > 1:
            numbers = self.trainer.strategy.reduce(numbers, reduce_op="mean")
        mean, length, share = numbers.tolist()
        self.asked = share > 0
        skipped = not (math.isfinite(mean) and math.isfinite(length))
        if skipped:
            # Adam moves nothing that has no gradient, and forgets nothing.
            optimizer.zero_grad(set_to_none=True)
        self.skipped += skipped
        lr = optimizer.param_groups[0]["lr"]
        self.told = StepTold(self.global_step + 1, mean, lr, length, skipped)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        r"""Ends a run in which too many steps are not finite."""
        done = self.global_step
        if self.skipped > self.optimization.most_skipped * max(100, done):
            raise Diverged(
                f"at most {self.optimization.most_skipped:.0%} of the steps may be not finite;"
                f" got {self.skipped} of {done}: lower the learning rate, or train in float32"
            )

    # -- what Lightning asks for -----------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        r"""Returns Adam and its schedule."""
        lr, encoder_lr = self.optimization.lr, self.optimization.encoder_lr
        optimizer = torch.optim.Adam(groups(self.model, lr, encoder_lr), betas=(0.9, 0.99))
        factor = self.optimization.factor
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_start(self) -> None:
        r"""Sets the learning rate of the step that is next: a run that goes on may be longer than
        it was meant to be."""
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.optimization.factor(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        r"""Adds what is counted; leaves a frozen encoder out, which is always the same."""
        checkpoint["skipped_steps"] = self.skipped
        for state in _states(checkpoint):
            for name in self._frozen():
                del state[name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        r"""Takes up what was counted; puts a frozen encoder in that was left out."""
        self.skipped = checkpoint["skipped_steps"]
        for state in _states(checkpoint):
            state |= {name: t for name, t in self._frozen().items() if name not in state}

    def _frozen(self) -> dict[str, Tensor]:
        encoder = "model.conditioner.encoder."
        if not self.model.frozen:
            return {}
        return {name: t for name, t in self.state_dict().items() if name.startswith(encoder)}


def _states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    r"""The weights in a checkpoint: the averages, and those of the last step."""
    names = ("state_dict", "current_model_state")
    return [checkpoint[name] for name in names if name in checkpoint]
