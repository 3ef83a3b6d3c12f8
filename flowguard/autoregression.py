r"""The inverse of an autoregressive map, in which each feature is worked out once.

The parameters of a feature come from the features before it, through a masked network (Germain et
al., 2015, https://arxiv.org/abs/1502.03509). Its inverse is found in passes, each of which knows
some more features. What a pass has to tell is the parameters of those that are new: of the last
layer these are a few rows, and of the maps a few. Of the layers before, too, each unit can be worked
out once, in the pass in which all that it depends on is known.

Nothing here knows a library: adapters say what their networks are made of.
"""

__all__ = [
    "ContextInPasses",
    "LayerInPasses",
    "Places",
    "RowsOfFeatures",
    "Schedule",
    "SolveOf",
    "at_rest",
    "depends",
    "inverse_in_passes",
    "invert",
    "is_elementwise",
    "made_in_passes",
    "made_schedule",
    "masked_inverse",
    "order_of",
    "replaced",
    "schedule",
]

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from flowguard.migration.exchange import successor
from flowguard.numerics import unhooked, watchable

#: What returns the new features, and the log-determinant of their maps if it is asked for.
Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
#: The same, called with values, parameters and features.
SolveOf = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor | None]]

#: Layers that mix the rows of a batch, or draw at random, as long as they are trained: what they
#: return depends on how often, and on what, they are run.
RESTLESS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)

#: What may stand before the first layer: nothing, or what does nothing.
PASSING = (type(None), nn.Identity)


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


class Places(NamedTuple):
    r"""Where the units that a layer takes, and those that it returns, come in the passes of an
    inverse.

    Arguments:
        taken: The units it takes, as indices with shape :math:`(I)`, in the order in which they are
            known.
        taken_ends: How many of these are known in each pass.
        told: The units it returns, with shape :math:`(O)`, in the order in which they can be worked
            out.
        told_counts: How many of these each pass works out.

    Example:
        >>> places = Places(torch.arange(2), [0, 1], torch.arange(2), [1, 1])
        >>> places.told_counts
        [1, 1]
    """

    taken: Tensor
    taken_ends: list[int]
    told: Tensor
    told_counts: list[int]


class Schedule(NamedTuple):
    r"""In which pass of an inverse each unit of masked layers can be worked out.

    Arguments:
        groups: The features of each pass, each a tensor with shape :math:`(n)`; see :func:`invert`.
        places: Those of each layer; :py:`None` if the units cannot be taken apart.

    Example:
        >>> Schedule([torch.tensor([0]), torch.tensor([1])], None).groups[1]
        tensor([1])
    """

    groups: list[Tensor]
    places: list[Places] | None


#: Layers one after another: a mask, or the masks of layers around which their input is added.
Chain = Sequence[Tensor | Sequence[Tensor]]

# Of each network the masks that it had, and what follows from these. Masks rarely change, and to
# compare them takes a tenth of the time.
_known: WeakKeyDictionary[nn.Module, tuple[list[Tensor], tuple[int, ...], Schedule | None]]
_known = WeakKeyDictionary()


def schedule(
    net: nn.Module, chain: Chain, last: Tensor, features: int, most: int
) -> Schedule | None:
    r"""Returns in which pass each unit of a masked network can be worked out; :py:`None` if there
    is no order of the features, or if there are too many passes.

    What was found is kept for as long as the network has the same masks.

    Arguments:
        net: The network.
        chain: The masks of its layers but the last one, each with shape :math:`(O, I)`. The first
            layer takes the features, and then perhaps a context.
        last: The mask of the last one, which tells the parameters of one feature after another.
        features: The number of features.
        most: The largest number of passes.

    Example:
        >>> net, ones = nn.Module(), torch.ones(3, 3)
        >>> found = schedule(net, [ones.tril()], ones.tril(-1), features=3, most=3)
        >>> found.groups
        [tensor([0]), tensor([1]), tensor([2])]
        >>> found.places[0].told_counts  # nothing is known of the units in the first pass
        [0, 1, 1]
    """
    masks = [last, *(m for step in chain for m in ([step] if isinstance(step, Tensor) else step))]
    if any(m.is_meta for m in masks):
        return None  # there is nothing to be seen
    told = features, most, *(0 if isinstance(step, Tensor) else len(step) for step in chain)
    kept = _known.get(net)
    if kept is None or kept[1] != told or not all(map(_same, masks, kept[0])):
        with torch.inference_mode(False), torch.no_grad():  # it may be asked for in any mode
            kept = [m.clone() for m in masks], told, _scheduled(chain, last, features, most)
        _known[net] = kept
    return kept[2]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _scheduled(chain: Chain, last: Tensor, features: int, most: int) -> Schedule | None:
    first = chain[0] if isinstance(chain[0], Tensor) else chain[0][0]
    reach = torch.eye(first.shape[1], dtype=torch.bool, device=first.device)
    for step in chain:
        reach = (
            depends([step], reach) if isinstance(step, Tensor) else reach | depends(step, reach)
        )
    reach = depends([last.unflatten(0, (features, -1)).any(1)], reach)
    groups = order_of(reach[:, :features], most)
    if groups is None:
        return None
    # The pass from which on each input is known: the first one for a context.
    known = torch.zeros(first.shape[1], dtype=torch.long, device=first.device)
    for number, group in enumerate(groups, 1):
        known[group] = number
    passes = torch.arange(len(groups), device=known.device)

    def sort(known: Tensor) -> tuple[Tensor, list[int]]:
        order = known.argsort(stable=True)
        return order, torch.searchsorted(known[order], passes, right=True).tolist()

    def counted(order: Tensor, ends: list[int]) -> tuple[Tensor, list[int]]:
        return order, [end - start for start, end in pairwise([0, *ends])]

    def after(mask: Tensor, known: Tensor) -> Tensor:
        return ((mask != 0) * known).amax(1)

    places: list[Places] = []
    for step in chain:
        out = known
        for mask in [step] if isinstance(step, Tensor) else step:
            taken, out = out, after(mask, out)
            places.append(Places(*sort(taken), *counted(*sort(out))))
        if isinstance(step, Tensor):
            known = out
        elif bool((out > known).any()):  # the sum is known later than what is added to
            return Schedule(groups, None)
        else:
            places[-1] = Places(*places[-1][:2], *counted(*sort(known)))
    rows = torch.arange(len(last), device=last.device).unflatten(0, (features, -1))
    counts = [len(group) * rows.shape[1] for group in groups]
    places.append(Places(*sort(known), rows[torch.cat(groups)].flatten(), counts))
    return Schedule(groups, places)


class LayerInPasses:
    r"""Creates the masked linear layer that is called once in each pass of an inverse, with those
    units alone that are new; it returns those that can be worked out now.

    Arguments:
        layer: The layer, with a `weight` and a `mask` of one shape :math:`(O, I)`, and a `bias`.
        places: Where its units come; see :func:`schedule`.
        known: What is known before, with shape :math:`(N, C)`, if anything is.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> layer.mask = torch.ones(3, 3).tril()
        >>> places = schedule(layer, [layer.mask], torch.ones(3, 3).tril(-1), 3, 3).places[0]
        >>> twin, x = LayerInPasses(layer, places), torch.randn(5, 3)
        >>> new = [twin(x[:, :0]), twin(x[:, :1]), twin(x[:, 1:2])]
        >>> whole = F.linear(x, layer.mask * layer.weight, layer.bias)
        >>> torch.allclose(torch.cat(new, -1), whole[:, :2], atol=1e-6)
        True
    """

    def __init__(self, layer: Any, places: Places, known: Tensor | None = None) -> None:
        taken, taken_ends, told, counts = places
        told = told[: sum(counts)]
        weight = (layer.mask * layer.weight).index_select(0, told).index_select(1, taken)
        bias = None if layer.bias is None else layer.bias.index_select(0, told).unsqueeze(1)
        self._width = weight.shape[1]
        biases = [None] * len(counts) if bias is None else bias.split(counts)
        self._parts = zip(taken_ends, weight.split(counts), biases, strict=True)
        # One unit after another in memory: that is twice as fast for the few that are new.
        self._known = None if known is None else known.mT
        self._count = 0
        if known is not None and not torch.is_grad_enabled():
            self._known = self._memory(known)
            self._count = known.shape[1]
            self._known[: self._count] = known.mT

    def _memory(self, like: Tensor) -> Tensor:
        return like.new_empty(self._width, len(like))

    def __call__(self, new: Tensor) -> Tensor:
        r"""Returns the units that are known now, with shape :math:`(N, m)`.

        Arguments:
            new: The units that were not known before, with shape :math:`(N, n)`.
        """
        seen, weight, bias = next(self._parts)
        if torch.is_grad_enabled():  # what was recorded must not change
            known = new.mT if self._known is None else torch.cat((self._known, new.mT))
            self._known = known
        else:
            if self._known is None:
                self._known = self._memory(new)
            if seen > self._count:
                # Of one unit the transpose would be copied as one, in thirty times the time.
                one = new.shape[1] == 1
                self._known[self._count : seen] = new.reshape(1, -1) if one else new.mT
            self._count, known = seen, self._known[:seen]
        weight = weight[:, :seen]
        out = torch.mm(weight, known) if bias is None else torch.addmm(bias, weight, known)
        return out.mT


class ContextInPasses:
    r"""Creates what is called once in each pass with the context, and returns what it says to the
    units that can be worked out in it.

    Arguments:
        layer: What is said to all units: of a context, with shape :math:`(N, C)`, a number for each.
        places: Where the units come that are told; see :func:`schedule`.

    Example:
        >>> places = Places(torch.arange(2), [0, 1], torch.tensor([1, 0]), [1, 1])
        >>> twin, context = ContextInPasses(nn.Identity(), places), torch.tensor([[1.0, 2.0]])
        >>> twin(context), twin(context)
        (tensor([[2.]]), tensor([[1.]]))
    """

    def __init__(self, layer: Callable[[Tensor], Tensor], places: Places) -> None:
        self._layer, self._places = layer, places
        self._parts: Iterator[Tensor] | None = None

    def __call__(self, context: Tensor) -> Tensor:
        r"""Returns what is said to the units of this pass, with shape :math:`(*, m)`.

        Arguments:
            context: The context, with shape :math:`(*, C)`.
        """
        if self._parts is None:
            told, counts = self._places[2:]
            whole = self._layer(context).index_select(-1, told[: sum(counts)])
            self._parts = iter(whole.split(counts, -1))
        return next(self._parts)


def replaced(net: nn.Module, parts: Mapping[nn.Module, Any]) -> nn.Module:
    r"""Returns a network that runs as another one, whose modules it has but for some.

    Arguments:
        net: The network, which is not changed.
        parts: The modules that differ, and what is called in their places.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))
        >>> twin = replaced(net, {net[1][0]: nn.ReLU()})
        >>> twin[0] is net[0], twin[1], net[1]
        (True, Sequential(
          (0): ReLU()
        ), Sequential(
          (0): Tanh()
        ))
    """
    twin: nn.Module = successor(net)
    for name, child in net.named_children():
        if child in parts:
            twin._modules[name] = parts[child]
        elif any(m in parts for m in child.modules()):
            twin._modules[name] = replaced(child, parts)
    return twin


def inverse_in_passes(
    net: Callable[[Tensor], Tensor], y: Tensor, groups: Sequence[Tensor], solve: SolveOf
) -> tuple[Tensor, Tensor | None]:
    r"""Returns the inverse of maps whose parameters a network tells that is made of layers such as
    :class:`LayerInPasses`, so that each of its units is worked out once.

    What a fully autoregressive network costs is then a pass of it for all features together, and
    not one for each.

    Arguments:
        net: The network, called with the features that are new, with shape :math:`(N, n)`; returns
            the parameters of those that come next.
        y: The values of the maps, with shape :math:`(N, D)`.
        groups: The features of each pass; see :func:`invert`.
        solve: Called with the values of some features, what the network says of them, and their
            indices; returns the inverse at these features, and its log-determinant or :py:`None`.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.mask = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> order = schedule(layer, [torch.eye(2)], layer.mask, features=2, most=2)
        >>> twin, y = LayerInPasses(layer, order.places[1]), torch.randn(5, 2)
        >>> with torch.no_grad():
        ...     x, _ = inverse_in_passes(
        ...         twin, y, order.groups, lambda y, shift, features: (y - shift, None)
        ...     )
        ...     y_again = x + F.linear(x, layer.mask * layer.weight, layer.bias)
        >>> torch.allclose(y_again, y, atol=1e-6)
        True
    """
    new = y[..., :0]
    values = y.movedim(-1, 0).contiguous()  # in memory feature by feature, as they are worked out

    def step(_: Tensor, features: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal new
        new, ladj = solve(values.index_select(0, features).movedim(0, -1), net(new), features)
        return new, ladj

    x, total = invert(values.movedim(0, -1), groups, step)
    return x.contiguous(), total


#: Where torch keeps its activations, and those among them that mix features.
ACTIVATIONS = "torch.nn.modules.activation"
MIXING = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.GLU, nn.MultiheadAttention)
#: Functions that work on each number by itself.
ELEMENTWISE = {
    *(F.relu, F.relu6, F.elu, F.selu, F.celu, F.leaky_relu, F.silu, F.gelu, F.mish, F.softplus),
    *(F.tanh, F.sigmoid, F.softsign, F.hardtanh, F.hardswish, F.logsigmoid, F.relu_),
    *(torch.relu, torch.tanh, torch.sigmoid, torch.sin, torch.relu_, torch.selu),
}


def is_elementwise(activation: Any) -> bool:
    r"""Returns whether an activation is known to work on each number by itself, in the same way
    for all of them.

    Arguments:
        activation: The function or the module.

    Example:
        >>> [is_elementwise(f) for f in (F.relu, nn.Tanh(), nn.PReLU(8), nn.Softmax(-1))]
        [True, True, False, False]
    """
    if not isinstance(activation, nn.Module):
        return activation in ELEMENTWISE
    known = type(activation).__module__ == ACTIVATIONS and not isinstance(activation, MIXING)
    return known and not [*activation.parameters()]


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
        net: The network, called with what is mapped and the context; see :func:`made_schedule`.
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
    order = made_schedule(net, features, kinds) if alike else None
    if order is None:
        x = torch.zeros_like(y)
        for _ in range(features):
            # After pass i the first i features are right, and do not change any more.
            x, ladj = solve(y, net(x, context), slice(None))
        return x, ladj
    twin = made_in_passes(net, order, kinds)
    if twin is not None:
        x, total = inverse_in_passes(lambda new: twin(new, context), y, order.groups, solve)
    else:
        last = RowsOfFeatures(net.final_layer, features)
        narrowed = replaced(net, {net.final_layer: last})

        def step(x: Tensor, new: Tensor) -> tuple[Tensor, Tensor | None]:
            last.features = new
            return solve(y[:, new], narrowed(x, context), new)

        x, total = invert(y, order.groups, step)
    assert total is not None  # of the first group at least
    return x, total


def _inner(block: Any) -> list[Any]:
    r"""The masked layers of a block of a masked autoencoder: two if their input is added."""
    return list(getattr(block, "linear_layers", [])) or [block.linear]


def made_schedule(net: Any, features: int, kinds: Sequence[type]) -> Schedule | None:
    r"""Returns the passes in which the features of a masked autoencoder can be worked out, each by
    itself; :py:`None` if it is none that is known to work in that way.

    Arguments:
        net: The network: an `initial_layer`, `blocks` of either one `linear` layer or two
            `linear_layers` around which the input is added, and a `final_layer`.
        features: The number of features.
        kinds: The classes of such a network, of its blocks and of its layers.

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
        >>> made_schedule(Net(), 3, kinds=[Net, Masked]).groups
        [tensor([0]), tensor([1]), tensor([2])]
        >>> made_schedule(Net(), 3, kinds=[]) is None
        True
    """
    if type(net) not in kinds or type(getattr(net, "preprocessing", None)) not in PASSING:
        return None
    inner = [_inner(block) for block in net.blocks]
    layers = [net.initial_layer, net.final_layer, *(m for ms in inner for m in ms)]
    if not all(type(m) in kinds for m in (*net.blocks, *layers)):
        return None
    if not (watchable() and unhooked(net, net.final_layer) and at_rest(net)):
        return None
    steps = [[m.mask for m in ms] if len(ms) > 1 else ms[0].mask for ms in inner]
    chain = [net.initial_layer.mask, *steps]
    return schedule(net, chain, net.final_layer.mask, features, features)


def made_in_passes(net: Any, order: Schedule, kinds: Sequence[type]) -> Any:
    r"""Returns a masked autoencoder that is called once in each pass, with the features that are new
    alone; :py:`None` if it has anything that wants all units at once, or that is listened to.

    Arguments:
        net: The network.
        order: What :func:`made_schedule` returned.
        kinds: The classes of such a network, of its blocks and of its layers.

    Example:
        >>> class Masked(nn.Linear):
        ...     def __init__(self, mask):
        ...         super().__init__(*mask.shape[::-1])
        ...         self.mask = mask
        ...     def forward(self, h):
        ...         return F.linear(h, self.mask * self.weight, self.bias)
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         below = torch.ones(2, 2).tril()
        ...         self.initial_layer, self.blocks = Masked(below), nn.ModuleList()
        ...         self.final_layer = Masked(below.tril(-1))
        ...     def forward(self, x):
        ...         return self.final_layer(self.initial_layer(x))
        >>> net, kinds, x = Net(), [Net, Masked], torch.randn(5, 2)
        >>> twin = made_in_passes(net, made_schedule(net, 2, kinds), kinds)
        >>> told = torch.cat([twin(x[:, :0]), twin(x[:, :1])], -1)
        >>> torch.allclose(told, net(x), atol=1e-6)
        True
    """
    modules, blocks = [*net.modules()], [*net.blocks]
    layers = [net.initial_layer, *(m for b in blocks for m in _inner(b)), net.final_layer]
    if order.places is None or not unhooked(*modules) or len({*layers}) < len(layers):
        return None
    parts: dict[nn.Module, Any] = {}
    places = iter(order.places)
    for owner in (net, *blocks):
        told = [next(places) for _ in ([1] if owner is net else _inner(owner))]
        speaks = getattr(owner, "context_layer", None)
        if speaks is not None:
            # It may be the first or the second layer of a block that the context is told to.
            if not all(torch.equal(told[0].told, p.told) for p in told):
                return None
            if told[0].told_counts != told[-1].told_counts:
                return None
            parts[speaks] = ContextInPasses(speaks, told[0])
    used = [m.activation for m in (net, *blocks) if hasattr(m, "activation")]
    plain = (*kinds, nn.ModuleList, nn.Identity, nn.Dropout)
    known = (type(m) in plain or m in parts or is_elementwise(m) for m in modules)
    if not (all(known) and all(map(is_elementwise, used))):
        return None
    twins = map(LayerInPasses, layers, order.places)
    return replaced(net, parts | dict(zip(layers, twins, strict=True)))
