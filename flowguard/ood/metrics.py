r"""Whether scores tell where a flow goes wrong: rankings, regions, deciles, risk and coverage.

Scores may be infinite and need no scale: everything here depends on their order alone. Arrays of
different sizes come as lists. The metrics themselves are those of torchmetrics, scikit-learn and
scipy, which ``pip install "flowguard-nf[metrics]"`` brings.
"""

__all__ = [
    "DecileCurve",
    "RiskCoverage",
    "auprc",
    "aupro",
    "auroc",
    "decile_curve",
    "evaluate_maps",
    "level_maps",
    "risk_coverage",
]

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowguard.hosts import install
from flowguard.ood.report import OODReport

Arrays = Tensor | Sequence[Tensor]


def auroc(scores: Arrays, labels: Arrays) -> float:
    r"""Returns the area under the receiver operating characteristic.

    The probability that a pixel (or image) with the label scores higher than one without.

    Arguments:
        scores: The scores, of any shape, or a list of such.
        labels: Where the fault is, true or false, with the same shapes.

    Raises:
        ImportError: If torchmetrics or scipy is not installed.
        ValueError: If the shapes differ, a score is NaN, or all labels are the same.

    Example:
        >>> import torch
        >>> auroc(torch.tensor([0.1, 0.4, 3.0, torch.inf]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    curve = _require("torchmetrics.functional.classification")
    ranks, truth = _ranked(scores, labels)
    return float(curve.binary_auroc(ranks, truth))


def auprc(scores: Arrays, labels: Arrays) -> float:
    r"""Returns the area under the precision-recall curve, as average precision; see :func:`auroc`.

    A score that knows nothing has the share of labelled pixels, not 0.5.

    Arguments:
        scores: The scores, of any shape, or a list of such.
        labels: Where the fault is, true or false, with the same shapes.

    Raises:
        ImportError: If torchmetrics or scipy is not installed.
        ValueError: If the shapes differ, a score is NaN, or all labels are the same.

    Example:
        >>> import torch
        >>> auprc(torch.tensor([0.1, 0.4, 3.0, torch.inf]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    curve = _require("torchmetrics.functional.classification")
    ranks, truth = _ranked(scores, labels)
    return float(curve.binary_average_precision(ranks, truth))


def aupro(maps: Arrays, masks: Arrays, fpr_limit: float = 0.3) -> float:
    r"""Returns the area under the per-region overlap, up to a false positive rate, scaled to 1.

    Every connected region of a mask counts the same, whatever its size; pixels that touch at a
    corner are connected.

    References:
        | The MVTec Anomaly Detection Dataset (Bergmann et al., 2021)
        | https://link.springer.com/article/10.1007/s11263-020-01400-4

    Arguments:
        maps: The scores, with shape :math:`(B, H, W)`, or a list with shapes :math:`(H, W)`.
        masks: Where the fault is, with the same shapes.
        fpr_limit: The largest false positive rate :math:`> 0` that counts.

    Raises:
        ImportError: If scikit-learn or scipy is not installed.
        ValueError: If the limit is out of range, or shapes, scores or labels do not fit.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 8, 8)
        >>> mask[0, 2:4, 2:4] = 1
        >>> aupro(mask + 0.1 * torch.rand(1, 8, 8), mask)
        1.0
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1]; got {fpr_limit}")
    label = _require("scipy.ndimage").label
    sklearn = _require("sklearn.metrics")
    weights = []
    for mask in masks:
        if mask.ndim != 2:
            raise ValueError(
                "masks must have shape (B, H, W), or be a list with shapes (H, W); got one with "
                f"shape {tuple(mask.shape)}"
            )
        components, _ = label(mask.cpu().bool().numpy(), structure=torch.ones(3, 3).numpy())
        components = torch.from_numpy(components).long()
        sizes = torch.bincount(components.flatten(), minlength=1).double()
        # The true positive rate, with each region weighing the same, is the region overlap.
        weights.append(torch.where(components > 0, 1 / sizes[components], 1.0).flatten())
    ranks, truth = _ranked(maps, masks)
    fpr, overlap, _ = sklearn.roc_curve(truth, ranks, sample_weight=torch.cat(weights).numpy())
    fpr, overlap = torch.from_numpy(fpr), torch.from_numpy(overlap)
    end = int(torch.searchsorted(fpr, fpr_limit, right=True))
    if end < len(fpr):  # cut the segment that crosses the limit
        part = (fpr_limit - fpr[end - 1]) / (fpr[end] - fpr[end - 1])
        last = torch.lerp(overlap[end - 1], overlap[end], part)
        fpr = torch.cat([fpr[:end], fpr.new_tensor([fpr_limit])])
        overlap = torch.cat([overlap[:end], last[None]])
    return float(sklearn.auc(fpr, overlap) / fpr_limit)


@dataclass(frozen=True)
class DecileCurve:
    r"""The rate of faults by rising score.

    Example:
        >>> curve = DecileCurve(rates=[0.0, 0.0, 0.5, 1.0], spearman=0.95)
        >>> f"of the strangest quarter {curve.rates[-1]:.0%} are faults"
        'of the strangest quarter 100% are faults'
    """

    rates: list[float]
    r"""The mean error in each bin, lowest scores first."""
    spearman: float
    r"""The rank correlation of rate and bin; NaN where all rates are the same."""


def decile_curve(scores: Arrays, errors: Arrays, bins: int = 10) -> DecileCurve:
    r"""Sorts by score, cuts into bins of equal size, and gives the mean error of each.

    Arguments:
        scores: The scores, of any shape, or a list of such.
        errors: The errors (for a mask: 0 or 1), with the same shapes.
        bins: The number of bins.

    Raises:
        ImportError: If scipy is not installed.
        ValueError: If there are fewer scores than bins, or less than two bins.

    Example:
        >>> import torch
        >>> decile_curve(torch.arange(8), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]), bins=4)
        DecileCurve(rates=[0.0, 0.0, 0.5, 1.0], spearman=0.9486832980505139)
    """
    stats = _require("scipy.stats")
    flat, error = _pair(scores, errors)
    if len(flat) < bins or bins < 2:
        raise ValueError(
            f"there must be 2 bins or more, and a score for each; got {bins} bins for {len(flat)}"
        )
    order = flat.argsort(stable=True)
    rates = [float(part.mean()) for part in error[order].tensor_split(bins)]
    constant = len(set(rates)) < 2
    rho = float("nan") if constant else float(stats.spearmanr(range(bins), rates).statistic)
    return DecileCurve(rates, rho)


@dataclass(frozen=True)
class RiskCoverage:
    r"""The mean risk of what is kept when the highest scores are left out.

    Attributes of :math:`N` scores have shape :math:`(N)`.

    Example:
        >>> import torch
        >>> curve = risk_coverage(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.0, 0.0, 1.0]))
        >>> curve.risk
        tensor([0.0000, 0.0000, 0.3333], dtype=torch.float64)
        >>> curve.excess  # no order of these risks is better
        0.0
    """

    coverage: Tensor
    r"""The share that is kept, rising to 1, with shape :math:`(N)`."""
    risk: Tensor
    r"""The mean risk of it, with shape :math:`(N)`."""
    area: float
    r"""The area under the curve."""
    oracle_area: float
    r"""The area with the risks themselves as scores, the least that is possible."""

    @property
    def excess(self) -> float:
        r"""What the scores lose against the oracle (AUSE, not normalised)."""
        return self.area - self.oracle_area


def risk_coverage(scores: Arrays, risks: Arrays) -> RiskCoverage:
    r"""Returns the risk-coverage curve.

    Where scores are tied the order is that of the input.

    References:
        | Selective Classification for Deep Neural Networks (Geifman and El-Yaniv, 2017)
        | https://arxiv.org/abs/1705.08500

    Arguments:
        scores: The scores, :math:`N` in all, of any shape, or a list of such.
        risks: What it costs to keep each, finite, with the same shapes.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are fewer than two scores, or a risk is not finite.

    Example:
        >>> import torch
        >>> risks = torch.tensor([0.0, 1.0, 0.0])
        >>> risk_coverage(torch.tensor([0.1, 0.9, 0.2]), risks).excess
        0.0
        >>> risk_coverage(torch.tensor([0.9, 0.1, 0.2]), risks).excess > 0.1  # the other way round
        True
    """
    auc = _require("sklearn.metrics").auc
    flat, risk = _pair(scores, risks)
    if len(flat) < 2:
        raise ValueError(f"a curve needs 2 scores or more; got {len(flat)}")
    if not risk.isfinite().all():
        raise ValueError(
            "risks must be finite; got NaN or inf: give non-finite pixels a risk of their own"
        )
    kept = torch.arange(1, len(flat) + 1, dtype=torch.float64)
    coverage = kept / len(flat)
    curves = [risk[by.argsort(stable=True)].cumsum(0) / kept for by in (flat, risk)]
    areas = [float(auc(coverage, curve)) for curve in curves]
    return RiskCoverage(coverage, curves[0], *areas)


def level_maps(
    report: OODReport, size: tuple[int, int] | None = None, reach: int = 0
) -> dict[str, Tensor]:
    r"""Returns the map of each level, and of all together, at the size of a picture.

    ``"combined"`` is the largest quantile over the levels, and beyond all calibration pixels
    the score in units of the boundary: raw scores of levels do not compare.

    Arguments:
        report: The report.
        size: The height and width; the largest map's by default. Pixels are repeated.
        reach: Over how many pixels of that size on each side the scores are averaged, at the
            border over those that there are. A flow looks around each pixel: what it makes there
            depends on the embedding of the neighbours too, and an average tells more of it.

    Raises:
        ValueError: If all embeddings are vectors, or the reach is no number of pixels.

    Example:
        >>> import flowguard
        >>> guard = flowguard.OODConditioner(policy="report", alpha=0.1)
        >>> guard = guard.fit(torch.randn(16, 3, 8, 8), progress=False)
        >>> guard.calibrate(torch.randn(99, 3, 8, 8), progress=False)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
        >>> maps = level_maps(guard.report, (16, 16), reach=2)  # one level, nothing to combine
        >>> {name: tuple(scores.shape) for name, scores in maps.items()}
        {'level1': (2, 16, 16)}
    """
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < 0:
        raise ValueError(f"reach must be a number of pixels, 0 or more; got {reach}")
    maps = {name: level.map for name, level in report.levels.items() if level.map is not None}
    if not maps:
        raise ValueError("a level of the report must have a map; got vectors alone")
    if size is None:
        height, width = max(tuple(m.shape[1:]) for m in maps.values())
        size = (height, width)
    scaled = {name: _averaged(_resize(value, size), reach) for name, value in maps.items()}
    if reach:
        maps = dict(scaled)
    if len(scaled) > 1:
        ranks = []
        for name, value in maps.items():
            level = report.levels[name]
            quantile = level.calibration.quantile(value)
            beyond = (value / level.boundary).clamp_min(1).where(quantile >= 1, 0.0)
            ranks.append(_resize(quantile + beyond, size))
        scaled["combined"] = torch.stack(ranks).amax(dim=0)
    return scaled


def evaluate_maps(
    report: OODReport | Sequence[OODReport], masks: Arrays, reach: int = 0
) -> dict[str, dict[str, float]]:
    r"""Returns how well the maps of each level find the faulty pixels.

    Arguments:
        report: The report, or one for each of several batches.
        masks: Where the flow's output is faulty, with shape :math:`(B, H, W)`, one for each
            report; the maps are brought to its size.
        reach: Over how many pixels on each side scores are averaged; see :func:`level_maps`.

    Returns:
        For each level, and for ``"combined"`` where there are several: ``"auroc"``, ``"auprc"``,
        ``"aupro"`` and ``"spearman"`` over score deciles.

    Raises:
        ImportError: If torchmetrics, scikit-learn or scipy is not installed.
        ValueError: If there are not as many batches of masks as reports.

    Example:
        >>> import flowguard, torch
        >>> guard = flowguard.OODConditioner(policy="report", alpha=0.1)
        >>> guard = guard.fit(torch.randn(16, 3, 8, 8), progress=False)
        >>> guard = guard.calibrate(torch.randn(99, 3, 8, 8), progress=False)
        >>> y, fault = torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8)
        >>> y[0, :, :4], fault[0, :4] = 50.0, 1.0
        >>> found = evaluate_maps(guard.score(y), fault)["level1"]
        >>> found["auroc"], found["aupro"]
        (1.0, 1.0)
    """
    reports = [report] if isinstance(report, OODReport) else list(report)
    batches = [masks] if isinstance(masks, Tensor) else list(masks)
    if len(reports) != len(batches):
        raise ValueError(
            f"there must be one batch of masks per report; got {len(batches)} for {len(reports)}"
        )
    maps: dict[str, list[Tensor]] = {}
    for one, mask in zip(reports, batches, strict=True):
        for name, value in level_maps(one, (mask.shape[-2], mask.shape[-1]), reach).items():
            maps.setdefault(name, []).extend(value.unbind())
    truth = [mask for batch in batches for mask in batch.unbind()]
    return {
        name: {
            "auroc": auroc(values, truth),
            "auprc": auprc(values, truth),
            "aupro": aupro(values, truth),
            "spearman": decile_curve(values, truth).spearman,
        }
        for name, values in maps.items()
    }


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[1:] == size:
        return maps
    return torch.nn.functional.interpolate(maps[:, None], size, mode="nearest-exact")[:, 0]


def _averaged(maps: Tensor, reach: int) -> Tensor:
    r"""Local means, along rows and then along columns: a window at the border counts its pixels."""
    if not reach:
        return maps
    scores = maps[:, None]
    for window in ((2 * reach + 1, 1), (1, 2 * reach + 1)):
        padding = (window[0] // 2, window[1] // 2)
        scores = torch.nn.functional.avg_pool2d(
            scores, window, 1, padding, count_include_pad=False
        )
    return scores[:, 0]


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"these metrics need {name.partition('.')[0]}: {install('metrics')}"
        ) from error


def _flat(values: Arrays) -> Tensor:
    parts = [values] if isinstance(values, Tensor) else list(values)
    return torch.cat([part.detach().flatten().cpu() for part in parts]).double()


def _pair(scores: Arrays, others: Arrays) -> tuple[Tensor, Tensor]:
    flat, other = _flat(scores), _flat(others)
    if flat.shape != other.shape:
        raise ValueError(
            f"scores and labels must have the same shapes; got {len(flat)} and {len(other)} "
            "elements: `level_maps(report, size)` resizes maps"
        )
    if flat.isnan().any():
        raise ValueError(
            "scores must not be NaN, and those of a report are not, as NaN scores inf; got NaN"
        )
    return flat, other


def _ranked(scores: Arrays, labels: Arrays) -> tuple[Tensor, Tensor]:
    r"""Ranks in (0, 1]: torchmetrics would squash other numbers through a sigmoid, and tie them."""
    flat, truth = _pair(scores, labels)
    truth = truth.bool().long()
    if not 0 < int(truth.sum()) < len(truth):
        raise ValueError(
            "there must be elements with and without the label, or there is nothing to tell "
            f"apart; got {int(truth.sum())} of {len(truth)} with it"
        )
    ranks = _require("scipy.stats").rankdata(flat.numpy())
    return torch.from_numpy(ranks) / len(flat), truth
