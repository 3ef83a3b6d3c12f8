r"""The condition encoder of the published low-light flow, and what it is fed."""

__all__ = [
    "FirstGuess",
    "LowLightEncoder",
    "color_map",
    "equalization",
    "equalize_histogram",
    "low_light_input",
    "noise_map",
]

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.models.base import pad_to_multiple
from flowguard.models.encoders.rrdb import ResidualDenseTrunk, conv3x3, leaky, stack_maps
from flowguard.models.store import Recorded

#: The least brightness, which keeps the logarithm of black finite, and the greatest.
BLACK, FARTHEST = 1e-3, 1e20


def equalization(level: Tensor) -> Tensor:
    r"""Returns what :func:`equalize_histogram` makes of each grey level of a channel.

    Arguments:
        level: The grey levels, whole numbers from 0 to 255, with shape :math:`(*, N)`.

    Returns:
        The new levels, whole numbers as float32, with shape :math:`(*, 256)`.

    Example:
        >>> equalization(torch.tensor([10, 10, 20, 30]))[[10, 20, 30]]
        tensor([  0., 128., 255.])
    """
    counts = level.new_zeros((*level.shape[:-1], 256), dtype=torch.long)
    counts.scatter_add_(-1, level.long(), torch.ones_like(level, dtype=torch.long))
    total = level.shape[-1]
    cumulated = counts.cumsum(-1)
    # The darkest level's count: the first one of the cumulated counts that is not zero.
    darkest = cumulated.masked_fill(cumulated == 0, total).amin(-1, keepdim=True)
    # OpenCV computes 255 / (pixels - darkest) and its products in single precision.
    scale = torch.tensor(255.0, device=level.device) / (total - darkest).clamp_min(1).float()
    table = ((cumulated - darkest).clamp_min(0).float() * scale).round().clamp(0, 255)
    same = torch.arange(256, device=level.device, dtype=table.dtype)
    return torch.where(darkest == total, same, table)


def equalize_histogram(image: Tensor, table: Tensor | None = None) -> Tensor:
    r"""Equalises the histogram of each channel of each image, as OpenCV's ``equalizeHist`` does.

    Each grey level becomes the share of pixels that are at most as bright, not counting the
    darkest level, which becomes 0. A channel of one grey level is left as it is. Values are
    rounded to 8 bits first; those beyond [0, 1] are cut, NaN counts as black.

    Arguments:
        image: The images in :math:`[0, 1]`, with shape :math:`(B, C, H, W)`.
        table: What each grey level becomes, with shape :math:`(B, C, 256)`: the
            :func:`equalization` of the whole images of which these are parts. That of these images
            if there is none.

    Returns:
        The images, with values :math:`i / 255`, of the same shape and dtype.

    Example:
        >>> image = torch.tensor([10.0, 10.0, 20.0, 30.0]).reshape(1, 1, 2, 2) / 255
        >>> (255 * equalize_histogram(image)).round().flatten()
        tensor([  0.,   0., 128., 255.])
    """
    wide = image.detach().to(torch.promote_types(image.dtype, torch.float32))
    level = (255 * wide.nan_to_num(0.0).clamp(0, 1)).round().long().flatten(2)
    table = equalization(level) if table is None else table
    equalized = table.gather(2, level)
    return (equalized.to(wide.dtype) / 255).unflatten(2, image.shape[-2:]).to(image.dtype)


def low_light_input(low: Tensor, table: Tensor | None = None) -> Tensor:
    r"""Returns what the published low-light encoder is fed: logarithms and equalised images.

    .. math:: [\log(\max(y, 0) + 10^{-3}), \ \mathrm{equalize}(y)]

    Equalising looks at the whole image. To train on crops, make the input of the whole image and
    crop it after, or give the :func:`equalization` of the whole image with its crop.

    Arguments:
        low: The images in :math:`[0, 1]`, with shape :math:`(B, 3, H, W)`.
        table: What each grey level becomes, with shape :math:`(B, 3, 256)`; see
            :func:`equalize_histogram`.

    Returns:
        The input, with shape :math:`(B, 6, H, W)`.

    Example:
        >>> low_light_input(torch.zeros(1, 3, 4, 4))[0, :, 0, 0]
        tensor([-6.9078, -6.9078, -6.9078,  0.0000,  0.0000,  0.0000])
    """
    # Infinite light would become NaN, as a colour map's ∞ / ∞.
    light = low + BLACK
    logs = torch.log(light.clamp(BLACK, min(FARTHEST, torch.finfo(light.dtype).max)))
    return torch.cat((logs, equalize_histogram(low, table)), dim=1)


def color_map(image: Tensor) -> Tensor:
    r"""Returns each channel's share of a pixel, :math:`c_i / (\sum_j c_j + 10^{-4})`.

    Arguments:
        image: The images, not negative, with shape :math:`(B, C, H, W)`.

    Example:
        >>> color_map(torch.tensor([0.3, 0.1, 0.1]).reshape(1, 3, 1, 1)).flatten()
        tensor([0.5999, 0.2000, 0.2000])
    """
    return image / (image.sum(dim=1, keepdim=True) + 1e-4)


def noise_map(image: Tensor) -> Tensor:
    r"""Returns the greater of the absolute central differences in both directions.

    Beyond the border the image counts as zero, so that the outermost rows and columns hold half
    of their neighbours' values.

    Arguments:
        image: The images, with shape :math:`(B, C, H, W)`.

    Example:
        >>> noise_map(torch.ones(1, 1, 3, 3))[0, 0]
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.0000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """
    padded = F.pad(image, (1, 1, 1, 1))
    vertical = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    horizontal = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    return 0.5 * torch.maximum(vertical.abs(), horizontal.abs())


class FirstGuess(nn.Module):
    r"""Creates a small network that guesses the bright image, in :math:`[0, 1]`.

    Three convolutions: each pixel sees nine of them in each direction, and of the whole image
    what equalising says.

    Arguments:
        hidden: The width of its hidden layers.

    The input is what :func:`flowguard.models.encoders.lowlight.low_light_input` makes, with shape
    :math:`(B, 6, H, W)`; the guess has shape :math:`(B, 3, H, W)`.

    Raises:
        ValueError: If the width is not positive.

    Example:
        >>> guess = FirstGuess(hidden=8)
        >>> guess(low_light_input(torch.rand(1, 3, 4, 5))).shape
        torch.Size([1, 3, 4, 5])
    """

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be positive; got {hidden}")
        self.first = nn.Conv2d(6, hidden, 5, padding=2)
        self.second = conv3x3(hidden, hidden)
        self.last = conv3x3(hidden, 3)

    def forward(self, fed: Tensor) -> Tensor:
        r"""Returns the guess.

        Arguments:
            fed: The encoder's input, with shape :math:`(B, 6, H, W)`.
        """
        hidden = leaky(self.second(leaky(self.first(fed)))).to(self.last.weight.dtype)
        # Under autocast to half precision the last layer would round to grey levels.
        with torch.autocast(fed.device.type, enabled=False):
            guess: Tensor = self.last(hidden).sigmoid()
        return guess


class LowLightEncoder(Recorded, nn.Module):
    r"""Creates the condition encoder of LLFlow.

    It sees the logarithm of the dark image, the image with an equalised histogram, the colour map
    and the noise map, and gives one feature map for each level, with outputs of some blocks
    stacked onto it, and a colour map of the bright image. The parameters bear the published
    names.

    References:
        | Low-Light Image Enhancement with Normalizing Flow (Wang et al., 2022)
        | https://arxiv.org/abs/2109.05923

    Arguments:
        features: The number of channels of the trunk.
        growth: The number of channels that each convolution of a dense block adds.
        blocks: The number of residual-in-residual dense blocks.
        stacked: The blocks whose outputs are stacked onto each map, by their index from 0.
        levels: The number of levels :math:`L`.

    The condition is a dark image in :math:`[0, 1]` with shape :math:`(B, 3, H, W)`, or what
    :func:`flowguard.models.encoders.lowlight.low_light_input` made of it, with shape :math:`(B, 6, H, W)`; any :math:`H, W \geq 1`.
    A size that is no multiple of :math:`2^L` is padded by replication at the bottom and on the
    right, and the maps are those of the padded condition: that of level :math:`l` has
    :math:`1 / 2^l` times its size.

    Attributes:
        channels: The number of channels of each map, `features` times one more than there are
            stacked blocks.

    Raises:
        ValueError: If a number is not positive, a stacked block does not exist, or a condition
            has another shape than said above.

    Example:
        >>> encoder = LowLightEncoder(features=8, growth=4, blocks=2, stacked=(1,))
        >>> maps = encoder(torch.rand(1, 3, 37, 53))
        >>> [tuple(f.shape) for f in maps]
        [(1, 16, 20, 28), (1, 16, 10, 14), (1, 16, 5, 7)]
        >>> encoder.color_map(maps).shape
        torch.Size([1, 3, 40, 56])
    """

    def __init__(
        self,
        features: int = 64,
        growth: int = 32,
        blocks: int = 24,
        stacked: Sequence[int] = (1, 3, 5, 7),
        levels: int = 3,
    ) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels must be positive; got {levels}")
        self.features = features
        self.channels = features * (1 + len(stacked))
        self.levels = levels
        self.conv_first = conv3x3(12, features)
        self.conv_second = conv3x3(features, features)
        self.RRDB_trunk = ResidualDenseTrunk(features, growth, blocks=blocks, stacked=stacked)
        self.trunk_conv = conv3x3(features, features)
        for i in range(1, levels):
            self.add_module(f"downconv{i}", conv3x3(features, features))
        self.fine_tune_color_map = nn.Sequential(nn.Conv2d(features, 3, 1), nn.Sigmoid())

    def extra_repr(self) -> str:
        r"""Returns levels, stacked blocks and channels, for the printed module."""
        return f"levels={self.levels}, stacked={self.RRDB_trunk.stacked}, channels={self.channels}"

    @property
    def multiple(self) -> int:
        r"""What the size of a condition is padded to a multiple of."""
        return 2**self.levels

    def check(self, y: Tensor) -> None:
        r"""Refuses a condition that is neither dark images nor what :meth:`prepare` made of them.

        Arguments:
            y: The condition.

        Raises:
            ValueError: If it has neither shape :math:`(B, 3, H, W)` nor :math:`(B, 6, H, W)`.
        """
        if y.dim() != 4 or y.shape[1] not in (3, 6) or 0 in y.shape[-2:]:
            raise ValueError(
                "the condition must have shape (B, 3, H, W), or (B, 6, H, W) if it is prepared,"
                f" with H and W at least 1; got {tuple(y.shape)}"
            )

    def prepare(self, y: Tensor) -> Tensor:
        r"""Returns the input of the whole condition; see :func:`flowguard.models.encoders.lowlight.low_light_input`.

        Arguments:
            y: Dark images, with shape :math:`(B, 3, H, W)`, or what this method made of them,
                which is returned as it is.

        Returns:
            The input, with shape :math:`(B, 6, H, W)`.
        """
        self.check(y)
        return low_light_input(y) if y.shape[1] == 3 else y

    def forward(self, y: Tensor) -> list[Tensor]:
        r"""Returns the map of each level, finest first, of dark images with shape :math:`(B, 3, H,
        W)`."""
        y = pad_to_multiple(self.prepare(y), self.multiple)
        shares = color_map(torch.exp(y[:, :3]))
        x = self.conv_first(torch.cat((y, shares, noise_map(shares)), dim=1))
        head = F.max_pool2d(self.conv_second(leaky(x)), 2)
        head = head.to(y.dtype)  # single precision under autocast too: all blocks add to it
        last, stack = self.RRDB_trunk(head)
        maps = [head + self.trunk_conv(last)]
        for i in range(1, self.levels):
            halved = F.interpolate(maps[-1], scale_factor=0.5, mode="bilinear")
            below = getattr(self, f"downconv{i}")(halved)
            # The published network activates all maps but the first and the last.
            maps.append(leaky(below) if i < self.levels - 1 else below)
        return [stack_maps(m, stack) for m in maps]

    def color_map(self, maps: Sequence[Tensor]) -> Tensor:
        r"""Returns the predicted colour map of the bright image, in :math:`(0, 1)`.

        Arguments:
            maps: The encoder's feature maps.

        Returns:
            The colour map, with shape :math:`(B, 3, H, W)` of the padded condition.
        """
        finest = maps[0][:, : self.features]
        # A 1×1 convolution is the same before and after pixels are doubled.
        predicted: Tensor = self.fine_tune_color_map(finest)
        return F.interpolate(predicted, scale_factor=2.0)
