r"""Far observations: what sbi's posteriors answer, as they are, migrated and protected.

Four estimators, two simulators, an honest observation multiplied by 10, 1 000 and a million. For
each: how many of 500 samples came within the limit, in how many seconds, and with how many warnings
of the guard. A posterior as it is samples in a process of its own, which is ended at the limit.

    python benchmarks/sbi_far.py                 # 24 cases, about ten minutes on one core
    python benchmarks/sbi_far.py --models maf --limit 3
"""

import argparse
import multiprocessing
import time
import warnings
from typing import Any, NamedTuple

import torch
from sbi_toys import PRIORS, SIMULATORS, quiet, trained

from flowguard.integrations.sbi import protect
from flowguard.migration import migrate
from flowguard.ood import OODContextWarning

MODELS = ("maf", "nsf", "zuko_maf", "zuko_nsf")
FACTORS = (10.0, 1e3, 1e6)


class Drawn(NamedTuple):
    r"""What came of sampling."""

    samples: int
    seconds: float
    warned: int


def draw(posterior: Any, x: Any, count: int) -> Drawn:
    r"""Samples, in this process."""
    torch.manual_seed(0)
    start = time.perf_counter()
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = posterior.sample((count,), x=x, show_progress_bars=False)
    seconds = time.perf_counter() - start
    warned = sum(issubclass(w.category, OODContextWarning) for w in caught)
    return Drawn(len(samples), seconds, warned)


def _child(pipe: Any, posterior: Any, x: Any, count: int, limit: float) -> None:
    torch.set_num_threads(1)
    # sbi tells how many were accepted before the limit if it is asked to return these.
    options = {"max_sampling_time": limit, "return_partial_on_timeout": True}
    with quiet():
        try:
            torch.manual_seed(0)
            samples = posterior.sample((count,), x=x, show_progress_bars=False, **options)
            pipe.send(len(samples))
        except RuntimeError:
            pipe.send(0)


def draw_within(posterior: Any, x: Any, count: int, limit: float) -> Drawn:
    r"""Samples in a process of its own, which is ended soon after the limit."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there, posterior, x, count, limit))
    start = time.perf_counter()
    process.start()
    samples = here.recv() if here.poll(2 * limit + 5) else 0
    seconds = time.perf_counter() - start
    process.kill()
    process.join()
    return Drawn(samples, seconds, 0)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--simulators", nargs="+", default=list(SIMULATORS))
    parser.add_argument("--limit", type=float, default=6.0, help="seconds")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2**31 - 1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    print("| simulator | estimator | x | stock | s | migrated | s | protected | s | warned |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for simulator in options.simulators:
        for model in options.models:
            posterior, theta, x = trained(
                simulator, model, options.simulations, max_num_epochs=options.epochs
            )
            with quiet():
                robust, _ = migrate(posterior, theta, x)
                guarded = protect(posterior, theta, x, policy="shrink")
            torch.manual_seed(1)
            honest = SIMULATORS[simulator](PRIORS[simulator].sample((1,)))
            for factor in (1.0, *FACTORS):
                row = {
                    "simulator": simulator,
                    "model": model,
                    "factor": factor,
                    "stock": draw_within(posterior, factor * honest, options.count, options.limit),
                    "migrated": draw_within(robust, factor * honest, options.count, options.limit),
                    "protected": draw(guarded, factor * honest, options.count),
                }
                rows.append(row)
                cells = [simulator, model, f"×{factor:g}"]
                for kind in ("stock", "migrated", "protected"):
                    cells += [f"{row[kind].samples}", f"{row[kind].seconds:.2f}"]
                print("| " + " | ".join([*cells, str(row["protected"].warned)]) + " |", flush=True)
    far = [row for row in rows if row["factor"] > 1]
    times = {(r["simulator"], r["model"]): r["protected"].seconds for r in rows if r not in far}
    kept = [
        row["protected"].samples == options.count
        and row["protected"].warned == 1
        and row["protected"].seconds <= times[row["simulator"], row["model"]] + 2
        for row in far
    ]
    print(
        f"\nProtected: all samples, one warning, at most 2 s more than for the honest observation "
        f"in {sum(kept)} of {len(far)} cases; stock: all samples in "
        f"{sum(row['stock'].samples == options.count for row in far)}, migrated alone: in "
        f"{sum(row['migrated'].samples == options.count for row in far)}."
    )
    return rows


if __name__ == "__main__":
    main()
