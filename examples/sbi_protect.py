r"""A posterior that tells when an observation drifts away from the simulations.

sbi learns the posterior of two moons from simulations. Then an apparatus drifts: its observations
move away from all that the simulator makes. The posterior as sbi gives it answers with samples far
outside of the prior; migrated, its flow is bounded, but nearly nothing of it is in the prior
either; protected, it says so, and answers for the nearest observation that the simulator makes.

    pip install "flowguard-nf[sbi,plot]"
    python examples/sbi_protect.py              # about a minute on one core
"""

import argparse
import contextlib
import io
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform
from torch import Tensor

import flowguard
from flowguard.integrations.sbi import protect
from flowguard.ood import OODContextWarning

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
DRIFTS = (0.0, 2.0, 10.0, 100.0)
DIRECTION = torch.tensor([0.6, 0.8])


def simulate(theta: Tensor) -> Tensor:
    r"""Simulates two moons (Greenberg et al., 2019)."""
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    crescent = torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), -1)
    corner = torch.stack((-theta.sum(-1).abs(), theta[:, 1] - theta[:, 0]), -1) / math.sqrt(2)
    return crescent + corner


class Result(NamedTuple):
    r"""What came out, for each drift."""

    x: Tensor
    observations: Tensor
    samples: dict[str, list[Tensor]]
    inside: dict[str, list[float]]
    warned: list[list[str]]
    p_values: list[float]


def train(count: int, epochs: int) -> tuple[Any, Tensor, Tensor]:
    r"""Trains sbi's posterior on simulations, as always."""
    theta = PRIOR.sample((count,))
    x = simulate(theta)
    inference = NPE(PRIOR, density_estimator="zuko_maf", show_progress_bars=False)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the number of epochs
        inference.append_simulations(theta, x).train(max_num_epochs=epochs)
    return inference.build_posterior(), theta, x


def infer(posterior: Any, theta: Tensor, x: Tensor, draws: int) -> Result:
    r"""Asks three posteriors for the observations of an apparatus that drifts."""
    robust, report = flowguard.migrate(posterior, theta, x)
    print(f"migrated: certified {report.certificate_after.certified}")
    guarded = protect(posterior, theta, x, policy="shrink", robust=True)

    honest = simulate(torch.tensor([[0.3, 0.2]]))
    observations = honest + torch.tensor(DRIFTS)[:, None] * DIRECTION
    samples: dict[str, list[Tensor]] = {"stock": [], "migrated": [], "protected": []}
    inside: dict[str, list[float]] = {name: [] for name in samples}
    warned, p_values = [], []
    for observation in observations:
        for name, asked in (("stock", posterior), ("migrated", robust)):
            # Without rejection, which could go on for ever.
            with torch.no_grad():
                drawn = asked.posterior_estimator.sample((draws,), observation[None])[:, 0]
            samples[name].append(drawn)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            samples["protected"].append(
                guarded.sample((draws,), x=observation, show_progress_bars=False)
            )
        warned.append([str(w.message) for w in caught if w.category is OODContextWarning])
        p_values.append(float(guarded.ood_report.p_value))
        for name, parts in samples.items():
            inside[name].append(float(PRIOR.support.check(parts[-1]).float().mean()))
    return Result(x, observations, samples, inside, warned, p_values)


def tell(result: Result) -> None:
    for i, drift in enumerate(DRIFTS):
        shares = ", ".join(f"{name} {100 * s[i]:.0f} %" for name, s in result.inside.items())
        print(f"drift {drift:4g}   p-value {result.p_values[i]:.4f}   in the prior: {shares}")
        for message in result.warned[i]:
            print(f"  warning: {message}")


def plot(result: Result, path: Path) -> None:
    r"""Draws the observations, and the samples of all three for each of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 5, width_ratios=[1.25, 1, 1, 1, 1])
    axis = figure.add_subplot(grid[:, 0])
    axis.scatter(*result.x[:1000].T, s=2, color="0.7", label="simulations")
    for i, drift in enumerate(DRIFTS[:-1]):
        axis.plot(*result.observations[i], "o", color=f"C{i}", label=f"drift {drift:g}")
    axis.annotate(
        f"drift {DRIFTS[-1]:g}",
        result.observations[2].tolist(),
        (result.observations[2] + 0.8 * DIRECTION).tolist(),
        arrowprops={"arrowstyle": "<-", "color": "C3"},
        color="C3",
    )
    axis.set(title="Observations", xlabel="x₁", ylabel="x₂")
    axis.legend(loc="lower left", fontsize=8)
    rows = (("stock", "C3"), ("protected", "C0"))
    for i, drift in enumerate(DRIFTS):
        for row, (name, color) in enumerate(rows):
            axis = figure.add_subplot(grid[row, i + 1])
            drawn = [(name, color)] if row else [(name, color), ("migrated", "C1")]
            for each, tint in drawn:
                points = result.samples[each][i][:1000]
                label = f"{each}: {100 * result.inside[each][i]:.0f} % in the prior"
                axis.scatter(*points.T, s=3, alpha=0.4, color=tint, label=label)
            axis.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], "k", lw=1)
            axis.set_xscale("symlog", linthresh=2)
            axis.set_yscale("symlog", linthresh=2)
            axis.set_xlim(*_around(result, i))
            axis.set_ylim(*_around(result, i))
            ticks = [-1, 1] if _around(result, i)[1] < 20 else [-100, -1, 1, 100]
            axis.set_xticks(ticks, labels=ticks)
            axis.set_yticks(ticks, labels=ticks)
            axis.minorticks_off()
            axis.tick_params(labelsize=7)
            axis.legend(loc="lower left", fontsize=6, markerscale=3, frameon=False)
            if not row:
                axis.set_title(f"drift {drift:g}: p = {result.p_values[i]:.2g}", fontsize=10)
    figure.suptitle(
        "Two moons: samples of the parameters as an observation drifts; boxed: the prior"
    )
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def _around(result: Result, i: int) -> tuple[float, float]:
    far = max(float(parts[i].abs().amax()) for parts in result.samples.values())
    return -1.6 * max(2.0, far), 1.6 * max(2.0, far)


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("sbi_protect.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    posterior, theta, x = train(options.simulations, options.epochs)
    result = infer(posterior, theta, x, options.draws)
    tell(result)
    plot(result, options.output)
    return result


if __name__ == "__main__":
    main()
