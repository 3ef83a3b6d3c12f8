r"""The rules of the image models, for certificates, attacks and migrations."""

__all__: list[str] = []

from collections.abc import Iterator

import torch.nn as nn

from flowguard.bounds import (
    Envelope,
    Limit,
    Noise,
    Pointwise,
    Refused,
    Remark,
    Step,
    departure,
    rule,
    sampler,
    within,
)
from flowguard.bounds.attack import Sampler, Tensors
from flowguard.image import ImageSurgeon
from flowguard.migration import surgeon
from flowguard.models.encoders.lowlight import FirstGuess, LowLightEncoder
from flowguard.models.lowlight import LowLightFlow
from flowguard.models.superres import SuperResolutionFlow

for model_class in (LowLightFlow, SuperResolutionFlow):
    surgeon.register(model_class, ImageSurgeon)


@rule(SuperResolutionFlow)
def _super_resolution(model: SuperResolutionFlow, sampling: bool) -> Iterator[Step]:
    yield from within("flow", model.flow, sampling)
    told = "which is left out"
    if model.margin is not None:
        # The base is a picture, which the limit leaves as it is: no residual gets larger.
        yield _limit(model.margin, beside=1.0 if model.residual else 0.0)
        told = f"cut to [0, 1]; {_range(model.margin)}"
    if model.residual:
        yield Remark(name="upsample", depends=f"adds the upsampled condition, {told}")


@rule(LowLightFlow)
def _low_light(model: LowLightFlow, sampling: bool) -> Iterator[Step]:
    encoder = model.encoder
    reason = _astray(encoder)
    if reason:
        yield Refused(name="conditioner.encoder", kind=type(encoder).__name__, reason=reason)
    for step in within("flow", model.flow, sampling):
        yield step
        if isinstance(step, Noise):
            yield _added("mean", "colour map")
    if model.residual:
        reason = departure(model.guess, FirstGuess)
        if reason:
            yield Refused(name="guess", kind=type(model.guess).__name__, reason=reason)
        yield _added("guess", "first guess")
    if model.margin is not None:
        yield _limit(model.margin)
    held = "the margin, not the rows above, holds then" if model.margin else "no bound holds then"
    yield Remark(name="brightness", depends=f"scales samples where one is asked for; {held}")


def _added(name: str, kind: str) -> Pointwise:
    return Pointwise(
        name=name,
        kind=kind,
        envelope=Envelope(1.0, 1.0, displacement=1.0),
        depends=f"adds a {kind} in [0, 1]",
    )


def _limit(margin: float, beside: float = 0.0) -> Limit:
    return Limit(
        name="margin", kind="limit", bound=1 + margin, beside=beside, depends=_range(margin)
    )


def _range(margin: float) -> str:
    return f"images within [{-margin:g}, {1 + margin:g}]"


def _astray(encoder: LowLightEncoder) -> str:
    r"""Why the colour map of an encoder may leave [0, 1]; empty if it does not."""
    *_, last = encoder.fine_tune_color_map.modules()
    stack = departure(encoder.fine_tune_color_map, nn.Sequential)
    return departure(encoder, LowLightEncoder) or stack or departure(last, nn.Sigmoid)


@sampler.register
def _(model: SuperResolutionFlow | LowLightFlow, context: Tensors) -> tuple[Sampler, Tensors]:
    shapes = model.latent_shapes(context)
    return model.decode, [context.new_zeros(context.shape[0], *shape) for shape in shapes]
