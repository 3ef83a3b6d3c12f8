r"""How normflows' layers are bounded, for :func:`flowguard.certify`, and sampled, for attacks.

Sampling runs the `forward` direction of normflows' layers: `sampling` is :py:`True` where `forward`
of a layer runs, and :py:`False` where its `inverse` does, within :class:`normflows.flows.Reverse`.
So the certificate of a layer alone is that of its `forward`.
"""

__all__: list[str] = []

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from itertools import chain
from typing import Any

import torch
from normflows import (
    ClassCondFlow,
    ConditionalNormalizingFlow,
    MultiscaleFlow,
    NormalizingFlow,
    distributions,
    flows,
    transforms,
)
from normflows.flows.mixing import _LULinear, _RandomPermutation
from torch import Tensor

from flowguard.bounds import (
    Envelope,
    Join,
    Linear,
    Noise,
    Permute,
    Pointwise,
    Refused,
    Scale,
    Step,
    Unsqueeze,
    conditional,
    constant,
    departure,
    envelope,
    rule,
    within,
)
from flowguard.bounds.attack import Sampler, Tensors, sampler
from flowguard.bounds.solution import FINE, solution
from flowguard.bounds.torch_rules import NO_PERMUTATION, affine, permuted
from flowguard.bounds.univariate import undetermined

from .adapter import ContextAdapter
from .bases import BoundedDiagGaussian, GaussianPrior, from_noise
from .glow import LUConv1x1, RobustCouplingBlock, RobustGlowBlock
from .guard import GuardedConditionalFlow
from .layers import RobustSplineAutoregressive, RobustSplineCoupling
from .migrated import CarriedCoupling, CarriedMaskedSpline, MigratedCoupling, block_steps
from .multiscale import ConditionalMultiscaleFlow

SAMPLING_ONLY = "a flow is bounded in its sampling direction only"
FREE_SHIFT = "its shift is free"
POLES = "its inverse has poles"
CONSTANT = "not at all"
CLASS = "on its class"
PENDING = "its next batch initialises it: run one first, or switch to evaluation mode"


# Flows


@rule(NormalizingFlow, ConditionalNormalizingFlow, ClassCondFlow)
def _flow(flow: Any, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason=SAMPLING_ONLY)
        return
    yield from _base("q0", flow.q0, told=not isinstance(flow, NormalizingFlow))
    # Not `named_children`, which leaves out what is there a second time.
    for i, layer in enumerate(flow.flows):
        yield from _inner(f"flows.{i}", layer)


@rule(MultiscaleFlow, ConditionalMultiscaleFlow)
def _multiscale(flow: Any, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason=SAMPLING_ONLY)
        return
    channels: int | None = None
    told = flow.class_cond or isinstance(flow, ConditionalMultiscaleFlow)
    for i, base in enumerate(flow.q0):
        if channels is None:
            for step in _base(f"q0.{i}", base, told):
                # Images of any size have noise of any size, and so have several levels.
                yield replace(step, event=None) if isinstance(step, Noise) else step
            channels = _channels(base)
        else:
            yield from _join(i, base, flow.merges[i - 1], channels, told)
            channels = channels + _channels(base)
        for j, layer in enumerate(flow.flows[i]):
            yield from _inner(f"flows.{i}.{j}", layer)
            for part in layer.modules():
                channels = channels // 4 if isinstance(part, flows.Squeeze) else channels
    if flow.transform is not None:
        yield from _inner("transform", flow.transform)


def _inner(name: str, layer: Any, sampling: bool = True) -> Iterator[Step]:
    r"""The steps of a layer in a flow; what is no layer of normflows may run the other way."""
    if isinstance(layer, flows.Flow):
        yield from within(name, layer, sampling)
    else:
        reason = "it is no normflows.flows.Flow, and its forward may be the way to noise"
        yield Refused(name=name, kind=type(layer).__name__, reason=reason)


@rule(GuardedConditionalFlow)
def _guarded(flow: Any, sampling: bool) -> Iterator[Step]:
    yield from within("flow", flow.flow, sampling)


# Bases

#: Bases that depend on nothing, and whose samples are taken as the noise.
PLAIN = (
    distributions.GaussianMixture,
    distributions.GaussianPCA,
    distributions.UniformGaussian,
    distributions.base.Uniform,
)


def _channels(base: Any) -> int:
    return base.num_channels if isinstance(base, GaussianPrior) else base.shape[0]


def _reach(base: Any, told: bool) -> tuple[Tensor, Tensor, str] | str:
    r"""Mean and log-scale of a Gaussian base, or their largest absolute values and largest values
    if they depend on anything; in words why there is no bound.

    Arguments:
        base: The base.
        told: Whether the flow hands it classes, which may be any vectors then.
    """
    found = _moments(base)
    if found is not None and (strange := departure(base, type(base))):
        return strange
    if found is None:
        if type(base) is distributions.base.ConditionalDiagGaussian:
            return "its mean and its scale depend on the context without bound"
        return f"flowguard does not know how far the noise of {type(base).__name__} may reach"
    mean, logs, depends = found
    if depends == CLASS and told:
        return "its mean and its scale depend on the class, which may be any vector"
    if getattr(base, "temperature", None) is not None:
        colder = torch.as_tensor(base.temperature, dtype=torch.float64).abs().log()
        off = torch.nan_to_num(colder.abs(), posinf=0.0)  # at zero nothing is rounded
        logs = logs + colder + 2 * _eps(base) * (logs.abs() + off)
    return mean, logs, depends


def _eps(base: Any) -> float:
    return torch.finfo(next(chain(base.parameters(), base.buffers())).dtype).eps


def _moments(base: Any) -> tuple[Tensor, Tensor, str] | None:
    r"""The same at a temperature of one; :py:`None` for a base that is no Gaussian with a bound."""
    if type(base) is distributions.DiagGaussian:
        return constant(base.loc), constant(base.log_scale), CONSTANT
    if type(base) is distributions.ClassCondDiagGaussian:
        return constant(base.loc).abs().amax(-1), constant(base.log_scale).amax(-1), CLASS
    if type(base) is distributions.GlowBase:
        factor = base.logscale_factor
        grown = [factor * constant(t) for t in (base.loc_logs, base.log_scale_logs)]
        loc, logs = (
            constant(t) * torch.exp(g)
            for t, g in zip((base.loc, base.log_scale), grown, strict=True)
        )
        # So far off may they be as computed, and the exponential grows what the logarithm is off.
        off = [_eps(base) * (g.abs() + 4) for g in grown]
        loc, logs = loc + loc * off[0], logs + logs.abs() * off[1]
        if not base.class_cond:
            return loc, logs, CONSTANT
        to_loc, to_logs = constant(base.loc_cc), constant(base.log_scale_cc)
        loc = loc.abs().amax() + to_loc.abs().amax()
        most = logs.abs().amax() + to_logs.abs().amax()
        return loc, logs.amax() + to_logs.amax() + 2 * _eps(base) * most, CLASS
    if type(base) is GaussianPrior:
        if base.net is None:
            like: Tensor = base.constant[:, : base.num_channels]  # type: ignore[index]
            mean, logs = base.moments(like, None, None)
            return constant(mean), constant(logs), CONSTANT
        mean, logs = torch.tensor([base.mean_bound, base.scale_bound], dtype=torch.float64)
        depends = f"within a mean of {mean:g} and a scale of exp({logs:g})"
        return mean, logs, depends
    return None


def _bounded_base(name: str, base: BoundedDiagGaussian) -> Iterator[Step]:
    kind, size = type(base).__name__, int(math.prod(base.shape))
    if why := departure(base, BoundedDiagGaussian):
        yield Refused(name=name, kind=kind, reason=why)
        return
    yield Noise(name=name, kind=kind, size=size, event=size)
    yield from base.moments.steps(name, kind)


def _base(name: str, base: Any, told: bool) -> Iterator[Step]:
    if isinstance(base, BoundedDiagGaussian):
        yield from _bounded_base(name, base)
        return
    kind = type(base).__name__
    if type(base) in PLAIN and not departure(base, type(base)):
        size = getattr(base, "d", None) or getattr(base, "dim", None) or base.ndim
        yield Noise(name=name, kind=kind, size=int(size), normal=False)
        return
    found = _reach(base, told)
    if isinstance(found, str):
        yield Refused(name=name, kind=kind, reason=found)
        return
    mean, logs, depends = found
    event = None if isinstance(base, GaussianPrior) else int(math.prod(base.shape))
    yield Noise(name=name, kind=kind, size=_channels(base), event=event)
    if depends == CONSTANT and mean.numel() == logs.numel() == _channels(base):
        yield Scale(name=name, kind=kind, factor=logs.exp().flatten(), offset=mean.flatten())
    else:
        gain, offset = logs.amax().exp().item(), mean.abs().amax().item()
        g = Envelope(gain, offset, depends=depends, roundings=8)
        yield Pointwise(name=name, kind=kind, depends=depends, envelope=g)


def _join(i: int, base: Any, merge: Any, channels: int, told: bool) -> Iterator[Step]:
    r"""The steps of a merge: the channels of a further latent come in."""
    name, kind, found = f"merges.{i - 1}", type(merge).__name__, _reach(base, told)
    strange = departure(merge, flows.Merge)
    if isinstance(found, str):
        yield Refused(name=f"q0.{i}", kind=type(base).__name__, reason=found)
        return
    if strange or not merge.mode.startswith("channel"):
        reason = strange or "only merges of channels are bounded"
        yield Refused(name=name, kind=kind, reason=reason)
        return
    mean, logs, depends = found
    joined = _channels(base)
    yield Join(
        name=name,
        kind=kind,
        depends=depends,
        joined=joined,
        mean_bound=mean.abs().amax().item(),
        scale_bound=max(logs.amax().item(), 0.0),
    )
    if merge.mode == "channel_inv":
        order = torch.arange(channels + joined).roll(joined)
        yield Permute(name=name, kind=kind, order=order)


# Robust layers


def _map(layer: Any, sampling: bool) -> tuple[Envelope, str]:
    # What the parameters are does not matter to an envelope: zeros will do.
    f = layer.univariate(*(torch.zeros(shape) for shape in layer.shapes))
    g = envelope(f, sampling)
    if not g.reason:
        reason = undetermined(layer.univariate)
        g = Envelope(reason=reason) if reason else g
    return g, f"{type(layer).__name__}[{type(f).__name__}]"


@rule(RobustSplineCoupling)
def _coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    g, kind = _map(layer, sampling)
    parts = [conditional(g, kind=kind, mask=layer.mask)]
    if layer.unconditional is not None:
        parts.insert(0, conditional(g, "unconditional", kind, mask=~layer.mask))
    yield from parts if sampling else reversed(parts)


@rule(RobustSplineAutoregressive)
def _autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    g, kind = _map(layer, sampling)
    yield conditional(g, kind=kind, mask=torch.ones(layer.features, dtype=torch.bool))


@rule(RobustCouplingBlock)
def _coupling_block(layer: Any, sampling: bool) -> Iterator[Step]:
    # Which features are changed is not known, or changes from one position to the next.
    g, kind = _map(layer, sampling)
    yield conditional(g.or_identity(), kind=kind)


@rule(RobustGlowBlock)
def _glow_block(layer: Any, sampling: bool) -> Iterator[Step]:
    names = [n for n in ("coupling", "mix", "actnorm") if getattr(layer, n) is not None]
    for name in names if sampling else reversed(names):
        part = getattr(layer, name)
        if name == "actnorm" and part.pending:
            yield Refused(name=name, kind=type(part).__name__, reason=PENDING, depends=CONSTANT)
            continue
        if name != "coupling" or not part.split_mode.startswith("channel"):
            yield from within(name, part, sampling)
            continue
        strange = departure(part, RobustCouplingBlock)
        if strange:
            yield Refused(name=name, kind=type(part).__name__, reason=strange)
            continue
        g, kind = _map(part, sampling)
        first = torch.arange(layer.channels) < (layer.channels + 1) // 2
        changed = ~first if part.split_mode == "channel" else first
        yield conditional(g, name, kind, mask=changed)


@rule(LUConv1x1)
def _lu_conv(layer: Any, sampling: bool) -> Iterator[Step]:
    with torch.no_grad():
        p, lower, upper = map(constant, layer.factors())
    yield from _factored(p, [lower, upper], sampling)


def _factored(p: Tensor, factors: list[Tensor], sampling: bool) -> Iterator[Step]:
    r"""The steps of x -> P A_1 ... A_n x, or of its inverse where it is sampled."""
    if not _is_permutation(p):
        yield Refused(reason=NO_PERMUTATION, depends=CONSTANT)
    elif sampling:
        yield Permute(order=p.argmax(0))
        yield solution(*factors, work=FINE, convolution=True)
    else:
        yield _product(factors, convolution=True)
        yield Permute(order=p.argmax(1))


def _product(factors: list[Tensor], convolution: bool = False) -> Step:
    # They are multiplied in the dtype of the layer.
    error = (len(factors) + 1) * reduce(torch.matmul, [t.abs() for t in factors])
    matrix = reduce(torch.matmul, factors)
    return Linear(matrix=matrix, error=error, convolution=convolution)


def _is_permutation(p: Tensor) -> bool:
    return bool(((p == 0) | (p == 1)).all() & (p.sum(0) == 1).all() & (p.sum(1) == 1).all())


@rule(ContextAdapter)
def _adapter(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from _inner("flow", layer.flow, sampling)


# Layers of normflows that the context does not reach


@rule(flows.Reverse)
def _reverse(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from _inner("flow", layer.flow, not sampling)


@rule(flows.Composite)
def _composite(layer: Any, sampling: bool) -> Iterator[Step]:
    parts = list(enumerate(layer._flows))
    for i, part in parts if sampling else reversed(parts):
        yield from _inner(f"_flows.{i}", part, sampling)


@rule(flows.Squeeze)
def _squeeze(layer: Any, sampling: bool) -> Iterator[Step]:
    if sampling:
        yield Unsqueeze(factor=2)
    else:
        yield Refused(reason="a squeeze is bounded in its forward direction only")


@rule(flows.ActNorm, flows.AffineConstFlow)
def _affine_constant(layer: Any, sampling: bool) -> Iterator[Step]:
    if isinstance(layer, flows.ActNorm) and not bool(layer.data_dep_init_done > 0):
        yield Refused(reason=PENDING, depends=CONSTANT)
        return
    factor, shift = constant(layer.s).exp(), constant(layer.t)
    channels = factor.shape[1] if factor.dim() > 1 else 1
    if factor.numel() == channels:
        yield affine(factor.flatten(), shift.flatten(), not sampling)
        return
    # The constants differ from one position to the next.
    if not sampling:
        factor, shift = 1 / factor, -shift / factor
    g = Envelope(factor.amax().item(), shift.abs().amax().item(), depends=CONSTANT, roundings=6)
    yield Pointwise(depends=CONSTANT, envelope=g)


@rule(flows.Permute)
def _permute(layer: Any, sampling: bool) -> Iterator[Step]:
    if layer.mode == "shuffle":
        yield permuted(layer.perm if sampling else layer.inv_perm)
    else:
        n = layer.num_channels
        yield Permute(order=torch.arange(n).roll(-(n // 2 if sampling else (n + 1) // 2)))


@rule(flows.Invertible1x1Conv, flows.InvertibleAffine)
def _mixing(layer: Any, sampling: bool) -> Iterator[Step]:
    right = isinstance(layer, flows.InvertibleAffine)  # which multiplies from the right
    if not layer.use_lu:
        matrix = constant(layer.W).T if right else constant(layer.W)
        if sampling:
            yield solution(matrix, work=FINE, convolution=not right)
        else:
            yield Linear(matrix=matrix, convolution=not right)
        return
    with torch.no_grad():  # in the dtype of the layer, as it computes them
        diagonal = layer.sign_S * torch.exp(layer.log_S)
        lower = constant(torch.tril(layer.L, diagonal=-1) + layer.eye)
        upper = constant(torch.triu(layer.U, diagonal=1) + torch.diag(diagonal))
    p = constant(layer.P)
    if not right:
        yield from _factored(p, [lower, upper], sampling)
    elif not _is_permutation(p):
        yield Refused(reason=NO_PERMUTATION, depends=CONSTANT)
    elif sampling:
        yield solution(upper.T, lower.T, work=FINE)
        yield Permute(order=p.argmax(1))
    else:
        yield Permute(order=p.argmax(0))
        yield _product([upper.T, lower.T])


@rule(flows.LULinearPermute)
def _lu_permute(layer: Any, sampling: bool) -> Iterator[Step]:
    for name, cls in (("linear", _LULinear), ("permutation", _RandomPermutation)):
        strange = departure(getattr(layer, name), cls)
        if strange:
            yield Refused(name=name, reason=strange, depends=CONSTANT)
            return
    linear, order = layer.linear, layer.permutation._permutation
    if sampling:
        yield from _lu_linear(linear, sampling)
        yield permuted(torch.argsort(order), name="permutation")
    else:
        yield permuted(order, name="permutation")
        yield from _lu_linear(linear, sampling)


def _lu_linear(linear: Any, sampling: bool) -> Iterator[Step]:
    name = "linear"
    if linear.using_cache and not linear.training:
        # What was stored once is used until the next training, whatever the weights are by now.
        yield Refused(name=name, reason="it uses a cache: switch it off", depends=CONSTANT)
        return
    with torch.no_grad():
        lower, upper = (constant(t) for t in linear._create_lower_upper())
    bias = constant(linear.bias)
    one = torch.ones_like(bias)
    if sampling:
        yield Scale(name=name, factor=one, offset=-bias)
        yield solution(lower, upper, name=name)
    else:
        yield replace(_product([lower, upper]), name=name)
        yield Scale(name=name, factor=one, offset=bias)


@rule(transforms.Logit)
def _logit(layer: Any, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason=POLES)
        return
    width = abs(1 - 2 * layer.alpha)
    reach = max(abs(layer.alpha), abs(1 - layer.alpha)) / width if width else math.inf
    g = Envelope(0.0, 0.0, floor=reach, depends=CONSTANT, roundings=8)
    yield Pointwise(depends=CONSTANT, envelope=g)


@rule(transforms.Shift)
def _shift(layer: Any, sampling: bool) -> Iterator[Step]:
    # Where it is a tensor, it may differ from one position to another.
    shift = constant(torch.as_tensor(layer.shift, dtype=torch.float64))
    if shift.numel() > 1:
        g = Envelope(1.0, shift.abs().max().item(), depends=CONSTANT)
        yield Pointwise(depends=CONSTANT, envelope=g)
        return
    shift = shift.reshape(1)
    yield affine(torch.ones_like(shift), -shift, not sampling)


# Layers that no bound is known for, with what is known of their gain


def _free(scale: str | None, sampling: bool) -> Refused:
    r"""An affine coupling with this map from the network to the scale, :py:`None` without scale."""
    if scale is None:
        return Refused(reason=FREE_SHIFT, gain=1.0)
    if scale == "exp":
        return Refused(reason=f"{FREE_SHIFT}, and so is its scale exp(s)")
    # "sigmoid" divides by the sigmoid on the way to the data, "sigmoid_inv" multiplies with it.
    if (scale == "sigmoid") == sampling:
        return Refused(reason=f"{FREE_SHIFT}, and it divides by a sigmoid, which may fall to zero")
    return Refused(reason=FREE_SHIFT, gain=1.0)


@rule(flows.AffineCoupling)
def _affine_coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    yield _free(layer.scale_map if layer.scale else None, sampling)


@rule(flows.AffineCouplingBlock)
def _affine_block(layer: Any, sampling: bool) -> Iterator[Step]:
    split, coupling, merge = layer.flows
    if type(coupling) is not MigratedCoupling:
        yield from within("flows.1", coupling, sampling)
        return
    kinds = (flows.Split, MigratedCoupling, flows.Merge)
    reasons = [departure(part, cls) for part, cls in zip(layer.flows, kinds, strict=True)]
    if split.mode != merge.mode:
        reasons.append(f"it is split by {split.mode}, and merged by {merge.mode}")
    reason = next(filter(None, reasons), None)
    if reason is None:
        yield from block_steps(layer, sampling)
    else:
        yield Refused(reason=reason)


@rule(flows.MaskedAffineFlow)
def _masked_affine(layer: Any, sampling: bool) -> Iterator[Step]:
    yield _free("exp" if isinstance(layer.s, torch.nn.Module) else None, sampling)


@rule(flows.GlowBlock)
def _stock_glow(layer: Any, sampling: bool) -> Iterator[Step]:
    parts = list(enumerate(layer.flows))
    for i, part in parts if sampling else reversed(parts):
        yield from within(f"flows.{i}", part, sampling)


@rule(flows.MaskedAffineAutoregressive)
def _masked_autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    gain = 1 + 1e-3 if sampling else 1e3  # its scale is a sigmoid, raised by a thousandth
    yield Refused(reason=f"{FREE_SHIFT}, and its scale may fall to 0.001", gain=gain)


@rule(
    flows.AutoregressiveRationalQuadraticSpline,
    flows.CircularAutoregressiveRationalQuadraticSpline,
    flows.CircularCoupledRationalQuadraticSpline,
    flows.CoupledRationalQuadraticSpline,
)
def _stock_spline(layer: Any, sampling: bool) -> Iterator[Step]:
    for name, kind in (("prqct", CarriedCoupling), ("mprqat", CarriedMaskedSpline)):
        if type(getattr(layer, name, None)) is kind:
            yield from within(name, getattr(layer, name), sampling)
            return
    reason = (
        "it is bounded in exact arithmetic only: for far contexts its own leaves the box, or ends"
        " in infinity, NaN or an AssertionError"
    )
    yield Refused(reason=reason, gain=1.0)


# Attacks


@sampler.register
def _sample_flow(model: ConditionalNormalizingFlow, context: Tensors) -> tuple[Sampler, Tensors]:
    base = model.q0
    shape = getattr(base, "shape", None)
    if shape is None:
        raise TypeError(
            f"flowguard does not know the noise of {type(base).__name__}: give a function"
            " (noise, context) -> samples, and latents, an example of its noise"
        )

    def draw(noise: Tensor, y: Tensor) -> Tensor:
        return model.forward(from_noise(base, noise, {"context": y}), context=y)

    return draw, context.new_zeros(len(context), *shape)


@sampler.register
def _sample_multiscale(
    model: ConditionalMultiscaleFlow, context: Tensors
) -> tuple[Sampler, Tensors]:
    like = context if isinstance(context, Tensor) else context[0]
    shapes = model.noise_shapes(context)
    return model.decode, [like.new_zeros(len(like), *shape) for shape in shapes]


@sampler.register
def _sample_guarded(model: GuardedConditionalFlow, context: Tensors) -> tuple[Sampler, Tensors]:
    draw, latents = sampler(model.flow, model.conditioner(context))
    return lambda z, y: draw(z, model.conditioner(y)), latents
