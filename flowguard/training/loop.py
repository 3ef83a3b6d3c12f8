r"""A plain training loop for the image models."""

__all__ = ["TrainingResult", "train"]

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flowguard.models import LowLightFlow, SuperResolutionFlow


@dataclass(frozen=True)
class TrainingResult:
    r"""What a training run did."""

    losses: list[float]  # bits per dimension of each step
    seconds: float
    skipped: int  # steps left out because loss or gradients were not finite


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
    gradients are not finite changes nothing and is counted.

    Arguments:
        model: The model. It is put in training mode and left in evaluation mode.
        batches: Pairs of targets and conditions (HR and LR images, or bright and dark ones), at
            least `steps` of them.
        steps: The number of steps.
        lr: The greatest learning rate.
        clip: The greatest norm of the gradient.
        name: What the progress bar is called.
        progress: Whether to show a progress bar, with the loss in bits per dimension.

    Raises:
        ValueError: If there are fewer batches than steps.
    """
    device = next(model.parameters()).device
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    warmup = max(1, min(50, steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    losses: list[float] = []
    skipped = 0
    start = time.perf_counter()
    stream = iter(batches)
    with tqdm(range(steps), desc=name, unit="step", disable=not progress) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor(step)
            pair = next(stream, None)
            if pair is None:
                model.eval()
                raise ValueError(
                    f"there must be a batch for each of the {steps} steps; got {step}"
                )
            hr, condition = (t.to(device) for t in pair)
            optimizer.zero_grad(set_to_none=True)
            loss = model.nll(hr, condition).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            if bool(torch.isfinite(norm) & torch.isfinite(loss)):
                optimizer.step()
            else:
                skipped += 1
            losses.append(loss.item())
            bar.set_postfix_str(f"{sum(losses[-20:]) / len(losses[-20:]):.3f} bits/dim")
    model.eval()
    return TrainingResult(losses, time.perf_counter() - start, skipped)
