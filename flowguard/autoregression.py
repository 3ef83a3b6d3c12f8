r"""The inverse of an autoregressive map, in which each feature is worked out once.

The parameters of a feature come from the features before it, through a masked network (Germain et
al., 2015, https://arxiv.org/abs/1502.03509). Its inverse is found in passes, each of which knows
some more features. What a pass has to tell is the parameters of those that are new: of the last
layer these are a few rows, and of the maps a few.

Nothing here knows a library: adapters say what their networks are made of.
"""

__all__ = [
    "RowsOfFeatures",
    "UnitsOnce",
    "at_rest",
    "depends",
    "invert",
    "made_groups",
    "masked_inverse",
    "narrowed",
    "order_of",
    "unhooked",
]

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from flowguard.migration.exchange import successor
from flowguard.numerics import watchable

#: What returns the new features, and the log-determinant of their maps if it is asked for.
Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

#: Layers that mix the rows of a batch, or draw at random, as long as they are trained: what they
#: return depends on how often, and on what, they are run.
RESTLESS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)

#: What may stand before the first layer: nothing, or what does nothing.
PASSING = (type(None), nn.Identity)
# Hooks that are called as a module runs, also those of all modules; those around its state do not
# matter here.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def invert(y: Tensor, groups: Sequence[Tensor], solve: Solve) -> tuple[Tensor, Tensor | None]:
    r"""Returns the inverse of an autoregressive map, and the log-determinant of it.

    Arguments:
        y: The values of the map, with shape :math:`(*, D)`.
        groups: The features, as indices, in an order in which each depends on those of earlier
            groups alone.
        solve: Called with an :math:`x` in which the features of earlier groups are right, and with
            a group; returns the inverse at these features, with shape :math:`(*, n)`, and the
            log-determinant of each row or :py:`None`.

    Example:
        >>> def solve(x, features):  # y = x + the sum of all features before
        ...     return y[..., features] - x[..., : features[0]].sum(-1, keepdim=True), None
        >>> y = torch.tensor([1.0, 3.0, 7.0])
        >>> invert(y, [torch.tensor([i]) for i in range(3)], solve)[0]
        tensor([1., 2., 4.])
    """
    x, total = torch.zeros_like(y), None
    for features in groups:
        new, ladj = solve(x, features)
        if new.shape[:-1] != x.shape[:-1] or new.dtype != x.dtype:
            # A context may have more rows, or more digits, than what is mapped.
            x = x.expand(*new.shape[:-1], x.shape[-1]).to(new.dtype).clone()
        # What was recorded for a gradient must not change.
        write = x.index_copy if new.requires_grad or x.requires_grad else x.index_copy_
        x = write(-1, features, new)
        if ladj is not None:
            total = ladj if total is None else total + ladj
    return x, total


def order_of(parents: Tensor, most: int) -> list[Tensor] | None:
    r"""Returns the features in groups, each of which depends on earlier groups alone; :py:`None`
    if there is no such order, if it has too many groups, or if no numbers are there.

    Arguments:
        parents: Whether feature :math:`i` depends on feature :math:`j`, with shape :math:`(D, D)`.
        most: The largest number of groups.

    Example:
        >>> order_of(torch.tensor([[False, True], [False, False]]), 2)
        [tensor([1]), tensor([0])]
        >>> order_of(torch.tensor([[False, True], [True, False]]), 2) is None
        True
    """
    if parents.is_meta:
        return None  # there is nothing to be seen
    # What is looked at one by one is faster on the CPU.
    missing, left = parents.cpu(), torch.ones(len(parents), dtype=torch.bool)
    groups: list[Tensor] = []
    while bool(left.any()):
        now = left & ~(missing & left).any(-1)
        if len(groups) == most or not bool(now.any()):
            return None
        groups.append(now.nonzero().squeeze(-1).to(parents.device))
        left = left & ~now
    return groups


def depends(masks: Iterable[Tensor], reach: Tensor) -> Tensor:
    r"""Returns on which inputs the outputs of masked layers depend.

    Arguments:
        masks: The masks of the layers, one after another, each with shape :math:`(M, N)`.
        reach: On which inputs the :math:`N` inputs of the first layer depend, with shape
            :math:`(N, D)`.

    Example:
        >>> mask = torch.tensor([[False, False], [True, False]])
        >>> depends([mask], torch.eye(2, dtype=torch.bool)).tolist()
        [[False, False], [True, False]]
    """
    for mask in masks:
        # In numbers, as there is no product of truths.
        reach = (mask != 0).float() @ reach.float() > 0
    return reach


class RowsOfFeatures(nn.Module):
    r"""Creates the masked linear layer that tells the parameters of some features alone.

    Arguments:
        layer: The layer that tells those of all, one feature after another, with a `weight`, a
            `mask` and a `bias`.
        features: The number of features.

    Example:
        >>> layer = nn.Linear(4, 6)  # two parameters of each of three features
        >>> layer.mask = torch.ones(6, 4)
        >>> rows = RowsOfFeatures(layer, features=3)
        >>> rows.features = torch.tensor([2])
        >>> h = torch.randn(5, 4)
        >>> torch.allclose(rows(h), layer(h)[:, 4:], atol=1e-6)
        True
    """

    def __init__(self, layer: Any, features: int) -> None:
        super().__init__()
        self.rows: Any = (layer.mask * layer.weight).unflatten(0, (features, -1))
        self.offsets: Any = None if layer.bias is None else layer.bias.unflatten(0, (features, -1))
        self.features: Any = slice(None)

    def forward(self, h: Tensor) -> Tensor:
        r"""Returns the parameters of `features`, with shape :math:`(*, n P)`.

        Arguments:
            h: What the layer before returns, with shape :math:`(*, H)`.
        """
        bias = None if self.offsets is None else self.offsets[self.features].flatten()
        return F.linear(h, self.rows[self.features].flatten(0, 1), bias)


def narrowed(net: nn.Module, last: str, features: int) -> tuple[nn.Module, RowsOfFeatures]:
    r"""Returns a network that runs as another one, up to the rows of its last layer; and that
    layer, which is told of which features it shall speak.

    Arguments:
        net: The network.
        last: The name of its last layer, a masked one.
        features: The number of features.

    Returns:
        The network, whose other layers are those of the old one, and its last layer.

    Example:
        >>> net = nn.Sequential()
        >>> net.hidden, net.last = nn.Linear(3, 4), nn.Linear(4, 6)
        >>> net.last.mask = torch.ones(6, 4)
        >>> twin, rows = narrowed(net, "last", features=3)
        >>> rows.features = torch.tensor([0, 1])
        >>> twin(torch.zeros(5, 3)).shape, net(torch.zeros(5, 3)).shape
        (torch.Size([5, 4]), torch.Size([5, 6]))
    """
    rows = RowsOfFeatures(getattr(net, last), features)
    twin: nn.Module = successor(net)
    setattr(twin, last, rows)
    return twin, rows


class UnitsOnce:
    r"""Creates the inverse of maps whose parameters a chain of masked linear layers tells, in which
    each unit of these is worked out once: in the pass in which all that it depends on is known.

    What a fully autoregressive network costs is then a pass of it for all features together, and
    not one for each. Nothing is recorded for gradients.

    Arguments:
        layers: The layers, each with a `weight` and a `mask` of one shape :math:`(O, I)`, and a
            `bias` with shape :math:`(O)`. The first one takes the features and then the context;
            the last one tells the parameters of one feature after another.
        activations: What is applied to each number that a layer returns, for all but the last one.
        groups: The features, as indices, in an order in which each depends on those of earlier
            groups alone.

    Example:
        >>> first, last = nn.Linear(3, 3), nn.Linear(3, 2)
        >>> first.mask = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        >>> last.mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])  # of two features
        >>> once = UnitsOnce([first, last], [torch.tanh], [torch.tensor([0]), torch.tensor([1])])
        >>> y, context = torch.randn(5, 2), torch.randn(5, 1)
        >>> x = once.inverse(y, context, lambda y, shift: y - shift)
        >>> h = F.linear(torch.cat((x, context), -1), first.mask * first.weight, first.bias)
        >>> shift = F.linear(h.tanh(), last.mask * last.weight, last.bias)
        >>> torch.allclose(x + shift, y, atol=1e-6)
        True
    """

    def __init__(
        self,
        layers: Sequence[Any],
        activations: Sequence[Callable[[Tensor], Tensor]],
        groups: Sequence[Tensor],
    ) -> None:
        self._activations = activations
        self._counts = [len(group) for group in groups]
        self._features = torch.cat([*groups])
        *hidden, last = layers
        # The pass from which on each input is known: the first one for the context.
        known = self._features.new_zeros(layers[0].weight.shape[1])
        for number, group in enumerate(groups, 1):
            known[group] = number
        # Sorted by that, what is new in a pass is one slice, and what is known is another one.
        passes = torch.arange(len(groups), device=known.device)
        order = torch.cat(((known == 0).nonzero().squeeze(-1), self._features))
        self._ends = [torch.searchsorted(known[order], passes, right=True).tolist()]
        self._hidden: list[tuple[Tensor, Tensor | None]] = []
        for layer in hidden:
            known = ((layer.mask != 0) * known).amax(1)
            by = known.argsort(stable=True)
            weight = (layer.mask * layer.weight).detach()[by][:, order]
            self._hidden.append((weight, None if layer.bias is None else layer.bias.detach()[by]))
            self._ends.append(torch.searchsorted(known[by], passes, right=True).tolist())
            order = by
        rows = RowsOfFeatures(last, len(self._features))
        self._last = [
            (
                rows.rows.detach()[group].flatten(0, 1)[:, order],
                None if rows.offsets is None else rows.offsets.detach()[group].flatten(),
            )
            for group in groups
        ]

    @torch.no_grad()
    def inverse(
        self, y: Tensor, context: Tensor | None, solve: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        r"""Returns the inverse, with shape :math:`(*, D)`.

        Arguments:
            y: The values of the maps, with shape :math:`(*, D)`.
            context: The context, with shape :math:`(*, C)`, or :py:`None` if there is none.
            solve: Called with the values of some features, with shape :math:`(*, n)`, and with
                what the last layer says of these, with shape :math:`(*, n P)`; returns the inverse.
        """
        if context is not None:
            shape = torch.broadcast_shapes(y.shape[:-1], context.shape[:-1])
            y, context = y.expand(*shape, -1), context.expand(*shape, -1)
        widths = [self._hidden[0][0].shape[1], *(len(weight) for weight, _ in self._hidden)]
        inputs, *hidden = (y.new_empty(*y.shape[:-1], width) for width in widths)
        first = widths[0] - y.shape[-1]
        if context is not None:
            inputs[..., :first] = context
        x, y = inputs[..., first:], y[..., self._features]
        done, starts = 0, [0] * len(self._hidden)
        for number, count in enumerate(self._counts):
            below = inputs
            for k, (weight, bias) in enumerate(self._hidden):
                start, end, seen = starts[k], self._ends[k + 1][number], self._ends[k][number]
                if end > start:
                    part = None if bias is None else bias[start:end]
                    new = F.linear(below[..., :seen], weight[start:end, :seen], part)
                    hidden[k][..., start:end] = self._activations[k](new)
                starts[k], below = end, hidden[k]
            weight, bias = self._last[number]
            seen = self._ends[-1][number]
            phi = F.linear(below[..., :seen], weight[:, :seen], bias)
            x[..., done : done + count] = solve(y[..., done : done + count], phi)
            done += count
        return x[..., self._features.argsort()]


def unhooked(*modules: nn.Module) -> bool:
    r"""Whether nobody listens to any of these modules, has put another `forward` into it or has
    compiled it, so that they may be run in parts.

    Arguments:
        modules: The modules.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> unhooked(layer)
        True
        >>> handle = layer.register_forward_hook(lambda module, inputs, output: None)
        >>> unhooked(layer)
        False
    """
    if any(getattr(nn.modules.module, f"_global{name}") for name in HOOKS):
        return False
    return not any(
        "forward" in vars(m) or m._compiled_call_impl or any(getattr(m, name) for name in HOOKS)
        for m in modules
    )


def at_rest(net: nn.Module) -> bool:
    r"""Returns whether what a network says of a row depends on this row alone.

    Arguments:
        net: The network.

    Example:
        >>> at_rest(nn.Dropout()), at_rest(nn.Dropout().eval())
        (False, True)
    """
    return not any(
        isinstance(m, RESTLESS) and m.training and getattr(m, "p", 1) for m in net.modules()
    )


def masked_inverse(
    net: Any,
    y: Tensor,
    context: Any,
    solve: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]],
    *,
    kinds: Sequence[type],
    alike: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Returns the inverse of maps whose parameters a masked autoencoder tells, and its
    log-determinant.

    Where it is not known in which order the network goes, each pass works out all features.

    Arguments:
        net: The network, called with what is mapped and the context; see :func:`made_groups`.
        y: The values of the maps, with shape :math:`(N, D)`.
        context: The context.
        solve: Called with the values of some features, with what the network says of them, and
            with their indices or, for all, a slice; returns the inverse and the log-determinant.
        kinds: The classes of such a network, of its blocks and of its layers.
        alike: Whether `solve` can be asked of some features alone.

    Returns:
        The inverse, with shape :math:`(N, D)`, and its log-determinant in nats, with shape
        :math:`(N)`.

    Example:
        >>> below = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
        >>> def net(x, context):  # the sum of all features before
        ...     return x @ below.mT
        >>> def solve(y, shift, features):
        ...     return y - shift, torch.zeros(len(y))
        >>> y = torch.tensor([[1.0, 3.0, 7.0]])
        >>> masked_inverse(net, y, None, solve, kinds=[])
        (tensor([[1., 2., 4.]]), tensor([0.]))
    """
    features = y.shape[1]
    groups = made_groups(net, features, kinds) if alike else None
    if groups is None:
        x = torch.zeros_like(y)
        for _ in range(features):
            # After pass i the first i features are right, and do not change any more.
            x, ladj = solve(y, net(x, context), slice(None))
        return x, ladj
    twin, last = narrowed(net, "final_layer", features)

    def step(x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        last.features = new
        return solve(y[:, new], twin(x, context), new)

    x, total = invert(y, groups, step)
    assert total is not None  # of the first group at least
    return x, total


def made_groups(net: Any, features: int, kinds: Sequence[type]) -> list[Tensor] | None:
    r"""Returns the groups in which the features of a masked autoencoder can be worked out, each by
    itself; :py:`None` if it is none that is known to work in that way.

    Arguments:
        net: The network: an `initial_layer`, `blocks` of either one `linear` layer or two
            `linear_layers` around which the input is added, and a `final_layer`.
        features: The number of features.
        kinds: The classes of such a network, of its blocks and of its layers.

    Returns:
        The groups, each a tensor of indices with shape :math:`(n)`.

    Example:
        >>> class Masked(nn.Linear):
        ...     def __init__(self, mask):
        ...         super().__init__(*mask.shape[::-1])
        ...         self.mask = mask
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         below = torch.ones(3, 3).tril()
        ...         self.initial_layer, self.blocks = Masked(below), nn.ModuleList()
        ...         self.final_layer = Masked(below.tril(-1))
        >>> made_groups(Net(), 3, kinds=[Net, Masked])
        [tensor([0]), tensor([1]), tensor([2])]
        >>> made_groups(Net(), 3, kinds=[]) is None
        True
    """
    if type(net) not in kinds or type(getattr(net, "preprocessing", None)) not in PASSING:
        return None
    inner = [list(getattr(b, "linear_layers", [])) or [b.linear] for b in net.blocks]
    layers = [net.initial_layer, net.final_layer, *(m for ms in inner for m in ms)]
    if not all(type(m) in kinds for m in (*net.blocks, *layers)):
        return None
    if not (watchable() and unhooked(net, net.final_layer) and at_rest(net)):
        return None
    reach = net.initial_layer.mask != 0
    for masked in inner:
        passed = depends([m.mask for m in masked], reach)
        reach = passed if len(masked) == 1 else reach | passed
    last = net.final_layer.mask.unflatten(0, (features, -1)).any(1)
    return order_of(depends([last], reach), features)
