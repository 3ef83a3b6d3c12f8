r"""Pages whose tables and figures a script writes: what lies between two markers is made anew."""

__all__ = ["between", "spread", "table", "write_part"]

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def between(text: str, name: str, part: str) -> str:
    r"""Returns a page with another part between the markers of that name.

    Arguments:
        text: The page, with ``<!-- NAME:start -->`` and ``<!-- NAME:end -->``.
        name: The name.
        part: What comes between them, in Markdown.

    Raises:
        ValueError: If the page does not hold each marker once, in this order.

    Example:
        >>> between("<!-- t:start -->old<!-- t:end -->", "t", "new")
        '<!-- t:start -->\nnew\n<!-- t:end -->'
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, *rest = text.split(start)
    after = rest[0].split(end)[1:] if len(rest) == 1 else []
    if len(after) != 1:
        raise ValueError(
            f"a page must hold the markers {start} and {end} once each, in this order; got "
            f"{text.count(start)} and {text.count(end)}: add both"
        )
    return f"{before}{start}\n{part.strip()}\n{end}{after[0]}"


def write_part(page: Path, name: str, part: str) -> None:
    r"""Puts a part between the markers of a page.

    Arguments:
        page: The file of the page.
        name: The name of the markers.
        part: The part, in Markdown.
    """
    page.write_text(between(page.read_text(encoding="utf-8"), name, part), encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Returns a table in Markdown, its first column for names.

    Arguments:
        head: The headings.
        rows: The cells of each row.

    Example:
        >>> print(table(["a", "b"], [["x", "1"]]))
        | a | b |
        |---|---:|
        | x | 1 |
    """
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([texts[0], texts[1].replace(" ", ""), *texts[2:]])


def spread(values: Sequence[float], form: str = ".3f") -> str:
    r"""Returns mean and standard deviation over seeds; of the values that are numbers.

    Arguments:
        values: One value for each seed; NaN where there is none.
        form: How numbers are written.

    Example:
        >>> spread([1.0, 3.0], ".1f"), spread([2.0], ".1f"), spread([math.nan])
        ('2.0 ± 1.4', '2.0', '–')
    """
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "–"
    mean = statistics.fmean(known)
    if len(known) == 1 or not math.isfinite(mean):
        return format(mean, form)
    return f"{mean:{form}} ± {statistics.stdev(known):{form}}"
