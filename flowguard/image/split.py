r"""The split of an image flow, at which channels leave as a latent."""

__all__ = ["Split"]

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.functional import bounded
from flowguard.image.coupling import Inner, crop
from flowguard.image.layers import ZeroConv2d
from flowguard.migration.inscribe import saturate
from flowguard.numerics import repeat_rows


class Split(nn.Module):
    r"""Creates a split: half of the channels leave as a latent, given those that remain.

    .. math:: \epsilon = (x_2 - \mu(x_1, y)) \, e^{-s(x_1, y)}

    with :math:`|\mu| \leq` `mean_bound` and :math:`|s| \leq` `scale_bound`, so that the inverse
    is bounded whatever remains and whatever the context is.

    Arguments:
        channels: The number of channels.
        context_channels: The number of channels of the context. If it is 0, mean and scale depend
            on what remains alone, as published.
        mean_bound: The bound of the mean. If :py:`None`, it is free, as published.
        scale_bound: The bound of the log-scale. If :py:`None`, it is free, as published.
        share: The share of the channels that leaves.

    For a tile of an image, `inner` names what is wanted of it; see
    :class:`flowguard.image.ConditionalCoupling`.

    Example:
        >>> split = Split(12, 8)
        >>> x, context = torch.randn(2, 12, 4, 4), torch.randn(2, 8, 4, 4)
        >>> rest, latent, ladj = split(x, context)
        >>> rest.shape, latent.shape
        (torch.Size([2, 6, 4, 4]), torch.Size([2, 6, 4, 4]))
    """

    def __init__(
        self,
        channels: int,
        context_channels: int = 0,
        *,
        mean_bound: float | None = 3.0,
        scale_bound: float | None = 2.0,
        share: float = 0.5,
    ) -> None:
        super().__init__()
        if channels < 2 or not 0 < share < 1:
            raise ValueError(
                "a split needs at least 2 channels and a share between 0 and 1;"
                f" got {channels} and {share}"
            )
        self.dropped = min(max(int(channels * share), 1), channels - 1)
        self.kept = channels - self.dropped
        self.context_channels = context_channels
        self.mean_bound = mean_bound
        self.scale_bound = scale_bound
        self.faithful = False  # whether the bounds spare what is well within them
        self.net = ZeroConv2d(self.kept + context_channels, 2 * self.dropped)

    def extra_repr(self) -> str:
        r"""Returns the numbers of channels that stay and that leave, for the printed module."""
        return f"kept={self.kept}, dropped={self.dropped}"

    def _prior(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.context_channels:
            if context is None:
                raise ValueError("a conditional split needs a context; got None")
            raw = self.net(torch.cat((kept, repeat_rows(context, kept)), dim=1))
        else:
            raw = self.net(kept)
        # Under autocast the network computes in half precision, the prior does not.
        mean, logs = raw.to(torch.promote_types(raw.dtype, kept.dtype)).chunk(2, dim=1)
        squash = saturated if self.faithful else bounded
        return squash(mean, self.mean_bound), squash(logs, self.scale_bound)

    def tame(self, mean_bound: float, scale_bound: float) -> None:
        r"""Bounds a free prior, without any change in the inner 80 % of the bounds.

        Arguments:
            mean_bound: The bound of the mean.
            scale_bound: The bound of the log-scale.
        """
        self.faithful = True
        self.mean_bound, self.scale_bound = mean_bound, scale_bound

    def forward(
        self, x: Tensor, context: Tensor | None = None, inner: Inner | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Parts the channels; returns what stays, the latent and the log-determinant of the
        latter."""
        kept, dropped = x.tensor_split((self.kept,), dim=1)
        mean, logs = (crop(t, inner) for t in self._prior(kept, context))
        kept, dropped = crop(kept, inner), crop(dropped, inner)
        return kept, (dropped - mean) * torch.exp(-logs), -logs.flatten(1).sum(1)

    def inverse(
        self,
        kept: Tensor,
        latent: Tensor,
        context: Tensor | None = None,
        inner: Inner | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Puts a latent back; returns all channels and the log-determinant."""
        mean, logs = (crop(t, inner) for t in self._prior(kept, context))
        dropped = crop(latent, inner) * torch.exp(logs) + mean
        return torch.cat((crop(kept, inner), dropped), dim=1), logs.flatten(1).sum(1)


def saturated(x: Tensor, bound: float | None) -> Tensor:
    r"""Squashes into a bound, and is the identity well within it; :py:`None` for no bound."""
    return x if bound is None else saturate(x, bound)
