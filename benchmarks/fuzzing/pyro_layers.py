r"""Random transforms and flows of Pyro, and distributions of torch's that are made of transforms."""

__all__ = ["PYRO", "case_of_pyro"]

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.distributions import conditional
from pyro.nn import ConditionalAutoRegressiveNN
from torch.distributions import TransformedDistribution

import flowguard
from flowguard.integrations.pyro import migrated

from .maker import CONTEXT, ROWS, Case, Maker
from .transforms import transform

Build = Callable[[Maker, int, torch.dtype], Any]

#: What goes with whom when it is migrated.
ROBUST = {
    T.AffineAutoregressive: migrated.MigratedAffineAutoregressive,
    T.AffineCoupling: migrated.MigratedAffineCoupling,
    T.ConditionalAffineAutoregressive: migrated.MigratedConditionalAffineAutoregressive,
    T.ConditionalAffineCoupling: migrated.MigratedConditionalAffineCoupling,
}


def _clips(m: Maker) -> dict[str, Any]:
    return {"log_scale_max_clip": m.pick([0.5, 3.0]), "log_scale_min_clip": m.pick([-5.0, -1.0])}


def _autoregressive(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return T.affine_autoregressive(d, [8], stable=m.flip(), **_clips(m))


def _conditional_autoregressive(m: Maker, d: int, dtype: torch.dtype) -> Any:
    net = ConditionalAutoRegressiveNN(d, CONTEXT, [8], skip_connections=m.flip(0.3))
    return T.ConditionalAffineAutoregressive(net, stable=m.flip(), **_clips(m))


def _coupling(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return T.affine_coupling(d, [8], split_dim=m.integer(1, d - 1), **_clips(m))


def _conditional_coupling(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return T.conditional_affine_coupling(
        d, CONTEXT, [8], split_dim=m.integer(1, d - 1), **_clips(m)
    )


def _migrated(kind: type, m: Maker, d: int, dtype: torch.dtype) -> Any:
    old = PYRO[kind](m, d, dtype)
    # What a layer takes beyond what it can hold is refused, and made no model of.
    x, y = torch.randn(16, d), torch.randn(16, CONTEXT)
    return flowguard.migrate(old, x, y if kind in CONDITIONAL else None)[0]


def _batch_norm(m: Maker, d: int, dtype: torch.dtype) -> Any:
    layer = T.BatchNorm(d)
    with torch.no_grad():
        layer.moving_mean.copy_(m.tensor(d))
        layer.moving_variance.copy_(m.tensor(d).abs())
    return layer.train(m.flip(0.3))


def _lower_cholesky(m: Maker, d: int, dtype: torch.dtype) -> Any:
    matrix = m.tensor(d, d, dtype=dtype) + torch.eye(d, dtype=dtype)
    return T.LowerCholeskyAffine(m.tensor(d, dtype=dtype), matrix.tril())


def _stack(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return T.ComposeTransformModule([_plain(m, d, dtype) for _ in range(m.integer(1, 3))])


def _conditional_stack(m: Maker, d: int, dtype: torch.dtype) -> Any:
    layers = [_any(m, d, dtype) for _ in range(m.integer(1, 3))]
    return conditional.ConditionalComposeTransformModule(layers)


def _constant(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return conditional.ConstantConditionalTransform(_plain(m, d, dtype))


def _inverse(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return m.note(PYRO[m.pick(CONDITIONAL)](m, d, dtype)).inv


CONDITIONAL = (T.ConditionalAffineAutoregressive, T.ConditionalAffineCoupling)

PYRO: dict[Any, Build] = {
    T.AffineAutoregressive: _autoregressive,
    T.AffineCoupling: _coupling,
    T.BatchNorm: _batch_norm,
    T.ComposeTransformModule: _stack,
    T.ConditionalAffineAutoregressive: _conditional_autoregressive,
    T.ConditionalAffineCoupling: _conditional_coupling,
    T.LowerCholeskyAffine: _lower_cholesky,
    T.Permute: lambda m, d, t: T.Permute(torch.randperm(d)),
    conditional.ConditionalComposeTransformModule: _conditional_stack,
    conditional.ConstantConditionalTransform: _constant,
    conditional._ConditionalInverseTransformModule: _inverse,
    **{robust: partial(_migrated, kind) for kind, robust in ROBUST.items()},
}

PLAIN = [cls for cls in PYRO if issubclass(cls, torch.distributions.Transform)]
FREE = [*ROBUST]


def _plain(m: Maker, d: int, dtype: torch.dtype) -> Any:
    r"""A transform that takes no context; seldom one that nothing bounds."""
    if m.flip(0.3):
        return transform(m, d, dtype)
    kinds = [
        c for c in PLAIN if (c not in FREE or m.flip(0.05)) and (m.depth < 2 or c is not STACK)
    ]
    return _made(m, m.pick(kinds), d, dtype)


STACK = T.ComposeTransformModule


def _any(m: Maker, d: int, dtype: torch.dtype) -> Any:
    if m.flip(0.4):
        return _plain(m, d, dtype)
    kinds = [c for c in PYRO if (c not in FREE or m.flip(0.05)) and c not in PLAIN]
    deep = {conditional.ConditionalComposeTransformModule}
    return _made(m, m.pick([c for c in kinds if m.depth < 2 or c not in deep]), d, dtype)


def _made(m: Maker, cls: Any, d: int, dtype: torch.dtype) -> Any:
    m.depth += 1
    made = m.note(PYRO[cls](m, d, dtype))
    m.depth -= 1
    return made


def _base(m: Maker, d: int, dtype: torch.dtype) -> Any:
    normal = m.pick([dist.Normal, torch.distributions.Normal])
    if m.flip(0.6):
        return normal(torch.zeros(d, dtype=dtype), torch.ones(d, dtype=dtype))
    scale = m.tensor(d, dtype=dtype).abs().clamp(torch.finfo(dtype).tiny)
    return normal(m.tensor(d, dtype=dtype), scale)


DISTRIBUTIONS = {
    conditional.ConditionalTransformedDistribution: _any,
    dist.TransformedDistribution: _plain,
    TransformedDistribution: _plain,
}


def case_of_pyro(m: Maker, dtype: torch.dtype) -> Case:
    r"""Returns a distribution of transforms, with a context or without."""
    d = m.integer(2, 4)
    wanted = m.wanted
    kinds = [
        c
        for c in DISTRIBUTIONS
        if wanted not in PYRO or wanted in PLAIN or DISTRIBUTIONS[c] is _any
    ]
    kind = wanted if wanted in DISTRIBUTIONS else m.pick(kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [DISTRIBUTIONS[kind](m, d, dtype) for _ in range(m.integer(1, 3))]
        if wanted in PYRO:
            layers.insert(m.integer(0, len(layers)), _made(m, wanted, d, dtype))
    for layer in layers:
        if isinstance(layer, torch.nn.Module):
            m.spread(layer)
            layer.to(dtype)
    model = m.note(kind(_base(m, d, dtype), layers))

    def draw(noise: Any, context: Any) -> torch.Tensor:
        given = model if context is None else model.condition(context)
        with noise.patched():
            return given.sample((ROWS,))

    contexts = [(CONTEXT,)] if hasattr(model, "condition") else []
    return Case(model, draw, contexts, dtype=dtype)
