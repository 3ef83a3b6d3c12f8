r"""What the demo writes: a table, a page, pictures, numbers and model folders."""

__all__ = [
    "aligned",
    "breaks",
    "cards",
    "finding",
    "foreseen",
    "guarded",
    "headline",
    "number",
    "page",
    "panel",
    "table",
    "words",
    "write",
]

import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowguard.demo import page as html
from flowguard.demo.drawing import encoded, guard_map, marked, seen, shrunk
from flowguard.demo.page import Drawn
from flowguard.demo.run import Result, Sampled, Trained
from flowguard.demo.task import NOISE, QUANTILE, Question, Task
from flowguard.io.atomic import atomic, write_json, write_text
from flowguard.io.pictures import to_uint8
from flowguard.metrics import span
from flowguard.ood.report import NINES, OODReport, excess, nines

WIDEST = 640  # pixels of the page's pictures, at most
OPEN = 3  # conditions that break which are shown beside the first; the others are folded

#: What the couplings do, for those who have not met them.
COUPLINGS = {
    "affine": "An affine coupling multiplies by a scale; to sample is to divide by it, and for a"
    " strange condition many scales come close to 0, one layer after the other.",
    "reparametrized": "A reparametrized affine coupling keeps its scales away from 0.",
    "robust": "A robust coupling bends values within a box by a spline whose slope is bounded, and"
    " shifts them by a bounded amount: whatever the condition is, nothing can grow without end.",
    "bspline": "A B-spline coupling bends values within a box, and leaves them as they are beyond.",
}


def number(value: float) -> str:
    r"""Returns a number of any size, short.

    Arguments:
        value: The number.

    Example:
        >>> number(1.0249), number(1234.5), number(123456.0)
        ('1.02', '1234', '1e+05')
    """
    if 1e3 <= abs(value) < 1e4:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.0e}"


def _large(value: float) -> str:
    return f"values up to {number(value)}" if math.isfinite(value) else "values without end"


def _level(name: str) -> str:
    return name.replace("level", "level ")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share >= 1e-4 else f"{100 * share:.1g} %"


def _time(trained: Trained, device: str) -> str:
    # What others do on the machine counts by the clock; of a GPU there is nothing but the clock.
    if device == "cpu":
        return f"{trained.training.cpu_seconds:.0f} CPU s"
    return f"{trained.training.seconds:.0f} s"


def _held_out_rows(result: Result) -> list[list[str]]:
    columns = result.task.columns
    rows = [
        ["held-out photograph", *(name for name, _ in columns.values()), "bits/dim", "training"]
    ]
    # What is made without a model is the same at all temperatures.
    baseline = {k: result.baseline[k.removesuffix("_temperature_0")] for k in columns}
    measured = {result.task.baseline: baseline}
    measured |= {name: t.held_out for name, t in result.models.items()}
    for name, quality in measured.items():
        row = [name]
        row += [f"{quality[k]:{f}}" for k, (_, f) in columns.items()]
        if name in result.models:
            row += [
                f"{quality['bits_per_dim']:.3f}",
                _time(result.models[name], result.options.device),
            ]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def _condition_rows(result: Result) -> list[list[str]]:
    names = list(result.models)
    levels = list(result.sampled[0][names[-1]].report.levels)
    head = ["condition"]
    for name in names:
        head += [f"{name} artefacts", f"{name} max|x|"]
    rows = [head + [f"guard, {_level(level)}" for level in levels]]
    for condition, by_model in zip(result.conditions, result.sampled, strict=True):
        row = [condition.name]
        for name in names:
            s = by_model[name]
            row += [f"{100 * s.share:.2f} %", number(s.largest)]
        for r in by_model[names[-1]].report.levels.values():
            row.append(number(excess(r)) + (" *" if bool(r.flagged[0]) else "  "))
        rows.append(row)
    return rows


def _guarantees(result: Result) -> list[str]:
    lines = []
    for name, t in result.models.items():
        known = (
            f"at most {t.certified:.1f} for every condition (certificate)"
            if math.isfinite(t.certified)
            else "no bound for every condition (not certified)"
        )
        lines.append(
            f"{name}: {known}; an attack on the condition, within 1, reached {number(t.attacked)}"
        )
    return lines


def _bounded(result: Result) -> str:
    return f"The {result.task.bounded} for noise up to {NOISE:g}:"


def _legend(result: Result) -> str:
    guard = list(result.models)[-1]
    return (
        f"artefacts: share of pixels that are not finite, or more than 0.5 outside the range of"
        f" [0, 1] and the condition. guard: Mahalanobis score of the {guard} model's features over"
        f" its {QUANTILE:g} quantile on crops that the flow was not trained with; * above it."
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
            "\n  ".join([_bounded(result), *_guarantees(result)]),
        )
    )


# -- what is said ----------------------------------------------------------------------------


def guarded(report: OODReport) -> str:
    r"""Returns what the guard says of a condition, in units of its threshold.

    Arguments:
        report: The report of one condition.
    """
    most = max(map(excess, report.levels.values()))
    flagged = "flagged by the guard" if bool(report.flagged[0]) else "not flagged by the guard"
    return f"{flagged} ({number(most)} × its threshold)"


def _outcome(name: str, s: Sampled) -> str:
    if not s.share:
        return f"{name}: no artefacts, {_large(s.largest)}"
    broken = f", {s.non_finite} of them not finite" if s.non_finite else ""
    return f"{name}: {_percent(s.share)} artefact pixels, {_large(s.largest)}{broken}"


def breaks(by_model: Mapping[str, Sampled]) -> float:
    r"""Returns the largest share of artefact pixels that any model makes of a condition.

    Arguments:
        by_model: What each model made of it.
    """
    return max(s.share for s in by_model.values())


def finding(sampled: Sequence[Mapping[str, Sampled]]) -> str:
    r"""Returns in one sentence on how many conditions each model breaks, and how badly.

    Arguments:
        sampled: What each model made of each condition.
    """
    total = len(sampled)
    told = []
    for name in sampled[0]:
        bad = [by[name] for by in sampled if by[name].share]
        if not bad:
            largest = max(by[name].largest for by in sampled)
            told.append(f"{name} on none ({_large(largest)})")
            continue
        worst, largest = max(s.share for s in bad), max(s.largest for s in bad)
        many = "all" if len(bad) == total else str(len(bad))
        told.append(
            f"{name} on {many} (artefacts in up to {_percent(worst)} of the pixels,"
            f" {_large(largest)})"
        )
    return f"Of {total} conditions the flows break: {'; '.join(told)}."


def foreseen(sampled: Sequence[Mapping[str, Sampled]]) -> str:
    r"""Returns in one sentence whether the guard of the last model knew where artefacts come;
    nothing if there are none.

    Arguments:
        sampled: What each model made of each condition.
    """
    guard = list(sampled[0])[-1]
    flags = [bool(by[guard].report.flagged[0]) for by in sampled if breaks(by)]
    if not flags:
        return ""
    many = "every condition" if all(flags) else f"{sum(flags)} of the {len(flags)} conditions"
    return (
        f"Before anything is sampled, the guard of the {guard} flow flags {many} on which there"
        " are artefacts."
    )


def words(task: Task, sampled: Sequence[Mapping[str, Sampled]]) -> str:
    r"""Returns what the words of the page mean, as HTML.

    Arguments:
        task: The task.
        sampled: What each model, which may be called as its coupling, made of each condition.
    """
    couplings = {name.rstrip("0123456789") for name in sampled[0]}
    report = sampled[0][list(sampled[0])[-1]].report
    count = max(len(level.calibration.scores) for level in report.levels.values())
    maps = " ".join(said for name, said in COUPLINGS.items() if name in couplings)
    entries = {
        "flow": "A network that can be run both ways: it turns noise into a picture that suits its"
        " condition, here for " + task.title + ", and tells how likely a given picture is. More"
        f" noise, a higher temperature, gives more varied samples; these are at {task.temperature:g}.",
        "coupling": "What a flow is a chain of. It changes some numbers by a simple map that others,"
        f" and the condition, decide. {maps}",
        "artefact": "A pixel that is not finite, or more than 0.5 outside the range of [0, 1] and"
        " the condition: no photograph has such a value. In the pictures black to white spans that"
        " range; values beyond it are cut, and what is no number is black.",
        "guard": "It compares the features of a condition with those of the training photographs,"
        " pixel by pixel at each level of the flow. Its maps are coloured by the quantile among"
        f" the pixels of {count} calibration crops, which the bar below each names; its score of"
        " the whole is told in units of the threshold above which it flags. (A p-value could not"
        f" tell strange from very strange: with {count} crops none is below 1/{count + 1}.)",
        "certificate": "A number that the weights alone prove: no condition whatever makes the"
        f" {task.bounded} exceed it, for noise up to {NOISE:g}.",
    }
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in entries.items()) + "</dl>"


# -- what is shown ---------------------------------------------------------------------------


def _drawn(
    task: Task, question: Question, by_model: Mapping[str, Sampled], quality: int
) -> list[Drawn]:
    r"""The condition, its restoration without a model, samples, artefacts and the guard's maps."""
    y = question.image
    within = span(y)
    black_to_white = f"{number(within[0])} to {number(within[1])}"

    def shown(image: Tensor) -> Tensor:
        return shrunk(seen(image, within)[0].nan_to_num(0.0).clamp(0, 1), WIDEST)

    pictures = [
        Drawn(
            encoded(shown(y), quality + 12),  # few pixels
            f"{task.condition}: {question.name}; black to white is {black_to_white}",
            f"the condition {question.name}",
            pixels=True,
        ),
        Drawn(
            encoded(shown(task.restored(y)), quality),
            f"{task.baseline}: no model",
            f"{task.baseline} of {question.name}",
        ),
    ]
    for name, s in by_model.items():
        told = _outcome(name, s)
        image = encoded(shown(s.sample), quality)
        pictures.append(Drawn(image, told, f"sample for {question.name}, {told}", name))
    for name, s in by_model.items():
        if s.share:
            told = f"{name}: its {_percent(s.share)} artefact pixels, in pink"
            mask = shrunk(s.mask.float(), WIDEST)[0] > 0
            pictures.append(Drawn(marked(shown(s.sample), mask), told, told))
    guard = list(by_model)[-1]
    for level, r in by_model[guard].report.levels.items():
        if r.map is not None:
            flagged = "flagged" if bool(r.flagged[0]) else "not flagged"
            told = f"guard of {guard}, {_level(level)}: {number(excess(r))} × its threshold, {flagged}"
            pictures.append(
                Drawn(
                    guard_map(r),
                    told,
                    f"how far {question.name} is from the training set, {told}",
                    pixels=True,
                    colours=True,
                )
            )
    return pictures


def cards(
    task: Task,
    conditions: Sequence[Question],
    sampled: Sequence[Mapping[str, Sampled]],
    first: str,
    quality: int = html.QUALITIES[0],
) -> str:
    r"""Returns what became of the conditions, as HTML: one picture that shows the finding, then the
    conditions on which a model breaks, the worst first, and the others folded away.

    Arguments:
        task: The task.
        conditions: The conditions.
        sampled: What each model made of each of them.
        first: The condition that comes first, if a model breaks there.
        quality: The quality of the pictures.
    """

    def made(i: int, title: str, level: int = 3) -> str:
        by_model = sampled[i]
        told = [conditions[i].meaning] if conditions[i].meaning else []
        told += [_outcome(name, s) for name, s in by_model.items()]
        told.append(guarded(list(by_model.values())[-1].report))
        sample = next(iter(by_model.values())).sample
        size = (sample.shape[-2], sample.shape[-1])
        pictures = _drawn(task, conditions[i], by_model, quality)
        words = "; ".join(told)
        return html.card(title, f"{words[:1].upper()}{words[1:]}.", pictures, size, level)

    def hidden(i: int) -> str:
        told = "; ".join(_outcome(name, s) for name, s in sampled[i].items() if s.share)
        told = told or guarded(list(sampled[i].values())[-1].report)
        return html.folded(f"{conditions[i].name}: {told}", made(i, conditions[i].name))

    order = sorted(range(len(conditions)), key=lambda i: -breaks(sampled[i]))
    broken = [i for i in order if breaks(sampled[i])]
    whole = [i for i in range(len(conditions)) if i not in broken]
    top = next((i for i in broken or order if conditions[i].name == first), (broken or order)[0])
    parts = [made(top, f"In one picture: {conditions[top].name}", 2)]
    rest = [i for i in broken if i != top]
    if rest:
        parts.append("<h2>The other conditions with artefacts, the worst first</h2>")
        parts += [made(i, conditions[i].name) for i in rest[:OPEN]]
        parts += map(hidden, rest[OPEN:])
    whole = [i for i in whole if i != top]
    if whole:
        parts.append("<h2>Conditions without artefacts</h2>")
        parts += map(hidden, whole)
    return "".join(parts)


def _proven(result: Result) -> str:
    return " ".join(
        f"No condition whatever makes the {result.task.bounded} of the {name} flow exceed"
        f" {t.certified:.1f}, which a certificate proves."
        for name, t in result.models.items()
        if math.isfinite(t.certified)
    )


def _beside(result: Result) -> str:
    r"""What the flows are worth within their world, beside the restoration without a model."""
    told = [
        f"{name} {t.held_out['psnr_temperature_0']:.2f} dB" for name, t in result.models.items()
    ]
    return (
        "On a photograph that they were not trained with, at temperature 0:"
        f" {', '.join(told)}; {result.task.baseline} {result.baseline['psnr']:.2f} dB."
    )


def _shared(result: Result) -> str:
    r"""Which encoder the flows are built on, if it is one."""
    weights = result.options.encoder
    if weights is None:
        return ""
    return f", on top of the encoder of {weights.name}, which stays as it is"


def page(result: Result) -> str:
    r"""Returns the report as one self-contained page, small enough to be sent.

    Arguments:
        result: What the demo found out.
    """
    return html.fitting(lambda quality: _page(result, quality))


def _page(result: Result, quality: int) -> str:
    o, task = result.options, result.task
    told = [foreseen(result.sampled), _proven(result), _beside(result)]
    about = (
        f"<p>Two flows for {task.title} differ in their coupling alone. Both learned from the same"
        f" photographs for {o.steps} steps{escape(_shared(result))}; then they are asked for"
        " conditions within and without their world. Artefacts are pixels with values that no"
        ' photograph has (<a href="#words">what the words mean</a>).</p>'
        f"<ul>{''.join(f'<li>{line}</li>' for line in told if line)}</ul>"
    )
    held_out = html.table(
        _held_out_rows(result),
        "Quality on a photograph that the flows were not trained with: at temperature 0 (τ=0),"
        f" where a flow gives its best guess, and of a sample at {task.temperature:g}",
    )
    bounds = "".join(f"<li>{line}</li>" for line in _guarantees(result))
    numbers = html.table(
        _condition_rows(result),
        "All conditions: artefacts, largest values, and the guard's scores",
    )
    body = (
        about
        + cards(task, result.conditions, result.sampled, task.headline, quality)
        + f"<h2>Within their world</h2>{held_out}"
        + f"<h2>What is guaranteed</h2><p>{_bounded(result)}</p><ul>{bounds}</ul>"
        + '<h2 id="words">What the words mean</h2>'
        + words(task, result.sampled)
        + "<h2>All numbers</h2>"
        + html.folded(
            f"A table of {len(result.conditions)} conditions",
            f'{numbers}<p class="faint">{_legend(result)}</p>',
        )
        + f'<p class="faint">torch {torch.__version__}, {result.threads} thread(s), {o.device}, seed {o.seed}.</p>'
    )
    return html.document(f"flowguard demo: {task.title}", body, finding(result.sampled))


def _pixels(image: Tensor, condition: Tensor) -> Any:
    r"""The image with the range of [0, 1] and the condition mapped to black … white."""
    return to_uint8(seen(image, span(condition)))


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
        figsize=(3.6 * (2 + len(names) + len(guard.levels)), 3.0), layout="constrained"
    )
    axes = list(figure.subplots(1, 2 + len(names) + len(guard.levels)))
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(_pixels(y, y), interpolation="nearest")
    axes[0].set_title(title, fontsize=12)
    for axis, name in zip(axes[1:], names, strict=False):
        axis.imshow(_pixels(by_model[name].sample[0], y))
        axis.set_title(f"{name}, max|x| = {number(by_model[name].largest)}", fontsize=12)
    first = by_model[names[0]]
    axes[1 + len(names)].imshow(first.mask[0].numpy(), cmap="gray", vmin=0, vmax=1)
    axes[1 + len(names)].set_title(f"{names[0]} artefacts: {100 * first.share:.1f} %", fontsize=12)
    drawn: Any = None
    for axis, (level, r) in zip(axes[2 + len(names) :], guard.levels.items(), strict=True):
        drawn = axis.imshow(nines(r)[0].cpu().numpy(), cmap="inferno", vmin=0, vmax=NINES)
        flagged = ", flagged" if bool(r.flagged[0]) else ""
        axis.set_title(
            f"guard, {_level(level)}: {number(excess(r))} × threshold{flagged}", fontsize=12
        )
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9, extend="max")
    bar.set_ticks([0, 1, 2, 3, 4], labels=["0", "0.9", "0.99", "0.999", "0.9999"])
    bar.set_label("quantile of calibration pixels", fontsize=11)
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
    level, r = list(by_model[names[-1]].report.levels.items())[-1]
    pictures: list[tuple[Any, str, dict[str, Any]]] = [
        (_pixels(y, y), f"condition: {condition.name}", {"interpolation": "nearest"})
    ]
    pictures += [
        (
            _pixels(by_model[name].sample[0], y),
            f"{name}: max|x| = {number(by_model[name].largest)}",
            {},
        )
        for name in names
    ]
    pictures.append(
        (
            nines(r)[0].cpu().numpy(),
            f"how far the condition is\nfrom the training set ({_level(level)})",
            {"cmap": "inferno", "vmin": 0, "vmax": NINES},
        )
    )
    figure = Figure(figsize=(3.4 * len(pictures), 2.9), layout="constrained")
    for axis, (picture, title, options) in zip(
        figure.subplots(1, len(pictures)), pictures, strict=True
    ):
        axis.set_axis_off()
        axis.imshow(picture, **options)
        axis.set_title(title, fontsize=12)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=80)
    return stream.getvalue()


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
    r"""Writes report, numbers, panels and a folder for each model, each file whole or not at all.

    Panels of an earlier run that has other conditions are removed; no other file is.

    Arguments:
        result: What the demo found out.

    Returns:
        What was written, the report first and the folders of the models last.
    """
    out = result.options.out
    saved = []  # the models first: they took the longest to make
    for name, trained in result.models.items():
        trained.model.save_pretrained(out / name)
        saved.append(out / name)
    panels = [
        panel(c, by_model, result.task.condition)
        for c, by_model in zip(result.conditions, result.sampled, strict=True)
    ]
    report, numbers = out / "report.html", out / "metrics.json"
    write_text(report, page(result))
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
