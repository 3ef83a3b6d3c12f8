r"""The speed of the robust coupling beside nflows' own rational-quadratic coupling.

    OMP_NUM_THREADS=1 python benchmarks/nflows_coupling.py

Both have the same small convolution as network, whose time counts for both. The two take turns in
one process, and what counts is the median of the ratios of the rounds, so that other load on the
machine hits both.
"""

import argparse
from collections.abc import Callable
from statistics import median

import nflows.transforms
import torch
import torch.nn as nn
from common import by_turns
from torch import Tensor

from flowguard.integrations.nflows import RobustSplineCouplingTransform


class SmallNet(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.hidden_channels = 16
        self.first = nn.Conv2d(inputs, 16, 1)
        self.final_layer = nn.Conv2d(16, outputs, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.final_layer(self.first(x).relu())


def couplings(channels: int, bins: int) -> dict[str, nn.Module]:
    mask = torch.arange(channels) % 2
    ours = RobustSplineCouplingTransform(mask, SmallNet, num_bins=bins)
    nn.init.normal_(ours.transform_net.final_layer.weight, std=0.2)
    return {
        "robust": ours,
        "nflows": nflows.transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask, SmallNet, num_bins=bins, tails="linear", tail_bound=3.0
        ),
    }


def both_ways(layer: nn.Module, x: Tensor) -> None:
    z, _ = layer(x)
    layer.inverse(z)


def trained(layer: nn.Module, x: Tensor) -> None:
    z, ladj = layer(x)
    (z.square().mean() - ladj.mean()).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="compile ours, with fullgraph=True")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = 2 * torch.randn(4, 24, 40, 40)
    layers = couplings(24, args.bins)
    forward, inverse = layers["robust"].forward, layers["robust"].inverse
    if args.compile:
        forward = torch.compile(forward, fullgraph=True)
        inverse = torch.compile(inverse, fullgraph=True)

    def ours() -> None:
        z, _ = forward(x)
        inverse(z)

    tasks: dict[str, dict[str, Callable[[], None]]] = {
        "forward + inverse": {"robust": ours, "nflows": lambda: both_ways(layers["nflows"], x)},
    }
    if not args.compile:
        tasks["forward + backward"] = {
            "robust": lambda: trained(layers["robust"], x),
            "nflows": lambda: trained(layers["nflows"], x),
        }
    for task, runs in tasks.items():
        with torch.set_grad_enabled(task == "forward + backward"):
            times = by_turns(runs, args.rounds, warm=3)
        a, b = (1e3 * median(t) for t in times.values())
        ratio = median(n / r for r, n in zip(*times.values(), strict=True))
        print(f"{task}: robust {a:.1f} ms, nflows {b:.1f} ms, nflows / robust {ratio:.2f}")


if __name__ == "__main__":
    main()
