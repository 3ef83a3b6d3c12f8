r"""Bases whose mean and scale depend on the condition, bounded such that nothing changes where they
were in calibration.

Each library has a class of its own for them, beside its adapter, which holds a
:class:`BoundedMoments`; :class:`MomentsSite` is what their sites have in common.
"""

__all__ = ["BoundedMoments", "MomentsSite"]

import abc
from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.bounds import Envelope, Pointwise, Refused, Scale, Step, constant, departure
from flowguard.functional import FAITHFUL, saturate
from flowguard.migration.imitate import AffineMap, RescaledSpline
from flowguard.migration.inscribe import Additional
from flowguard.migration.surgeon import Site, Surgeon

ROOM = 1.5  # by how much the bounds exceed what was met
LEAST = 0.5  # the least distance of a log-scale from the middle that there is room for


class BoundedMoments(Additional):
    r"""Creates the bounds of mean and log-scale of a normal base, for each feature.

    Each is squashed smoothly into an interval, of which the inner 80 % are left as they are:
    half as wide again as what was met; see :meth:`around`.

    Arguments:
        mean: The middle of the interval of the means, with shape :math:`(*)`.
        mean_room: How far it goes to either side.
        log_scale: The middle of the interval of the log-scales.
        log_scale_room: How far it goes to either side.

    Example:
        >>> bounds = BoundedMoments(*torch.tensor([[0.0], [1.0], [-1.0], [0.5]]))
        >>> bounds(torch.tensor([0.5]), torch.tensor([torch.inf]))
        (tensor([0.5000]), tensor([-0.5005]))
    """

    mean: Tensor
    mean_room: Tensor
    log_scale: Tensor
    log_scale_room: Tensor

    def __init__(
        self, mean: Tensor, mean_room: Tensor, log_scale: Tensor, log_scale_room: Tensor
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("mean_room", mean_room)
        self.register_buffer("log_scale", log_scale)
        self.register_buffer("log_scale_room", log_scale_room)

    @classmethod
    def around(cls, mean: Tensor, log_scale: Tensor) -> Self:
        r"""Returns bounds that suit what was met.

        Arguments:
            mean: The means that were met, with shape :math:`(N, *)`.
            log_scale: The log-scales that were met.
        """
        scale, scale_half = _range(log_scale.detach())
        loc, half = _range(mean.detach())
        # Where a moment hardly varied there is room for the width of the noise, too.
        half, scale_half = torch.maximum(half, scale.exp()), scale_half.clamp_min(LEAST)
        return cls(loc, half * ROOM / FAITHFUL, scale, scale_half * ROOM / FAITHFUL)

    def forward(self, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the bounded mean and log-scale.

        Arguments:
            mean: The mean that the old base asks for, with shape :math:`(*, D)`.
            log_scale: The log-scale that it asks for.
        """
        return (
            _within(mean, self.mean, self.mean_room),
            _within(log_scale, self.log_scale, self.log_scale_room),
        )

    @property
    def largest(self) -> Tensor:
        r"""The largest log-scale of each feature."""
        return constant(self.log_scale) + constant(self.log_scale_room)

    def steps(self, name: str, kind: str) -> Iterator[Step]:
        r"""What the base does to its noise, one feature for each element of the bounds.

        Arguments:
            name: The name of the base.
            kind: What it is, in words.
        """
        if why := departure(self, BoundedMoments):
            yield Refused(name=name, kind=kind, reason=why)
            return
        room = constant(self.mean_room).flatten()
        zero = torch.zeros_like(room)
        depends = "within the means and scales of its calibration, and half as much again"
        # The noise is largest at the largest scale; in units of its room, a mean is at most one.
        yield Scale(name=name, kind=kind, factor=self.largest.exp().flatten() / room, offset=zero)
        # A rounded exponent counts as often as it is large.
        roundings = 16 + int(self.largest.abs().max().item())
        moved = Envelope(1.0, 1.0, depends=depends, roundings=roundings)
        yield Pointwise(name=name, kind=kind, depends=depends, envelope=moved)
        yield Scale(name=name, kind=kind, factor=room, offset=constant(self.mean).flatten())


def _range(t: Tensor) -> tuple[Tensor, Tensor]:
    low, high = t.amin(0), t.amax(0)
    return (low + high) / 2, (high - low) / 2


def _within(t: Tensor, middle: Tensor, room: Tensor) -> Tensor:
    return saturate((t - middle) / room, 1.0) * room + middle


class MomentsSite(Site, abc.ABC):
    r"""A normal base whose mean and scale depend on the condition: what goes out is a line of what
    comes in, the noise.

    Its adapter says how the moments are heard, and which class bounds them.
    """

    def __init__(self, operation: Surgeon, name: str, base: Any) -> None:
        super().__init__(operation, name, base, type(base).__name__)
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.bounds: BoundedMoments

    def tell(self, mean: Tensor, log_scale: Tensor) -> None:
        r"""Remembers the moments of some rows, each with shape :math:`(N, *)`."""
        self.asked.append((mean.detach(), log_scale.detach()))

    @abc.abstractmethod
    def bounded(self, bounds: BoundedMoments) -> nn.Module:
        r"""Returns the base with these bounds."""

    @property
    def heard(self) -> bool:
        r"""Whether the base was asked anything."""
        return bool(self.asked)

    def _moments(self) -> tuple[Tensor, Tensor]:
        mean, log_scale = (torch.cat(t) for t in zip(*self.asked, strict=True))
        return mean, log_scale

    @property
    def inputs(self) -> Tensor:
        r"""Samples of the base, one for each row."""
        mean, log_scale = self._moments()
        return mean + log_scale.exp() * torch.randn_like(mean)

    def old(self, rows: Tensor | slice) -> AffineMap:
        r"""Returns the line from a sample to its noise."""
        return _to_noise(*(t[rows] for t in self._moments()))

    def build(self, spline: RescaledSpline) -> nn.Module:
        r"""Returns the base with bounds around the moments that were heard."""
        self.bounds = BoundedMoments.around(*self._moments())
        return self.bounded(self.bounds.train(self.layer.training))

    @property
    def becomes(self) -> str:
        r"""The class that bounds the moments."""
        return type(self.robust).__name__

    def new(self, rows: Tensor | slice) -> AffineMap:
        r"""Returns the same line with bounded moments."""
        return _to_noise(*self.bounds(*(t[rows] for t in self._moments())))


def _to_noise(mean: Tensor, log_scale: Tensor) -> AffineMap:
    return AffineMap(-log_scale, -mean * torch.exp(-log_scale))
