r"""How Pyro's flows are bounded, for :func:`flowguard.certify`, and sampled, for attacks.

Pyro's distributions run their transforms from noise to data. The transforms themselves keep to
torch's convention here, of which the inverse is the way to data, as they stand among torch's.
"""

__all__: list[str] = []

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Independent, Normal, TransformedDistribution
from pyro.distributions.conditional import (
    ConditionalComposeTransformModule,
    ConditionalTransformedDistribution,
    ConstantConditionalDistribution,
    ConstantConditionalTransform,
    _ConditionalInverseTransformModule,
)
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.distributions.transforms import (
    AffineAutoregressive,
    AffineCoupling,
    BatchNorm,
    ConditionalAffineAutoregressive,
    ConditionalAffineCoupling,
    LowerCholeskyAffine,
    Permute,
)
from torch import Tensor

from flowguard.bounds import (
    Linear,
    Refused,
    Remark,
    Scale,
    Step,
    constant,
    departure,
    rule,
    steps,
    within,
)
from flowguard.bounds.attack import Sampler, Tensors, sampler
from flowguard.bounds.solution import solution
from flowguard.bounds.torch_rules import base_steps, composed, known_bases, permuted, transformed
from flowguard.migration.inscribe import InscribedAffine
from flowguard.migration.rules import BoundOfMap, made_otherwise

from .migrated import (
    MigratedAffineAutoregressive,
    MigratedAffineCoupling,
    MigratedConditionalAffineAutoregressive,
    MigratedConditionalAffineCoupling,
)

# Pyro's own classes of what torch has too.
known_bases([Normal], [Independent])
rule(TransformedDistribution)(transformed)
rule(ComposeTransformModule)(composed)


@rule(ConditionalTransformedDistribution)
def _conditional(flow: Any, sampling: bool) -> Iterator[Step]:
    base = flow.base_dist
    if not sampling:
        yield Refused(reason="a flow is bounded in its sampling direction only")
        return
    if why := departure(base, ConstantConditionalDistribution):
        reason = "its noise depends on the context, and flowguard knows no bound of it"
        reason = why if isinstance(base, ConstantConditionalDistribution) else reason
        yield Refused(name="base_dist", kind=type(base).__name__, reason=reason)
    else:
        yield from base_steps(base.base_dist)
    for i, part in enumerate(flow.transforms):
        yield from within(f"transforms.{i}", part, False)


@rule(ConstantConditionalTransform)
def _constant(part: Any, sampling: bool) -> Iterator[Step]:
    yield from steps(part.transform, sampling)


@rule(ConditionalComposeTransformModule)
def _stack(stack: Any, sampling: bool) -> Iterator[Step]:
    parts = list(enumerate(stack.transforms))
    for i, part in reversed(parts) if sampling else parts:
        yield from within(f"transforms.{i}", part, sampling)


@rule(_ConditionalInverseTransformModule)
def _inverse(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from steps(layer.inv, not sampling)


AFFINE = (AffineAutoregressive, AffineCoupling)


@rule(*AFFINE)
def _affine(layer: Any, sampling: bool) -> Iterator[Step]:
    yield _free(
        sampling,
        stable=getattr(layer, "stable", False),
        log_scale_min_clip=layer.log_scale_min_clip,
        log_scale_max_clip=layer.log_scale_max_clip,
    )


@rule(ConditionalAffineAutoregressive, ConditionalAffineCoupling)
def _conditional_affine(layer: Any, sampling: bool) -> Iterator[Step]:
    yield _free(sampling, **layer.kwargs)


def _free(
    sampling: bool,
    stable: bool = False,
    log_scale_min_clip: float = -5.0,
    log_scale_max_clip: float = 3.0,
    **_: Any,
) -> Step:
    r"""The refusal of an affine layer, with the gain that its options allow."""
    if stable:
        gain = math.inf if sampling else 1.0
    else:
        gain = math.exp(_clipped(-log_scale_min_clip if sampling else log_scale_max_clip))
    return Refused(
        reason="its shift is free; flowguard.migrate bounds it",
        gain=gain if math.isfinite(gain) else None,
    )


def _clipped(most: float) -> float:
    r"""The largest number that Pyro clips at `most`: it adds what is over, x + (clip(x) - x), which
    is rounded to the digits that x has."""
    units = [2.0**k for k in range(-24, 25)]
    return max(most, *(unit * math.floor(most / unit + 0.5) for unit in units))


@rule(MigratedAffineAutoregressive, MigratedConditionalAffineAutoregressive)
def _autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    bound = _bound(layer.map, sampling)
    yield from bound.steps(torch.ones(layer.map.loc_in.numel(), dtype=torch.bool))


@rule(MigratedAffineCoupling)
def _coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from _coupled(layer.map, layer.split_dim, layer.dim, sampling)


@rule(MigratedConditionalAffineCoupling)
def _conditional_coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from _coupled(layer.map, layer.split_dim, layer.kwargs.get("dim", -1), sampling)


def _coupled(map: Any, kept: int, dim: int, sampling: bool) -> Iterator[Step]:
    bound = _bound(map, sampling)
    if dim != -1:  # features are told apart along the last dimension alone
        yield bound.anywhere()
        return
    moved = map.loc_in.numel()
    yield from bound.steps(torch.arange(kept + moved) >= kept)


def _bound(map: InscribedAffine, sampling: bool) -> BoundOfMap:
    example = map(torch.ones_like(map.loc_in), torch.zeros_like(map.loc_in))
    return BoundOfMap(example, sampling, made_otherwise(map, InscribedAffine))


@rule(Permute)
def _permute(f: Any, sampling: bool) -> Iterator[Step]:
    step = permuted(f.permutation, sampling)
    if f.dim != -1 and not isinstance(step, Refused):
        step = Remark(depends="not at all, and positions move as they are")
    yield step


@rule(BatchNorm)
def _batch_norm(layer: Any, sampling: bool) -> Iterator[Step]:
    if sampling and layer.training:
        reason = "in training mode its inverse divides by the statistics of a batch"
        yield Refused(reason=reason, depends="not at all")
        return
    with torch.no_grad():
        gamma, beta = constant(layer.constrained_gamma), constant(layer.beta)
    mean, std = (
        constant(layer.moving_mean),
        (constant(layer.moving_variance) + layer.epsilon).sqrt(),
    )
    one = torch.ones_like(mean)
    if sampling:
        yield Scale(name="mean", factor=one, offset=-mean)
        yield Scale(name="gamma", factor=gamma / std, offset=beta)
    else:
        yield Scale(name="beta", factor=one, offset=-beta)
        yield Scale(name="gamma", factor=std / gamma, offset=mean)


@rule(LowerCholeskyAffine)
def _lower_cholesky(f: Any, sampling: bool) -> Iterator[Step]:
    matrix, loc = constant(f.scale_tril), constant(f.loc)
    if matrix.dim() != 2 or loc.dim() != 1:
        yield Refused(reason="its constants differ from one row of a batch to another")
        return
    one = torch.ones_like(loc)
    if sampling:
        yield Scale(name="loc", factor=one, offset=-loc)
        yield solution(matrix.tril())
    else:
        yield Linear(matrix=matrix)
        yield Scale(name="loc", factor=one, offset=loc)


@sampler.register(ConditionalTransformedDistribution)
def _sample(model: Any, context: Tensors) -> tuple[Sampler, Tensors]:
    base = model.base_dist.condition(context)
    shape = (*base.batch_shape, *base.event_shape)

    def draw(z: Tensor, y: Tensors) -> Tensor:
        given = model.condition(y)
        normal = given.base_dist
        while hasattr(normal, "base_dist"):
            normal = normal.base_dist
        # Of bases that are not normal, samples count as the noise.
        x = normal.loc + normal.scale * z if isinstance(normal, Normal) else z
        for f in given.transforms:
            x = f(x)
        return x

    like = context if isinstance(context, Tensor) else context[0]
    return draw, like.new_zeros(like.shape[0], *shape)
