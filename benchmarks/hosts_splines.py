r"""The hosts' own splines beside the same splines computed by flowguard, in models and alone.

    python benchmarks/hosts_splines.py --threads 1 2

Both take turns in one process, and of each the fastest of the turns counts, so that other load on
the machine hits neither. What is printed is Markdown: times in milliseconds and how many times as
fast flowguard is. Models are those of the hosts, once as they are and once inside of `splines()`.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from functools import partial

import torch
from common import by_turns
from torch import Tensor, nn

from flowguard.functional import unconstrained_rational_quadratic_spline
from flowguard.integrations import nflows as ours
from flowguard.integrations import zuko as ours_of_zuko

Call = Callable[[], object]
BOUND = 3.0


def alone(bins: int, elements: int, mode: str) -> tuple[Call, Call]:
    r"""The spline of nflows and ours on the same tensors, which lie in memory as those of a network
    do: one feature's numbers after the other's."""
    from nflows.transforms.splines import unconstrained_rational_quadratic_spline as theirs

    raw = torch.randn(elements // 10, 10, 3 * bins - 1)
    x = 1.5 * torch.randn(elements // 10, 10)
    tensors = [x, *raw.split([bins, bins, bins - 1], dim=-1)]
    cotangents = tuple(torch.randn(2, *x.shape))

    def call(function: Callable[..., tuple[Tensor, Tensor]]) -> object:
        run = partial(function, tails="linear", tail_bound=BOUND, inverse=mode == "inverse")
        if mode != "forward+backward":
            with torch.no_grad():
                return run(*tensors)
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(run(*leaves), leaves, cotangents)

    return partial(call, theirs), partial(call, unconstrained_rational_quadratic_spline)


def coupling_nsf() -> tuple[nn.Module, int, int]:
    r"""A flow of eight couplings of nflows, as in the paper for tables of data."""
    from nflows import distributions, flows, transforms
    from nflows.nn import nets

    features, context = 8, 4

    def net(inputs: int, outputs: int) -> nn.Module:
        return nets.ResidualNet(inputs, outputs, 64, context_features=context, num_blocks=2)

    parts = []
    for i in range(8):
        mask = (torch.arange(features) + i) % 2
        cls = transforms.PiecewiseRationalQuadraticCouplingTransform
        parts.append(cls(mask, net, num_bins=8, tails="linear", tail_bound=BOUND))
    normal = distributions.StandardNormal([features])
    return flows.Flow(transforms.CompositeTransform(parts), normal), features, context


def sbi_nsf(host: str = "nsf") -> tuple[nn.Module, int, int]:
    r"""The default spline estimator of sbi, for five parameters and ten observed numbers."""
    from sbi.neural_nets import posterior_nn

    features, context = 5, 10
    build = posterior_nn(host)
    return build(torch.randn(500, features), torch.randn(500, context)), features, context


def train_step(model: nn.Module, features: int, context: int, batch: int, sbi: bool) -> Call:
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    x, c = torch.randn(batch, features), torch.randn(batch, context)

    def step() -> None:
        optimizer.zero_grad()
        loss = model.loss(x, c) if sbi else -model.log_prob(x, c)
        loss.mean().backward()
        optimizer.step()

    return step


def draws(model: nn.Module, context: int, batch: int, sbi: bool) -> Call:
    c = torch.randn(1, context)

    def draw() -> object:
        with torch.no_grad():
            return model.sample((batch,), c) if sbi else model.sample(batch, c)

    return draw


#: Of time on the wall, or of the processor's.
CLOCK = [time.perf_counter]


def compare(theirs: Call, mine: Call, rounds: int) -> tuple[float, float]:
    r"""The shortest times of both, in milliseconds."""
    times = by_turns({"theirs": theirs, "ours": mine}, rounds, clock=CLOCK[0])
    return 1e3 * min(times["theirs"]), 1e3 * min(times["ours"])


def row(cells: Sequence[object]) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def measured(label: Sequence[object], times: tuple[float, float]) -> None:
    theirs, mine = times
    row([*label, f"{theirs:.2f}", f"{mine:.2f}", f"{theirs / mine:.1f}×"])


def models(batch: int) -> Iterator[tuple[str, str, Call]]:
    for name, make, sbi in (
        ("nflows, 8 couplings", coupling_nsf, False),
        ("sbi `nsf`", sbi_nsf, True),
        ("sbi `zuko_nsf`", partial(sbi_nsf, "zuko_nsf"), True),
    ):
        try:
            torch.manual_seed(0)
            model, features, context = make()
        except ImportError as error:
            row([name, "", f"{error.name} is not installed"])
            continue
        model.eval()
        yield name, "training step", train_step(model, features, context, batch, sbi)
        yield name, "sampling", draws(model, context, batch, sbi)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--threads", type=int, nargs="+", default=[1])
    add("--bins", type=int, nargs="+", default=[8, 10])
    add("--elements", type=lambda s: int(float(s)), nargs="+", default=[10**4, 10**5, 10**6])
    add("--batch", type=int, nargs="+", default=[200, 2000])
    add("--rounds", type=int, default=7)
    add("--only", choices=["alone", "models"])
    add("--processor-time", action="store_true", help="for one thread, on a machine at work")
    options = parser.parse_args()
    if options.processor_time:
        if max(options.threads) > 1:
            raise SystemExit("--processor-time is for one thread: add --threads 1")
        CLOCK[0] = time.process_time
    warnings.simplefilter("ignore")
    torch.manual_seed(0)

    if options.only != "models":
        row(["threads", "K", "elements", "mode", "nflows ms", "flowguard ms", "ratio"])
        row(["---:"] * 3 + ["---"] + ["---:"] * 3)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for bins in options.bins:
                for elements in options.elements:
                    for mode in ("forward", "inverse", "forward+backward"):
                        times = compare(*alone(bins, elements, mode), options.rounds)
                        measured((threads, bins, f"{elements:,}", mode), times)
        print()
    if options.only != "alone":
        row(["threads", "model", "rows", "what", "as it is, ms", "inside, ms", "ratio"])
        row(["---:", "---", "---:", "---"] + ["---:"] * 3)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch in options.batch:
                for name, what, call in models(batch):
                    adapter = ours_of_zuko if "zuko" in name else ours
                    with adapter.splines():
                        # A context of its own is not inside.
                        theirs = partial(Context().run, call)
                        times = compare(theirs, call, options.rounds)
                    measured((threads, name, f"{batch:,}", what), times)


if __name__ == "__main__":
    main()
