r"""Pictures of pages, as files: photographs, maps of the guard, and where a sample breaks."""

__all__ = ["encoded", "guard_map", "marked", "seen", "shrunk"]

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowguard.demo.page import QUALITIES, STOPS
from flowguard.io.pictures import to_uint8
from flowguard.ood.report import NINES, LevelReport, nines

MARK = (255, 0, 170)  # what marks artefacts: a colour that photographs do not have


def seen(image: Tensor, within: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    r"""Returns an image in which a range of values is black to white.

    Arguments:
        image: The image, of any shape.
        within: The values that are black and white.
    """
    low, high = within
    return (image.detach().float().cpu() - low) / (high - low)


def encoded(image: Tensor, quality: int = QUALITIES[0]) -> bytes:
    r"""Returns an image as a small file: WebP, or JPEG where Pillow cannot write that.

    Arguments:
        image: The image in :math:`[0, 1]`, with shape :math:`(3, H, W)`; values beyond are cut,
            NaN is black.
        quality: The quality, from 1 to 95.

    Example:
        >>> len(encoded(torch.rand(3, 8, 8))) > 0
        True
    """
    return _lossy(to_uint8(image), quality)


def _lossy(pixels: Any, quality: int) -> bytes:
    from PIL import Image, features

    stream = io.BytesIO()
    if features.check("webp"):
        Image.fromarray(pixels).save(stream, format="WEBP", quality=quality, method=4)
    else:
        Image.fromarray(pixels).save(stream, format="JPEG", quality=quality, optimize=True)
    return stream.getvalue()


def shrunk(image: Tensor, side: int) -> Tensor:
    r"""Returns an image neither of whose sides exceeds a number of pixels, by averaging.

    Arguments:
        image: The image, with shape :math:`(C, H, W)`.
        side: The number of pixels.

    Example:
        >>> shrunk(torch.rand(3, 100, 300), 60).shape
        torch.Size([3, 20, 60])
    """
    height, width = image.shape[-2:]
    factor = max(height, width) / side
    if factor <= 1:
        return image
    size = (max(1, round(height / factor)), max(1, round(width / factor)))
    return F.adaptive_avg_pool2d(image[None].float(), size)[0]


def marked(image: Tensor, mask: Tensor, quality: int = 40) -> bytes:
    r"""Returns an image, grey and faint, with a mask over it, as a small file.

    Each pixel of the mask is drawn three pixels wide: a single one has to be seen.

    Arguments:
        image: The image in :math:`[0, 1]`, with shape :math:`(3, H, W)`.
        mask: What is marked, with shape :math:`(H, W)`.
        quality: The quality, from 1 to 95.
    """
    grey = 0.25 + 0.6 * (to_uint8(image).mean(-1, keepdims=True) / 255)
    wide = F.max_pool2d(mask.cpu().float()[None, None], 3, stride=1, padding=1)[0, 0].numpy() > 0
    pixels = np.where(wide[..., None], np.array(MARK), 255 * grey).round().astype(np.uint8)
    return _lossy(pixels, quality)


def _palette() -> list[int]:
    stops = np.array([[int(s[i : i + 2], 16) for i in (1, 3, 5)] for s in STOPS])
    at, knots = np.linspace(0, NINES, 256), np.linspace(0, NINES, len(STOPS))
    channels = [np.interp(at, knots, stops[:, c]) for c in range(3)]
    return [int(v) for v in np.stack(channels, axis=1).round().ravel()]


def guard_map(level: LevelReport) -> bytes:
    r"""Returns how far each pixel of the first condition is from the training set, as a PNG in the
    colours of :func:`flowguard.demo.page.scale`. What is not finite is as far as can be.

    Arguments:
        level: The report of one level.

    Raises:
        ValueError: If the level scores vectors, which have no map.
    """
    from PIL import Image

    scaled = (nines(level)[0].float().cpu() / NINES).clamp(0, 1).nan_to_num(1.0)
    image = Image.fromarray((255 * scaled).round().to(torch.uint8).numpy(), mode="P")
    image.putpalette(_palette())
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
