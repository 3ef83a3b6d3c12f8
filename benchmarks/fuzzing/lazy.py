r"""Random lazy transforms and flows of zuko."""

__all__ = ["LAZY", "case_of_lazy", "flow_of_zuko"]

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import zuko
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform

import flowguard
from flowguard import OODConditioner
from flowguard.integrations.zuko import (
    ConditionalMultiscaleTransform,
    GuardedFlow,
    MultiscaleFlow,
    RobustCouplingFlow,
    RobustNSF,
)
from flowguard.integrations.zuko.autoregressive import (
    GroupedAutoregressive,
    GroupedAutoregressiveTransform,
)
from flowguard.integrations.zuko.image import MultiscaleTransform
from flowguard.migration.imitate import Rescaled
from flowguard.migration.inscribe import InscribedLine
from flowguard.transforms import RobustSpline

from .maker import CONTEXT, ROWS, Case, Maker
from .transforms import family, spline_options, transform, univariate

Lazy = zuko.lazy


def _options(m: Maker) -> dict[str, Any]:
    f, shapes = univariate(m)
    options = {"univariate": f, "shapes": shapes, "hidden_features": [m.integer(2, 8)]}
    return options | {"activation": m.pick([nn.ReLU, nn.Tanh])}


def _autoregressive(m: Maker, d: int) -> Any:
    options = {"passes": m.pick([None, None, 2]), "order": torch.randperm(d)} if d > 1 else {}
    # The masked network needs a path to each feature.
    options |= {**_options(m), "hidden_features": [8]}
    return MaskedAutoregressiveTransform(d, m.context, **options)


def _coupling(m: Maker, d: int) -> Any:
    mask = torch.randperm(d) < m.integer(1, max(d - 1, 1))
    return GeneralCouplingTransform(d, m.context, mask=mask if d > 1 else None, **_options(m))


def _elementwise(m: Maker, d: int) -> Any:
    return ElementWiseTransform(d, m.context, **_options(m))


def _unconditional(m: Maker, d: int) -> Any:
    constant = Lazy.UnconditionalTransform
    T = zuko.transforms
    match m.integer(0, 9):
        case 0:
            affine = torch.distributions.AffineTransform
            return constant(affine, m.tensor(d), m.tensor(d), buffer=m.flip())
        case 1:
            return constant(T.RotationTransform, m.tensor(d, d))
        case 2:
            return constant(T.LULinearTransform, m.tensor(d, d) + torch.eye(d))
        case 3:
            return constant(T.PermutationTransform, torch.randperm(d), buffer=True)
        case 4:
            return constant(T.MonotonicAffineTransform, m.tensor(d), m.tensor(d))
        case 5:
            bins = [m.raw(d, m.integer(1, 3))] * 3
            return constant(RobustSpline, *bins, m.raw(d), **spline_options(m), buffer=True)
        case 6:
            return constant(m.pick([T.CircularShiftTransform, T.SoftclipTransform]), m.positive())
        case 7:
            return constant(T.IdentityTransform)
        case 8:
            return constant(partial(_same, transform(m, d, torch.float32)))
        case _:
            return constant(MonotonicRQS, *(m.tensor(d, n) for n in (4, 4, 3)), m.positive())


MonotonicRQS = zuko.transforms.MonotonicRQSTransform


def _same(f: Any) -> Any:
    return f


def _inverse(m: Maker, d: int) -> Any:
    return Lazy.LazyInverse(_layer(m, d))


def _composed(m: Maker, d: int) -> Any:
    parts = [_layer(m, d) for _ in range(m.integer(1, 4))]
    if m.flip(0.2):
        parts.append(parts[0])
    return Lazy.LazyComposedTransform(*parts)


def _multiscale(m: Maker, d: int) -> Any:
    levels = m.integer(1, 2)
    return ConditionalMultiscaleTransform(
        (1, 4, 4), 0, levels=levels, steps=1, hidden=4, coupling=family(m)
    )


def _image_flow(m: Maker, d: int) -> Any:
    return MultiscaleFlow((1, 4, 4), CONTEXT, levels=m.integer(1, 2), steps=1, hidden=4,
                          coupling=family(m))  # fmt: skip


def _base(m: Maker, d: int) -> Any:
    normal = zuko.distributions.DiagNormal
    zeros, ones = torch.zeros(d), torch.ones(d)
    return Lazy.UnconditionalDistribution(normal, zeros, ones, buffer=True)


def flow_of_zuko(m: Maker, d: int) -> Any:
    r"""Returns a flow of some features.

    Arguments:
        m: What chooses.
        d: The number of features.
    """
    match m.integer(0, 5):
        case 0:
            return _robust_nsf(m, d)
        case 1:
            return RobustCouplingFlow(d, m.context, bins=m.integer(2, 4), bound=m.positive(),
                             shift_bound=m.positive(), transforms=m.integer(1, 3),
                             hidden_features=[4])  # fmt: skip
        case 2 if d > 1:
            return _migrated(m, d)
        case _:
            layers = [_layer(m, d) for _ in range(m.integer(1, 3))]
            return Lazy.Flow(layers, _base(m, d))


def _robust_nsf(m: Maker, d: int) -> Any:
    return RobustNSF(d, m.context, bins=m.integer(2, 4), bound=m.positive(),
                     shift_bound=m.positive(), transforms=m.integer(1, 3),
                     hidden_features=[4])  # fmt: skip


def _migrated(m: Maker, d: int) -> Any:
    kind = m.pick(MIGRATED.get(m.wanted, [*LINES, zuko.flows.NSF]))
    old = kind(d, m.context, transforms=m.integer(1, 2), hidden_features=[4])
    x = m.tensor(16, d).clamp(-1e6, 1e6)
    y = torch.randn(16, CONTEXT) if m.context else None
    new, _ = flowguard.migrate(old, x, y, bins=m.integer(2, 4), fit_steps=2)
    m.made.append(Rescaled if kind is zuko.flows.NSF else InscribedLine)
    if kind is not zuko.flows.NICE:
        m.made.append(GroupedAutoregressive)
    return new


def _guarded(m: Maker, d: int) -> Any:
    return GuardedFlow(
        flow_of_zuko(m, d), OODConditioner(nn.Linear(CONTEXT, CONTEXT), policy="report")
    )


LAZY: dict[type, Callable[[Maker, int], Any]] = {
    MaskedAutoregressiveTransform: _autoregressive,
    GeneralCouplingTransform: _coupling,
    ElementWiseTransform: _elementwise,
    Lazy.UnconditionalTransform: _unconditional,
    Lazy.LazyInverse: _inverse,
    Lazy.LazyComposedTransform: _composed,
    Lazy.Flow: flow_of_zuko,
    RobustNSF: _robust_nsf,
    GuardedFlow: _guarded,
    ConditionalMultiscaleTransform: _multiscale,
    MultiscaleFlow: _image_flow,
}

#: What a layer or a flow returns for a context.
GIVEN = {
    zuko.distributions.NormalizingFlow,
    zuko.transforms.AutoregressiveTransform,
    GroupedAutoregressiveTransform,
    zuko.transforms.CouplingTransform,
    MultiscaleTransform,
}

#: Flows of affine maps, and what a migration makes of which flows.
LINES = [zuko.flows.MAF, zuko.flows.NICE]
MIGRATED: dict[type | None, list[Any]] = {
    Rescaled: LINES,
    InscribedLine: LINES,
    GroupedAutoregressive: [zuko.flows.MAF, zuko.flows.NSF],
}

FLOWS = {Lazy.Flow, RobustNSF, GuardedFlow, ConditionalMultiscaleTransform, MultiscaleFlow}


def _layer(m: Maker, d: int) -> Any:
    wanted = m.wanted if m.wanted not in FLOWS else None
    if wanted in LAZY and (m.depth == 0 or m.flip(0.3)):
        cls = wanted
    else:
        deep = {Lazy.LazyComposedTransform, Lazy.LazyInverse}
        cls = m.pick([c for c in LAZY if c not in FLOWS and (m.depth < 2 or c not in deep)])
    m.depth += 1
    made = LAZY[cls](m, d)
    m.depth -= 1
    return m.note(made)


def case_of_lazy(m: Maker, dtype: torch.dtype) -> Case:
    r"""Returns a lazy transform or a flow of zuko."""
    many = {GeneralCouplingTransform, MaskedAutoregressiveTransform, *MIGRATED, *GIVEN}
    d = m.integer(2 if m.wanted in many else 1, 4)
    m.context = CONTEXT if m.wanted is GuardedFlow or m.flip(0.8) else 0
    if m.wanted in FLOWS:
        model = LAZY[m.wanted](m, d)
    elif m.wanted in MIGRATED:
        model = _migrated(m, d)
    elif m.wanted in GIVEN:
        model = LAZY[m.pick(MAKERS[m.wanted])](m, d)
    elif m.wanted is None and m.flip(0.1):
        model = LAZY[m.pick([ConditionalMultiscaleTransform, MultiscaleFlow])](m, d)
    elif m.flip(0.3):
        model = _layer(m, d)
    elif m.context and m.flip(0.1):
        model = _guarded(m, d)
    else:
        model = flow_of_zuko(m, d)
    m.note(model)
    m.spread(model)
    model.to(dtype)
    model.train(m.flip(0.3))
    core = model.flow if isinstance(model, GuardedFlow) else model
    if m.wanted in GIVEN or (m.wanted is None and m.flip(0.1)):
        return _case_of_given(m, model, core, d, dtype)
    if isinstance(core, ConditionalMultiscaleTransform):
        return Case(model, partial(_sample_image, model), dtype=dtype, cuts=True)
    if isinstance(core, MultiscaleFlow):
        levels = core.transform.flow.levels
        shapes = [(CONTEXT, 4 >> n, 4 >> n) for n in range(1, levels + 1)]
        draw = partial(_sample_flow, model)
        return Case(model, draw, shapes, listed=True, dtype=dtype, cuts=True)
    contexts = [(CONTEXT,)] if m.context else []
    if isinstance(core, Lazy.Flow):
        return Case(model, partial(_sample_flow, model), contexts, dtype=dtype)
    return Case(model, partial(_sample_layer, model, d), contexts, dtype=dtype)


MAKERS: dict[Any, list[type]] = {
    zuko.distributions.NormalizingFlow: [Lazy.Flow],
    zuko.transforms.AutoregressiveTransform: [MaskedAutoregressiveTransform],
    GroupedAutoregressiveTransform: [RobustNSF],
    zuko.transforms.CouplingTransform: [GeneralCouplingTransform],
    MultiscaleTransform: [ConditionalMultiscaleTransform],
}


def _case_of_given(m: Maker, model: Any, core: Any, d: int, dtype: torch.dtype) -> Case:
    r"""What the model returns for one context."""
    context = torch.randn(CONTEXT).to(dtype) if m.context else None
    if isinstance(core, ConditionalMultiscaleTransform):
        context, d = None, 16
    if isinstance(core, MultiscaleFlow):
        size = core.transform.flow.levels
        context = [torch.randn(CONTEXT, 4 >> n, 4 >> n).to(dtype) for n in range(1, size + 1)]

    def make() -> Any:
        made = model(context)
        grouped = m.wanted is GroupedAutoregressiveTransform
        return made.transform.transforms[0] if grouped else made

    given = m.note(make())
    if isinstance(given, torch.distributions.Transform):
        # Made again, so that its networks are seen to overflow.
        return Case(given, lambda noise, _: make().inv(noise(ROWS, d)), dtype=dtype)

    def draw(noise: Any, _: Any) -> torch.Tensor:
        with noise.patched():
            return model(context).sample((ROWS,))

    return Case(given, draw, dtype=dtype)


def _sample_image(model: Any, noise: Any, context: Any) -> torch.Tensor:
    return model(None).inv(noise(ROWS, 16))


def _sample_flow(model: Any, noise: Any, context: Any) -> torch.Tensor:
    with noise.patched():
        return model(context).sample(() if context is not None else (ROWS,))


def _sample_layer(model: Any, d: int, noise: Any, context: Any) -> torch.Tensor:
    return model(context).inv(noise(ROWS, d))
