r"""What a migration loses where one row of the calibration data is an outlier.

Trains thirty and more flows of nflows, glasflow, normflows and zuko for some seconds each, on points
of four features away from standard units, turned and scaled by a context. Migrates each without
fine-tuning, with 2 000 rows of calibration data, one of which is thirty standard deviations off, and
tells the negative log-likelihood of clean rows that none of this has seen, before and after, what
the report says was cut, and what the certificate says.

    python benchmarks/migration.py                         # five to ten minutes on one core
    python benchmarks/migration.py --hosts zuko --outlier 100
"""

import argparse
import importlib
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from common import moons, train
from torch import Tensor

import flowguard

FEATURES, CONTEXT, WIDTH = 4, 2, 48

#: A flow, and its log-density of rows and contexts.
Made = tuple[nn.Module, Callable[[Any, Tensor, Any], Tensor]]


def draw(n: int) -> tuple[Tensor, Tensor]:
    r"""Draws rows of two points each, of one context, and the contexts."""
    x, c = moons(n)
    other = torch.stack((x[:, 1], -x[:, 0]), dim=-1) * 0.5 + 0.2 * torch.randn(n, 2)
    return torch.cat((3 * x + 5, 10 * other - 2), dim=-1), c


def spoilt(x: Tensor, distance: float) -> Tensor:
    r"""Returns the rows with the first one so many standard deviations off."""
    x = x.clone()
    x[0] = x.mean(0) + distance * x.std(0) * torch.randn_like(x[0]).sign()
    return x


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(CONTEXT, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2 * FEATURES))


def _masks(n: int) -> list[list[int]]:
    return [[(i + j) % 2 for j in range(FEATURES)] for i in range(n)]


# nflows, and its fork


def nflows(host: str, kind: str) -> Made:
    T: Any = importlib.import_module(f"{host}.transforms")
    nets: Any = importlib.import_module(f"{host}.nn.nets")
    distributions: Any = importlib.import_module(f"{host}.distributions")
    conditional = "unconditional" not in kind
    context = CONTEXT if conditional else None

    def net(inputs: int, outputs: int) -> nn.Module:
        return nets.ResidualNet(inputs, outputs, WIDTH, context_features=context, num_blocks=1)

    def coupling(mask: list[int]) -> nn.Module:
        if "NICE" in kind:
            return T.AdditiveCouplingTransform(mask, net)
        if "NSF" in kind:
            spline = T.PiecewiseRationalQuadraticCouplingTransform
            return spline(mask, net, num_bins=6, tails="linear", tail_bound=6.0)
        return T.AffineCouplingTransform(mask, net)

    def masked() -> nn.Module:
        if "NSF" in kind:
            spline = T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
            return spline(
                FEATURES, WIDTH, context, num_bins=6, num_blocks=1, tails="linear", tail_bound=6.0
            )
        layer = T.MaskedAffineAutoregressiveTransform(FEATURES, WIDTH, context, num_blocks=1)
        return T.InverseTransform(layer) if "IAF" in kind else layer

    layers: list[nn.Module] = [T.ActNorm(FEATURES)]
    autoregressive = any(name in kind for name in ("MAF", "IAF", "autoregressive"))
    for mask in _masks(3 if autoregressive else 6):
        layers.append(masked() if autoregressive else coupling(mask))
        if "LU" in kind:
            layers.append(T.LULinear(FEATURES, identity_init=True))
        if "batch norm" in kind:
            layers.append(T.BatchNorm(FEATURES))
        if "permut" in kind:
            layers.append(T.RandomPermutation(FEATURES))
        elif autoregressive:
            layers.append(T.ReversePermutation(FEATURES))
    base = distributions.StandardNormal([FEATURES])
    if "conditional base" in kind:
        base = distributions.ConditionalDiagonalNormal([FEATURES], encoder())
    if "mixture" in kind:
        base = distributions.MADEMoG(FEATURES, WIDTH, CONTEXT, num_mixture_components=3)
    flow = importlib.import_module(f"{host}.flows").Flow(T.CompositeTransform(layers), base)
    return flow, lambda flow, x, c: flow.log_prob(x, c)


def glasflow(name: str, **options: Any) -> Made:
    flow = getattr(importlib.import_module("glasflow"), name)(
        FEATURES, n_transforms=4, n_conditional_inputs=CONTEXT, n_neurons=WIDTH, **options
    )
    # Its flows have no normalisation of their data: a first layer that has.
    T: Any = importlib.import_module("glasflow.nflows.transforms")
    flow._transform = T.CompositeTransform([T.ActNorm(FEATURES), flow._transform])
    return flow, lambda flow, x, c: flow.log_prob(x, c)


# normflows


def normflows(kind: str) -> Made:
    nf: Any = importlib.import_module("normflows")
    half = FEATURES // 2
    conditional = any(name in kind for name in ("context", "conditional"))

    def mlp(i: int, o: int) -> nn.Module:
        return nf.nets.MLP([i, WIDTH, WIDTH, o], init_zeros=True)

    layers: list[Any] = []
    for mask in map(torch.tensor, _masks(4)):
        if "exp" in kind or "sigmoid" in kind or "NICE" in kind:
            scale = "NICE" not in kind
            options = {"scale_map": "sigmoid" if "sigmoid" in kind else "exp"} if scale else {}
            outputs = (2 if scale else 1) * half
            layers.append(nf.flows.AffineCouplingBlock(mlp(half, outputs), scale, **options))
        elif "masked" in kind:
            s = None if "NICE" in kind else mlp(FEATURES, FEATURES)
            layers.append(nf.flows.MaskedAffineFlow(mask, mlp(FEATURES, FEATURES), s))
        elif "coupled spline" in kind:
            spline = nf.flows.CoupledRationalQuadraticSpline
            layers.append(spline(FEATURES, 1, WIDTH, CONTEXT, num_bins=6, tail_bound=6))
        elif "autoregressive spline" in kind:
            spline = nf.flows.AutoregressiveRationalQuadraticSpline
            layers.append(spline(FEATURES, 1, WIDTH, CONTEXT, num_bins=6, tail_bound=6))
        else:
            layer = nf.flows.MaskedAffineAutoregressive(FEATURES, WIDTH, CONTEXT, num_blocks=1)
            layers.append(layer)
        if "LU" in kind:
            adapter = importlib.import_module("flowguard.integrations.normflows").ContextAdapter
            permuted = nf.flows.LULinearPermute(FEATURES)
            layers.append(adapter(permuted) if conditional else permuted)
        elif "mixing" in kind:
            layers += [nf.flows.InvertibleAffine(FEATURES), nf.flows.ActNorm(FEATURES)]
        elif not conditional and "masked" not in kind:
            layers.append(nf.flows.Permute(FEATURES, mode="swap"))
    shift = nf.flows.ActNorm(FEATURES)
    if conditional:
        adapter = importlib.import_module("flowguard.integrations.normflows").ContextAdapter
        layers.append(adapter(shift))
        base = nf.distributions.DiagGaussian(FEATURES)
        if "conditional base" in kind:
            base = nf.distributions.base.ConditionalDiagGaussian(FEATURES, encoder())
        flow = nf.ConditionalNormalizingFlow(base, layers)
        return flow, lambda flow, x, c: flow.log_prob(x, context=c)
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES), [*layers, shift])
    return flow, lambda flow, x, c: flow.log_prob(x)


# zuko


def zuko(kind: str) -> Made:
    zk: Any = importlib.import_module("zuko")
    hidden = {"hidden_features": (WIDTH, WIDTH)}
    context = 0 if "unconditional" in kind else CONTEXT
    if "NICE" in kind:
        flow = zk.flows.NICE(
            FEATURES, context, transforms=6, randmask="random masks" in kind, **hidden
        )
    elif "NSF" in kind:
        options = {"passes": 2} if "coupling" in kind else {}
        flow = zk.flows.NSF(FEATURES, context, transforms=3, bins=6, **options, **hidden)
    else:
        options = {"passes": 2} if "coupling" in kind else {}
        options |= {"residual": True} if "residual" in kind else {}
        options |= {"randperm": True} if "permut" in kind else {}
        flow = zk.flows.MAF(FEATURES, context, transforms=3, **options, **hidden)
    parts = list(flow.transform.transforms)
    if "LU" in kind or "rotation" in kind:
        make = zk.transforms.LULinearTransform if "LU" in kind else zk.transforms.RotationTransform
        mixing = [
            zk.flows.UnconditionalTransform(
                make, torch.eye(FEATURES) + torch.randn(FEATURES, FEATURES) / 4
            )
            for _ in parts
        ]
        parts = [part for pair in zip(parts, mixing, strict=True) for part in pair]
    x, _ = draw(4096)  # to standard units, as zuko's users do first
    scale = zk.transforms.MonotonicAffineTransform
    units = zk.flows.UnconditionalTransform(
        scale, -x.mean(0) / x.std(0), -x.std(0).log(), slope=1e-30, buffer=True
    )
    transform = zk.lazy.LazyComposedTransform(units, *parts)
    base = flow.base
    if "inverted" in kind:
        inner = zk.lazy.LazyComposedTransform(*parts)
        transform = zk.lazy.LazyComposedTransform(units, inner.inv)
    if "conditional base" in kind:
        base = gaussian(zk)
    flow = zk.flows.Flow(transform, base)
    return flow, lambda flow, x, c: flow(c).log_prob(x)


def gaussian(zk: Any) -> nn.Module:
    class ConditionalGaussian(zk.lazy.LazyDistribution):
        r"""A user's own base."""

        def __init__(self) -> None:
            super().__init__()
            self.net = encoder()

        def forward(self, c: Tensor) -> Any:
            mean, logs = self.net(c).chunk(2, dim=-1)
            return zk.distributions.DiagNormal(mean, logs.exp())

    return ConditionalGaussian()


NFLOWS = (
    "RealNVP",
    "RealNVP, unconditional",
    "RealNVP, LU",
    "RealNVP, permutations, batch norm",
    "NICE, LU",
    "MAF",
    "IAF",
    "MAF, conditional base",
    "RealNVP, mixture base",
    "NSF",
    "NSF, autoregressive",
)
NORMFLOWS = (
    "coupling, exp",
    "coupling, sigmoid",
    "coupling, exp, mixing",
    "coupling, exp, LU",
    "NICE, LU",
    "masked",
    "context, autoregressive",
    "context, autoregressive, LU",
    "autoregressive, conditional base",
    "context, coupled spline",
    "context, autoregressive spline",
)
ZUKO = (
    "NICE",
    "NICE, random masks",
    "NICE, unconditional",
    "NICE, LU",
    "MAF",
    "MAF, coupling",
    "MAF, permuted, residual",
    "MAF, rotation",
    "MAF, inverted",
    "MAF, conditional base",
    "NSF",
    "NSF, coupling",
)
MODELS: dict[str, dict[str, Callable[[], Made]]] = {
    "nflows": {kind: partial(nflows, "nflows", kind) for kind in NFLOWS},
    "glasflow": {
        "RealNVP": partial(glasflow, "RealNVP"),
        "CouplingNSF": partial(glasflow, "CouplingNSF", tail_bound=6.0),
        "MAF": partial(nflows, "glasflow.nflows", "MAF"),
    },
    "normflows": {kind: partial(normflows, kind) for kind in NORMFLOWS},
    "zuko": {kind: partial(zuko, kind) for kind in ZUKO},
}


def row(host: str, name: str, make: Callable[[], Made], steps: int, outlier: float) -> str:
    torch.manual_seed(0)
    flow, density = make()
    alone = "unconditional" in name

    def pairs(n: int) -> tuple[Tensor, Any]:
        x, c = draw(n)
        return x, None if alone else c

    train(flow, lambda x, c: -density(flow, x, c).mean(), steps, draw=pairs, batch=256, lr=4e-3)
    calibration, unseen = pairs(2000), pairs(8192)
    x = spoilt(calibration[0], outlier) if outlier else calibration[0]
    with torch.no_grad():
        before = -density(flow, *unseen).mean().item()
    begin = time.process_time()
    robust, report = flowguard.migrate(flow, x, calibration[1], log_prob=density)
    seconds = time.process_time() - begin
    with torch.no_grad():
        after = -density(robust, *unseen).mean().item()
    certificate = report.certificate_after
    certified = certificate is not None and certificate.certified
    bound = f"{certificate.bound(5.0):.3g}" if certificate is not None and certified else "-"
    return (
        f"{host:10s} {name:36s} {before:9.4f} {after:9.4f} {after - before:+9.5f}"
        f" {report.cut:9.3%} {'yes' if certified else 'no':>5s} {bound:>8s} {seconds:7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--steps", type=int, default=250, help="training steps, default: 250")
    parser.add_argument("--outlier", type=float, default=30.0, help="0 for none, default: 30")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(
        f"{'host':10s} {'model':36s} {'NLL':>9s} {'after':>9s} {'moved':>9s} {'cut':>9s}"
        f" {'proof':>5s} {'bound':>8s} {'seconds':>7s}"
    )
    for host in options.hosts:
        for name, make in MODELS[host].items():
            if options.only in name:
                print(row(host, name, make, options.steps, options.outlier), flush=True)


if __name__ == "__main__":
    main()
