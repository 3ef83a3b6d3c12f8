r"""Pages that one wants to read: a single file each, for screens of any size, in light or dark.

What a page is made of knows nothing of flows: tables, pictures of one size, cards that show what
became of a condition, and sliders, which a short script makes of the pictures that are there. Where
scripts do not run, the pictures stand side by side.
"""

__all__ = [
    "QUALITIES",
    "STOPS",
    "Drawn",
    "card",
    "document",
    "figures",
    "fitting",
    "folded",
    "media_type",
    "scale",
    "size_of",
    "table",
]

import base64
import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flowguard._version import __version__

#: The colours of the guard's maps at the quantiles 0, 0.9, 0.99, 0.999 and 0.9999; straight lines
#: between them, as the colour bar draws them too.
STOPS = ("#000004", "#57106e", "#bc3754", "#f98e09", "#fcffa4")
#: The qualities of lossy pictures, the best first; see :func:`fitting`.
QUALITIES = (78, 50, 25, 8)
LIMIT = 2_900_000  # bytes of a page
QUANTILES = ("0", "0.9", "0.99", "0.999", "0.9999")

STYLE = """
:root { color-scheme: light dark; --line: #c8c8c8; --soft: #f3f3f3; --faint: #595959; --bad: #b00020;
  --good: #1b6e3c }
@media (prefers-color-scheme: dark) { :root { --line: #4a4a4a; --soft: #262626; --faint: #b0b0b0;
  --bad: #ff8a95; --good: #7fd6a0 } body { background: #161616; color: #e8e8e8 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 0 1rem 3rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 .5rem }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem } h3 { font-size: 1.05rem; margin: 0 }
a { color: inherit } .card h2 { margin: 0 }
.lead { font-size: 1.15rem; max-width: 50rem } p, dd, li { max-width: 50rem }
.faint, figcaption { color: var(--faint) } .faint { font-size: .88rem }
.bad { color: var(--bad) } .good { color: var(--good) }
dt { font-weight: 600 } dd { margin: 0 0 .5rem } pre { overflow-x: auto; font-size: .85rem }
.wide { overflow-x: auto; margin: .8rem 0 } table { border-collapse: collapse; font-size: .9rem }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; position: sticky; left: 0 }
td, th { padding: .2rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 1px solid var(--line) }
tbody th { font-weight: normal } tbody tr:nth-child(odd) { background: var(--soft) }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; margin: 1rem 0 }
.card > p { margin: .2rem 0 .8rem }
.plates { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 46%), 1fr)) }
figure { margin: 0 } figcaption { font-size: .85rem; line-height: 1.35; padding-top: .25rem }
img { display: block; width: 100%; height: auto; border-radius: .2rem }
.plates img, .stack img { object-fit: fill } .pixels { image-rendering: pixelated }
.strips { display: grid; gap: .9rem } .strips img { width: auto; max-width: 100% }
.bar { height: .8rem; border-radius: .2rem; border: 1px solid var(--line) }
.ticks { display: flex; justify-content: space-between; font-size: .75rem }
.unit { font-size: .75rem; text-align: center; line-height: 1.2 }
.slider { margin: 0 0 1rem }
@media (min-width: 64rem) { .compared { display: grid; grid-template-columns: 57% 1fr; gap: 0 1.2rem }
  .compared > :is(h2, h3, p) { grid-column: 1 / -1 } .compared > .slider { position: sticky; top: 1rem;
  align-self: start } .compared .plates { grid-template-columns: 1fr 1fr 1fr; align-content: start } }
.stack { position: relative; touch-action: pan-y; --at: 50% }
.stack img.over { position: absolute; inset: 0; height: 100%; clip-path: inset(0 0 0 var(--at)) }
.stack::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px;
  margin-left: -1px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none }
.stack input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize } .stack:focus-within { outline: 3px solid #4c9be8; outline-offset: 2px }
.stack b { position: absolute; bottom: .4rem; padding: 0 .4rem; background: #000b; color: #fff;
  font-size: .8rem; border-radius: .2rem; pointer-events: none }
.stack b.under { left: .4rem } .stack b.over { right: .4rem }
details { margin: .4rem 0 } summary { cursor: pointer; padding: .35rem 0 }
.charts { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr)) }
svg { max-width: 100%; height: auto } svg text { fill: currentColor }
"""

# The pictures that the slider shows are those of its card, so that no picture is in the file twice.
SCRIPT = """
for (const card of document.querySelectorAll('.card')) {
  const sides = [...card.querySelectorAll('img[data-side]')];
  if (sides.length < 2) continue;
  const figure = document.createElement('figure'), stack = document.createElement('div');
  figure.className = 'slider'; stack.className = 'stack';
  const images = {}, labels = {}, chosen = {under: 0, over: sides.length - 1};
  const range = Object.assign(document.createElement('input'), {type: 'range', min: 0, max: 100, value: 50});
  const caption = document.createElement('figcaption');
  const told = side => sides[chosen[side]].dataset.side;
  const show = () => {
    for (const side of ['under', 'over']) {
      const shown = sides[chosen[side]];
      images[side].src = shown.src; images[side].alt = shown.alt;
      images[side].classList.toggle('pixels', shown.classList.contains('pixels'));
      labels[side].textContent = told(side);
    }
    stack.style.setProperty('--at', range.value + '%');
    range.setAttribute('aria-label', `How much of the picture is ${told('under')}, the rest being ${told('over')}`);
    range.setAttribute('aria-valuetext', `${range.value} % ${told('under')}`);
  };
  for (const side of ['under', 'over']) {
    images[side] = document.createElement('img'); images[side].className = side;
    images[side].width = sides[0].width; images[side].height = sides[0].height;
    labels[side] = document.createElement('b'); labels[side].className = side;
    stack.append(images[side], labels[side]);
  }
  stack.append(range);
  caption.append('Drag, or use the arrow keys: ');
  for (const [side, words] of [['under', 'left '], ['over', ', right ']]) {
    caption.append(words);
    if (sides.length === 2) { caption.append(told(side)); continue; }
    const select = document.createElement('select');
    select.setAttribute('aria-label', side === 'under' ? 'left picture' : 'right picture');
    sides.forEach((s, i) => select.add(new Option(s.dataset.side, i, false, i === chosen[side])));
    select.oninput = () => { chosen[side] = +select.value; show(); };
    caption.append(select);
  }
  range.oninput = show;
  figure.append(stack, caption);
  card.querySelector('.plates').before(figure);
  card.classList.add('compared');
  show();
}
"""


@dataclass(frozen=True)
class Drawn:
    r"""A picture with what is said of it.

    Arguments:
        data: The file: PNG, JPEG or WebP.
        caption: What is seen.
        alt: What is said to those who cannot see it, the outcome above all.
        side: What it is called in the slider of its card; empty if it is none of its sides.
        pixels: Whether it is made of few pixels, which are to stay squares.
        colours: Whether it is a map of the guard, in the colours of :func:`scale`.
    """

    data: bytes
    caption: str
    alt: str
    side: str = ""
    pixels: bool = False
    colours: bool = False


def media_type(data: bytes) -> str:
    r"""Returns what kind of picture a file is, by its first bytes.

    Arguments:
        data: The file.

    Raises:
        ValueError: If it is none that pages show.

    Example:
        >>> media_type(b"\x89PNG\r\n\x1a\n...")
        'image/png'
    """
    if data.startswith(b"\x89PNG"):
        return "image/png"
    if data.startswith(b"\xff\xd8"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise ValueError(f"pictures of pages must be PNG, JPEG or WebP; got {data[:4]!r}")


def table(rows: Sequence[Sequence[str]], caption: str) -> str:
    r"""Returns rows as a table that scrolls where the screen is narrow, escaped.

    Arguments:
        rows: The rows, the first of them the head; the first cell of each names it.
        caption: What the table tells.
    """

    def row(cells: Sequence[str], scope: str) -> str:
        first, *rest = map(html.escape, cells)
        tag = 'th scope="col"' if scope == "col" else "td"
        others = "".join(f"<{tag}>{c}</{tag[:2]}>" for c in rest)
        return f'<tr><th scope="{scope}">{first}</th>{others}</tr>'

    words = html.escape(caption)
    body = "".join(row(cells, "row") for cells in rows[1:])
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{words}"><table>'
        f"<caption>{words}</caption><thead>{row(rows[0], 'col')}</thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def plate(picture: Drawn, size: tuple[int, int] | None = None) -> str:
    r"""Returns a picture with its caption, as HTML that holds it.

    Arguments:
        picture: The picture.
        size: Rows and columns that give it its shape on the page.
    """
    space = "" if size is None else f' style="aspect-ratio: {size[1]} / {size[0]}"'
    side = f' data-side="{html.escape(picture.side)}"' if picture.side else ""
    kind = ' class="pixels"' if picture.pixels else ""
    source = f"data:{media_type(picture.data)};base64,{base64.b64encode(picture.data).decode()}"
    bar = scale() if picture.colours else ""
    return (
        f'<figure><img{kind}{side}{space} alt="{html.escape(picture.alt)}" src="{source}">'
        f"{bar}<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def scale() -> str:
    r"""Returns the colour bar of the guard's maps, which names the calibrated quantiles."""
    ticks = "".join(f"<span>{q}</span>" for q in QUANTILES)
    return (
        '<div class="bar" role="img" aria-label="colours from the quantile 0 of the calibration'
        f' pixels, dark, to 0.9999, bright" style="background: linear-gradient(to right,'
        f' {", ".join(STOPS)})"></div><div class="ticks" aria-hidden="true">{ticks}</div>'
        '<div class="faint unit">quantile of calibration pixels</div>'
    )


def card(
    title: str,
    told: str,
    pictures: Iterable[Drawn],
    size: tuple[int, int] | None = None,
    level: int = 3,
) -> str:
    r"""Returns what became of one condition: a heading, a sentence, and its pictures in one size.

    Of pictures with a side a slider is made, the first against the last.

    Arguments:
        title: The heading; none if it is empty.
        told: The sentence.
        pictures: The pictures.
        size: Rows and columns that give all of them their shape on the page.
        level: The level of the heading.
    """
    head = f"<h{level}>{html.escape(title)}</h{level}>" if title else ""
    plates = "".join(plate(p, size) for p in pictures)
    return (
        f'<section class="card">{head}<p>{html.escape(told)}</p>'
        f'<div class="plates">{plates}</div></section>'
    )


def figures(pictures: Iterable[Drawn], wide: bool = False) -> str:
    r"""Returns pictures beside each other, each in its own shape.

    Arguments:
        pictures: The pictures.
        wide: Whether they stand below each other, in their own size where the screen is wide
            enough: strips of several pictures.
    """
    return f'<div class="{"strips" if wide else "plates"}">{"".join(map(plate, pictures))}</div>'


def folded(summary: str, body: str) -> str:
    r"""Returns what is shown when its summary is clicked.

    Arguments:
        summary: What is always shown, which is escaped.
        body: The HTML that is folded away.
    """
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def document(title: str, body: str, lead: str = "") -> str:
    r"""Returns a self-contained page.

    Arguments:
        title: The title, which is escaped.
        body: The HTML below it.
        lead: The finding, in a sentence or two, which is escaped.

    Example:
        >>> page = document("a & b", "<p>c</p>")
        >>> "<h1>a &amp; b</h1>" in page, "<script>" in page
        (True, False)
    """
    first = f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
    script = f"<script>{SCRIPT}</script>" if "data-side" in body else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1>{first}{body}"
        f'<p class="faint">Written by flowguard {__version__}.</p></main>{script}</body></html>\n'
    )


def fitting(make: Callable[[int], str]) -> str:
    r"""Returns a page in the best quality of its pictures in which it is small enough to be sent.

    Arguments:
        make: Returns the page, given the quality.

    Example:
        >>> len(fitting(lambda quality: quality * 100_000 * " "))
        2500000
    """
    text = ""
    for quality in QUALITIES:
        text = make(quality)
        if len(text.encode()) <= LIMIT:
            break
    return text


def size_of(text: str) -> int:
    r"""Returns how many bytes of a page are pictures.

    Arguments:
        text: The page, or a part of it.

    Example:
        >>> size_of(figures([Drawn(bytes([137]) + b"PNG12", "", "")]))
        8
    """
    return sum(map(len, re.findall(r'base64,([^"]*)', text)))
