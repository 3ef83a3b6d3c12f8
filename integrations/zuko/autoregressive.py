r"""zuko's masked autoregressive transforms, in whose inverse each feature is worked out once."""

__all__ = [
    "GroupedAutoregressive",
    "GroupedAutoregressiveTransform",
    "OfFeatures",
    "grouped",
]

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import zuko
from torch import Tensor, nn
from zuko.flows import MaskedAutoregressiveTransform
from zuko.nn import MaskedLinear, MaskedMLP, Residual
from zuko.utils import broadcast

from flowguard.autoregression import (
    ACTIVATIONS,
    MIXING,
    LayerInPasses,
    RowsOfFeatures,
    Schedule,
    SolveOf,
    at_rest,
    inverse_in_passes,
    invert,
    is_elementwise,
    replaced,
    schedule,
)
from flowguard.functional import shifted_spline
from flowguard.numerics import unhooked, watchable
from flowguard.transforms import RobustSpline, Univariate

T: Any = zuko.transforms
AutoregressiveTransform: Any = T.AutoregressiveTransform


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
        order = _schedule(layer, features)
        if order is None:
            return super()._inverse(y)
        if context is not None:
            y, context = broadcast(y, context, ignore=1)

        solve = _solver(layer, y)
        shape, rows = y.shape, y.reshape(-1, features)
        known = None if context is None else context.reshape(-1, context.shape[-1])
        twin = _in_passes(layer.hyper, order, rows, known)
        if twin is not None:
            return inverse_in_passes(twin, rows, order.groups, solve)[0].view(shape)
        last = RowsOfFeatures(layer.hyper[-1], features)
        net = replaced(layer.hyper, {layer.hyper[-1]: last})

        def step(x: Tensor, new: Tensor) -> tuple[Tensor, Tensor | None]:
            last.features = new
            phi = net(x if context is None else torch.cat((x, context), dim=-1))
            return solve(y[..., new], phi, new)

        return invert(y, order.groups, step)[0]


class OfFeatures(nn.Module):
    r"""The constructor of maps that can be asked for those of some features alone."""

    def of(self, features: Tensor) -> Callable[..., Univariate]:
        r"""Returns the constructor of the maps of some features.

        Arguments:
            features: Their indices, with shape :math:`(n)`.

        Raises:
            NotImplementedError: If a subclass does not define it.
        """
        raise NotImplementedError


class GroupedAutoregressive(MaskedAutoregressiveTransform):
    r"""zuko's masked layer with maps of :class:`OfFeatures`, which makes
    :class:`GroupedAutoregressiveTransform`."""

    def forward(self, c: Tensor | None = None) -> Any:
        r"""Returns the transform given a context.

        Arguments:
            c: The context, with shape :math:`(*, C)`.
        """
        return grouped(super().forward(c))


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
    if type(layer) not in LAYERS or meta.keywords or len(meta.args) != 1:
        return transform
    if "meta" in vars(layer) or not _alike(layer.univariate) or layer.passes != transform.passes:
        return transform
    if any(len(shape) > 1 for shape in layer.shapes):
        return transform
    return GroupedAutoregressiveTransform(layer, *meta.args)


LAYERS = MaskedAutoregressiveTransform, GroupedAutoregressive


def _alike(univariate: Any) -> bool:
    r"""Whether what makes the maps can be asked for those of some features alone."""
    if isinstance(univariate, OfFeatures):
        return unhooked(*univariate.modules())
    while type(univariate) is partial and not univariate.args:
        # A tensor may hold a number for each feature, or want a gradient.
        if any(isinstance(value, Tensor) for value in univariate.keywords.values()):
            return False
        univariate = univariate.func
    return univariate is RobustSpline


def _solver(layer: Any, like: Tensor) -> SolveOf:
    r"""What inverts the maps of some features."""
    sizes = [math.prod(shape) for shape in layer.shapes]

    def parts(phi: Tensor) -> list[Tensor]:
        split = zip(phi.split(sizes, -1), layer.shapes, strict=True)
        return [part if shape else part.squeeze(-1) for part, shape in split]

    def of_some(y: Tensor, phi: Tensor, new: Tensor) -> tuple[Tensor, None]:
        f = layer.univariate.of(new)(*parts(phi.unflatten(-1, (-1, layer.total))))
        return f.inverse_and_ladj(y)[0], None

    if isinstance(layer.univariate, OfFeatures):
        return of_some
    # Of all splines one is made, which tells their options.
    f = layer.univariate(*parts(like.new_zeros(layer.total)))
    options = {"bound": f.bound, "slope": f.slope, "shift_bound": f.shift_bound}

    def of_any(y: Tensor, phi: Tensor, _: Tensor) -> tuple[Tensor, None]:
        w, h, d, *shift = parts(phi.unflatten(-1, (-1, layer.total)))
        by = shift[0] if shift else None
        return shifted_spline(y, w, h, d, by, **options, inverse=True, steep=False)[0], None

    return of_any


def _schedule(layer: Any, features: int) -> Schedule | None:
    r"""The passes in which the features can be worked out; None if it is not known how."""
    net = layer.hyper
    if type(net) is not MaskedMLP or net.out_features != features * layer.total or len(net) < 2:
        return None
    *before, last = net
    if type(last) is not MaskedLinear or not (
        watchable() and unhooked(net, last) and at_rest(net)
    ):
        return None
    chain = _chain(before)
    return schedule(net, chain, last.mask, features, layer.passes) if chain else None


def _chain(layers: list[Any]) -> list[Any] | None:
    r"""The masks of layers; None if what else there is may mix features."""
    chain: list[Any] = []
    for m in layers:
        if type(m) is MaskedLinear:
            chain.append(m.mask)
        elif type(m) is Residual:
            inner = _chain([*m])
            if inner is None or not all(isinstance(mask, Tensor) for mask in inner):
                return None
            chain.append(inner)
        elif type(m).__module__ != ACTIVATIONS or isinstance(m, MIXING):
            return None
    return chain


def _in_passes(net: Any, order: Schedule, y: Tensor, context: Tensor | None) -> Any:
    r"""The network in which each unit is worked out once; None if it has anything that wants all
    units at once, or that is listened to."""
    modules = [*net.modules()]
    layers = [m for m in modules if type(m) is MaskedLinear]
    others = (m for m in modules if type(m) not in (MaskedMLP, MaskedLinear, Residual))
    if order.places is None or not unhooked(*modules) or not all(map(is_elementwise, others)):
        return None
    given = [t for t in (y, context) if t is not None]
    if sum(t.shape[-1:].numel() for t in given) != net.in_features:
        return None  # the network says what is wrong
    if len(layers) < len(order.places) or len({t.dtype for t in given}) > 1:
        return None
    twins = [LayerInPasses(m, places) for m, places in zip(layers, order.places, strict=True)]
    twins[0] = LayerInPasses(layers[0], order.places[0], context)
    return replaced(net, dict(zip(layers, twins, strict=True)))
