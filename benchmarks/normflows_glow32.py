r"""A Glow of 32 blocks on 3×32×32 crops: stock normflows against flowguard.

Measures, for normflows' Glow with ``scale_map="exp"`` and ``"sigmoid"`` and for flowguard's, each
trained for the same number of steps on the same crops: bits/dim on crops of a held-out photograph,
and the share of samples that are not finite, at temperatures 1 to 1.5, for conditions that the
models know and for others that they do not. The stock ones are also migrated, without any
training.

normflows' Glow takes no context. The stock one gets it as its users do it: the networks of the
couplings see the embedded condition beside their input, as in `examples`; and the same condition
enters flowguard's blocks.

    python benchmarks/normflows_glow32.py --steps 200
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from normflows_conditional_glow import (
    GAIN,
    RobustGlow,
    StockGlow,
    held_out_bits,
    pairs,
    train,
)

import flowguard
from flowguard.data import HELD_OUT_PHOTOGRAPH, TRAINING_PHOTOGRAPHS

LEVELS, BLOCKS = 2, 16  # 32 blocks in all
TEMPERATURES = (1.0, 1.25, 1.5)
FAR = 10.0  # a residual of an image in [0, 1] that is no image any more


def conditions(n: int) -> dict[str, Tensor]:
    r"""Conditions that the models know, and others that they do not."""
    _, y = next(pairs((HELD_OUT_PHOTOGRAPH,), n, 4))
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return {
        "held-out crops": y,
        "20 times brighter": 20 * y,
        "noise σ = 1": y + noise,
        "noise σ = 10": y + 10 * noise,
        "noise σ = 100": y + 100 * noise,
        "noise σ = 10⁴": y + 1e4 * noise,
    }


@torch.no_grad()
def cell(model: Any, y: Tensor, temperature: float) -> tuple[float, float, float]:
    r"""The share of samples with a value that is not finite, that of those with a value beyond
    `FAR`, and the largest finite value."""
    torch.manual_seed(1)
    x = model.draw(y, temperature).flatten(1) / GAIN
    lost = (~x.isfinite()).any(dim=1)
    far = lost | (x.abs() > FAR).any(dim=1)
    largest = x[x.isfinite()].abs().max().item() if x.isfinite().any() else math.nan
    return lost.float().mean().item(), far.float().mean().item(), largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps, default: 200")
    parser.add_argument("--hidden", type=int, default=16, help="hidden channels, default: 16")
    parser.add_argument("--batch", type=int, default=16, help="batch size, default: 16")
    parser.add_argument("--samples", type=int, default=64, help="of each condition, default: 64")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, default: 0")
    options = parser.parse_args()
    models: dict[str, Any] = {}
    makers = {
        "stock exp": lambda: StockGlow(LEVELS, BLOCKS, options.hidden, "exp"),
        "stock sigmoid": lambda: StockGlow(LEVELS, BLOCKS, options.hidden, "sigmoid"),
        "robust": lambda: RobustGlow(LEVELS, BLOCKS, options.hidden),
    }
    for name, make in makers.items():
        torch.manual_seed(options.seed)
        models[name] = make()
        train(name, models[name], options.steps, options.batch)
    for scale_map in ("exp", "sigmoid"):
        calibration = next(pairs(TRAINING_PHOTOGRAPHS, 256, 5))
        migrated, report = flowguard.migrate(models[f"stock {scale_map}"], calibration=calibration)
        models[f"migrated {scale_map}"] = migrated
        print(f"migrated {scale_map}: {len(report.replaced)} layers, {report.sample_error}")

    print("\nbits/dim on crops of a held-out photograph, and the certificate for noise up to 5")
    for name, model in models.items():
        c = flowguard.certify(model)
        told = f"|x| <= {c.bound(5.0) / GAIN:.3g}" if c.certified else "not certified"
        print(f"  {name:18s} {held_out_bits(model, 256):.4f}   {told}")
    print(f"\nshare of samples that are not finite | beyond {FAR:g} | largest finite value")
    print(f"{'condition':18s} {'temp.':>5s}" + "".join(f"{name:>26s}" for name in models))
    for name, y in conditions(options.samples).items():
        for temperature in TEMPERATURES:
            found = (cell(model, y, temperature) for model in models.values())
            cells = "".join(f"{a:>9.1%} {b:>7.1%} {c:>8.2g}" for a, b, c in found)
            print(f"{name:18s} {temperature:5.2f}{cells}", flush=True)


if __name__ == "__main__":
    main()
