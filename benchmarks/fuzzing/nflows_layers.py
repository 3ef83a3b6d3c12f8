r"""Random layers and flows of nflows and of its fork in glasflow."""

__all__ = ["case_of_nflows", "nflows_tables"]

import importlib
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn as nn

import flowguard
from flowguard.integrations import nflows as ours
from flowguard.integrations.nflows import migrated
from flowguard.integrations.nflows.spline import SplineHead

from .maker import CONTEXT, ROWS, Case, Maker
from .transforms import spline_options

HOSTS = ("nflows", "glasflow.nflows")
Build = Callable[[Maker, "Host", tuple[int, ...]], Any]


class Host:
    r"""A package of nflows' modules."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.T = importlib.import_module(f"{name}.transforms")
        self.nets = importlib.import_module(f"{name}.nn.nets")
        self.distributions = importlib.import_module(f"{name}.distributions")
        self.Flow = importlib.import_module(f"{name}.flows").Flow
        self.more = importlib.import_module(f"{name}.transforms.nonlinearities")
        self.flows = [self.Flow]
        if name.startswith("glasflow"):  # which has a flow of its own besides
            self.flows.append(importlib.import_module("glasflow.flows.base").Flow)

    def find(self, name: str) -> Any:
        r"""Returns the class of that name, None if there is none."""
        return getattr(self.T, name, None) or getattr(self.more, name, None)

    def net(self, m: Maker, shape: tuple[int, ...]) -> Callable[[int, int], nn.Module]:
        r"""Returns what makes a network, for vectors or for images."""
        context = m.context or None
        if len(shape) == 3:
            return lambda i, o: self.nets.ConvResidualNet(i, o, 4, context, 1)
        return lambda i, o: self.nets.ResidualNet(i, o, 4, context_features=context, num_blocks=1)


@cache
def host(name: str) -> Host:
    r"""Returns the host of that name."""
    return Host(name)


def _mask(m: Maker, channels: int) -> torch.Tensor:
    return (torch.randperm(channels) < m.integer(1, channels - 1)).int()


def _options(m: Maker) -> dict[str, Any]:
    options = spline_options(m)
    options["tail_bound"] = options.pop("bound")
    return {"num_bins": m.integer(2, 4), **options}


def _robust_coupling(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
    return ours.RobustSplineCouplingTransform(
        _mask(m, shape[0]),
        h.net(m, shape),
        **_options(m),
        apply_unconditional_transform=m.flip(0.3),
        img_shape=shape[1:] if len(shape) == 3 and m.flip() else None,
        identity_init=m.flip(),
    )


def _robust_autoregressive(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
    return ours.MaskedRobustSplineAutoregressiveTransform(
        shape[0], 4, m.context or None, **_options(m), num_blocks=1, identity_init=m.flip()
    )


def _robust_cdf(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
    return ours.RobustSplineCDF(shape, **_options(m))


def _step(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
    return ours.RobustFlowStep(
        shape[0],
        m.context or None,
        4,
        num_blocks=1,
        **_options(m),
        mix=m.pick(["free", "orthogonal"]),
    )


def _composite(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
    parts = [_layer(m, h, shape) for _ in range(m.integer(1, 3))]
    if m.flip(0.2):
        parts.append(parts[0])
    return h.T.CompositeTransform(parts)


def _inverse(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
    return h.T.InverseTransform(_layer(m, h, shape))


def _pointwise(name: str) -> Build:
    def build(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
        if m.flip(0.2):
            return getattr(h.T, name)(float(m.tensor()), m.positive())
        sizes = shape if m.flip() or len(shape) == 1 else (shape[0], 1, 1)
        return getattr(h.T, name)(m.tensor(*sizes), m.tensor(*sizes).abs() + 1e-38)

    return build


def _permutation(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
    dim = m.integer(1, len(shape)) if m.flip(0.3) else 1
    return h.T.Permutation(torch.randperm(shape[dim - 1]), dim=dim)


def _linear(name: str, *more: str) -> Build:
    def build(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
        d = shape[0]
        # One of the hosts asks for an even number.
        arguments = [2 * m.integer(1, 2)] if "householder" in more else []
        options: dict[str, Any] = {} if "bare" in more else {"using_cache": m.flip(0.3)}
        if "start" in more:
            options["identity_init"] = m.flip()
        return getattr(h.T, name)(d, *arguments, **options)

    return build


def _coupling(name: str, spline: bool) -> Build:
    def build(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
        options: dict[str, Any] = {}
        if spline:
            tails = m.tails or m.pick([None, "linear"])
            options = {"num_bins": 3, "tails": tails, "tail_bound": m.positive()}
        return getattr(h.T, name)(_mask(m, shape[0]), h.net(m, shape), **options)

    return build


def _autoregressive(name: str, *arguments: int, tails: bool = False) -> Build:
    def build(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
        options: dict[str, Any] = {"context_features": m.context or None, "num_blocks": 1}
        if tails:
            options |= {"tails": m.tails or m.pick([None, "linear"]), "tail_bound": m.positive()}
        return getattr(h.T, name)(*arguments, features=shape[0], hidden_features=4, **options)

    return build


def _cdf(name: str) -> Build:
    def build(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
        tails = m.pick([None, "linear", "linear"])
        return getattr(h.T, name)(list(shape), num_bins=3, tails=tails, tail_bound=m.positive())

    return build


def _plain(name: str) -> Build:
    return lambda m, h, shape: h.find(name)()


def _composite_cdf(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
    cdf = h.T.PiecewiseRationalQuadraticCDF(list(shape), num_bins=3)
    return h.T.CompositeCDFTransform(h.T.Sigmoid(), cdf)


#: Layers of vectors and of images of one shape, by name.
BOTH: dict[str, Build] = {
    "ActNorm": lambda m, h, shape: h.T.ActNorm(shape[0]),
    "AffineTransform": _pointwise("AffineTransform"),
    "CauchyCDF": _plain("CauchyCDF"),
    "CauchyCDFInverse": _plain("CauchyCDFInverse"),
    "CompositeCDFTransform": _composite_cdf,
    "CompositeTransform": _composite,
    "IdentityTransform": _plain("IdentityTransform"),
    "InverseTransform": _inverse,
    "LeakyReLU": lambda m, h, shape: h.T.LeakyReLU(m.pick([0.01, 0.3, 1.0, 3.0])),
    "Logit": lambda m, h, shape: h.T.Logit(m.pick([1, 1, -2.0, 1e-3, 30.0])),
    "Permutation": _permutation,
    "PointwiseAffineTransform": _pointwise("PointwiseAffineTransform"),
    "RandomPermutation": lambda m, h, shape: h.T.RandomPermutation(shape[0]),
    "ReversePermutation": lambda m, h, shape: h.T.ReversePermutation(shape[0]),
    "Sigmoid": lambda m, h, shape: h.T.Sigmoid(m.pick([1, 1, -2.0])),
    "Tanh": _plain("Tanh"),
}
VECTORS: dict[str, Build] = {
    "AdditiveCouplingTransform": _coupling("AdditiveCouplingTransform", False),
    "AffineCouplingTransform": _coupling("AffineCouplingTransform", False),
    "BatchNorm": lambda m, h, shape: h.T.BatchNorm(shape[0]),
    "HouseholderSequence": _linear("HouseholderSequence", "bare", "householder"),
    "LULinear": _linear("LULinear", "start"),
    "MaskedAffineAutoregressiveTransform": _autoregressive("MaskedAffineAutoregressiveTransform"),
    "MaskedPiecewiseCubicAutoregressiveTransform": _autoregressive(
        "MaskedPiecewiseCubicAutoregressiveTransform", 3
    ),
    "MaskedPiecewiseLinearAutoregressiveTransform": _autoregressive(
        "MaskedPiecewiseLinearAutoregressiveTransform", 3
    ),
    "MaskedPiecewiseQuadraticAutoregressiveTransform": _autoregressive(
        "MaskedPiecewiseQuadraticAutoregressiveTransform", tails=True
    ),
    "MaskedPiecewiseRationalQuadraticAutoregressiveTransform": _autoregressive(
        "MaskedPiecewiseRationalQuadraticAutoregressiveTransform", tails=True
    ),
    "NaiveLinear": _linear("NaiveLinear"),
    "PiecewiseCubicCDF": _cdf("PiecewiseCubicCDF"),
    "PiecewiseCubicCouplingTransform": _coupling("PiecewiseCubicCouplingTransform", True),
    "PiecewiseLinearCDF": _cdf("PiecewiseLinearCDF"),
    "PiecewiseLinearCouplingTransform": _coupling("PiecewiseLinearCouplingTransform", True),
    "PiecewiseQuadraticCDF": _cdf("PiecewiseQuadraticCDF"),
    "PiecewiseQuadraticCouplingTransform": _coupling("PiecewiseQuadraticCouplingTransform", True),
    "PiecewiseRationalQuadraticCDF": _cdf("PiecewiseRationalQuadraticCDF"),
    "PiecewiseRationalQuadraticCouplingTransform": _coupling(
        "PiecewiseRationalQuadraticCouplingTransform", True
    ),
    "QRLinear": _linear("QRLinear", "householder"),
    "SVDLinear": _linear("SVDLinear", "householder", "start"),
}
IMAGES: dict[str, Build] = {
    "OneByOneConvolution": _linear("OneByOneConvolution", "start"),
}
OURS: dict[type, Build] = {
    ours.MaskedRobustSplineAutoregressiveTransform: _robust_autoregressive,
    ours.RobustFlowStep: _step,
    ours.RobustSplineCDF: _robust_cdf,
    ours.RobustSplineCouplingTransform: _robust_coupling,
}
OF_IMAGES = {ours.RobustFlowStep}
OF_VECTORS = {ours.MaskedRobustSplineAutoregressiveTransform}

#: What holds other layers, and what no bound is known for.
DEEP = {"CompositeTransform", "InverseTransform"}
FREE = {name for name in VECTORS if "Coupling" in name or "Masked" in name or "Piecewise" in name}
FREE |= {"CauchyCDF", "CauchyCDFInverse", "CompositeCDFTransform", "Logit", "Sigmoid", "Tanh"}


@cache
def _table(name: str) -> dict[type, Build]:
    h = host(name)
    named = {**BOTH, **VECTORS, **IMAGES}
    return {h.find(n): build for n, build in named.items() if h.find(n)}


def nflows_tables() -> set[type]:
    r"""Returns all classes that are made here."""
    found = {*OURS, SplineHead, ours.ConditionalMultiscaleTransform}
    found |= {migrated.MigratedCouplingTransform, migrated.MigratedAutoregressiveTransform}
    for name in HOSTS:
        h = host(name)
        found |= {*_table(name), *h.flows, h.T.MultiscaleCompositeTransform, h.T.SqueezeTransform}
    return found


def _fits(cls: type, shape: tuple[int, ...]) -> bool:
    if len(shape) == 3:
        return cls.__name__ not in VECTORS and cls not in OF_VECTORS and shape[0] > 1
    small = shape[0] < 2 and ("Coupling" in cls.__name__ or cls is SplineHead)
    return cls.__name__ not in IMAGES and cls not in OF_IMAGES and not small


def _layer(m: Maker, h: Host, shape: tuple[int, ...]) -> Any:
    table = {**_table(h.name), **OURS, SplineHead: _robust_coupling}
    if m.wanted in table and _fits(m.wanted, shape) and (m.depth == 0 or m.flip(0.3)):
        cls = m.wanted
    elif m.flip(0.35):
        cls = m.pick([c for c in OURS if _fits(c, shape)])
    else:
        free = m.flip(0.04)
        cls = m.pick(
            [
                c
                for c in table
                if _fits(c, shape)
                and (free or c.__name__ not in FREE)
                and (m.depth < 2 or c.__name__ not in DEEP)
            ]
        )
    m.depth += 1
    made = table[cls](m, h, shape)
    m.depth -= 1
    if isinstance(getattr(made, "head", None), SplineHead):
        m.note(made.head)
    if hasattr(made, "running_var"):
        made.running_var.uniform_(0.3, 2)
    return m.note(made)


def _multiscale(m: Maker, h: Host) -> tuple[Any, int, list[tuple[int, ...]]]:
    r"""A multiscale transform, the number of its latents, and the shapes of its contexts."""
    theirs = m.wanted is h.T.MultiscaleCompositeTransform or (
        m.wanted is not ours.ConditionalMultiscaleTransform and m.flip(0.3)
    )
    levels = m.integer(1, 2 if m.flip(0.8) else 3)
    if theirs and m.flip():  # of vectors, which do not change their shape
        shape: Any = (m.integer(2**levels, 9),)
        flow = h.T.MultiscaleCompositeTransform(levels)
        size = shape[0]
        while len(flow._transforms) < levels:
            shape = flow.add_transform(_layer(m, h, shape), shape)
        return flow, size, [(CONTEXT,)]
    cls = h.T.MultiscaleCompositeTransform if theirs else ours.ConditionalMultiscaleTransform
    shape, flow, contexts = (m.integer(2, 3), 4, 4), cls(levels), []
    size = prod(shape)
    for _ in range(levels):
        parts = []
        if shape[1] > 1 and not (theirs and contexts):  # theirs has one context for all levels
            squeeze = m.note(h.T.SqueezeTransform())
            parts, shape = [squeeze], squeeze.get_output_shape(*shape)
        if shape[0] < 2:
            parts.append(m.note(h.T.ActNorm(shape[0])))
        else:
            parts += [_layer(m, h, shape) for _ in range(m.integer(1, 2))]
        contexts.append((CONTEXT, *shape[1:]))
        shape = flow.add_transform(h.T.CompositeTransform(parts), shape)
    return flow, size, contexts[:1] if theirs else contexts


def _migrated(m: Maker, h: Host) -> Any:
    d = m.integer(2, 4)
    names = [
        "AffineCouplingTransform",
        "AdditiveCouplingTransform",
        "MaskedAffineAutoregressiveTransform",
        "PiecewiseRationalQuadraticCouplingTransform",
        "MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
    ]
    layers = []
    if m.wanted is migrated.MigratedCouplingTransform:
        names = [name for name in names if "Masked" not in name]
    if m.wanted is migrated.MigratedAutoregressiveTransform:
        names = [name for name in names if "Masked" in name]
    for name in [m.pick(names) for _ in range(m.integer(1, 2))]:
        layers.append(getattr(h.T, name))
    built = []
    for cls in layers:
        m.tails = "linear"
        built.append(_table(h.name)[cls](m, h, (d,)))
        m.tails = None
        built.append(_layer(m, h, (d,)) if m.flip(0.3) else h.T.ReversePermutation(d))
    old = h.Flow(h.T.CompositeTransform(built), h.distributions.StandardNormal([d])).eval()
    x = m.tensor(16, d).clamp(-1e6, 1e6)
    y = torch.randn(16, CONTEXT) if m.context else None
    new, _ = flowguard.migrate(old, x, y, bins=m.integer(2, 4), fit_steps=2)
    for layer in new.modules():
        if isinstance(
            layer, migrated.MigratedCouplingTransform | migrated.MigratedAutoregressiveTransform
        ):
            m.note(layer)
    return new


def case_of_nflows(m: Maker, dtype: torch.dtype, name: str) -> Case:
    r"""Returns a layer or a flow of one of the hosts.

    Arguments:
        m: What chooses.
        dtype: The dtype of the weights.
        name: The name of the host's package.
    """
    h = host(name)
    m.context = CONTEXT if m.flip(0.8) else 0
    images = {h.T.MultiscaleCompositeTransform, ours.ConditionalMultiscaleTransform}
    of_migration = {migrated.MigratedCouplingTransform, migrated.MigratedAutoregressiveTransform}
    if m.wanted in of_migration or (m.wanted is None and m.flip(0.08)):
        model = m.note(_migrated(m, h))
        d = model._distribution._shape[0]
        return _finished(m, model, dtype, _draw_flow(model), [(CONTEXT,)])
    if m.wanted in images or (m.wanted is None and m.flip(0.2)):
        transform, size, contexts = _multiscale(m, h)
        m.note(transform)
        if m.flip():
            return _finished(m, transform, dtype, _draw_layer(transform, (size,)), contexts,
                             len(contexts) > 1)  # fmt: skip
        flow = m.note(h.Flow(transform, h.distributions.StandardNormal([size])))
        # A flow takes tensors only for contexts; its transform takes lists.
        return _finished(m, flow, dtype, _draw_layer(transform, (size,)), contexts,
                         len(contexts) > 1)  # fmt: skip
    image = m.wanted in {h.T.SqueezeTransform, *OF_IMAGES} or (
        m.wanted is not None and m.wanted.__name__ in IMAGES
    )
    vectors = m.wanted in h.flows or (m.wanted is not None and not _fits(m.wanted, (3, 2, 2)))
    if image or (not vectors and m.flip(0.2)):
        shape: tuple[int, ...] = (m.integer(2, 4), 2, 2)
        layer: Any = _layer(m, h, shape)
        if m.wanted is h.T.SqueezeTransform or m.flip(0.2):
            squeeze = m.note(h.T.SqueezeTransform())
            shape = (4 * m.integer(1, 2), 2, 2)
            layer = h.T.CompositeTransform([squeeze, _layer(m, h, shape)])
        return _finished(m, layer, dtype, _draw_layer(layer, shape), [(CONTEXT, *shape[1:])])
    d = m.integer(1, 4) if m.flip(0.9) else m.integer(5, 9)
    if m.wanted is not None and not _fits(m.wanted, (d,)):
        d = 3
    layer = _layer(m, h, (d,))
    if m.flip(0.4) and m.wanted not in h.flows:
        return _finished(m, layer, dtype, _draw_layer(layer, (d,)), [(CONTEXT,)])
    layers = [layer, *(_layer(m, h, (d,)) for _ in range(m.integer(0, 3)))]
    base = h.distributions.StandardNormal([d])
    if m.context and m.flip(0.05):
        base = h.distributions.ConditionalDiagonalNormal([d], nn.Linear(CONTEXT, 2 * d))
    if m.flip(0.05):
        base = h.distributions.DiagonalNormal([d])
    embedding = nn.Linear(CONTEXT, CONTEXT) if m.context and m.flip(0.2) else None
    kind = m.wanted if m.wanted in h.flows else m.pick(h.flows)
    if kind is h.Flow:
        flow = m.note(h.Flow(h.T.CompositeTransform(layers), base, embedding))
        return _finished(m, flow, dtype, _draw_flow(flow), [(CONTEXT,)])
    if type(base).__name__.startswith("Conditional"):
        base = h.distributions.StandardNormal([d])
    flow = m.note(kind(h.T.CompositeTransform(layers), base))
    return _finished(m, flow, dtype, _draw_own(flow), [(CONTEXT,)])


def _finished(
    m: Maker,
    model: Any,
    dtype: torch.dtype,
    draw: Any,
    contexts: list[tuple[int, ...]],
    listed: bool = False,
) -> Case:
    contexts = contexts if m.context else []
    m.spread(model)
    model.to(dtype)
    model.train(m.flip(0.3))
    return Case(model, draw, contexts, listed=listed, dtype=dtype)


def _draw_layer(layer: Any, shape: tuple[int, ...]) -> Any:
    return lambda noise, context: layer.inverse(noise(ROWS, *shape), context)[0]


def _sampled(flow: Any, z: torch.Tensor, context: Any) -> torch.Tensor:
    embedded = None if context is None else flow._embedding_net(context)
    return flow._transform.inverse(z, context=embedded)[0]


def _draw_flow(flow: Any) -> Any:
    def draw(noise: Any, context: Any) -> torch.Tensor:
        base = flow._distribution
        if type(base).__name__ == "DiagonalNormal":  # which the host cannot sample
            z = noise(ROWS, base.mean_.shape[-1])
            return _sampled(flow, base.mean_ + torch.exp(base.log_std_) * z, context)
        with noise.patched():
            if context is None:
                return flow.sample(ROWS)
            return flow.sample(1, context).squeeze(1)

    return draw


def _draw_own(flow: Any) -> Any:
    def draw(noise: Any, context: Any) -> torch.Tensor:
        base = flow._distribution
        if type(base).__name__ == "DiagonalNormal":  # which the host cannot sample
            z = noise(ROWS, base.mean_.shape[-1])
            return flow.inverse(base.mean_ + torch.exp(base.log_std_) * z, context)[0]
        with noise.patched():
            return flow.sample(ROWS, context)

    return draw
