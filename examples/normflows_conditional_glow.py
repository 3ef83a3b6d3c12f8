r"""An image-conditional Glow in normflows: stock against robust, on real photographs.

normflows' Glow takes no context, so that its users hand the condition to the networks of the
couplings by themselves, as here. Given a small photograph, it learns what the large one has
beyond its upsampling. On conditions unlike those that it was trained on, its couplings divide by
scales close to zero, one after another, and the samples explode (normflows#47, #67, #73).

The same Glow is then written with flowguard's layers, which take a context, and trained for as
many steps; and the stock one is made robust by a single call, without any training. Both are
certified: no condition whatever can make their samples exceed a number that is known beforehand.

    pip install "flowguard-nf[normflows,demo]"
    python examples/normflows_conditional_glow.py           # less than three minutes on two cores
    python examples/normflows_conditional_glow.py --quick   # a few seconds, to see it run
"""

import argparse
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import normflows as nf
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import flowguard
from flowguard.bounds import Step, rule, within
from flowguard.data import (
    CALIBRATION_PHOTOGRAPHS,
    HELD_OUT_PHOTOGRAPH,
    TRAINING_PHOTOGRAPHS,
    PairedCrops,
    downsample,
    photograph,
)
from flowguard.integrations.normflows import (
    ConditionalMultiscaleFlow,
    GaussianPrior,
    GuardedConditionalFlow,
    RobustGlowBlock,
)

# normflows 1.7 calls functions that torch is about to drop.
warnings.filterwarnings("ignore", message=".*torch.lu is deprecated.*")

SCALE = 4  # of the small photographs
SIZE = 32  # of the crops
GAIN = 8.0  # residuals are small numbers
FEATURES = 16  # of the embedded condition
TEMPERATURE = 1.0


class Setting(NamedTuple):
    r"""How large everything is."""

    blocks: int
    hidden: int
    batch: int
    pairs: int
    tiles: int


FULL = Setting(blocks=4, hidden=32, batch=32, pairs=256, tiles=3)
QUICK = Setting(blocks=4, hidden=8, batch=8, pairs=64, tiles=1)


def encoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, FEATURES, 3, padding=1)
    )


def shapes(levels: int) -> list[tuple[int, int]]:
    r"""The channels of the blocks and of the latent of each level, the coarsest first."""
    return [
        (3 * 2 ** (levels + 1 - i), 3 * 2 ** (levels + (1 if i == 0 else -i)))
        for i in range(levels)
    ]


class Told(nn.Module):
    r"""What the networks of a stock Glow are told beside their input."""

    features: Tensor | None = None

    @contextmanager
    def listen_to(self, features: Tensor) -> Iterator[None]:
        self.features = features
        try:
            yield
        finally:
            self.features = None


class Conditioned(nn.Module):
    r"""The network of a coupling, which sees the condition beside its input."""

    def __init__(self, net: nn.Module, told: Told) -> None:
        super().__init__()
        self.net, self.told = net, told

    def forward(self, z: Tensor) -> Tensor:
        features = F.interpolate(self.told.features, z.shape[2:], mode="nearest")
        return self.net(torch.cat((z, features), dim=1))


class StockGlow(nn.Module):
    r"""A Glow of normflows' own classes, with the condition handed to its networks."""

    def __init__(self, levels: int, blocks: int, hidden: int, scale_map: str = "sigmoid") -> None:
        super().__init__()
        self.encoder, self.told = encoder(), Told()
        bases, layers = [], []
        for i, (channels, latent) in enumerate(shapes(levels)):
            size = SIZE // 2 ** (levels - i)
            bases.append(nf.distributions.GlowBase((latent, size, size)))
            level: list[nn.Module] = []
            for _ in range(blocks):
                block = nf.flows.GlowBlock(channels, hidden, scale_map=scale_map)
                net = nf.nets.ConvNet2d(
                    (channels // 2 + FEATURES, hidden, hidden, channels), (3, 1, 3)
                )
                coupling = nf.flows.AffineCouplingBlock(
                    Conditioned(net, self.told), True, scale_map
                )
                block.flows[0] = coupling
                level.append(block)
            layers.append([*level, nf.flows.Squeeze()])
        merges = [nf.flows.Merge() for _ in range(levels - 1)]
        self.flow = nf.MultiscaleFlow(bases, layers, merges, class_cond=False)

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        with self.told.listen_to(self.encoder(y)):
            return self.flow.log_prob(x, None)

    def draw(self, y: Tensor, temperature: float) -> Tensor:
        with self.told.listen_to(self.encoder(y)):
            return self.flow.sample(len(y), temperature=temperature)[0]


@rule(StockGlow)
def bound_of_stock_glow(model: Any, sampling: bool) -> Iterator[Step]:
    r"""Tells the certificate that a sample of the model is one of the flow within."""
    yield from within("flow", model.flow, sampling)


class RobustGlow(GuardedConditionalFlow):
    r"""The same Glow of flowguard's layers, behind a guard that scores the condition."""

    def __init__(self, levels: int, blocks: int, hidden: int) -> None:
        bases, layers = [], []
        for channels, latent in shapes(levels):
            bases.append(GaussianPrior(latent))
            level = [RobustGlowBlock(channels, hidden, FEATURES) for _ in range(blocks)]
            layers.append([*level, nf.flows.Squeeze()])
        merges = [nf.flows.Merge() for _ in range(levels - 1)]
        flow = ConditionalMultiscaleFlow(bases, layers, merges)
        super().__init__(flow, flowguard.OODConditioner(encoder(), policy="report"))

    def draw(self, y: Tensor, temperature: float) -> Tensor:
        embedded = self.conditioner(y)
        sizes = (SCALE * y.shape[-2], SCALE * y.shape[-1])
        return self.flow.sample(len(y), embedded, temperature, size=sizes)[0]


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


def train(name: str, model: Any, steps: int, batch: int, lr: float = 1e-3) -> None:
    r"""Trains a model, with Adam, on crops that are drawn anew in each step."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, (x, y) in zip(range(steps), pairs(TRAINING_PHOTOGRAPHS, batch, 0), strict=False):
        loss = -model.log_prob(x, y).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{name}: step {step:4d}   {bits(loss.item()):6.3f} bits/dim", flush=True)
    model.eval()


@torch.no_grad()
def held_out_bits(model: Any, n: int) -> float:
    x, y = next(pairs((HELD_OUT_PHOTOGRAPH,), n, 4))
    return bits(-model.log_prob(x, y).double().mean().item())


def conditions(tiles: int) -> dict[str, Tensor]:
    r"""One condition that the model should know, and others that it cannot know."""
    window = tiles * SIZE
    large = photograph(HELD_OUT_PHOTOGRAPH)[None, :, 20 : 20 + window, 150 : 150 + window]
    small = downsample(large, SCALE)
    noise = torch.randn(small.shape, generator=torch.Generator().manual_seed(2))
    page = photograph("page.png")[None, :, :window, :window]
    patch = small.clone()
    third = small.shape[-1] // 3
    patch[..., third : 2 * third, third : 2 * third] *= 20
    return {
        "held-out photograph": small,
        "page of text": downsample(page, SCALE),
        "noise σ = 1": small + noise,
        "a patch 20 times brighter": patch,
        "20 times brighter": 20 * small,
        "noise σ = 100": small + 100 * noise,
        "noise σ = 10⁴": small + 1e4 * noise,
    }


def cut(image: Tensor, size: int) -> Tensor:
    r"""Cuts an image into tiles, which a flow of normflows has to be given one by one."""
    return torch.cat([row for part in image.split(size, dim=2) for row in part.split(size, dim=3)])


def join(parts: Tensor, tiles: int) -> Tensor:
    rows = [torch.cat(list(row), dim=-1) for row in parts.split(tiles)]
    return torch.cat(rows, dim=-2)


class Outcome(NamedTuple):
    r"""What the models make of a condition, and how strange it is at each pixel."""

    condition: Tensor
    samples: dict[str, Tensor]
    strange: Tensor


@torch.no_grad()
def compare(models: dict[str, Any], tiles: int, temperature: float) -> dict[str, Outcome]:
    outcomes = {}
    for name, y in conditions(tiles).items():
        samples = {}
        for kind, model in models.items():
            torch.manual_seed(1)
            samples[kind] = join(model.draw(cut(y, SIZE // SCALE), temperature), tiles) / GAIN
        guard = models["robust"].conditioner
        guard(y)
        (level,) = guard.report.levels.values()
        outcomes[name] = Outcome(y, samples, level.quantile)
    print("\nlargest value and share of values that are not finite")
    print(" " * 26 + "".join(f"{kind:>22s}" for kind in models) + "    strange")
    for name, outcome in outcomes.items():
        cells = "".join(f"{worst(t):>13.3g} {lost(t):>8.1%}" for t in outcome.samples.values())
        print(f"{name:26s}{cells}   {(outcome.strange > 0.999).float().mean():>8.1%}")
    return outcomes


def worst(t: Tensor) -> float:
    return t.abs().nan_to_num(math.inf, math.inf).max().item()


def lost(t: Tensor) -> float:
    return 1 - t.isfinite().float().mean().item()


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in outcomes if name not in ("noise σ = 100", "noise σ = 10⁴")]
    kinds = list(outcomes[shown[0]].samples)
    figure, axes = plt.subplots(
        2 + len(kinds), len(shown), figsize=(2.1 * len(shown), 10.8), layout="constrained"
    )
    for column, name in zip(axes.T, shown, strict=True):
        o = outcomes[name]
        base = upsample(o.condition)[0]
        pictures = [base, *(base + o.samples[kind] for kind in kinds)]
        for axis, picture in zip(column, pictures, strict=False):
            # Where nothing is left of a sample it is black.
            axis.imshow(picture.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).permute(1, 2, 0))
        column[-1].imshow(o.strange[0], cmap="inferno", vmin=0.5, vmax=1.0)
        column[0].set_title(name, fontsize=9)
    for axis, label in zip(axes[:, 0], ("condition", *kinds, "OOD map"), strict=True):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=70)
    plt.close(figure)
    print(f"wrote {path}")


class Result(NamedTuple):
    r"""What came out."""

    bits: dict[str, float]
    report: flowguard.Migration
    certificate: flowguard.Certificate
    outcomes: dict[str, Outcome]


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps, 300 or, with --quick, 20")
    parser.add_argument("--out", type=Path, default=Path("normflows-glow.png"))
    parser.add_argument("--quick", action="store_true", help="tiny models, to see it run")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else FULL
    steps = options.steps or (20 if options.quick else 300)
    start = time.perf_counter()
    torch.manual_seed(0)

    stock = StockGlow(2, setting.blocks, setting.hidden)
    train("stock", stock, steps, setting.batch)
    robust = RobustGlow(2, setting.blocks, setting.hidden)
    train("robust", robust, steps, setting.batch)
    calibration = next(pairs(TRAINING_PHOTOGRAPHS, setting.pairs, 5))
    migrated, report = flowguard.migrate(stock, calibration=calibration)
    models = {"stock": stock, "robust": robust, "migrated": migrated}

    found = {kind: held_out_bits(model, setting.pairs) for kind, model in models.items()}
    print("\nbits/dim on crops of a held-out photograph")
    for kind, number in found.items():
        print(f"  {kind:10s} {number:.4f}")

    for method, names in (
        (robust.conditioner.fit, TRAINING_PHOTOGRAPHS),
        (robust.conditioner.calibrate, CALIBRATION_PHOTOGRAPHS),
    ):
        method(next(pairs(names, 1024, 3))[1], progress=False)
    outcomes = compare(models, setting.tiles, TEMPERATURE)
    certificate = flowguard.certify(robust)
    for kind, c in (
        ("stock", report.certificate_before),
        ("robust", certificate),
        ("migrated", report.certificate_after),
    ):
        told = (
            f"certified for every condition: |x| <= {c.bound(5.0) / GAIN:.3g} for noise up to 5"
            if c is not None and c.certified
            else "not certified"
        )
        print(f"{kind:10s} {told}")
    draw(outcomes, options.out)
    print(f"{time.perf_counter() - start:.0f} s")
    return Result(found, report, certificate, outcomes)


if __name__ == "__main__":
    main()
