r"""What does bounding the shift cost in likelihood, and which squashing function suits it?

Trains the flow of `zuko_toy.py` for each bound of the shift, with the arctangent of
:func:`flowguard.functional.bounded` and with an algebraic sigmoid, and prints held-out negative
log-likelihoods in nats, mean over seeds, with the largest sample for a context a thousand standard
deviations away.

    python benchmarks/shift_bound.py [--steps 600] [--seeds 2]
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import zuko
import zuko_toy
from torch import Tensor

from flowguard import RobustSpline
from flowguard.functional import bounded

BOUNDS = (0.5, 1.0, 2.0, 5.0, 20.0, None)
Squash = Callable[[Tensor, float], Tensor]


def algebraic(x: Tensor, bound: float) -> Tensor:
    r"""Squashes by :math:`x / \sqrt{1 + (x / \beta)^2}`, whose slope falls with the cube."""
    y = x.clamp(-1e15, 1e15)
    return y * (1 + (y / bound).square()).rsqrt()


SQUASHES: dict[str, Squash] = {"arctangent": bounded, "algebraic": algebraic}


class Squashed:
    r"""Makes splines whose shift is squashed before they get it, which then leave it as it is."""

    def __init__(self, squash: Squash, bound: float | None) -> None:
        self.squash = squash
        self.bound = bound
        self.made = 0
        self.largest = 0.0

    def __call__(self, *params: Tensor) -> RobustSpline:
        *knots, shift = params
        if self.bound is not None:
            shift = self.squash(shift, self.bound)
        self.made += 1
        self.largest = max(self.largest, shift.detach().abs().max().item())
        return RobustSpline(*knots, shift, shift_bound=None, slope=1e-3)


def measure(name: str, bound: float | None, steps: int, seed: int) -> tuple[float, float]:
    torch.manual_seed(10_000)
    x, c = zuko_toy.moons(20_000)
    torch.manual_seed(seed)
    univariate = Squashed(SQUASHES[name], bound)
    shapes = RobustSpline.shapes(8)
    flow = zuko.flows.MAF(2, 2, transforms=4, univariate=univariate, shapes=shapes)
    zuko_toy.train(flow, steps)
    if univariate.made < 4 * steps:
        raise RuntimeError(f"every step must squash four shifts; got {univariate.made} in all")
    with torch.no_grad():
        nll = -flow(c).log_prob(x).mean().item()
        far = flow(torch.full((100, 2), 1e3 / 2**0.5))
        largest = far.transform.inv(far.base.sample((100,))).abs().max().item()
    if bound is not None and not univariate.largest <= bound * (1 + 1e-6):
        raise RuntimeError(f"shifts must be within {bound}; got {univariate.largest}")
    return nll, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    print("| shift bound | squashing | NLL | of each seed | largest far away |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for bound in BOUNDS:
        for name in SQUASHES:
            if bound is None and name == "algebraic":
                continue
            runs = [measure(name, bound, args.steps, seed) for seed in range(args.seeds)]
            nlls, largest = zip(*runs, strict=True)
            print(
                f"| {'free' if bound is None else f'{bound:g}'}"
                f" | {'none' if bound is None else name} | {statistics.mean(nlls):.3f}"
                f" | {', '.join(f'{v:.3f}' for v in nlls)} | {max(largest):.3g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
