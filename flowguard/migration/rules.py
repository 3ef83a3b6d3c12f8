r"""How the maps that a migration puts into a layer are bounded, whatever the library."""

__all__ = ["MAKERS", "BoundOfMap", "made_otherwise"]

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowguard.bounds import (
    Envelope,
    Scale,
    Step,
    conditional,
    constant,
    departure,
    envelope,
    envelope_rule,
)
from flowguard.migration.imitate import Rescaled, RescaledSpline
from flowguard.migration.inscribe import InscribedAffine, InscribedLine, InscribedShift

#: What the units add to the roundings of a map: a sum and a division before it, a product and a
#: sum after it.
ROUNDINGS = 4


#: What makes maps of what a network says, by options and units that no condition changes.
MAKERS = (InscribedAffine, InscribedShift, RescaledSpline)


def made_otherwise(maker: Any, *classes: type) -> str:
    r"""Returns in words how what makes the maps of a layer departs from its class; empty if it is
    exactly of one of these.

    Arguments:
        maker: What the layer calls, with what its network says.
        classes: The classes.
    """
    return departure(maker, next((c for c in classes if isinstance(maker, c)), classes[0]))


class BoundOfMap:
    r"""Creates what is known of a robust map with conditional parameters, in units or not.

    The units on either side are constant, and told apart from the map for their sake: what one
    layer scales up, the next one often scales down.

    Arguments:
        f: The map from data to noise, with any parameters: its options and units count alone.
        sampling: Whether it is run towards data.
        strange: Why the map does not tell of the others that the layer makes, in words; see
            :func:`made_otherwise`.
    """

    def __init__(self, f: Any, sampling: bool, strange: str = "") -> None:
        self.base = f.base if isinstance(f, Rescaled) else f
        self.envelope = envelope(self.base, sampling)
        if strange and not self.envelope.reason:
            self.envelope = Envelope(reason=strange)
        self.units: tuple[Tensor, ...] = ()  # origin and unit before the map, and after it
        if isinstance(f, Rescaled):
            kind = InscribedLine if isinstance(f, InscribedLine) else Rescaled
            if strange := departure(f, kind):
                self.envelope = Envelope(reason=strange)
            units = tuple(constant(t).flatten() for t in torch.broadcast_tensors(*f.units))
            self.units = units[2:] + units[:2] if sampling else units

    def steps(self, mask: Tensor, name: str = "", kind: str = "") -> Iterator[Step]:
        r"""The steps, where it is known which features change.

        Arguments:
            mask: The features that change, with shape :math:`(D)`; units are in their order.
            name: The name of the map within the layer.
            kind: What it is, in words.
        """

        mask = mask.detach().cpu()

        def spread(t: Tensor, rest: float) -> Tensor:
            t = t.expand(int(mask.sum()))
            return torch.full(mask.shape, rest, dtype=t.dtype).masked_scatter(mask, t)

        step = conditional(self.envelope, name, kind, mask)
        if not self.units:
            yield step
            return
        loc, scale, loc_after, scale_after = self.units
        yield Scale(name=name, factor=spread(1 / scale, 1.0), offset=spread(-loc / scale, 0.0))
        yield step
        yield Scale(name=name, factor=spread(scale_after, 1.0), offset=spread(loc_after, 0.0))

    def anywhere(self) -> Step:
        r"""The step, where it is not known which features change, at which positions."""
        return conditional(self.overall().or_identity())

    def overall(self) -> Envelope:
        r"""What is known of the map of each feature, by the worst of all units."""
        g = self.envelope
        if g.reason or not self.units:
            return g
        loc, scale, loc_after, scale_after = self.units
        ratio = scale_after / scale
        moved = loc_after.abs() + ratio * g.gain * loc.abs()
        alike = bool((ratio == 1).all())  # then the map is near the identity, as the base is
        apart = (loc_after - loc).abs()

        def worst(t: Tensor) -> float:
            return t.max().item()

        return g._replace(
            gain=worst(ratio * g.gain),
            offset=worst(moved + scale_after * g.offset),
            floor=worst(scale_after * g.floor - ratio * g.gain * loc.abs()),
            displacement=worst(apart + scale * g.displacement) if alike else math.inf,
            inside=worst(loc_after.abs() + scale_after * g.inside) if alike else math.inf,
            edge=worst(loc.abs() + scale * g.edge) if alike else math.inf,
            roundings=g.roundings + ROUNDINGS,
            limit=self._reach,
        )

    def _reach(self, radius: float) -> float:
        loc, scale, loc_after, scale_after = self.units
        inner = ((radius + loc.abs()) / scale).tolist()
        reach = loc.new_tensor([self.envelope.reach(r) for r in inner])
        return (loc_after.abs() + scale_after * reach).max().item()


@envelope_rule(Rescaled, InscribedLine)
def _rescaled(f: Rescaled, sampling: bool) -> Envelope:
    return BoundOfMap(f, sampling).overall()
