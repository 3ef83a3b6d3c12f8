r"""What normflows' layers become in a migration: the same networks, under robust maps.

As in normflows, `forward` goes from noise to data and `inverse` from data to noise. The classes
take over layers as they are, by their ``__class__``: parameters keep their names, so that a state
of the old model can be loaded into the new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
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
    PiecewiseRationalQuadraticCDF,
    PiecewiseRationalQuadraticCoupling,
)
from torch import Tensor
from torch.nn import functional as F

from flowguard.bounds import Envelope, Scale, Step, conditional, constant, envelope, rule, within
from flowguard.migration.imitate import Rescaled
from flowguard.migration.inscribe import InscribedAffine, InscribedShift
from flowguard.numerics import cut
from flowguard.spline.invert import unconstrain_softmax
from flowguard.transforms import RobustSpline

__all__ = [
    "CarriedAutoregressiveSpline",
    "CarriedCDF",
    "CarriedCoupledSpline",
    "CarriedCoupling",
    "CarriedMaskedSpline",
    "MigratedAutoregressive",
    "MigratedCoupling",
    "MigratedCouplingBlock",
    "MigratedMasked",
    "autoregressive_scale",
    "coupling_scale",
    "masked_scale",
    "towards_noise",
]

STEEPEST = 46.0  # what logarithms of slopes are cut at, so that infinite ones are finite
FARTHEST = 1e20  # what shifts are cut at


def coupling_scale(layer: AffineCoupling, phi: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the logarithm of the scale, and the shift, of a coupling that goes `forward`.

    Arguments:
        layer: The layer, of which the formula is asked only.
        phi: What its network says, features last.
    """
    if not layer.scale:
        return torch.zeros_like(phi), phi
    shift, raw = phi[..., 0::2], phi[..., 1::2]
    if layer.scale_map == "exp":
        return raw, shift
    log_scale = F.logsigmoid(raw + 2)
    return (-log_scale if layer.scale_map == "sigmoid" else log_scale), shift


def masked_scale(layer: MaskedAffineFlow, z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the same of a masked flow, for the elements that change.

    Arguments:
        layer: The layer.
        z: Its input.
    """
    kept = layer.b * z
    changed = layer.b.flatten() == 0
    log_scale, shift = (
        net(kept).expand_as(z).flatten(1)[:, changed] for net in (layer.s, layer.t)
    )
    return log_scale, shift


def autoregressive_scale(phi: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the same of an autoregressive flow.

    Arguments:
        phi: What its network says, with shape :math:`(N, 2 D)`.
    """
    raw, shift = phi.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.log(torch.sigmoid(raw + 2.0) + 1e-3), shift


def towards_noise(log_scale: Tensor, shift: Tensor, flipped: bool) -> tuple[Tensor, Tensor]:
    r"""Returns slope and intercept of the map from data to noise.

    Arguments:
        log_scale: The logarithm of the scale of the layer that goes `forward`.
        shift: The shift of it.
        flipped: Whether it is `forward` that goes from data to noise.
    """
    log_scale = log_scale.clamp(-STEEPEST, STEEPEST)
    shift = shift.clamp(-FARTHEST, FARTHEST)
    if flipped:
        return log_scale.exp(), shift
    slope = (-log_scale).exp()
    return slope, -shift * slope


class _Inscribed:
    r"""What layers have in common that follow affine maps.

    Arguments:
        map: The robust maps that follow those from data to noise.
        flipped: Whether it is `forward` that goes from data to noise.
    """

    map: InscribedAffine | InscribedShift
    flipped: bool

    def follow(self, log_scale: Tensor, shift: Tensor) -> Rescaled:
        r"""Returns the robust map from data to noise.

        Arguments:
            log_scale: The logarithm of the scale of the old layer that goes `forward`.
            shift: The shift of it.
        """
        dtype = torch.promote_types(log_scale.dtype, torch.float32)
        slope, intercept = towards_noise(log_scale.to(dtype), shift.to(dtype), self.flipped)
        if isinstance(self.map, InscribedShift):
            return self.map(intercept)
        return self.map(slope, intercept)

    def run(self, f: Rescaled, x: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
        r"""Runs the map in one direction of the layer.

        Arguments:
            f: The map from data to noise.
            x: What goes in, features last.
            forward: Whether the layer goes `forward`.
        """
        towards_noise = forward == self.flipped
        y, ladj = f.call_and_ladj(x) if towards_noise else f.inverse_and_ladj(x)
        return y.to(x.dtype), _summed(ladj).to(x.dtype)


def _summed(ladj: Tensor) -> Tensor:
    return ladj.sum(dim=tuple(range(1, ladj.dim())))


class MigratedCoupling(_Inscribed, AffineCoupling):
    r"""The robust form of normflows' ``AffineCoupling``, a map of ``[z1, z2]``.

    Arguments:
        kept: The number of features of `z1`.
    """

    kept: int

    def _run(self, z: list[Tensor], forward: bool) -> tuple[list[Tensor], Tensor]:
        z1, z2 = z
        phi = self.param_map(z1).movedim(1, -1)
        y, ladj = self.run(self.follow(*coupling_scale(self, phi)), z2.movedim(1, -1), forward)
        return [z1, y.movedim(-1, 1)], ladj

    def forward(self, z: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        r"""Goes from noise to data."""
        return self._run(z, True)

    def inverse(self, z: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        r"""Goes from data to noise."""
        return self._run(z, False)


class MigratedCouplingBlock(AffineCouplingBlock):
    r"""The robust form of normflows' ``AffineCouplingBlock``: split, robust coupling, merge."""


class MigratedMasked(_Inscribed, MaskedAffineFlow):
    r"""The robust form of normflows' ``MaskedAffineFlow``."""

    def _run(self, z: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
        changed = (self.b.flatten() == 0).nonzero()[:, 0]
        flat = z.flatten(1)
        y, ladj = self.run(self.follow(*masked_scale(self, z)), flat[:, changed], forward)
        return flat.index_copy(1, changed, y).view(z.shape), ladj

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Goes from noise to data."""
        return self._run(z, True)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Goes from data to noise."""
        return self._run(z, False)


class _Cut:
    r"""What layers have in common that hand a context to their network: an infinite one is cut."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Runs the host's `forward`."""
        context = None if context is None else cut(context)
        return super().forward(z, context)  # type: ignore[misc]

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Runs the host's `inverse`."""
        context = None if context is None else cut(context)
        return super().inverse(z, context)  # type: ignore[misc]


class MigratedAutoregressive(_Inscribed, _Cut, MaskedAffineAutoregressive):
    r"""The robust form of normflows' ``MaskedAffineAutoregressive``."""

    def _elementwise_forward(self, inputs: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(self.follow(*autoregressive_scale(phi)), inputs, True)

    def _elementwise_inverse(self, inputs: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(self.follow(*autoregressive_scale(phi)), inputs, False)


class _Carried:
    r"""What splines of normflows have in common that are robust now.

    Arguments:
        slope: The least slope.
    """

    slope: float | None
    num_bins: int
    tail_bound: float | Tensor
    min_bin_width: float
    min_bin_height: float
    min_derivative: float

    def carry(self, widths: Tensor, heights: Tensor, derivatives: Tensor) -> RobustSpline:
        r"""Returns the robust spline with the knots of a spline of normflows.

        Arguments:
            widths: The widths, as normflows takes them, with shape :math:`(*, K)`.
            heights: The heights, as normflows takes them, with shape :math:`(*, K)`.
            derivatives: The slopes, as normflows takes them, with shape :math:`(*, K - 1)`.
        """
        least = (self.min_bin_width, self.min_bin_height, self.min_derivative)
        w, h, d = unconstrain_softmax(widths, heights, derivatives, least=least, slope=self.slope)
        return RobustSpline(w, h, d, bound=float(self.tail_bound), slope=self.slope)

    def split(self, phi: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns widths, heights and slopes, as normflows takes them.

        Arguments:
            phi: What the network says about each feature, with shape :math:`(*, 3 K - 1)`.
            width: The width of the network, if it tells.
        """
        widths, heights, slopes = phi.split((self.num_bins,) * 2 + (self.num_bins - 1,), dim=-1)
        return widths / width**0.5, heights / width**0.5, slopes


class CarriedCDF(_Carried, PiecewiseRationalQuadraticCDF):
    r"""A spline of normflows without a condition, made robust."""

    def _spline(self, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        f = self.carry(
            self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
        )
        y, ladj = f.inverse_and_ladj(inputs) if inverse else f.call_and_ladj(inputs)
        return y, _summed(ladj)


class CarriedCoupling(_Carried, _Cut, PiecewiseRationalQuadraticCoupling):
    r"""A spline coupling of normflows, made robust."""

    def logits(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns widths, heights and slopes, as normflows takes them.

        Arguments:
            phi: What the network says about each feature.
        """
        net: Any = self.transform_net
        width = getattr(net, "hidden_features", getattr(net, "hidden_channels", 1))
        return self.split(phi, width)

    def _coupling_transform(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        phi = transform_params.unflatten(1, (-1, self._transform_dim_multiplier())).movedim(2, -1)
        y, ladj = self._piecewise_cdf(inputs, phi, inverse)
        return y, _summed(ladj)

    def _piecewise_cdf(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        f = self.carry(*self.logits(transform_params))
        return f.inverse_and_ladj(inputs) if inverse else f.call_and_ladj(inputs)


class CarriedMaskedSpline(_Carried, _Cut, MaskedPiecewiseRationalQuadraticAutoregressive):
    r"""An autoregressive spline of normflows, made robust."""

    def logits(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns widths, heights and slopes, as normflows takes them.

        Arguments:
            phi: What the network says about each feature.
        """
        return self.split(phi, getattr(self.autoregressive_net, "hidden_features", 1))

    def _elementwise(
        self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        phi = autoregressive_params.unflatten(-1, (-1, self._output_dim_multiplier()))
        f = self.carry(*self.logits(phi))
        y, ladj = f.inverse_and_ladj(inputs) if inverse else f.call_and_ladj(inputs)
        return y, _summed(ladj)


class CarriedCoupledSpline(CoupledRationalQuadraticSpline):
    r"""The robust form of normflows' ``CoupledRationalQuadraticSpline``."""


class CarriedAutoregressiveSpline(AutoregressiveRationalQuadraticSpline):
    r"""The robust form of normflows' ``AutoregressiveRationalQuadraticSpline``."""


class _Units:
    r"""The maps of a layer in the direction of sampling, as the certificate sees them.

    Arguments:
        layer: The layer.
        inverse: Whether sampling runs the layer from noise to data, which is its `forward`.
    """

    def __init__(self, layer: _Inscribed, inverse: bool) -> None:
        zeros = torch.zeros_like(next(layer.map.buffers()))
        f = layer.follow(zeros, zeros)
        from_noise = inverse != layer.flipped
        self.g = envelope(f.base, from_noise)
        units = [constant(t) for t in (f.loc_in, f.scale_in, f.loc_out, f.scale_out)]
        self.loc, self.scale, self.loc_after, self.scale_after = (
            units[2:] + units[:2] if from_noise else units
        )

    def steps(self, mask: Tensor) -> Iterator[Step]:
        r"""The steps of the features in `mask`, which have these units in their order."""

        def spread(t: Tensor, rest: float) -> Tensor:
            return torch.full(mask.shape, rest, dtype=t.dtype).masked_scatter(mask, t)

        yield Scale(factor=spread(1 / self.scale, 1.0), offset=spread(-self.loc / self.scale, 0.0))
        yield conditional(self.g, mask=mask)
        yield Scale(factor=spread(self.scale_after, 1.0), offset=spread(self.loc_after, 0.0))

    def anywhere(self) -> Step:
        r"""The step where it is not known which features, at which positions, change."""
        g = self.g
        return conditional(g if g.reason else Envelope(limit=self._reach, depends=g.depends))

    def _reach(self, radius: float) -> float:
        inner = ((radius + self.loc.abs()) / self.scale).tolist()
        reach = self.loc.new_tensor([self.g.reach(r) for r in inner])
        changed = self.loc_after.abs() + self.scale_after * reach
        return max(radius, changed.max().item())


@rule(MigratedCouplingBlock)
def _block(layer: Any, inverse: bool) -> Iterator[Step]:
    split, coupling, _ = layer.flows
    units = _Units(coupling, inverse)
    changed = len(units.loc)
    features = torch.arange(coupling.kept + changed)
    if split.mode == "channel":
        yield from units.steps(features >= coupling.kept)
    elif split.mode == "channel_inv":
        yield from units.steps(features < changed)
    else:
        yield units.anywhere()


@rule(MigratedCoupling)
def _coupling(layer: Any, inverse: bool) -> Iterator[Step]:
    yield _Units(layer, inverse).anywhere()


@rule(MigratedMasked)
def _masked(layer: Any, inverse: bool) -> Iterator[Step]:
    units = _Units(layer, inverse)
    if layer.b.dim() == 2:
        yield from units.steps((layer.b[0] == 0).cpu())
    else:
        yield units.anywhere()


@rule(MigratedAutoregressive)
def _autoregressive(layer: Any, inverse: bool) -> Iterator[Step]:
    yield from _Units(layer, inverse).steps(torch.ones(layer.features, dtype=torch.bool))


def _box(layer: _Carried, features: int) -> Step:
    w, h, d = torch.zeros(3, 1)
    f = RobustSpline(w, h, d, bound=float(layer.tail_bound), slope=layer.slope)
    return conditional(envelope(f), mask=torch.ones(features, dtype=torch.bool))


@rule(CarriedCoupling)
def _carried_coupling(layer: Any, inverse: bool) -> Iterator[Step]:
    yield _box(layer, layer.features)


@rule(CarriedMaskedSpline)
def _carried_masked(layer: Any, inverse: bool) -> Iterator[Step]:
    features = layer.autoregressive_net.final_layer.out_features // layer._output_dim_multiplier()
    yield _box(layer, features)


@rule(CarriedCoupledSpline)
def _carried_coupled(layer: Any, inverse: bool) -> Iterator[Step]:
    yield from within("prqct", layer.prqct, inverse)


@rule(CarriedAutoregressiveSpline)
def _carried_autoregressive(layer: Any, inverse: bool) -> Iterator[Step]:
    yield from within("mprqat", layer.mprqat, inverse)
