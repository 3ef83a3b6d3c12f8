r"""What a score tells: per image, per level, per pixel."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowguard.ood.calibration import Calibration

__all__ = ["LevelReport", "OODReport"]


@dataclass(frozen=True, eq=False)
class LevelReport:
    r"""The scores of one level for a batch of :math:`B` contexts."""

    name: str
    statistic: str
    """What :attr:`score` is of the pixel scores: ``"mean"``, ``"max"`` or ``"share"``."""
    statistics: dict[str, Tensor]
    """All three statistics, each with shape :math:`(B)`."""
    p_values: dict[str, Tensor]
    """Their conformal p-values."""
    map: Tensor | None
    """The squared Mahalanobis distance per pixel, with shape :math:`(B, H, W)`, not for vectors."""
    above: Tensor
    """The share of pixels above :attr:`boundary`, with shape :math:`(B)`."""
    boundary: float
    """The calibrated pixel score beyond which ``"shrink"`` pulls back."""
    threshold: float
    """The score above which an image is flagged."""
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
    """

    levels: dict[str, LevelReport]
    non_finite: Tensor
    """Which contexts or embeddings hold NaN or inf, with shape :math:`(B)`."""
    alpha: float
    """The share of false alarms that was asked for."""
    attained_alpha: float
    """The share of false alarms that the calibration can promise."""

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
        r"""Returns one sentence on what is flagged."""
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
        """The context farthest beyond its threshold; raw scores of levels do not compare."""

        def excess(level: LevelReport) -> Tensor:
            return level.score / max(level.threshold, torch.finfo(torch.float32).tiny)

        name = max(self.levels, key=lambda n: float(excess(self.levels[n]).max()))
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
        r"""Returns :meth:`to_dict` as JSON; infinite scores, which JSON lacks, as ``"inf"``."""
        return json.dumps(_strict(self.to_dict(maps)), allow_nan=False)

    def plot(self, image: Tensor | None = None, index: int | None = None) -> Figure:
        r"""Draws the maps of one context on the calibrated scale; see :func:`plot_report`."""
        from flowguard.ood.plot import plot_report

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
                from flowguard.ood.plot import NINES, nines

                picture = nines(level)[:8, None].float() / NINES
                writer.add_images(f"{tag}/{name}/map", picture, step)


_HEADER = ("level", "flagged", "median", "worst", "context", "threshold", "p", "above boundary")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value
