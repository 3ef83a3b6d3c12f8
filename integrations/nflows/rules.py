r"""How nflows' layers are bounded, for :func:`flowguard.certify`, and sampled, for attacks.

nflows' transforms go from data to noise, so that sampling runs them in their inverse direction.
The rules hold for nflows and for its fork in glasflow alike, whose classes are others by the same
names: :func:`register` takes the name of the package.
"""

__all__ = ["flow_steps", "is_base", "register", "unknown_noise"]

import math
import sys
from collections.abc import Callable, Iterator
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
    Refused,
    Scale,
    Step,
    Unsqueeze,
    conditional,
    constant,
    envelope,
    rule,
    within,
)
from flowguard.bounds.attack import Sampler, Tensors, sampler

from . import rules_linear as linear
from .autoregressive import MaskedRobustSplineAutoregressiveTransform
from .base import MultiscaleNormal
from .coupling import RobustSplineCDF, RobustSplineCouplingTransform
from .host import CANDIDATES, HOST, part
from .image import ConditionalMultiscaleTransform, RobustFlowStep

Rule = Callable[[Any, bool], Iterator[Step]]

#: What counts as no bound, of an activation that is tried out.
FAR = 1e6


def flow_steps(flow: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of a flow.

    Arguments:
        flow: The flow.
        sampling: Whether it is run towards data.
    """
    if not sampling:
        yield Refused(reason="a flow is bounded in its sampling direction only")
        return
    parts = within("_transform", flow._transform)
    size = next((s.features for s in parts if s.features is not None), 1)
    yield _base(flow._distribution, size)
    yield from parts


def _base(base: Any, size: int) -> Step:
    name, kind = "_distribution", type(base).__name__
    if isinstance(base, MultiscaleNormal):
        return Noise(name=name, kind=kind, size=size)
    if is_base(base, "StandardNormal"):
        return Noise(name=name, kind=kind, size=size, event=base._shape.numel())
    if isinstance(base, Distribution):  # of torch, which knows no context
        return Noise(name=name, kind=kind, size=size, normal=False)
    reason = "flowguard does not know how far its noise may reach"
    if is_base(base, "ConditionalDiagonalNormal"):
        reason = "its mean and its scale depend on the context without bound"
    return Refused(name=name, kind=kind, reason=reason)


def is_base(base: Any, name: str) -> bool:
    r"""Whether a base is of a host's own class of this name, nothing derived from it.

    Arguments:
        base: The base.
        name: The name of a class of the hosts' ``distributions.normal``.
    """
    modules = (sys.modules.get(f"{host}.distributions.normal") for host in CANDIDATES)
    return any(type(base) is getattr(module, name, None) for module in modules)


def _composite(layer: Any, sampling: bool) -> Iterator[Step]:
    parts = list(layer._transforms.named_children())
    for name, child in reversed(parts) if sampling else parts:
        yield from within(f"_transforms.{name}", child, sampling)


def _inverted(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from within("_transform", layer._transform, not sampling)


def _multiscale(layer: Any, sampling: bool) -> Iterator[Step]:
    if not sampling:
        yield Refused(reason="a multiscale transform is bounded in its inverse direction only")
        return
    if layer._split_dim != 1:
        yield Refused(reason="it splits positions, and bounds follow channels: split_dim is not 1")
        return
    shapes = [tuple(map(int, shape)) for shape in layer._output_shapes]
    *rest, (name, last) = layer._transforms.named_children()
    yield Noise(name="latents", size=shapes[-1][0])
    yield from within(f"_transforms.{name}", last)
    inner = math.prod(shapes.pop())  # the elements that have come through
    for (name, child), shape in zip(reversed(rest), reversed(shapes), strict=True):
        joined, hidden = shape[0], inner // math.prod(shape[1:])
        yield Join(name=f"latents.{name}", joined=joined, mean_bound=0.0, scale_bound=0.0)
        # The latents come first, and then what has come through.
        order = torch.arange(hidden + joined).roll(joined)
        yield Permute(name=f"latents.{name}", order=order)
        yield from within(f"_transforms.{name}", child)
        inner += math.prod(shape)


def _spline(layer: Any, sampling: bool, name: str = "", mask: Tensor | None = None) -> Step:
    f = layer.map.transform(torch.zeros(1, 1, layer.map.parameters))
    kind = f"{type(layer).__name__}[{type(f).__name__}]"
    return conditional(envelope(f, sampling), name, kind, mask)


def _robust_coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    moved = torch.zeros(layer.features, dtype=torch.bool)
    moved[layer.transform_features.cpu()] = True
    yield _spline(layer, sampling, mask=moved)
    free = layer.unconditional_transform
    if free is not None:
        # What the two act on does not overlap, so that their order does not matter.
        yield _spline(free, sampling, "unconditional_transform", mask=~moved)


def _robust_autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    yield _spline(layer, sampling, mask=torch.ones(layer.features, dtype=torch.bool))


def _robust_cdf(layer: Any, sampling: bool) -> Iterator[Step]:
    yield _spline(layer, sampling)


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


def _refused(reason: str, gain: float | None = None) -> Rule:
    def refuse(layer: Any, sampling: bool) -> Iterator[Step]:
        yield Refused(reason=reason, gain=gain)

    return refuse


def _their_spline(layer: Any, sampling: bool) -> Iterator[Step]:
    if layer.tails is None:
        yield Refused(reason="values outside of its box make it raise InputOutsideDomain")
        return
    reason = (
        "it is bounded in exact arithmetic only: far contexts make it return NaN, or end in an"
        " AssertionError"
    )
    yield Refused(reason=reason, gain=1.0)


def _permutation(layer: Any, sampling: bool) -> Iterator[Step]:
    order = layer._permutation
    if layer._dim == 1:
        yield Permute(order=torch.argsort(order) if sampling else order)
    else:
        yield Flatten()  # of positions: what differed among them may be anywhere


def _actnorm(layer: Any, sampling: bool) -> Iterator[Step]:
    scale, shift = torch.exp(constant(layer.log_scale)), constant(layer.shift)
    if sampling:
        yield Scale(factor=1 / scale, offset=-shift / scale)
    else:
        yield Scale(factor=scale, offset=shift)


def _batchnorm(layer: Any, sampling: bool) -> Iterator[Step]:
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
    # Its constants may belong to features or to positions: the largest holds for all.
    scale, shift = constant(layer._scale), constant(layer._shift)
    gain, offset = scale.max().item(), shift.abs().max().item()
    if sampling:
        gain, offset = 1 / scale.min().item(), (shift.abs() / scale.min()).max().item()
    g = Envelope(gain=gain, offset=offset, depends="not at all", roundings=4)
    yield conditional(g)


def _leaky_relu(layer: Any, sampling: bool) -> Iterator[Step]:
    slope = 1 / layer.negative_slope if sampling else layer.negative_slope
    yield conditional(Envelope(gain=max(1.0, slope), offset=0.0, depends="not at all"))


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
    "CompositeTransform": _composite,
    "HouseholderSequence": linear.householder,
    "IdentityTransform": _nothing,
    "InverseTransform": _inverted,
    "LULinear": linear.lu,
    "LeakyReLU": _leaky_relu,
    "MaskedAffineAutoregressiveTransform": _affine_autoregressive,
    "MaskedPiecewiseCubicAutoregressiveTransform": _refused(CUBES),
    "MaskedPiecewiseLinearAutoregressiveTransform": _refused(CUBES),
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
    "PiecewiseRationalQuadraticCDF": _their_spline,
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
    if not (given or sized or is_base(base, "StandardNormal")):
        raise unknown_noise(base)
    with torch.no_grad():
        embedded = model._embedding_net(context)
    like = embedded if isinstance(embedded, Tensor) else embedded[0]

    def draw(z: Tensor, y: Tensors) -> Tensor:
        c = model._embedding_net(y)
        if given:
            mean, log_std = base._compute_params(c)
            z = mean + torch.exp(log_std) * z
        x: Tensor = model._transform.inverse(z, context=c)[0]
        return x

    shape = (base.latent_size(embedded),) if sized else base._shape
    return draw, like.new_zeros(like.shape[0], *shape)


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
    transforms = part("transforms", host)
    for name, function in TRANSFORMS.items():
        if hasattr(transforms, name):
            rule(getattr(transforms, name))(function)
    flow = part("flows.base", host).Flow
    rule(flow)(flow_steps)
    sampler.register(flow)(_sample)


rule(ConditionalMultiscaleTransform)(_multiscale)
rule(MaskedRobustSplineAutoregressiveTransform)(_robust_autoregressive)
rule(RobustFlowStep)(_composite)
rule(RobustSplineCDF)(_robust_cdf)
rule(RobustSplineCouplingTransform)(_robust_coupling)
for _host in {HOST, *(host for host in CANDIDATES if f"{host}.transforms" in sys.modules)}:
    register(_host)
