r"""What nflows' layers become when a flow is made robust: the same networks under another map.

A head turns what the network of the old layer returns into robust maps. The old weights fit into
the new layers by name: a state dict of the flow before its migration can be loaded after it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from flowguard.bounds import Envelope, Refused, Scale, Step, conditional, constant, envelope, rule
from flowguard.migration.imitate import Rescaled
from flowguard.migration.inscribe import InscribedAffine, InscribedShift
from flowguard.spline.invert import unconstrain_softmax
from flowguard.transforms import AdditiveTransform, RobustSpline, Univariate

from .autoregressive import MaskedRobustSplineAutoregressiveTransform
from .coupling import RobustSplineCouplingTransform
from .spline import apply_map

__all__ = [
    "AffineHead",
    "CarriedHead",
    "CouplingFormula",
    "Head",
    "MaskedFormula",
    "MigratedAutoregressiveTransform",
    "MigratedCouplingTransform",
    "ShiftHead",
]

LARGEST = 1e20  # what scales and logits are cut at, so that infinite ones are finite


class CouplingFormula:
    r"""Creates a function from the outputs of a network to the scale and shift of a coupling, by
    the formula of the host's own class.

    Arguments:
        old: The host's layer.
    """

    def __init__(self, old: Any) -> None:
        self.source = type(old)
        self.num_transform_features = len(old.transform_features)
        if hasattr(old, "scale_activation"):  # glasflow's can be chosen
            self.scale_activation = old.scale_activation

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.source._scale_and_shift(self, raw)
        return scale.movedim(1, -1), shift.movedim(1, -1)


class MaskedFormula:
    r"""Creates the same for an autoregressive transform.

    Arguments:
        old: The host's layer.
    """

    def __init__(self, old: Any) -> None:
        self.activation = getattr(old, "scale_activation", None)  # glasflow's can be chosen
        self.least: float = old._epsilon

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        unconstrained, shift = raw.unflatten(1, (-1, 2)).unbind(-1)
        if self.activation is None:
            return F.softplus(unconstrained) + self.least, shift
        return self.activation(unconstrained), shift


class Head(nn.Module, abc.ABC):
    r"""The abstract way from the outputs of a network to robust maps."""

    outputs: int  # the numbers that the network returns for each feature

    @abc.abstractmethod
    def univariate(self, raw: Tensor) -> Univariate:
        r"""Returns the maps, for inputs whose last dimension are the features.

        Arguments:
            raw: The outputs of the network, with shape :math:`(N, C n)` or
                :math:`(N, C n, H, W)`, in no less than single precision.
        """

    @abc.abstractmethod
    def family(self) -> Univariate:
        r"""Returns one of the maps in its own units, to tell what bounds them all."""

    def units(self) -> tuple[Tensor, ...]:
        r"""Returns origin and unit of the input, and origin and unit of the output."""
        return ()

    def forward(self, x: Tensor, raw: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        r"""Transforms `x`, with shape :math:`(N, C)` or :math:`(N, C, H, W)`."""
        f = self.univariate(raw.to(torch.promote_types(raw.dtype, torch.float32)))
        y, ladj = apply_map(f, x.movedim(1, -1), inverse)
        return y.movedim(-1, 1).to(x.dtype), ladj


class AffineHead(Head):
    r"""Creates the head that follows affine maps.

    Arguments:
        formula: From outputs to scale and shift.
        map: The splines that follow them.
    """

    def __init__(self, formula: CouplingFormula | MaskedFormula, map: InscribedAffine) -> None:
        super().__init__()
        self.formula = formula
        self.map = map
        self.outputs = 2

    def univariate(self, raw: Tensor) -> Rescaled:
        r"""Returns the inscribed splines of the affine maps that these outputs of the network ask
        for."""
        scale, shift = self.formula(raw)
        return self.map(scale.clamp(max=LARGEST), shift)

    def family(self) -> RobustSpline:
        r"""Returns a spline of the family, whose envelope holds for all of them."""
        f, zeros = self.map, torch.zeros(1, 2)
        options: Any = {"bound": f.bound, "shift_bound": f.shift_bound, "slope": f.slope}
        return RobustSpline(zeros, zeros, zeros, torch.zeros(1), **options)

    def units(self) -> tuple[Tensor, ...]:
        r"""Returns location and scale of the inputs, and those of the outputs."""
        return self.map.loc_in, self.map.scale_in, self.map.loc_out, self.map.scale_out


class ShiftHead(Head):
    r"""Creates the head that follows shifts.

    Arguments:
        map: The bounded shifts that follow them.
    """

    def __init__(self, map: InscribedShift) -> None:
        super().__init__()
        self.map = map
        self.outputs = 1

    def univariate(self, raw: Tensor) -> Rescaled:
        r"""Returns the bounded shifts that these outputs of the network ask for."""
        return self.map(raw.movedim(1, -1))

    def family(self) -> AdditiveTransform:
        r"""Returns a shift of the family, whose bound holds for all of them."""
        return AdditiveTransform(torch.zeros(1), self.map.shift_bound)

    def units(self) -> tuple[Tensor, ...]:
        r"""Returns location and scale of the inputs, and those of the outputs."""
        f = self.map
        return torch.zeros_like(f.loc), f.scale, f.loc, f.scale


class CarriedHead(Head):
    r"""Creates the head that takes over the knots of the host's rational-quadratic splines.

    Arguments:
        old: The host's layer.
        width: What the host divides the logits of widths and heights by, squared.
        slope: The least slope of the robust splines.
    """

    def __init__(self, old: Any, width: int, slope: float | None) -> None:
        super().__init__()
        self.bins: int = old.num_bins
        self.bound: float = float(old.tail_bound)
        self.least: tuple[float, float, float] = (
            old.min_bin_width,
            old.min_bin_height,
            old.min_derivative,
        )
        self.divisor = math.sqrt(width)
        self.slope = slope
        self.outputs = 3 * self.bins - 1

    def extra_repr(self) -> str:
        r"""Returns bins and bound, for the printed module."""
        return f"bins={self.bins}, bound={self.bound:g}"

    def logits(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns the host's logits of widths, heights and slopes, each :math:`(N, *, C, n)`."""
        phi = raw.unflatten(1, (-1, self.outputs)).movedim((1, 2), (-2, -1))
        widths, heights, slopes = phi.split([self.bins, self.bins, self.bins - 1], dim=-1)
        return widths / self.divisor, heights / self.divisor, slopes

    def univariate(self, raw: Tensor) -> RobustSpline:
        r"""Returns the splines that these outputs of the network ask for."""
        w, h, d = unconstrain_softmax(*self.logits(raw), least=self.least, slope=self.slope)
        return RobustSpline(w, h, d, bound=self.bound, slope=self.slope)

    def family(self) -> RobustSpline:
        r"""Returns a spline of the family, whose envelope holds for all of them."""
        zeros = torch.zeros(1, 1)
        return RobustSpline(zeros, zeros, zeros, bound=self.bound, slope=self.slope)


class MigratedCouplingTransform(RobustSplineCouplingTransform):
    r"""Creates the robust coupling that takes the place of one of the host's.

    Arguments:
        old: The host's layer, whose masks, network and unconditional part are taken over.
        head: What turns the outputs of the network into robust maps.
    """

    def __init__(self, old: Any, head: Head) -> None:
        nn.Module.__init__(self)  # of the parts of the old one, there is nothing to build
        self.features = old.features
        self.register_buffer("identity_features", old.identity_features)
        self.register_buffer("transform_features", old.transform_features)
        self.transform_net = old.transform_net
        self.unconditional_transform = old.unconditional_transform
        self.head = head.train(old.training)  # type: ignore[assignment]
        self.training = old.training

    def _transform_dim_multiplier(self) -> int:
        return self.head.outputs  # type: ignore[return-value]


class MigratedAutoregressiveTransform(MaskedRobustSplineAutoregressiveTransform):
    r"""Creates the robust autoregressive transform that takes the place of one of the host's.

    Arguments:
        old: The host's layer, whose network is taken over.
        features: The number of features.
        head: What turns the outputs of the network into robust maps.
    """

    def __init__(self, old: Any, features: int, head: Head) -> None:
        nn.Module.__init__(self)
        self.features = features
        self.autoregressive_net = old.autoregressive_net
        self.head = head.train(old.training)  # type: ignore[assignment]
        self.training = old.training

    def _output_dim_multiplier(self) -> int:
        return self.head.outputs  # type: ignore[return-value]


@rule(MigratedCouplingTransform)
def _coupling(layer: Any, inverse: bool) -> Iterator[Step]:
    mask = torch.zeros(layer.features, dtype=torch.bool)
    mask[layer.transform_features.cpu()] = True
    if layer.unconditional_transform is not None:
        yield _unconditional(layer.unconditional_transform, ~mask)
    yield from _map_steps(layer.head, mask, inverse)


@rule(MigratedAutoregressiveTransform)
def _autoregressive(layer: Any, inverse: bool) -> Iterator[Step]:
    yield from _map_steps(layer.head, torch.ones(layer.features, dtype=torch.bool), inverse)


def _unconditional(part: Any, mask: Tensor) -> Step:
    name, kind = "unconditional_transform", type(part).__name__
    if kind != "PiecewiseRationalQuadraticCDF" or part.tails != "linear":
        return Refused(name=name, kind=kind, reason="flowguard knows no rule for it")
    bound = float(part.tail_bound)
    g = Envelope(1.0, 0.0, floor=bound, displacement=2 * bound, depends="not at all")
    return conditional(g, name, kind, mask)


def _map_steps(head: Head, mask: Tensor, inverse: bool) -> Iterator[Step]:
    r"""The units on either side are constant, and told apart from the map for their sake: what
    one layer scales up, the next one often scales down."""
    before, after = _scales(head.units(), mask, inverse)
    f = head.family()
    yield from before
    yield conditional(envelope(f, inverse), "head", f"{type(head).__name__}[{f}]", mask)
    yield from after


def _scales(
    units: tuple[Tensor, ...], mask: Tensor, inverse: bool
) -> tuple[list[Step], list[Step]]:
    if not units:
        return [], []
    ones, zeros = torch.ones(len(mask), dtype=torch.float64), torch.zeros(len(mask)).double()
    loc_in, scale_in, loc_out, scale_out = (
        whole.masked_scatter(mask, constant(t).cpu())
        for whole, t in zip((zeros, ones, zeros, ones), units, strict=True)
    )
    if inverse:
        loc_in, scale_in, loc_out, scale_out = loc_out, scale_out, loc_in, scale_in
    first = Scale(name="head.map", factor=1 / scale_in, offset=-loc_in / scale_in)
    return [first], [Scale(name="head.map", factor=scale_out, offset=loc_out)]
