r"""The toy experiment: does the score tell where the inverse explodes, and which couplings hold?

Two moons are turned and scaled by a condition of two numbers, which lies in a thin parallelogram
in training. Then the flows are asked about a whole square around it. For each coupling and seed:
negative log-likelihood, the share of samples that are artefacts, and how well the Mahalanobis
score of the condition's embedding tells these.

    python benchmarks/toy.py --out DIR                   # what is there already is not done again
    python benchmarks/toy.py --out DIR --page docs/experiments/toy.md

The second writes the page's table and figures of what is in the folder.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from common import train, turned, two_moons
from pages import spread, table, write_part
from safetensors.torch import load_file, save_file
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from zuko.distributions import DiagNormal
from zuko.flows import (
    Flow,
    GeneralCouplingTransform,
    UnconditionalDistribution,
    UnconditionalTransform,
)
from zuko.transforms import MonotonicAffineTransform, RotationTransform

from flowguard.app.toy import parallelogram
from flowguard.bounds import certify
from flowguard.integrations.zuko import GuardedFlow
from flowguard.migration import migrate
from flowguard.ood import OODConditioner, unguarded
from flowguard.ood.metrics import auroc, decile_curve
from flowguard.transforms import (
    AffineTransform,
    CubicBSplineTransform,
    ReparametrizedAffineTransform,
    RobustSpline,
)

SQUARE = 12.0  # half of the side of the square of conditions that the flows are asked about
SIDE = 48  # conditions along each side of it
SAMPLES = 16  # for each condition
EMBEDDING = 8
BLOCKS = 4
NOISE = 6.0  # up to which the certificate is told; two in 10⁹ normal numbers lie beyond
PAIRS = 4096  # of training for the guard's fit, for its calibration, and held out, each

#: The maps of the couplings, with the boxes and shifts of the image models.
ROBUST = partial(RobustSpline, bound=5.0, shift_bound=1.0)
MAPS: dict[str, tuple[Callable[..., Any], Sequence[Sequence[int]]]] = {
    "affine": (AffineTransform, [(), ()]),
    "reparametrised affine": (ReparametrizedAffineTransform, [(), ()]),
    "B-spline": (partial(CubicBSplineTransform, bound=3.0, shift_bound=1.0), [(4,), (6,), ()]),
    "robust, 2 bins": (ROBUST, RobustSpline.shapes(2)),
    "robust, 8 bins": (ROBUST, RobustSpline.shapes(8)),
}
SHRINK, MIGRATED = "affine, guard shrinks", "affine, migrated"
NAMES = ("affine", SHRINK, MIGRATED, *list(MAPS)[1:])


class Answers(NamedTuple):
    r"""What one flow makes of the square, and of held-out pairs."""

    scores: Tensor  # of the conditions, with shape (SIDE²)
    errors: Tensor  # the share of samples of each condition that are artefacts
    points: Tensor  # some samples: of a condition in the middle, and of one in a corner
    moved_scores: Tensor  # of conditions of training that were moved away, with shape (SIDE²)
    moved_errors: Tensor  # the shares of theirs
    numbers: dict[str, float]


def pairs(n: int) -> tuple[Tensor, Tensor]:
    r"""Draws pairs of a point and a condition."""
    y = parallelogram(n)
    return 1.3 * turned(two_moons(n, 0.05), y), y


def square() -> Tensor:
    r"""Returns the conditions that the flows are asked about, with shape :math:`(SIDE², 2)`."""
    along = torch.linspace(-SQUARE, SQUARE, SIDE)
    return torch.cartesian_prod(along, along)


def moved(n: int) -> Tensor:
    r"""Draws conditions of training and moves each into some direction, by a distance between a
    hundredth of the square's half side and all of it, such that its logarithm is uniform."""
    angle, distance = 2 * torch.pi * torch.rand(n), SQUARE * 100 ** -torch.rand(n)
    return parallelogram(n) + distance[:, None] * torch.stack((angle.cos(), angle.sin()), dim=-1)


def build(name: str) -> GuardedFlow:
    r"""Returns an untrained flow of four blocks, with its encoder inside of a guard.

    A block is a constant affine map of each feature, a rotation and a coupling: the scales of the
    published affine coupling are at most one, so that all that expands is in the constant map.
    """
    univariate, shapes = MAPS[name]
    encoder = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, EMBEDDING)
    )
    layers: list[nn.Module] = []
    for block in range(BLOCKS):
        layers += [
            UnconditionalTransform(MonotonicAffineTransform, torch.zeros(2), torch.zeros(2)),
            UnconditionalTransform(RotationTransform, torch.randn(2, 2)),
            GeneralCouplingTransform(
                2,
                EMBEDDING,
                mask=torch.arange(2) == block % 2,
                univariate=univariate,
                shapes=shapes,
                hidden_features=(64, 64),
            ),
        ]
    base = UnconditionalDistribution(DiagNormal, torch.zeros(2), torch.ones(2), buffer=True)
    conditioner = OODConditioner(encoder, policy="report", alpha=0.01)
    return GuardedFlow(Flow(layers, base), conditioner)


def artefacts(x: Tensor, frame: tuple[Tensor, Tensor]) -> Tensor:
    r"""Returns which samples are not finite or farther from the training points' range than half
    of its width, in one coordinate at least."""
    low, high = frame
    margin = (high - low) / 2
    return ~((x >= low - margin) & (x <= high + margin)).all(dim=-1)


@torch.no_grad()
def ask(model: GuardedFlow, seed: int, seconds: float) -> Answers:
    r"""Asks a flow about the square, and about held-out pairs, which are those of the seed."""
    torch.manual_seed(10_000 + seed)
    x, y = pairs(PAIRS)
    frame = x.amin(dim=0), x.amax(dim=0)
    asked = square()
    scores = model.conditioner.score(asked).levels["level1"].score
    with unguarded(model):  # all but "shrink", which is a part of what the flow computes

        def sample(y: Tensor, *count: int) -> Tensor:
            return model(y).transform.inv(torch.randn(*count, len(y), 2))

        found, inside = sample(asked, SAMPLES), sample(y)
        corners = torch.tensor([[0.0, 0.0], [-SQUARE, SQUARE]])
        points = sample(corners, 500).transpose(0, 1).flatten(0, 1)
        nll = -model(y).log_prob(x).mean()
        away = moved(SIDE**2)
        wrong, lost = artefacts(found, frame), artefacts(sample(away, SAMPLES), frame)
    finite = found.isfinite().all(dim=-1)
    numbers = {
        "nll": float(nll),
        "held_out": float(artefacts(inside, frame).float().mean()),
        "artefacts": float(wrong.float().mean()),
        "non_finite": float((~finite).float().mean()),
        "largest": float(found[finite].abs().max()),
        "certified": certify(model).bound(NOISE),
        "seconds": seconds,
    }
    far = model.conditioner.score(away).levels["level1"].score
    for where, (known, of) in {"square": (scores, wrong), "moved": (far, lost)}.items():
        if bool(of.any()) and not bool(of.all()):
            rates = of.float().mean(dim=0)
            numbers[f"auroc, {where}"] = auroc(known.expand_as(of), of)
            numbers[f"spearman, {where}"] = decile_curve(known, rates).spearman
            numbers[f"reliability, {where}"] = reliability(known, rates)[2]
    shares = (of.float().mean(dim=0) for of in (wrong, lost))
    return Answers(scores, next(shares), points, far, next(shares), numbers)


def reliability(scores: Tensor, rates: Tensor) -> tuple[Any, Any, float]:
    r"""Returns the error probability that the score foretells, in ten bins of equal size, the share
    of errors in each, and the mean distance of both.

    The probability is the isotonic regression of the errors of every other condition; it is told
    for those between them.
    """
    order = torch.arange(len(scores))
    learnt = (order // SIDE + order % SIDE) % 2 == 0  # as on a chessboard
    model = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1)
    model.fit(scores[learnt].double().log().numpy(), rates[learnt].double().numpy())
    told = model.predict(scores[~learnt].double().log().numpy())
    truth = rates[~learnt].double().numpy()
    parts = np.array_split(np.argsort(told, kind="stable"), 10)
    foretold, seen = (np.array([v[part].mean() for part in parts]) for v in (told, truth))
    return foretold, seen, float(np.abs(foretold - seen).mean())


def answers(seed: int, name: str, steps: int) -> Iterator[tuple[str, Answers]]:
    r"""Trains a flow and yields what it answers; the affine one also with ``"shrink"``, and
    migrated."""
    torch.manual_seed(seed)
    model = build(name)
    start = time.process_time()
    # The clip is that of the image models, without which an affine flow may never get going.
    loss = lambda x, y: -model(y).log_prob(x).mean()  # noqa: E731
    train(model, loss, steps, draw=pairs, batch=256, lr=4e-3, clip=10)
    seconds = time.process_time() - start
    torch.manual_seed(20_000 + seed)
    model.conditioner.fit(parallelogram(PAIRS), progress=False)
    model.conditioner.calibrate(parallelogram(PAIRS), progress=False)
    yield name, ask(model, seed, seconds)
    if name == "affine":
        model.conditioner.policy = "shrink"
        yield SHRINK, ask(model, seed, seconds)
        model.conditioner.policy = "report"
        robust, _ = migrate(model, *pairs(PAIRS))
        yield MIGRATED, ask(robust, seed, seconds)


def keep(folder: Path, name: str, seed: int, found: Answers) -> None:
    r"""Writes what a flow answered, its numbers last."""
    stem = folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    tensors = found._asdict()
    del tensors["numbers"]
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{stem}.safetensors")
    text = json.dumps({"name": name, "seed": seed, **found.numbers}, indent=1)
    Path(f"{stem}.json").write_text(text + "\n", encoding="utf-8")


def kept(folder: Path) -> dict[str, dict[int, Answers]]:
    r"""Returns what is in the folder, by name and seed."""
    found: dict[str, dict[int, Answers]] = {}
    for file in sorted(folder.glob("*.json")):
        numbers = json.loads(file.read_text(encoding="utf-8"))
        name, seed = numbers.pop("name"), numbers.pop("seed")
        tensors = load_file(file.with_suffix(".safetensors"))
        found.setdefault(name, {})[seed] = Answers(**tensors, numbers=numbers)
    return {name: found[name] for name in NAMES if name in found}


COLUMNS: dict[str, tuple[str, Callable[[Sequence[float]], str]]] = {
    "nll": ("held-out NLL, nats", spread),
    "held_out": ("artefacts, held out", lambda v: _percent(v)),
    "artefacts": ("artefacts, square", lambda v: _percent(v)),
    "non_finite": ("not finite", lambda v: _percent(v)),
    "largest": ("largest value", lambda v: f"{max(v):.3g}"),
    "certified": (
        f"certified, for noise up to {NOISE:g}",
        lambda v: f"{max(v):.3g}".replace("inf", "–"),
    ),
    "seconds": ("s to train", lambda v: spread(v, ".1f")),
}


#: The conditions that were asked about, with the names of their scores and errors.
WHERE = {"square": ("scores", "errors"), "moved": ("moved_scores", "moved_errors")}
TOLD: dict[str, str] = {
    "spearman": "Spearman over deciles",
    "auroc": "AUROC of samples",
    "reliability": "reliability error",
}


def _percent(values: Sequence[float]) -> str:
    return spread([100 * v for v in values], ".2f") + " %"


def lines(found: Mapping[str, Mapping[int, Answers]]) -> str:
    r"""Returns the table."""
    rows = []
    for name, seeds in found.items():
        values = {
            key: [one.numbers.get(key, math.nan) for one in seeds.values()] for key in COLUMNS
        }
        rows.append([name, *(form(values[key]) for key, (_, form) in COLUMNS.items())])
    return table(["coupling", *(heading for heading, _ in COLUMNS.values())], rows)


def told(found: Mapping[str, Mapping[int, Answers]]) -> str:
    r"""Returns the table of what the score tells, of the flows that make artefacts at all."""
    rows = []
    for name, seeds in found.items():
        for where in WHERE:
            values = [
                [one.numbers.get(f"{key}, {where}", math.nan) for one in seeds.values()]
                for key in TOLD
            ]
            if not all(math.isnan(v) for v in values[0]):
                rows.append([name, where, *map(spread, values)])
    return table(["coupling", "conditions", *TOLD.values()], rows)


def draw_square(found: Mapping[str, Mapping[int, Answers]], file: Path) -> None:
    r"""Draws the score and the share of artefacts over the square, for the first seed."""
    from matplotlib.figure import Figure

    shown = [name for name in ("affine", SHRINK, MIGRATED, "robust, 8 bins") if name in found]
    figure = Figure(figsize=(2.6 * (len(shown) + 1) + 0.6, 2.9), layout="constrained")
    axes = list(figure.subplots(1, len(shown) + 1, squeeze=False)[0])
    first = {name: next(iter(found[name].values())) for name in shown}
    box = (-SQUARE, SQUARE, -SQUARE, SQUARE)
    corners = np.array([(-2, -1.3), (-2, -0.7), (2, 1.3), (2, 0.7), (-2, -1.3)]).T
    scores = first[shown[0]].scores.log10().reshape(SIDE, SIDE).T
    images = [axes[0].imshow(scores, origin="lower", extent=box, cmap="viridis")]
    axes[0].set_title("Mahalanobis score, log₁₀", fontsize=9)
    for axis, name in zip(axes[1:], shown, strict=True):
        rates = 100 * first[name].errors.reshape(SIDE, SIDE).T
        images.append(
            axis.imshow(rates, origin="lower", extent=box, vmin=0, vmax=100, cmap="magma")
        )
        axis.set_title(name, fontsize=9)
    for axis in axes:
        axis.plot(*corners, color="white", linewidth=1)
        axis.tick_params(labelsize=7)
    axes[0].set_xlabel("condition, first number", fontsize=8)
    axes[0].set_ylabel("condition, second number", fontsize=8)
    figure.colorbar(images[0], ax=axes[0], shrink=0.8)
    figure.colorbar(images[-1], ax=axes[1:], shrink=0.8, label="artefacts among samples, %")
    figure.savefig(file, dpi=100)


def draw_reliability(found: Mapping[str, Mapping[int, Answers]], file: Path) -> None:
    r"""Draws the share of artefacts by decile of the score, and foretold against seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 3.4), layout="constrained")
    *curves, right = figure.subplots(1, 3)
    for axis, (where, (scores, errors)) in zip(curves, WHERE.items(), strict=True):
        for number, (name, seeds) in enumerate(found.items()):
            pairs = [(getattr(one, scores), getattr(one, errors)) for one in seeds.values()]
            rates = [decile_curve(*pair).rates for pair in pairs]
            mean = 100 * np.mean(rates, axis=0)
            axis.plot(range(1, 11), mean, f"{'osD^vP*'[number]}-", label=name, markersize=4)
        axis.set_title(where, fontsize=9)
        axis.set_xlabel("decile of the score")
    curves[0].set_ylabel("artefacts among samples, %")
    curves[1].legend(fontsize=6)
    for seed, one in found.get("affine", {}).items():
        foretold, seen, _ = reliability(one.moved_scores, one.moved_errors)
        right.plot(100 * foretold, 100 * seen, "o", label=f"affine, seed {seed}", markersize=4)
    right.axline((0, 0), slope=1, color="grey", linewidth=1)
    right.set_title("moved", fontsize=9)
    right.set_xlabel("artefacts that the score foretells, %")
    right.set_ylabel("artefacts seen, %")
    right.legend(fontsize=7)
    figure.savefig(file, dpi=100)


def draw_samples(found: Mapping[str, Mapping[int, Answers]], file: Path) -> None:
    r"""Draws samples for a condition of training, and for a corner of the square."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * len(found), 4.0), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, (name, seeds) in zip(axes.T, found.items(), strict=True):
        for axis, points in zip(column, next(iter(seeds.values())).points.chunk(2), strict=True):
            inside = (points.abs() <= 8).all(dim=-1)
            axis.plot(*points[inside].T, ".", markersize=1.5)
            lost = 1 - float(inside.float().mean())
            axis.set_xlabel(f"{100 * lost:.0f} % not in the frame", fontsize=7)
            axis.set(xlim=(-8, 8), ylim=(-8, 8), xticks=[], yticks=[], aspect="equal")
        column[0].set_title(name, fontsize=8)
    axes[0, 0].set_ylabel("a condition of training", fontsize=8)
    axes[1, 0].set_ylabel("a corner of the square", fontsize=8)
    figure.savefig(file, dpi=100)


FIGURES = {
    "square": (
        draw_square,
        "Left: the score over the square of conditions. Right: the share of artefacts among the"
        " samples of each condition, seed 0. The white line is the parallelogram of training.",
    ),
    "reliability": (
        draw_reliability,
        "Artefacts by decile of the score, mean over the seeds: over the square, and for conditions"
        " of training that were moved away. Right: what the score foretells after isotonic"
        " regression on half of the moved conditions, against what is seen on the other half.",
    ),
    "samples": (
        draw_samples,
        "Samples of each flow, seed 0: above for a condition of training, below for a corner of"
        " the square.",
    ),
}


def write_page(found: Mapping[str, Mapping[int, Answers]], page: Path, steps: int) -> None:
    r"""Writes table and figures into the page, and the figures beside it."""
    images = page.parents[1] / "images"
    parts = [lines(found), told(found)]
    for name, (draw, caption) in FIGURES.items():
        file = images / f"toy-{name}.png"
        draw(found, file)
        parts.append(f"![{caption}](../images/{file.name})\n\n*{caption}*")
    seeds = len(next(iter(found.values())))
    seconds = sum(one.numbers["seconds"] for n in MAPS for one in found.get(n, {}).values())
    parts.append(
        f"Each flow was trained for {steps} steps of 256 pairs; mean and standard deviation over "
        f"{seeds} seed{'s' * (seeds > 1)}, the largest over these for the largest value. All "
        f"trainings took {seconds:.0f} s of one processor core."
    )
    write_part(page, "toy", "\n\n".join(parts))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of the answers")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--couplings", nargs="+", choices=list(MAPS), default=list(MAPS))
    parser.add_argument("--page", type=Path, help="write table and figures into this page alone")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.page:
        if not kept(options.out):
            parser.error(f"{options.out} holds no answers yet: run the same without --page first")
        write_page(kept(options.out), options.page, options.steps)
        return
    done = kept(options.out)
    for seed in options.seeds:
        for name in options.couplings:
            last = MIGRATED if name == "affine" else name
            if seed in done.get(last, {}):
                continue
            for told, found in answers(seed, name, options.steps):
                keep(options.out, told, seed, found)
                numbers = "  ".join(f"{k} {v:.4g}" for k, v in found.numbers.items())
                print(f"seed {seed}, {told}: {numbers}", flush=True)
    print(lines(kept(options.out)))


if __name__ == "__main__":
    main()
