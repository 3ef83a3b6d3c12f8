r"""What a migration hears from normflows' layers, and what it makes of them.

The maps are heard in a pass from data to noise, which runs the `inverse` of normflows' layers, and
the `forward` of those that are reversed. Their networks are kept as they are.
"""

__all__ = ["SITES"]

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn as nn
from normflows.distributions.base import ConditionalDiagGaussian
from normflows.flows import AffineCoupling, MaskedAffineAutoregressive, MaskedAffineFlow
from normflows.flows.neural_spline.autoregressive import (
    MaskedPiecewiseRationalQuadraticAutoregressive,
)
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
from normflows.utils import splines
from torch import Tensor

from flowguard.migration import Site, Surgeon
from flowguard.migration.exchange import overhear, successor
from flowguard.migration.imitate import AffineMap, AnyTransform, RescaledSpline
from flowguard.migration.inscribe import InscribedAffine, InscribedShift
from flowguard.migration.knots import HostSpline, Knots
from flowguard.migration.moments import BoundedMoments, MomentsSite
from flowguard.numerics import instead

from .bases import BoundedDiagGaussian, moments_of
from .migrated import (
    CarriedCDF,
    CarriedCoupling,
    CarriedMaskedSpline,
    MigratedAutoregressive,
    MigratedCoupling,
    MigratedMasked,
    autoregressive_scale,
    coupling_knots,
    coupling_scale,
    masked_knots,
    masked_scale,
    towards_noise,
)

Heard = tuple[Tensor, ...]


class _Layer(Site):
    r"""A layer of normflows; what takes its place is of a class derived from its own."""

    def __init__(
        self, operation: Surgeon, name: str, layer: Any, kind: str, additive: bool = False
    ) -> None:
        super().__init__(operation, name, layer, kind, additive)
        self.forward = False  # whether it goes forward from data to noise
        self.asked: list[Heard] = []

    @property
    def net(self) -> nn.Module | None:
        r"""The network whose output is heard, if that is of interest."""
        return None

    def hear(self, z: Any, said: Any) -> Heard:
        r"""Returns the inputs of the map, features last, and what gives its parameters.

        Arguments:
            z: The input of the layer.
            said: What its network said last.
        """
        raise NotImplementedError

    def listen(self) -> AbstractContextManager[None]:
        def tell(direction: str, z: Any, result: Any, said: Any) -> None:
            self.forward = direction == "forward"
            self.asked.append(self.hear(z, said))

        return overhear(self.layer, self.net, tell)

    @property
    def heard(self) -> bool:
        return bool(self.asked)

    def part(self, i: int) -> Tensor:
        r"""Returns one part of what was heard."""
        return torch.cat([heard[i] for heard in self.asked])

    @property
    def inputs(self) -> Tensor:
        return self.part(0)


class _AffineLayer(_Layer):
    r"""A layer that is affine; it hears inputs, logarithms of scales, and shifts."""

    kind_of_robust: type[nn.Module]

    def _map(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        return towards_noise(self.part(1)[rows], self.part(2)[rows], self.forward)

    def old(self, rows: Tensor | slice) -> AffineMap:
        slope, intercept = self._map(rows)
        return AffineMap(slope.log(), intercept)

    def build(self, spline: RescaledSpline) -> nn.Module:
        slope, intercept = self._map(slice(None))
        map: nn.Module = (
            InscribedShift(spline, intercept)
            if self.additive
            else InscribedAffine.around(spline, self.inputs, slope, intercept)
        )
        return successor(
            self.layer,
            self.kind_of_robust,
            map=map.train(self.layer.training),
            flipped=self.forward,
        )

    def new(self, rows: Tensor | slice) -> AnyTransform:
        return self.robust.follow(self.part(1)[rows], self.part(2)[rows])


class _Coupling(_AffineLayer):
    kind_of_robust = MigratedCoupling

    def __init__(self, operation: Surgeon, name: str, layer: AffineCoupling) -> None:
        kind = f"AffineCoupling[{layer.scale_map if layer.scale else 'additive'}]"
        super().__init__(operation, name, layer, kind, additive=not layer.scale)

    @property
    def net(self) -> nn.Module:
        return self.layer.param_map

    def hear(self, z: Any, said: Any) -> Heard:
        self.kept = z[0].shape[1]
        return z[1].movedim(1, -1), *coupling_scale(self.layer, said.movedim(1, -1))

    def build(self, spline: RescaledSpline) -> nn.Module:
        new: Any = super().build(spline)
        new.kept = self.kept
        return new


class _Masked(_AffineLayer):
    kind_of_robust = MigratedMasked

    def __init__(self, operation: Surgeon, name: str, layer: MaskedAffineFlow) -> None:
        additive = not isinstance(layer.s, nn.Module)
        kind = "MaskedAffineFlow[additive]" if additive else "MaskedAffineFlow"
        super().__init__(operation, name, layer, kind, additive)

    def hear(self, z: Any, said: Any) -> Heard:
        changed = self.layer.b.flatten() == 0
        return z.flatten(1)[:, changed], *masked_scale(self.layer, z)


class _Autoregressive(_AffineLayer):
    kind_of_robust = MigratedAutoregressive

    def __init__(self, operation: Surgeon, name: str, layer: MaskedAffineAutoregressive) -> None:
        super().__init__(operation, name, layer, "MaskedAffineAutoregressive")

    @property
    def net(self) -> nn.Module:
        return self.layer.autoregressive_net

    def hear(self, z: Any, said: Any) -> Heard:
        return z, *autoregressive_scale(said)


class _Spline(_Layer):
    r"""A spline layer, which keeps its network and its knots.

    These inner layers of normflows go `forward` in the direction of their spline; the wrappers
    around them turn them round.
    """

    def __init__(self, operation: Surgeon, name: str, layer: Any) -> None:
        super().__init__(operation, name, layer, type(layer).__name__)
        self.coupling = isinstance(layer, PiecewiseRationalQuadraticCoupling)

    @property
    def net(self) -> nn.Module:
        layer = self.layer
        return layer.transform_net if self.coupling else layer.autoregressive_net

    def hear(self, z: Any, said: Any) -> Heard:
        layer = self.layer
        x = z[:, layer.transform_features] if self.coupling else z
        return x.movedim(1, -1), said.unflatten(1, (x.shape[1], -1)).movedim((1, 2), (-2, -1))

    def _knots(self) -> Knots:
        return (coupling_knots if self.coupling else masked_knots)(self.layer, None)

    def carry(self, slope: float | None) -> nn.Module:
        if not self.coupling:
            return successor(self.layer, CarriedMaskedSpline, slope=slope)
        constant = self.layer.unconditional_transform
        if constant is not None:
            constant = successor(constant, CarriedCDF, slope=slope)
        return successor(
            self.layer, CarriedCoupling, slope=slope, unconditional_transform=constant
        )

    def build(self, spline: RescaledSpline) -> nn.Module:
        raise NotImplementedError("a spline is carried over, not built")

    def old(self, rows: Tensor | slice) -> AnyTransform:
        knots, function = self._knots(), splines.unconstrained_rational_quadratic_spline
        f = HostSpline(function, knots, knots.logits(self.part(1)[rows]))
        return f if self.forward else f.inv

    def new(self, rows: Tensor | slice) -> AnyTransform:
        f = self.robust.univariate(self.part(1)[rows])
        return f if self.forward else f.inv


class _Base(MomentsSite):
    r"""The conditional Gaussian base."""

    @contextmanager
    def listen(self) -> Iterator[None]:
        density = self.layer.log_prob

        def hear(z: Tensor, context: Any = None) -> Tensor:
            self.tell(*(t.expand_as(z) for t in moments_of(self.layer, context)))
            result: Tensor = density(z, context)
            return result

        with instead(self.layer, "log_prob", hear):
            yield

    def bounded(self, bounds: BoundedMoments) -> nn.Module:
        return BoundedDiagGaussian.in_place_of(self.layer, bounds)


#: What makes the site of a layer, by the class of the layer.
SITES: dict[type, Callable[[Surgeon, str, Any], Site]] = {
    AffineCoupling: _Coupling,
    MaskedAffineFlow: _Masked,
    MaskedAffineAutoregressive: _Autoregressive,
    ConditionalDiagGaussian: _Base,
    PiecewiseRationalQuadraticCoupling: _Spline,
    MaskedPiecewiseRationalQuadraticAutoregressive: _Spline,
}
