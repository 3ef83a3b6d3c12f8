r"""An nflows image model that explodes, made robust with one call.

A small Glow is written with nflows' own classes, as its users write them: it learns what a
photograph has beyond its bicubic upsampling, given the small photograph. On conditions unlike
those that it was trained on its affine couplings divide by scales close to zero, one after
another, and the samples explode. `flowguard.migrate` makes it robust: the same samples as before
where the model knows its way, bounded ones everywhere else, and that is proved. A guard around its
embedding net tells where a condition is strange.

    pip install "flowguard-nf[nflows,demo]"
    python examples/migrate_nflows_image_model.py           # less than two minutes on two cores
    python examples/migrate_nflows_image_model.py --quick   # a few seconds, to see it run
"""

import argparse
import copy
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ConvResidualNet
from nflows.transforms import (
    ActNorm,
    AffineCouplingTransform,
    CompositeTransform,
    OneByOneConvolution,
    SqueezeTransform,
)
from torch import Tensor

import flowguard
from flowguard.data import (
    CALIBRATION_PHOTOGRAPHS,
    HELD_OUT_PHOTOGRAPH,
    TRAINING_PHOTOGRAPHS,
    PairedCrops,
    downsample,
    photograph,
)

# nflows 0.14 calls functions that torch is about to drop.
warnings.filterwarnings("ignore", message=".*triangular_solve.*")
# What the guard has to say is drawn and printed below.
warnings.filterwarnings("ignore", category=flowguard.OODContextWarning)

SCALE = 4  # of the small photographs; the squeeze has the same factor, so that sizes match
SIZE = 32  # of the crops that are trained on
GAIN = 8.0  # residuals are small numbers


class Setting(NamedTuple):
    r"""How large everything is."""

    layers: int
    hidden: int
    batch: int
    pairs: int
    guarded: int
    window: int


FULL = Setting(layers=10, hidden=32, batch=32, pairs=256, guarded=1024, window=160)
QUICK = Setting(layers=10, hidden=8, batch=8, pairs=64, guarded=128, window=64)


def build(layers: int, hidden: int) -> Flow:
    r"""A Glow of one scale, with a context at each position: nflows' classes and nothing else."""
    channels = 3 * SCALE**2
    steps: list[nn.Module] = [SqueezeTransform(SCALE)]
    for i in range(layers):
        mask = torch.arange(channels) % 2 == i % 2
        steps += [
            ActNorm(channels),
            OneByOneConvolution(channels),
            AffineCouplingTransform(
                mask, lambda a, b: ConvResidualNet(a, b, hidden, context_channels=16, num_blocks=1)
            ),
        ]
    embedding = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)
    )
    base = StandardNormal([channels, SIZE // SCALE, SIZE // SCALE])
    return Flow(CompositeTransform(steps), base, embedding_net=embedding)


def upsample(small: Tensor) -> Tensor:
    return F.interpolate(small, scale_factor=SCALE, mode="bicubic")


def pairs(names: tuple[str, ...], batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Yields what crops of photographs have beyond their upsampling, and the small crops."""
    photographs = [photograph(name) for name in names]
    generator = torch.Generator().manual_seed(seed)
    for large, small in PairedCrops(photographs, scale=SCALE, size=SIZE, batch=batch, seed=seed):
        noise = torch.rand(large.shape, generator=generator)  # 256 levels, dequantised
        yield GAIN * ((255 * large + noise) / 256 - upsample(small)), small


def bits(nats: float) -> float:
    r"""Bits per dimension of 8-bit images, from the negative log-likelihood of a residual."""
    return nats / (3 * SIZE**2 * math.log(2)) + 8 - math.log2(GAIN)


@torch.no_grad()
def bits_per_dim(flow: Flow, x: Tensor, y: Tensor) -> float:
    return bits(-flow.log_prob(x, y).double().mean().item())


def train(flow: Flow, steps: int, batch: int, lr: float = 2e-3, seed: int = 0) -> None:
    r"""Trains a flow, with Adam, on crops that are drawn anew in each step."""
    flow.train()
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, (x, y) in zip(range(steps), pairs(TRAINING_PHOTOGRAPHS, batch, seed), strict=False):
        loss = -flow.log_prob(x, y).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 50.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}   {bits(loss.item()):6.3f} bits/dim", flush=True)
    flow.eval()


@torch.no_grad()
def sample(flow: Flow, y: Tensor, temperature: float = 0.8) -> Tensor:
    r"""Draws a residual for each condition, of any size, always from the same noise."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(len(y), 3 * SCALE**2, *y.shape[-2:], generator=generator)
    context = flow._embedding_net(y)
    return flow._transform.inverse(temperature * z, context=context)[0] / GAIN


def conditions(window: int) -> dict[str, Tensor]:
    r"""One condition that the model should know, and what goes wrong with others in practice."""
    cat = photograph(HELD_OUT_PHOTOGRAPH)[None, :, 20 : 20 + window, 100 : 100 + window]
    small = downsample(cat, SCALE)
    page = downsample(photograph("page.png")[None, :, :window, :window], SCALE)
    n = small.shape[-1]
    hot, raw, missing = small.clone(), small.clone(), small.clone()
    hot[..., n // 4, n // 4], hot[..., 3 * n // 4, n // 2] = 100.0, 1000.0
    raw[..., n // 2 :] *= 255.0
    missing[..., n // 2 : n // 2 + 2, n // 2 : n // 2 + 2] = 9.96921e36
    noise = torch.randn(small.shape, generator=torch.Generator().manual_seed(2))
    return {
        "held-out photograph": small,
        "page of text": page,
        "two hot pixels": hot,
        "half not divided by 255": raw,
        "missing: NetCDF's fill value": missing,
        "noise σ = 100": small + 100 * noise,
    }


class Outcome(NamedTuple):
    r"""What two models make of a condition."""

    condition: Tensor
    stock: Tensor
    robust: Tensor
    pulled: Tensor  # the robust model's, of the embedding pulled back to what it knows
    strange: Tensor  # the calibrated OOD map

    def row(self, name: str) -> str:
        cells = (
            f"{worst(t):>8.3g} {lost(t):>6.1%}" for t in (self.stock, self.robust, self.pulled)
        )
        return f"{name:28s} {'   '.join(cells)}   {(self.strange > 0.999).float().mean():>7.1%}"


def worst(t: Tensor) -> float:
    return t.abs().nan_to_num(math.inf, math.inf).max().item()


def lost(t: Tensor) -> float:
    return 1 - t.isfinite().float().mean().item()


def guard(flow: Flow, count: int) -> None:
    r"""Wraps the embedding net, which tells from now on how strange a condition is."""
    conditioner = flowguard.OODConditioner(flow._embedding_net, policy="report", alpha=0.01)
    for method, names in (
        (conditioner.fit, TRAINING_PHOTOGRAPHS),
        (conditioner.calibrate, CALIBRATION_PHOTOGRAPHS),
    ):
        _, small = next(pairs(names, count, 3))
        method(small, progress=False)
    flow._embedding_net = conditioner.eval()


def compare(stock: Flow, robust: Flow, window: int) -> dict[str, Outcome]:
    outcomes = {}
    conditioner = robust._embedding_net
    for name, y in conditions(window).items():
        with flowguard.monitor(robust) as watch:
            ours = sample(robust, y)
        level = next(iter(watch.report.levels.values()))
        conditioner.policy = "shrink"
        pulled = sample(robust, y)
        conditioner.policy = "report"
        outcomes[name] = Outcome(y, sample(stock, y), ours, pulled, level.quantile)
    heads = (f"{h:>15s}" for h in ("stock", "migrated", "and guarded"))
    print(f"\n{'largest value, share lost':28s} {'   '.join(heads)}   strange")
    for name, outcome in outcomes.items():
        print(outcome.row(name))
    return outcomes


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        5, len(outcomes), figsize=(2.1 * len(outcomes), 10.7), layout="constrained"
    )
    for column, (name, o) in zip(axes.T, outcomes.items(), strict=True):
        base = upsample(o.condition)
        pictures = (base, base + o.stock, base + o.robust, base + o.pulled)
        for axis, picture in zip(column, pictures, strict=False):
            # Where nothing is left of a sample it is black.
            axis.imshow(picture[0].nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).permute(1, 2, 0))
        column[4].imshow(o.strange[0], cmap="inferno", vmin=0.5, vmax=1.0)
        column[0].set_title(name, fontsize=9)
    for axis, label in zip(
        axes[:, 0],
        ("condition", "stock nflows", "migrated", "and guarded", "OOD map"),
        strict=True,
    ):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=70)
    plt.close(figure)
    print(f"wrote {path}")


class Result(NamedTuple):
    r"""What came out."""

    stock_bits: float
    swapped_bits: float
    tuned_bits: float
    report: flowguard.Migration
    outcomes: dict[str, Outcome]


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps, 300 or, with --quick, 30")
    parser.add_argument("--out", type=Path, default=Path("nflows-migration.png"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see it run")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else FULL
    steps = options.steps or (30 if options.quick else 300)
    start = time.perf_counter()
    torch.manual_seed(0)

    stock = build(setting.layers, setting.hidden)
    train(stock, steps, setting.batch)
    held_x, held_y = next(pairs((HELD_OUT_PHOTOGRAPH,), setting.pairs, 4))
    stock_bits = bits_per_dim(stock, held_x, held_y)

    calibration = next(pairs(TRAINING_PHOTOGRAPHS, setting.pairs, 5))
    migrated, report = flowguard.migrate(stock, calibration=calibration)
    print(f"\n{report}\n")
    tuned = copy.deepcopy(migrated)
    train(tuned, max(1, steps // 10), setting.batch, lr=2e-4, seed=6)
    swapped_bits, tuned_bits = (bits_per_dim(f, held_x, held_y) for f in (migrated, tuned))
    print("bits/dim on crops of a held-out photograph")
    print(f"  stock      {stock_bits:.4f}")
    print(f"  migrated   {swapped_bits:.4f}")
    print(f"  fine-tuned {tuned_bits:.4f}")
    moved = (sample(stock, held_y) - sample(migrated, held_y)).abs() / sample(stock, held_y).std()
    print(f"same noise, same samples: they moved by {moved.median():.2g} standard deviations in")
    print(f"the median, 1 in 1000 by more than {moved.flatten()[: 2**24].quantile(0.999):.2g}")

    guard(tuned, setting.guarded)
    outcomes = compare(stock, tuned, setting.window)
    certificate = flowguard.certify(tuned)
    if certificate.certified:
        print(
            f"\ncertified for every condition: |x| <= {certificate.bound(4.0) / GAIN:.4g}", end=""
        )
        print(f" for noise up to 4; growth {certificate.growth:.3g}")
    else:
        print(f"\n{certificate}")
    draw(outcomes, options.out)
    print(f"{time.perf_counter() - start:.0f} s")
    return Result(stock_bits, swapped_bits, tuned_bits, report, outcomes)


if __name__ == "__main__":
    main()
