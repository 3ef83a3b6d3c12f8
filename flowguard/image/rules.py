r"""The rules of image flows, for certificates and attacks."""

__all__: list[str] = []

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.bounds import (
    Envelope,
    Join,
    Linear,
    Noise,
    Refused,
    Scale,
    Step,
    Unsqueeze,
    conditional,
    constant,
    departure,
    envelope,
    envelope_rule,
    rule,
    sampler,
    within,
)
from flowguard.bounds.attack import Sampler, Tensors
from flowguard.bounds.solution import FINE, solution
from flowguard.image.coupling import ConditionalCoupling
from flowguard.image.flow import ConditionalMultiscaleFlow
from flowguard.image.layers import (
    ActNorm,
    FixedConv1x1,
    InvertibleConv1x1,
    OrthogonalConv1x1,
    Squeeze,
)
from flowguard.image.maps import (
    Affine,
    CubicBSpline,
    Elementwise,
    Inscribed,
    ReparametrizedAffine,
    Robust,
)
from flowguard.image.migration import InscribedCoupling
from flowguard.image.steps import FlowStep, Split, TransitionStep
from flowguard.migration.inscribe import InscribedAffine
from flowguard.migration.rules import BoundOfMap
from flowguard.transforms import Univariate


@rule(Squeeze)
def _squeeze(layer: Squeeze, sampling: bool) -> Iterator[Step]:
    if sampling:
        yield Unsqueeze(factor=layer.factor)
    else:
        yield Refused(reason="a squeeze is bounded in its inverse direction only")


@rule(ActNorm)
def _actnorm(layer: ActNorm, sampling: bool) -> Iterator[Step]:
    logs, bias = constant(layer.logs), constant(layer.bias)
    if sampling:
        yield Scale(factor=torch.exp(-logs), offset=-bias)
    elif layer.pending:
        yield Refused(reason="its next batch initialises it: run one first", depends="not at all")
    else:
        yield Scale(factor=torch.exp(logs), offset=bias * torch.exp(logs))


@rule(InvertibleConv1x1)
def _conv1x1(layer: InvertibleConv1x1, sampling: bool) -> Iterator[Step]:
    # The layer inverts in float64, whatever its own dtype.
    yield solution(layer.weight, work=FINE) if sampling else Linear(matrix=layer.weight)


@rule(OrthogonalConv1x1)
def _orthogonal(layer: OrthogonalConv1x1, sampling: bool) -> Iterator[Step]:
    matrix = layer.weight.detach()
    yield Linear(matrix=matrix.T if sampling else matrix)


@rule(ConditionalCoupling, InscribedCoupling)
def _coupling(layer: ConditionalCoupling, sampling: bool) -> Iterator[Step]:
    everything = torch.ones(layer.kept + layer.changed, dtype=torch.bool)
    changed = torch.arange(len(everything)) >= layer.kept
    masks = {"rest": changed, "noise": changed, "injector": everything}
    parts = []
    for part, mask in masks.items():
        if part == "noise" and layer.noise is None:
            continue
        family = layer.map_of(part)
        kind = f"{type(layer).__name__}[{type(family).__name__}]"
        parts.append(_map(family, sampling, mask, part, kind))
    for steps in parts if sampling else reversed(parts):
        yield from steps


def _map(
    family: Elementwise, sampling: bool, mask: Tensor, name: str, kind: str
) -> Iterator[Step]:
    g = envelope(family, sampling)
    if isinstance(family, Inscribed) and not g.reason:
        yield from BoundOfMap(_example(family), sampling).steps(mask, name, kind)
    else:
        yield conditional(g, name, kind, mask)


@envelope_rule(Affine, CubicBSpline, Inscribed, ReparametrizedAffine, Robust)
def _family(family: Elementwise, sampling: bool) -> Envelope:
    if isinstance(family, Inscribed):
        strange = departure(family.units, InscribedAffine)
        if strange:
            return Envelope(reason=strange)
    return envelope(_example(family), sampling)


def _example(family: Elementwise) -> Univariate:
    # The boxes of these are options, the same whatever the parameters: zeros will do.
    return family.transform(torch.zeros(1, 1, family.parameters, 1, 1))


@rule(FixedConv1x1)
def _fixed(layer: FixedConv1x1, sampling: bool) -> Iterator[Step]:
    yield Linear(matrix=layer.transpose if sampling else layer.weight)


@rule(TransitionStep)
def _transition(layer: TransitionStep, sampling: bool) -> Iterator[Step]:
    for name in ("mix", "actnorm") if sampling else ("actnorm", "mix"):
        yield from within(name, getattr(layer, name), sampling)


@rule(FlowStep)
def _step(layer: FlowStep, sampling: bool) -> Iterator[Step]:
    order = ("coupling", "mix", "actnorm") if sampling else ("actnorm", "mix", "coupling")
    for name in order:
        yield from within(name, getattr(layer, name), sampling)


@rule(Split)
def _split(layer: Split, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason="a split is bounded in its inverse direction only")
    elif layer.mean_bound is None or layer.scale_bound is None:
        yield Refused(reason="its prior is free; give mean_bound and scale_bound")
    else:
        mean, scale = layer.mean_bound, layer.scale_bound
        yield Join(
            joined=layer.dropped,
            mean_bound=mean,
            scale_bound=scale,
            depends=f"within a mean of {mean:g} and a scale of exp({scale:g})",
        )


@rule(ConditionalMultiscaleFlow)
def _multiscale(flow: ConditionalMultiscaleFlow, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason="a multiscale flow is bounded in its inverse direction only")
        return
    # Split by split, the channels of the last level; any even size gives the same.
    yield Noise(name="noise", size=flow.latent_shapes(flow.multiple, flow.multiple)[-1][0])
    for level in reversed(range(flow.levels)):
        if level < len(flow.splits):
            yield from within(f"splits.{level}", flow.splits[level])
        for kind in ("steps", "transitions"):
            stack = cast(nn.ModuleList, flow.get_submodule(f"{kind}.{level}"))
            # Not `named_children`, which leaves out what is there a second time.
            for i, step in reversed(list(enumerate(stack))):
                unused = kind == "steps" and not flow.is_noisy(level, i)
                for part in within(f"{kind}.{level}.{i}", step):
                    # A step that is never told of noise may have learned what to do with it.
                    if not (unused and part.name.endswith("coupling.noise")):
                        yield part
        yield from within("squeeze", flow.squeeze)


@sampler.register
def _(model: ConditionalMultiscaleFlow, context: Tensors) -> tuple[Sampler, Tensors]:
    shapes = model.latent_shapes(*(2 * n for n in context[0].shape[-2:]))
    latents = [context[0].new_zeros(context[0].shape[0], *shape) for shape in shapes]
    return lambda z, y: model.inverse(z, y)[0], latents
