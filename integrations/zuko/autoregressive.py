r"""zuko's masked autoregressive transforms, in whose inverse each feature is worked out once."""

__all__ = ["GroupedAutoregressiveTransform", "grouped"]

from functools import partial
from typing import Any

import torch
import zuko
from torch import Tensor, nn
from zuko.flows import MaskedAutoregressiveTransform
from zuko.nn import MaskedLinear, MaskedMLP, Residual
from zuko.utils import broadcast, unpack

from flowguard.autoregression import (
    UnitsOnce,
    at_rest,
    depends,
    invert,
    narrowed,
    order_of,
    unhooked,
)
from flowguard.numerics import watchable
from flowguard.transforms import RobustSpline

T: Any = zuko.transforms
AutoregressiveTransform: Any = T.AutoregressiveTransform

#: Where torch keeps its activations, and those among them that mix features.
ACTIVATIONS = "torch.nn.modules.activation"
MIXING = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.GLU, nn.MultiheadAttention)


class GroupedAutoregressiveTransform(AutoregressiveTransform):
    r"""Creates the transform that zuko's masked layer makes of a context, in whose inverse each
    feature is worked out once.

    zuko's inverse works out all features in each of its passes, and with fully autoregressive
    layers all but one of them in vain. Here a pass works out those that are new. What comes out is
    the same up to rounding. Where the layer, its network or its last layer is of another class, or
    has hooks, it is zuko's inverse that runs.

    Arguments:
        layer: The layer.
        context: The context.

    Example:
        >>> from flowguard.integrations.zuko import RobustNSF
        >>> flow = RobustNSF(3, transforms=1)
        >>> f = flow().transform.transforms[0]
        >>> f
        GroupedAutoregressiveTransform()
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(f.inv(f(x)), x, atol=1e-4)
        True
    """

    def __init__(self, layer: Any, context: Tensor | None) -> None:
        super().__init__(partial(layer.meta, context), layer.passes)

    def _inverse(self, y: Tensor) -> Tensor:
        layer, (context,) = self.meta.func.__self__, self.meta.args
        features = y.shape[-1]
        groups = _groups(layer, features)
        if groups is None:
            return super()._inverse(y)
        once = _once(layer.hyper, groups, y, context)
        if once is not None:

            def solve_new(y: Tensor, phi: Tensor) -> Tensor:
                phi = phi.unflatten(-1, (-1, layer.total))
                return layer.univariate(*unpack(phi, layer.shapes)).inv(y)

            return once.inverse(y, context, solve_new)
        net, last = narrowed(layer.hyper, str(len(layer.hyper) - 1), features)

        def solve(x: Tensor, new: Tensor) -> tuple[Tensor, None]:
            if context is not None:
                x = torch.cat(broadcast(x, context, ignore=1), dim=-1)
            last.features = new
            phi = net(x).unflatten(-1, (-1, layer.total))
            return layer.univariate(*unpack(phi, layer.shapes)).inv(y[..., new]), None

        return invert(y, groups, solve)[0]


def grouped(transform: Any) -> Any:
    r"""Returns a transform in which zuko's masked autoregressive ones with robust splines are
    :class:`GroupedAutoregressiveTransform`.

    Arguments:
        transform: The transform that a layer made of a context, or one that is composed of such.
    """
    if type(transform) is T.ComposedTransform:
        return T.ComposedTransform(*map(grouped, transform.transforms))
    meta: Any = getattr(transform, "meta", None)
    if type(transform) is not T.AutoregressiveTransform or type(meta) is not partial:
        return transform
    layer: Any = getattr(meta.func, "__self__", None)
    if type(layer) is not MaskedAutoregressiveTransform or meta.keywords or len(meta.args) != 1:
        return transform
    if "meta" in vars(layer) or not _alike(layer.univariate) or layer.passes != transform.passes:
        return transform
    return GroupedAutoregressiveTransform(layer, *meta.args)


def _alike(univariate: Any) -> bool:
    r"""Whether what makes the maps makes that of a feature in the same way as that of any other."""
    while type(univariate) is partial and not univariate.args:
        # A tensor may hold a number for each feature, or want a gradient.
        if any(isinstance(value, Tensor) for value in univariate.keywords.values()):
            return False
        univariate = univariate.func
    return univariate is RobustSpline


def _groups(layer: Any, features: int) -> list[Tensor] | None:
    r"""The groups in which the features can be worked out; None if it is not known how."""
    net = layer.hyper
    if type(net) is not MaskedMLP or net.out_features != features * layer.total or len(net) < 2:
        return None
    last = net[-1]
    if type(last) is not MaskedLinear:
        return None
    if not (watchable() and unhooked(net, last) and at_rest(net)):
        return None
    eye = torch.eye(net.in_features, dtype=torch.bool, device=last.mask.device)
    reach = _reach(list(net)[:-1], eye)
    if reach is None:
        return None
    reach = depends([last.mask.unflatten(0, (features, -1)).any(1)], reach)
    return order_of(reach[:, :features], layer.passes)


def _once(net: Any, groups: list[Tensor], y: Tensor, context: Tensor | None) -> UnitsOnce | None:
    r"""The network in which each unit is worked out once; None where gradients are recorded, or
    where it is no plain chain of layers in the size and dtype of all that goes in."""
    layers, activations = list(net)[::2], list(net)[1::2]
    if not all(type(m) is MaskedLinear for m in layers) or len(layers) < 2:
        return None
    if any(type(m).__module__ != ACTIVATIONS or list(m.parameters()) for m in activations):
        return None
    given = [t for t in (y, context) if t is not None]
    if sum(t.shape[-1:].numel() for t in given) != net.in_features:
        return None  # the network says what is wrong
    tensors = [*given, *(p for m in layers for p in m.parameters())]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if len({t.dtype for t in tensors}) > 1 or torch.is_autocast_enabled(y.device.type):
        return None
    return UnitsOnce(layers, activations, groups) if unhooked(*net) else None


def _reach(layers: list[Any], reach: Tensor) -> Tensor | None:
    r"""On which inputs the outputs of layers depend; None if that is not known."""
    for m in layers:
        if type(m) is MaskedLinear:
            reach = depends([m.mask], reach)
        elif type(m) is Residual:
            inner = _reach(list(m), reach)
            if inner is None:
                return None
            reach = reach | inner
        elif type(m).__module__ != ACTIVATIONS or isinstance(m, MIXING):
            return None
    return reach
