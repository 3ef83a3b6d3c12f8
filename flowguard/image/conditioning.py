r"""What the steps of a level need to know of a context, computed for all of them together.

The first layers of a coupling's two halves are convolutions over the same context, the widest of
the whole flow. One convolution with the weights of all steps does their work at once.
"""

__all__ = ["conditions", "convolve"]

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.image.coupling import Condition, ConditionalCoupling
from flowguard.image.layers import ActNorm, NormedConv2d, ZeroConv2d, folded
from flowguard.image.maps import work_out
from flowguard.image.ready import Ready, Weights, last_layers, mixes
from flowguard.image.steps import FlowStep

#: The most numbers of hidden channels that are held at a time.
BUDGET = 2**25


def conditions(
    steps: Sequence[FlowStep], context: Tensor, noises: Sequence[Tensor | None]
) -> list[Condition]:
    r"""Returns what the coupling of each step makes of a context.

    Without gradients the steps are computed together, and made ready to be run many times. With
    them, or for layers that are not what the coupling was made of (hooked, parametrised, quantised
    or not initialised ones), :meth:`ConditionalCoupling.condition` is called for each.

    Arguments:
        steps: The steps of a level.
        context: Their context, with shape :math:`(B, C, H, W)`.
        noises: The noise map of each, or :py:`None`.
    """
    couplings = [step.coupling for step in steps]
    if torch.is_grad_enabled() or not all(map(_plain, couplings)):
        return [c.condition(context, n) for c, n in zip(couplings, noises, strict=True)]
    couplings[0].check_context(context)
    pixel_maps = mixes([s.actnorm for s in steps], [s.mix for s in steps])
    width = 2 * couplings[0].first_kept.out_channels * context.shape[0]
    together = max(1, BUDGET // max(1, width * context.shape[-2] * context.shape[-1]))
    made: list[Condition] = []
    for start in range(0, len(couplings), together):
        part = slice(start, start + together)
        shared = zip(couplings[part], noises[part], pixel_maps[part], strict=True)
        hidden = _convolve([c.first_context for c in couplings[part]], context)
        injected = _convolve([c.injector[0] for c in couplings[part]], context)
        for (c, noise, (there, back)), h, i in zip(shared, hidden, injected, strict=True):
            raw = last_layers([_weights(c.injector[2]), _weights(c.injector[4])], i)
            channels = c.kept + c.changed
            family, parameters = work_out(c.map_of("injector"), raw, channels, overwrite=True)
            ready = Ready(there, back, _first(c), _rest(c), _noise(c))
            made.append(Condition(parameters, h, c.fit_noise(noise, context), ready, family))
    return made


def _convolve(convs: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    r"""Applies several 3×3 convolutions to the same input."""
    weights, biases = zip(*(folded(conv) for conv in convs), strict=True)
    y = convolve(x, torch.cat(weights))
    # The bias is added in place, part by part: each becomes a tensor of its own.
    shares = zip(y.chunk(len(convs), dim=1), biases, strict=True)
    return [t.contiguous() if b is None else t + b[:, None, None] for t, b in shares]


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
    y = F.conv2d(x[:, ~coarse], weight[:, ~coarse], padding=1)
    blocks, weight = F.pad(x[:, coarse, ::2, ::2], (1, 1, 1, 1)), weight[:, coarse]
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    for i in (0, 1):
        for j in (0, 1):
            kernel = _on_blocks(_on_blocks(weight, 2, i), 3, j)
            part = blocks[..., i : i + height + 1, j : j + width + 1]
            y[..., i::2, j::2] += F.conv2d(part, kernel)
    return y


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


def _weights(conv: nn.Module) -> Weights:
    return Weights(*folded(conv))


def _first(coupling: ConditionalCoupling) -> Weights:
    weight, norm = coupling.first_kept.weight, getattr(coupling.first_context, "norm", None)
    if norm is not None:
        weight = weight * torch.exp(norm.logs).reshape(-1, 1, 1, 1)
    return Weights(weight, None)


def _rest(coupling: ConditionalCoupling) -> tuple[Weights, Weights]:
    return _weights(coupling.rest[1]), _weights(coupling.rest[3])


def _noise(coupling: ConditionalCoupling) -> tuple[Weights, Weights, Weights] | None:
    if coupling.noise is None:
        return None
    first, middle, last = (_weights(coupling.noise[i]) for i in (0, 2, 4))
    return first, middle, last


def _plain(coupling: ConditionalCoupling) -> bool:
    nets = [coupling.injector, coupling.rest, coupling.first_context, coupling.first_kept]
    for module in (m for net in (*nets, coupling.noise) if net is not None for m in net.modules()):
        if isinstance(module, nn.Sequential | nn.ReLU):
            continue
        known = type(module) in (nn.Conv2d, NormedConv2d, ZeroConv2d, ActNorm)
        if not known or module._forward_hooks or module._forward_pre_hooks:
            return False
        if isinstance(module, ActNorm) and module.pending:
            return False
    return True
