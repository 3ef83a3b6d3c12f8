r"""What does bounding the shift cost in likelihood, and which squashing function suits it?

Trains the flow of `zuko_toy.py` for each bound of the shift, with the arctangent of
:func:`flowguard.functional.bounded` and with an algebraic sigmoid, and prints held-out negative
log-likelihoods in nats, mean over seeds, with the largest sample for a context a thousand standard
deviations away.

    python benchmarks/shift_bound.py [--steps 600] [--seeds 2]
"""

import argparse
import statistics
from unittest import mock

import torch
import zuko_toy
from torch import Tensor

from flowguard.integrations.zuko import RobustNSF
from flowguard.spline.inplace import bin as plain
from flowguard.spline.inplace.memory import Rows

BOUNDS = (0.5, 1.0, 2.0, 5.0, 20.0, None)


def algebraic(m: Rows, x: Tensor, bound: float | None, out: Tensor) -> None:
    r"""Squashes by :math:`x / \sqrt{1 + (x / \beta)^2}`, whose slope falls with the cube."""
    if bound is None:
        out.copy_(x)
    else:
        y = x.clamp(-1e15, 1e15)
        factor = plain.squash_factor(bound, x.dtype)  # which the spline multiplies by
        torch.mul(y, (1 + (y / bound).square()).rsqrt() / factor, out=out)


def algebraic_pullback(m: Rows, x: Tensor, grad: Tensor, bound: float | None, out: Tensor) -> None:
    if bound is None:
        out.copy_(grad)
    else:
        y = x.clamp(-1e15, 1e15)
        torch.mul(grad, (1 + (y / bound).square()).pow(-1.5), out=out)


SQUASHES = {
    "arctangent": (plain.squash, plain.squash_pullback),
    "algebraic": (algebraic, algebraic_pullback),
}


def measure(name: str, bound: float | None, steps: int, seed: int) -> tuple[float, float]:
    squash, pullback = SQUASHES[name]
    with mock.patch.multiple(plain, squash=squash, squash_pullback=pullback):
        torch.manual_seed(10_000)
        x, c = zuko_toy.moons(20_000)
        torch.manual_seed(seed)
        flow = RobustNSF(2, 2, transforms=4, shift_bound=bound)
        zuko_toy.train(flow, steps)
        with torch.no_grad():
            nll = -flow(c).log_prob(x).mean().item()
            far = flow(torch.full((100, 2), 1e3 / 2**0.5))
            largest = far.transform.inv(far.base.sample((100,))).abs().max().item()
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
