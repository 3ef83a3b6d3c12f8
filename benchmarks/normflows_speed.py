r"""Times the robust layers of the normflows adapter beside the stock layers that they replace.

The coupling is run forward and inverse, with and without a backward pass; the Glow block likewise,
each direction by itself. Layers take turns in one process; a ratio is the median of those of each
turn, so that a busy machine slows both.

    python benchmarks/normflows_speed.py
    python benchmarks/normflows_speed.py --device cuda --repeats 50
"""

import argparse
import statistics
import time
from collections.abc import Callable

import normflows
import torch
import torch.nn as nn
from torch import Tensor

from flowguard.integrations.normflows import RobustGlowBlock, RobustSplineCoupling

Layers = dict[str, nn.Module]


def loss(out: tuple[Tensor, Tensor]) -> Tensor:
    return out[0].square().sum() - out[1].sum()


def both_ways(layer: nn.Module, x: Tensor, backward: bool) -> None:
    z, log_det = layer.inverse(x)
    total = loss((z, log_det)) + loss(layer(z.detach()))
    if backward:
        total.backward()


def one_way(name: str) -> Callable[[nn.Module, Tensor, bool], None]:
    def run(layer: nn.Module, x: Tensor, backward: bool) -> None:
        total = loss(getattr(layer, name)(x))
        if backward:
            total.backward()

    return run


def ratios(
    layers: Layers, run: Callable[[nn.Module, Tensor, bool], None], x: Tensor, repeats: int
) -> dict[str, tuple[list[float], list[float]]]:
    r"""The times of the stock layer, the first, over those of the others, and those times, without
    and with a backward pass."""
    table = {}
    for backward in (False, True):
        turns = []
        with torch.set_grad_enabled(backward):
            for turn in range(repeats + 3):
                times = []
                for layer in layers.values():
                    if x.is_cuda:
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    run(layer, x.clone().requires_grad_(backward), backward)
                    if x.is_cuda:
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                if turn >= 3:  # the first turns warm up
                    turns.append(times)
        columns = list(zip(*turns, strict=True))
        table["with backward" if backward else "no gradients"] = (
            [
                statistics.median(t / o for t, o in zip(columns[0], c, strict=True))
                for c in columns
            ],
            [statistics.median(c) * 1e3 for c in columns],
        )
    return table


def report(title: str, layers: Layers, table: dict[str, tuple[list[float], list[float]]]) -> None:
    print(title)
    for how, (ratio, times) in table.items():
        parts = [
            f"{name} {t:.2f} ms" + (f" ({r:.2f}×)" if i else "")
            for i, (name, r, t) in enumerate(zip(layers, ratio, times, strict=True))
        ]
        print(f"  {how}: {', '.join(parts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", choices=("all", "coupling", "glow"), default="all")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(
        f"{args.device}, {torch.get_num_threads()} thread, torch {torch.__version__};"
        " in brackets, how many times faster than stock"
    )
    sizes = [(1024, 32), (4096, 8), (16384, 8), (4096, 32)] if args.part != "glow" else []
    for points, features in sizes:
        shape = (features, 2, 64)
        layers: Layers = {
            "stock": normflows.flows.CoupledRationalQuadraticSpline(*shape),
            "robust": RobustSplineCoupling(*shape, init_identity=False),
            "robust, all transformed": RobustSplineCoupling(
                *shape, init_identity=False, apply_unconditional_transform=True
            ),
        }
        layers = {name: layer.to(args.device) for name, layer in layers.items()}
        x = torch.randn(points, features, device=args.device)
        title = f"coupling, {points} points of {features} features, forward and inverse"
        report(title, layers, ratios(layers, both_ways, x, args.repeats))
    for hidden in (64, 256) if args.part != "coupling" else ():
        layers = {
            "stock": normflows.flows.GlowBlock(12, hidden),
            "robust": RobustGlowBlock(12, hidden),
        }
        layers = {name: layer.to(args.device) for name, layer in layers.items()}
        x = torch.randn(16, 12, 16, 16, device=args.device)
        for direction in ("inverse", "forward"):
            title = f"Glow block, 16×12×16×16, hidden {hidden}, {direction}"
            report(title, layers, ratios(layers, one_way(direction), x, args.repeats))


if __name__ == "__main__":
    main()
