r"""What a comparison writes: one table, one page, pictures, numbers and models."""

__all__ = ["COLUMNS", "legend", "page", "rows", "table", "write"]

import html
import math
from pathlib import Path

import torch

from flowguard._version import __version__
from flowguard.demo.compare import Comparison
from flowguard.demo.report import STYLE, aligned, figures, html_table, panel
from flowguard.demo.task import NOISE
from flowguard.io.atomic import write_json, write_text

#: The columns: the number's name, its heading, and how it is written.
COLUMNS = (
    ("psnr", "PSNR", ".2f"),
    ("psnr_gt_mean", "with GT mean", ".2f"),
    ("ssim", "SSIM", ".3f"),
    ("psnr_temperature_0", "PSNR τ=0", ".2f"),
    ("ssim_temperature_0", "SSIM τ=0", ".3f"),
    ("bits_per_dim", "bits/dim", ".3f"),
    ("diversity", "diversity", ".1f"),
    ("lr_psnr", "LR-PSNR", ".2f"),
    ("in_error_rate", "errors in", "%"),
    ("in_nan_rate", "NaN in", "%"),
    ("out_error_rate", "errors out", "%"),
    ("out_error_pixels", "pixels out", "%"),
    ("out_nan_rate", "NaN out", "%"),
    ("certificate", "certificate", ".4g"),
    ("step_ms", "ms/step", ".0f"),
    ("sample_seconds", "s/sample", ".3f"),
)


def _cell(value: float | None, kind: str) -> str:
    if value is None or math.isnan(value):
        return ""
    if kind == "%":
        return f"{100 * value:.3g} %"
    return "none" if math.isinf(value) and kind == ".4g" else f"{value:{kind}}"


def rows(result: Comparison) -> list[list[str]]:
    r"""Returns the table, its first row the head; columns that no model has are left out.

    Arguments:
        result: What the comparison found out.
    """
    found = [c for c in COLUMNS if any(c[0] in m.numbers for m in result.models.values())]
    head = ["coupling", *(title for _, title, _ in found)]
    return [head] + [
        [name, *(_cell(m.numbers.get(key), kind) for key, _, kind in found)]
        for name, m in result.models.items()
    ]


def legend(result: Comparison) -> str:
    r"""Returns what the columns mean.

    Arguments:
        result: What the comparison found out.
    """
    o, task = result.options, result.task
    return (
        f"Means over {o.samples} sample(s) of the held-out picture at temperature"
        f" {task.temperature:g}; τ=0: at temperature 0. SSIM: MATLAB-like, of colours. bits/dim:"
        " an upper bound on the held-out picture. diversity: the NTIRE score in percent, here of"
        " the squared error. LR-PSNR: the reduced sample against the condition. errors: samples"
        " with a value that is not finite or more than 0.5 outside the range of [0, 1] and the"
        f" condition; in: of the held-out picture; out: over the {len(result.conditions) - 1}"
        " other conditions; pixels: the share of the pixels. certificate: what the"
        f" {task.bounded} cannot exceed for any condition and noise up to {NOISE:g}; none: no"
        " bound."
    )


def table(result: Comparison) -> str:
    r"""Returns the table as plain text.

    Arguments:
        result: What the comparison found out.
    """
    return aligned(rows(result)) + "\n\n" + legend(result)


def page(result: Comparison, panels: list[bytes]) -> str:
    r"""Returns the report as one self-contained page.

    Arguments:
        result: What the comparison found out.
        panels: One PNG for each condition.
    """
    o = result.options
    pictures = figures((c.name for c in result.conditions), panels)
    learned = f"{len(o.images)} pictures" if len(o.images) else "the built-in photographs"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>flowguard compare</title>'
        f"<style>{STYLE}</style><h1>flowguard compare</h1>"
        f"<p>{html.escape(result.task.title)} on {learned}, {o.steps} steps for each coupling that"
        f" was trained, seed {o.seed}. flowguard {__version__}, torch {torch.__version__},"
        f" {result.threads} thread(s), {html.escape(o.device)}.</p>"
        f"{html_table(rows(result))}<p>{html.escape(legend(result))}</p>{pictures}</html>\n"
    )


def write(result: Comparison, out: Path) -> list[Path]:
    r"""Writes page, numbers and the models that were trained, each file whole or not at all.

    Arguments:
        result: What the comparison found out.
        out: The folder.

    Returns:
        What was written, the page first.
    """
    saved = []  # the models first: they took the longest to make
    for name in result.options.couplings:
        result.models[name].model.save_pretrained(out / name)
        saved.append(out / name)
    panels = [
        panel(c, by_model, result.task.condition)
        for c, by_model in zip(result.conditions, result.sampled, strict=True)
    ]
    files = [out / "report.html", out / "metrics.json"]
    write_text(files[0], page(result, panels))
    write_json(files[1], result.to_dict())
    return files + saved
