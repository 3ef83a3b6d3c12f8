r"""How nflows' layers are bounded, for :func:`flowguard.certify`, and sampled, for attacks.

nflows' transforms go from data to noise, so that sampling runs them in their inverse direction.
The rules hold for nflows and for its fork in glasflow alike, whose classes are others by the same
names: :func:`register` takes the name of the package.
"""

__all__ = ["flow_steps", "is_base", "register", "unknown_noise"]

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowguard.bounds import (
    Envelope,
    Flatten,
    Join,
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
    steps,
    within,
)
from flowguard.bounds.attack import Sampler, Tensors, sampler
from flowguard.bounds.rational import constant_spline, softmax_knots
from flowguard.bounds.torch_rules import permuted
from flowguard.image import Robust

from . import rules_linear as linear
from .autoregressive import MaskedRobustSplineAutoregressiveTransform
from .base import MultiscaleNormal
from .bases import BoundedDiagonalNormal, BoundedMADEMoG, bounded_base, farthest
from .coupling import RobustSplineCDF, RobustSplineCouplingTransform
from .host import CANDIDATES, HOST, part
from .image import ConditionalMultiscaleTransform, RobustFlowStep
from .spline import SplineHead

Rule = Callable[[Any, bool], Iterator[Step]]

#: What counts as no bound, of an activation that is tried out.
FAR = 1e6

PENDING = "its next batch initialises it: run one first, or switch to evaluation mode"


def flow_steps(flow: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of a flow.

    Arguments:
        flow: The flow.
        sampling: Whether it is run towards data.
    """
    if not sampling:
        yield Refused(reason="a flow is bounded in its sampling direction only")
        return
    parts = list(_inner("_transform", flow._transform))
    base = flow._distribution
    if isinstance(base, BoundedDiagonalNormal | BoundedMADEMoG):
        yield from bounded_base("_distribution", base)
    else:
        shape = getattr(base, "_shape", None) or (1,)
        size = next((s.features for s in parts if s.features is not None), shape[0])
        yield from _base(base, size)
    yield from parts


def _base(base: Any, size: int) -> Iterator[Step]:
    name, kind = "_distribution", type(base).__name__
    known = MultiscaleNormal if isinstance(base, MultiscaleNormal) else type(base)
    strange = departure(base, known) if isinstance(base, torch.nn.Module) else ""
    if strange:
        yield Refused(name=name, kind=kind, reason=strange)
    elif isinstance(base, MultiscaleNormal):
        yield Noise(name=name, kind=kind, size=size)
    elif is_base(base, "StandardNormal"):
        yield Noise(name=name, kind=kind, size=size, event=base._shape.numel())
    elif is_base(base, "DiagonalNormal"):
        yield Noise(name=name, kind=kind, size=size, event=base._shape.numel())
        mean, scale = constant(base.mean_).flatten(), constant(base.log_std_).exp().flatten()
        if len(mean) == size:
            yield Scale(name=name, kind=kind, factor=scale, offset=mean)
        else:
            g = Envelope(scale.max().item(), mean.abs().max().item(), roundings=6)
            yield Pointwise(name=name, kind=kind, envelope=g)
    elif isinstance(base, Distribution):  # of torch, which knows no context
        yield Noise(name=name, kind=kind, size=size, normal=False)
    else:
        reason = "flowguard does not know how far its noise may reach"
        if is_base(base, "ConditionalDiagonalNormal"):
            reason = "its mean and its scale depend on the context without bound"
        yield Refused(name=name, kind=kind, reason=reason)


def is_base(base: Any, name: str, module: str = "normal") -> bool:
    r"""Whether a base is of a host's own class of this name, nothing derived from it.

    Arguments:
        base: The base.
        name: The name of a class of the hosts' distributions.
        module: The module of that class.
    """
    modules = (sys.modules.get(f"{host}.distributions.{module}") for host in CANDIDATES)
    return any(type(base) is getattr(module, name, None) for module in modules)


def _inner(name: str, layer: Any, sampling: bool = True) -> Iterator[Step]:
    r"""The steps of a transform in a flow; layers of normflows run the other way."""
    if any(cls.__module__.partition(".")[0] == "normflows" for cls in type(layer).__mro__):
        reason = "it is a layer of normflows, whose inverse is the way to noise"
        yield Refused(name=name, kind=type(layer).__name__, reason=reason)
    else:
        yield from within(name, layer, sampling)


def _composite(layer: Any, sampling: bool) -> Iterator[Step]:
    # Not `named_children`, which leaves out what is there a second time.
    parts = list(enumerate(layer._transforms))
    for i, child in reversed(parts) if sampling else parts:
        yield from _inner(f"_transforms.{i}", child, sampling)


def _inverted(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from _inner("_transform", layer._transform, not sampling)


def _multiscale(layer: Any, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason="a multiscale transform is bounded in its inverse direction only")
        return
    if layer._split_dim != 1:
        yield Refused(reason="it splits positions, and bounds follow channels: split_dim is not 1")
        return
    shapes = [tuple(map(int, shape)) for shape in layer._output_shapes]
    *rest, (name, last) = enumerate(layer._transforms)
    yield Noise(name="latents", size=shapes[-1][0])
    yield from _level(f"_transforms.{name}", last)
    inner = math.prod(shapes.pop())  # the elements that have come through
    for (name, child), shape in zip(reversed(rest), reversed(shapes), strict=True):
        joined, hidden = shape[0], inner // math.prod(shape[1:])
        yield Join(name=f"latents.{name}", joined=joined, mean_bound=0.0, scale_bound=0.0)
        # The latents come first, and then what has come through.
        order = torch.arange(hidden + joined).roll(joined)
        yield Permute(name=f"latents.{name}", order=order)
        yield from _level(f"_transforms.{name}", child)
        inner += math.prod(shape)


def _level(name: str, transform: Any) -> list[Step]:
    parts = list(_inner(name, transform))
    if not any(isinstance(part, Noise) for part in parts):
        return parts
    # What is left of the latents there would count as all of them for the levels after it.
    kind = type(transform).__name__
    return [Refused(name=name, kind=kind, reason="a multiscale transform within another")]


def _spline(layer: Any, sampling: bool) -> Iterator[Step]:
    r"""The step of a layer or a head with a family of splines."""
    if type(layer.map) is not Robust:
        yield Refused(reason=f"flowguard knows no bound of {type(layer.map).__name__}")
        return
    f = layer.map.transform(torch.zeros(1, 1, layer.map.parameters))
    yield conditional(envelope(f, sampling), kind=f"{type(layer).__name__}[{type(f).__name__}]")


def _masked(found: list[Step], mask: Tensor, kind: str) -> Iterator[Step]:
    r"""The steps of a map, of these features."""
    for step in found:
        if isinstance(step, Pointwise):
            yield replace(step, mask=mask, kind=step.kind.replace("SplineHead", kind))
        elif isinstance(step, Refused):
            yield replace(step, kind=step.kind.replace("SplineHead", kind))
        else:
            reason = f"only a RobustSplineCDF may be its unconditional part; got {step.kind}"
            yield Refused(name=step.name, kind=step.kind, reason=reason)


def _robust_coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    moved = torch.zeros(layer.features, dtype=torch.bool)
    moved[layer.transform_features.cpu()] = True
    kind = type(layer).__name__
    yield from _masked(steps(layer.head, sampling), moved, kind)
    free = layer.unconditional_transform
    if free is not None:
        # What the two act on does not overlap, so that their order does not matter.
        yield from _masked(within("unconditional_transform", free, sampling), ~moved, kind)


def _robust_autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    everything = torch.ones(layer.features, dtype=torch.bool)
    yield from _masked(steps(layer.head, sampling), everything, type(layer).__name__)


def _affine(layer: Any, sampling: bool) -> Iterator[Step]:
    n = layer._transform_dim_multiplier() * layer.num_transform_features
    yield _free(
        layer, sampling, layer._coupling_transform_forward, (1, layer.num_transform_features), n
    )


def _affine_autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    n = layer._output_dim_multiplier() * layer.features
    yield _free(layer, sampling, layer._elementwise_forward, (1, layer.features), n)


def _free(layer: Any, sampling: bool, forward: Any, shape: tuple[int, int], n: int) -> Step:
    r"""An affine layer, which is not bounded: tries out how small and how large its scale is."""
    with torch.no_grad():
        x = torch.zeros(shape, dtype=torch.float64)
        scales = [
            (forward(x, torch.full((1, n), far, dtype=x.dtype))[1] / max(shape[1], 1)).exp().item()
            for far in (-1e30, 1e30)
        ]
    if min(scales) == max(scales):
        return Refused(gain=scales[0], reason="its shift is free")
    least, most = min(scales), max(scales)
    gain = 1 / least if sampling and least > 0 else math.inf if sampling else most
    how = f"fall to {least:.3g}" if sampling else f"grow to {most:.3g}"
    if gain > FAR:
        return Refused(reason="its shift is free, and so is its scale")
    return Refused(gain=gain, reason=f"its shift is free, and its scale may {how}")


def _cubes(layer: Any, sampling: bool) -> Iterator[Step]:
    yield Refused(reason=CUBES)


def _their_spline(layer: Any, sampling: bool) -> Iterator[Step]:
    if layer.tails is None:
        yield Refused(reason="values outside of its box make it raise InputOutsideDomain")
        return
    reason = (
        "it is bounded in exact arithmetic only: for far contexts its own leaves the box, or ends"
        " in infinity, NaN or an AssertionError"
    )
    yield Refused(reason=reason, gain=1.0)


def _their_constant_spline(layer: Any, sampling: bool) -> Iterator[Step]:
    if layer.tails != "linear":
        yield from _their_spline(layer, sampling)
        return
    bound, dtype = float(layer.tail_bound), layer.unnormalized_widths.dtype
    unit = torch.finfo(dtype).eps / 2
    yield conditional(constant_spline(*softmax_knots(layer), bound, unit, inverse=sampling))


def _permutation(layer: Any, sampling: bool) -> Iterator[Step]:
    step = permuted(layer._permutation, sampling)
    of_positions = layer._dim != 1 and isinstance(step, Permute)
    yield Flatten() if of_positions else step  # what differed among them may be anywhere


def _actnorm(layer: Any, sampling: bool) -> Iterator[Step]:
    if not sampling and layer.training and not bool(layer.initialized):
        yield Refused(reason=PENDING, depends="not at all")
        return
    scale, shift = torch.exp(constant(layer.log_scale)), constant(layer.shift)
    if sampling:
        yield Scale(factor=1 / scale, offset=-shift / scale)
    else:
        yield Scale(factor=scale, offset=shift)


def _batchnorm(layer: Any, sampling: bool) -> Iterator[Step]:
    if layer.training:
        reason = "in training mode it divides by the statistics of its batch"
        if sampling:
            reason = "in training mode it has no inverse: call eval() first"
        yield Refused(reason=reason, depends="not at all")
        return
    with torch.no_grad():
        weight, bias = constant(layer.weight), constant(layer.bias)
    mean, std = constant(layer.running_mean), (constant(layer.running_var) + layer.eps).sqrt()
    one = torch.ones_like(mean)
    if sampling:
        yield Scale(name="bias", factor=one, offset=-bias)
        yield Scale(name="weight", factor=std / weight, offset=mean)
    else:
        yield Scale(name="mean", factor=one, offset=-mean)
        yield Scale(name="weight", factor=weight / std, offset=bias)


def _squeeze(layer: Any, sampling: bool) -> Iterator[Step]:
    if sampling:
        yield Unsqueeze(factor=layer.factor)
    else:
        yield Refused(reason="a squeeze is bounded in its inverse direction only")


def _nothing(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from ()


def _pointwise(layer: Any, sampling: bool) -> Iterator[Step]:
    # Its constants may belong to features or to positions: the largest holds for all. A scale that
    # was loaded may be negative.
    scale, shift = constant(layer._scale).abs(), constant(layer._shift).abs()
    factor = 1 / scale if sampling else scale
    gain, offset = factor.max().item(), shift.max().item()
    g = Envelope(gain, gain * offset if sampling else offset, depends="not at all", roundings=4)
    yield conditional(g)


def _leaky_relu(layer: Any, sampling: bool) -> Iterator[Step]:
    slope = torch.tensor(float(layer.negative_slope), dtype=torch.float64).abs()
    gain = (1 / slope if sampling else slope).item()
    yield conditional(Envelope(gain=max(1.0, gain), offset=0.0, depends="not at all"))


def _squash(layer: Any, sampling: bool) -> Iterator[Step]:
    if sampling:
        yield Refused(
            reason="values outside of its range make its inverse raise InputOutsideDomain"
        )
    else:
        yield conditional(Envelope(0.0, 0.0, floor=1.0, depends="not at all", roundings=4))


CUBES = "it knows no tails: values outside of its box make it raise InputOutsideDomain"

#: The rules of the host's transforms, by the names of their classes.
TRANSFORMS: dict[str, Rule] = {
    "ActNorm": _actnorm,
    "AdditiveCouplingTransform": _affine,
    "AffineCouplingTransform": _affine,
    "AffineTransform": _pointwise,
    "BatchNorm": _batchnorm,
    "CauchyCDF": _squash,
    "CauchyCDFInverse": _inverted,
    "CompositeCDFTransform": _composite,
    "CompositeTransform": _composite,
    "HouseholderSequence": linear.householder,
    "IdentityTransform": _nothing,
    "InverseTransform": _inverted,
    "LULinear": linear.lu,
    "LeakyReLU": _leaky_relu,
    "Logit": _inverted,
    "MaskedAffineAutoregressiveTransform": _affine_autoregressive,
    "MaskedPiecewiseCubicAutoregressiveTransform": _cubes,
    "MaskedPiecewiseLinearAutoregressiveTransform": _cubes,
    "MaskedPiecewiseQuadraticAutoregressiveTransform": _their_spline,
    "MaskedPiecewiseRationalQuadraticAutoregressiveTransform": _their_spline,
    "MultiscaleCompositeTransform": _multiscale,
    "NaiveLinear": linear.naive,
    "OneByOneConvolution": linear.conv,
    "Permutation": _permutation,
    "PiecewiseCubicCDF": _their_spline,
    "PiecewiseCubicCouplingTransform": _their_spline,
    "PiecewiseLinearCDF": _their_spline,
    "PiecewiseLinearCouplingTransform": _their_spline,
    "PiecewiseQuadraticCDF": _their_spline,
    "PiecewiseQuadraticCouplingTransform": _their_spline,
    "PiecewiseRationalQuadraticCDF": _their_constant_spline,
    "PiecewiseRationalQuadraticCouplingTransform": _their_spline,
    "PointwiseAffineTransform": _pointwise,
    "QRLinear": linear.qr,
    "RandomPermutation": _permutation,
    "ReversePermutation": _permutation,
    "SVDLinear": linear.svd,
    "Sigmoid": _squash,
    "SqueezeTransform": _squeeze,
    "Tanh": _squash,
}


def _sample(model: Any, context: Tensors) -> tuple[Sampler, Tensors]:
    base = model._distribution
    given, sized = is_base(base, "ConditionalDiagonalNormal"), isinstance(base, MultiscaleNormal)
    given = given or type(base) is BoundedDiagonalNormal
    mixed = is_mixture(base)
    if not (given or sized or mixed or is_base(base, "StandardNormal")):
        raise unknown_noise(base)
    with torch.no_grad():
        embedded = model._embedding_net(context)
    like = embedded if isinstance(embedded, Tensor) else embedded[0]

    def draw(z: Tensor, y: Tensors) -> Tensor:
        c = model._embedding_net(y)
        if given:
            mean, log_std = base._compute_params(c)
            z = mean + torch.exp(log_std) * z
        elif mixed:
            z = farthest(base._made, z, c)
        x: Tensor = model._transform.inverse(z, context=c)[0]
        return x

    if mixed:
        shape = (base._made.features,)
    else:
        shape = (base.latent_size(embedded),) if sized else base._shape
    return draw, like.new_zeros(like.shape[0], *shape)


def is_mixture(base: Any) -> bool:
    r"""Whether a base is a host's mixture of normal distributions, bounded or not.

    Arguments:
        base: The base.
    """
    return type(base) is BoundedMADEMoG or is_base(base, "MADEMoG", "mixture")


def unknown_noise(base: Any) -> TypeError:
    r"""Returns the error that says what to do about a base that is not normal."""
    return TypeError(
        f"flowguard does not know how to attack the noise of a {type(base).__name__}; give a"
        " function (noise, context) -> samples, and latents, an example of its noise"
    )


def register(host: str) -> None:
    r"""Registers the rules of one of the hosts.

    Arguments:
        host: The name of its package.
    """
    homes = [part(name, host) for name in ("transforms", "transforms.nonlinearities")]
    for name, function in TRANSFORMS.items():
        for home in homes:
            if hasattr(home, name):
                rule(getattr(home, name))(function)
    flow = part("flows.base", host).Flow
    rule(flow)(flow_steps)
    sampler.register(flow)(_sample)


rule(ConditionalMultiscaleTransform)(_multiscale)
rule(MaskedRobustSplineAutoregressiveTransform)(_robust_autoregressive)
rule(RobustFlowStep)(_composite)
rule(RobustSplineCDF, SplineHead)(_spline)
rule(RobustSplineCouplingTransform)(_robust_coupling)
for _host in {HOST, *(host for host in CANDIDATES if f"{host}.transforms" in sys.modules)}:
    register(_host)
