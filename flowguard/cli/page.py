r"""The account of many pictures, as one page."""

__all__ = ["write_page"]

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowguard._version import __version__
from flowguard.demo.report import html_table
from flowguard.io.atomic import write_text

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tbody tr:nth-child(odd) { background: #f4f4f4 }
figure { display: inline-block; margin: .5em; vertical-align: top } figcaption { font-size: 12px }
.failed, .flagged { color: #b00020 } img { max-width: 100% }
"""


def figure(title: str, png: bytes) -> str:
    r"""Returns a picture with its title.

    Arguments:
        title: The title, which is escaped.
        png: The picture.
    """
    return (
        f'<figure><img alt="{html.escape(title)}"'
        f' src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def document(title: str, body: str) -> str:
    r"""Returns a self-contained page.

    Arguments:
        title: The title, which is escaped.
        body: The HTML below it.
    """
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n"
    )


def write_page(path: Path, outcomes: Sequence[Any], args: Any) -> None:
    r"""Writes what became of each picture.

    Arguments:
        path: The file.
        outcomes: What became of each.
        args: The arguments of the command.
    """
    rows = [["picture", "status", "rows × columns", "seconds", "OOD p-value", "artefacts"]]
    for o in outcomes:
        done = o.status == "written"
        rows.append(
            [
                o.source.name,
                o.status + (f": {o.reason}" if o.reason else ""),
                f"{o.size[0]} × {o.size[1]}" if done else "",
                f"{o.seconds:.1f}" if done else "",
                "" if o.p_value is None else f"{o.p_value:.2g}" + (" *" if o.flagged else ""),
                f"{100 * o.artefacts:.2g} %" if done else "",
            ]
        )
    sections = "".join(
        f"<h2>{html.escape(o.source.name)}</h2>" + "".join(figure(t, p) for t, p in o.pictures)
        for o in outcomes
        if o.pictures
    )
    legend = (
        "<p>Artefacts: the largest share of a sample's pixels that are not finite or lie outside"
        " [-0.5, 1.5] before they are cut. OOD: how likely a picture as unlike the training set as"
        " this is, by the model's calibration; * flagged. Empty if the model is not calibrated."
        f"</p><p>Model {html.escape(str(args.model))}, temperature {args.temperature:g}, seed"
        f" {args.seed}; flowguard {__version__}.</p>"
    )
    write_text(path, document("flowguard report", html_table(rows) + legend + sections))
