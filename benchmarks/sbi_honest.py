r"""Honest observations: does a posterior lose anything by being migrated and protected?

Before and after ``protect(robust=True)``, on pairs that were drawn as the simulations were: the
p-values of simulation-based calibration (the least of all parameters), of expected coverage and of
TARP, by sbi's own functions with the same seeds; the share of observations that are flagged; and for
two moons, whose posterior is known, the accuracy of a classifier between both and that posterior (0.5 is
perfect), averaged over observations.

    python benchmarks/sbi_honest.py              # about ten minutes on one core
"""

import argparse
import warnings
from typing import Any, NamedTuple

import torch
from sbi.diagnostics import check_sbc, check_tarp, run_sbc, run_tarp
from sbi.utils.metrics import c2st
from sbi_toys import PRIORS, SIMULATORS, moons_posterior, quiet, trained

from flowguard.integrations.sbi import protect
from flowguard.ood import OODContextWarning


class Found(NamedTuple):
    r"""What is found of a posterior."""

    calibration: float
    coverage: float
    tarp: float
    area: float
    accuracy: float


def examined(posterior: Any, simulator: str, pairs: int, draws: int, compared: int) -> Found:
    r"""Examines a posterior on pairs that are the same whenever they are drawn."""
    torch.manual_seed(7)
    prior, simulate = PRIORS[simulator], SIMULATORS[simulator]
    theta = prior.sample((pairs,))
    x = simulate(theta)
    options: Any = {"num_posterior_samples": draws, "show_progress_bar": False}
    with quiet():
        ranks, averaged = run_sbc(theta, x, posterior, **options)
        told = check_sbc(ranks, theta, averaged, num_posterior_samples=draws)

        def density(t: Any, given: Any) -> Any:
            return posterior.log_prob(t, given, norm_posterior=False)

        shares, _ = run_sbc(theta, x, posterior, reduce_fns=density, **options)
        covered = check_sbc(shares, theta, averaged, num_posterior_samples=draws)
        area, tarp = check_tarp(*run_tarp(theta, x, posterior, **options))
        scores = []
        for row in x[:compared] if simulator == "two moons" else ():
            samples = posterior.sample((1000,), x=row, show_progress_bars=False)
            scores.append(float(c2st(samples, moons_posterior(row, 1000))))
    accuracy = sum(scores) / len(scores) if scores else float("nan")
    return Found(float(told["ks_pvals"].min()), float(covered["ks_pvals"]), tarp, area, accuracy)


def main(arguments: list[str] | None = None) -> list[tuple[str, str, Found, Found, float]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["maf", "nsf", "zuko_maf", "zuko_nsf"])
    parser.add_argument("--simulators", nargs="+", default=list(SIMULATORS))
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--compared", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2**31 - 1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", OODContextWarning)
    print("| simulator | estimator | | calibration | coverage | TARP | area | c2st | flagged |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for simulator in options.simulators:
        for model in options.models:
            posterior, theta, x = trained(
                simulator, model, options.simulations, max_num_epochs=options.epochs
            )
            with quiet():
                guarded = protect(posterior, theta, x, robust=True)
            sizes = (options.pairs, options.draws, options.compared)
            before = examined(posterior, simulator, *sizes)
            after = examined(guarded, simulator, *sizes)
            fresh = SIMULATORS[simulator](PRIORS[simulator].sample((1000,)))
            flagged = float(guarded.ood_score(fresh).flagged.float().mean())
            results.append((simulator, model, before, after, flagged))
            for name, found, share in (("stock", before, ""), ("protected", after, flagged)):
                p = " | ".join(f"{value:.3f}" for value in found)
                print(f"| {simulator} | {model} | {name} | {p} | {share} |", flush=True)
    return results


if __name__ == "__main__":
    main()
