r"""Which least slope do splines want? Digits on the way back, against likelihood.

The less a spline may rise, the more the inverse loses to rounding, and the more the forward map
has lost before. Four parts, each of which prints a table:

    python benchmarks/slope.py digits        # round trips in float32, and where the digits go
    python benchmarks/slope.py sets          # six sets in two dimensions
    python benchmarks/slope.py tables        # five tables of scikit-learn
    python benchmarks/slope.py photographs   # a small image flow

The last three train the same flow for each slope from the same seeds, and print how much worse
than with the first slope it is on held-out data: mean and standard error over seeds.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial

import common
import torch
import torch.nn as nn
import zuko
from sklearn import datasets
from torch import Tensor
from zuko.lazy import Flow

from flowguard import data
from flowguard.image import Robust
from flowguard.integrations.zuko import RobustCouplingFlow, RobustNSF
from flowguard.models import SuperResolutionFlow
from flowguard.training.loop import train as train_images

POINTS = 256  # of a round trip, of which the worst one counts
SHAKEN = 0.2  # standard deviation of what is added to all weights
SIZES = (2, 0), (3, 0), (3, 2), (5, 0), (5, 3)  # features and context
SPLITS = 0.7, 0.85  # where the rows for training end, and those that tell when to stop
LOOK = 20  # steps between two looks at the latter
PATIENCE = 160  # steps without an improvement that end the training


def eight(n: int) -> Tensor:
    r"""Eight Gaussians on a circle."""
    at = torch.randint(8, (n,)) * (math.pi / 4)
    return torch.stack((at.cos(), at.sin()), dim=-1) * 1.4 + 0.1 * torch.randn(n, 2)


def spiral(n: int) -> Tensor:
    r"""Two arms of a spiral."""
    at = 3 * math.pi * torch.rand(n).sqrt()
    sign = torch.randint(2, (n, 1)) * 2.0 - 1
    arm = torch.stack((at.cos(), at.sin()), dim=-1) * at[:, None] / 5
    return sign * arm + 0.03 * torch.randn(n, 2)


def checkerboard(n: int) -> Tensor:
    r"""The dark squares of a board of four by four."""
    column, row = torch.randint(4, (n,)), 2 * torch.randint(2, (n,))
    corner = torch.stack((column, row + column % 2), dim=-1)
    return (corner + torch.rand(n, 2) - 2) * (math.sqrt(12) / 4)


def rings(n: int) -> Tensor:
    r"""Three rings around each other."""
    radius = torch.randint(1, 4, (n,)) * 0.7 + 0.04 * torch.randn(n)
    at = 2 * math.pi * torch.rand(n)
    return torch.stack((at.cos(), at.sin()), dim=-1) * radius[:, None]


def ridge(n: int) -> Tensor:
    r"""A curve with a width of 0.003."""
    x = torch.randn(n)
    return torch.stack((x, torch.sin(2 * x) + 0.003 * torch.randn(n)), dim=-1)


def moons(n: int) -> Tensor:
    r"""Two moons."""
    return 1.3 * common.two_moons(n, 0.05)


SETS: dict[str, Callable[[int], Tensor]] = {
    "ridge": ridge,
    "spiral": spiral,
    "checkerboard": checkerboard,
    "rings": rings,
    "eight Gaussians": eight,
    "moons": moons,
}
TABLES = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "diabetes": partial(datasets.load_diabetes, scaled=False),
    "digits": datasets.load_digits,
}
KINDS: dict[str, Callable[..., Flow]] = {
    "NSF": zuko.flows.NSF,
    "RobustNSF": RobustNSF,
    "RobustCouplingFlow": RobustCouplingFlow,
}


def shaken(make: Callable[..., Flow], features: int, context: int, seed: int) -> Flow:
    r"""Makes a flow of three layers and adds noise to its weights."""
    torch.manual_seed(seed)
    flow = make(features, context, transforms=3)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(SHAKEN * torch.randn(p.shape))
    return flow


@torch.no_grad()
def lost(make: Callable[..., Flow], size: tuple[int, int], seed: int, dtype: torch.dtype) -> float:
    r"""The error of the worst point after a round trip in that dtype, with noise in float32."""
    flow = shaken(make, *size, seed)
    x, c = torch.randn(POINTS, size[0]), torch.randn(POINTS, size[1])
    f = flow.to(dtype)(c.to(dtype) if size[1] else None).transform
    z = f(x.to(dtype)).float()
    return (f.inv(z.to(dtype)).double() - x).abs().max().item()


def digits(slopes: Iterable[float], seeds: int) -> None:
    r"""Round trips of shaken flows: median and greatest over seeds, of the worst point."""
    ways = {"all in float32": torch.float32, "only the noise rounded": torch.float64}
    print("| flow | slope |", " | ".join(f"{f} features, {c} context" for f, c in SIZES), "|")
    print("|---|---|" + "---:|" * len(SIZES))
    for way, dtype in ways.items():
        print(f"| *{way}* |" + " |" * (len(SIZES) + 1))
        for kind, cls in KINDS.items():
            for slope in slopes if kind != "NSF" else (None,):
                make = cls if slope is None else partial(cls, slope=slope)
                row = []
                for size in SIZES:
                    errors = [lost(make, size, seed, dtype) for seed in range(seeds)]
                    row.append(f"{statistics.median(errors):.1e} ({max(errors):.1e})")
                print(f"| {kind} | {slope or ''} |", " | ".join(row), "|", flush=True)


class Together:
    r"""Flows of one architecture, trained at a time: small ones cost hardly more than one."""

    def __init__(self, flows: list[RobustNSF], x: Tensor) -> None:
        self.weights: list[Tensor] = []
        self.layers = []
        for layers in zip(*(flow.transform.transforms for flow in flows), strict=True):
            linears = [[m for m in t.hyper if isinstance(m, nn.Linear)] for t in layers]
            steps = []
            for each in zip(*linears, strict=True):
                weight, bias = (
                    torch.stack([m.get_parameter(n) for m in each]).detach()
                    for n in ("weight", "bias")
                )
                steps.append((weight.requires_grad_(), bias.requires_grad_(), each[0].mask))
                self.weights += steps[-1][:2]
            self.layers.append((steps, layers[0].univariate, layers[0].shapes))
        alone = torch.stack([f().log_prob(rows) for f, rows in zip(flows, x, strict=True)])
        torch.testing.assert_close(self.nll(x), -alone, atol=1e-3, rtol=1e-3)

    def nll(self, x: Tensor) -> Tensor:
        r"""The negative log-likelihoods of each flow's own points, with shape :math:`(S, N, D)`."""
        total: Tensor | float = 0.0
        for steps, univariate, shapes in self.layers:
            phi = x
            for k, (weight, bias, mask) in enumerate(steps):
                rows = phi.relu() if k else phi
                phi = torch.baddbmm(bias[:, None], rows, (weight * mask).mT)
            sizes = [math.prod(shape) for shape in shapes]
            numbers = phi.unflatten(-1, (x.shape[-1], -1)).split(sizes, dim=-1)
            params = [
                n.unflatten(-1, s) if s else n.squeeze(-1)
                for n, s in zip(numbers, shapes, strict=True)
            ]
            x, ladj = univariate(*params).call_and_ladj(x)
            total = total - ladj.sum(-1)
        return total + (x.square() + math.log(2 * math.pi)).sum(-1) / 2


def made(features: int, slope: float, seeds: int, x: Tensor) -> Together:
    r"""Makes flows of three layers, one for each seed."""
    flows = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        flows.append(RobustNSF(features, transforms=3, slope=slope))
    return Together(flows, x)


def of_set(name: str, slope: float, seeds: int, steps: int) -> list[float]:
    r"""Trains on fresh points and returns held-out negative log-likelihoods in nats."""

    def draw(n: int) -> Tensor:
        return SETS[name](seeds * n).unflatten(0, (seeds, n))

    torch.manual_seed(10_000)
    held_out = draw(10_000)
    flows = made(2, slope, seeds, held_out[:, :64])
    optimizer = torch.optim.Adam(flows.weights, 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        flows.nll(draw(256)).mean(-1).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return flows.nll(held_out).mean(-1).tolist()


def of_table(name: str, slope: float, seeds: int, steps: int) -> list[float]:
    r"""Trains on some rows, as long as it helps with others, and returns negative log-likelihoods
    of the rest in nats."""
    x = torch.as_tensor(TABLES[name]().data).float()
    torch.manual_seed(10_000)
    splits = [_split(x) for _ in range(seeds)]
    train, stop, test = (torch.stack(part) for part in zip(*splits, strict=True))
    flows = made(train.shape[-1], slope, seeds, stop)
    optimizer = torch.optim.Adam(flows.weights, 1e-3)
    best, result = torch.full((2, seeds), math.inf)
    since = torch.zeros(seeds)
    for step in range(steps):
        if step % LOOK == 0:
            with torch.no_grad():
                now, then = (flows.nll(part).mean(-1) for part in (stop, test))
            better = now < best
            best, result = torch.where(better, now, best), torch.where(better, then, result)
            since[better] = step
            if bool((step - since >= PATIENCE).all()):
                break
        batch = train[:, torch.randint(train.shape[1], (128,))]
        optimizer.zero_grad()
        flows.nll(batch).mean(-1).sum().backward()
        optimizer.step()
    return result.tolist()


def _split(x: Tensor) -> list[Tensor]:
    r"""Spreads values over the gaps between them, and standardizes features by the first part."""
    x = x[:, x.std(0) > 0]
    x = x + torch.rand_like(x) * torch.stack([c.unique().diff().min() for c in x.T])
    first, second = (int(share * len(x)) for share in SPLITS)
    x = x[torch.randperm(len(x))]
    x = (x - x[:first].mean(0)) / x[:first].std(0)
    return [x[:first], x[first:second], x[second:]]


def of_photographs(_: str, slope: float, seeds: int, steps: int) -> list[float]:
    r"""Trains small super-resolution flows and returns bits per dimension of new crops."""
    images = [data.photograph(name) for name in data.TRAINING_PHOTOGRAPHS]
    crops = partial(data.PairedCrops, images, scale=4, size=32)
    bits = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = SuperResolutionFlow(
            scale=4, levels=2, steps=3, hidden=32, features=24, coupling=Robust(slope=slope)
        )
        train_images(model, crops(batch=16, seed=seed), steps=steps, progress=False)
        torch.manual_seed(0)
        held_out = zip(range(6), crops(batch=64, seed=1_000), strict=False)
        with torch.no_grad():
            nlls = [model.nll(hr, lr).mean().item() for _, (hr, lr) in held_out]
        bits.append(statistics.mean(nlls))
    return bits


Measure = Callable[[str, float, int, int], list[float]]
PARTS: dict[str, tuple[Iterable[str], Measure, int]] = {
    "sets": (SETS, of_set, 800),
    "tables": (TABLES, of_table, 800),
    "photographs": (("photographs",), of_photographs, 150),
}


def compare(
    part: str, slopes: list[float], seeds: int, steps: int | None, only: list[str]
) -> None:
    r"""Prints what each slope costs against the first one, paired by seed."""
    names, measure, usual = PARTS[part]
    print(f"| | at {slopes[0]:g} |", " | ".join(f"{s:g}" for s in slopes[1:]), "|")
    print("|---|---:|" + "---:|" * (len(slopes) - 1), flush=True)
    for name in names:
        if only and name not in only:
            continue
        first, *others = (torch.tensor(measure(name, s, seeds, steps or usual)) for s in slopes)
        row = [f"{first.mean():.3f}"]
        for other in others:
            costs = other - first
            row.append(f"{costs.mean():+.4f} ± {costs.std() / math.sqrt(seeds):.4f}")
        print(f"| {name} |", " | ".join(row), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("part", choices=("digits", *PARTS))
    parser.add_argument("--slopes", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=None, help="20 for digits, else 5")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--only", nargs="+", default=[], help="some of the sets or tables")
    args = parser.parse_args()
    if args.part == "digits":
        digits(args.slopes, args.seeds or 20)
    else:
        compare(args.part, args.slopes, args.seeds or 5, args.steps, args.only)


if __name__ == "__main__":
    main()
