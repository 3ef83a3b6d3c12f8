r"""What the steps of a level need to know of a context, computed for all of them together.

The first layers of a coupling's two halves are convolutions over the same context, the widest of
the whole flow. One convolution with the weights of all steps does their work at once.
"""

__all__ = [
    "Origin",
    "conditions",
    "convolve",
    "origin_of",
    "transition_mixes",
]

import weakref
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.image.coupling import Condition, ConditionalCoupling, last_layers
from flowguard.image.layers import (
    HALVES,
    ActNorm,
    FixedConv1x1,
    Folded,
    FoldedMix,
    InvertibleConv1x1,
    NormedConv2d,
    ZeroConv2d,
    laid_out,
)
from flowguard.image.maps import work_out
from flowguard.image.steps import MIXES, FlowStep, TransitionStep
from flowguard.numerics import inv_and_logabsdet, network_dtype, unhooked

#: The most numbers of hidden channels that are held at a time.
BUDGET = 2**25

VERSION = attrgetter("_version")

#: The layers of a coupling's networks, the first and those after it: the sizes of their kernels, or
#: zero for an activation.
FIRST, LATER = (3,), (0, 1, 0, 3)
KNOWN = (nn.Conv2d, NormedConv2d, ZeroConv2d)


class Origin:
    r"""Creates a memory of the module that made something, and of its weights and parts.

    An in-place change is told by the versions that autograd counts, or, for tensors made in
    inference mode, which have none, by the numbers themselves. Writing through ``parameter.data``
    goes unseen, as everywhere in autograd, and so do options and hooks. Pickles forget where they
    come from.

    Arguments:
        maker: The module that makes it; :py:`None` if that is not known, which no module is.
        besides: A part whose weights are remembered elsewhere.
    """

    def __init__(self, maker: nn.Module | None, besides: nn.Module | None = None) -> None:
        self._maker = None if maker is None else weakref.ref(maker)
        modules = [] if maker is None else _parts(maker, besides)
        found = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._held: list[dict[str, Any]] = [d for d in found if d]
        self._ids = self._who()
        tensors = [t for d in self._held for t in d.values() if isinstance(t, Tensor)]
        self._counted = [t for t in tensors if not t.is_inference()]
        self._state = self._what()
        self._copies = [(t, t.clone()) for t in tensors if t.is_inference()]
        # As long as the old numbers are held, no others can come to lie in their place.
        self._numbers = [t.detach() for t in self._counted]

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self

    def _who(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._held))))

    def _what(self) -> tuple[list[int], list[int]]:
        versions = list(map(VERSION, self._counted))
        try:
            return versions, list(map(Tensor.data_ptr, self._counted))
        except RuntimeError:  # tensors of torch.func lie nowhere
            return versions, []

    def check(self, maker: nn.Module) -> None:
        r"""Refuses another module, and the same one with other weights.

        Arguments:
            maker: The module that is to use what was made. Compiled code does not ask.

        Raises:
            ValueError: If it did not make it, or its weights have changed since.
        """
        if torch.compiler.is_compiling():
            return
        if self._maker is None:
            raise ValueError(
                "a condition serves the model that made it; got one of which that is not known, as"
                " it comes from compiled code or from a file: make it again with condition(...), or"
                " vouch for it with sign(condition)"
            )
        if self._maker() is not maker:
            raise ValueError(
                f"a condition serves the {type(maker).__name__} that made it; got one of another,"
                " or of the one that this is a copy of: make it again with condition(...)"
            )
        same = self._who() == self._ids and self._what() == self._state
        if not same or not all(torch.equal(t, copy) for t, copy in self._copies):
            raise ValueError(
                "a condition serves the weights that it was made with; got one from before they"
                " changed: make it again with condition(...)"
            )


def _parts(maker: nn.Module, besides: nn.Module | None) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [maker]  # `maker.modules()` takes three times as long
    while waiting:
        module = waiting.pop()
        if module is not None and module is not besides and module not in found:
            found[module] = None
            waiting += module._modules.values()
    # What the first batch will initialise has not gone into anything yet.
    steps = [m for m in found if isinstance(m, (FlowStep, TransitionStep))]
    pending = {step.actnorm for step in steps if step.actnorm.pending}
    return [m for m in found if m not in pending]


#: Of what compiled code makes, for it sees tensors alone.
UNKNOWN = Origin(None)


def origin_of(maker: nn.Module, besides: nn.Module | None = None) -> Origin:
    r"""Returns what is to be known of a condition's origin; see :class:`Origin`."""
    return UNKNOWN if torch.compiler.is_compiling() else Origin(maker, besides)


def conditions(
    steps: Sequence[FlowStep], context: Tensor, noises: Sequence[Tensor | None]
) -> list[Condition]:
    r"""Returns what the coupling of each step makes of a context.

    Without gradients the steps are computed together, and their weights folded; under autocast
    these are held in its precision, and what elementwise maps take is not. With gradients, or where
    a layer is not what the coupling was made of (another one, a hooked, parametrised, quantised or
    not initialised one), :meth:`ConditionalCoupling.condition` is called for each.

    Arguments:
        steps: The steps of a level.
        context: Their context, with shape :math:`(B, C, H, W)`.
        noises: The noise map of each, or :py:`None`.
    """
    couplings = [step.coupling for step in steps]
    pending = any(step.actnorm.pending for step in steps)
    if torch.is_grad_enabled() or pending or not _plain(couplings):
        return [c.condition(context, n) for c, n in zip(couplings, noises, strict=True)]
    couplings[0].check_context(context)
    mixes = _fold_mixes(steps)
    single, half = couplings[0].first_kept.weight.dtype, network_dtype(context)
    context = laid_out(context, half)
    width = 2 * couplings[0].first_kept.out_channels * context.shape[0]
    together = max(1, BUDGET // max(1, width * context.shape[-2] * context.shape[-1]))
    made: list[Condition] = []
    for start in range(0, len(couplings), together):
        part = slice(start, start + together)
        shared = zip(couplings[part], noises[part], mixes[part], strict=True)
        hidden = _convolve([c.first_context for c in couplings[part]], context)
        injected = _convolve([c.injector[0] for c in couplings[part]], context)
        for (c, noise, mix), h, i in zip(shared, hidden, injected, strict=True):
            raw = last_layers(_fold(half, c.injector[2], c.injector[4]), i)
            channels = c.kept + c.changed
            raw = raw.to(single, memory_format=torch.contiguous_format)
            family, parameters = work_out(c.map_of("injector"), raw, channels, overwrite=True)
            rest = (_first(c).to(half), *_fold(half, c.rest[1], c.rest[3]))
            told = () if c.noise is None else _fold(half, c.noise[0], c.noise[2], c.noise[4])
            noise = c.fit_noise(noise, context)
            made.append(Condition(parameters, h, noise, family, mix, rest, told))
    return made


def transition_mixes(transitions: Sequence[TransitionStep]) -> list[FoldedMix | None]:
    r"""Returns the steps without coupling with their weights folded, where that is allowed."""
    usual = all(type(t) is TransitionStep and not t.actnorm.pending for t in transitions)
    if torch.is_grad_enabled() or not usual:
        return [None] * len(transitions)
    return _fold_mixes(transitions)


def _fold_mixes(
    steps: Sequence[FlowStep] | Sequence[TransitionStep],
) -> list[FoldedMix | None]:
    r"""Merges normalisations and the 1×1 convolutions after them, all steps together, if they are
    of the same kind and nobody listens to them."""
    norms, layers = [s.actnorm for s in steps], [s.mix for s in steps]
    kinds = {type(m) for m in layers}
    alike = len(kinds) == 1 and kinds <= {*MIXES.values()}
    changed = any("inverse" in vars(m) for m in (*norms, *layers))
    if changed or not (alike and {type(n) for n in norms} == {ActNorm}):
        return [None] * len(steps)
    if not unhooked(*norms, *layers):
        return [None] * len(steps)
    bias = torch.stack([n.bias.flatten() for n in norms]).double()
    logs = torch.stack([n.logs.flatten() for n in norms]).double()
    matrix = torch.stack([m.weight for m in layers]).double()
    ladj = logs.sum(1)
    if isinstance(layers[0], InvertibleConv1x1):
        back, of_mix = inv_and_logabsdet(matrix)
        ladj = ladj + of_mix
    elif isinstance(layers[0], FixedConv1x1):
        back = torch.stack([m.get_buffer("transpose") for m in layers]).double()
    else:
        back = matrix.mT
    there = matrix * logs.exp().unsqueeze(1)
    offset = (there @ bias.unsqueeze(2)).squeeze(2)
    back = back * torch.exp(-logs).unsqueeze(2)
    dtype = norms[0].bias.dtype
    parts = (t.to(dtype).unbind() for t in (there, offset, back, -bias, ladj))
    return [FoldedMix(*of_step) for of_step in zip(*parts, strict=True)]


def _convolve(convs: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    r"""Applies several 3×3 convolutions to the same input."""
    weights, biases = zip(*(Folded.of(conv).to(x.dtype) for conv in convs), strict=True)
    y = convolve(x, torch.cat(weights))
    # The bias is added in place, part by part: each becomes a tensor of its own.
    shares = zip(y.chunk(len(convs), dim=1), biases, strict=True)
    return [laid_out(t, t.dtype) if b is None else t + b[:, None, None] for t, b in shares]


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    r"""Applies a 3×3 convolution without bias, at less cost where the input is coarse.

    Encoders bring features of the condition's size to finer levels by their nearest neighbours.
    Channels that are constant on blocks of 2×2 pixels are convolved on the blocks: for each of the
    four pixels of a block the kernel falls on 2×2 blocks, which makes 4 products of 9.

    Arguments:
        x: The input, with shape :math:`(B, C, H, W)`.
        weight: The kernel, with shape :math:`(C', C, 3, 3)`.
    """
    coarse = _coarse(x)
    if coarse is None:
        return F.conv2d(x, weight, padding=1)
    y = F.conv2d(_channels(x, ~coarse), _channels(weight, ~coarse), padding=1)
    blocks = F.pad(_channels(x[..., ::2, ::2], coarse), (1, 1, 1, 1))
    weight = _channels(weight, coarse)
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    for i in (0, 1):
        for j in (0, 1):
            kernel = _on_blocks(_on_blocks(weight, 2, i), 3, j)
            part = blocks[..., i : i + height + 1, j : j + width + 1]
            y[..., i::2, j::2] += F.conv2d(part, kernel)
    return y


def _channels(x: Tensor, chosen: Tensor) -> Tensor:
    r"""Some channels of maps, laid out as their dtype wants it: to index them would not be."""
    if x.dtype not in HALVES:
        return x[:, chosen]
    return x.movedim(1, -1)[..., chosen].movedim(-1, 1)


def _on_blocks(weight: Tensor, dim: int, pixel: int) -> Tensor:
    r"""The three taps of a kernel as those on two blocks, from the first or second pixel of one."""
    a, b, c = weight.unbind(dim)
    return torch.stack((a, b + c) if pixel == 0 else (a + b, c), dim)


def _coarse(x: Tensor) -> Tensor | None:
    r"""Which channels are constant on blocks of 2×2 pixels, if that is worth a way of its own."""
    # To look would stop the stream of work of a GPU.
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() == 0:
        return None
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        return None
    blocks = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    same = (blocks == blocks[..., :1, :, :1]).flatten(2).all(2).all(0)
    share = same.float().mean().item()
    return same if 0.25 <= share < 1 else None


def _fold(dtype: torch.dtype, *convs: nn.Module) -> tuple[Folded, ...]:
    return tuple(Folded.of(conv).to(dtype) for conv in convs)


def _first(coupling: ConditionalCoupling) -> Folded:
    weight, norm = coupling.first_kept.weight, getattr(coupling.first_context, "norm", None)
    if norm is not None:
        weight = weight * torch.exp(norm.logs).reshape(-1, 1, 1, 1)
    return Folded(weight, None)


def _plain(couplings: Sequence[ConditionalCoupling]) -> bool:
    r"""Whether the networks of all couplings are of the same size and what they were made as, and
    nobody listens to their layers, so that the couplings may be computed together."""
    modules: list[nn.Module] = []
    for c in couplings:
        if type(c).condition is not ConditionalCoupling.condition or "condition" in vars(c):
            return False
        nets = [(c.injector, FIRST + LATER), (c.rest, LATER)]
        nets += [] if c.noise is None else [(c.noise, FIRST + LATER)]
        for net, kinds in nets:
            if type(net) is not nn.Sequential or len(net) != len(kinds):
                return False
            if not all(map(_is_made_as, net, kinds)):
                return False
            modules += [net, *net]
        if not (_is_made_as(c.first_context, 3) and _is_made_as(c.first_kept, 3)):
            return False
        if type(c.first_kept) is not nn.Conv2d or c.first_kept.bias is not None:
            return False
        modules += [c.first_context, c.first_kept]
    sizes = {(c.first_context.weight.shape, c.injector[0].weight.shape) for c in couplings}
    return len(sizes) == 1 and unhooked(*modules)


def _is_made_as(layer: nn.Module, size: int) -> bool:
    r"""Whether it is a layer of a coupling: a convolution with a kernel of this size, or an
    activation for a size of zero."""
    if size == 0:
        return type(layer) is nn.ReLU
    if not isinstance(layer, nn.Conv2d) or type(layer) not in KNOWN:
        return False
    if "_conv_forward" in vars(layer):  # as is done for other borders
        return False
    if isinstance(layer, NormedConv2d) and (type(layer.norm) is not ActNorm or layer.norm.pending):
        return False
    kernel = layer.kernel_size == (size, size) and layer.padding == (size // 2, size // 2)
    plain = layer.groups == 1 and layer.padding_mode == "zeros"
    return kernel and plain and layer.stride == layer.dilation == (1, 1)
