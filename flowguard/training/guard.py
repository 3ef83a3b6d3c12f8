r"""A trained model with its guard, in a folder."""

__all__ = ["Conditions", "guarded", "save"]

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowguard.io.pictures import ImageError
from flowguard.models.base import ImageModel
from flowguard.ood.conditioner import Policy
from flowguard.ood.fingerprint import fingerprint
from flowguard.ood.levels import LevelSet
from flowguard.ood.state import gather


@dataclass(frozen=True)
class Conditions:
    r"""What a guard is fitted on and calibrated with.

    Arguments:
        training: Pairs of a target and its condition, that were trained with, as wholes.
        held_out: Such pairs that were not.
        most: The most conditions to fit on, taken evenly.
        crops: The crops of held-out conditions to calibrate with.
        size: Their height and width, if the conditions have as many.
        seed: The seed of the crops.
        policy: The policy of the guard: ``"warn"``, ``"report"``, ``"raise"`` or ``"shrink"``; see
            :class:`flowguard.OODConditioner`.
        boundary: The quantile of the calibration's pixels beyond which ``"shrink"`` moves an
            embedding back.
        kept: The guard that was made last: it serves as long as the encoder stays what it is.
    """

    training: Dataset[Any]
    held_out: Dataset[Any]
    most: int = 64
    crops: int = 256
    size: int = 24
    seed: int = 0
    policy: Policy = "warn"
    boundary: float = 0.999
    kept: list[LevelSet] = field(default_factory=list, compare=False, repr=False)

    def to_fit(self, rank: int, world: int) -> Iterator[Tensor]:
        r"""Yields conditions with shape :math:`(1, C, H, W)`: the share of one process.

        Arguments:
            rank: The number of the process.
            world: How many there are.
        """
        total = len(self.training)  # type: ignore[arg-type]
        count = min(total, self.most)
        for i in range(count)[rank::world]:
            with contextlib.suppress(ImageError):  # corrupt: it was not trained with either
                yield self.training[i * total // count][1][None]

    def to_calibrate(self, rank: int, world: int) -> Iterator[Tensor]:
        r"""Yields crops of held-out conditions, by turns of all: the share of one process.

        Arguments:
            rank: The number of the process.
            world: How many there are.
        """
        total = len(self.held_out)  # type: ignore[arg-type]
        for i in range(min(total, self.crops)):
            y = self.held_out[i][1]
            height, width = (min(self.size, n) for n in y.shape[-2:])
            rng = np.random.default_rng((self.seed, i))
            for n in range(len(range(i, self.crops, total))):
                top = int(rng.integers(y.shape[-2] - height + 1))
                left = int(rng.integers(y.shape[-1] - width + 1))
                if (i + n) % world == rank:  # one picture may be all that there is
                    yield y[None, :, top : top + height, left : left + width]


def guarded(
    model: ImageModel, conditions: Conditions, rank: int = 0, world: int = 1
) -> ImageModel:
    r"""Returns a copy of a model, in float32 and evaluation mode, with its guard fitted and
    calibrated.

    Arguments:
        model: The model, which is left as it is.
        conditions: What the guard learns from.
        rank: The number of this process; the moments of all are merged.
        world: How many there are.
    """
    made = copy.deepcopy(model).float().eval()  # that other commands take
    made.conditioner.policy = conditions.policy
    made.conditioner.boundary = conditions.boundary
    mark = _mark(made.conditioner.guard, fingerprint(made.conditioner.encoder))
    for held in conditions.kept:
        if _mark(held, held.fingerprint) == mark:
            made.conditioner.guard = copy.deepcopy(held)
            return made
    together = world > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few crops: it is said of them once
        pictures, shared = _share(conditions, rank, world)
        made.conditioner.fit(pictures, progress=False, distributed=shared)
        made.conditioner.calibrate(
            conditions.to_calibrate(rank, world), progress=False, distributed=together
        )
    conditions.kept[:] = [copy.deepcopy(made.conditioner.guard)]
    return made


def _mark(guard: LevelSet, encoder: str) -> tuple[Any, ...]:
    r"""What a guard depends on, beside the conditions."""
    return encoder, guard.shrinkage, guard.normalize, guard.statistic


def _share(conditions: Conditions, rank: int, world: int) -> tuple[Iterator[Tensor], bool]:
    r"""What this process fits the guard on, and whether it is a share: where one process would have
    nothing, as there are few pictures, or corrupt ones, each takes all of them."""
    if world == 1:
        return conditions.to_fit(0, 1), False
    own = conditions.to_fit(rank, world)
    first = list(itertools.islice(own, 1))
    if all(bool(has) for (has,) in gather([torch.tensor(len(first))])):
        return itertools.chain(first, own), True
    return conditions.to_fit(0, 1), False


def save(
    folder: Path, model: ImageModel, conditions: Conditions, rank: int = 0, world: int = 1
) -> None:
    r"""Saves a model with its guard, in a folder that other commands take.

    Arguments:
        folder: The folder.
        model: The model, which is left as it is.
        conditions: What the guard learns from.
        rank: The number of this process; the first one writes.
        world: How many there are.
    """
    made = guarded(model, conditions, rank, world)
    if rank == 0:
        made.save_pretrained(folder)
