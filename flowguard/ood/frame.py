r"""The frame of a map: padded convolutions see zeros beyond the border, and what they make of them
is strange at every border, whatever the image."""

__all__ = ["Depths", "Frame", "depths"]

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowguard.ood.state import PinnedState

#: How many pixels wide the frame is, at most.
WIDTH = 8

#: How far the mean score of a ring is above that of the inside where it is no chance: by a share of
#: it, and by standard errors, which are too small by half as neighbours resemble each other. So
#: encoders that do not pad are left as they are.
LEAST, ERRORS = 0.1, 5


class Depths(NamedTuple):
    r"""How deep in its map each pixel lies."""

    depth: Tensor
    r"""The number of pixels between it and the border."""
    inside: Tensor
    r"""Whether it is beyond the frame; that of a small map takes a quarter of it on each side."""


def depths(height: int, width: int, device: torch.device) -> Depths:
    r"""Returns how deep the pixels of a map lie, with shape :math:`(H, W)`.

    Arguments:
        height: The height of the map.
        width: Its width.
        device: The device to have them on.

    Example:
        >>> depths(3, 4, torch.device("cpu")).depth
        tensor([[0, 0, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 0, 0]])
    """
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = torch.minimum(rows, rows.flip(0)), torch.minimum(columns, columns.flip(0))
    depth = torch.minimum(rows[:, None], columns[None])
    return Depths(depth, depth >= min(WIDTH, min(height, width) // 4))


class Frame(PinnedState):
    r"""Creates the memory of how much more pixels score near the border; :meth:`fit` fills it.

    The rings of the frame are told apart by their depth. Where training pixels of a ring score
    more in the mean than those of the inside, scores are divided by the ratio of the two, so that
    a frame is as bright as what it surrounds.
    """

    ratios: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ratios", torch.empty(0, dtype=torch.float64))
        r"""The mean score of each ring over that of the inside; empty for vectors."""
        self._maps: dict[tuple[int, int, torch.device, torch.dtype], Tensor | None] = {}

    def _changed(self) -> None:
        self._maps = {}

    def fit(self, scores: Tensor, places: Depths) -> None:
        r"""Measures the frame.

        Arguments:
            scores: The scores of training pixels, with shape :math:`(n)`.
            places: How deep these lie, each with shape :math:`(n)`.
        """
        middle = scores[places.inside].mean()
        self.ratios = scores.new_ones(WIDTH)
        for depth in range(WIDTH):
            ring = scores[(places.depth == depth) & ~places.inside] / middle
            if len(ring) > 1 and bool(middle > 0):
                ratio, error = ring.mean(), ring.std() / len(ring) ** 0.5
                if ratio - 1 > max(LEAST, ERRORS * float(error)):
                    self.ratios[depth] = ratio
        self._changed()

    def of(self, scores: Tensor) -> Tensor | None:
        r"""Returns the ratio of each pixel, with shape :math:`(H, W)`; :py:`None` if all are 1.

        Arguments:
            scores: The scores, with shape :math:`(N, H, W)`; those of vectors have no frame.
        """
        if scores.ndim < 3 or not len(self.ratios):
            return None
        height, width = scores.shape[1:]
        key = (height, width, scores.device, scores.dtype)
        known = self._maps  # another thread may put that of another size in its place
        if key not in known:
            # Made outside inference mode: autograd may need them later.
            with torch.inference_mode(False):
                rings = torch.cat([self.ratios, self.ratios.new_ones(1)]).to(scores)
                ratios = rings[depths(height, width, scores.device).depth.clamp_max(WIDTH)]
                even = bool((ratios == 1).all())
            known = self._maps = {key: None if even else ratios}  # one size at a time
        return known[key]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # States of format 1 were scored with their frames.
        state_dict.setdefault(f"{prefix}ratios", self.ratios.new_empty(0))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
