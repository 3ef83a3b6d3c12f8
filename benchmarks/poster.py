r"""Draws the poster, one page: what, why, ten lines, two pictures.

python benchmarks/poster.py           # writes docs/images/poster.svg
"""

import argparse
import base64
import html
import io
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 1600, 1130  # A3 across, in points and a little
MARGIN = 60
LEFT, RIGHT = MARGIN, 830  # where the columns begin
COLUMN = WIDTH - RIGHT - MARGIN

TITLE = "flowguard"
CLAIM = "Conditional normalizing flows whose samples cannot explode"
WHY = (
    "A conditional affine coupling is inverted by dividing by a scale that a network",
    "made of the condition. Far from the training set the scale is anything, also tiny:",
    "layer after layer the sample explodes, to colours, inf or NaN",
    "(Hong, Park, Chun, ICCV 2023).",
)
WHAT = (
    ("RobustSpline", "slope one outside a box, bounded shift: a drop-in for affine maps"),
    ("certify", "|x| ≤ C for every condition, computed from the weights, layer by layer"),
    ("OODConditioner", "calibrated Mahalanobis scores by level and pixel: warn, raise, shrink"),
    ("migrate", "a trained flow made robust, starting as an imitation of the old one"),
    ("hosts", "zuko, nflows, glasflow, normflows, Pyro, sbi, lampe, dingo; image models"),
)
CODE = """import flowguard, torch, zuko

flow = zuko.flows.MAF(
    2, 2, univariate=flowguard.RobustSpline,
    shapes=flowguard.RobustSpline.shapes(8),
)
...  # train as ever
print(flowguard.certify(flow).bound(4.0))  # for all conditions

guard = flowguard.OODConditioner(policy="warn").fit(y_train)
guard.calibrate(y_held_out).eval()
x = flow(guard(y)).sample((1000,))     # warns where y is strange"""


def picture(file: Path, box: tuple[int, int, int, int] | None = None) -> tuple[str, float]:
    r"""Returns a picture as a data address, and its height for a width of one.

    Arguments:
        file: The picture.
        box: The part that is taken: left, top, right, bottom.
    """
    image = Image.open(file).convert("RGB").crop(box)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/png;base64,{text}", image.height / image.width


def line(x: float, y: float, words: str, kind: str) -> str:
    r"""Returns a line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{html.escape(words)}</text>'


def poster() -> str:
    r"""Returns the poster, as SVG."""
    parts = [line(LEFT, 120, TITLE, "title"), line(LEFT, 175, CLAIM, "claim")]
    parts.append(line(LEFT, 250, "Why", "head"))
    parts += [line(LEFT, 290 + 30 * i, words, "body") for i, words in enumerate(WHY)]
    parts.append(line(LEFT, 430, "What", "head"))
    for i, (name, words) in enumerate(WHAT):
        parts.append(line(LEFT, 474 + 58 * i, name, "name"))
        parts.append(line(LEFT, 498 + 58 * i, words, "body"))
    parts.append(f'<rect x="{LEFT}" y="770" width="700" height="296" rx="10" class="code"/>')
    for i, words in enumerate(CODE.splitlines()):
        parts.append(line(LEFT + 20, 803 + 21.5 * i, words, "mono"))
    top = 215.0
    for file, box, words in (
        (
            "headline.png",
            (0, 12, 816, 212),
            "A photograph at five times its brightness; an affine and a robust flow of the same"
            " training",
        ),
        (
            "toy-samples.png",
            None,
            "Two moons, and a condition far away: five couplings, the guard, a migration",
        ),
    ):
        address, shape = picture(ROOT / "docs" / "images" / file, box)
        height = COLUMN * shape
        told = f'role="img" aria-label="{html.escape(words)}"'
        parts.append(
            f'<image x="{RIGHT}" y="{top:g}" width="{COLUMN}" height="{height:g}" {told}'
            f' href="{address}"/>'
        )
        parts.append(line(RIGHT, top + height + 28, words, "small"))
        top += height + 90
    parts.append(line(RIGHT, 820, "Try it", "head"))
    for i, words in enumerate(
        (
            'pip install "flowguard-nf[demo]" && flowguard demo',
            "flowguard superres photo.jpg enlarged/",
            "flowguard doctor",
        )
    ):
        parts.append(line(RIGHT, 864 + 32 * i, words, "mono large"))
    parts.append(
        line(RIGHT, 1000, "MIT licence. Python 3.11 and newer, PyTorch 2.6 and newer.", "body")
    )
    parts.append(
        line(RIGHT, 1030, "The method: Hong, Park, Chun, ICCV 2023, arXiv:2212.04319.", "body")
    )
    style = (
        "text{fill:#1d2733;font-family:system-ui,sans-serif}.title{font-size:84px;font-weight:700}"
        ".claim{font-size:34px;fill:#35506e}.head{font-size:30px;font-weight:700;fill:#35506e}"
        ".name{font-size:21px;font-weight:700}.body{font-size:18px}.small{font-size:16px;fill:#555}"
        ".mono{font-family:ui-monospace,monospace;font-size:17px;white-space:pre}"
        ".large{font-size:22px}.code{fill:#f1f4f8;stroke:#c9d3df}"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{TITLE}: {CLAIM}"><style>{style}</style>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    )
    return head + "\n".join(parts) + "</svg>\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "poster.svg")
    out = parser.parse_args().out
    out.write_text(poster(), encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")
