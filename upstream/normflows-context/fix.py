r"""Every layer takes a context, for normflows 1.7.3.

    with applied():
        model = ConditionalNormalizingFlow(q0, [GlowBlock(3, 32), Squeeze()])
        log_q = model.log_prob(x, context)

Layers without a condition ignore it, as `Permute` and `LULinearPermute` do; those that are made
of others pass it on, and the couplings give it to networks that take one.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from inspect import Parameter, signature
from typing import Any
from unittest.mock import patch

from normflows import distributions, flows, transforms
from torch import Tensor, nn

Result = tuple[Any, Tensor]

#: What has no condition to read. The Monte Carlo layers are not among them: their target would
#: have to be that of the condition.
WITHOUT = (
    flows.AffineConstFlow,
    flows.ActNorm,
    flows.BatchNorm,
    flows.Invertible1x1Conv,
    flows.PeriodicShift,
    flows.PeriodicWrap,
    flows.Planar,
    flows.Radial,
    flows.Residual,
    flows.Split,
    flows.Merge,
    flows.Squeeze,
    transforms.Logit,
    transforms.Shift,
)
#: Bases with no condition, and `y` for classes, which is one of its own.
BASES = (
    distributions.GlowBase,
    distributions.AffineGaussian,
    distributions.ClassCondDiagGaussian,
    distributions.GaussianMixture,
    distributions.GaussianPCA,
)


def ignoring(method: Callable) -> Callable:
    r"""A method that takes a context and does what it did."""

    @wraps(method)
    def ours(self: Any, *args: Any, context: Any = None, **options: Any) -> Any:
        return method(self, *args, **options)

    return ours


def of_layer(method: Callable) -> Callable:
    r"""The same of a layer, which takes the context in second place, too."""

    @wraps(method)
    def ours(self: Any, z: Any, context: Any = None) -> Any:
        return method(self, z)

    return ours


# Layers of layers.


def reverse_forward(self: flows.Reverse, z: Any, context: Any = None) -> Result:
    return self.flow.inverse(z, context=context)


def reverse_inverse(self: flows.Reverse, z: Any, context: Any = None) -> Result:
    return self.flow.forward(z, context=context)


def chain(layers: Iterable[Callable], z: Tensor, context: Any) -> Result:
    log_det = z.new_zeros(len(z))
    for layer in layers:
        z, by = layer(z, context=context)
        log_det = log_det + by
    return z, log_det


def composite_forward(self: flows.Composite, inputs: Tensor, context: Any = None) -> Result:
    return chain(self._flows, inputs, context)


def composite_inverse(self: flows.Composite, inputs: Tensor, context: Any = None) -> Result:
    return chain((flow.inverse for flow in reversed(self._flows)), inputs, context)


def block_forward(self: Any, z: Tensor, context: Any = None) -> Result:
    return chain(self.flows, z, context)


def block_inverse(self: Any, z: Tensor, context: Any = None) -> Result:
    return chain((flow.inverse for flow in reversed(self.flows)), z, context)


# Couplings.


def given(net: Callable, context: Any) -> Callable:
    r"""A network, with the context if it takes one; `zeros_like`, where there is none, as it is."""
    if context is None or not isinstance(net, nn.Module):
        return net
    return partial(net, context=context) if reads_context(net) else net


def reads_context(net: nn.Module) -> bool:
    r"""Whether `forward` has an argument `context`, or that of the network which is wrapped."""
    parameters = signature(net.forward).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        # As `torch.compile` and `DataParallel` leave it, which hand all on.
        inner = getattr(net, "_orig_mod", None) or getattr(net, "module", None)
        if isinstance(inner, nn.Module):
            return reads_context(inner)
    return "context" in parameters


def with_networks(method: Callable, *names: str) -> Callable:
    r"""A method of a coupling, whose networks are given the context while it runs."""

    @wraps(method)
    def ours(self: Any, z: Any, context: Any = None) -> Result:
        return method(
            _Seen(self, {name: given(getattr(self, name), context) for name in names}), z
        )

    return ours


class _Seen:
    r"""A layer as it is, but for some of its attributes."""

    def __init__(self, layer: nn.Module, instead: dict[str, Any]) -> None:
        self.__dict__.update(instead, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def by_class(method: Callable) -> Callable:
    r"""A method of `CCAffineConst`: its class is its condition."""

    @wraps(method)
    def ours(self: Any, z: Tensor, y: Any = None, context: Any = None) -> Result:
        return method(self, z, context if y is None else y)

    return ours


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into normflows, and takes them out again."""
    with ExitStack() as stack:

        def put(made: type, **methods: Callable) -> None:
            for name, method in methods.items():
                if name in vars(made):  # the others are inherited, and so is their change
                    stack.enter_context(patch.object(made, name, method))

        for made in WITHOUT:
            put(made, **{n: of_layer(getattr(made, n)) for n in ("forward", "inverse")})
        for made in BASES:
            put(made, **{n: ignoring(getattr(made, n)) for n in ("forward", "log_prob")})
        put(flows.Reverse, forward=reverse_forward, inverse=reverse_inverse)
        put(flows.Composite, forward=composite_forward, inverse=composite_inverse)
        for made in (flows.AffineCouplingBlock, flows.GlowBlock):
            put(made, forward=block_forward, inverse=block_inverse)
        networks = {flows.AffineCoupling: ("param_map",), flows.MaskedAffineFlow: ("s", "t")}
        for made, names in networks.items():
            methods = {n: with_networks(getattr(made, n), *names) for n in ("forward", "inverse")}
            put(made, **methods)
        cc = flows.CCAffineConst
        put(cc, forward=by_class(cc.forward), inverse=by_class(cc.inverse))
        yield
