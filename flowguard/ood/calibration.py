r"""Calibration on held-out images: per image by conformal p-value, per pixel by quantile."""

__all__ = ["STATISTICS", "Calibration", "Calibrator", "image_statistics"]

import math

import torch
from torch import Tensor

from flowguard.ood.state import PinnedState

#: What the score of an image can be of the scores of its pixels.
STATISTICS = ("mean", "max", "share")

#: Scores that differ by less than this share are ties. An image is rounded otherwise alone than in
#: a batch, and copies of a calibration image must not be stranger than all of these.
TIE = 1e-5

# Pixel scores, relative to the number of features, are counted in logarithmic bins. An exact
# count needs no subsample and no cap, does not depend on the order of the images, and adds up
# across ranks; a bin is 0.27 % wide, far below the noise of any calibration set. Without shrinkage
# a direction that the fit has not seen makes scores 10¹⁰ times as large and more: the bins go up
# to where float32 ends, and the last one has no upper end.
LEAST_OCTAVE, LAST_OCTAVE, PER_OCTAVE = -20, 108, 256
BINS = (LAST_OCTAVE - LEAST_OCTAVE) * PER_OCTAVE


def _quantile_levels() -> Tensor:
    tail = 1 - 10 ** -torch.linspace(1, 6, 101, dtype=torch.float64)
    return torch.cat(
        [torch.linspace(0, 0.9, 91, dtype=torch.float64)[:-1], tail, tail.new_ones(1)]
    )


def image_statistics(scores: Tensor, edge: float) -> Tensor:
    r"""Returns what each image is judged by.

    Arguments:
        scores: The scores, with shape :math:`(N)` or :math:`(N, H, W)`.
        edge: The score above which a pixel counts for ``"share"``; none does for NaN.

    Returns:
        Mean, maximum and share above the edge, with shape :math:`(N, 3)`.
    """
    flat = scores.flatten(1) if scores.ndim > 1 else scores[:, None]
    share = (flat > edge).to(flat.dtype).mean(dim=1)
    return torch.stack([flat.mean(dim=1), flat.amax(dim=1), share], dim=1)


class Calibration(PinnedState):
    r"""Creates an empty calibration of one level; :class:`Calibrator` fills it.

    Per image, the p-value of a score :math:`s` among the :math:`n` calibration scores is

    .. math:: p = \frac{1 + \#\{i : s_i \ge s\}}{n + 1}

    If the image is exchangeable with the calibration images, then :math:`P(p \le \alpha) \le
    \alpha`, whatever the distribution of the scores; nothing is promised for images from
    elsewhere, which is what p is meant to find out. The least possible value is
    :math:`1/(n + 1)`. Whatever a score depends on besides its image, such as the edge of
    ``"share"``, comes from the fit: chosen on the calibration images it would treat these
    otherwise than the image that is judged.

    References:
        | Testing for Outliers with Conformal p-values (Bates et al., 2023)
        | https://arxiv.org/abs/2104.08279
    """

    scores: Tensor
    grid: Tensor
    edge: Tensor

    def __init__(self) -> None:
        super().__init__()
        empty = torch.empty(0, dtype=torch.float64)
        self.register_buffer("scores", empty.reshape(0, len(STATISTICS)))
        r"""The statistics of the calibration images, each column sorted on its own."""
        self.register_buffer("grid", empty.clone())
        r"""The quantiles of the pixel scores at the levels of the grid; empty for vectors."""
        self.register_buffer("edge", torch.full((), torch.nan, dtype=torch.float64))
        r"""The score above which a pixel counts for ``"share"``, the 0.99 quantile of the fit's
        pixels; NaN for vectors."""

    @property
    def calibrated(self) -> bool:
        r"""Whether there is anything to compare with."""
        return len(self.scores) > 0

    def p_values(self, statistics: Tensor) -> Tensor:
        r"""Returns the conformal p-values, with shape :math:`(N, 3)`, of such statistics.

        Ties, also those up to rounding, count as calibration scores that are as large.

        Arguments:
            statistics: The statistics of :func:`image_statistics`, with shape :math:`(N, 3)`.
        """
        reference, statistics = self.scores.to(statistics), statistics * (1 - TIE)
        above = torch.stack(
            [
                len(reference) - torch.searchsorted(column.contiguous(), value.contiguous())
                for column, value in zip(reference.T, statistics.T, strict=True)
            ],
            dim=1,
        )
        return (1 + above).to(statistics) / (len(reference) + 1)

    def threshold(self, statistic: str, alpha: float) -> float:
        r"""Returns the score above which :math:`p \le \alpha`.

        Where :math:`\alpha < 1/(n+1)`, no score has such a p-value, and the largest calibration
        score is returned: an in-distribution image exceeds it with probability
        :math:`1/(n+1)` at most.

        Arguments:
            statistic: ``"mean"``, ``"max"`` or ``"share"``.
            alpha: The p-value :math:`\alpha`.
        """
        column = self.scores[:, STATISTICS.index(statistic)]
        rank = max(1, math.floor(alpha * (len(column) + 1) + 1e-9))
        return float(column[max(0, len(column) - rank)]) / (1 - TIE)

    def boundary(self, quantile: float) -> float:
        r"""Returns the score that all but a share ``1 - quantile`` of calibration pixels keep to.

        For vectors this is the threshold.

        Arguments:
            quantile: The quantile, in :math:`[0, 1]`.
        """
        if not len(self.grid):
            return self.threshold("max", 1 - quantile)
        # The next level up, but for rounding: the boundary errs on the side of changing nothing.
        position = torch.searchsorted(_quantile_levels(), quantile - 1e-12)
        return float(self.grid[min(int(position), len(self.grid) - 1)])

    def quantile(self, scores: Tensor) -> Tensor:
        r"""Returns where pixel scores lie among the calibration pixels, in :math:`[0, 1]`.

        Arguments:
            scores: The pixel scores, of any shape, which is that of the result.
        """
        grid = self.grid.to(scores)
        levels = _quantile_levels().to(scores)
        upper = torch.searchsorted(grid, scores.contiguous(), right=True)
        upper = upper.clamp(1, len(grid) - 1)
        low, high = grid[upper - 1], grid[upper]
        weight = ((scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)).clamp(
            0, 1
        )
        return torch.lerp(levels[upper - 1], levels[upper], weight.nan_to_num(1.0))


class Calibrator:
    r"""Creates the accumulator of a calibration.

    Arguments:
        features: The number of features of the level, the scale of its scores.
        edge: The score above which a pixel counts for ``"share"``.
    """

    def __init__(self, features: int, edge: float = math.nan) -> None:
        self.features = features
        self.edge = edge
        self.pixels = torch.zeros(BINS, dtype=torch.int64)
        self.statistics: list[Tensor] = []

    def add(self, scores: Tensor) -> None:
        r"""Adds the scores of a batch, with shape :math:`(N)` or :math:`(N, H, W)`.

        Arguments:
            scores: The scores, with shape :math:`(N)` or :math:`(N, H, W)`.

        Raises:
            ValueError: If a score is not finite.
        """
        if not len(scores):
            return
        if not scores.isfinite().all():
            raise ValueError(
                "the features of the calibration must be finite; got NaN or inf: find the "
                "contexts that cause them (`torch.isfinite`) and leave them out"
            )
        for images in scores.split(32) if scores.ndim == 3 else ():
            octaves = (images.flatten().cpu().double() / self.features).log2() - LEAST_OCTAVE
            place = (octaves * PER_OCTAVE).clamp(0, BINS - 1).long()
            self.pixels = self.pixels + torch.bincount(place, minlength=BINS)
        self.statistics.append(image_statistics(scores, self.edge).cpu().double())

    def state(self) -> tuple[Tensor, Tensor]:
        r"""Returns pixel counts and statistics, to be gathered across ranks."""
        statistics = [torch.empty(0, len(STATISTICS)).double(), *self.statistics]
        return self.pixels, torch.cat(statistics)

    def extend(self, pixels: Tensor, statistics: Tensor) -> None:
        r"""Adds what another calibrator has seen.

        Arguments:
            pixels: Its counts of pixels.
            statistics: Its statistics, with shape :math:`(N, 3)`; see :meth:`state` for both.
        """
        self.pixels = self.pixels + pixels
        self.statistics.append(statistics)

    def build(self) -> Calibration:
        r"""Returns the calibration."""
        pixels, statistics = self.state()
        calibration = Calibration()
        if pixels.any():
            calibration.grid = self._grid(pixels, float(statistics[:, 1].max()))
        calibration.edge = torch.tensor(self.edge, dtype=torch.float64)
        calibration.scores = statistics.sort(dim=0).values.contiguous()
        return calibration

    def _grid(self, pixels: Tensor, largest: float) -> Tensor:
        r"""Quantiles by interpolation within the bins; the last one is the maximum."""
        cumulative = pixels.cumsum(0).double()
        wanted = _quantile_levels() * cumulative[-1]
        place = torch.searchsorted(cumulative, wanted).clamp_max(len(pixels) - 1)
        before = cumulative[place] - pixels[place]
        weight = ((wanted - before) / pixels[place].clamp_min(1)).clamp(0, 1)
        grid = self.features * 2 ** (LEAST_OCTAVE + (place + weight) / PER_OCTAVE)
        grid[place == BINS - 1] = largest
        grid[-1] = largest
        return grid.clamp_max(largest)
