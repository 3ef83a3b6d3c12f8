r"""Encoders: from a condition image to one feature map for each level of a flow."""

__all__ = ["PyramidEncoder"]

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.models.store import Recorded


class ResidualBlock(nn.Module):
    r"""Creates a residual block of two 3×3 convolutions.

    Arguments:
        channels: The number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        r"""Returns maps with the shape of the input."""
        return x + 0.2 * self.second(F.leaky_relu(self.first(x), 0.2))


class PyramidEncoder(Recorded, nn.Module):
    r"""Creates a small convolutional encoder that gives one feature map for each level.

    The map of level :math:`l` (1 is the finest) has the size of the flow's image over
    :math:`2^l`: for a flow that upscales by `scale`, that is `scale` :math:`/ 2^l` times the size
    of the condition. Finer maps come from nearest-neighbour upsampling and a convolution, coarser
    ones from averaging and a convolution.

    Arguments:
        channels: The number of channels of each map.
        scale: The upscaling factor, a power of two.
        levels: The number of levels.
        blocks: The number of residual blocks at the size of the condition.
        in_channels: The number of channels of the condition.

    The condition has shape :math:`(B, in\_channels, H, W)`, its size a multiple of
    :math:`2^L /` `scale` where that is above one.

    Raises:
        ValueError: If the scale is no power of two.

    Example:
        >>> encoder = PyramidEncoder(16, scale=4, levels=3)
        >>> [tuple(f.shape) for f in encoder(torch.rand(1, 3, 8, 10))]
        [(1, 16, 16, 20), (1, 16, 8, 10), (1, 16, 4, 5)]
    """

    def __init__(
        self,
        channels: int,
        *,
        scale: int = 4,
        levels: int = 2,
        blocks: int = 3,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if scale < 1 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two; got {scale}")
        self.in_channels = in_channels
        self.channels = channels
        self.scale = scale
        self.levels = levels
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        # The level whose map has the size of the condition; it may lie outside 1 … levels.
        own = scale.bit_length() - 1
        self.own = own
        self.up = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(max(own - 1, 0))
        )
        self.down = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(max(levels - own, 0))
        )

    def forward(self, y: Tensor) -> list[Tensor]:
        r"""Returns the map of each level, finest first, of images with shape :math:`(B, 3, H, W)`."""
        # Pixels in [0, 1] become numbers around zero.
        # Under autocast the convolutions take half precision, and what the blocks add to does not.
        own = self.body(self.first(y - 0.5).to(y.dtype))
        finer = [own]
        for conv in self.up:
            grown = F.interpolate(finer[0], scale_factor=2.0, mode="nearest")
            finer.insert(0, F.leaky_relu(conv(grown), 0.2))
        coarser = [own]
        for conv in self.down:
            coarser.append(F.leaky_relu(conv(F.avg_pool2d(coarser[-1], 2)), 0.2))
        maps = (finer if self.own > 0 else []) + coarser[1:]
        return maps[: self.levels]
