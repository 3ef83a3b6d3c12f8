r"""Pictures of a report. Maps are drawn on the calibrated scale, never min-max per image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowguard.ood.report import LevelReport, OODReport

__all__ = ["NINES", "nines", "plot_report"]

NINES = 4
"""The upper end of the scale: beyond the 0.9999 quantile, all pixels look the same."""


def nines(level: LevelReport) -> Tensor:
    r"""Returns the map as a number of nines: 1 at the 0.9 quantile, 2 at 0.99, at most 4.

    A linear scale would draw 99 % of its colours on pixels that are in distribution.
    """
    if level.quantile is None:
        raise ValueError(f"{level.name!r} scores vectors; it has no map to draw.")
    quantile = level.quantile.double() if level.quantile.device.type != "mps" else level.quantile
    return -torch.log10((1 - quantile).clamp_min(10.0**-NINES))


def plot_report(
    report: OODReport, image: Tensor | None = None, index: int | None = None
) -> Figure:
    r"""Draws the image beside the map of each level, with a colour bar that says the quantile.

    Arguments:
        report: The report.
        image: The image, with shape :math:`(C, H, W)` or :math:`(B, C, H, W)`, in
            :math:`[0, 1]`; values outside are clipped for display.
        index: Which context of the batch to draw; the one of least p-value by default.

    Returns:
        The figure, which knows no window; ``figure.savefig("ood.png")``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Plots need matplotlib; run `pip install "flowguard-nf[plot]"`.'
        ) from error

    if not len(report):
        raise ValueError("The report holds no context; there is nothing to draw.")
    index = int(report.p_value.argmin()) if index is None else index
    maps = {name: level for name, level in report.levels.items() if level.map is not None}
    columns = len(maps) + (image is not None)
    if not columns:
        raise ValueError("No level of the report has a map, and no image was given.")
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
        bar.set_ticks(
            [0, 0.301, 1, 2, 3, 4], labels=["0", "0.5", "0.9", "0.99", "0.999", "0.9999"]
        )
        bar.set_label("quantile among calibration pixels")
    return figure


def _draw_image(axis: Any, image: Tensor, index: int) -> None:
    picture = image.detach().float().cpu().clamp(0, 1).nan_to_num().movedim(0, -1)
    gray = picture.shape[-1] != 3
    axis.imshow((picture.mean(dim=-1) if gray else picture).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_title(f"context {index}", fontsize=9)
