r"""What a run of training tells in the end: its curves, numbers and pictures on one page."""

__all__ = ["chart", "page", "write"]

import csv
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowguard.demo.page import Drawn, document, figures, folded, table
from flowguard.io.atomic import write_text

Points = Sequence[tuple[float, float]]
Rows = list[dict[str, str]]

#: What the tables tell.
TABLES = {
    "metrics": "Of each step: the loss in bits/dim, the learning rate, the norm of the gradient,"
    " seconds, and how many steps were left out",
    "validation": "On held-out pictures: quality at temperature 0, and at 0.8 as sample_…",
    "outside": "On strange conditions: artefacts, the guard, the bound and an attack",
}
WIDTH, HEIGHT, LEFT, LOW, RIGHT = 460, 240, 62, 26, 22  # of a chart, and of the room for numbers
LINE = 15  # the height of a line of words
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
POINTS = 400  # of a curve, at most: more are averaged

#: The charts: a title, the table, and the columns that are drawn.
CHARTS = (
    ("training, bits/dim", "metrics", ("loss",)),
    ("learning rate", "metrics", ("lr",)),
    ("held out, bits/dim", "validation", ("bits_per_dim",)),
    ("PSNR Y, dB", "validation", ("psnr_y", "sample_psnr_y", "bicubic_psnr_y")),
    ("PSNR, dB", "validation", ("psnr", "sample_psnr")),
    ("SSIM", "validation", ("ssim", "sample_ssim")),
    ("LR-PSNR, dB", "validation", ("lr_psnr", "sample_lr_psnr")),
    ("strange conditions: artefacts", "outside", ("artefacts", "folder_artefacts")),
    ("strange conditions: bent", "outside", ("bent", "folder_bent")),
    ("strange conditions: not finite", "outside", ("non_finite", "folder_non_finite")),
    ("guard: AUROC", "outside", ("auroc", "folder_auroc")),
    ("bound and attack", "outside", ("certificate", "reached")),
)


def _rows(file: Path) -> Rows:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _points(rows: Rows, column: str) -> list[tuple[float, float]]:
    r"""The finite numbers of a column, over the steps; many of them averaged."""
    found = []
    for row in rows:
        try:
            point = (float(row["step"]), float(row[column]))
        except (KeyError, TypeError, ValueError):  # no such column, or nothing in it
            continue
        if math.isfinite(point[1]):
            found.append(point)
    many = -(-len(found) // POINTS) or 1
    groups = [found[i : i + many] for i in range(0, len(found), many)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _ticks(low: float, high: float) -> list[float]:
    r"""Some four round numbers within a range."""
    raw = (high - low) / 4 or abs(high) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw) * power
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title: str, series: Mapping[str, Points]) -> str:
    r"""Returns curves as a picture in HTML; nothing if there are no points.

    Arguments:
        title: The title, which is escaped.
        series: The points of each curve, by its name.

    Example:
        >>> chart("loss", {"bits/dim": [(1, 3.0), (2, 2.5)]}).count("<polyline")
        1
        >>> chart("loss", {"bits/dim": []})
        ''
    """
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return ""
    xs, ys = zip(*(p for points in drawn.values() for p in points), strict=True)
    room = 0.05 * (max(ys) - min(ys)) or 0.05 * abs(max(ys)) or 1.0
    low, high = min(ys) - room, max(ys) + room
    first, last = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    top = 10 + LINE * len(drawn)  # the names stand above the curves

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return across, (HEIGHT - LOW) - (y - low) / (high - low) * (HEIGHT - LOW - top)

    parts = []
    for tick in _ticks(low, high):
        y = place(first, tick)[1]
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            ' stroke="currentColor" stroke-opacity=".2"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    for tick in _ticks(first, last):
        x = place(tick, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:g}</text>')
    for i, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points))
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{line}"/>'
        )
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{LINE * (i + 1)}" text-anchor="end"'
            f' style="fill: {colour}">'
            f"{html.escape(name)}</text>"
        )
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="11" role="img"'
        f' aria-label="{html.escape(_outcome(title, drawn))}">{"".join(parts)}</svg></figure>'
    )


def _outcome(title: str, drawn: Mapping[str, Points]) -> str:
    r"""What a chart shows, for those who cannot see it."""
    told = (f"{name} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for name, p in drawn.items())
    return f"{title}: {', '.join(told)}"


def _last(rows: Rows) -> list[list[str]]:
    r"""The last rows of a table, for people."""

    def shown(value: str | None) -> str:
        try:
            return f"{float(value or ''):.5g}"
        except ValueError:
            return value or ""

    return [list(rows[0]), *([shown(v) for v in row.values()] for row in rows[-5:])]


def page(folder: Path) -> str:
    r"""Returns the report of a run as one self-contained page.

    Arguments:
        folder: The folder of the run.
    """
    tables = {name: _rows(folder / f"{name}.csv") for name in ("metrics", "validation", "outside")}
    charts = "".join(
        chart(title, {column: _points(tables[table], column) for column in columns})
        for title, table, columns in CHARTS
    )
    numbers = "".join(
        folded(f"The last rows of {name}.csv", table(_last(rows), TABLES[name]))
        for name, rows in tables.items()
        if rows
    )
    pictures = sorted((folder / "pictures").glob("*.png"))
    words = {
        "held-out": "held out: the condition, samples at temperature 0 and 0.8, and the truth",
        "strange": "a sample of a condition that is five times too bright; what exceeds white is cut",
    }
    told = [words.get(p.stem, p.stem) for p in pictures]
    shown = figures(
        (Drawn(p.read_bytes(), t, t) for p, t in zip(pictures, told, strict=True)), wide=True
    )
    config = folder / "config.yaml"
    options = config.read_text(encoding="utf-8") if config.is_file() else ""
    meaning = (
        "<p>PSNR and SSIM of samples at temperature 0, and of those at 0.8 as sample_psnr and so"
        " on, by the averaged weights. Strange conditions: held-out ones that were spoilt, and"
        " those of --ood as folder_…; artefacts: the share of pixels that are not finite or more"
        " than 0.5 outside the range of [0, 1] and the condition; bent: the share that the margin"
        " moves by more than 0.05; AUROC: how well the guard tells them from held-out ones;"
        " certificate: a bound for all conditions and noise up to 4 (none is drawn where there is"
        " none), and what a short attack reached.</p>"
    )
    body = (
        (f"<h2>Pictures</h2>{shown}" if pictures else "")
        + (f'<h2>Curves, over the steps</h2><div class="charts">{charts}</div>' if charts else "")
        + folded("What the words mean", meaning)
        + (f"<h2>Numbers</h2>{numbers}" if numbers else "")
        + (folded("The options of the run", f"<pre>{html.escape(options)}</pre>") * bool(options))
    )
    found = (_finding(tables["validation"]), _strange(tables["outside"]))
    return document("flowguard train", body, " ".join(filter(None, found)))


def _shown(rows: Rows) -> dict[str, str]:
    r"""The last row of a table, for people."""
    return dict(zip(*(_last(rows)[i] for i in (0, -1)), strict=True)) if rows else {}


def _strange(outside: Rows) -> str:
    r"""What strange conditions did in the end, in one sentence; nothing if none were asked for."""
    shown = _shown(outside)
    share, bound = shown.get("artefacts"), shown.get("certificate")
    if share in (None, "", "nan"):
        return ""
    sure = f"; the certified bound is {bound}" if bound not in (None, "", "inf", "nan") else ""
    return (
        f"On strange conditions {100 * float(share or 0):.2g} % of the pixels are artefacts{sure}."
    )


def _finding(validation: Rows) -> str:
    r"""What the last validation found, in one sentence; nothing before the first."""
    shown = _shown(validation)
    named = {
        "psnr_y": "PSNR Y {} dB",
        "bicubic_psnr_y": "bicubic's {} dB",
        "psnr": "PSNR {} dB",
        "ssim": "SSIM {}",
        "bits_per_dim": "{} bits/dim",
    }
    told = [words.format(shown[key]) for key, words in named.items() if shown.get(key)]
    step = shown.get("step", "")
    return f"After {step} steps, on held-out pictures: {', '.join(told)}." if told else ""


def write(folder: Path) -> Path:
    r"""Writes the report of a run into its folder, and returns the file.

    Arguments:
        folder: The folder of the run.
    """
    file = folder / "report.html"
    write_text(file, page(folder))
    return file
