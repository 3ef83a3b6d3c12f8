r"""How the maps that a migration puts into a layer are bounded, whatever the library."""

__all__ = ["BoundOfMap"]

from collections.abc import Iterator

import torch
from torch import Tensor

from flowguard.bounds import Envelope, Scale, Step, conditional, constant, envelope
from flowguard.migration.imitate import Rescaled
from flowguard.transforms import Univariate


class BoundOfMap:
    r"""Creates what is known of a robust map with conditional parameters, in units or not.

    The units on either side are constant, and told apart from the map for their sake: what one
    layer scales up, the next one often scales down.

    Arguments:
        f: The map from data to noise, with any parameters: its options and units count alone.
        sampling: Whether it is run towards data.
    """

    def __init__(self, f: Univariate, sampling: bool) -> None:
        self.base = f.base if isinstance(f, Rescaled) else f
        self.envelope = envelope(self.base, sampling)
        self.units: tuple[Tensor, ...] = ()  # origin and unit before the map, and after it
        if isinstance(f, Rescaled):
            units = tuple(constant(t) for t in f.units)
            self.units = units[2:] + units[:2] if sampling else units

    def steps(self, mask: Tensor, name: str = "", kind: str = "") -> Iterator[Step]:
        r"""The steps, where it is known which features change.

        Arguments:
            mask: The features that change, with shape :math:`(D)`; units are in their order.
            name: The name of the map within the layer.
            kind: What it is, in words.
        """

        def spread(t: Tensor, rest: float) -> Tensor:
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
        g = self.envelope
        return conditional(g if g.reason else Envelope(limit=self._reach, depends=g.depends))

    def _reach(self, radius: float) -> float:
        loc, scale, loc_after, scale_after = self.units
        inner = ((radius + loc.abs()) / scale).tolist()
        reach = loc.new_tensor([self.envelope.reach(r) for r in inner])
        return max(radius, (loc_after.abs() + scale_after * reach).max().item())
