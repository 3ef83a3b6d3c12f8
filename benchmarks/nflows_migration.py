r"""What migration makes of nflows' flows, on two moons, turned and scaled by the context.

For each flow, trained: the negative log-likelihood on held-out pairs before, with the new layers,
and after fine-tuning for a tenth of the steps; how far samples moved for the same noise and
contexts; and, for contexts away from the training contexts, the largest sample and the share of
samples that are not finite, before and after, beside the certificate.

    python benchmarks/nflows_migration.py                              # some minutes on one core
    python benchmarks/nflows_migration.py --host glasflow.nflows --steps 300 --flows MAF
    python benchmarks/nflows_migration.py --speed                      # new layers beside old ones

With `--speed` it times instead a layer before and after its migration, by turns, in processor time:
from data to noise, back, and a training step; those of normflows and zuko too.
"""

import argparse
import copy
import importlib
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from common import by_turns, moons, train
from torch import Tensor

from flowguard.bounds import certify
from flowguard.migration import migrate

DISTANCES = (1.0, 10.0, 100.0, 1e4, 1e30)  # in standard deviations of the contexts


def build(host: str, kind: str) -> nn.Module:
    r"""Builds a flow of eight affine layers, or of four with splines."""
    T: Any = importlib.import_module(f"{host}.transforms")
    nets = importlib.import_module(f"{host}.nn.nets")
    layers: list[nn.Module] = [T.ActNorm(2)]

    def net(inputs: int, outputs: int) -> nn.Module:
        return nets.ResidualNet(inputs, outputs, 64, context_features=2)

    for i in range(4 if kind == "NSF" else 8):
        mask = [i % 2, 1 - i % 2]
        if kind == "RealNVP":
            layers.append(T.AffineCouplingTransform(mask, net))
        elif kind == "MAF":
            layers.append(T.MaskedAffineAutoregressiveTransform(2, 64, context_features=2))
            layers.append(T.ReversePermutation(2))
        else:
            spline = T.PiecewiseRationalQuadraticCouplingTransform
            layers.append(spline(mask, net, num_bins=8, tails="linear", tail_bound=5.0))
    base = importlib.import_module(f"{host}.distributions").StandardNormal([2])
    return importlib.import_module(f"{host}.flows").Flow(T.CompositeTransform(layers), base)


def loss_of(flow: Any) -> Callable[[Tensor, Tensor], Tensor]:
    r"""Returns the loss of a flow, given points and contexts."""
    return lambda x, c: -flow.log_prob(x, c).mean()


@torch.no_grad()
def nll(flow: Any, x: Tensor, c: Tensor) -> float:
    return -flow.log_prob(x, c).mean().item()


@torch.no_grad()
def decode(flow: Any, z: Tensor, c: Tensor) -> Tensor:
    try:
        return flow._transform.inverse(z, c)[0]
    except AssertionError:  # nflows' splines, of a negative discriminant
        return torch.full_like(z, torch.nan)


def far(flow: Any, n: int = 20_000) -> str:
    r"""The largest sample, and the share lost, for contexts at each distance."""
    generator = torch.Generator().manual_seed(1)
    z, c = torch.randn(2, n, 2, generator=generator)
    cells = []
    for distance in DISTANCES:
        x = decode(flow, z, distance * c)
        finite = x.isfinite()
        largest = x[finite].abs().max().item() if finite.any() else math.nan
        cells.append(f"{largest:8.2g} {1 - finite.double().mean().item():5.1%}")
    return " ".join(cells)


def report(host: str, kind: str, steps: int) -> None:
    torch.manual_seed(0)
    flow: Any = build(host, kind)
    train(flow, loss_of(flow), steps)
    migrated, told = migrate(flow, calibration=moons(8192))
    tuned = copy.deepcopy(migrated)
    train(tuned, loss_of(tuned), max(1, steps // 10), lr=5e-4)
    x, c = moons(20_000)
    z = torch.randn(20_000, 2)
    moved = (decode(flow, z, c) - decode(migrated, z, c)).abs() / x.std(0)
    q50, q99, q999 = moved.flatten().quantile(torch.tensor([0.5, 0.99, 0.999])).tolist()
    print(f"{host} {kind}: error of the worst layer {max(r.error for r in told.replaced):.2g}")
    print(
        f"  NLL {nll(flow, x, c):.4f}, migrated {nll(migrated, x, c):.4f},"
        f" fine-tuned {nll(tuned, x, c):.4f}; samples moved by {q50:.2g} in the median,"
        f" {q99:.2g} at 99 %, {q999:.2g} at 99.9 %"
    )
    print(f"  contexts at {'':5s}{''.join(f'{d:<15g}' for d in DISTANCES)}")
    print(f"  stock       {far(flow)}")
    certificate = certify(tuned)
    bound = certificate.bound(5.0) if certificate.certified else math.inf
    print(f"  migrated    {far(tuned)}   (certified for |z| <= 5: {bound:.3g})", flush=True)


def stock_layers(features: int) -> dict[str, nn.Module]:
    r"""Flows of one affine layer, a coupling or an autoregressive one, of each library."""
    import normflows
    import zuko

    N, Z = normflows.flows, zuko.flows
    T: Any = importlib.import_module("nflows.transforms")
    nets = importlib.import_module("nflows.nn.nets")
    base = importlib.import_module("nflows.distributions").StandardNormal([features])
    flow: Any = importlib.import_module("nflows.flows").Flow

    def net(inputs: int, outputs: int) -> nn.Module:
        return nets.ResidualNet(inputs, outputs, 64, context_features=2)

    half = features // 2
    mlp = normflows.nets.MLP([half, 64, 64, 2 * half], init_zeros=False)
    noise = normflows.distributions.DiagGaussian(features)
    return {
        "nflows coupling": flow(T.AffineCouplingTransform([1, 0] * half, net), base),
        "nflows autoregressive": flow(
            T.MaskedAffineAutoregressiveTransform(features, 64, context_features=2), base
        ),
        "normflows coupling": normflows.NormalizingFlow(noise, [N.AffineCouplingBlock(mlp)]),
        "normflows autoregressive": normflows.NormalizingFlow(
            noise, [N.MaskedAffineAutoregressive(features, 64)]
        ),
        "zuko coupling": Z.NICE(features, 2, transforms=1),
        "zuko autoregressive": Z.MAF(features, 2, transforms=1),
    }


def density(flow: Any, x: Tensor, c: Tensor) -> Tensor:
    r"""The log-density, in the terms of the flow's library."""
    library = type(flow).__module__.partition(".")[0]
    if library == "normflows":
        return flow.log_prob(x)
    return flow(c).log_prob(x) if library == "zuko" else flow.log_prob(x, c)


def samples(flow: Any, z: Tensor, c: Tensor) -> Tensor:
    r"""What a flow makes of noise."""
    library = type(flow).__module__.partition(".")[0]
    if library == "normflows":
        return flow.forward(z)
    return flow(c).transform.inv(z) if library == "zuko" else flow._transform.inverse(z, c)[0]


def speed(rows: int, features: int, turns: int, only: str) -> None:
    r"""Prints how many times as long a migrated layer takes as the old one."""
    kinds = ("density", "sampling", "step")
    print(f"{rows} rows, {features} features, {torch.get_num_threads()} thread; new over old:")
    for name, old in stock_layers(features).items():
        if only not in name:
            continue
        torch.manual_seed(0)
        x, c, z = torch.randn(rows, features), torch.randn(rows, 2), torch.randn(rows, features)
        calibration = x if name.startswith("normflows") else (x, c)
        new, _ = migrate(copy.deepcopy(old), calibration=calibration)

        def run(flow: Any, kind: str, x: Tensor = x, c: Tensor = c, z: Tensor = z) -> None:
            with torch.set_grad_enabled(kind == "step"):
                out = samples(flow, z, c) if kind == "sampling" else density(flow, x, c)
            if kind == "step":
                out.mean().backward()

        runs = {
            (kind, which): partial(run, flow, kind)
            for kind in kinds
            for which, flow in (("old", old), ("new", new))
        }
        t = by_turns(runs, turns, warm=2, clock=time.process_time)
        cells = []
        for kind in kinds:
            pairs = zip(t[kind, "new"], t[kind, "old"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            cells.append(f"{kind} {ratio:.2f} ({statistics.median(t[kind, 'old']) * 1e3:.2f} ms)")
        print(f"  {name:25s} {', '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="nflows", choices=["nflows", "glasflow.nflows"])
    parser.add_argument("--flows", nargs="+", default=["RealNVP", "MAF", "NSF"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--speed", action="store_true", help="time layers instead")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", default="", help="times those whose name has this in it")
    options = parser.parse_args()
    if options.speed:
        torch.set_num_threads(1)
        speed(options.rows, options.features, options.turns, options.only)
        return
    warnings.filterwarnings("ignore", message=".*triangular_solve.*")
    for kind in options.flows:
        report(options.host, kind, options.steps)


if __name__ == "__main__":
    main()
