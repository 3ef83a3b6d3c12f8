r"""The rules of the image models, for certificates, attacks and migrations."""

__all__: list[str] = []

from collections.abc import Iterator

from flowguard.bounds import Envelope, Noise, Pointwise, Remark, Step, rule, sampler, within
from flowguard.bounds.attack import Sampler, Tensors
from flowguard.image import ImageSurgeon
from flowguard.migration import surgeon
from flowguard.models.lowlight import LowLightFlow
from flowguard.models.superres import SuperResolutionFlow

for model_class in (LowLightFlow, SuperResolutionFlow):
    surgeon.register(model_class, ImageSurgeon)


@rule(SuperResolutionFlow)
def _super_resolution(model: SuperResolutionFlow, sampling: bool) -> Iterator[Step]:
    yield from within("flow", model.flow, sampling)
    yield Remark(name="upsample", depends="adds the upsampled condition, which is left out")


@rule(LowLightFlow)
def _low_light(model: LowLightFlow, sampling: bool) -> Iterator[Step]:
    for step in within("flow", model.flow, sampling):
        yield step
        if isinstance(step, Noise):
            yield Pointwise(
                name="mean",
                kind="colour map",
                envelope=Envelope(1.0, 1.0, displacement=1.0),
                depends="adds a colour map in (0, 1)",
            )


@sampler.register
def _(model: SuperResolutionFlow | LowLightFlow, context: Tensors) -> tuple[Sampler, Tensors]:
    shapes = model.latent_shapes(context)
    return model.decode, [context.new_zeros(context.shape[0], *shape) for shape in shapes]
