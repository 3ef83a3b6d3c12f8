r"""What a migration hears from normflows' layers, and what it makes of them.

The maps are heard in a pass from data to noise, which runs the `inverse` of normflows' layers, and
the `forward` of those that are reversed. Their networks are kept as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
from normflows.flows import (
    AffineCoupling,
    AffineCouplingBlock,
    AutoregressiveRationalQuadraticSpline,
    CoupledRationalQuadraticSpline,
    MaskedAffineAutoregressive,
    MaskedAffineFlow,
)
from normflows.flows.neural_spline.autoregressive import (
    MaskedPiecewiseRationalQuadraticAutoregressive,
)
from normflows.flows.neural_spline.coupling import (
    PiecewiseRationalQuadraticCoupling,
)
from normflows.utils import splines
from torch import Tensor

from flowguard.migration import Site
from flowguard.migration.imitate import Affine, AnyTransform, RescaledSpline
from flowguard.migration.inscribe import InscribedAffine, InscribedShift
from flowguard.transforms import Univariate

from .migrated import (
    CarriedAutoregressiveSpline,
    CarriedCDF,
    CarriedCoupledSpline,
    CarriedCoupling,
    CarriedMaskedSpline,
    MigratedAutoregressive,
    MigratedCoupling,
    MigratedCouplingBlock,
    MigratedMasked,
    autoregressive_scale,
    coupling_scale,
    masked_scale,
    towards_noise,
)

__all__ = ["SITES"]

Heard = tuple[Tensor, ...]


@contextmanager
def _overheard(layer: Any, tell: Callable[[bool, Any], None]) -> Iterator[None]:
    r"""Tells, within the context, the direction and the input of each call, when it is done."""

    def spy(method: Callable[..., Any], forward: bool) -> Callable[..., Any]:
        def call(z: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(z, *args, **kwargs)
            tell(forward, z)
            return result

        return call

    spies = {name: spy(getattr(layer, name), name == "forward") for name in ("forward", "inverse")}
    vars(layer).update(spies)
    try:
        yield
    finally:
        for name in spies:
            del vars(layer)[name]


class _Layer(Site):
    r"""A layer of normflows, which becomes another class in its place.

    Arguments:
        model: The model.
        name: The name of the layer within the model.
        layer: The layer.
        kind: What it is, in words.
        additive: Whether it only shifts.
    """

    def __init__(
        self, model: nn.Module, name: str, layer: Any, kind: str, additive: bool = False
    ) -> None:
        super().__init__(name, kind, additive)
        self.model = model
        self.layer = layer
        self.forward = False  # whether it goes forward from data to noise
        self.asked: list[Heard] = []

    @property
    def net(self) -> nn.Module | None:
        r"""The network whose output is heard, if that is of interest."""
        return None

    def hear(self, z: Any, said: Tensor) -> Heard:
        r"""Returns the inputs of the map, features last, and what gives its parameters.

        Arguments:
            z: The input of the layer.
            said: What its network said last.
        """
        raise NotImplementedError

    @contextmanager
    def listen(self) -> Iterator[None]:
        said: list[Tensor] = [torch.empty(0)]

        def hear(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # One after another, an autoregressive network gets its inputs: the last pass has them
            # all. Some layers write into what it says.
            said[0] = output.clone()

        def tell(forward: bool, z: Any) -> None:
            self.forward = forward
            self.asked.append(self.hear(z, said[0]))

        with ExitStack() as stack:
            if self.net is not None:
                stack.callback(self.net.register_forward_hook(hear).remove)
            stack.enter_context(_overheard(self.layer, tell))
            yield

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

    robust: type[nn.Module]

    def _map(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        return towards_noise(self.part(1)[rows], self.part(2)[rows], self.forward)

    def old(self, rows: Tensor | slice) -> Affine:
        slope, intercept = self._map(rows)
        return Affine(slope.log(), intercept)

    def replace(self, spline: RescaledSpline) -> list[nn.Parameter]:
        slope, intercept = self._map(slice(None))
        layer = self.layer
        layer.map = (
            InscribedShift(spline, intercept)
            if self.additive
            else InscribedAffine(spline, self.inputs, slope, intercept)
        ).train(layer.training)
        layer.flipped = self.forward
        layer.__class__ = self.robust
        return []  # there is nothing to fit

    def new(self, rows: Tensor | slice) -> AnyTransform:
        return self.layer.follow(self.part(1)[rows], self.part(2)[rows])


class _Coupling(_AffineLayer):
    robust = MigratedCoupling

    def __init__(self, model: nn.Module, name: str, layer: AffineCoupling) -> None:
        kind = f"AffineCoupling[{layer.scale_map if layer.scale else 'additive'}]"
        super().__init__(model, name, layer, kind, additive=not layer.scale)

    @property
    def net(self) -> nn.Module:
        return self.layer.param_map

    def hear(self, z: Any, said: Tensor) -> Heard:
        self.kept = z[0].shape[1]
        return z[1].movedim(1, -1), *coupling_scale(self.layer, said.movedim(1, -1))

    def replace(self, spline: RescaledSpline) -> list[nn.Parameter]:
        self.layer.kept = self.kept
        blocks: list[Any] = [m for m in self.model.modules() if type(m) is AffineCouplingBlock]
        for block in blocks:
            if any(part is self.layer for part in block.flows):
                block.__class__ = MigratedCouplingBlock
        return super().replace(spline)


class _Masked(_AffineLayer):
    robust = MigratedMasked

    def __init__(self, model: nn.Module, name: str, layer: MaskedAffineFlow) -> None:
        additive = not isinstance(layer.s, nn.Module)
        kind = "MaskedAffineFlow[additive]" if additive else "MaskedAffineFlow"
        super().__init__(model, name, layer, kind, additive)

    def hear(self, z: Any, said: Tensor) -> Heard:
        changed = self.layer.b.flatten() == 0
        return z.flatten(1)[:, changed], *masked_scale(self.layer, z)


class _Autoregressive(_AffineLayer):
    robust = MigratedAutoregressive

    def __init__(self, model: nn.Module, name: str, layer: MaskedAffineAutoregressive) -> None:
        super().__init__(model, name, layer, "MaskedAffineAutoregressive")

    @property
    def net(self) -> nn.Module:
        return self.layer.autoregressive_net

    def hear(self, z: Any, said: Tensor) -> Heard:
        return z, *autoregressive_scale(said)


class _HostSpline(Univariate):
    r"""A spline of normflows.

    Arguments:
        layer: The layer, which knows the box and the least sizes.
        logits: Widths, heights and slopes.
    """

    def __init__(self, layer: Any, logits: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.layer = layer
        self.logits = logits

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        layer = self.layer
        y, ladj = splines.unconstrained_rational_quadratic_spline(
            x,
            *self.logits,
            inverse=inverse,
            tails="linear",
            tail_bound=float(layer.tail_bound),
            min_bin_width=layer.min_bin_width,
            min_bin_height=layer.min_bin_height,
            min_derivative=layer.min_derivative,
        )
        return y, ladj

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, inverse=False)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(y, inverse=True)


class _Spline(_Layer):
    r"""A spline layer, which keeps its network and its knots.

    These inner layers of normflows go `forward` in the direction of their spline; the wrappers
    around them turn them round.
    """

    def __init__(self, model: nn.Module, name: str, layer: Any) -> None:
        super().__init__(model, name, layer, type(layer).__name__)
        self.coupling = isinstance(layer, PiecewiseRationalQuadraticCoupling)

    @property
    def net(self) -> nn.Module:
        layer = self.layer
        return layer.transform_net if self.coupling else layer.autoregressive_net

    def hear(self, z: Any, said: Tensor) -> Heard:
        layer = self.layer
        x = z[:, layer.transform_features] if self.coupling else z
        return x.movedim(1, -1), said.unflatten(1, (x.shape[1], -1)).movedim((1, 2), (-2, -1))

    def carry(self, slope: float | None) -> bool:
        layer = self.layer
        layer.slope = slope
        layer.__class__ = CarriedCoupling if self.coupling else CarriedMaskedSpline
        constant = getattr(layer, "unconditional_transform", None)
        if constant is not None:
            constant.slope = slope
            constant.__class__ = CarriedCDF
        for wrapper in self.model.modules():
            if type(wrapper) is CoupledRationalQuadraticSpline and wrapper.prqct is layer:
                wrapper.__class__ = CarriedCoupledSpline
            if type(wrapper) is AutoregressiveRationalQuadraticSpline and wrapper.mprqat is layer:
                wrapper.__class__ = CarriedAutoregressiveSpline
        return True

    def replace(self, spline: RescaledSpline) -> list[nn.Parameter]:
        raise NotImplementedError("a spline is carried over, not replaced")

    def old(self, rows: Tensor | slice) -> AnyTransform:
        f = _HostSpline(self.layer, self.layer.logits(self.part(1)[rows]))
        return f if self.forward else f.inv

    def new(self, rows: Tensor | slice) -> AnyTransform:
        f = self.layer.carry(*self.layer.logits(self.part(1)[rows]))
        return f if self.forward else f.inv


SITES: dict[type, Callable[[nn.Module, str, Any], Site]] = {
    AffineCoupling: _Coupling,
    MaskedAffineFlow: _Masked,
    MaskedAffineAutoregressive: _Autoregressive,
    PiecewiseRationalQuadraticCoupling: _Spline,
    MaskedPiecewiseRationalQuadraticAutoregressive: _Spline,
}
