r"""What the demo writes: a table, a page, pictures, numbers and weights."""

__all__ = [
    "STYLE",
    "aligned",
    "figures",
    "headline",
    "html_table",
    "number",
    "page",
    "panel",
    "table",
    "write",
]

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowguard._version import __version__
from flowguard.demo.run import Result, Sampled
from flowguard.demo.task import NOISE, QUANTILE, Question
from flowguard.io.atomic import atomic, save_tensors, write_json, write_text
from flowguard.io.pictures import to_uint8
from flowguard.ood.report import NINES, nines


def number(value: float) -> str:
    r"""Returns a number of any size, short.

    Arguments:
        value: The number.

    Example:
        >>> number(1.0249), number(123456.0)
        ('1.02', '1e+05')
    """
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.0e}"


def _held_out_rows(result: Result) -> list[list[str]]:
    columns = result.task.columns
    rows = [
        ["held-out photograph", *(name for name, _ in columns.values()), "bits/dim", "training"]
    ]
    measured = {result.task.baseline: result.baseline}
    measured |= {name: t.held_out for name, t in result.models.items()}
    for name, quality in measured.items():
        row = [name]
        row += [f"{quality[k]:{f}}" if k in quality else "" for k, (_, f) in columns.items()]
        if name in result.models:
            seconds = result.models[name].training.seconds
            row += [f"{quality['bits_per_dim']:.3f}", f"{seconds:.0f} s"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def _condition_rows(result: Result) -> list[list[str]]:
    names = list(result.models)
    levels = list(result.sampled[0][names[-1]].report.levels)
    head = ["condition"]
    for name in names:
        head += [f"{name} artefacts", f"{name} max|x|"]
    rows = [head + [f"OOD {level}" for level in levels]]
    for condition, by_model in zip(result.conditions, result.sampled, strict=True):
        row = [condition.name]
        for name in names:
            s = by_model[name]
            row += [f"{100 * s.share:.2f} %", number(s.largest)]
        for r in by_model[names[-1]].report.levels.values():
            ratio = float(r.score[0]) / r.threshold
            row.append(number(ratio) + (" *" if bool(r.flagged[0]) else "  "))
        rows.append(row)
    return rows


def _guarantees(result: Result) -> str:
    lines = [f"The {result.task.bounded} for noise up to {NOISE:g}:"]
    for name, t in result.models.items():
        known = (
            f"at most {t.certified:.1f} for every condition (certificate)"
            if math.isfinite(t.certified)
            else "no bound for every condition (not certified)"
        )
        lines.append(
            f"  {name}: {known}; an attack on the condition, within 1, reached"
            f" {number(t.attacked)}"
        )
    return "\n".join(lines)


def _legend(result: Result) -> str:
    guarded = list(result.models)[-1]
    return (
        f"artefacts: share of pixels that are not finite, or more than 0.5 outside the range of"
        f" [0, 1] and the condition. OOD: Mahalanobis score of the {guarded} model's features over"
        f" its {QUANTILE:g} quantile on held-out photographs; * above it."
        f" Samples at temperature {result.task.temperature:g}."
    )


def aligned(rows: list[list[str]]) -> str:
    r"""Returns rows as a table of plain text, the first column to the left, the others to the right.

    Arguments:
        rows: The rows, the first of them the head.
    """
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def table(result: Result) -> str:
    r"""Returns the tables of the demo as plain text.

    Arguments:
        result: What the demo found out.
    """
    return "\n\n".join(
        (
            aligned(_held_out_rows(result)),
            aligned(_condition_rows(result)),
            _legend(result),
            _guarantees(result),
        )
    )


def _shown(image: Tensor, condition: Tensor) -> Any:
    r"""The image with the range of [0, 1] and the condition mapped to black … white."""
    low, high = min(0.0, float(condition.min())), max(1.0, float(condition.max()))
    return to_uint8((image - low) / (high - low))


def panel(condition: Question, by_model: dict[str, Sampled], title: str = "condition") -> bytes:
    r"""Returns a PNG: condition, samples, artefacts and OOD maps, side by side.

    Arguments:
        condition: The condition.
        by_model: What each model made of it.
        title: What the condition is called.
    """
    from matplotlib.figure import Figure

    y = condition.image[0]
    names = list(by_model)
    guard = by_model[names[-1]].report
    figure = Figure(
        figsize=(3.0 * (2 + len(names) + len(guard.levels)), 2.6), layout="constrained"
    )
    axes = list(figure.subplots(1, 2 + len(names) + len(guard.levels)))
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(_shown(y, y), interpolation="nearest")
    axes[0].set_title(title, fontsize=9)
    for axis, name in zip(axes[1:], names, strict=False):
        axis.imshow(_shown(by_model[name].sample[0], y))
        axis.set_title(f"{name}, max|x| = {number(by_model[name].largest)}", fontsize=9)
    first = by_model[names[0]]
    axes[1 + len(names)].imshow(first.mask[0].numpy(), cmap="gray", vmin=0, vmax=1)
    axes[1 + len(names)].set_title(f"{names[0]} artefacts: {100 * first.share:.1f} %", fontsize=9)
    drawn: Any = None
    for axis, (level, r) in zip(axes[2 + len(names) :], guard.levels.items(), strict=True):
        drawn = axis.imshow(nines(r)[0].cpu().numpy(), cmap="inferno", vmin=0, vmax=NINES)
        flagged = " (flagged)" if bool(r.flagged[0]) else ""
        axis.set_title(f"OOD {level}: p = {float(r.p_value[0]):.2g}{flagged}", fontsize=9)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9, extend="max")
    bar.set_ticks([0, 1, 2, 3, 4], labels=["0", "0.9", "0.99", "0.999", "0.9999"])
    bar.set_label("quantile of calibration pixels", fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90)
    return stream.getvalue()


def headline(result: Result) -> bytes:
    r"""Returns the README's picture: affine beside robust on the same condition, as PNG.

    Arguments:
        result: What the demo found out.
    """
    from matplotlib.figure import Figure

    index = next(
        (i for i, c in enumerate(result.conditions) if c.name == result.task.headline),
        len(result.conditions) - 1,
    )
    condition, by_model = result.conditions[index], result.sampled[index]
    y = condition.image[0]
    names = list(by_model)
    level, r = next(reversed(by_model[names[-1]].report.levels.items()))
    pictures: list[tuple[Any, str, dict[str, Any]]] = [
        (_shown(y, y), f"condition: {condition.name}", {"interpolation": "nearest"})
    ]
    pictures += [
        (
            _shown(by_model[name].sample[0], y),
            f"{name}: max|x| = {number(by_model[name].largest)}",
            {},
        )
        for name in names
    ]
    pictures.append(
        (
            nines(r)[0].cpu().numpy(),
            f"how far the condition is\nfrom the training set ({level})",
            {"cmap": "inferno", "vmin": 0, "vmax": NINES},
        )
    )
    figure = Figure(figsize=(3.4 * len(pictures), 2.9), layout="constrained")
    for axis, (picture, title, options) in zip(
        figure.subplots(1, len(pictures)), pictures, strict=True
    ):
        axis.set_axis_off()
        axis.imshow(picture, **options)
        axis.set_title(title, fontsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=80)
    return stream.getvalue()


def html_table(rows: Sequence[Sequence[str]]) -> str:
    r"""Returns rows as a table of HTML, escaped.

    Arguments:
        rows: The rows, the first of them the head.
    """
    head, *body = (
        "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"
        for row, tag in [(rows[0], "th"), *((r, "td") for r in rows[1:])]
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


#: The style sheet of the pages.
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tbody tr:nth-child(odd) { background: #f4f4f4 }
figure { margin: 1.5em 0 } img { max-width: 100% }
"""


def figures(names: Iterable[str], panels: Iterable[bytes]) -> str:
    r"""Returns pictures under their names, as HTML that holds them.

    Arguments:
        names: The names.
        panels: A PNG for each.
    """
    return "".join(
        f"<figure><figcaption><b>{html.escape(name)}</b></figcaption>"
        f'<img alt="{html.escape(name)}"'
        f' src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for name, png in zip(names, panels, strict=True)
    )


def page(result: Result, panels: list[bytes]) -> str:
    r"""Returns the report as one self-contained page.

    Arguments:
        result: What the demo found out.
        panels: One PNG for each condition.
    """
    o = result.options
    pictures = figures((c.name for c in result.conditions), panels)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>flowguard demo</title>'
        f"<style>{STYLE}</style><h1>flowguard demo</h1>"
        f"<p>{result.task.title}, {o.steps} steps, seed {o.seed}; the models differ only in"
        f" their coupling. flowguard {__version__}, torch {torch.__version__}.</p>"
        f"{html_table(_held_out_rows(result))}{html_table(_condition_rows(result))}"
        f"<p>{html.escape(_legend(result))} In the panels, black to white spans the range of"
        " [0, 1] and the condition; values beyond are cut, NaN is black.</p>"
        f"<pre>{html.escape(_guarantees(result))}</pre>{pictures}</html>\n"
    )


def _slug(name: str) -> str:
    plain = name.replace("σ", "sigma").replace(".", "_")
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in plain).split())


def _panel_name(index: int, condition: str) -> str:
    return f"panel-{index:02d}-{_slug(condition)}.png"


def _earlier_panels(numbers: Path) -> list[str]:
    r"""The names of the panels of the run that wrote these numbers, if a run of the demo did."""
    try:
        conditions = json.loads(numbers.read_text(encoding="utf-8"))["conditions"]
        return [_panel_name(i, str(c["name"])) for i, c in enumerate(conditions)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def write(result: Result) -> list[Path]:
    r"""Writes report, numbers, panels and weights to the folder, each file whole or not at all.

    Panels of an earlier run that has other conditions are removed; no other file is.

    Arguments:
        result: What the demo found out.

    Returns:
        The files written, the report first.
    """
    out = result.options.out
    saved = []  # the weights first: they took the longest to make
    for name, trained in result.models.items():
        weights = {k: v.detach().cpu().contiguous() for k, v in trained.model.state_dict().items()}
        file = out / f"{name}.safetensors"
        with atomic(file) as temporary:
            save_tensors(temporary, weights, {"flowguard": __version__, "coupling": name})
        saved.append(file)
    panels = [
        panel(c, by_model, result.task.condition)
        for c, by_model in zip(result.conditions, result.sampled, strict=True)
    ]
    report, numbers = out / "report.html", out / "metrics.json"
    write_text(report, page(result, panels))
    pictures = {"headline.png": headline(result)}
    pictures |= {
        _panel_name(i, c.name): png
        for i, (c, png) in enumerate(zip(result.conditions, panels, strict=True))
    }
    for name, png in pictures.items():
        with atomic(out / name) as temporary:
            temporary.write_bytes(png)
    for name in set(_earlier_panels(numbers)) - set(pictures):
        (out / name).unlink(missing_ok=True)
    # The last, for until then it says which panels an earlier run wrote.
    write_json(numbers, result.to_dict())
    return [report, numbers, *(out / name for name in pictures), *saved]
