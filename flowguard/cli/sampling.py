r"""Samples of pictures of any size, in bounded memory."""

__all__ = ["latents_for", "sample"]

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flowguard.models.base import pad_to_multiple

WHOLE = 640 * 640  # pixels of a sample up to which "auto" takes the picture as a whole
CUT = 512  # rows and columns of the tiles beyond, in pixels of the sample
MARGIN = 96  # of a sample's rows and columns on each side of a tile, which are thrown away
FEATURES = 2**28  # bytes of feature maps up to which the encoder sees the picture as a whole,
PIXELS = 12 * 10**6  # and pixels of the sample, of which the flow then keeps some copies

Tile = int | str | None


def seed_of(seed: int, name: str, index: int) -> int:
    r"""Returns the seed of one sample of one picture: it depends on no other picture.

    Arguments:
        seed: The seed of the command.
        name: The name of the picture.
        index: The number of the sample.
    """
    told = f"{seed}/{name}/{index}".encode("utf-8", "surrogateescape")  # names of any bytes
    digest = hashlib.blake2b(told, digest_size=7).digest()
    return int.from_bytes(digest)


def latents_for(model: Any, y: Tensor, temperature: float, seed: int) -> list[Tensor]:
    r"""Returns the latents of one sample of the whole picture.

    Arguments:
        model: The model.
        y: The condition, with shape :math:`(1, C, H, W)`.
        temperature: The standard deviation.
        seed: The seed.
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same for every device
    return [
        torch.randn(1, *shape, generator=generator).mul_(temperature).to(y)
        for shape in model.latent_shapes(y)
    ]


@torch.no_grad()
def sample(
    model: Any,
    y: Tensor,
    latents: Sequence[Tensor],
    tile: Tile = "auto",
    precision: str | None = None,
) -> tuple[Tensor, list[Any]]:
    r"""Returns the sample that the latents give, and what the guard said of the condition.

    Where the feature maps of the whole picture fit, the flow alone goes in tiles, which agrees
    with the whole to rounding. Of larger pictures the condition is cut too, with a margin: far
    from a tile, the encoder and the guard then know nothing of the rest.

    Arguments:
        model: The model.
        y: The condition, with shape :math:`(1, 3, H, W)`.
        latents: The latents of the whole picture.
        tile: How the picture is cut: ``"auto"``, :py:`None` for not at all, or the number of rows
            and columns of the tiles, in pixels of the sample.
        precision: What the model's networks compute in, as its own methods take it.

    Returns:
        The sample, with shape :math:`(1, 3, H', W')`, and a report for each condition that the
        encoder saw; none if the model is not calibrated.
    """
    scale, how = model.scale, {} if precision is None else {"precision": precision}
    height, width = (scale * n for n in y.shape[-2:])
    if tile == "auto":
        tile = CUT if height * width > WHOLE else None
    if tile is None or int(tile) >= max(height, width):
        return model.decode(latents, y, **how), _reports(model)
    y = model.prepare(y)  # the histogram of a dark one is that of the whole picture
    if height * width <= PIXELS and _feature_bytes(model, y) <= FEATURES:
        return model.decode(latents, y, tile=int(tile), **how), _reports(model)
    return _tiled(model, y, latents, max(1, int(tile) // scale), scale, how)


def _feature_bytes(model: Any, y: Tensor) -> float:
    r"""What the feature maps of the condition take, judged by those of its corner."""
    corner = pad_to_multiple(y[..., :32, :32], 32)
    found = model.conditioner.encoder(corner)
    taken = sum(m.numel() * m.element_size() for m in found)
    return taken * y[0, 0].numel() / corner[0, 0].numel()


def _reports(model: Any) -> list[Any]:
    conditioner = model.conditioner
    return [conditioner.report] if conditioner.calibrated and conditioner.report else []


def _spans(
    size: int, tile: int, margin: int, multiple: int
) -> Iterator[tuple[int, int, int, int]]:
    r"""Each tile's first and last row, and those that it is computed from."""
    for first in range(0, size, tile):
        last = min(first + tile, size)
        start = max(0, first - margin) // multiple * multiple
        yield first, last, start, min(size, -(-(last + margin) // multiple) * multiple)


def _tiled(
    model: Any,
    y: Tensor,
    latents: Sequence[Tensor],
    tile: int,
    scale: int,
    how: dict[str, str],
) -> tuple[Tensor, list[Any]]:
    multiple = model.multiple
    height, width = y.shape[-2:]
    padded = [multiple * -(-n // multiple) for n in (height, width)]
    whole = y.new_empty(1, 3, scale * height, scale * width)
    margin, reports = -(-MARGIN // scale), []

    def part(z: Tensor, axis: int, start: int, end: int) -> Tensor:
        # A latent has a fixed number of rows for each `multiple` rows of the condition.
        grown = multiple * -(-end // multiple)
        a, b = (z.shape[axis] * n // padded[axis] for n in (start, grown))
        return z.narrow(axis, a, b - a)

    for top, bottom, i, j in _spans(height, tile, margin, multiple):
        for left, right, k, m in _spans(width, tile, margin, multiple):
            cut = [part(part(z, -2, i, j), -1, k, m) for z in latents]
            x = model.decode(cut, y[..., i:j, k:m], **how)
            reports += _reports(model)
            rows = slice(scale * (top - i), scale * (bottom - i))
            columns = slice(scale * (left - k), scale * (right - k))
            whole[..., scale * top : scale * bottom, scale * left : scale * right] = x[
                ..., rows, columns
            ]
    return whole, reports
