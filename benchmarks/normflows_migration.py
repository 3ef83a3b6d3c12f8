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
from typing import Any

import normflows as nf
import torch
import torch.nn as nn
from torch import Tensor

import flowguard
from flowguard.integrations.normflows import ContextAdapter

warnings.filterwarnings("ignore", message=".*torch.lu is deprecated.*")

CONTEXT = 2


def moons(n: int, context: bool) -> tuple[Tensor, ...]:
    t = math.pi * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, t.cos(), 1 - t.cos()) - 0.5
    y = torch.where(upper, t.sin(), 0.5 - t.sin()) - 0.25
    points = 3 * torch.stack((x, y), -1) + 0.3 * torch.randn(n, 2)
    if not context:
        return (points + 5,)
    c = torch.randn(n, CONTEXT)
    cos, sin = c[:, 0].cos(), c[:, 0].sin()
    turned = torch.stack(
        (cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]), -1
    )
    return torch.exp(0.3 * c[:, 1:]) * turned + 5, c


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


def turned() -> list[Any]:
    return [ContextAdapter(nf.flows.Reverse(f)) for f in autoregressive()]


def splines(cls: Any) -> list[Any]:
    return [cls(2, 1, 32, CONTEXT, tail_bound=12) for _ in range(3)]


FLOWS: dict[str, tuple[bool, Callable[[], list[Any]]]] = {
    "AffineCouplingBlock, exp": (False, lambda: blocks("exp")),
    "AffineCouplingBlock, sigmoid": (False, lambda: blocks("sigmoid")),
    "MaskedAffineFlow": (False, masked),
    "MaskedAffineAutoregressive": (True, autoregressive),
    "the same, turned": (True, turned),
    "CoupledRationalQuadraticSpline": (
        True,
        lambda: splines(nf.flows.CoupledRationalQuadraticSpline),
    ),
    "AutoregressiveRationalQ.Spline": (
        True,
        lambda: splines(nf.flows.AutoregressiveRationalQuadraticSpline),
    ),
}


def train(flow: Any, context: bool, steps: int) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        flow.forward_kld(*moons(256, context)).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def nll(flow: Any, pairs: tuple[Tensor, ...]) -> float:
    return -flow.log_prob(*pairs).mean().item()


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
        train(flow, context, options.steps)
        unseen, calibration = moons(16384, context), moons(8192, context)
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
