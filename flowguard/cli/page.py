r"""The account of many pictures, as one page."""

__all__ = ["Shown", "calibration", "drawn", "write_page"]

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowguard.demo.page import Drawn, card, document, folded, size_of, table
from flowguard.io.atomic import write_text

SMALL = 320  # rows and columns of the page's pictures, at most
LIMIT = 2_500_000  # bytes of pictures on a page, at most; the first card is always shown


@dataclass(frozen=True)
class Shown:
    r"""What the page shows of a picture: it, and a sample with what its guard said."""

    given: Any  # the picture, with shape (3, H, W)
    raw: Any  # the sample before anything was cut or scaled, with shape (3, H', W')
    sample: Any  # what was written
    reports: tuple[Any, ...]  # one for each tile; none if the guard is not calibrated
    name: str  # of the file that was written


def calibration(reports: Sequence[Any]) -> int:
    r"""Returns the number of pictures that the guard was calibrated with.

    Arguments:
        reports: The reports of the tiles.
    """
    return max(len(level.calibration.scores) for level in reports[0].levels.values())


def place(sample: Any, scale: int) -> tuple[int, int, int, int]:
    r"""Returns rows and columns of the part of a sample that has the most detail, in whole pixels
    of the condition: where it begins, and its size.

    Arguments:
        sample: The sample, with shape :math:`(3, H, W)`.
        scale: How many of its pixels a pixel of the condition is, in each direction.
    """
    import torch.nn.functional as F

    whole = sample.shape[-2:]
    share = min(1.0, SMALL / max(whole))  # of the shape of the whole, to be shown in one size
    height, width = (max(1, int(share * n / scale)) * scale for n in whole)
    grey = sample.float().nan_to_num().clamp(0, 1).mean(0)[None, None]
    detail = F.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1))
    step = max(scale, SMALL // 4 // scale * scale)
    means = F.avg_pool2d(detail, (height, width), stride=step)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return row * step, column * step, height, width


def drawn(shown: Shown, grow: Callable[[Any], Any]) -> list[Drawn]:
    r"""Returns the pictures of a card: a detail of the sample beside what is made without a model,
    the whole, where it breaks, and how far each pixel is from the training set.

    Arguments:
        shown: What is shown.
        grow: What makes a condition as large as a sample, without a model.
    """
    from flowguard.demo.drawing import encoded, guard_map, marked, shrunk
    from flowguard.ood.report import excess

    given, sample = shown.given, shown.sample
    scale = sample.shape[-1] // given.shape[-1]
    top, left, height, width = place(sample, scale)
    y = given[:, top // scale : (top + height) // scale, left // scale : (left + width) // scale]
    plain, called = (grow(y[None])[0], "bicubic") if scale > 1 else (y, "input")
    detail = sample[:, top : top + height, left : left + width]
    where = f"{height} × {width} pixels as they are, from row {top} and column {left}"
    outside = ~((shown.raw >= -0.5) & (shown.raw <= 1.5)).all(dim=0)
    share = 100 * float(outside.float().mean())
    outcome = f"{share:.2g} % artefact pixels" if share else "no artefacts"
    pictures = [
        Drawn(encoded(plain), f"{called}: {where}", f"{called}, a detail", called),
        Drawn(
            encoded(detail), f"{shown.name}: {where}", f"the sample, a detail: {outcome}", "sample"
        ),
        Drawn(encoded(shrunk(given, SMALL)), "input, the whole", "the input"),
        Drawn(
            encoded(shrunk(sample, SMALL)), f"{shown.name}, the whole", f"the sample: {outcome}"
        ),
    ]
    if share:
        mask = shrunk(outside[None].float(), SMALL)[0] > 0
        told = f"{share:.2g} % artefact pixels before they were cut, in pink"
        pictures.append(Drawn(marked(shrunk(sample, SMALL), mask), told, told))
    if len(shown.reports) == 1:
        for name, level in shown.reports[0].levels.items():
            if level.map is not None:
                told = f"guard, {name.replace('level', 'level ')}: {excess(level):.3g} × its threshold"
                pictures.append(Drawn(guard_map(level), told, told, pixels=True, colours=True))
    return pictures


def _row(o: Any) -> list[str]:
    done = o.status == "written"
    return [
        o.source.name,
        o.status + (f": {o.reason}" if o.reason else ""),
        f"{o.size[0]} × {o.size[1]}" if done else "",
        f"{o.seconds:.1f}" if done else "",
        "" if o.excess is None else f"{o.excess:.3g}" + (" *" if o.flagged else ""),
        "" if o.p_value is None else f"{o.p_value:.2g}",
        f"{100 * o.artefacts:.2g} %" if done else "",
    ]


def _finding(outcomes: Sequence[Any]) -> str:
    r"""What became of the pictures, in one sentence."""
    total = len(outcomes)
    told = []
    for status in ("written", "skipped", "failed"):
        count = sum(o.status == status for o in outcomes)
        told += [f"{count} {status}"] if count else []
    flagged = sum(o.flagged for o in outcomes)
    broken = sum(o.artefacts > 0 for o in outcomes)
    guarded = any(o.excess is not None for o in outcomes)
    unlike = f"the guard flags {flagged or 'none'}" if guarded else "no guard is calibrated"
    return f"{total} picture(s): {', '.join(told) or 'nothing to do'}; {unlike}; {broken or 'none'} with artefacts."


def _cards(outcomes: Sequence[Any]) -> Iterator[str]:
    r"""The cards of pictures, those that are to be looked at first; as many as the page may hold."""
    shown = [o for o in outcomes if o.pictures]
    strange = [o for o in shown if o.artefacts or o.flagged]
    used, left = 0, 0
    for o in [*strange, *(o for o in shown if o not in strange)]:
        guard = (
            "" if o.excess is None else f"; the guard's score is {o.excess:.3g} × its threshold"
        )
        told = f"{100 * o.artefacts:.2g} % artefact pixels" if o.artefacts else "No artefacts"
        made = card(
            o.source.name, f"{told}{guard}{', flagged' * o.flagged}.", o.pictures, o.size, level=2
        )
        size = size_of(made)
        if used and used + size > LIMIT:
            left += 1
            continue
        used += size
        yield made if o in strange or len(shown) <= 6 else folded(o.source.name, made)
    if left:
        yield f"<p>The pictures of {left} more are left out, so that this page stays small.</p>"


def write_page(path: Path, outcomes: Sequence[Any], args: Any) -> None:
    r"""Writes what became of each picture.

    Arguments:
        path: The file.
        outcomes: What became of each.
        args: The arguments of the command.
    """
    head = ["picture", "status", "rows × columns", "seconds", "guard", "p-value", "artefacts"]
    numbers = table([head, *map(_row, outcomes)], "What became of each picture")
    count = max((o.calibration for o in outcomes), default=0)
    floor = (
        f" With {count} calibration pictures no p-value is below 1/{count + 1}." if count else ""
    )
    legend = (
        "<p>Artefacts: the largest share of a sample's pixels that are not finite or lie outside"
        " [-0.5, 1.5] before they are cut. Guard: how unlike the training set the picture is, as a"
        " multiple of the threshold above which it is flagged (*); p-value: how likely one as"
        f" unlike is, by the model's calibration.{floor} Both are empty if the model is not"
        " calibrated. The bars below the maps name the quantiles among calibration pixels.</p>"
        f'<p class="faint">Model {html.escape(str(args.model))}, temperature {args.temperature:g},'
        f" seed {args.seed}.</p>"
    )
    body = "".join(_cards(outcomes)) + f"<h2>All pictures</h2>{numbers}{legend}"
    write_text(path, document("flowguard report", body, _finding(outcomes)))
