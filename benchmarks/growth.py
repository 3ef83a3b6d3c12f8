r"""Measures how time and memory grow with the size of the problem, ours beside the peers'.

A curve is a size that is doubled again and again while all else stays: the elements, bins and the
number of features of a spline coupling, the features and samples of an autoregressive flow, the
levels, pixels and samples of an image flow. Each is run by turns in one process, in processor time,
so that other work on the machine falls on all alike; the memory is the peak of all that a call
allocates, its results included; the exponent is the slope of the line through the larger half of the
points, on logarithmic scales.

    python benchmarks/growth.py                               # some minutes on one core
    python benchmarks/growth.py --curves samples --turns 3
    python benchmarks/growth.py --page docs/growth.md         # writes the page and its picture
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nflows
import nflows.transforms
import normflows
import torch
import zuko
from common import allocated, by_turns
from nflows.nn.nets import ResidualNet
from torch.nn import functional as F

import flowguard
from flowguard.image import ConditionalMultiscaleFlow
from flowguard.image.tiling import TiledFlow
from flowguard.integrations.nflows import (
    MaskedRobustSplineAutoregressiveTransform,
    RobustSplineCouplingTransform,
)
from flowguard.integrations.normflows import RobustSplineAutoregressive
from flowguard.integrations.zuko import RobustNSF

Run = Callable[[], Any]


class Cost(NamedTuple):
    r"""What a call takes: milliseconds, and megabytes."""

    ms: float
    MiB: float


Curve = dict[str, dict[int, Cost]]  # by who and size

TILE = 64  # pixels a side
RQS = nflows.transforms.splines.rational_quadratic.unconstrained_rational_quadratic_spline


def spline(n: int, bins: int) -> dict[str, Run]:
    r"""Splines of so many elements and bins, and their gradients."""
    x = 3 * torch.randn(n)

    def parameters(*sizes: int) -> list[torch.Tensor]:
        return [torch.randn(n, size, requires_grad=True) for size in sizes]

    ours, theirs = parameters(bins - 1, bins - 1, bins - 1), parameters(bins, bins, bins - 1)

    def of(f: Callable[..., Any], phi: list[torch.Tensor]) -> Run:
        def run() -> None:
            y, ladj = f(x, *phi)
            torch.autograd.grad(y.sum() + ladj.sum(), phi)

        return run

    robust = flowguard.functional.rational_quadratic_spline
    return {
        "flowguard": of(lambda *t: robust(*t, bound=5.0), ours),
        "zuko": of(
            lambda x, *p: zuko.transforms.MonotonicRQSTransform(*p).call_and_ladj(x), theirs
        ),
        "nflows": of(lambda *t: RQS(*t, tails="linear", tail_bound=5.0), theirs),
    }


def coupling(n: int, features: int) -> dict[str, Run]:
    r"""The density of a spline coupling over so many features."""
    x = torch.randn(n, features)
    mask = [1, 0] * (features // 2)
    T = nflows.transforms
    layers: dict[str, Any] = {
        "flowguard": RobustSplineCouplingTransform(mask, lambda i, o: ResidualNet(i, o, 64)),
        "nflows": T.PiecewiseRationalQuadraticCouplingTransform(
            mask, lambda i, o: ResidualNet(i, o, 64), num_bins=8, tails="linear", tail_bound=3.0
        ),
    }
    return {name: lambda f=layer: f(x) for name, layer in layers.items()}


def autoregressive(n: int, features: int) -> dict[str, Run]:
    r"""So many samples of an autoregressive flow of one layer over so many features."""
    z = torch.randn(n, features)
    T, N = nflows.transforms, normflows.flows
    ours = MaskedRobustSplineAutoregressiveTransform(features, 64)
    nsf = T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        features, 64, num_bins=8, tails="linear", tail_bound=3.0
    )
    robust, stock = (
        RobustSplineAutoregressive(features, 2, 64),
        N.AutoregressiveRationalQuadraticSpline(features, 2, 64),
    )
    lazy = {
        "flowguard in zuko": RobustNSF(features, transforms=1),
        "zuko NSF": zuko.flows.NSF(features, transforms=1),
        "zuko MAF": zuko.flows.MAF(features, transforms=1),
    }
    return {name: lambda f=flow: f().transform.inv(z) for name, flow in lazy.items()} | {
        "flowguard in nflows": lambda: ours.inverse(z),
        "nflows": lambda: nsf.inverse(z),
        "flowguard in normflows": lambda: robust(z),
        "normflows": lambda: stock(z),
    }


def image(size: int, levels: int, samples: int = 1) -> dict[str, Run]:
    r"""Samples of an image flow of so many levels, for one condition and pictures of so many pixels
    a side, as a whole and in tiles; and of one of normflows' multiscale flows."""
    flow = ConditionalMultiscaleFlow(3, 4, levels=levels, steps=2, hidden=16).eval()
    x, c = torch.randn(1, 3, size, size), torch.randn(1, 4, size, size)
    context = [F.avg_pool2d(c, 2**k) for k in range(1, levels + 1)]
    with torch.no_grad():
        latents, _ = flow(x, context)  # sets its actnorms
    z = [torch.randn(samples, *latent.shape[1:]) for latent in latents]
    tiled = TiledFlow(flow, TILE)
    D, N = normflows.distributions, normflows.flows
    channels, shapes, blocks, merges = 3, [], [], []
    for k in range(levels):
        channels *= 4
        blocks.append([N.GlowBlock(channels, 16) for _ in range(2)] + [N.Squeeze()])
        if k < levels - 1:
            merges.append(N.Merge())
            channels //= 2
        shapes.append((channels, size >> k + 1, size >> k + 1))
    bases = [D.DiagGaussian(shape, trainable=False) for shape in shapes]
    glow = normflows.MultiscaleFlow(bases[::-1], [b[:] for b in blocks[::-1]], merges)
    with torch.no_grad():
        glow.log_prob(x, None)  # sets its actnorms
    runs = {
        "flowguard": lambda: flow.inverse(z, context, ladj=False),
        "normflows": lambda: glow.sample(samples),
    }
    if size > TILE:
        runs["flowguard, in tiles"] = lambda: tiled.inverse(z, tiled.work_out(context))
    return runs


#: What is doubled: the sizes, what is run at each, and whether gradients are.
CURVES: dict[str, tuple[list[int], Callable[[int], dict[str, Run]]]] = {
    "elements (8 bins, with gradients)": (
        [2**k for k in range(12, 17)],
        lambda n: spline(n, 8),
    ),
    "bins (16384 elements, with gradients)": (
        [4, 8, 16, 32, 64, 128, 256],
        lambda k: spline(16384, k),
    ),
    "features of a coupling (1024 rows)": ([8, 16, 32, 64, 128], lambda d: coupling(1024, d)),
    "features, sampled one by one (256 rows)": (
        [4, 8, 16, 32],
        lambda d: autoregressive(256, d),
    ),
    "samples of 8 features, one by one": (
        [512, 1024, 2048, 4096],
        lambda n: autoregressive(n, 8),
    ),
    "pixels a side (2 levels)": ([32, 64, 128, 256, 512], lambda s: image(s, 2)),
    "levels (64 pixels a side)": ([1, 2, 3, 4], lambda n: image(64, n)),
    "samples of 64 pixels a side (2 levels)": ([1, 2, 4, 8, 16], lambda n: image(64, 2, n)),
}


def measured(curve: str, turns: int) -> Curve:
    r"""The median time of each at each size, and its memory."""
    sizes, build = CURVES[curve]
    found: Curve = {}
    for size in sizes:
        torch.manual_seed(0)
        runs = build(size)
        grad = "gradients" in curve
        with torch.set_grad_enabled(grad):
            times = by_turns(runs, turns, clock=time.process_time)
            for name, ts in times.items():
                _, peak, *_ = allocated(runs[name], torch.device("cpu"))
                cost = Cost(1e3 * statistics.median(ts), peak / 2**20)
                found.setdefault(name, {})[size] = cost
    return found


def exponent(points: dict[int, Cost], unit: str) -> float:
    r"""The slope of the line through the larger half of the points, on logarithmic scales."""
    half = list(points.items())[(len(points) - 1) // 2 :]
    xs, ys = zip(*((math.log(n), math.log(getattr(c, unit))) for n, c in half), strict=True)
    return statistics.linear_regression(xs, ys).slope


def rows(found: dict[str, Curve]) -> Iterator[str]:
    r"""The lines of the table."""
    yield "| what grows | from, to | who | time at both ends | exponent | memory at both ends | exponent |"
    yield "|---|---|---|---|---|---|---|"
    for curve, costs in found.items():
        for name, points in costs.items():
            (a, first), *_, (b, last) = points.items()
            cells = (
                f" {getattr(first, unit):.3g} {unit}, {getattr(last, unit):.3g} {unit} |"
                f" {exponent(points, unit):.2f} |"
                for unit in Cost._fields
            )
            yield f"| {curve} | {a}, {b} | {name} |{''.join(cells)}"


def draw(found: dict[str, Curve], path: Path) -> None:
    r"""Draws all curves, time on the left and memory on the right."""
    import matplotlib.pyplot as plt

    figure, frames = plt.subplots(
        len(found), 2, figsize=(11, 3.6 * len(found)), squeeze=False, layout="constrained"
    )
    for line, (curve, costs) in zip(frames, found.items(), strict=True):
        for frame, unit in zip(line, Cost._fields, strict=True):
            for name, points in costs.items():
                style = "o-" if name.startswith("flowguard") else "s--"
                label = f"{name}: {exponent(points, unit):.2f}"
                ys = [getattr(cost, unit) for cost in points.values()]
                frame.loglog(list(points), ys, style, label=label, ms=4)
            sizes = max(costs.values(), key=len)
            frame.set_xticks(list(sizes), [str(size) for size in sizes])
            frame.minorticks_off()
            frame.set_title(curve, fontsize=10)
            frame.set_ylabel(unit)
            frame.legend(fontsize=7)
            frame.grid(alpha=0.3)
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path)
    plt.close(figure)


PAGE = """# Growth

How time and memory grow with the size of the problem, written by `python benchmarks/growth.py --page
docs/growth.md`: one thread, processor time, medians of {turns} turns, torch {torch}, zuko {zuko},
on a machine with other work beside it. The memory is the peak of all that a call allocates, its
results included, but not what it is given. The exponent is the slope of the line through the larger
half of the points, on logarithmic scales: 1 is linear, and pixels a side count twice.

![Times and memory against sizes on logarithmic scales]({picture})

{table}

Tiles are of {tile}² pixels.
"""


def write(page: Path, found: dict[str, Curve], turns: int) -> None:
    r"""Writes the page, and its picture beside it."""
    picture = page.parent / "images" / "growth.svg"
    picture.parent.mkdir(exist_ok=True)
    draw(found, picture)
    text = PAGE.format(
        turns=turns,
        torch=torch.__version__,
        zuko=zuko.__version__,
        picture="images/growth.svg",
        table="\n".join(rows(found)),
        tile=TILE,
    )
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--curves", nargs="+", default=[""], help="those that begin so")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--page", type=Path, help="the page that is written, with its picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for curve in CURVES:
        if curve.startswith(tuple(args.curves)):
            found[curve] = measured(curve, args.turns)
            print(*list(rows({curve: found[curve]}))[2:], sep="\n", flush=True)
            if args.page:  # after each curve, as a run may be long
                write(args.page, found, args.turns)
    if not found:
        sys.exit(f"curves must begin with one of {', '.join(CURVES)}; got {args.curves}")


if __name__ == "__main__":
    main()
