r"""Random layers, flows and models of images of the core."""

__all__ = ["IMAGES", "case_of_images"]

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import flowguard
from flowguard.image import (
    ActNorm,
    ConditionalCoupling,
    ConditionalMultiscaleFlow,
    FixedConv1x1,
    FlowStep,
    InvertibleConv1x1,
    OrthogonalConv1x1,
    Split,
    Squeeze,
    TransitionStep,
)
from flowguard.image.maps import Inscribed
from flowguard.image.migration import InscribedCoupling
from flowguard.models import LowLightFlow, SuperResolutionFlow

from .maker import CONTEXT, ROWS, Case, Maker
from .transforms import FAMILIES, Mine, family

MIXES = ["free", "orthogonal", "fixed"]


def _coupling(m: Maker) -> tuple[Any, int]:
    channels = m.integer(2, 4)
    layer = ConditionalCoupling(
        channels,
        CONTEXT,
        hidden=3,
        coupling=family(m),
        normed=m.flip(0.3),
        noise_channels=m.pick([0, 0, 1]),
    )
    return layer, channels


def _step(m: Maker) -> tuple[Any, int]:
    channels = m.integer(2, 4)
    layer = FlowStep(
        channels, CONTEXT, hidden=3, coupling=family(m), mix=m.pick(MIXES), normed=m.flip(0.3)
    )
    m.note(layer.coupling)
    m.note(layer.mix)
    m.note(layer.actnorm)
    return layer, channels


def _transition(m: Maker) -> tuple[Any, int]:
    channels = m.integer(1, 4)
    layer = TransitionStep(channels, mix=m.pick(MIXES))
    m.note(layer.mix)
    m.note(layer.actnorm)
    return layer, channels


def _plain(cls: Any) -> Callable[[Maker], tuple[Any, int]]:
    def build(m: Maker) -> tuple[Any, int]:
        channels = m.integer(1, 6)
        return cls(channels), channels

    return build


def _squeeze(m: Maker) -> tuple[Any, int]:
    factor = m.integer(1, 3)
    return Squeeze(factor), factor**2 * m.integer(1, 2)


LAYERS: dict[type, Callable[[Maker], tuple[Any, int]]] = {
    ActNorm: _plain(ActNorm),
    ConditionalCoupling: _coupling,
    FixedConv1x1: _plain(FixedConv1x1),
    FlowStep: _step,
    InvertibleConv1x1: _plain(InvertibleConv1x1),
    OrthogonalConv1x1: _plain(OrthogonalConv1x1),
    Squeeze: _squeeze,
    TransitionStep: _transition,
}
WHOLE = {ConditionalMultiscaleFlow, InscribedCoupling, LowLightFlow, Split, SuperResolutionFlow}
IMAGES = {*LAYERS, *WHOLE, *FAMILIES, Inscribed} - {Mine}


def _split(m: Maker, channels: int, context: int) -> Any:
    bound = None if m.flip(0.05) else m.positive()
    return Split(
        channels,
        context if m.flip() else 0,
        mean_bound=bound,
        scale_bound=m.pick([0.1, 2.0, 2.0, 5.0]),
        share=m.pick([0.25, 0.5, 0.75]),
    )


def _flow(m: Maker) -> Any:
    levels = m.integer(1, 2)
    flow = ConditionalMultiscaleFlow(
        m.integer(1, 3),
        CONTEXT,
        levels=levels,
        steps=m.integer(1, 2),
        hidden=3,
        coupling=m.pick(["affine", "reparametrized"])
        if m.wanted in {Inscribed, InscribedCoupling}
        else family(m),
        mix=m.pick(MIXES),
        transition_steps=m.pick([0, 0, 1]),
        splits=m.integer(0, levels),
        split=partial(_split, m),
        normed=m.flip(0.2),
        noise_channels=m.pick([0, 0, 1]),
    )
    for layer in flow.modules():
        if type(layer) in IMAGES:
            m.note(layer)
    return flow


def _draw_flow(flow: Any, noise: Any, context: Any) -> torch.Tensor:
    size = 2**flow.levels
    return flow.inverse([noise(ROWS, *s) for s in flow.latent_shapes(size, size)], context)[0]


def _maps(flow: Any) -> list[tuple[int, ...]]:
    return [(CONTEXT, 2 ** (flow.levels - n), 2 ** (flow.levels - n)) for n in range(1, flow.levels + 1)]  # fmt: skip


def _model(m: Maker, kind: Any) -> Any:
    levels = m.integer(1, 2)
    options: dict[str, Any] = {"levels": levels, "steps": 1, "hidden": 3, "coupling": family(m),
                               "mix": m.pick(MIXES),
                               "margin": m.pick([None, 0.25, 0.25, 0.01, 1e6])}  # fmt: skip
    if kind is SuperResolutionFlow:
        options |= {"scale": 2, "features": 3, "residual": m.flip(0.7)}
    else:
        from flowguard.models.encoders.lowlight import LowLightEncoder

        encoder = LowLightEncoder(2, 2, 2, (0,), levels)
        options |= {"encoder": encoder, "residual": m.flip(0.7)}
    return kind(**options)


def _draw_model(model: Any, noise: Any, context: Any) -> torch.Tensor:
    shapes = model.latent_shapes(context)
    z = [noise(ROWS, *s) for s in shapes]
    if isinstance(model, LowLightFlow):
        return model.decode(z, context)
    # The certificate is for what is added to the enlarged condition.
    if model.margin is None:
        return model.flow.inverse(z, model.conditioner(context))[0]
    image = model.decode(z, context)
    return image - model.upsample(context) if model.residual else image


def case_of_images(m: Maker, dtype: torch.dtype) -> Case:
    r"""Returns a layer, a flow or a model of images."""
    if m.wanted in {LowLightFlow, SuperResolutionFlow} or (m.wanted is None and m.flip(0.03)):
        kind = m.wanted or m.pick([LowLightFlow, SuperResolutionFlow])
        model = m.note(_model(m, kind))
        return _finished(m, model, dtype, partial(_draw_model, model), [(3, 4, 4)], False)
    inscribed = {Inscribed, InscribedCoupling}
    whole = {ConditionalMultiscaleFlow, *FAMILIES, *inscribed}
    if m.wanted in whole or (m.wanted is None and m.flip(0.5)):
        flow = m.note(_flow(m))
        if m.wanted in inscribed or (m.wanted is None and m.flip(0.15)):
            flow = _migrated(m, flow)
        return _finished(m, flow, dtype, partial(_draw_flow, flow), _maps(flow), True)
    if m.wanted is Split or (m.wanted is None and m.flip(0.1)):
        channels = m.integer(2, 4)
        split = m.note(_split(m, channels, CONTEXT))

        def draw(noise: Any, context: Any) -> torch.Tensor:
            kept = noise(ROWS, split.kept, 2, 2)
            return split.inverse(kept, noise(ROWS, split.dropped, 2, 2), context)[0]

        return _finished(m, split, dtype, draw, [(CONTEXT, 2, 2)], False)
    cls = m.wanted if m.wanted in LAYERS else m.pick([*LAYERS])
    layer, channels = LAYERS[cls](m)
    m.note(layer)

    def draw_layer(noise: Any, context: Any) -> torch.Tensor:
        told = () if isinstance(layer, TransitionStep) else (context,)
        return layer.inverse(noise(ROWS, channels, 2, 2), *told)[0]

    return _finished(m, layer, dtype, draw_layer, [(CONTEXT, 2, 2)], False)


def _migrated(m: Maker, flow: Any) -> Any:
    size = 2**flow.levels
    x = m.tensor(8, flow.channels, size, size).clamp(-1e6, 1e6)
    y = [torch.randn(8, *shape) for shape in _maps(flow)]
    new, _ = flowguard.migrate(flow.eval(), x, y)
    for layer in new.modules():
        if type(layer) is InscribedCoupling:
            m.note(layer)
            m.made.append(Inscribed)
    return new


def _finished(
    m: Maker, model: Any, dtype: torch.dtype, draw: Any, contexts: Any, listed: bool
) -> Case:
    m.spread(model)
    model.to(dtype)
    model.train(m.flip(0.3))
    whole = ConditionalMultiscaleFlow | LowLightFlow | SuperResolutionFlow
    return Case(model, draw, contexts, listed=listed, dtype=dtype, cuts=isinstance(model, whole))
