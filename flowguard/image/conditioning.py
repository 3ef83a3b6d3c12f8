r"""What the couplings of a level need to know of a context, computed for all of them together.

The first layers of a coupling's two halves are convolutions over the same context, the widest of
the whole flow. One convolution with the weights of all steps does their work at once.
"""

__all__ = ["conditions"]

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.image.coupling import Condition, ConditionalCoupling
from flowguard.image.layers import NormedConv2d, ZeroConv2d, folded

#: The most numbers of hidden channels that are held at a time.
BUDGET = 2**25


def conditions(
    couplings: Sequence[ConditionalCoupling],
    context: Tensor,
    noises: Sequence[Tensor | None],
) -> list[Condition]:
    r"""Returns what each coupling's own :meth:`ConditionalCoupling.condition` returns.

    With gradients, for hidden layers that are not initialised, or for layers that are not what
    the coupling was made of (hooked, parametrised or quantised ones), it is called for each.

    Arguments:
        couplings: The couplings of a level.
        context: Their context, with shape :math:`(B, C, H, W)`.
        noises: The noise map of each, or :py:`None`.
    """
    if torch.is_grad_enabled() or not all(map(_plain, couplings)):
        return [c.condition(context, n) for c, n in zip(couplings, noises, strict=True)]
    made: list[Condition] = []
    width = 2 * couplings[0].first_kept.out_channels * context.shape[0]
    together = max(1, BUDGET // max(1, width * context.shape[-2] * context.shape[-1]))
    for start in range(0, len(couplings), together):
        part = slice(start, start + together)
        made += _together(couplings[part], context, noises[part])
    return made


def _together(
    couplings: Sequence[ConditionalCoupling],
    context: Tensor,
    noises: Sequence[Tensor | None],
) -> list[Condition]:
    couplings[0].check_context(context)
    n = len(couplings)
    hidden = _conv([c.first_context for c in couplings], context).chunk(n, dim=1)
    injected = _conv([c.injector[0] for c in couplings], context).relu_().chunk(n, dim=1)
    made = []
    for c, h, i, noise in zip(couplings, hidden, injected, noises, strict=True):
        raw = c.injector[4](c.injector[2](i).relu_())
        made.append(Condition(raw, h, c.fit_noise(noise, context)))
    return made


def _conv(convs: Sequence[nn.Module], x: Tensor) -> Tensor:
    r"""Applies several 3×3 convolutions to the same input, one after the other in the channels."""
    weights, biases = zip(*(folded(conv) for conv in convs), strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    return F.conv2d(x, torch.cat(weights), bias, padding=1)


def _plain(coupling: ConditionalCoupling) -> bool:
    first, middle, last = (coupling.injector[i] for i in (0, 2, 4))
    for conv in (coupling.first_context, first, middle, last):
        if type(conv) not in (nn.Conv2d, NormedConv2d, ZeroConv2d) or conv._forward_hooks:
            return False
        if isinstance(conv, NormedConv2d) and conv.norm.pending:
            return False
    return True
