r"""What models need to go over large images a tile at a time."""

__all__ = ["MEMORY", "TileSize", "bar", "check_sampling", "groups", "pixels_of"]

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Literal, SupportsFloat

from torch import Tensor
from tqdm import tqdm

from flowguard.image.flow import ConditionalMultiscaleFlow
from flowguard.image.tiling import Progress, tile_size

TileSize = int | Literal["auto"] | None

#: The most pixels of images that are made at a time: more take more memory, and no less time each.
TOGETHER = 2**18

#: The memory, in bytes, that tiles of the size ``"auto"`` take about.
MEMORY = 2**29


def pixels_of(tile: int | str, flow: ConditionalMultiscaleFlow, memory: float, rows: int) -> int:
    r"""Returns the height and width of a tile in pixels of the image.

    Arguments:
        tile: What the user said: a number of pixels, rounded up to what the flow takes, or
            ``"auto"``.
        flow: The flow.
        memory: The memory that ``"auto"`` may take, in bytes.
        rows: The number of images.
    """
    if tile == "auto":
        if isinstance(memory, bool) or not isinstance(memory, Real):
            raise TypeError(f"memory must be a number of bytes; got {memory!r}")
        if not 0 < memory < math.inf:
            raise ValueError(f"memory must be a positive and finite number of bytes; got {memory}")
        return tile_size(flow, memory, rows)
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ValueError(f"tile must be a positive number of pixels, 'auto' or None; got {tile!r}")
    return -(-tile // flow.multiple) * flow.multiple


def check_sampling(num_samples: int, temperature: float) -> None:
    r"""Refuses numbers of samples and temperatures that there are not."""
    if isinstance(num_samples, bool) or not isinstance(num_samples, Integral):
        raise TypeError(f"num_samples must be an integer; got {num_samples!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive; got {num_samples}")
    if isinstance(temperature, str) or not isinstance(temperature, SupportsFloat):
        raise TypeError(f"temperature must be a number; got {temperature!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative; got {temperature}")


def groups(samples: Tensor, pixels: int) -> Iterator[Tensor]:
    r"""Goes over latents with shape :math:`(n, B, *)`, as many samples at a time as suit images of
    that many pixels, with shape :math:`(k B, *)`."""
    together = max(1, TOGETHER // max(1, samples.shape[1] * pixels))
    return (part.flatten(0, 1) for part in samples.split(together))


@contextmanager
def bar(
    flow: ConditionalMultiscaleFlow, height: int, width: int, shown: bool
) -> Iterator[Progress]:
    r"""Shows how far the steps over all tiles of an image have come."""
    steps = sum(len(flow.steps_of(level)) for level in range(flow.levels))
    with tqdm(
        total=steps * height * width, unit="px", unit_scale=True, disable=not shown, leave=False
    ) as pbar:
        yield pbar.update
