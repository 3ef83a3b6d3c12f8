r"""Flows over large images, a tile at a time.

A flow has a wide field of view: the encoder aside, a coupling sees four cells around, and there
are many. Tiles that are computed by themselves would need wide margins, and agree nearly. Here
every *step* goes over all tiles of the image before the next one starts, so that a tile needs what
one coupling sees, and is what it is in the whole image but for rounding. The image itself is held
as a whole, and so are its context maps; what takes memory, all that a step makes of them, is not.
"""

__all__ = [
    "HALO",
    "MEMORY",
    "Tile",
    "TileSize",
    "TiledFlow",
    "bar",
    "tile_size",
    "tiled_forward",
    "tiled_inverse",
    "tiles",
]

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from flowguard.image.coupling import Condition, ConditionalCoupling, Inner, crop, fit_noise
from flowguard.image.flow import ConditionalMultiscaleFlow, FlowCondition
from flowguard.image.steps import Split
from flowguard.numerics import cut

#: How many cells around a tile a coupling sees: two 3×3 convolutions of what two others made.
HALO = 4
#: The least tile, in cells of a level: below, the halo costs more than the tile.
LEAST = 16

#: The memory, in bytes, that tiles of the size ``"auto"`` take about.
MEMORY = 2**29

Progress = Callable[[int], object]
#: Rows and columns of tiles; ``"auto"`` for what fits the memory, :py:`None` for no tiles.
TileSize = int | Literal["auto"] | None


class Tile(NamedTuple):
    r"""A tile of a map."""

    outer: Inner  # the tile with its halo, in the map
    inner: Inner  # the tile in `outer`
    place: Inner  # the tile in the map


def tiles(shape: Sequence[int], size: int) -> Iterator[Tile]:
    r"""Goes over the tiles of a map.

    Arguments:
        shape: The shape of the map; height and width are its last two.
        size: The height and width of a tile.

    Example:
        >>> [t.place for t in tiles((20, 30), 20)]
        [(slice(0, 20, None), slice(0, 20, None)), (slice(0, 20, None), slice(20, 30, None))]
    """
    height, width = shape[-2:]
    for top in range(0, height, size):
        for left in range(0, width, size):
            parts = [_interval(top, size, height), _interval(left, size, width)]
            outer, inner, place = ((a, b) for a, b in zip(*parts, strict=True))
            yield Tile(outer, inner, place)


def _interval(start: int, size: int, end: int) -> tuple[slice, slice, slice]:
    stop = min(start + size, end)
    first, last = max(start - HALO, 0), min(stop + HALO, end)
    return slice(first, last), slice(start - first, stop - first), slice(start, stop)


def tile_size(flow: ConditionalMultiscaleFlow, memory: float, rows: int = 1) -> int:
    r"""Returns the largest tile, in pixels of the image, that takes about so much memory.

    Arguments:
        flow: The flow.
        memory: The memory in bytes, beyond that of the image and its context maps.
        rows: The number of images.

    Raises:
        ValueError: If the memory is too small for the least tile.

    Example:
        >>> flow = ConditionalMultiscaleFlow(3, 8, levels=2, steps=1, hidden=16)
        >>> tile_size(flow, 2**24) < tile_size(flow, 2**28)
        True
    """
    sizes = []
    for level in range(flow.levels):
        cell = max(_cell(step.coupling) for step in flow.steps_of(level))
        sizes.append((int((memory / (cell * max(rows, 1))) ** 0.5) - 2 * HALO) << (level + 1))
    least = LEAST << flow.levels
    size = min(sizes) // least * least
    if size < least:
        raise ValueError(
            f"the least tile, {least} pixels wide, takes more than {memory:.3g} bytes: allow more"
            " memory, or take fewer images at a time"
        )
    return size


def _cell(coupling: ConditionalCoupling) -> int:
    r"""About how many bytes a coupling takes for each cell."""
    weight = coupling.first_context.weight
    hidden, context = weight.shape[:2]
    channels = coupling.kept + coupling.changed
    numbers = 2 * context + 6 * hidden + channels * (3 * coupling.map.parameters + 24)
    return numbers * weight.element_size()


@torch.no_grad()
def tiled_forward(
    flow: ConditionalMultiscaleFlow,
    x: Tensor,
    context: Sequence[Tensor],
    size: int,
    noise: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[list[Tensor], Tensor]:
    r"""Takes images to latents, as the flow itself does, a tile at a time. Without gradients.

    Arguments:
        flow: The flow, in evaluation mode.
        x: The images, with shape :math:`(B, C, H, W)`.
        context: The context maps, one for each level.
        size: The height and width of a tile, in pixels.
        noise: The noise map; see :meth:`ConditionalMultiscaleFlow.condition`.
        progress: Called with the number of pixels after each tile of each step.

    Returns:
        The latents, and the log-determinant with shape :math:`(B)`.

    Example:
        >>> flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=2, hidden=16).eval()
        >>> x, context = torch.randn(1, 3, 96, 96), [torch.randn(1, 8, 48, 48)]
        >>> (z,), _ = tiled_forward(flow, x, context, 32)
        >>> torch.allclose(z, flow(x, context)[0][0], atol=1e-5)
        True
    """
    _check(flow, context, size)
    flow.latent_shapes(*x.shape[-2:])
    latents = []
    total = x.new_zeros(x.shape[0])
    for level, features in enumerate(context):
        x, _ = flow.squeeze(x)
        for transition in flow.transitions_of(level):
            x, ladj = transition(x)
            total = total + ladj
        for k, step in enumerate(flow.steps_of(level)):
            x, a = step.actnorm(x)
            x, b = step.mix(x)
            source, x = x, torch.empty_like(x)
            given = noise if flow.is_noisy(level, k) else None
            for tile, rows, condition in _conditions(step.coupling, features, size, level, given):
                for part in _parts(source, rows):
                    y, c = step.coupling(crop(source[part], tile.outer), condition, tile.inner)
                    x[part][..., tile.place[0], tile.place[1]] = y
                    total[part] = total[part] + c
                _tell(progress, tile, level)
            total = total + a + b
        split = flow.split_of(level)
        if split is not None:
            x, latent, ladj = _split_forward(split, x, features, size >> (level + 1))
            total = total + ladj
            latents.append(latent)
    return [*latents, x], total


@torch.no_grad()
def tiled_inverse(
    flow: ConditionalMultiscaleFlow,
    z: Sequence[Tensor],
    context: Sequence[Tensor],
    size: int,
    noise: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Takes latents to images, as the flow itself does, a tile at a time. Without gradients.

    Arguments:
        flow: The flow, in evaluation mode.
        z: The latents. They may have :math:`n B` rows: row :math:`i` then belongs to row
            :math:`i \bmod B` of the context; what depends on the context is computed once.
        context: The context maps, one for each level.
        size: The height and width of a tile, in pixels.
        noise: The noise map; see :meth:`ConditionalMultiscaleFlow.condition`.
        progress: Called with the number of pixels after each tile of each step.

    Returns:
        The images, with shape :math:`(n B, C, H, W)`.

    Example:
        >>> flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=2, hidden=16).eval()
        >>> z, context = [torch.randn(2, 12, 48, 48)], [torch.randn(1, 8, 48, 48)]
        >>> x = tiled_inverse(flow, z, context, 32)
        >>> torch.allclose(x, flow.inverse(z, context)[0], atol=1e-5)
        True
    """
    _check(flow, context, size)
    flow.check_latents(z)
    *latents, x = z
    for level in reversed(range(flow.levels)):
        features = context[level]
        split = flow.split_of(level)
        if split is not None:
            x = _split_inverse(split, x, latents[level], features, size >> (level + 1))
        for k, step in reversed(list(enumerate(flow.steps_of(level)))):
            source, x = x, torch.empty_like(x)
            given = noise if flow.is_noisy(level, k) else None
            for tile, rows, condition in _conditions(step.coupling, features, size, level, given):
                for part in _parts(source, rows):
                    y, _ = step.coupling.inverse(
                        crop(source[part], tile.outer), condition, tile.inner, ladj=False
                    )
                    x[part][..., tile.place[0], tile.place[1]] = y
                _tell(progress, tile, level)
            x, _ = step.mix.inverse(x)
            x, _ = step.actnorm.inverse(x)
        for transition in reversed(flow.transitions_of(level)):
            x, _ = transition.inverse(x)
        x, _ = flow.squeeze.inverse(x)
    return x


class TiledFlow:
    r"""Creates a flow that goes over large images a tile at a time, without gradients.

    It has the methods of the flow. Of a condition it works nothing out before it is needed.

    Arguments:
        flow: The flow, in evaluation mode.
        tile: The height and width of a tile: a number of pixels, rounded up to what the flow
            takes, or ``"auto"``.
        memory: The memory that ``"auto"`` may take, in bytes.
        progress: Whether to show a progress bar over the tiles.

    Raises:
        ValueError: If the size is not positive, or the memory too small for the least tile.

    Example:
        >>> flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=16).eval()
        >>> tiled = TiledFlow(flow, 32)
        >>> condition = tiled.work_out([torch.randn(1, 8, 48, 48)])
        >>> tiled.inverse([torch.randn(2, 12, 48, 48)], condition)[0].shape
        torch.Size([2, 3, 96, 96])
    """

    def __init__(
        self,
        flow: ConditionalMultiscaleFlow,
        tile: int | str,
        memory: float = MEMORY,
        progress: bool = False,
    ) -> None:
        self.flow = flow
        self.tile = tile
        self.memory = memory
        self.progress = progress
        self._size(1)  # tells mistakes, before the work

    def _size(self, rows: int) -> int:
        if self.tile == "auto":
            if isinstance(self.memory, bool) or not isinstance(self.memory, Real):
                raise TypeError(f"memory must be a number of bytes; got {self.memory!r}")
            if not 0 < self.memory < math.inf:
                raise ValueError(
                    f"memory must be a positive and finite number of bytes; got {self.memory}"
                )
            return tile_size(self.flow, self.memory, rows)
        if isinstance(self.tile, bool) or not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(
                f"tile must be a positive number of pixels, 'auto' or None; got {self.tile!r}"
            )
        return -(-self.tile // self.flow.multiple) * self.flow.multiple

    def work_out(self, context: Sequence[Tensor], noise: Tensor | None = None) -> FlowCondition:
        r"""Returns the context as it is; see :meth:`ConditionalMultiscaleFlow.work_out`."""
        self.flow.check_context(context)
        return FlowCondition(list(context), noise, [], [])

    def __call__(self, x: Tensor, condition: FlowCondition) -> tuple[list[Tensor], Tensor]:
        r"""Takes images to latents; see :func:`tiled_forward`."""
        features, noise = condition.features, condition.noise
        with bar(self.flow, x.shape[-2], x.shape[-1], self.progress) as tell:
            return tiled_forward(self.flow, x, features, self._size(len(x)), noise, tell)

    def inverse(
        self, z: Sequence[Tensor], condition: FlowCondition, *, ladj: bool = False
    ) -> tuple[Tensor, Tensor]:
        r"""Takes latents to images, and gives no log-determinant; see :func:`tiled_inverse`."""
        features, noise = condition.features, condition.noise
        height, width = (2 * n for n in features[0].shape[-2:])
        with bar(self.flow, height, width, self.progress) as tell:
            size = self._size(len(features[0]))
            x = tiled_inverse(self.flow, z, features, size, noise, tell)
        return x, x.new_full((), math.nan)


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


def _check(flow: ConditionalMultiscaleFlow, context: Sequence[Tensor], size: int) -> None:
    if flow.training:
        raise RuntimeError("a flow in training mode sees whole images: call eval() first")
    flow.check_context(context)
    least = flow.multiple
    if size < least or size % least:
        raise ValueError(f"the size of a tile must be a multiple of {least} pixels; got {size}")


def _conditions(
    coupling: ConditionalCoupling, features: Tensor, size: int, level: int, noise: Tensor | None
) -> Iterator[tuple[Tile, int, Condition]]:
    r"""Goes over the tiles of a level, with what a coupling makes of the context there."""
    if noise is not None:
        noise = fit_noise(noise, coupling.noise_channels, features)
    for tile in tiles(features.shape, size >> (level + 1)):
        part = None if noise is None else crop(noise, tile.outer)
        yield tile, len(features), coupling.condition(cut(crop(features, tile.outer)), part)


def _parts(x: Tensor, rows: int) -> Iterator[slice]:
    r"""Goes over the samples: as many images at a time as there are contexts."""
    if len(x) % max(rows, 1) or (len(x) and not rows):
        raise ValueError(
            "the batch must be a multiple of the contexts' number;"
            f" got a batch of {len(x)} and {rows} contexts"
        )
    return (slice(i, i + rows) for i in range(0, len(x), max(rows, 1)))


def _split_forward(
    split: Split, x: Tensor, features: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.new_empty(len(x), split.kept, *x.shape[-2:])
    latent = x.new_empty(len(x), split.dropped, *x.shape[-2:])
    total = x.new_zeros(len(x))
    for tile in tiles(x.shape, size):
        context = cut(crop(features, tile.outer))
        a, b, ladj = split(crop(x, tile.outer), context, tile.inner)
        kept[..., tile.place[0], tile.place[1]] = a
        latent[..., tile.place[0], tile.place[1]] = b
        total = total + ladj
    return kept, latent, total


def _split_inverse(
    split: Split, kept: Tensor, latent: Tensor, features: Tensor, size: int
) -> Tensor:
    x = kept.new_empty(len(kept), split.kept + split.dropped, *kept.shape[-2:])
    for tile in tiles(kept.shape, size):
        context = cut(crop(features, tile.outer))
        y, _ = split.inverse(crop(kept, tile.outer), crop(latent, tile.outer), context, tile.inner)
        x[..., tile.place[0], tile.place[1]] = y
    return x


def _tell(progress: Progress | None, tile: Tile, level: int) -> None:
    if progress is not None:
        height, width = (s.stop - s.start for s in tile.place)
        progress(height * width << (2 * level + 2))
