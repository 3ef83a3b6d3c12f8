r"""Random layers and flows of normflows, whose `forward` goes from noise to data."""

__all__ = ["case_of_normflows", "normflows_tables"]

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import normflows as nf
import torch
import torch.nn as nn

import flowguard
from flowguard import OODConditioner
from flowguard.image import ActNorm, InvertibleConv1x1, OrthogonalConv1x1
from flowguard.integrations.normflows import (
    ConditionalMultiscaleFlow,
    ContextAdapter,
    GaussianPrior,
    GuardedConditionalFlow,
    RobustCouplingBlock,
    RobustGlowBlock,
    RobustSplineAutoregressive,
    RobustSplineCoupling,
)
from flowguard.integrations.normflows import migrated as ours
from flowguard.integrations.normflows.glow import LUConv1x1
from flowguard.transforms import AdditiveTransform, RobustSpline

from .maker import CONTEXT, ROWS, Case, Maker
from .transforms import spline_options

F = nf.flows
Build = Callable[[Maker, tuple[int, ...], int | None], Any]


def _options(m: Maker) -> dict[str, Any]:
    options = spline_options(m)
    options["tail_bound"] = options.pop("bound")
    return {"num_bins": m.integer(2, 4), **options}


def _robust_coupling(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    return RobustSplineCoupling(
        shape[0], 1, 4, context, **_options(m), reverse_mask=m.flip(), init_identity=m.flip(),
        apply_unconditional_transform=m.flip(0.3),
    )  # fmt: skip


def _robust_autoregressive(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    return RobustSplineAutoregressive(
        shape[0], 1, 4, context, **_options(m), permute_mask=m.flip(), init_identity=m.flip()
    )


def _mode(m: Maker, shape: tuple[int, ...]) -> str:
    odd = shape[-1] % 2
    return m.pick(
        ["channel", "channel_inv", *(() if odd else ("checkerboard", "checkerboard_inv"))]
    )


def _glow(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    mode = _mode(m, shape)
    return RobustGlowBlock(
        shape[0], 4, context, mode, scale=m.flip(0.7), use_lu=m.flip(), init_zeros=m.flip(),
        orthogonal=m.flip(0.3), net_actnorm=m.flip(0.2), **_options(m),
    )  # fmt: skip


def _block(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    mode = _mode(m, shape)
    first = (shape[0] + 1) // 2
    kept, changed = (first, shape[0] - first) if mode == "channel" else (shape[0] - first, first)
    times = 1
    if "checkerboard" in mode:
        kept = changed = shape[0]
        times = 2
    univariate: Any = None
    shapes, outputs = None, 4
    if m.flip(0.4):
        bins = m.integer(2, 4)
        univariate = partial(RobustSpline, **spline_options(m))
        shapes, outputs = RobustSpline.shapes(bins), 3 * (bins - 1) + 1
    elif m.flip(0.3):
        univariate, shapes, outputs = partial(AdditiveTransform, shift_bound=m.positive()), [()], 1
    net = nn.Conv2d(kept + times * (context or 0), changed * outputs, 1)
    return RobustCouplingBlock(net, context, mode, univariate, shapes)


def _reverse(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    return F.Reverse(_layer(m, shape, None))


def _composite(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    parts = [_layer(m, shape, None) for _ in range(m.integer(1, 3))]
    return F.Composite([*parts, parts[0]] if m.flip(0.2) else parts)


def _adapter(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    return ContextAdapter(_layer(m, shape, m.pick([None, context])))


def _constant(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    sizes = shape if len(shape) == 1 or m.flip(0.3) else m.pick(
        [(shape[0], 1, 1), (shape[0], 1, shape[2]), (1, 1, 1)]
    )  # fmt: skip
    return F.AffineConstFlow(sizes, scale=m.flip(0.8), shift=m.flip(0.8))


def _actnorm(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    layer = F.ActNorm(shape if len(shape) == 1 else (shape[0], 1, 1))
    if m.flip(0.8):
        layer.data_dep_init_done.fill_(1.0)
    return layer


def _permute(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    return F.Permute(shape[0], m.pick(["shuffle", "swap"]))


def _mixing(cls: Any) -> Build:
    def build(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.lu is deprecated
            return cls(shape[0], use_lu=m.flip())

    return build


def _net(m: Maker, inputs: int, outputs: int, shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 3:
        return nn.Sequential(nn.Conv2d(inputs, 4, 1), nn.ReLU(), nn.Conv2d(4, outputs, 1))
    return nf.nets.MLP([inputs, 4, outputs])


def _affine_block(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    scale = m.flip(0.7)
    first = (shape[0] + 1) // 2
    mode = m.pick(["channel", "channel_inv"])
    kept, changed = (first, shape[0] - first) if mode == "channel" else (shape[0] - first, first)
    net = _net(m, kept, (2 if scale else 1) * changed, shape)
    return F.AffineCouplingBlock(
        net, scale, m.pick(["exp", "sigmoid", "sigmoid_inv"]), split_mode=mode
    )


def _masked_affine(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    d = shape[0]
    b = (torch.randperm(d) < m.integer(1, d - 1)).float()
    s = nf.nets.MLP([d, 4, d]) if m.flip(0.7) else None
    return F.MaskedAffineFlow(b, nf.nets.MLP([d, 4, d]), s)


def _masked(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    return F.MaskedAffineAutoregressive(shape[0], 4, context, num_blocks=1)


def _spline(cls: Any, *more: str) -> Build:
    def build(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
        arguments: list[Any] = [shape[0], 1, 4]
        if "circular" in more:
            arguments.append([0])
        return cls(*arguments, num_context_channels=context, num_bins=3)

    return build


VECTORS: dict[type, Build] = {
    RobustSplineAutoregressive: _robust_autoregressive,
    RobustSplineCoupling: _robust_coupling,
    F.InvertibleAffine: _mixing(F.InvertibleAffine),
    F.LULinearPermute: lambda m, shape, c: F.LULinearPermute(shape[0], identity_init=m.flip()),
    F.MaskedAffineAutoregressive: _masked,
    F.MaskedAffineFlow: _masked_affine,
    F.AutoregressiveRationalQuadraticSpline: _spline(F.AutoregressiveRationalQuadraticSpline),
    F.CircularAutoregressiveRationalQuadraticSpline: _spline(
        F.CircularAutoregressiveRationalQuadraticSpline, "circular"
    ),
    F.CircularCoupledRationalQuadraticSpline: _spline(
        F.CircularCoupledRationalQuadraticSpline, "circular"
    ),
    F.CoupledRationalQuadraticSpline: _spline(F.CoupledRationalQuadraticSpline),
}
BOTH: dict[type, Build] = {
    ContextAdapter: _adapter,
    F.ActNorm: _actnorm,
    F.AffineConstFlow: _constant,
    F.AffineCouplingBlock: _affine_block,
    F.Composite: _composite,
    F.Permute: _permute,
    F.Reverse: _reverse,
    nf.transforms.Logit: lambda m, shape, c: nf.transforms.Logit(m.pick([0.05, 0.3, 1e-3])),
    nf.transforms.Shift: lambda m, shape, c: nf.transforms.Shift(m.pick([-0.5, 0.5, 1e20, -3])),
}
IMAGES: dict[type, Build] = {
    RobustCouplingBlock: _block,
    RobustGlowBlock: _glow,
    F.GlowBlock: lambda m, shape, c: F.GlowBlock(shape[0], 4),
    F.Invertible1x1Conv: _mixing(F.Invertible1x1Conv),
}
TABLE = {**VECTORS, **BOTH, **IMAGES}
DEEP = {ContextAdapter, F.Composite, F.Reverse}
FREE = {
    F.AffineCouplingBlock,
    F.AutoregressiveRationalQuadraticSpline,
    F.CircularAutoregressiveRationalQuadraticSpline,
    F.CircularCoupledRationalQuadraticSpline,
    F.CoupledRationalQuadraticSpline,
    F.GlowBlock,
    F.MaskedAffineAutoregressive,
    F.MaskedAffineFlow,
}
FLOWS = {
    nf.NormalizingFlow,
    nf.ConditionalNormalizingFlow,
    nf.ClassCondFlow,
    GuardedConditionalFlow,
}
PYRAMIDS = {nf.MultiscaleFlow, ConditionalMultiscaleFlow, F.Squeeze}
OF_MIGRATION = {
    ours.CarriedCoupling,
    ours.CarriedMaskedSpline,
    ours.MigratedAutoregressive,
    ours.MigratedCoupling,
    ours.MigratedMasked,
    F.AffineCoupling,
}
#: Layers of the core, whose `forward` goes to noise, where layers of the host are expected.
STRANGE: list[type] = [ActNorm, InvertibleConv1x1, LUConv1x1, OrthogonalConv1x1]
#: What takes a context.
TOLD = {ContextAdapter, RobustSplineAutoregressive, RobustSplineCoupling}
TOLD |= {RobustCouplingBlock, RobustGlowBlock}


def normflows_tables() -> set[type]:
    r"""Returns all classes that are made here."""
    return {*TABLE, *FLOWS, *PYRAMIDS, *OF_MIGRATION, LUConv1x1}


def _fits(cls: type, shape: tuple[int, ...]) -> bool:
    if len(shape) == 3:
        return cls not in VECTORS and (shape[0] > 1 or cls not in {*IMAGES, F.AffineCouplingBlock})
    small = shape[0] < 2 and cls in {*FREE}
    return cls not in IMAGES and not small


def _layer(m: Maker, shape: tuple[int, ...], context: int | None) -> Any:
    r"""A layer; with a context, one that takes it."""
    if m.wanted in TABLE and _fits(m.wanted, shape) and (m.depth == 0 or m.flip(0.3)):
        cls: Any = m.wanted
    elif m.flip(0.35):
        robust = [RobustSplineAutoregressive, RobustSplineCoupling, RobustCouplingBlock]
        cls = m.pick([c for c in (*robust, RobustGlowBlock) if _fits(c, shape)] or [F.Permute])
    else:
        free = m.flip(0.04)
        cls = m.pick(
            [
                c
                for c in TABLE
                if _fits(c, shape)
                and (free or c not in FREE)
                and (m.depth < 2 or c not in DEEP)
                and c is not nf.transforms.Logit  # which ends all that is far out
            ]
        )
    if len(shape) == 3 and m.wanted is None and m.flip(0.02):
        return m.note(m.pick(STRANGE)(shape[0]))
    m.depth += 1
    told = context if cls in TOLD else None
    made = m.note(TABLE[cls](m, shape, told))
    m.depth -= 1
    if context is not None and (cls not in TOLD or m.flip(0.1)):
        return m.note(ContextAdapter(made))
    return made


def _base(m: Maker, shape: tuple[int, ...]) -> Any:
    d = shape[0]
    match m.integer(0, 9):
        case 0 if len(shape) == 1:
            return nf.distributions.GaussianMixture(2, d)
        case 1 if len(shape) == 1:
            return nf.distributions.base.Uniform(shape)
        case 2 if len(shape) == 1:
            return nf.distributions.base.ConditionalDiagGaussian(d, nn.Linear(CONTEXT, 2 * d))
        case 3 if len(shape) == 1:
            return nf.distributions.UniformGaussian(d, [0])
        case _:
            return nf.distributions.DiagGaussian(shape if len(shape) > 1 else d)


def _flow_of(m: Maker, kind: Any) -> tuple[Any, tuple[int, ...]]:
    vector = m.wanted is GuardedConditionalFlow or m.flip(0.8)
    shape: tuple[int, ...] = (m.integer(1, 4),) if vector else (m.integer(2, 3), 2, 2)
    if m.wanted is not None and not _fits(m.wanted, shape):
        shape = (3,) if m.wanted in VECTORS else (3, 2, 2)
    told = CONTEXT if kind is nf.ConditionalNormalizingFlow else None
    layers = [_layer(m, shape, told) for _ in range(m.integer(1, 4))]
    if m.flip(0.1):
        layers.append(layers[0])
    if kind is nf.ClassCondFlow:
        base = m.pick(
            [
                nf.distributions.ClassCondDiagGaussian(shape, 3),
                nf.distributions.GlowBase(shape, 3),
            ]
            if len(shape) == 3
            else [nf.distributions.ClassCondDiagGaussian(shape, 3)]
        )
    else:
        base = _base(m, shape)
    return m.note(kind(base, layers)), shape


def _draw_plain(flow: Any, shape: tuple[int, ...], noise: Any, context: Any) -> torch.Tensor:
    if _is_gaussian(flow.q0):
        with noise.patched():
            return flow.sample(ROWS)[0]
    return flow.forward(noise(ROWS, *shape, dtype=_dtype(flow.q0)))


def _dtype(base: Any) -> torch.dtype | None:
    r"""That of the samples of a base, which one of the host has in double precision."""
    return next((p.dtype for p in base.parameters()), None)


def _is_gaussian(base: Any) -> bool:
    distributions = nf.distributions
    return isinstance(
        base,
        distributions.DiagGaussian
        | distributions.ClassCondDiagGaussian
        | distributions.GlowBase
        | distributions.base.ConditionalDiagGaussian,
    )


def _draw_told(flow: Any, shape: tuple[int, ...], noise: Any, context: Any) -> torch.Tensor:
    if type(flow.q0) is nf.distributions.DiagGaussian:
        base = flow.q0
        eps = noise(ROWS, *shape)
        return flow.forward(base.loc + torch.exp(base.log_scale) * eps, context=context)
    if _is_gaussian(flow.q0):
        with noise.patched():
            return flow.sample(ROWS, context=context)[0]
    return flow.forward(noise(ROWS, *shape, dtype=_dtype(flow.q0)), context=context)


def _draw_class(flow: Any, noise: Any, context: Any) -> torch.Tensor:
    with noise.patched():
        return flow.sample(ROWS, torch.arange(ROWS) % 3)[0]


def _pyramid(m: Maker, kind: Any) -> tuple[Any, list[tuple[int, ...]]]:
    told = CONTEXT if kind is ConditionalMultiscaleFlow else None
    levels = m.integer(1, 3)
    channels = m.pick([4, 8])
    bases, flows, merges = [], [], []
    height = 1
    for i in range(levels):
        joined = channels if i == 0 else m.integer(1, 4)
        joined += 0 if i == 0 else -(channels + joined) % 4
        shape = (joined, height, height)
        if told and m.flip(0.6):
            given = channels if i and m.flip() else None
            bases.append(GaussianPrior(joined, m.pick([None, CONTEXT]), given,
                                       mean_bound=m.positive(),
                                       scale_bound=min(m.positive(), 5.0)))  # fmt: skip
        else:
            kinds = [nf.distributions.DiagGaussian(shape)] if told or m.flip() else [
                nf.distributions.ClassCondDiagGaussian(shape, 3),
                nf.distributions.GlowBase(shape, 3),
            ]  # fmt: skip
            bases.append(m.pick(kinds))
        if i:
            channels = channels + joined
            merges.append(F.Merge(m.pick(["channel", "channel_inv"])))
        layers = [_layer(m, (channels, height, height), told) for _ in range(m.integer(0, 2))]
        if channels % 4 == 0:
            squeeze = m.note(F.Squeeze())
            layers.append(m.note(ContextAdapter(squeeze)) if told and m.flip() else squeeze)
            channels, height = channels // 4, 2 * height
        flows.append(layers)
        if channels == 1 and i < levels - 1:
            channels = 1
    transform = m.pick([None, None, nf.transforms.Logit(), nf.transforms.Shift()])
    if transform is not None:
        m.note(transform)
    if kind is ConditionalMultiscaleFlow:
        model = kind(bases, flows, merges, transform)
    else:
        cond = not any(isinstance(b, nf.distributions.DiagGaussian) for b in bases)
        model = kind(bases, flows, merges, transform, class_cond=cond)
    return m.note(model), [(CONTEXT, height, height)] if told else []


def _migrated(m: Maker) -> tuple[Any, tuple[int, ...]]:
    wanted = {
        ours.CarriedCoupling: F.CoupledRationalQuadraticSpline,
        ours.CarriedMaskedSpline: F.AutoregressiveRationalQuadraticSpline,
        ours.MigratedAutoregressive: F.MaskedAffineAutoregressive,
        ours.MigratedCoupling: F.AffineCouplingBlock,
        ours.MigratedMasked: F.MaskedAffineFlow,
    }
    d = m.integer(2, 4)
    layers = []
    for i in range(m.integer(1, 2)):
        cls = wanted[m.wanted] if not i and m.wanted in wanted else m.pick([*wanted.values()])
        layer = TABLE[cls](m, (d,), None)
        if cls is F.MaskedAffineAutoregressive and m.flip():
            layer = F.Reverse(layer)
        layers += [layer, F.Permute(d)]
    old = nf.NormalizingFlow(nf.distributions.DiagGaussian(d), layers).eval()
    x = m.tensor(16, d).clamp(-1e6, 1e6)
    new, _ = flowguard.migrate(old, x, bins=m.integer(2, 4), fit_steps=2)
    for layer in new.modules():
        if type(layer) in OF_MIGRATION:
            m.note(layer)
    return m.note(new), (d,)


def _coupling_alone(m: Maker, dtype: torch.dtype) -> Case:
    block = _affine_block(m, (3,), None)
    coupling = block.flows[1]
    m.note(coupling)

    def draw(noise: Any, context: Any) -> torch.Tensor:
        z = noise(ROWS, 3)
        return torch.cat(coupling(list(z.split([2, 1], dim=1)))[0], dim=1)

    coupling = coupling.to(dtype)
    return Case(coupling, draw, dtype=dtype)


def case_of_normflows(m: Maker, dtype: torch.dtype) -> Case:
    r"""Returns a layer or a flow of normflows."""
    if m.wanted is LUConv1x1 or (m.wanted is None and m.flip(0.02)):
        layer = m.note(LUConv1x1(m.integer(1, 4)))
        shape = (layer.logs.shape[0], 1, 1)
        draw = partial(_draw_inverse, layer, shape)
        return _finished(m, layer, dtype, draw, [])
    if m.wanted is F.AffineCoupling:
        return _coupling_alone(m, dtype)
    if m.wanted in OF_MIGRATION or (m.wanted is None and m.flip(0.08)):
        model, shape = _migrated(m)
        return _finished(m, model, dtype, partial(_draw_plain, model, shape), [])
    if m.wanted in PYRAMIDS or (m.wanted is None and m.flip(0.2)):
        kind = m.wanted if m.wanted in PYRAMIDS - {F.Squeeze} else None
        kind = kind or m.pick([nf.MultiscaleFlow, ConditionalMultiscaleFlow])
        model, contexts = _pyramid(m, kind)
        return _finished(m, model, dtype, partial(_draw_pyramid, model), contexts)
    if m.wanted in FLOWS or m.flip(0.6):
        kind = m.wanted if m.wanted in FLOWS - {GuardedConditionalFlow} else None
        options = [nf.NormalizingFlow, nf.ConditionalNormalizingFlow] * 2 + [nf.ClassCondFlow]
        kind = kind or (
            nf.ConditionalNormalizingFlow
            if m.wanted is GuardedConditionalFlow
            else m.pick(options)
        )
        model, shape = _flow_of(m, kind)
        if kind is nf.ClassCondFlow:
            return _finished(m, model, dtype, partial(_draw_class, model), [])
        if kind is nf.NormalizingFlow:
            return _finished(m, model, dtype, partial(_draw_plain, model, shape), [])
        if m.wanted is GuardedConditionalFlow or m.flip(0.1):
            guard = OODConditioner(nn.Linear(CONTEXT, CONTEXT), policy="report")
            model = m.note(GuardedConditionalFlow(model, guard)) if len(shape) == 1 else model
        contexts = [(CONTEXT, *shape[1:])]
        return _finished(m, model, dtype, partial(_draw_told, model, shape), contexts)
    shape = (m.integer(1, 4),) if m.flip(0.7) else (m.integer(2, 4), 2, 2)
    if m.wanted is not None and not _fits(m.wanted, shape):
        shape = (3,) if m.wanted in VECTORS else (3, 2, 2)
    told = CONTEXT if m.flip() else None
    layer = _layer(m, shape, told)
    if type(layer) in STRANGE:  # alone, they are sampled as the core does
        return _finished(m, layer, dtype, partial(_draw_inverse, layer, shape), [])
    if told:
        return _finished(m, layer, dtype, lambda noise, c: layer(noise(ROWS, *shape), c)[0],
                         [(CONTEXT, *shape[1:])])  # fmt: skip
    return _finished(m, layer, dtype, lambda noise, c: layer(noise(ROWS, *shape))[0], [])


def _draw_inverse(layer: Any, shape: tuple[int, ...], noise: Any, context: Any) -> torch.Tensor:
    return layer.inverse(noise(ROWS, *shape))[0]


def _draw_pyramid(model: Any, noise: Any, context: Any) -> torch.Tensor:
    with noise.patched():
        if context is not None:
            return model.sample(ROWS, context)[0]
        y = torch.arange(ROWS) % 3 if getattr(model, "class_cond", False) else None
        return model.sample(ROWS, y)[0]


def _finished(m: Maker, model: Any, dtype: torch.dtype, draw: Any, contexts: Any) -> Case:
    m.spread(model)
    if dtype != torch.float32:
        model.to(dtype)
    model.train(m.flip(0.3))
    return Case(model, draw, contexts, dtype=dtype)
