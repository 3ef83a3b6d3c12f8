r"""Training pairs that are corrupted a little.

A flow that learned from clean photographs alone has seen no noise, no traces of compression and no
regular patterns, and makes of them what nobody taught it. A corrupted pair keeps a target that makes
sense: noise, compression and blur come to the condition alone, which is a worse shot of the same
picture; a pattern comes to both.
"""

__all__ = ["blurred", "compressed", "corrupted", "noisy", "patterned"]

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flowguard import data

Pair = tuple[Tensor, Tensor]
Change = Callable[[Tensor, np.random.Generator], Tensor]

#: The standard deviations of the noise, of a picture whose mean is one half.
LEAST_NOISE, MOST_NOISE = 0.01, 0.1
#: The qualities of JPEG.
LEAST_QUALITY, MOST_QUALITY = 30, 90
#: The standard deviations of the blur, in pixels of the condition.
LEAST_BLUR, MOST_BLUR = 0.3, 1.2
#: The widest squares and stripes of a pattern, in pixels of the condition.
WIDEST = 8
#: The least share of a pattern.
FAINTEST = 0.1


def noisy(condition: Tensor, rng: np.random.Generator) -> Tensor:
    r"""Adds normal noise, whose strength follows the brightness, and cuts to :math:`[0, 1]`.

    Arguments:
        condition: The condition, with shape :math:`(3, H, W)`.
        rng: The source of all that is random.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> bool(0.005 < noisy(torch.full((3, 64, 64), 0.5), rng).std() < 0.11)
        True
    """
    sigma = LEAST_NOISE * (MOST_NOISE / LEAST_NOISE) ** rng.random()
    drawn = torch.from_numpy(rng.standard_normal(condition.shape, dtype=np.float32))
    return (condition + 2 * sigma * condition.mean() * drawn.to(condition)).clamp(0, 1)


def compressed(condition: Tensor, rng: np.random.Generator) -> Tensor:
    r"""Compresses by JPEG.

    Arguments:
        condition: The condition, with shape :math:`(3, H, W)`.
        rng: The source of all that is random.

    Raises:
        ImportError: If Pillow is not installed.
    """
    return data.jpeg(condition, int(rng.integers(LEAST_QUALITY, MOST_QUALITY + 1)))


def blurred(condition: Tensor, rng: np.random.Generator) -> Tensor:
    r"""Blurs by a Gaussian.

    Arguments:
        condition: The condition, with shape :math:`(3, H, W)`.
        rng: The source of all that is random.

    Example:
        >>> rng, edge = np.random.default_rng(0), torch.zeros(3, 8, 8)
        >>> edge[..., 4:] = 1.0
        >>> bool(blurred(edge, rng)[0, 0, 3] > 0)
        True
    """
    sigma = LEAST_BLUR + (MOST_BLUR - LEAST_BLUR) * rng.random()
    return data.blur(condition, sigma, reach=4)


def patterned(target: Tensor, condition: Tensor, scale: int, rng: np.random.Generator) -> Pair:
    r"""Mixes a checkerboard, or stripes, of two colours into target and condition.

    Squares and stripes are 1 to 8 pixels of the condition wide; the target holds the same ones,
    `scale` times as wide.

    Arguments:
        target: The target, with shape :math:`(3, sH, sW)`.
        condition: The condition, with shape :math:`(3, H, W)`.
        scale: The factor :math:`s`.
        rng: The source of all that is random.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> hr, lr = patterned(torch.zeros(3, 32, 32), torch.zeros(3, 8, 8), 4, rng)
        >>> torch.equal(hr[:, ::4, ::4], lr)
        True
    """
    width = int(rng.integers(1, WIDEST + 1))
    down, right = (int(n) for n in rng.integers(2 * width, size=2))
    rows, columns = (
        torch.arange(n) // width
        for n in (condition.shape[-2] + 2 * width, condition.shape[-1] + 2 * width)
    )
    kind = int(rng.integers(4))  # half of all are checkerboards
    on_rows, on_columns = int(kind != 1), int(kind != 0)
    board = (on_rows * rows[:, None] + on_columns * columns) % 2
    board = board[down:, right:][: condition.shape[-2], : condition.shape[-1]]
    colours = torch.from_numpy(rng.random((2, 3, 1, 1))).to(condition)
    if rng.random() < 0.5:  # black and white, either way round
        colours = torch.tensor([0.0, 1.0]).to(condition).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    pattern = torch.where(board.bool(), colours[1], colours[0])
    share = FAINTEST + (1 - FAINTEST) * rng.random()
    large = pattern.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    return torch.lerp(target, large.to(target), share), torch.lerp(condition, pattern, share)


CHANGES: tuple[Change, ...] = (noisy, compressed, blurred)


def corrupted(
    target: Tensor,
    condition: Tensor,
    scale: int,
    rng: np.random.Generator,
    *,
    patterns: bool = True,
) -> Pair:
    r"""Corrupts a pair a little, in one of several ways.

    Arguments:
        target: The target, with shape :math:`(3, sH, sW)`.
        condition: The condition, with shape :math:`(3, H, W)`.
        scale: The factor :math:`s`.
        rng: The source of all that is random.
        patterns: Whether patterns are among the ways: every other time. A condition that is a dark
            shot of its target holds them at a brightness that nobody knows.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> target, condition = corrupted(torch.rand(3, 16, 16), torch.rand(3, 4, 4), 4, rng)
        >>> target.shape, condition.shape
        (torch.Size([3, 16, 16]), torch.Size([3, 4, 4]))
    """
    if patterns and rng.random() < 0.5:
        return patterned(target, condition, scale, rng)
    return target, CHANGES[int(rng.integers(len(CHANGES)))](condition, rng)
