r"""What normflows' layers become in a migration: the same networks, under robust maps.

As in normflows, `forward` goes from noise to data and `inverse` from data to noise. The layers are
made by :func:`flowguard.migration.exchange.successor` and have all that the old ones had: parameters
keep their names, so that a state of the old model can be loaded into the new one. What wraps a layer
(a block, say) stays as it is.
"""

__all__ = [
    "CarriedCDF",
    "CarriedCoupling",
    "CarriedMaskedSpline",
    "MigratedAutoregressive",
    "MigratedCoupling",
    "MigratedMasked",
    "autoregressive_scale",
    "block_steps",
    "coupling_knots",
    "coupling_scale",
    "masked_knots",
    "masked_scale",
    "towards_noise",
]

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from normflows.flows import (
    AffineCoupling,
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

from flowguard.autoregression import masked_inverse
from flowguard.bounds import Step, conditional, envelope, rule
from flowguard.migration.imitate import Rescaled
from flowguard.migration.inscribe import InscribedAffine, InscribedShift
from flowguard.migration.knots import Knots, width_of
from flowguard.migration.rules import MAKERS, BoundOfMap, made_otherwise
from flowguard.numerics import cut, sum_rows
from flowguard.transforms import RobustSpline, Univariate

from .layers import KINDS

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

    def follow(self, log_scale: Tensor, shift: Tensor, of: Any = slice(None)) -> Rescaled:
        r"""Returns the robust map from data to noise.

        Arguments:
            log_scale: The logarithm of the scale of the old layer that goes `forward`.
            shift: The shift of it.
            of: The features that are meant.
        """
        dtype = torch.promote_types(log_scale.dtype, torch.float32)
        slope, intercept = towards_noise(log_scale.to(dtype), shift.to(dtype), self.flipped)
        if isinstance(self.map, InscribedShift):
            return self.map(intercept, of)
        return self.map(slope, intercept, of)

    def run(self, f: Rescaled, x: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
        r"""Runs the map in one direction of the layer.

        Arguments:
            f: The map from data to noise.
            x: What goes in, features last.
            forward: Whether the layer goes `forward`.
        """
        return _run(f, x, inverse=forward != self.flipped)


def _run(f: Univariate, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    y, ladj = f.inverse_and_ladj(x) if inverse else f.call_and_ladj(x)
    return y.to(x.dtype), sum_rows(ladj).to(x.dtype)


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


class _Masked(_Cut):
    r"""What autoregressive layers have in common, whose network is a masked one."""

    def solved(self, y: Tensor, phi: Tensor, of: Any) -> tuple[Tensor, Tensor]:
        r"""Returns the inverse at some features, and the log-determinant of their maps.

        Arguments:
            y: The values of the maps, with shape :math:`(N, n)`.
            phi: What the network says of these features.
            of: The features.
        """
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Runs the host's `inverse`, in which each feature is worked out once."""
        net: Any = self.autoregressive_net  # type: ignore[attr-defined]
        context = None if context is None else cut(context)
        return masked_inverse(net, z, context, self.solved, kinds=KINDS)


class MigratedAutoregressive(_Inscribed, _Masked, MaskedAffineAutoregressive):
    r"""The robust form of normflows' ``MaskedAffineAutoregressive``."""

    def _elementwise_forward(self, inputs: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(self.follow(*autoregressive_scale(phi)), inputs, True)

    def solved(self, y: Tensor, phi: Tensor, of: Any) -> tuple[Tensor, Tensor]:
        return self.run(self.follow(*autoregressive_scale(phi), of), y, False)


def coupling_knots(layer: Any, slope: float | None) -> Knots:
    r"""Returns how a spline coupling of normflows makes knots of what its network says.

    Arguments:
        layer: The layer.
        slope: The least slope of the robust splines.
    """
    width = width_of(layer.transform_net, "hidden_features", "hidden_channels")
    return Knots.of(layer, slope, width)


def masked_knots(layer: Any, slope: float | None) -> Knots:
    r"""Returns how an autoregressive spline of normflows makes knots of what its network says.

    Arguments:
        layer: The layer.
        slope: The least slope of the robust splines.
    """
    return Knots.of(layer, slope, width_of(layer.autoregressive_net, "hidden_features"))


class _Carried:
    r"""What splines of normflows have in common that are robust now.

    Arguments:
        slope: The least slope.
    """

    slope: float | None

    def knots(self) -> Knots:
        r"""Returns how normflows makes knots of logits."""
        return Knots.of(self, self.slope)

    def univariate(self, phi: Tensor) -> RobustSpline:
        r"""Returns the splines, in the direction in which the host's go.

        Arguments:
            phi: What the network says about each feature, with shape :math:`(*, 3 K - 1)`.
        """
        knots = self.knots()
        return knots.robust(knots.logits(phi))


class CarriedCDF(_Carried, PiecewiseRationalQuadraticCDF):
    r"""A spline of normflows without a condition, made robust."""

    def _spline(self, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        logits = self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
        return _run(self.knots().robust(logits), inputs, inverse)


class CarriedCoupling(_Carried, _Cut, PiecewiseRationalQuadraticCoupling):
    r"""A spline coupling of normflows, made robust."""

    def knots(self) -> Knots:
        r"""Returns how normflows makes knots of what the network says."""
        return coupling_knots(self, self.slope)

    def _coupling_transform(
        self, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        phi = transform_params.unflatten(1, (-1, self._transform_dim_multiplier())).movedim(2, -1)
        return _run(self.univariate(phi), inputs, inverse)


class CarriedMaskedSpline(_Carried, _Masked, MaskedPiecewiseRationalQuadraticAutoregressive):
    r"""An autoregressive spline of normflows, made robust."""

    def knots(self) -> Knots:
        r"""Returns how normflows makes knots of what the network says."""
        return masked_knots(self, self.slope)

    def _elementwise(
        self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        phi = autoregressive_params.unflatten(-1, (-1, self._output_dim_multiplier()))
        return _run(self.univariate(phi), inputs, inverse)

    def solved(self, y: Tensor, phi: Tensor, of: Any) -> tuple[Tensor, Tensor]:
        return self._elementwise(y, phi, inverse=True)


def _bound(layer: Any, sampling: bool) -> BoundOfMap:
    zeros = torch.zeros_like(next(layer.map.buffers()))
    strange = made_otherwise(layer.map, *MAKERS)
    return BoundOfMap(layer.follow(zeros, zeros), sampling != layer.flipped, strange)


def block_steps(block: Any, sampling: bool) -> Iterator[Step]:
    r"""The steps of an ``AffineCouplingBlock`` around a robust coupling, whose split tells which
    channels change.

    Arguments:
        block: The block.
        sampling: Whether it is run towards data.
    """
    split, coupling, _ = block.flows
    bound = _bound(coupling, sampling)
    changed = len(bound.units[0])
    features = torch.arange(coupling.kept + changed)
    name, kind = "flows.1", type(coupling).__name__
    if split.mode == "channel":
        steps: Iterator[Step] = bound.steps(features >= coupling.kept)
    elif split.mode == "channel_inv":
        steps = bound.steps(features < changed)
    else:
        steps = iter((bound.anywhere(),))
    for step in steps:
        yield replace(step, name=name, kind=kind)


@rule(MigratedCoupling)
def _coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    yield _bound(layer, sampling).anywhere()


@rule(MigratedMasked)
def _masked(layer: Any, sampling: bool) -> Iterator[Step]:
    bound = _bound(layer, sampling)
    if layer.b.dim() == 2:
        yield from bound.steps((layer.b[0] == 0).cpu())
    else:
        yield bound.anywhere()


@rule(MigratedAutoregressive)
def _autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from _bound(layer, sampling).steps(torch.ones(layer.features, dtype=torch.bool))


def _box(layer: _Carried, features: int) -> Step:
    w, h, d = torch.zeros(3, 1)
    f = RobustSpline(w, h, d, bound=layer.knots().bound, slope=layer.slope)
    return conditional(envelope(f), mask=torch.ones(features, dtype=torch.bool))


@rule(CarriedCoupling)
def _carried_coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    yield _box(layer, layer.features)


@rule(CarriedMaskedSpline)
def _carried_masked(layer: Any, sampling: bool) -> Iterator[Step]:
    features = layer.autoregressive_net.final_layer.out_features // layer._output_dim_multiplier()
    yield _box(layer, features)
