r"""How zuko's layers are bounded, for :func:`flowguard.certify`, and sampled, for attacks.

zuko's transforms go from data to noise, so that sampling runs them in their inverse direction. A
lazy transform with a conditional univariate transform is bounded by what holds for the univariate
whatever its parameters are; a transform without condition, by its own constants.
"""

__all__: list[str] = []

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import zuko
from torch import Tensor

from flowguard.bounds import (
    Envelope,
    Flatten,
    Linear,
    Noise,
    Permute,
    Refused,
    Step,
    conditional,
    constant,
    envelope,
    envelope_rule,
    rule,
    steps,
    within,
)
from flowguard.bounds.attack import Sampler, Tensors, sampler
from flowguard.bounds.torch_rules import affine, after

from .flows import GuardedFlow
from .image import ConditionalMultiscaleTransform, MultiscaleFlow

T = zuko.transforms
# zuko has its additive transform from 1.5 on; before, there is nothing to bound.
ADDITIVE: tuple[type, ...] = tuple(
    getattr(T, name) for name in ("AdditiveTransform",) if hasattr(T, name)
)


@rule(zuko.lazy.Flow)
def _flow(flow: Any, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason="a flow is bounded in its sampling direction only")
        return
    parts = within("transform", flow.transform)
    size = next((s.features for s in parts if s.features is not None), None)
    if size is not None and not any(isinstance(s, Noise) for s in parts):
        yield Noise(name="base", size=size, event=size, normal=_is_normal(flow.base))
    yield from parts


def _is_normal(base: Any) -> bool:
    if not isinstance(base, zuko.lazy.UnconditionalDistribution):
        return False
    distribution = base()
    if not isinstance(distribution, zuko.distributions.DiagNormal):
        return False
    loc, scale = distribution.base_dist.loc, distribution.base_dist.scale
    return bool((loc == 0).all()) and bool((scale == 1).all())


@rule(zuko.lazy.LazyComposedTransform)
def _lazy_composed(layer: Any, sampling: bool) -> Iterator[Step]:
    parts = list(layer.transforms.named_children())
    for name, part in reversed(parts) if sampling else parts:
        yield from within(f"transforms.{name}", part, sampling)


@rule(zuko.lazy.LazyInverse)
def _lazy_inverse(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from within("transform", layer.transform, not sampling)


@rule(zuko.lazy.UnconditionalTransform)
def _unconditional(layer: Any, sampling: bool) -> Iterator[Step]:
    with torch.no_grad():
        yield from steps(layer(), sampling)


def _conditional(layer: Any, sampling: bool, mask: Tensor | None) -> Step:
    # What the parameters are does not matter to an envelope: zeros will do.
    f = layer.univariate(*(torch.zeros(shape) for shape in layer.shapes))
    g = envelope(f, sampling)
    if isinstance(f, T.MonotonicAffineTransform):
        # It does not keep its least slope, but shows it where the parameters are extreme.
        least = layer.univariate(*(torch.full(shape, -1e30) for shape in layer.shapes)).scale
        gain = 1 / least.min().item() if sampling else math.inf
        g = g._replace(gain=gain, reason=f"{g.reason}, and its slope may fall to {1 / gain:.3g}")
    return conditional(g, kind=f"{type(layer).__name__}[{type(f).__name__}]", mask=mask)


@rule(zuko.flows.autoregressive.MaskedAutoregressiveTransform)
def _autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    features = layer.hyper.out_features // layer.total
    yield _conditional(layer, sampling, torch.ones(features, dtype=torch.bool))


@rule(zuko.flows.coupling.GeneralCouplingTransform)
def _coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    yield _conditional(layer, sampling, ~layer.mask)  # ones mark what stays as it is


@rule(zuko.flows.gaussianization.ElementWiseTransform)
def _elementwise(layer: Any, sampling: bool) -> Iterator[Step]:
    if hasattr(layer, "hyper"):
        features = layer.hyper.out_features // layer.total
        yield _conditional(layer, sampling, torch.ones(features, dtype=torch.bool))
        return
    with torch.no_grad():
        yield from steps(layer.univariate(*layer.phi), sampling)


@rule(T.ComposedTransform)
def _composed(f: Any, sampling: bool) -> Iterator[Step]:
    parts = list(enumerate(f.transforms))
    for i, part in reversed(parts) if sampling else parts:
        yield from within(f"transforms.{i}", part, sampling)


@rule(T.DependentTransform)
def _dependent(f: Any, sampling: bool) -> Iterator[Step]:
    yield from steps(f.base, sampling)


@rule(T.MonotonicAffineTransform)
def _monotonic_affine(f: Any, sampling: bool) -> Iterator[Step]:
    yield affine(constant(f.scale), constant(f.shift), sampling)


@rule(*ADDITIVE)
def _additive(f: Any, sampling: bool) -> Iterator[Step]:
    yield affine(constant(torch.ones_like(f.shift)), constant(f.shift), sampling)


@rule(T.PermutationTransform)
def _permutation(f: Any, sampling: bool) -> Iterator[Step]:
    yield Permute(order=torch.argsort(f.order) if sampling else f.order)


@rule(T.RotationTransform)
def _rotation(f: Any, sampling: bool) -> Iterator[Step]:
    yield _linear(f.R.mT if sampling else f.R)


@rule(T.LULinearTransform)
def _lu(f: Any, sampling: bool) -> Iterator[Step]:
    if f.L.dim() != 2:
        yield _linear(f.L)
        return
    factors = [("L", constant(f.L)), ("U", constant(f.U))]
    if not sampling:
        yield from (Linear(name=name, matrix=t) for name, t in reversed(factors))
        return
    for name, t in factors:
        matrix, info = torch.linalg.inv_ex(t)
        if info.item():
            yield Refused(name=name, reason="its matrix is singular", depends="not at all")
        # Substitution is not a product with the inverse (Higham, 2002, theorem 8.5).
        error = matrix.abs() @ t.abs() @ matrix.abs()
        yield Linear(name=name, matrix=matrix, error=error)


def _linear(matrix: Tensor) -> Step:
    if matrix.dim() != 2:
        return Refused(reason="its matrix differs from one row of a batch to another")
    return Linear(matrix=matrix)


# What follows holds whatever the parameters of a transform are: it is for conditional univariates,
# and for constant ones that no rule above bounds by their constants.

BISECTED = (
    T.BernsteinTransform,
    T.BoundedBernsteinTransform,
    T.GaussianizationTransform,
    T.MonotonicTransform,
    T.SOSPolynomialTransform,
    T.UnconstrainedMonotonicTransform,
)


@rule(
    *BISECTED,
    T.CircularShiftTransform,
    T.IdentityTransform,
    T.MonotonicRQSTransform,
    T.SoftclipTransform,
)
def _whatever(f: Any, sampling: bool) -> Iterator[Step]:
    yield conditional(envelope(f, sampling))


@envelope_rule(T.ComposedTransform)
def _composed_envelope(f: Any, sampling: bool) -> Envelope:
    parts = [envelope(part, sampling) for part in f.transforms]
    return reduce(after, reversed(parts) if sampling else parts)


@envelope_rule(T.IdentityTransform)
def _identity(f: Any, sampling: bool) -> Envelope:
    return Envelope(1.0, 0.0, displacement=0.0, depends="not at all", roundings=0)


@envelope_rule(T.CircularShiftTransform)
def _circular(f: Any, sampling: bool) -> Envelope:
    return Envelope(0.0, 0.0, floor=f.bound, depends="not at all", roundings=4)


@envelope_rule(T.SoftclipTransform)
def _softclip(f: Any, sampling: bool) -> Envelope:
    if sampling:
        reason = f"its inverse has poles at {-f.bound:g} and {f.bound:g}"
        return Envelope(math.inf, math.inf, reason=reason)
    return Envelope(0.0, 0.0, floor=f.bound, depends="not at all", roundings=4)


@envelope_rule(*ADDITIVE, T.MonotonicAffineTransform)
def _free(f: Any, sampling: bool) -> Envelope:
    gain = 1.0 if isinstance(f, ADDITIVE) else math.inf
    return Envelope(gain, math.inf, reason="its shift is free")


@envelope_rule(T.MonotonicRQSTransform)
def _spline(f: Any, sampling: bool) -> Envelope:
    return Envelope(
        1.0,
        math.inf,
        reason="it is bounded in exact arithmetic only: far contexts make it return NaN",
    )


@envelope_rule(*BISECTED)
def _bisected(f: Any, sampling: bool) -> Envelope:
    reason = "its inverse is a bisection, which stops at the edge of its interval"
    return Envelope(math.inf, math.inf, reason=reason if sampling else "its growth is not bounded")


@rule(ConditionalMultiscaleTransform)
def _multiscale_transform(layer: Any, sampling: bool) -> Iterator[Step]:
    event = layer.flow.channels * math.prod(layer.size) if layer.size else None
    for step in within("flow", layer.flow, sampling):
        yield replace(step, event=event) if isinstance(step, Noise) else step
    yield Flatten(name="image", kind=type(layer).__name__)


@rule(MultiscaleFlow)
def _multiscale(flow: Any, sampling: bool) -> Iterator[Step]:
    yield from within("transform", flow.transform, sampling)


@rule(GuardedFlow)
def _guarded(flow: Any, sampling: bool) -> Iterator[Step]:
    yield from within("flow", flow.flow, sampling)


def _sampler(model: Any, y: Tensors, size: int) -> tuple[Sampler, Tensors]:
    like = y[0] if not isinstance(y, Tensor) else y
    z = like.new_zeros(like.shape[0], size)
    return lambda z, y: model(y).transform.inv(z), z


@sampler.register
def _sample_flow(model: zuko.lazy.Flow, context: Tensors) -> tuple[Sampler, Tensors]:
    size = model(context).base.event_shape.numel()
    return _sampler(model, context, size)


@sampler.register
def _sample_multiscale(model: MultiscaleFlow, context: Tensors) -> tuple[Sampler, Tensors]:
    return _sampler(model, context, model(context).event_shape.numel())


@sampler.register
def _sample_guarded(model: GuardedFlow, context: Tensors) -> tuple[Sampler, Tensors]:
    return _sampler(model, context, model(context).event_shape.numel())
