r"""What was measured, as tables in Markdown and as a figure: seeds of a kind are one row."""

__all__ = ["Found", "by_kind", "draw", "markdown", "verdicts"]

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from pages import spread, table

from flowguard.ood.metrics import auroc
from imaging.kept import named
from imaging.measure import MODEL, Row, Study, artefact_auroc, artefact_spearman

#: Of each set and kind of condition, each measure of each seed.
Found = dict[str, dict[str, list[float]]]

OUTSIDE = {
    "artefacts": ("artefact pixels, %", ".3g"),
    "with_artefacts": ("pictures with any, %", ".3g"),
    "non_finite": ("not finite, %", ".3g"),
    "with_non_finite": ("pictures with any, %", ".3g"),
    "largest": ("largest value", ".3g"),
    "picture_auroc": ("AUROC, pictures", ".3f"),
    "pixel_auroc": ("AUROC, artefact pixels", ".3f"),
    "pixel_spearman": ("Spearman, deciles of pixels", ".3f"),
}


def by_kind(study: Study, rows: Mapping[str, Sequence[Row]]) -> dict[str, Found]:
    r"""Returns the numbers of each kind of model: of each set a list, with one for each seed.

    Arguments:
        study: What was asked.
        rows: The rows of each model, by name.
    """
    kinds: dict[str, Found] = {}
    for name in sorted(rows, key=lambda n: (named(n).kind, named(n).seed or 0)):
        found = kinds.setdefault(named(name).kind, {})
        for place, numbers in _of_model(study, rows[name]).items():
            measures = found.setdefault(place, {})
            for measure, value in numbers.items():
                measures.setdefault(measure, []).append(value)
    return kinds


def _of_model(study: Study, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    r"""The numbers of each set, and of each kind of condition in it, as ``SET/KIND``."""
    sets = defaultdict(list)
    for row in rows:
        sets[row["set"]].append(row)
        if row["kind"]:
            sets[f"{row['set']}/{row['kind']}"].append(row)
    usual = [float(r["score"]) for s in study.usual for r in sets[s] if "score" in r]
    return {
        place: _outside(part, usual) if place.partition("/")[0] in study.strange else _means(part)
        for place, part in sets.items()
        if part
    }


def _means(rows: Sequence[Row]) -> dict[str, float]:
    names = [n for n in rows[0] if n not in ("set", "picture", "kind", "score")]
    return {name: fmean(float(row[name]) for row in rows) for name in names}


def _outside(rows: Sequence[Row], usual: Sequence[float]) -> dict[str, float]:
    pixels = sum(row["pixels"] for row in rows)
    found = {
        "artefacts": 100 * sum(row["artefacts"] for row in rows) / pixels,
        "with_artefacts": 100 * fmean(row["artefacts"] > 0 for row in rows),
        "non_finite": 100 * sum(row["non_finite"] for row in rows) / pixels,
        "with_non_finite": 100 * fmean(row["non_finite"] > 0 for row in rows),
        "largest": max(float(row["largest"]) for row in rows),
    }
    strange = [float(row["score"]) for row in rows if "score" in row]
    if usual and strange:
        labels = [0] * len(usual) + [1] * len(strange)
        found["picture_auroc"] = auroc(torch.tensor([*usual, *strange]), torch.tensor(labels))
    counts = [row["counts"] for row in rows if "counts" in row]
    told = {"pixel_auroc": artefact_auroc(counts), "pixel_spearman": artefact_spearman(counts)}
    return found | {name: value for name, value in told.items() if value is not None}


def markdown(
    study: Study, kinds: Mapping[str, Found], rivals: Mapping[str, Found] | None = None
) -> str:
    r"""Returns the tables: of pictures with a truth, and of conditions without.

    Arguments:
        study: What was asked.
        kinds: The numbers of each kind of model.
        rivals: Those of what needs no model.
    """
    seeds = {
        k: max((len(v) for f in found.values() for v in f.values()), default=0)
        for k, found in kinds.items()
    }
    several = {n for n in seeds.values() if n > 1}
    lines = ["Mean ± standard deviation over seeds.", ""] if several else []
    head = {"parameters": ("parameters", ".0f"), "certificate": (study.bounded, ".3g")}
    lines += _table("model", [(k, f[MODEL]) for k, f in kinds.items() if MODEL in f], head)
    both = {**(rivals or {}), **kinds}
    for place, title in study.held.items():
        lines += _table(
            title, [(k, f[place]) for k, f in both.items() if place in f], study.measures
        )
    for place, title in study.strange.items():
        there = [(k, f[place]) for k, f in kinds.items() if place in f]
        lines += _table(title, there, OUTSIDE)
    lines += _conditions(study, kinds)
    return "\n".join(lines).rstrip() + "\n"


def _table(
    title: str,
    rows: Sequence[tuple[str, Mapping[str, list[float]]]],
    columns: Mapping[str, tuple[str, str]],
) -> list[str]:
    r"""A table of those columns that there are numbers for."""
    there = [c for c in columns if any(c in numbers for _, numbers in rows)]
    if not there:
        return []
    head = [title, *(columns[c][0] for c in there)]
    body = [
        [kind, *(_spread(numbers.get(c, []), columns[c][1]) for c in there)]
        for kind, numbers in rows
    ]
    return [table(head, body), ""]


def _spread(values: Sequence[float], form: str) -> str:
    r"""Mean and standard deviation, but for what is the same for all seeds, as zero often is."""
    return spread(values if len(set(values)) > 1 else values[:1], form)


def _conditions(study: Study, kinds: Mapping[str, Found]) -> list[str]:
    r"""A table of the share of artefact pixels, with a row for each kind of condition."""
    places = _places(study, kinds)
    if not places:
        return []
    body = [
        [name, *(_spread(f.get(p, {}).get("artefacts", []), ".3g") for f in kinds.values())]
        for p, name in places.items()
    ]
    return [table(["artefact pixels, %", *kinds], body)]


def _places(study: Study, kinds: Mapping[str, Found]) -> dict[str, str]:
    r"""The kinds of conditions without a truth, as they were met, and what they are called."""
    return {
        place: place.partition("/")[2]
        for found in kinds.values()
        for place in found
        if "/" in place and place.partition("/")[0] in study.strange
    }


def verdicts(study: Study, kinds: Mapping[str, Found]) -> list[str]:
    r"""Returns, for each other kind, whether it is not worse than the affine one by more than a
    standard deviation over its seeds, and how many artefacts each has.

    Arguments:
        study: What was asked.
        kinds: The numbers of each kind.
    """
    base = kinds.get("affine")
    if base is None:
        return []
    lines = []
    for kind, found in kinds.items():
        if kind == "affine":
            continue
        told = []
        for p in study.held:
            for measure, more in ((study.score, 1), ("bits_per_dim", -1)):
                ours, theirs = (f.get(p, {}).get(measure, []) for f in (found, base))
                if not ours or not theirs:
                    continue
                gain = more * (fmean(ours) - fmean(theirs))
                label, form = study.measures[measure]
                text = f"{label} on {study.held[p]} {more * gain:+{form}}"
                if len(theirs) > 1 and len(set(theirs)) > 1:
                    deviation = stdev(theirs)
                    held = "not worse" if gain >= -deviation else "worse"
                    text += f" ({held} by more than one standard deviation, {deviation:{form}})"
                told.append(text)
        for p, title in study.strange.items():
            if p in found and p in base:
                ours, theirs = (fmean(f[p]["artefacts"]) for f in (found, base))
                told.append(f"artefact pixels on {title} {ours:.3g} % against {theirs:.3g} %")
        lines.append(f"- **{kind}** against affine: {'; '.join(told)}.")
    return lines


def draw(
    study: Study, kinds: Mapping[str, Found], rivals: Mapping[str, Found], file: Path
) -> None:
    r"""Draws the quality of each kind on each set, and its artefacts on each kind of condition.

    Arguments:
        study: What was asked.
        kinds: The numbers of each kind.
        rivals: Those of what needs no model.
        file: The file to write.
    """
    from matplotlib.figure import Figure

    sets = [p for p in study.held if any(p in f for f in kinds.values())]
    places = _places(study, kinds)
    heights = {"sets": 3.0, "places": 0.32 * len(kinds) + 1.9}
    there = [heights[n] for n, part in (("sets", sets), ("places", places)) if part]
    figure = Figure(figsize=(11, sum(there) + 0.2), layout="constrained")
    axes = [*figure.subplots(len(there), 1, squeeze=False, height_ratios=there)[:, 0]]
    if sets:
        _draw_quality(axes.pop(0), study, kinds, rivals, sets)
    if places:
        _draw_artefacts(figure, axes.pop(0), kinds, places)
    figure.savefig(file, dpi=110)


def _draw_quality(
    axis: Any,
    study: Study,
    kinds: Mapping[str, Found],
    rivals: Mapping[str, Found],
    sets: Sequence[str],
) -> None:
    markers, heading = "osD^vP*X", study.measures[study.score][0].partition(" ")[0]
    for j, (name, found) in enumerate({**rivals, **kinds}.items()):
        for measure, full in ((study.score, True), (f"sample_{study.score}", False)):
            values = [found.get(p, {}).get(measure, []) for p in sets]
            there = [i for i, v in enumerate(values) if v and all(map(math.isfinite, v))]
            if not there:
                continue
            axis.errorbar(
                [i + 0.06 * (j - len(kinds) / 2) for i in there],
                [fmean(values[i]) for i in there],
                [stdev(values[i]) if len(values[i]) > 1 else 0.0 for i in there],
                fmt=markers[j % len(markers)],
                color=f"C{j % 10}",
                fillstyle="full" if full else "none",
                capsize=2,
                label=name if full else None,
            )
    axis.set_xticks(range(len(sets)), [study.held[p] for p in sets])
    axis.set_xlim(-0.6, len(sets) - 0.4)
    axis.set_ylabel(f"{heading}, dB")
    axis.set_title("full: temperature 0, hollow: 0.8", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_artefacts(
    figure: Any, axis: Any, kinds: Mapping[str, Found], places: Mapping[str, str]
) -> None:
    from matplotlib.colors import LogNorm

    shares = [
        [fmean(f[p]["artefacts"]) if p in f else math.nan for p in places] for f in kinds.values()
    ]
    image = axis.imshow(
        [[max(s, 1e-4) for s in row] for row in shares],
        norm=LogNorm(1e-4, 100),
        cmap="magma_r",
        aspect="auto",
    )
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            text = "" if math.isnan(share) else f"{share:.0f}" if share >= 9.5 else f"{share:.1g}"
            axis.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=5,
                color="white" if share > 1 else "black",
            )
    axis.set_yticks(range(len(kinds)), list(kinds), fontsize=8)
    axis.set_xticks(range(len(places)), list(places.values()), rotation=60, ha="right", fontsize=7)
    axis.set_title("artefact pixels, %, at temperature 0.8", fontsize=9)
    figure.colorbar(image, ax=axis, fraction=0.03)
