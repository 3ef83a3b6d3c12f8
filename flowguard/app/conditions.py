r"""Photographs as they are dropped, and what sliders make of them."""

__all__ = [
    "EXAMPLES",
    "LARGEST",
    "LEAST",
    "MODES",
    "Changes",
    "Photograph",
    "changed",
    "darkened",
    "enlarged_from",
    "example",
    "opened",
]

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowguard import data
from flowguard.io import pictures
from flowguard.io.pictures import ImageError

#: The most pixels of a result: as many as a laptop makes in some seconds.
LARGEST = 768 * 512
#: The fewest rows and columns of a photograph, and of a condition.
LEAST = 16
#: How many times as long as wide a photograph may be.
LONGEST = 8
#: The most pixels that are decoded, of which each takes 12 bytes.
READ = 50_000_000

#: What can be chosen in place of a photograph of one's own, and the file that scikit-image ships.
EXAMPLES = {
    "cat": data.HELD_OUT_PHOTOGRAPH,
    "coffee": "coffee.png",
    "astronaut": "astronaut.png",
    **data.OTHER_WORLDS,
}

#: What is done to a photograph before it is enlarged.
MODES = ("reduce it first, so that the truth is known", "enlarge it as it is")
_UNCHANGED = 100  # the quality at which nothing is compressed


class Photograph(NamedTuple):
    r"""A photograph as it is worked with.

    Arguments:
        colour: The colours, with shape :math:`(3, H, W)`.
        told: What was done to it, in words; empty if nothing.
    """

    colour: Tensor
    told: str = ""


class Changes(NamedTuple):
    r"""What is done to a condition, in this order.

    Arguments:
        blur: The standard deviation of a Gaussian, in pixels; 0 for none.
        gain: What it is multiplied by; 1 for nothing.
        inversion: From 0, nothing, over 1, the negative, to beyond.
        noise: The standard deviation of normal noise; 0 for none.
        quality: The quality of JPEG, from 1 to 95, which cuts to :math:`[0, 1]`; 96 and more for
            none.
    """

    blur: float = 0.0
    gain: float = 1.0
    inversion: float = 0.0
    noise: float = 0.0
    quality: int = _UNCHANGED


def opened(path: str | os.PathLike[str]) -> Photograph:
    r"""Returns a photograph of a file, no larger than what is worked with.

    Arguments:
        path: The file, of any kind that :func:`flowguard.io.pictures.read` takes.

    Raises:
        ImageError: If it holds no picture that can be read, one of more than 50 million pixels, or
            one of fewer than 16 rows or columns.
        ImportError: If Pillow is not installed.
    """
    known = pictures.header(path)
    if known.height * known.width > READ:
        raise ImageError(
            f"a photograph must have at most {READ // 10**6} million pixels here; got"
            f" {known.width} × {known.height}: reduce it first"
        )
    return _fitted(pictures.read(path).colour)


def example(name: str) -> Photograph:
    r"""Returns one of the photographs that scikit-image ships.

    Arguments:
        name: Its name, of :data:`EXAMPLES`.

    Raises:
        ValueError: If there is none of that name.
        ImportError: If scikit-image is not installed.

    Example:
        >>> example("cat").colour.shape
        torch.Size([3, 300, 451])
    """
    if name not in EXAMPLES:
        raise ValueError(f"an example must be one of {', '.join(EXAMPLES)}; got {name!r}")
    return _fitted(data.photograph(EXAMPLES[name]))


def _fitted(colour: Tensor) -> Photograph:
    r"""A photograph, no longer and no larger than what is worked with."""
    height, width = colour.shape[-2:]
    if min(height, width) < LEAST:
        raise ImageError(
            f"a photograph must have at least {LEAST} rows and columns; got {width} × {height}"
        )
    told = f"{width} × {height} pixels"
    longest = LONGEST * min(height, width)
    if max(height, width) > longest:
        top, left = (max(0, (n - longest) // 2) for n in (height, width))
        colour = colour[:, top : top + longest, left : left + longest]
        told += f", cut to its middle {colour.shape[-1]} × {colour.shape[-2]}"
    if colour[0].numel() > LARGEST:
        colour = reduced(colour, LARGEST)
        told += f", reduced to {colour.shape[-1]} × {colour.shape[-2]} for an answer in seconds"
    return Photograph(colour, told)


def reduced(colour: Tensor, most: int) -> Tensor:
    r"""Returns a picture of no more pixels than a number, in the same proportions.

    Arguments:
        colour: The picture, with shape :math:`(3, H, W)`.
        most: The number.

    Example:
        >>> reduced(torch.zeros(3, 300, 400), 120_000 // 4).shape
        torch.Size([3, 150, 200])
    """
    height, width = colour.shape[-2:]
    if height * width <= most:
        return colour
    factor = (most / (height * width)) ** 0.5
    size = [max(1, int(n * factor)) for n in (height, width)]
    return F.interpolate(colour[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def enlarged_from(photograph: Photograph, scale: int, mode: str) -> Photograph:
    r"""Returns what a super-resolution flow is asked to enlarge.

    Arguments:
        photograph: The photograph.
        scale: How many times it is enlarged.
        mode: One of :data:`MODES`.

    Raises:
        ValueError: If there is no such mode.

    Example:
        >>> enlarged_from(Photograph(torch.rand(3, 90, 64)), 4, MODES[0]).colour.shape
        torch.Size([3, 22, 16])
    """
    if mode not in MODES:
        raise ValueError(f"a mode must be one of {', '.join(MODES)}; got {mode!r}")
    if mode == MODES[0]:
        small = data.downsample(data.crop_to_multiple(photograph.colour, scale)[None], scale)[0]
        told = f"reduced {scale} times to {small.shape[-1]} × {small.shape[-2]}"
    else:
        small = reduced(photograph.colour, LARGEST // scale**2)
        if small is photograph.colour:
            return photograph
        told = (
            f"reduced to {small.shape[-1]} × {small.shape[-2]}, as the result has at most"
            f" {LARGEST:,} pixels here; flowguard superres makes larger ones"
        )
    return Photograph(small, "; ".join(filter(None, (photograph.told, told))))


def darkened(photograph: Photograph, exposure: float, seed: int = 0) -> Photograph:
    r"""Returns a photograph taken in the dark, by :func:`flowguard.data.expose`.

    Arguments:
        photograph: The photograph.
        exposure: What its light is multiplied by; 1 leaves it as it is.
        seed: The seed of the sensor's noise.

    Example:
        >>> dark = darkened(Photograph(torch.full((3, 16, 16), 0.5)), 0.1)
        >>> bool(dark.colour.mean() < 0.2), dark.told
        (True, 'taken in the dark, with 0.1 of its light')
    """
    if exposure == 1:
        return photograph
    generator = torch.Generator().manual_seed(seed)
    told = f"taken in the dark, with {exposure:g} of its light"
    dark = data.expose(photograph.colour, exposure, generator)
    return Photograph(dark, "; ".join(filter(None, (photograph.told, told))))


def changed(condition: Tensor, changes: Changes, seed: int = 0) -> Tensor:
    r"""Returns a condition after what is done to it.

    Arguments:
        condition: The condition, with shape :math:`(3, H, W)`.
        changes: What is done.
        seed: The seed of the noise.

    Raises:
        ValueError: If a number is not finite.

    Example:
        >>> changed(torch.full((3, 2, 2), 0.25), Changes(gain=2.0, inversion=1.0))[0]
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    for name, value in changes._asdict().items():
        if not abs(value) < float("inf"):
            raise ValueError(f"{name} must be a finite number; got {value}")
    y = data.blur(condition, changes.blur) * changes.gain
    y = y + changes.inversion * (1 - 2 * y)
    if changes.noise:
        generator = torch.Generator().manual_seed(seed)
        y = y + changes.noise * torch.randn(y.shape, generator=generator)
    return data.jpeg(y, int(changes.quality)) if changes.quality <= 95 else y
