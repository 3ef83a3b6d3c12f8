r"""Random crops of a folder of pictures: each batch is a function of the seed and its number."""

__all__ = ["FolderCrops", "Pair", "Wholes", "list_pictures", "pixels_of"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowguard.io.pictures import SUFFIXES, ImageError, read
from flowguard.metrics import imresize

Pair = tuple[Tensor, Tensor]


def list_pictures(folder: Path) -> list[Path]:
    r"""Returns the pictures in a folder and in those below it, in the order of their names.

    Arguments:
        folder: The folder.
    """
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def pixels_of(path: Path) -> Tensor:
    r"""Returns the pixels of a picture, ``uint8`` with shape :math:`(3, H, W)`.

    Arguments:
        path: The file.

    Raises:
        ImageError: If it holds no picture that can be read.
    """
    return (255 * read(path).colour).round().to(torch.uint8)


class FolderCrops(Dataset[Pair]):
    r"""Creates batches of aligned random crops of the pictures of a folder and their LR images.

    The LR image is made of the whole picture by the bicubic interpolation of MATLAB, in whole
    numbers as a file would hold them. A crop is drawn from all places of all pictures alike,
    mirrored and turned by quarters at random. Batch number :math:`n` depends on the seed and
    :math:`n` alone, and each row of it on its own number too.

    Arguments:
        folder: The folder; those below it are read too.
        scale: The downsampling factor.
        size: The height and width of an HR crop, a multiple of `scale`.
        batch: The number of crops in a batch.
        seed: The seed.

    Attributes:
        rows: The rows of the batch that are made: those of one of several processes.
        left_out: The files that are not used, with the reason.

    Raises:
        ValueError: If no picture can be used, or the sizes do not fit.
    """

    def __init__(self, folder: Path, *, scale: int, size: int, batch: int, seed: int) -> None:
        if size < 1 or size % scale:
            raise ValueError(f"the crop must be a multiple of the scale {scale}; got {size}")
        self.scale, self.size, self.seed = scale, size, seed
        self.rows: Sequence[int] = range(batch)
        self.left_out: dict[Path, str] = {}
        self.pairs: list[Pair] = []
        for path in list_pictures(folder):
            try:
                hr = pixels_of(path)
            except ImageError as error:
                self.left_out[path] = str(error)
                continue
            height, width = (n - n % scale for n in hr.shape[-2:])
            if min(height, width) < size:
                self.left_out[path] = f"it has less than {size} rows or columns"
                continue
            hr = hr[:, :height, :width].contiguous()
            self.pairs.append((hr, imresize(hr, 1 / scale)))
        if not self.pairs:
            raise ValueError(
                f"there must be a picture of at least {size} rows and columns in {folder}; got"
                f" {len(self.left_out)} other file(s)"
            )
        n = size // scale
        places = [(y.shape[-2] - n + 1) * (y.shape[-1] - n + 1) for _, y in self.pairs]
        self._ends = np.cumsum(places)

    def _crop(self, number: int, row: int) -> Pair:
        rng = np.random.default_rng((self.seed, number, row))
        place = int(rng.integers(self._ends[-1]))
        index = int(np.searchsorted(self._ends, place, side="right"))
        hr, lr = self.pairs[index]
        s, n = self.scale, self.size // self.scale
        place -= int(self._ends[index - 1]) if index else 0
        i, j = divmod(place, lr.shape[-1] - n + 1)
        pair = [
            hr[:, s * i : s * i + self.size, s * j : s * j + self.size],
            lr[:, i : i + n, j : j + n],
        ]
        if rng.integers(2):
            pair = [p.flip(-1) for p in pair]
        turns = int(rng.integers(4))
        first, second = (torch.rot90(p, turns, (-2, -1)) for p in pair)
        return first, second

    def __getitem__(self, number: int) -> Pair:
        r"""Returns batch `number`, with shapes :math:`(B, 3, sH, sW)` and :math:`(B, 3, H, W)`."""
        crops = [self._crop(number, row) for row in self.rows]
        hr, lr = (torch.stack(parts).float() / 255 for parts in zip(*crops, strict=True))
        return hr, lr


class Wholes(Dataset[Pair]):
    r"""Creates the pictures of a source as wholes.

    Arguments:
        pairs: Pairs of HR and LR images, ``uint8``.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        r"""Returns HR and LR image, with shapes :math:`(3, sH, sW)` and :math:`(3, H, W)`."""
        hr, lr = self.pairs[index]
        return hr.float() / 255, lr.float() / 255
