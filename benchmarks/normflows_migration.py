r"""What a migration costs in likelihood, for each kind of flow that normflows' users build.

Trains small flows of normflows' own classes on two moons, away from standard units and, for those
that take a context, turned by it. Migrates them, fine-tunes, and tells the negative log-likelihood
of pairs that none of this has seen, what the certificate says, and what remains of samples for
contexts a thousand times as large.

    python benchmarks/normflows_migration.py --steps 600
"""

import argparse
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import normflows as nf
import torch
import torch.nn as nn
from common import train, turned, two_moons
from torch import Tensor

import flowguard
from flowguard.integrations.normflows import ContextAdapter

warnings.filterwarnings("ignore", message=".*torch.lu is deprecated.*")

CONTEXT = 2


def pairs(n: int, context: bool) -> tuple[Tensor, ...]:
    r"""Draws points away from standard units, and contexts that turn and scale them, if any."""
    points = 3 * two_moons(n, 0.1)
    if not context:
        return (points + 5,)
    c = torch.randn(n, CONTEXT)
    return turned(points, c) + 5, c


def mlp(i: int, o: int) -> nn.Module:
    return nf.nets.MLP([i, 64, 64, o], init_zeros=True)


def blocks(scale_map: str) -> list[Any]:
    layers: list[Any] = []
    for _ in range(8):
        layers += [
            nf.flows.AffineCouplingBlock(mlp(1, 2), scale_map=scale_map),
            nf.flows.Permute(2, mode="swap"),
        ]
    return layers


def masked() -> list[Any]:
    masks = [torch.tensor([i % 2, 1 - i % 2]) for i in range(8)]
    return [nf.flows.MaskedAffineFlow(mask, mlp(2, 2), mlp(2, 2)) for mask in masks]


def autoregressive() -> list[Any]:
    return [nf.flows.MaskedAffineAutoregressive(2, 64, CONTEXT) for _ in range(4)]


def reversed_autoregressive() -> list[Any]:
    return [ContextAdapter(nf.flows.Reverse(f)) for f in autoregressive()]


def splines(cls: Any) -> list[Any]:
    return [cls(2, 1, 32, CONTEXT, tail_bound=12) for _ in range(3)]


FLOWS: dict[str, tuple[bool, Callable[[], list[Any]]]] = {
    "AffineCouplingBlock, exp": (False, lambda: blocks("exp")),
    "AffineCouplingBlock, sigmoid": (False, lambda: blocks("sigmoid")),
    "MaskedAffineFlow": (False, masked),
    "MaskedAffineAutoregressive": (True, autoregressive),
    "the same, turned": (True, reversed_autoregressive),
    "CoupledRationalQuadraticSpline": (
        True,
        lambda: splines(nf.flows.CoupledRationalQuadraticSpline),
    ),
    "AutoregressiveRationalQ.Spline": (
        True,
        lambda: splines(nf.flows.AutoregressiveRationalQuadraticSpline),
    ),
}


@torch.no_grad()
def nll(flow: Any, unseen: tuple[Tensor, ...]) -> float:
    return -flow.log_prob(*unseen).mean().item()


@torch.no_grad()
def far(flow: Any, context: bool) -> str:
    r"""The largest value of samples, for contexts, or else for noise, far away."""
    torch.manual_seed(1)
    z = torch.randn(4096, 2)
    try:
        x = (
            flow.forward(z, context=1e3 * torch.randn(4096, CONTEXT))
            if context
            else flow.forward(10 * z)
        )
    except (AssertionError, RuntimeError) as error:
        return type(error).__name__
    return f"{x.abs().nan_to_num(math.inf).max():.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps, default: 600")
    options = parser.parse_args()
    head = ("NLL", "swapped", "tuned", "difference", "certified", "far", "far after")
    print(f"{'':32s}" + "".join(f"{cell:>11s}" for cell in head))
    for name, (context, make) in FLOWS.items():
        torch.manual_seed(0)
        base = nf.distributions.DiagGaussian(2)
        wrap = nf.ConditionalNormalizingFlow if context else nf.NormalizingFlow
        flow = wrap(base, make())
        draw = partial(pairs, context=context)
        train(flow, flow.forward_kld, options.steps, draw=draw, batch=256, lr=3e-3, clip=10.0)
        unseen, calibration = draw(16384), draw(8192)
        swapped, _ = flowguard.migrate(flow, *calibration)
        tuned, report = flowguard.migrate(flow, *calibration, steps=200)
        before, after = nll(flow, unseen), nll(tuned, unseen)
        certificate = report.certificate_after
        certified = (
            f"{certificate.bound(5.0):.3g}" if certificate and certificate.certified else "no"
        )
        numbers = (before, nll(swapped, unseen), after, after - before)
        cells = "".join(f"{number:11.4f}" for number in numbers)
        print(
            f"{name:32s}{cells}{certified:>11s}{far(flow, context):>11s}{far(tuned, context):>11s}",
            flush=True,
        )


if __name__ == "__main__":
    main()
