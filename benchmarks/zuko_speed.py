r"""Times `RobustCouplingFlow` beside zuko's coupling spline flow, `NSF(passes=2)`.

One run is the log-density and a sample for each of 10^5 contexts, in 16 dimensions, without
gradients. All run in one process, in turns; the table gives medians.

With `--kernels` it is `RobustNSF` with these kernels beside itself with those in place: a training
step and a sample for each of as many contexts.

    python benchmarks/zuko_speed.py
    python benchmarks/zuko_speed.py --compile --repeats 5
    python benchmarks/zuko_speed.py --kernels compiled --processor-time
    python benchmarks/zuko_speed.py --autoregressive --points 4096 --features 16

With `--autoregressive` it times samples of `RobustNSF` beside those of zuko's NSF and MAF instead, in
processor time; a ratio is the median of those of each turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import zuko
from common import by_turns
from torch import Tensor

from flowguard import kernels
from flowguard.integrations.zuko import RobustCouplingFlow, RobustNSF

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def log_prob(flow: zuko.lazy.Flow) -> Run:
    return lambda x, c, z: flow(c).log_prob(x)


def sample(flow: zuko.lazy.Flow) -> Run:
    return lambda x, c, z: flow(c).transform.inv(z)


def autoregressive(points: int, features: int, context: int, repeats: int) -> None:
    r"""Prints how long it takes to sample flows whose features come one after another."""
    torch.manual_seed(0)
    kinds = {"RobustNSF": RobustNSF, "zuko NSF": zuko.flows.NSF, "zuko MAF": zuko.flows.MAF}
    flows = {name: kind(features, context, transforms=3) for name, kind in kinds.items()}
    z, c = torch.randn(points, features), torch.randn(points, context)
    runs = {name: partial(sample(flow), z, c, z) for name, flow in flows.items()}
    with torch.no_grad():
        times = by_turns(runs, repeats, clock=time.process_time)
    ours = times["RobustNSF"]
    print(f"{points} samples of {features} features, {torch.get_num_threads()} threads")
    for name, theirs in times.items():
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"  {name} {statistics.median(theirs) * 1e3:.1f} ms, ours over it {ratio:.2f}")


def training_step(flow: zuko.lazy.Flow, x: Tensor, c: Tensor) -> Tensor:
    r"""The loss, when its gradients are there."""
    flow.zero_grad()
    loss = -flow(c).log_prob(x).mean()
    loss.backward()
    return loss.detach()


def compare_kernels(args: argparse.Namespace) -> None:
    r"""Prints how long `RobustNSF` takes with two kinds of kernels."""
    torch.manual_seed(0)
    flow = RobustNSF(args.features, args.context, transforms=3).to(args.device)
    x, z = torch.randn(2, args.points, args.features, device=args.device).unbind(0)
    c = torch.randn(args.points, args.context, device=args.device)
    few = slice(args.batch)

    def timed(which: str, call: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> float:
            with kernels(which):
                return call().sum().item()

        return run

    @torch.no_grad()
    def drawn() -> Tensor:
        return flow(c).transform.inv(z)

    calls = {"training step": lambda: training_step(flow, x[few], c[few]), "sample": drawn}
    whiches = "eager", args.kernels
    runs = {(kind, w): timed(w, call) for kind, call in calls.items() for w in whiches}
    clock = time.process_time if args.processor_time else time.perf_counter
    times = by_turns(runs, args.repeats, clock=clock)
    print(
        f"RobustNSF, {args.features} dimensions, training on {args.batch} points, samples for"
        f" {args.points}, {args.device}, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}"
    )
    for kind in calls:
        eager, other = (statistics.median(times[kind, w]) for w in whiches)
        print(
            f"{kind}: eager {eager * 1e3:.0f} ms, {args.kernels} {other * 1e3:.0f} ms,"
            f" ratio {eager / other:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--context", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kernels", choices=("compiled", "traced"))
    parser.add_argument("--batch", type=int, default=4096, help="of a training step")
    parser.add_argument("--processor-time", action="store_true", help="on a machine at work")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autoregressive", action="store_true")
    args = parser.parse_args()
    if args.autoregressive:
        autoregressive(args.points, args.features, args.context, args.repeats)
        return
    if args.kernels:
        compare_kernels(args)
        return

    torch.manual_seed(0)
    options = {"features": args.features, "context": args.context, "transforms": 3}
    flows = {
        "RobustCouplingFlow": RobustCouplingFlow(**options).to(args.device),
        "zuko NSF(passes=2)": zuko.flows.NSF(passes=2, **options).to(args.device),
    }
    x, z = torch.randn(2, args.points, args.features, device=args.device).unbind(0)
    c = torch.randn(args.points, args.context, device=args.device)

    def measured(run: Run) -> Callable[[], float]:
        return lambda: run(x, c, z).sum().item()  # the device has finished

    runs = {
        (name, kind.__name__): measured(torch.compile(kind(flow)) if args.compile else kind(flow))
        for name, flow in flows.items()
        for kind in (log_prob, sample)
    }
    with torch.no_grad():
        times = by_turns(runs, args.repeats)

    how = "compiled" if args.compile else "eager"
    print(
        f"{args.points} points, {args.features} dimensions, {how}, {args.device},"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}, zuko {zuko.__version__}"
    )
    medians = {key: statistics.median(t) for key, t in times.items()}
    totals = {name: sum(t for (n, _), t in medians.items() if n == name) for name in flows}
    for name in flows:
        parts = ", ".join(f"{k} {t * 1e3:.0f} ms" for (n, k), t in medians.items() if n == name)
        print(f"{name}: {parts}, together {totals[name] * 1e3:.0f} ms")
    ours, theirs = totals.values()
    print(f"ratio: {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
