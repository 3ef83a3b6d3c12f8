r"""What a score tells: per image, per level, per pixel."""

__all__ = ["NINES", "TICKS", "LevelReport", "OODReport", "coloured", "nines", "plot_report"]

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowguard.hosts import install
from flowguard.io.atomic import strict_json
from flowguard.ood.calibration import Calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NINES = 4
r"""The upper end of the scale: beyond the 0.9999 quantile, all pixels look the same."""


TICKS = {0.0: "0", 0.301: "0.5", 1.0: "0.9", 2.0: "0.99", 3.0: "0.999", 4.0: "0.9999"}
r"""The quantiles that a colour bar names, by their number of nines."""


@dataclass(frozen=True, eq=False)
class LevelReport:
    r"""The scores of one level for a batch of :math:`B` contexts.

    Attributes:
        name: The name of the level.
        calibration: What it was calibrated on.

    Example:
        >>> guard = flowguard.OODConditioner(policy="report", alpha=0.01)
        >>> guard = guard.fit(torch.randn(512, 3, 8, 8), progress=False)
        >>> guard = guard.calibrate(torch.randn(512, 3, 8, 8), progress=False).eval()
        >>> strange = torch.randn(2, 3, 8, 8)
        >>> strange[1] *= 5.0
        >>> level = guard.score(strange).levels["level1"]
        >>> level.score.shape, level.map.shape, level.quantile.shape
        (torch.Size([2]), torch.Size([2, 8, 8]), torch.Size([2, 8, 8]))
        >>> level.flagged, level.p_value < 0.01
        (tensor([False,  True]), tensor([False,  True]))
    """

    name: str
    statistic: str
    r"""What :attr:`score` is of the pixel scores: ``"mean"``, ``"max"`` or ``"share"``."""
    statistics: dict[str, Tensor]
    r"""All three statistics, each with shape :math:`(B)`."""
    p_values: dict[str, Tensor]
    r"""Their conformal p-values."""
    map: Tensor | None
    r"""The squared Mahalanobis distance per pixel, with shape :math:`(B, H, W)`, not for vectors."""
    above: Tensor
    r"""The share of pixels above :attr:`boundary`, with shape :math:`(B)`."""
    boundary: float
    r"""The calibrated pixel score beyond which ``"shrink"`` pulls back."""
    threshold: float
    r"""The score above which an image is flagged."""
    calibration: Calibration

    @property
    def score(self) -> Tensor:
        r"""The score of each image, with shape :math:`(B)`; ``inf`` where it is not finite."""
        return self.statistics[self.statistic]

    @property
    def p_value(self) -> Tensor:
        r"""The conformal p-value of the score, with shape :math:`(B)`."""
        return self.p_values[self.statistic]

    @property
    def flagged(self) -> Tensor:
        r"""Which images exceed the threshold, with shape :math:`(B)`."""
        return self.score > self.threshold

    @cached_property
    def quantile(self) -> Tensor | None:
        r"""The map on the calibrated scale, in :math:`[0, 1]`: 0.99 is a pixel such as one in a
        hundred calibration pixels exceeds, 1 is beyond all of them."""
        return None if self.map is None else self.calibration.quantile(self.map)

    def __repr__(self) -> str:
        shape = None if self.map is None else tuple(self.map.shape)
        return f"LevelReport({self.name!r}, contexts={len(self.score)}, map={shape})"


def excess(level: LevelReport) -> float:
    r"""Returns how many times its threshold the largest score of a level is."""
    return float(level.score.max()) / max(level.threshold, torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, eq=False)
class OODReport:
    r"""The scores of all levels for a batch of :math:`B` contexts.

    Raw distances of different levels are never added: each level is calibrated first, and the
    p-values are combined by Bonferroni's rule, which holds however the levels depend on each
    other. A level is flagged at :math:`\alpha` over the number of levels, an image where any of
    its levels is.

    Where there are too few calibration images for that (``attained_alpha > alpha``), a level is
    flagged above its largest calibration score, and :attr:`attained_alpha` bounds the share of
    false alarms.

    Attributes:
        levels: The report of each level, by its name.

    Example:
        >>> guard = flowguard.OODConditioner(policy="report", alpha=0.01)
        >>> guard = guard.fit(torch.randn(512, 3, 8, 8), progress=False)
        >>> guard = guard.calibrate(torch.randn(512, 3, 8, 8), progress=False).eval()
        >>> strange = torch.randn(2, 3, 8, 8)
        >>> strange[1] *= 5.0
        >>> report = guard.score(strange)
        >>> report
        OODReport(contexts=2, levels=['level1'], flagged=1)
        >>> report.p_value.shape, report.flagged
        (torch.Size([2]), tensor([False,  True]))
        >>> sorted(report.to_dict())[:3]
        ['alpha', 'attained_alpha', 'flagged']
    """

    levels: dict[str, LevelReport]
    non_finite: Tensor
    r"""Which contexts or embeddings hold NaN or inf, with shape :math:`(B)`."""
    alpha: float
    r"""The share of false alarms that was asked for."""
    attained_alpha: float
    r"""The share of false alarms that the calibration can promise."""

    @property
    def p_value(self) -> Tensor:
        r"""The p-value over all levels, with shape :math:`(B)`."""
        values = torch.stack([level.p_value for level in self.levels.values()])
        return (len(values) * values.amin(dim=0)).clamp(max=1)

    @property
    def flagged(self) -> Tensor:
        r"""Which contexts are out of distribution at some level, with shape :math:`(B)`."""
        return torch.stack([level.flagged for level in self.levels.values()]).any(dim=0)

    def __len__(self) -> int:
        return len(self.non_finite)

    def __repr__(self) -> str:
        return (
            f"OODReport(contexts={len(self)}, levels={list(self.levels)}, "
            f"flagged={int(self.flagged.sum())})"
        )

    def summary(self) -> str:
        r"""Returns one sentence on what is flagged.

        Example:
            >>> guard = flowguard.OODConditioner(policy="report", alpha=0.05)
            >>> guard = guard.fit(torch.randn(512, 3), progress=False)
            >>> guard = guard.calibrate(torch.randn(64, 3), progress=False)
            >>> guard.score(torch.zeros(2, 3)).summary()
            'All 2 contexts are in distribution (alpha = 0.05).'
        """
        count = int(self.flagged.sum())
        if not count:
            return f"All {len(self)} contexts are in distribution (alpha = {self.alpha:g})."
        name, index = self._worst()
        level = self.levels[name]
        text = (
            f"{count} of {len(self)} contexts {'is' if count == 1 else 'are'} out of distribution "
            f"(alpha = {self.alpha:g}); worst is context {index} at {name}: score "
            f"{float(level.score[index]):.4g}, calibrated threshold {level.threshold:.4g}, "
            f"p = {float(level.p_value[index]):.2g}."
        )
        if wrong := self.non_finite.nonzero().flatten().tolist():
            shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
            text += f" {len(wrong)} not finite (NaN or inf): {shown}."
        return text

    def _worst(self) -> tuple[str, int]:
        r"""The context farthest beyond its threshold; raw scores of levels do not compare."""
        name = max(self.levels, key=lambda n: excess(self.levels[n]))
        return name, int(self.levels[name].score.argmax())

    def _rows(self) -> list[list[str]]:
        rows = []
        for name, level in self.levels.items():
            if not len(self):
                continue
            worst = int(level.score.argmax())
            rows.append(
                [
                    name,
                    f"{int(level.flagged.sum())} / {len(self)}",
                    f"{float(level.score.median()):.4g}",
                    f"{float(level.score[worst]):.4g}",
                    str(worst),
                    f"{level.threshold:.4g}",
                    f"{float(level.p_value[worst]):.2g}",
                    f"{100 * float(level.above[worst]):.3g} %",
                ]
            )
        return rows

    def table(self) -> str:
        r"""Returns a table, one line per level, in plain text.

        ``rich.print(report)`` shows the same table in colour, where rich is installed.

        Example:
            >>> guard = flowguard.OODConditioner(policy="report", alpha=0.05)
            >>> guard = guard.fit(torch.randn(512, 3), progress=False)
            >>> guard = guard.calibrate(torch.randn(64, 3), progress=False)
            >>> print(guard.score(torch.zeros(2, 3)).table().splitlines()[-1])
            All 2 contexts are in distribution (alpha = 0.05).
        """
        rows = [list(_HEADER), *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{c:>{w}}" for c, w in zip(r, widths, strict=True)) for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, self.summary()])

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(caption=self.summary())
        for name in _HEADER:
            table.add_column(name, justify="right")
        for row in self._rows():
            table.add_row(*row, style="red" if not row[1].startswith("0 ") else None)
        return table

    def to_dict(self, maps: bool = False) -> dict[str, Any]:
        r"""Returns plain numbers and lists.

        Arguments:
            maps: Whether to include the score of each pixel.
        """

        def level_dict(level: LevelReport) -> dict[str, Any]:
            out: dict[str, Any] = {
                "statistic": level.statistic,
                "score": level.score.tolist(),
                "p_value": level.p_value.tolist(),
                "flagged": level.flagged.tolist(),
                "statistics": {k: v.tolist() for k, v in level.statistics.items()},
                "above": level.above.tolist(),
                "threshold": level.threshold,
                "boundary": level.boundary,
            }
            if maps:
                out["map"] = None if level.map is None else level.map.tolist()
            return out

        return {
            "alpha": self.alpha,
            "attained_alpha": self.attained_alpha,
            "p_value": self.p_value.tolist(),
            "flagged": self.flagged.tolist(),
            "non_finite": self.non_finite.tolist(),
            "levels": {name: level_dict(level) for name, level in self.levels.items()},
        }

    def to_json(self, maps: bool = False) -> str:
        r"""Returns :meth:`to_dict` as JSON; infinite scores, which JSON lacks, as ``"inf"``.

        Arguments:
            maps: Whether to include the score of each pixel.

        Example:
            >>> guard = flowguard.OODConditioner(policy="report", alpha=0.05)
            >>> guard = guard.fit(torch.randn(512, 3), progress=False)
            >>> guard = guard.calibrate(torch.randn(64, 3), progress=False)
            >>> json.loads(guard.score(torch.tensor([[torch.inf, 0.0, 0.0]])).to_json())["flagged"]
            [True]
        """
        return json.dumps(strict_json(self.to_dict(maps)), allow_nan=False)

    def plot(self, image: Tensor | None = None, index: int | None = None) -> "Figure":
        r"""Draws the maps of one context on the calibrated scale; see :func:`plot_report`.

        Arguments:
            image: The image, with shape :math:`(C, H, W)` or :math:`(B, C, H, W)`, if it is to
                be drawn.
            index: Which context of the batch; the one of least p-value by default.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is nothing to draw.
        """
        return plot_report(self, image, index)

    def to_tensorboard(self, writer: Any, step: int, tag: str = "ood") -> None:
        r"""Writes scores, p-values and maps to a ``SummaryWriter``.

        Arguments:
            writer: The writer, with ``add_scalar`` and ``add_images``.
            step: The step.
            tag: What to put in front of the names.
        """
        if not len(self):
            return
        writer.add_scalar(f"{tag}/flagged", float(self.flagged.float().mean()), step)
        writer.add_scalar(f"{tag}/p_value", float(self.p_value.min()), step)
        for name, level in self.levels.items():
            writer.add_scalar(f"{tag}/{name}/score", float(level.score.max()), step)
            writer.add_scalar(f"{tag}/{name}/above", float(level.above.max()), step)
            if level.map is not None:
                picture = nines(level)[:8, None].float() / NINES
                writer.add_images(f"{tag}/{name}/map", picture, step)


def nines(level: LevelReport) -> Tensor:
    r"""Returns the map as a number of nines: 1 at the 0.9 quantile, 2 at 0.99, at most 4.

    A linear scale would draw 99 % of its colours on pixels that are in distribution.

    Arguments:
        level: The report of one level.

    Returns:
        The map, with shape :math:`(B, H, W)`.

    Raises:
        ValueError: If the level scores vectors, which have no map.
    """
    if level.quantile is None:
        raise ValueError(
            f"a level must have a map to be drawn; got {level.name!r}, which scores vectors"
        )
    quantile = level.quantile.double() if level.quantile.device.type != "mps" else level.quantile
    return -torch.log10((1 - quantile).clamp_min(10.0**-NINES))


def coloured(numbers: Tensor) -> Any:
    r"""Returns numbers of nines in the colours of :func:`plot_report`.

    Arguments:
        numbers: The numbers, of any shape :math:`(*)`; what is no number is as far as can be.

    Returns:
        The colours as an array of bytes, with shape :math:`(*, 3)`.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> coloured(torch.tensor([0.0, 4.0])).tolist()
        [[0, 0, 4], [252, 255, 164]]
    """
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: {install('plot')}") from error
    scaled = (numbers.float().cpu() / NINES).clamp(0, 1).nan_to_num(1.0).numpy()
    return (255 * colormaps["inferno"](scaled)[..., :3]).round().astype("uint8")


def plot_report(
    report: OODReport, image: Tensor | None = None, index: int | None = None
) -> "Figure":
    r"""Draws the image beside the map of each level, with a colour bar that says the quantile.

    Arguments:
        report: The report.
        image: The image, with shape :math:`(C, H, W)` or :math:`(B, C, H, W)`, in
            :math:`[0, 1]`; values outside are clipped for display.
        index: Which context of the batch to draw; the one of least p-value by default.

    Returns:
        The figure, which knows no window; ``figure.savefig("ood.png")``.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: {install('plot')}") from error

    if not len(report):
        raise ValueError("a report must hold a context to be drawn; got none")
    index = int(report.p_value.argmin()) if index is None else index
    maps = {name: level for name, level in report.levels.items() if level.map is not None}
    columns = len(maps) + (image is not None)
    if not columns:
        raise ValueError("there must be a level with a map, or an image, to draw; got neither")
    figure = Figure(figsize=(3.2 * columns + 0.8, 3.4), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.set_axis_off()
    if image is not None:
        _draw_image(axes[0], image if image.ndim == 3 else image[index], index)
    drawn: Any = None
    for axis, (name, level) in zip(axes[len(axes) - len(maps) :], maps.items(), strict=True):
        drawn = axis.imshow(
            nines(level)[index].cpu().numpy(),
            cmap="inferno",
            vmin=0,
            vmax=NINES,
            interpolation="nearest",
        )
        score, p = float(level.score[index]), float(level.p_value[index])
        axis.set_title(f"{name}: score {score:.3g}, p = {p:.2g}", fontsize=9)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes, shrink=0.9, extend="max")
        bar.set_ticks(list(TICKS), labels=list(TICKS.values()))
        bar.set_label("quantile among calibration pixels")
    return figure


def _draw_image(axis: Any, image: Tensor, index: int) -> None:
    picture = image.detach().float().cpu().clamp(0, 1).nan_to_num().movedim(0, -1)
    gray = picture.shape[-1] != 3
    axis.imshow((picture.mean(dim=-1) if gray else picture).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_title(f"context {index}", fontsize=9)


_HEADER = ("level", "flagged", "median", "worst", "context", "threshold", "p", "above boundary")
