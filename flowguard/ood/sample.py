r"""A sample of the training pixels: what must be known of scores before anything is calibrated."""

__all__ = ["Sample", "SampledScores"]

from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from flowguard.ood.frame import Depths, depths
from flowguard.ood.gaussian import StreamingGaussian

_MASK = (1 << 32) - 1


class SampledScores(NamedTuple):
    r"""The scores of sampled pixels, on the CPU."""

    limit: Tensor
    r"""Below what the keys are, with shape :math:`()`."""
    keys: Tensor
    r"""What chose each pixel, with shape :math:`(n)`."""
    scores: Tensor
    r"""Its score, in float64."""
    depth: Tensor
    r"""Its depth; see :class:`Depths`."""
    inside: Tensor
    r"""Whether it is inside."""

    @classmethod
    def union(cls, parts: Iterable[Self]) -> Self:
        r"""Returns the even sample of what several ranks have seen.

        Arguments:
            parts: The samples of the ranks.
        """
        parts = list(parts)
        limit = torch.stack([part.limit for part in parts]).amin()
        kept = [[value[part.keys < limit] for value in part[1:]] for part in parts]
        return cls(limit, *map(torch.cat, zip(*kept, strict=True)))


class Sample:
    r"""Creates a sample of the pixels of a stream of maps: an even one, and at most so large.

    It is the same however the stream is cut into batches, and draws no random numbers: a pixel is
    kept if the hash of its number is below a limit, which is halved where they are too many.

    Arguments:
        most: The most pixels to keep.
    """

    def __init__(self, most: int = 2**15) -> None:
        self.most = most
        self.seen = 0
        self.limit = 1 << 32
        self.kept = 0
        self.parts: list[tuple[Tensor, Tensor, Depths]] = []  # keys, vectors and their depths

    def add(self, maps: Tensor) -> None:
        r"""Adds maps.

        Arguments:
            maps: The features, with shape :math:`(N, C, H, W)`.
        """
        count, (height, width) = maps[:, 0].numel(), maps.shape[2:]
        keys = _hashed(torch.arange(self.seen, self.seen + count, device=maps.device))
        self.seen += count
        while self.kept + int((keys < self.limit).sum()) > self.most:
            self.limit //= 2
            self._drop()
        new = (keys < self.limit).nonzero().flatten()
        if self.parts and not len(new):
            return
        self.kept += len(new)
        image, pixel = new // max(1, height * width), new % max(1, height * width)
        row, column = pixel // max(1, width), pixel % max(1, width)
        places = depths(height, width, maps.device)
        told = Depths(places.depth[row, column], places.inside[row, column])
        self.parts.append((keys[new], maps.detach()[image, :, row, column], told))

    def _drop(self) -> None:
        r"""Drops what the limit leaves out now, and makes one part of the many that came."""
        if not self.parts:
            return
        keys, vectors, places = zip(*self.parts, strict=True)
        every = torch.cat(keys)
        stay = every < self.limit
        depth, inside = (torch.cat(t)[stay] for t in zip(*places, strict=True))
        self.parts = [(every[stay], torch.cat(vectors)[stay], Depths(depth, inside))]
        self.kept = int(stay.sum())

    def scores(self, gaussian: StreamingGaussian) -> SampledScores:
        r"""Returns what the sample scores.

        Arguments:
            gaussian: The Gaussian of the level.
        """
        found = [
            SampledScores(
                torch.tensor(self.limit),
                keys.cpu(),
                gaussian.mahalanobis(vectors).cpu().double(),
                places.depth.cpu(),
                places.inside.cpu(),
            )
            for keys, vectors, places in self.parts
        ]
        return SampledScores.union(found)


def _hashed(numbers: Tensor) -> Tensor:
    r"""Takes whole numbers to evenly spread ones of 32 bits (the finaliser of MurmurHash3)."""
    numbers = numbers & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        numbers = ((numbers ^ (numbers >> shift)) * factor) & _MASK
    return numbers ^ (numbers >> 16)
