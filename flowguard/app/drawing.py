r"""Pictures as HTML that holds them, so that nothing is written to a disk."""

__all__ = ["bar", "figure", "ood_maps", "plane", "row", "scatter", "sentence", "toy_row", "url"]

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowguard.ood import OODReport
from flowguard.ood.report import NINES, TICKS, coloured, nines

from .toy import FRAME, REACH, Toys

_STOPS = 16  # of the colour bar
_SHOWN = 220  # points of each flow


def url(pixels: Any) -> str:
    r"""Returns a picture as an address that holds it, a PNG.

    Arguments:
        pixels: The bytes, with shape :math:`(H, W, 3)`.

    Raises:
        ImportError: If Pillow is not installed.

    Example:
        >>> import numpy
        >>> url(numpy.zeros((2, 2, 3), dtype=numpy.uint8))[:22]
        'data:image/png;base64,'
    """
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def figure(title: str, pixels: Any, caption: str = "", *, sharp: bool = False) -> str:
    r"""Returns a picture with a title above and a caption below it, as HTML.

    Arguments:
        title: The title.
        pixels: The bytes, with shape :math:`(H, W, 3)`.
        caption: The caption.
        sharp: Whether its pixels are to be seen when it is enlarged.
    """
    kind = ' class="sharp"' if sharp else ""
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b></figcaption>"
        f'<img{kind} alt="{html.escape(title)}" src="{url(pixels)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def row(figures: Sequence[str]) -> str:
    r"""Returns figures side by side, as far as there is room, as HTML.

    Arguments:
        figures: The figures, as :func:`figure` returns them.
    """
    return f'<div class="fg-row">{"".join(figures)}</div>'


def sentence(text: str, *, kind: str = "") -> str:
    r"""Returns a sentence as HTML.

    Arguments:
        text: The sentence, as it is read.
        kind: ``"wrong"`` for one that tells of a mistake, ``"flagged"`` for one of a condition out
            of distribution.

    Example:
        >>> sentence("p < 0.1", kind="flagged")
        '<p class="fg-told flagged">p &lt; 0.1</p>'
    """
    return f'<p class="{" ".join(filter(None, ("fg-told", kind)))}">{html.escape(text)}</p>'


def ood_maps(report: OODReport) -> list[str]:
    r"""Returns the map of each level of one condition as a figure, on the calibrated scale.

    Arguments:
        report: The report.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    found = []
    for name, level in report.levels.items():
        if level.map is not None:
            p = float(level.p_value[0])
            told = f"p = {p:.2g}{', flagged' if bool(level.flagged[0]) else ''}"
            pixels = coloured(nines(level)[0])
            found.append(figure(f"how strange, {name}", pixels, told, sharp=True))
    return found


def bar() -> str:
    r"""Returns the colour bar of the maps as HTML: the quantile among the calibration's pixels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    colours = coloured(torch.linspace(0, NINES, _STOPS))
    stops = ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in colours.tolist())
    ticks = "".join(
        f'<span style="left:{100 * at / NINES:.0f}%">{label}</span>' for at, label in TICKS.items()
    )
    return (
        '<div class="fg-bar"><div role="img" aria-label="colour bar"'
        f' style="background:linear-gradient(90deg, {stops})"></div><div>{ticks}</div>'
        "<p>quantile among the pixels of the calibration: 0.99 is a pixel such as one in a hundred"
        " of them exceeds</p></div>"
    )


def scatter(name: str, points: Tensor, gone: float) -> str:
    r"""Returns samples in the plane as a figure; what lies beyond the frame is marked at its edge.

    Arguments:
        name: The name of the flow.
        points: Its samples, with shape :math:`(n, 2)`.
        gone: The share of those beyond the frame.
    """
    shown = points[:_SHOWN].nan_to_num(nan=10 * FRAME, posinf=10 * FRAME, neginf=-10 * FRAME)
    inside = (shown.abs() <= FRAME).all(dim=-1)
    # Towards where it went: the point of the frame on the line from the middle.
    far = shown.abs().amax(dim=-1, keepdim=True).clamp_min(FRAME)
    drawn = torch.where(inside[:, None], shown, 0.97 * FRAME * shown / far)
    dots = "".join(
        f'<circle cx="{x:.2f}" cy="{-y:.2f}" r="{0.09 if kept else 0.14}"'
        f' class="{"in" if kept else "out"}"/>'
        for (x, y), kept in zip(drawn.tolist(), inside.tolist(), strict=True)
    )
    told = f"{100 * gone:.3g} % have left the frame" if gone else "all are in the frame"
    box = f"{-FRAME} {-FRAME} {2 * FRAME} {2 * FRAME}"
    return (
        f"<figure><figcaption><b>{html.escape(name)}</b></figcaption>"
        f'<svg viewBox="{box}" role="img" aria-label="samples: {html.escape(name)}">'
        f'<rect x="{-FRAME}" y="{-FRAME}" width="{2 * FRAME}" height="{2 * FRAME}"/>{dots}</svg>'
        f"<figcaption>{told}</figcaption></figure>"
    )


def toy_row(made: Toys) -> str:
    r"""Returns the samples of all flows side by side.

    Arguments:
        made: What the flows made of a condition.
    """
    return row([scatter(name, p, made.gone(name)) for name, p in made.points.items()])


def plane(first: float, second: float) -> str:
    r"""Returns the plane of conditions, with the parallelogram of training and the condition.

    Arguments:
        first: The first number of the condition.
        second: Its second number.
    """
    corners = " ".join(f"{x},{-y}" for x, y in ((-2, -1.3), (-2, -0.7), (2, 1.3), (2, 0.7)))
    box = f"{-REACH} {-REACH} {2 * REACH} {2 * REACH}"
    return (
        f'<svg class="fg-plane" viewBox="{box}" role="img" aria-label="the plane of conditions">'
        f'<rect x="{-REACH}" y="{-REACH}" width="{2 * REACH}" height="{2 * REACH}"/>'
        f'<path d="M{-REACH} 0H{REACH}M0 {-REACH}V{REACH}"/><polygon points="{corners}"/>'
        f'<circle cx="{first:.2f}" cy="{-second:.2f}" r="0.55"/></svg>'
    )
