r"""Certificates beside what attacks reach, and what being certified costs in likelihood.

    python benchmarks/certificate.py violations   # random flows, contexts up to 1e30 and infinite
    python benchmarks/certificate.py toy          # trained flows: attack, tightness, likelihood
    python benchmarks/certificate.py float32      # what rounding adds to the bounds
    python benchmarks/certificate.py photographs --variant free   # one model for super-resolution
    python benchmarks/certificate.py tighten      # attack, adversary and certificates, model by model

Each part takes a few minutes on one core. The toy is that of ``benchmarks/zuko_toy.py``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import normflows_migration
import torch
import zuko
from adversary import reached
from common import moons
from common import train as train_toy
from nflows_migration import build as build_nflows
from nflows_migration import loss_of
from torch import Tensor
from zuko_toy import train

from flowguard import data
from flowguard.bounds import certify
from flowguard.bounds.attack import attack, sampler
from flowguard.demo.superres import SuperResolutionTask
from flowguard.image import ConditionalMultiscaleFlow, Robust
from flowguard.integrations.zuko import RobustCouplingFlow, RobustNSF
from flowguard.migration import migrate
from flowguard.models import SuperResolutionFlow
from flowguard.training.loop import train as train_images

RADIUS = 4.0
Build = Callable[[], Any]


def scaled(flow: torch.nn.Module, factor: float) -> torch.nn.Module:
    r"""Adds noise to all weights, and multiplies those of the conditioning networks."""
    with torch.no_grad():
        for name, p in flow.named_parameters():
            image = isinstance(flow, ConditionalMultiscaleFlow)
            if not image:
                p.mul_(factor)
            elif "coupling" in name or "net" in name:
                p.add_(0.02 * factor * torch.randn_like(p))
            else:
                p.add_(0.1 * torch.randn_like(p))
    return flow


def random_zuko() -> tuple[torch.nn.Module, Tensor]:
    features, context, transforms = (
        int(torch.randint(a, b, ())) for a, b in ((2, 7), (1, 5), (1, 6))
    )
    options = {
        "transforms": transforms,
        "bins": int(torch.randint(2, 9, ())),
        "bound": float(1 + 5 * torch.rand(())),
        "shift_bound": float(6 * torch.rand(()) + 0.1),
        "hidden_features": [32, 32],
    }
    kind = int(torch.randint(3, ()))
    flow = (
        RobustNSF(features, context, randperm=True, **options)
        if kind == 0
        else RobustNSF(features, context, passes=2, **options)
        if kind == 1
        else RobustCouplingFlow(features, context, randmask=True, **options)
    )
    return scaled(flow, float(10 ** (1.5 * torch.rand(())))), torch.randn(16, context)


def random_image(size: int) -> tuple[torch.nn.Module, list[Tensor]]:
    levels = int(torch.randint(1, 4, ()))
    robust = Robust(bins=int(torch.randint(2, 5, ())), shift_bound=float(torch.rand(()) + 0.1))
    mix = ("free", "orthogonal")[int(torch.randint(2, ()))]
    flow = ConditionalMultiscaleFlow(
        3, 4, levels=levels, steps=int(torch.randint(1, 4, ())), hidden=8, coupling=robust, mix=mix
    )
    maps = [torch.randn(2, 4, size >> (i + 1), size >> (i + 1)) for i in range(levels)]
    return scaled(flow, float(10 ** torch.rand(()))), maps


def far(y: Any, infinite: bool) -> Any:
    r"""Contexts of any size up to 1e30; some of their elements infinite, if asked."""
    tensors = [y] if isinstance(y, Tensor) else y
    out = []
    for t in tensors:
        t = torch.randn_like(t) * 10 ** (30 * torch.rand(t.shape[0], *(1,) * (t.dim() - 1)))
        if infinite:
            t = torch.where(torch.rand_like(t) < 0.5, t, t.sign() * torch.inf)
        out.append(t)
    return out[0] if isinstance(y, Tensor) else out


@torch.no_grad()
def shoot(flow: Any, y: Any, bound: float, infinite: bool) -> tuple[int, int, int, float]:
    r"""Numbers of elements sampled, above the bound and NaN, and the largest finite one, for
    noise within the cube and on its corners."""
    flow.eval()
    y = far(y, infinite)
    draw, z = sampler(flow, y)
    listed = [z] if isinstance(z, Tensor) else z
    counts, worst = [0, 0, 0], 0.0
    for corners in (False, True):
        noise = [RADIUS * (2 * torch.rand_like(t) - 1) for t in listed]
        noise = [RADIUS * t.sign() for t in noise] if corners else noise
        x = draw(noise[0] if isinstance(z, Tensor) else noise, y)
        counts[0] += x.numel()
        counts[1] += int((x.abs() > bound).sum())
        counts[2] += int(x.isnan().sum())
        worst = max(worst, float(x.abs().nan_to_num(0.0, 0.0, 0.0).max()))
    return counts[0], counts[1], counts[2], worst


def violations(flows: int, steps: int) -> None:
    r"""Random flows against random contexts and the attack."""
    groups: dict[str, Callable[[], tuple[Any, Any]]] = {
        "zuko": random_zuko,
        "image 16x16": partial(random_image, 16),
        "image 32x32": partial(random_image, 32),
    }
    for group, build in groups.items():
        n = flows if group == "zuko" else flows // 8
        start, total, above, nan, nan_finite, tight = time.perf_counter(), 0, 0, 0, 0, []
        for _ in range(n):
            flow, y = build()
            certificate = certify(flow)
            if not certificate.certified:
                raise RuntimeError(f"not certified:\n{certificate}")
            bound = certificate.bound(RADIUS)
            worst = 0.0
            for infinite in (False, True):
                elements, over, nans, reached = shoot(flow, y, bound, infinite)
                total, above, nan = total + elements, above + over, nan + nans
                nan_finite += 0 if infinite else nans
                worst = max(worst, reached)
            result = attack(flow, y, steps=steps, restarts=1, noise=RADIUS)
            above += int(result.value > bound)
            tight.append(max(worst, result.value) / bound)
        print(
            f"{group:12} {n} flows, {total} elements, {n * steps} attack steps:"
            f" {above} above the bound; NaN {nan}, of which {nan_finite} with finite contexts;"
            f" reached / bound: median {statistics.median(tight):.3f}, largest {max(tight):.4f};"
            f" {time.perf_counter() - start:.0f} s",
            flush=True,
        )


def toy(steps: int, only: str | None) -> None:
    r"""Trained flows: likelihood, certificate, attack within ‖y‖ <= 10 and without limit."""
    free: dict[str, Any] = {"shift_bound": None, "slope": None}
    builds: dict[str, Build] = {
        "coupling": partial(RobustCouplingFlow, 2, 2, transforms=8, slope=1e-3),
        "coupling-unbounded": partial(RobustCouplingFlow, 2, 2, transforms=8, **free),
        "autoregressive": partial(RobustNSF, 2, 2, transforms=4, slope=1e-3),
        "autoregressive-unbounded": partial(RobustNSF, 2, 2, transforms=4, **free),
        "zuko-RealNVP": partial(zuko.flows.RealNVP, 2, 2, transforms=8),
        "zuko-MAF": partial(zuko.flows.MAF, 2, 2, transforms=8),
        "zuko-NSF": partial(zuko.flows.NSF, 2, 2, transforms=4),
    }
    torch.manual_seed(1)
    x, c = moons(20000)
    for name, build in builds.items():
        if only not in (None, name):
            continue
        torch.manual_seed(0)
        flow = build()
        train(flow, steps)
        flow.eval()
        with torch.no_grad():
            nll = -flow(c).log_prob(x).mean().item() / 2
        bound = certify(flow).bound(RADIUS)
        start = torch.zeros(32, 2)
        near = attack(flow, start, radius=10.0, norm="l2", noise=RADIUS, steps=100, restarts=4)
        anywhere = attack(flow, start, noise=RADIUS, steps=100, restarts=4)
        print(
            f"{name:24} NLL {nll:.4f} nats/dim, bound {bound:.6g}, reached within 10:"
            f" {near.value:.6g}, anywhere: {anywhere.value:.6g}"
            f" (ratio {max(near.value, anywhere.value) / bound:.3f})",
            flush=True,
        )


def float32(flows: int) -> None:
    r"""How far float32 goes beyond the bound of exact arithmetic, and what the margin allows."""
    beyond, margin, distance = 0.0, 0.0, 0.0
    for i in range(flows):
        flow, y = random_zuko() if i % 2 else random_image(16)
        flow.eval()
        exact, allowed = certify(flow, roundoff=0.0).bound(RADIUS), certify(flow).bound(RADIUS)
        margin = max(margin, allowed / exact - 1)
        draw, z = sampler(flow, y)
        listed = [z] if isinstance(z, Tensor) else z
        corners = [RADIUS * (2 * torch.rand_like(t) - 1).sign() for t in listed]
        noise = corners[0] if isinstance(z, Tensor) else corners
        with torch.no_grad():
            single = draw(noise, y)
            double = _double(flow, noise, y)
        beyond = max(beyond, float(single.abs().max()) / exact - 1)
        distance = max(distance, float((single - double).abs().max()) / exact)
    print(
        f"{flows} flows: the margin for float32 is at most {margin:.2e} of the bound; samples in"
        f" float32 are at most {beyond:+.2e} beyond the exact bound and differ from float64 by at"
        f" most {distance:.2e} of it"
    )


def _double(flow: Any, z: Any, y: Any) -> Tensor:
    def cast(t: Any) -> Any:
        return t.double() if isinstance(t, Tensor) else [s.double() for s in t]

    flow.double()
    draw, _ = sampler(flow, cast(y))
    out = draw(cast(z), cast(y))
    flow.float()
    return out


#: The parts of being certified, one by one; the last has none of them.
VARIANTS: dict[str, dict[str, Any]] = {
    "free": {},
    "orthogonal": {"mix": "orthogonal"},
    "unbounded": {"coupling": Robust(shift_bound=None, slope=None)},
    "affine": {"coupling": "affine"},
}


def photographs(variant: str, steps: int, seed: int) -> None:
    r"""A small super-resolution model: bits per dimension, certificate and attack."""
    torch.manual_seed(seed)
    model = SuperResolutionFlow(scale=4, levels=2, steps=3, hidden=32, features=24, margin=None)
    torch.manual_seed(seed)
    model.flow = ConditionalMultiscaleFlow(
        3, 24, levels=2, steps=3, hidden=32, **VARIANTS[variant]
    )
    if variant in ("unbounded", "affine"):
        for split in model.flow.splits:
            vars(split).update(mean_bound=None, scale_bound=None)
    images = [data.photograph(name) for name in data.TRAINING_PHOTOGRAPHS]
    crops = partial(data.PairedCrops, scale=4, size=32)
    trained = train_images(model, crops(images, batch=16, seed=seed), steps=steps, progress=False)
    held_out = [data.photograph(data.HELD_OUT_PHOTOGRAPH)]
    scores = [
        _bits(model, crops(source, batch=64, seed=seed + 1)) for source in (images, held_out)
    ]
    certificate = certify(model)
    maps = model.conditioner(torch.rand(4, 3, 8, 8))
    reached = attack(
        model.flow, [m.detach() for m in maps], radius=10.0, steps=50, restarts=2, noise=RADIUS
    )
    print(
        f"{variant:11} seed {seed}: {scores[0]:.4f} bits/dim on crops of the training photographs,"
        f" {scores[1]:.4f} on a held-out one; bound {certificate.bound(RADIUS):.4g}, growth"
        f" {certificate.growth:.4g}, reached with features within 10: {reached.value:.4g};"
        f" {trained.seconds:.0f} s",
        flush=True,
    )


@torch.no_grad()
def _bits(model: SuperResolutionFlow, crops: Any) -> float:
    torch.manual_seed(0)
    return statistics.mean(
        model.nll(hr, lr).mean().item() for _, (hr, lr) in zip(range(6), crops, strict=False)
    )


#: A model to be attacked, and conditions to start from.
Target = tuple[Any, Any]


def _trained(model: SuperResolutionFlow, steps: int) -> Target:
    torch.manual_seed(1)
    images = [data.photograph(name) for name in data.TRAINING_PHOTOGRAPHS]
    crops = data.PairedCrops(images, scale=4, size=32, batch=16, seed=1)
    train_images(model, crops, steps=steps, progress=False)
    return model.eval().flow, [m.detach() for m in model.conditioner(torch.rand(4, 3, 8, 8))]


def _small(steps: int, **options: Any) -> Target:
    torch.manual_seed(1)
    model = SuperResolutionFlow(scale=4, levels=2, steps=3, hidden=32, features=24, **options)
    return _trained(model, steps)


def _demo(steps: int) -> Target:
    torch.manual_seed(1)
    return _trained(SuperResolutionTask().model("robust", quick=False), steps)


def _published(steps: int) -> Target:
    r"""The published architecture with bounded priors, shaken in place of training."""
    torch.manual_seed(0)
    model = SuperResolutionFlow.published(scale=4, blocks=1, stacked=(0,))
    with torch.no_grad():
        for name, p in model.flow.named_parameters():
            p.add_((0.02 if "coupling" in name else 0.003) * torch.randn_like(p))
    for split in model.flow.splits:
        split.tame(3.0, 2.0)
    return model.eval().flow, [m.detach() for m in model.conditioner(torch.rand(1, 3, 8, 8))]


def _toy(steps: int) -> Target:
    flow = RobustCouplingFlow(2, 2, transforms=8)
    train(flow, steps)
    return flow.eval(), torch.zeros(32, 2)


def _migrated_zuko(steps: int) -> Target:
    flow = zuko.flows.MAF(2, 2, transforms=3)
    train(flow, steps)
    return migrate(flow, *moons(4096), fit_steps=100)[0].eval(), torch.zeros(32, 2)


def _migrated_nflows(steps: int) -> Target:
    flow: Any = build_nflows("nflows", "MAF")
    train_toy(flow, loss_of(flow), steps)
    return migrate(flow, *moons(4096))[0].eval(), torch.zeros(32, 2)


def _migrated_normflows(steps: int) -> Target:
    flow: Any = normflows_migration.nf.ConditionalNormalizingFlow(
        normflows_migration.nf.distributions.DiagGaussian(2), normflows_migration.autoregressive()
    )
    draw = partial(normflows_migration.pairs, context=True)
    train_toy(flow, flow.forward_kld, steps, draw=draw, batch=256, lr=3e-3, clip=10.0)
    return migrate(flow, *draw(4096))[0].eval(), torch.zeros(32, 2)


def _migrated_image(steps: int) -> Target:
    flow, maps = _small(steps, coupling="affine")
    x = 0.3 * torch.randn(len(maps[0]), 3, 32, 32)
    return migrate(flow, x, maps)[0].eval(), maps


TARGETS: dict[str, tuple[Callable[[int], Target], int]] = {
    "toy, coupling": (_toy, 300),
    "super-resolution, 2x3": (_small, 300),
    "the demo's, 2x4": (_demo, 150),
    "published x4, shaken": (_published, 0),
    "migrated, image": (_migrated_image, 200),
    "migrated, zuko MAF": (_migrated_zuko, 300),
    "migrated, nflows MAF": (_migrated_nflows, 300),
    "migrated, normflows MAF": (_migrated_normflows, 300),
}


def tighten(steps: int, only: str | None) -> None:
    r"""What an attack reaches, what an adversary reaches who chooses all maps, and what is
    certified, plainly and with more effort."""
    for name, (build, training) in TARGETS.items():
        if only not in (None, name):
            continue
        torch.manual_seed(0)
        flow, y = build(training)
        attacked = attack(flow, y, noise=RADIUS, steps=50, restarts=2).value
        certificate = certify(flow)
        free = reached(certify(flow, roundoff=0.0), RADIUS)
        cells = []
        for certified in (certificate, certificate.tighten(0), certificate.tighten(steps)):
            start = time.process_time()
            cells.append(f"{certified.bound(RADIUS):.4g} ({time.process_time() - start:.2g} s)")
        print(
            f"{name:24} reached {attacked:.4g} with its networks, {free:.4g} over all maps;"
            f" certified {cells[0]}, tightened {cells[1]}, {steps} steps {cells[2]};"
            f" growth {certificate.growth:.3g}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("violations", "toy", "float32", "photographs", "tighten")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--flows", type=int, default=160)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="free")
    parser.add_argument("--only", help="one of the flows of the toy, or of the models to tighten")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.part == "violations":
        violations(args.flows, args.steps or 50)
    elif args.part == "toy":
        toy(args.steps or 1500, args.only)
    elif args.part == "float32":
        float32(args.flows)
    elif args.part == "tighten":
        tighten(args.steps or 20, args.only)
    else:
        photographs(args.variant, args.steps or 300, args.seed)


if __name__ == "__main__":
    main()
