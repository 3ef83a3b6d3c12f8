r"""What a comparison writes: one table, one page, pictures, numbers and models."""

__all__ = ["COLUMNS", "legend", "page", "rows", "table", "write"]

import html
import math
from pathlib import Path

import torch

from flowguard.demo.compare import Comparison
from flowguard.demo.page import document, fitting, folded
from flowguard.demo.page import table as html_table
from flowguard.demo.report import aligned, cards, finding, foreseen, words
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
    ("step_cpu_ms", "CPU ms/step", ".0f"),
    ("sample_seconds", "s/sample", ".3f"),
    ("sample_cpu_seconds", "CPU s/sample", ".3f"),
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
    measured = [m.numbers for m in result.models.values()]
    found = [c for c in COLUMNS if not all(math.isnan(n.get(c[0], math.nan)) for n in measured)]
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
        " other conditions; pixels: the share of the pixels. CPU: the time of"
        " all threads of the process. certificate: what the"
        f" {task.bounded} cannot exceed for any condition and noise up to {NOISE:g}; none: no"
        " bound."
    )


def table(result: Comparison) -> str:
    r"""Returns the table as plain text.

    Arguments:
        result: What the comparison found out.
    """
    return aligned(rows(result)) + "\n\n" + legend(result)


def page(result: Comparison) -> str:
    r"""Returns the report as one self-contained page, small enough to be sent.

    Arguments:
        result: What the comparison found out.
    """
    return fitting(lambda quality: _page(result, quality))


def _page(result: Comparison, quality: int) -> str:
    o, task = result.options, result.task
    learned = f"{len(o.images)} pictures" if len(o.images) else "the built-in photographs"
    trained = f"{', '.join(o.couplings)}: trained on {learned} for {o.steps} steps each." * bool(
        o.couplings
    )
    loaded = f" {', '.join(o.loaded)}: compared as they are." * bool(o.loaded)
    numbers = html_table(
        rows(result), "What was measured of each model; empty where there is nothing to measure"
    )
    body = (
        f"<p>{html.escape(f'{trained}{loaded} {foreseen(result.sampled)}')} Artefacts are pixels with"
        ' values that no picture has (<a href="#words">what the words mean</a>).</p>'
        + cards(task, result.conditions, result.sampled, task.headline, quality)
        + f"<h2>All numbers</h2>{numbers}"
        + folded("What the columns mean", f"<p>{html.escape(legend(result))}</p>")
        + f'<h2 id="words">What the words mean</h2>{words(task, result.sampled)}'
        + f'<p class="faint">torch {torch.__version__}, {result.threads} thread(s),'
        f" {html.escape(o.device)}, seed {o.seed}.</p>"
    )
    return document(f"flowguard compare: {task.title}", body, finding(result.sampled))


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
    files = [out / "report.html", out / "metrics.json"]
    write_text(files[0], page(result))
    write_json(files[1], result.to_dict())
    return files + saved
