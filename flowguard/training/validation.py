r"""What is measured of a model while it is trained."""

__all__ = [
    "Measured",
    "Part",
    "Wholes",
    "luma",
    "luma_psnr",
    "luma_ssim",
    "measure",
    "restored",
    "sound",
    "split_off",
]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from flowguard import metrics
from flowguard.io.folder import Fault
from flowguard.io.pictures import ImageError, whole_numbers
from flowguard.models.base import ImageModel
from flowguard.training.pictures import Pair, Pairs

#: The luminance of ITU-R BT.601 in the range of video, as super-resolution is measured by.
LUMA, LUMA_OFFSET = (65.481 / 255, 128.553 / 255, 24.966 / 255), 16 / 255
#: Of how many pictures one is held out, where there is no folder to validate with.
EVERY, MOST = 20, 100

#: Figures by name.
Measured = Mapping[str, float]


class Part(Pairs):
    r"""Creates a part of a source of pairs.

    Arguments:
        pairs: The source.
        numbers: The numbers of the pairs that are in it.
    """

    def __init__(self, pairs: Pairs, numbers: Sequence[int]) -> None:
        self.pairs, self.numbers = pairs, list(numbers)
        self.scale, self.sources = pairs.scale, pairs.sources
        self.prepares = pairs.prepares
        self.sizes = [pairs.sizes[i] for i in self.numbers]

    def lost(self) -> set[int]:
        r"""Returns the numbers of the pairs of which a file is known to be corrupt."""
        lost = self.pairs.lost()
        return {i for i, number in enumerate(self.numbers) if number in lost}

    def file(self, index: int) -> Path:
        r"""Returns the file of a target.

        Arguments:
            index: The number of the pair.
        """
        if isinstance(self.pairs, Part):
            return self.pairs.file(self.numbers[index])
        return self.sources[0].files[self.numbers[index]]

    def fetch(self, index: int, *rest: Any) -> tuple[Any, ...]:
        r"""Returns what a crop is made of."""
        return self.pairs.fetch(self.numbers[index], *rest)

    def finish(self, fetched: Sequence[tuple[Any, ...]]) -> list[Pair]:
        r"""Returns the crops."""
        return self.pairs.finish(fetched)

    def whole(self, index: int, rng: np.random.Generator) -> Pair:
        r"""Returns a whole pair."""
        return self.pairs.whole(self.numbers[index], rng)


def split_off(pairs: Pairs) -> tuple[Pairs, Pairs]:
    r"""Returns all pairs but every twentieth, and those: one at least, and some hundred at most.

    Arguments:
        pairs: The pairs.

    Raises:
        ValueError: If there is one alone.
    """
    count = len(pairs.sizes)
    if count < 2:
        raise ValueError(
            "there must be a folder to validate with, or two pictures, one of which is held out;"
            f" got {count} picture(s)"
        )
    every = max(EVERY, count // MOST)
    held_out = range(min(every, count) - 1, count, every)
    kept = [i for i in range(count) if i not in held_out]
    return Part(pairs, kept), Part(pairs, held_out)


def sound(pairs: Pairs) -> tuple[Pairs, list[Fault]]:
    r"""Returns the pairs that can be decoded, and the files that cannot.

    Arguments:
        pairs: The pairs.

    Raises:
        ValueError: If none can.
    """
    whole = Part(pairs, range(len(pairs.sizes)))
    kept, faults = [], []
    for i in whole.numbers:
        try:
            whole.whole(i, np.random.default_rng(0))
        except ImageError as error:
            faults.append(Fault(whole.file(i), str(error)))
        else:
            kept.append(i)
    if not kept:
        raise ValueError(
            f"there must be a picture to validate with that can be decoded; got {len(faults)} that"
            " cannot"
        )
    return Part(pairs, kept), faults


class Wholes(Dataset[Pair]):
    r"""Creates whole pairs: each is the same whenever it is asked for.

    Arguments:
        pairs: The source.
        seed: The seed of what is random in them.
    """

    def __init__(self, pairs: Pairs, seed: int = 0) -> None:
        self.pairs, self.seed = pairs, seed

    def __len__(self) -> int:
        return len(self.pairs.sizes)

    def __getitem__(self, index: int) -> Pair:
        r"""Returns target and condition, with shapes :math:`(3, sH, sW)` and :math:`(C, H, W)`."""
        return self.pairs.whole(index, np.random.default_rng((self.seed, index)))


def luma(image: Tensor) -> Tensor:
    r"""Returns the luminance of an RGB image, with shape :math:`(B, 1, H, W)`.

    References:
        | ITU-R BT.601, in the range of video

    Arguments:
        image: The image in :math:`[0, 1]`, with shape :math:`(B, 3, H, W)`.

    Example:
        >>> luma(torch.ones(1, 3, 1, 1)).item()
        0.9215...
    """
    weights = image.new_tensor(LUMA).reshape(3, 1, 1)
    return (image * weights).sum(1, keepdim=True) + LUMA_OFFSET


def luma_psnr(image: Tensor, target: Tensor, border: int) -> float:
    r"""Returns the PSNR of the luminance in dB, of images as files would hold them.

    Of images that are all border, as much is left out as leaves a pixel.

    Arguments:
        image: The image, with shape :math:`(1, 3, H, W)`.
        target: The truth.
        border: The rows and columns that are left out on each side.
    """
    first, second = _inner_luma(image, target, border, least=1)
    return float(-10 * torch.log10((first - second).square().mean()))


def luma_ssim(image: Tensor, target: Tensor, border: int) -> float:
    r"""Returns the structural similarity of the luminance of images as files would hold them; see
    :func:`flowguard.metrics.ssim`.

    Of images that are all border, as much is left out as leaves a window of it.

    Arguments:
        image: The image, with shape :math:`(1, 3, H, W)`.
        target: The truth.
        border: The rows and columns that are left out on each side.

    Raises:
        ImportError: If torchmetrics is not installed.
        ValueError: If the images are smaller than its window.

    Example:
        >>> image = torch.rand(1, 3, 24, 20)
        >>> luma_ssim(image, image, border=4)
        1.0
    """
    first, second = _inner_luma(image, target, border, least=metrics.WINDOW)
    return float(metrics.ssim(first, second))


def _inner_luma(image: Tensor, target: Tensor, border: int, least: int) -> list[Tensor]:
    r"""The luminance of both, without a border that leaves so many rows and columns at least."""
    border = min(border, *(max(0, n - least) // 2 for n in target.shape[-2:]))
    inner = slice(border, -border or None)
    return [luma(whole_numbers(i.double()) / 255)[..., inner, inner] for i in (image, target)]


def restored(lr: Tensor, scale: int) -> Tensor:
    r"""Returns the bicubic enlargement of an image.

    Arguments:
        lr: The image, with shape :math:`(B, 3, H, W)`.
        scale: The factor.
    """
    return F.interpolate(lr, scale_factor=float(scale), mode="bicubic")


#: The temperature of the samples that are measured beside those at 0.
TEMPERATURE = 0.8


@torch.no_grad()
def measure(model: ImageModel, x: Tensor, y: Tensor) -> Measured:
    r"""Returns what is measured of a picture.

    Arguments:
        model: The model, in evaluation mode.
        x: The target, with shape :math:`(1, 3, sH, sW)`.
        y: Its condition, with shape :math:`(1, C, H, W)`.

    Returns:
        ``bits_per_dim``; of the sample at temperature 0 ``psnr`` of the colours, ``psnr_y`` of the
        luminance without a border of the scale, and ``ssim``; of one at temperature 0.8 the same
        as ``sample_psnr`` and so on. Where the model enlarges, ``lr_psnr`` of both, and the
        ``bicubic_psnr_y`` beside.
    """
    scale = model.scale
    with torch.autocast(x.device.type, enabled=False):
        found = {"bits_per_dim": float(model.nll(x, y).mean())}
        found |= _quality(model.sample(y, 1, 0.0)[0], x, y, scale)
        if scale > 1:
            found["bicubic_psnr_y"] = luma_psnr(restored(y, scale), x, scale)
        sample = _quality(model.sample(y, 1, TEMPERATURE)[0], x, y, scale)
    return found | {f"sample_{name}": value for name, value in sample.items()}


def _quality(image: Tensor, x: Tensor, y: Tensor, scale: int) -> dict[str, float]:
    found = {"psnr_y": luma_psnr(image, x, scale if scale > 1 else 0)}
    found |= {"psnr": float(metrics.psnr(image, x)), "ssim": float(metrics.ssim(image, x))}
    if scale > 1:
        found["lr_psnr"] = float(metrics.lr_psnr(image, y, scale))
    return found
