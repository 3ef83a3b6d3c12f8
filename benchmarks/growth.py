r"""Measures how time and memory grow with the size of the problem, ours beside the peers'.

A curve is a size that is doubled again and again while all else stays: the elements, bins and the
number of features of a spline coupling, the features and samples of an autoregressive flow, the
levels and pixels of an image flow. Each is run by turns in one process, in processor time, so that
other work on the machine falls on all alike; the exponent is the slope of the line through the
larger half of the points, on logarithmic scales.

    python benchmarks/growth.py                               # some minutes on one core
    python benchmarks/growth.py --curves samples --turns 3
    python benchmarks/growth.py --page docs/growth.md         # writes the page and its picture
"""

import argparse
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nflows
import nflows.transforms
import normflows
import torch
import zuko
from common import by_turns
from nflows.nn.nets import ResidualNet
from torch.nn import functional as F

import flowguard
from flowguard.image import ConditionalMultiscaleFlow
from flowguard.integrations.nflows import (
    MaskedRobustSplineAutoregressiveTransform,
    RobustSplineCouplingTransform,
)
from flowguard.integrations.normflows import RobustSplineAutoregressive
from flowguard.integrations.zuko import RobustNSF

Run = Callable[[], Any]
Curve = dict[str, dict[int, float]]  # seconds by who and size

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


def image(size: int, levels: int) -> dict[str, Run]:
    r"""A sample of an image flow of so many levels, for pictures of so many pixels a side; and one
    of normflows' multiscale flows."""
    flow = ConditionalMultiscaleFlow(3, 4, levels=levels, steps=2, hidden=16).eval()
    x, c = torch.randn(1, 3, size, size), torch.randn(1, 4, size, size)
    condition = [F.avg_pool2d(c, 2**k) for k in range(1, levels + 1)]
    with torch.no_grad():
        z, _ = flow(x, condition)
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
    return {"flowguard": lambda: flow.inverse(z, condition), "normflows": lambda: glow.sample(1)}


#: What is doubled: the sizes, what is run at each, and whether gradients are.
CURVES: dict[str, tuple[list[int], Callable[[int], dict[str, Run]]]] = {
    "elements (8 bins, with gradients)": (
        [2**k for k in range(12, 17)],
        lambda n: spline(n, 8),
    ),
    "bins (16384 elements, with gradients)": ([4, 8, 16, 32, 64], lambda k: spline(16384, k)),
    "features of a coupling (1024 rows)": ([8, 16, 32, 64, 128], lambda d: coupling(1024, d)),
    "features, sampled one by one (256 rows)": (
        [4, 8, 16, 32],
        lambda d: autoregressive(256, d),
    ),
    "samples of 8 features, one by one": (
        [512, 1024, 2048, 4096],
        lambda n: autoregressive(n, 8),
    ),
    "pixels a side (2 levels)": ([32, 64, 128], lambda s: image(s, 2)),
    "levels (64 pixels a side)": ([1, 2, 3, 4], lambda n: image(64, n)),
}


def measured(curve: str, turns: int) -> Curve:
    r"""The median seconds of each at each size."""
    sizes, build = CURVES[curve]
    found: Curve = {}
    for size in sizes:
        torch.manual_seed(0)
        runs = build(size)
        grad = "gradients" in curve
        with torch.set_grad_enabled(grad):
            times = by_turns(runs, turns, clock=time.process_time)
        for name, ts in times.items():
            found.setdefault(name, {})[size] = statistics.median(ts)
    return found


def exponent(points: dict[int, float]) -> float:
    r"""The slope of the line through the larger half of the points, on logarithmic scales."""
    half = list(points.items())[(len(points) - 1) // 2 :]
    xs, ys = ([math.log(v) for v in vs] for vs in zip(*half, strict=True))
    return statistics.linear_regression(xs, ys).slope


def peak() -> float:
    r"""The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows(found: dict[str, Curve]) -> Iterator[str]:
    r"""The lines of the table."""
    yield "| what grows | from, to | who | time at both ends | exponent |"
    yield "|---|---|---|---|---|"
    for curve, times in found.items():
        for name, points in times.items():
            (a, first), *_, (b, last) = points.items()
            yield (
                f"| {curve} | {a}, {b} | {name} | {1e3 * first:.3g} ms, {1e3 * last:.3g} ms |"
                f" {exponent(points):.2f} |"
            )


def draw(found: dict[str, Curve], path: Path) -> None:
    r"""Draws all curves, each in a frame of its own."""
    import matplotlib.pyplot as plt

    columns = 2 if len(found) > 1 else 1
    lines = -(-len(found) // columns)
    figure, frames = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for frame in frames.flat[len(found) :]:
        frame.axis("off")
    for frame, (curve, times) in zip(frames.flat, found.items(), strict=False):
        for name, points in times.items():
            style = "o-" if name.startswith("flowguard") else "s--"
            label = f"{name}: {exponent(points):.2f}"
            frame.loglog(
                list(points), [1e3 * t for t in points.values()], style, label=label, ms=4
            )
        frame.set_title(curve, fontsize=10)
        frame.set_ylabel("ms")
        frame.legend(fontsize=7)
        frame.grid(alpha=0.3, which="both")
    figure.savefig(path)
    plt.close(figure)


PAGE = """# Growth

How time grows with the size of the problem, written by `python benchmarks/growth.py --page
docs/growth.md`: one thread, processor time, medians of {turns} turns, torch {torch}, zuko {zuko},
on a machine with other work beside it. The exponent is the slope of the line through the larger half of the
points, on logarithmic scales: 1 is linear, and pixels a side count twice.

![Times against sizes on logarithmic scales]({picture})

{table}

The most memory that the process held: {peak:.0f} MiB.
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
        peak=peak(),
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
