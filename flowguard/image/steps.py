r"""The steps of an image flow."""

__all__ = ["FlowStep", "TransitionStep"]

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.image.coupling import Condition, ConditionalCoupling
from flowguard.image.layers import (
    ActNorm,
    FixedConv1x1,
    InvertibleConv1x1,
    OrthogonalConv1x1,
)
from flowguard.image.maps import Coupling
from flowguard.image.ready import Mix, PixelMaps, Ready

MIXES: dict[str, type[Mix]] = {
    "fixed": FixedConv1x1,
    "free": InvertibleConv1x1,
    "orthogonal": OrthogonalConv1x1,
}


class TransitionStep(nn.Module):
    r"""Creates a step without coupling: activation normalisation and 1×1 convolution.

    Arguments:
        channels: The number of channels.
        mix: The 1×1 convolution; see :class:`FlowStep`.

    Example:
        >>> z, ladj = TransitionStep(12)(torch.randn(2, 12, 4, 4))
        >>> ladj.shape
        torch.Size([2])
    """

    def __init__(self, channels: int, *, mix: str = "free") -> None:
        super().__init__()
        if mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}; got {mix!r}")
        self.actnorm = ActNorm(channels)
        self.mix: Mix = MIXES[mix](channels)

    def forward(self, x: Tensor, ready: PixelMaps | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        if ready is not None and not torch.is_grad_enabled():
            return ready[0](x)
        x, a = self.actnorm(x)
        x, b = self.mix(x)
        return x, a + b

    def inverse(self, z: Tensor, ready: PixelMaps | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        if ready is not None and not torch.is_grad_enabled():
            return ready[1](z)
        z, b = self.mix.inverse(z)
        z, a = self.actnorm.inverse(z)
        return z, a + b


class FlowStep(nn.Module):
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
        super().__init__()
        if mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}; got {mix!r}")
        self.actnorm = ActNorm(channels)
        self.mix: Mix = MIXES[mix](channels)
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
        r"""Takes data to noise; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        ready = _ready(context)
        if ready is not None:
            x, b = ready.forward_mix(x)
        else:
            x, a = self.actnorm(x)
            x, b = self.mix(x)
            b = a + b
        x, c = self.coupling(x, context)
        return x, b + c

    def inverse(
        self, z: Tensor, context: Tensor | Condition | None = None, ladj: bool = True
    ) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        z, c = self.coupling.inverse(z, context, ladj=ladj)
        ready = _ready(context)
        if ready is not None:
            z, b = ready.inverse_mix(z)
            return z, b + c
        z, b = self.mix.inverse(z)
        z, a = self.actnorm.inverse(z)
        return z, a + b + c


def _ready(context: Tensor | Condition | None) -> Ready | None:
    if torch.is_grad_enabled() or not isinstance(context, Condition):
        return None
    return context.ready
