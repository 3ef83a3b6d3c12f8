r"""What Pyro's affine layers become when a flow is made robust: the same networks under another map.

The networks are kept as a whole, so that a state dict of the flow before its migration fits.
"""

__all__ = [
    "MigratedAffineAutoregressive",
    "MigratedAffineCoupling",
    "MigratedConditionalAffineAutoregressive",
    "MigratedConditionalAffineCoupling",
    "line",
]

from typing import Any, ClassVar, Self

import torch
from pyro.distributions.transforms import (
    AffineAutoregressive,
    AffineCoupling,
    ConditionalAffineAutoregressive,
    ConditionalAffineCoupling,
)
from torch import Tensor

from flowguard.migration.exchange import successor
from flowguard.migration.imitate import Rescaled
from flowguard.migration.inscribe import InscribedAffine, single

LARGEST = 1e20  # what a network says is cut at, so that infinite numbers are finite

#: What a transform remembers of its last call, or of itself, that no other one shall have.
FRESH: dict[str, Any] = {"_inv": None, "_cached_x_y": (None, None), "_cached_log_scale": None}


def line(layer: Any, mean: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns slope and value at zero that a layer of Pyro makes of what its network says.

    Arguments:
        layer: The layer, conditional ones as they are given a context.
        mean: What the network says of the shift.
        raw: What it says of the scale.
    """
    mean, raw = (single(t).clamp(-LARGEST, LARGEST) for t in (mean, raw))
    if getattr(layer, "stable", False):
        scale = torch.sigmoid(raw + layer.sigmoid_bias)
        return scale, (1 - scale) * mean
    clipped = raw.clamp(layer.log_scale_min_clip, layer.log_scale_max_clip)
    return (clipped + (raw - raw.detach())).exp(), mean  # as in Pyro, gradients are not clipped


class _InPlace:
    r"""What takes the place of a layer of Pyro's."""

    map: InscribedAffine
    #: What it shall not remember of the layer.
    fresh: ClassVar[dict[str, Any]] = {}

    @classmethod
    def in_place_of(cls, old: Any, map: InscribedAffine) -> Self:
        r"""Returns a layer with the network of another.

        Arguments:
            old: Pyro's layer.
            map: What makes the robust maps of slopes and shifts.
        """
        # A stable one has methods of its own, in place of those of its class.
        kind: Any = cls  # with the one of Pyro that it is mixed with, a module
        new: Self = successor(old, kind, without=("_call", "_inverse"), map=map, **cls.fresh)
        return new


class _Remembering(_InPlace):
    r"""What takes the place of a transform, and keeps the log-determinant of its last call."""

    fresh: ClassVar[dict[str, Any]] = FRESH

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Returns the log-determinant of the Jacobian, summed over the event.

        Arguments:
            x: The noise.
            y: What the transform made of it.
        """
        transform: Any = self
        x_old, y_old = transform._cached_x_y
        if x is not x_old or y is not y_old:
            transform(x)
        ladj: Tensor = transform._cached_log_scale
        return ladj.sum(tuple(range(-transform.domain.event_dim, 0)))


class MigratedAffineAutoregressive(_Remembering, AffineAutoregressive):
    r"""Creates the robust autoregressive transform that takes the place of one of Pyro's; see
    :meth:`in_place_of`."""

    def _maps(self, x: Tensor) -> Rescaled:
        return self.map(*line(self, *self.arn(x)))

    def _call(self, x: Tensor) -> Tensor:
        y, self._cached_log_scale = self._maps(x).call_and_ladj(x)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1]):  # each pass settles one feature more
            x, ladj = self._maps(x).inverse_and_ladj(y)
        self._cached_log_scale = -ladj
        return x


class MigratedConditionalAffineAutoregressive(_InPlace, ConditionalAffineAutoregressive):
    r"""Creates the robust autoregressive transform that takes the place of one of Pyro's conditional
    ones; see :meth:`in_place_of`."""

    def condition(self, context: Tensor) -> MigratedAffineAutoregressive:
        r"""Returns the transform given a context.

        Arguments:
            context: The context, with shape :math:`(*, M)`.
        """
        return MigratedAffineAutoregressive.in_place_of(super().condition(context), self.map)


class MigratedAffineCoupling(_Remembering, AffineCoupling):
    r"""Creates the robust coupling that takes the place of one of Pyro's; see :meth:`in_place_of`."""

    def _moved(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        kept, moved = x.tensor_split([self.split_dim], dim=self.dim)
        says = self.nn(kept.reshape(*kept.shape[: self.dim], -1))
        # The network speaks of all that is moved in one row; the maps are those of its channels.
        mean, raw = (t.reshape(*t.shape[:-1], *moved.shape[self.dim :]) for t in says)
        f = self.map(*line(self, mean.movedim(self.dim, -1), raw.movedim(self.dim, -1)))
        moved = moved.movedim(self.dim, -1)
        moved, ladj = f.inverse_and_ladj(moved) if inverse else f.call_and_ladj(moved)
        whole = torch.cat((kept, moved.movedim(-1, self.dim)), dim=self.dim)
        return whole, -ladj if inverse else ladj

    def _call(self, x: Tensor) -> Tensor:
        y, self._cached_log_scale = self._moved(x, inverse=False)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, self._cached_log_scale = self._moved(y, inverse=True)
        return x


class MigratedConditionalAffineCoupling(_InPlace, ConditionalAffineCoupling):
    r"""Creates the robust coupling that takes the place of one of Pyro's conditional ones; see
    :meth:`in_place_of`."""

    def condition(self, context: Tensor) -> MigratedAffineCoupling:
        r"""Returns the coupling given a context.

        Arguments:
            context: The context, with shape :math:`(*, M)`.
        """
        return MigratedAffineCoupling.in_place_of(super().condition(context), self.map)
