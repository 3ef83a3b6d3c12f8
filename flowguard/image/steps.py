r"""The steps of an image flow, and the split at which channels leave as a latent."""

__all__ = ["FlowStep", "Mix", "Split", "TransitionStep"]

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.functional import bounded, saturate
from flowguard.image.coupling import Condition, ConditionalCoupling, Inner, crop
from flowguard.image.layers import (
    ActNorm,
    FixedConv1x1,
    FoldedMix,
    InvertibleConv1x1,
    OrthogonalConv1x1,
    ZeroConv2d,
)
from flowguard.image.maps import Coupling
from flowguard.numerics import repeat_rows

#: The 1×1 convolutions that a step can have.
Mix = FixedConv1x1 | InvertibleConv1x1 | OrthogonalConv1x1
MIXES: dict[str, type[Mix]] = {
    "fixed": FixedConv1x1,
    "free": InvertibleConv1x1,
    "orthogonal": OrthogonalConv1x1,
}


class _Mixing(nn.Module):
    r"""What a step begins with: activation normalisation and 1×1 convolution, or both in one."""

    def __init__(self, channels: int, mix: str) -> None:
        super().__init__()
        if mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}; got {mix!r}")
        self.actnorm = ActNorm(channels)
        self.mix: Mix = MIXES[mix](channels)

    def _there(self, x: Tensor, folded: FoldedMix | None) -> tuple[Tensor, Tensor]:
        if folded is not None:
            return folded.forward(x)
        x, a = self.actnorm(x)
        x, b = self.mix(x)
        return x, a + b

    def _back(self, z: Tensor, folded: FoldedMix | None) -> tuple[Tensor, Tensor]:
        if folded is not None:
            return folded.inverse(z)
        z, b = self.mix.inverse(z)
        z, a = self.actnorm.inverse(z)
        return z, a + b


class TransitionStep(_Mixing):
    r"""Creates a step without coupling: activation normalisation and 1×1 convolution.

    Arguments:
        channels: The number of channels.
        mix: The 1×1 convolution; see :class:`FlowStep`.

    Raises:
        ValueError: If there is no mix of that name.

    Example:
        >>> z, ladj = TransitionStep(12)(torch.randn(2, 12, 4, 4))
        >>> ladj.shape
        torch.Size([2])
    """

    def __init__(self, channels: int, *, mix: str = "free") -> None:
        super().__init__(channels, mix)

    def forward(self, x: Tensor, folded: FoldedMix | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise.

        Arguments:
            x: The data, with shape :math:`(B, C, H, W)`.
            folded: The step with its weights folded; see :meth:`inverse`.

        Returns:
            The noise, with the same shape, and the log-determinant, with shape :math:`(B)`.
        """
        return self._there(x, None if torch.is_grad_enabled() else folded)

    def inverse(self, z: Tensor, folded: FoldedMix | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data.

        Arguments:
            z: The noise, with shape :math:`(B, C, H, W)`.
            folded: The step with its weights folded, if they are; taken where no gradient is
                asked for.

        Returns:
            The data, with the same shape, and the log-determinant, with shape :math:`(B)`.
        """
        return self._back(z, None if torch.is_grad_enabled() else folded)


class FlowStep(_Mixing):
    r"""Creates a step: activation normalisation, 1×1 convolution, conditional coupling.

    Arguments:
        channels: The number of channels.
        context_channels: The number of channels of the context.
        hidden: The number of channels of the hidden layers.
        coupling: The elementwise map; see :func:`flowguard.image.elementwise`.
        mix: The 1×1 convolution: ``"free"``, as in Glow; ``"orthogonal"``, a learned rotation;
            or ``"fixed"``, a rotation that is not trained.
        normed: Whether the hidden layers are normalised; see :class:`ConditionalCoupling`.
        noise_channels: The number of channels of the noise map, if the coupling knows of noise.

    Raises:
        ValueError: If there is no mix of that name.

    Example:
        >>> step = FlowStep(12, 8, hidden=16)
        >>> z, ladj = step(torch.randn(2, 12, 4, 4), torch.randn(2, 8, 4, 4))
        >>> ladj.shape
        torch.Size([2])
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        hidden: int = 64,
        coupling: Coupling = "robust",
        mix: str = "free",
        normed: bool = False,
        noise_channels: int = 0,
    ) -> None:
        super().__init__(channels, mix)
        self.coupling = ConditionalCoupling(
            channels,
            context_channels,
            hidden=hidden,
            coupling=coupling,
            normed=normed,
            noise_channels=noise_channels,
        )

    def forward(
        self, x: Tensor, context: Tensor | Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise.

        Arguments:
            x: The data, with shape :math:`(B, C, H, W)`.
            context: The context, with shape :math:`(B, *, H, W)`, or what the coupling's
                `condition` made of it.

        Returns:
            The noise, with the same shape, and the log-determinant, with shape :math:`(B)`.
        """
        x, b = self._there(x, _folded(context))
        x, c = self.coupling(x, context)
        return x, b + c

    def inverse(
        self, z: Tensor, context: Tensor | Condition | None = None, ladj: bool = True
    ) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        z, c = self.coupling.inverse(z, context, ladj=ladj)
        z, b = self._back(z, _folded(context))
        return z, b + c


def _folded(context: Tensor | Condition | None) -> FoldedMix | None:
    if torch.is_grad_enabled() or not isinstance(context, Condition):
        return None
    return context.mix


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

    Raises:
        ValueError: If there are fewer than two channels, or the share is not between 0 and 1.

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
        return f"kept={self.kept}, dropped={self.dropped}"

    def prior(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        r"""Returns mean and log-scale of what leaves.

        Arguments:
            kept: The channels that remain, with shape :math:`(B, C, H, W)`.
            context: The context, with shape :math:`(B, *, H, W)`, or :py:`None` if there is none.

        Returns:
            Both with the shape of what leaves.

        Raises:
            ValueError: If the split is conditional and there is no context.
        """
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
        r"""Takes data to noise: half of the channels leave.

        Arguments:
            x: All channels, with shape :math:`(B, C + C', H, W)`.
            context: The context, with shape :math:`(B, *, H, W)`, or :py:`None` if there is none.
            inner: What is returned of them, if not all; for tiles.

        Returns:
            The channels that remain, with shape :math:`(B, C, H, W)`, the noise of those that
            leave, with shape :math:`(B, C', H, W)`, and the log-determinant, with shape
            :math:`(B)`.

        Raises:
            ValueError: If the split is conditional and there is no context.
        """
        kept, dropped = x.tensor_split((self.kept,), dim=1)
        mean, logs = (crop(t, inner) for t in self.prior(kept, context))
        kept, dropped = crop(kept, inner), crop(dropped, inner)
        return kept, (dropped - mean) * torch.exp(-logs), -logs.flatten(1).sum(1)

    def inverse(
        self,
        kept: Tensor,
        latent: Tensor,
        context: Tensor | None = None,
        inner: Inner | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data: what left joins the channels that remained.

        Arguments:
            kept: The channels that remained, with shape :math:`(B, C, H, W)`.
            latent: The noise of those that left, with shape :math:`(B, C', H, W)`.
            context: The context, with shape :math:`(B, *, H, W)`, or :py:`None` if there is none.
            inner: What is returned of them, if not all; for tiles.

        Returns:
            All channels, with shape :math:`(B, C + C', H, W)`, and the log-determinant, with shape
            :math:`(B)`.

        Raises:
            ValueError: If the split is conditional and there is no context.
        """
        mean, logs = (crop(t, inner) for t in self.prior(kept, context))
        dropped = crop(latent, inner) * torch.exp(logs) + mean
        return torch.cat((crop(kept, inner), dropped), dim=1), logs.flatten(1).sum(1)


def saturated(x: Tensor, bound: float | None) -> Tensor:
    r"""Squashes into a bound, and is the identity well within it; :py:`None` for no bound."""
    return x if bound is None else saturate(x, bound)
