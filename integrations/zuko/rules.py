r"""How zuko's layers are bounded, for :func:`flowguard.certify`, and sampled, for attacks.

zuko's transforms go from data to noise, so that sampling runs them in their inverse direction. A
lazy transform with a conditional univariate transform is bounded by what holds for the univariate
whatever its parameters are; a transform without condition, by its own constants.
"""

__all__: list[str] = []

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, reduce
from inspect import ismethod
from typing import Any

import torch
import zuko
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, Transform

from flowguard.bounds import (
    Envelope,
    Flatten,
    Linear,
    Noise,
    Refused,
    Step,
    conditional,
    constant,
    departure,
    envelope,
    envelope_rule,
    has_rule,
    rule,
    steps,
    within,
)
from flowguard.bounds.attack import Sampler, Tensors, sampler
from flowguard.bounds.holders import conditioned
from flowguard.bounds.rational import constant_spline
from flowguard.bounds.solution import solution
from flowguard.bounds.torch_rules import affine, after, known_bases, permuted, squashed
from flowguard.bounds.univariate import undetermined
from flowguard.migration.imitate import RescaledSpline
from flowguard.migration.inscribe import InscribedAffine, InscribedShift
from flowguard.migration.rules import BoundOfMap

from .autoregressive import GroupedAutoregressive, GroupedAutoregressiveTransform
from .bases import BoundedNormal
from .flows import GuardedFlow, RobustNSF
from .image import ConditionalMultiscaleTransform, MultiscaleFlow, MultiscaleTransform
from .migration import CarriedSpline, InscribedUnivariate
from .standin import InPlaceRQSTransform

T = zuko.transforms
#: What constructs the maps of layers after a migration.
MIGRATED = (CarriedSpline, InscribedAffine, InscribedShift, InscribedUnivariate, RescaledSpline)

# zuko has its additive transform from 1.5 on; before, there is nothing to bound.
ADDITIVE: tuple[type, ...] = tuple(
    getattr(T, name) for name in ("AdditiveTransform",) if hasattr(T, name)
)

conditioned(zuko.lazy.LazyDistribution)
known_bases(events=[zuko.distributions.DiagNormal])

SAMPLING_ONLY = "a flow is bounded in its sampling direction only"


@rule(zuko.lazy.Flow, RobustNSF)  # which changes how samples are computed, not which they are
def _flow(flow: Any, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason=SAMPLING_ONLY)
        return
    parts, base = within("transform", flow.transform), flow.base
    if isinstance(base, BoundedNormal | zuko.lazy.Flow):
        yield from _bounded_base(base)
        yield from parts
        return
    reason = "its noise depends on the context, and flowguard knows no bound of it"
    for cls in (zuko.lazy.UnconditionalDistribution, zuko.mixtures.GMM):
        if isinstance(base, cls) and not hasattr(base, "hyper"):
            reason = departure(base, cls)
    if reason:
        yield Refused(name="base", kind=type(base).__name__, reason=reason)
        yield from parts
    else:
        yield from _from_noise(base(), parts)


def _bounded_base(base: Any) -> Iterator[Step]:
    r"""The steps of a base that knows how far its noise reaches, whatever the context is."""
    name, kind = "base", type(base).__name__
    why = departure(base, BoundedNormal) if isinstance(base, BoundedNormal) else ""
    if why:
        yield Refused(name=name, kind=kind, reason=why)
    elif isinstance(base, BoundedNormal):
        size = base.moments.mean.numel()
        yield Noise(name=name, kind=kind, size=size, event=size)
        yield from base.moments.steps(name, kind)
    else:
        yield from within(name, base)


@rule(zuko.distributions.NormalizingFlow)
def _given_context(flow: Any, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason=SAMPLING_ONLY)
        return
    yield from _from_noise(flow.base, within("transform", flow.transform))


def _from_noise(base: Distribution, parts: list[Step]) -> Iterator[Step]:
    r"""The steps of a flow, from noise that is taken as the base has it."""
    normal = _is_normal(base)
    if any(isinstance(s, Noise) for s in parts):
        for step in parts:
            yield replace(step, normal=normal) if isinstance(step, Noise) else step
        return
    event = base.event_shape.numel()
    size = next((s.features for s in parts if s.features is not None), event)
    yield Noise(name="base", size=size, event=event, normal=normal)
    yield from parts


def _is_normal(base: Distribution) -> bool:
    while isinstance(base, Independent):
        base = base.base_dist
    if type(base) is not Normal:
        return False
    return bool((base.loc == 0).all()) and bool((base.scale == 1).all())


@rule(zuko.lazy.LazyComposedTransform, T.ComposedTransform)
def _composed(layer: Any, sampling: bool) -> Iterator[Step]:
    # Not `named_children`, which leaves out what is there a second time.
    parts = list(enumerate(layer.transforms))
    for i, part in reversed(parts) if sampling else parts:
        yield from within(f"transforms.{i}", part, sampling)


@rule(zuko.lazy.LazyInverse)
def _lazy_inverse(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from within("transform", layer.transform, not sampling)


@rule(zuko.lazy.UnconditionalTransform)
def _unconditional(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from _constant_map(layer.f, layer, sampling)


def _constant_map(
    constructor: Any, make: Callable[[], Transform], sampling: bool
) -> Iterator[Step]:
    r"""The steps of a transform that a layer makes anew at each call, of constants."""
    while type(constructor) is partial:
        constructor = constructor.func
    migrated = isinstance(constructor, MIGRATED) and not undetermined(constructor, MIGRATED)
    if not isinstance(constructor, type) and not migrated and has_rule(constructor):
        yield from steps(constructor, sampling)  # which says what it makes
        return
    if not isinstance(constructor, type) and not migrated:
        name = getattr(constructor, "__name__", type(constructor).__name__)
        reason = f"{name} is no class, and may make another one at each call"
        yield Refused(reason=reason, depends="not at all")
        return
    with torch.no_grad():
        yield from steps(make(), sampling)


def _conditional(layer: Any, sampling: bool, mask: Tensor) -> Iterator[Step]:
    # What the parameters are does not matter to an envelope: zeros will do.
    f = layer.univariate(*(torch.zeros(shape) for shape in layer.shapes))
    kind = f"{type(layer).__name__}[{type(f).__name__}]"
    if isinstance(f, T.MonotonicAffineTransform):
        # It does not keep its least slope, but shows it where the parameters are extreme.
        least = layer.univariate(*(torch.full(shape, -1e30) for shape in layer.shapes)).scale
        gain = 1 / least.min().item() if sampling else math.inf
        reason = f"{envelope(f, sampling).reason}, and its slope may fall to {1 / gain:.3g}"
        yield Refused(kind=kind, gain=gain if math.isfinite(gain) else None, reason=reason)
        return
    reason = undetermined(layer.univariate, MIGRATED)
    if isinstance(layer.univariate, InscribedUnivariate):
        # Its map alone says what becomes of the line that it is told.
        reason = reason or undetermined(layer.univariate.map, MIGRATED)
    if reason and not envelope(f, sampling).reason:
        yield Refused(kind=kind, reason=reason)
    else:
        yield from BoundOfMap(f, sampling).steps(mask, kind=kind)


@rule(zuko.flows.autoregressive.MaskedAutoregressiveTransform, GroupedAutoregressive)
def _autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    features = layer.hyper.out_features // layer.total
    yield from _conditional(layer, sampling, torch.ones(features, dtype=torch.bool))


@rule(zuko.flows.coupling.GeneralCouplingTransform)
def _coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from _conditional(layer, sampling, ~layer.mask)  # ones mark what stays as it is


@rule(zuko.flows.gaussianization.ElementWiseTransform)
def _elementwise(layer: Any, sampling: bool) -> Iterator[Step]:
    if hasattr(layer, "hyper"):
        features = layer.hyper.out_features // layer.total
        yield from _conditional(layer, sampling, torch.ones(features, dtype=torch.bool))
        return
    yield from _constant_map(layer.univariate, lambda: layer.univariate(*layer.phi), sampling)


@rule(T.AutoregressiveTransform, GroupedAutoregressiveTransform)
def _autoregressive_given_context(f: Any, sampling: bool) -> Iterator[Step]:
    layer = _owner(f.meta, zuko.flows.autoregressive.MaskedAutoregressiveTransform)
    yield from _refused(UNKNOWN) if layer is None else steps(layer, sampling)


@rule(T.CouplingTransform)
def _coupling_given_context(f: Any, sampling: bool) -> Iterator[Step]:
    layer = _owner(f.meta, zuko.flows.coupling.GeneralCouplingTransform)
    if layer is None or not torch.equal(f.idx_b, (~layer.mask).nonzero().squeeze(-1)):
        yield from _refused(UNKNOWN)
    else:
        yield from steps(layer, sampling)


UNKNOWN = "flowguard does not know where its parameters come from: certify the flow that made it"


def _refused(reason: str) -> Iterator[Step]:
    yield Refused(reason=reason)


def _owner(meta: Any, cls: Any) -> Any:
    r"""The lazy layer that a transform asks for parameters, given a context; if it is one."""
    method = meta.func if type(meta) is partial else None
    if not ismethod(method) or method.__func__ is not cls.meta:
        return None
    layer: Any = method.__self__
    # A transform does not show in which dtype its parameters come; the default one is allowed for.
    eps = torch.finfo(torch.get_default_dtype()).eps
    coarse = any(torch.finfo(p.dtype).eps > eps for p in layer.parameters())
    return None if coarse else layer


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
    yield permuted(f.order, sampling)


@rule(T.RotationTransform)
def _rotation(f: Any, sampling: bool) -> Iterator[Step]:
    yield _linear(f.R.mT if sampling else f.R)


@rule(T.LULinearTransform)
def _lu(f: Any, sampling: bool) -> Iterator[Step]:
    if f.L.dim() != 2:
        yield _linear(f.L)
        return
    lower, upper = constant(f.L), constant(f.U)
    if sampling:
        yield solution(lower, upper)
    else:
        yield Linear(matrix=lower @ upper, error=2 * lower.abs() @ upper.abs())


def _linear(matrix: Tensor) -> Step:
    if matrix.dim() != 2:
        return Refused(reason="its matrix differs from one row of a batch to another")
    return Linear(matrix=matrix)


#: The narrowest interval that numbers are taken modulo: those up to 1e35 can be, in float32.
NARROW = 1e-3

# What follows holds whatever the parameters of a transform are: it is for conditional univariates,
# and for constant ones that no rule above bounds by their constants.

#: As it is, and as it is computed inside of :func:`flowguard.integrations.zuko.splines`. What bounds
#: the arithmetic of the first holds for the second, which does not leave the box at all.
THEIR_SPLINES = T.MonotonicRQSTransform, InPlaceRQSTransform

BISECTED = (
    T.BernsteinTransform,
    T.BoundedBernsteinTransform,
    T.GaussianizationTransform,
    T.MonotonicTransform,
    T.SOSPolynomialTransform,
    T.UnconstrainedMonotonicTransform,
)


@rule(*THEIR_SPLINES)
def _constant_spline(f: Any, sampling: bool) -> Iterator[Step]:
    bound = max(t.detach().abs().max().item() for t in (f.horizontal, f.vertical))
    unit = torch.finfo(f.horizontal.dtype).eps / 2
    sides = f.horizontal.diff(dim=-1), f.vertical.diff(dim=-1)
    yield conditional(constant_spline(*sides, f.derivatives, bound, unit, inverse=sampling))


WAVES = (T.CosTransform, T.SinTransform)


@rule(
    *BISECTED,
    *WAVES,
    T.CircularShiftTransform,
    T.IdentityTransform,
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
    if not abs(f.bound) >= NARROW:
        reason = f"far numbers modulo a bound below {NARROW:g} overflow, and are NaN"
        return Envelope(reason=reason)
    return squashed(abs(f.bound))


@envelope_rule(T.SoftclipTransform)
def _softclip(f: Any, sampling: bool) -> Envelope:
    if sampling:
        reason = f"its inverse has poles at {-f.bound:g} and {f.bound:g}"
        return Envelope(math.inf, math.inf, reason=reason)
    return squashed(abs(f.bound))


@envelope_rule(*WAVES)
def _wave(f: Any, sampling: bool) -> Envelope:
    if sampling:
        return Envelope(reason="its inverse is NaN beyond one")
    return squashed(1.0)


@envelope_rule(*ADDITIVE, T.MonotonicAffineTransform)
def _free(f: Any, sampling: bool) -> Envelope:
    gain = 1.0 if isinstance(f, ADDITIVE) else math.inf
    return Envelope(gain, math.inf, reason="its shift is free")


@envelope_rule(*THEIR_SPLINES)
def _spline(f: Any, sampling: bool) -> Envelope:
    return Envelope(
        1.0,
        math.inf,
        reason=(
            "it is bounded in exact arithmetic only: for far contexts its own leaves the box, or"
            " ends in NaN"
        ),
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


@rule(MultiscaleTransform)
def _multiscale_given_context(f: Any, sampling: bool) -> Iterator[Step]:
    for step in within("flow", f.flow, sampling):
        yield replace(step, event=f.image.numel()) if isinstance(step, Noise) else step
    yield Flatten(name="image", kind=type(f).__name__)


@rule(MultiscaleFlow)
def _multiscale(flow: Any, sampling: bool) -> Iterator[Step]:
    yield from within("transform", flow.transform, sampling)


@rule(GuardedFlow)
def _guarded(flow: Any, sampling: bool) -> Iterator[Step]:
    yield from within("flow", flow.flow, sampling)


def _sampler(model: Any, y: Tensors, size: int, base: Any = None) -> tuple[Sampler, Tensors]:
    like = y[0] if not isinstance(y, Tensor) else y

    def draw(z: Tensor, y: Tensors) -> Tensor:
        distribution = model(y)
        if isinstance(base, BoundedNormal):  # of others, samples count as the noise
            normal = distribution.base.base_dist
            z = normal.loc + normal.scale * z
        x: Tensor = distribution.transform.inv(z)
        return x

    return draw, like.new_zeros(like.shape[0], size)


@sampler.register
def _sample_flow(model: zuko.lazy.Flow, context: Tensors) -> tuple[Sampler, Tensors]:
    size = model(context).base.event_shape.numel()
    return _sampler(model, context, size, model.base)


@sampler.register
def _sample_multiscale(model: MultiscaleFlow, context: Tensors) -> tuple[Sampler, Tensors]:
    return _sampler(model, context, model(context).event_shape.numel())


@sampler.register
def _sample_guarded(model: GuardedFlow, context: Tensors) -> tuple[Sampler, Tensors]:
    base = getattr(model.flow, "base", None)
    return _sampler(model, context, model(context).event_shape.numel(), base)
