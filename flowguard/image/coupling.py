r"""The conditional coupling of image flows."""

__all__ = ["Condition", "ConditionalCoupling"]

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.image.layers import ZeroConv2d
from flowguard.image.maps import Elementwise, apply, elementwise


class Condition(NamedTuple):
    r"""What a coupling needs to know of the context, computed once for each context."""

    injected: Tensor  # parameters of the feature-conditional half
    hidden: Tensor  # the context's part of the first layer of the self-conditional half


class ConditionalCoupling(nn.Module):
    r"""Creates a conditional coupling with a feature-conditional and a self-conditional half.

    First all channels are transformed with parameters computed from the context, then the second
    half of the channels with parameters computed from the first half and the context.

    References:
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200

    Arguments:
        channels: The number of channels :math:`C`, at least 2.
        context_channels: The number of channels of the context.
        hidden: The number of channels of the hidden layers.
        coupling: The elementwise map, by name or as an object; see
            :func:`flowguard.image.elementwise`.

    The context has shape :math:`(B, context\_channels, H, W)`, or is what :meth:`condition` made
    of it. It may have fewer rows than `x`, where each stands for several samples: row :math:`i`
    of `x` then belongs to row :math:`i \bmod B` of the context.

    Example:
        >>> layer = ConditionalCoupling(12, 8, hidden=16)
        >>> x, context = torch.randn(2, 12, 4, 4), torch.randn(2, 8, 4, 4)
        >>> z, ladj = layer(x, context)
        >>> torch.allclose(z, x)  # starts as the identity
        True
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        hidden: int = 64,
        coupling: str | Elementwise = "robust",
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"a coupling needs at least 2 channels; got {channels}")
        self.map = elementwise(coupling)
        self.kept = channels // 2
        self.changed = channels - self.kept
        n = self.map.parameters
        self.injector = nn.Sequential(
            nn.Conv2d(context_channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            ZeroConv2d(hidden, channels * n),
        )
        # One convolution over [x, context], split such that the context's share is reusable.
        self.first_context = nn.Conv2d(context_channels, hidden, 3, padding=1)
        self.first_kept = nn.Conv2d(self.kept, hidden, 3, padding=1, bias=False)
        self.rest = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            ZeroConv2d(hidden, self.changed * n),
        )

    def extra_repr(self) -> str:
        return f"channels={self.kept + self.changed}, map={self.map}"

    def condition(self, context: Tensor) -> Condition:
        r"""Computes all that depends on the context alone.

        Arguments:
            context: The context, with shape :math:`(B, context\_channels, H, W)`.
        """
        channels = self.first_context.in_channels
        if context.dim() != 4 or context.shape[1] != channels:
            raise ValueError(
                f"the context must have shape (B, {channels}, H, W); got {tuple(context.shape)}"
            )
        return Condition(self.injector(context), self.first_context(context))

    def _raw(self, kept: Tensor, hidden: Tensor) -> Tensor:
        return self.rest(self.first_kept(kept) + hidden)

    def _match(self, x: Tensor, context: Tensor | Condition | None) -> Condition:
        if context is None:
            raise ValueError("a conditional coupling needs a context; got None")
        if isinstance(context, Tensor):
            context = self.condition(context)
        if context.hidden.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                f"the context must have the size {tuple(x.shape[-2:])} of the image at this level;"
                f" got {tuple(context.hidden.shape[-2:])}"
            )
        return Condition(repeat_rows(context.injected, x), repeat_rows(context.hidden, x))

    def forward(
        self, x: Tensor, context: Tensor | Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        injected, hidden = self._match(x, context)
        x, ladj = apply(self.map, x, injected, inverse=False)
        kept, changed = x.tensor_split((self.kept,), dim=1)
        changed, more = apply(self.map, changed, self._raw(kept, hidden), inverse=False)
        return torch.cat((kept, changed), dim=1), ladj + more

    def inverse(
        self, z: Tensor, context: Tensor | Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        injected, hidden = self._match(z, context)
        kept, changed = z.tensor_split((self.kept,), dim=1)
        changed, ladj = apply(self.map, changed, self._raw(kept, hidden), inverse=True)
        x, more = apply(self.map, torch.cat((kept, changed), dim=1), injected, inverse=True)
        return x, ladj + more


def repeat_rows(t: Tensor, x: Tensor) -> Tensor:
    r"""Repeats the batch of `t` until it has the rows of `x`."""
    if t.shape[0] == x.shape[0]:
        return t
    if t.shape[0] == 0 or x.shape[0] % t.shape[0]:
        raise ValueError(
            "the batch must be a multiple of the contexts' number;"
            f" got a batch of {x.shape[0]} and {t.shape[0]} contexts"
        )
    return t.repeat(x.shape[0] // t.shape[0], *(1,) * (t.dim() - 1))
