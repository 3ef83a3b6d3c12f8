r"""Simulation-based inference that tells when an observation is not like the simulations.

A damped oscillator is observed at 32 times, and a neural posterior of its frequency and damping is
trained on simulations, with zuko as usual, but with flowguard's robust flow and guard. Then two
observations come in: one that the simulator could have made, and one from an apparatus that
drifts, which no parameters explain. Any posterior network answers both. This one says which
answer not to trust, and why.

    pip install "flowguard-nf[zuko,plot]"
    python examples/sbi_guarded.py              # less than a minute on two cores
"""

import argparse
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn as nn
from torch import Tensor

import flowguard
from flowguard.integrations.zuko import GuardedFlow, RobustNSF
from flowguard.ood import Monitor, OODContextWarning

TIMES = torch.linspace(0, 4, 32)
LOW, HIGH = torch.tensor([0.5, 0.1]), torch.tensor([2.0, 1.0])  # prior of frequency and damping


def prior(n: int) -> Tensor:
    r"""Draws parameters, in units in which the prior is uniform on :math:`[-1, 1]`."""
    return 2 * torch.rand(n, 2) - 1


def simulate(theta: Tensor) -> Tensor:
    r"""Observes a damped oscillator with these parameters, with noise."""
    frequency, damping = (LOW + (theta + 1) / 2 * (HIGH - LOW)).unsqueeze(-1).unbind(-2)
    signal = torch.exp(-damping * TIMES) * torch.cos(2 * math.pi * frequency * TIMES)
    return signal + 0.05 * torch.randn_like(signal)


def build() -> GuardedFlow:
    r"""A posterior: an encoder of observations, guarded, and a robust flow given its embedding."""
    encoder = nn.Sequential(
        nn.Linear(len(TIMES), 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    )
    conditioner = flowguard.OODConditioner(encoder, policy="warn", alpha=0.01)
    return GuardedFlow(RobustNSF(2, 8, transforms=3), conditioner)


def train(posterior: GuardedFlow, steps: int) -> None:
    r"""Trains encoder and flow together; the guard is not there yet and costs nothing."""
    optimizer = torch.optim.Adam(posterior.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        theta = prior(256)
        loss = -posterior(simulate(theta)).log_prob(theta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:4d}   loss {loss.item():6.3f}")


def arm(posterior: GuardedFlow) -> None:
    r"""Fits the guard to the simulations, and calibrates it on others."""
    posterior.conditioner.fit(simulate(prior(8192)), progress=False)
    posterior.conditioner.calibrate(simulate(prior(2048)), progress=False)
    posterior.eval()


class Result(NamedTuple):
    r"""What came out."""

    observations: Tensor
    truth: Tensor
    samples: Tensor
    watch: Monitor
    warned: list[str]
    calibration: Tensor


def infer(posterior: GuardedFlow) -> Result:
    r"""Asks for the posterior of an honest observation and of one with a drift."""
    truth = torch.tensor([[0.2, -0.3]])
    honest = simulate(truth)
    observations = torch.cat((honest, honest + 0.5 * TIMES))

    with warnings.catch_warnings(record=True) as caught, flowguard.monitor(posterior) as watch:
        warnings.simplefilter("always")
        samples = posterior(observations).sample((4096,))

    warned = [str(w.message) for w in caught if issubclass(w.category, OODContextWarning)]
    scores = posterior.conditioner.score(simulate(prior(2048)))
    return Result(observations, truth, samples, watch, warned, scores.levels["level1"].score)


def tell(result: Result) -> None:
    report = result.watch.report
    if report is None:
        raise RuntimeError("the monitor heard nothing: was the posterior called?")
    for name, p, flagged in zip(
        ("honest", "drifting"), report.p_value, report.flagged, strict=True
    ):
        print(f"{name:9s} p-value {p:.4f}   {'OUT OF DISTRIBUTION' if flagged else 'fine'}")
    for message in result.warned:
        print(f"warning: {message}")
    for name, samples in zip(("honest", "drifting"), result.samples.unbind(1), strict=True):
        mean, std = samples.mean(0).tolist(), samples.std(0).tolist()
        print(
            f"{name:9s} posterior mean {mean[0]:+.2f} {mean[1]:+.2f}, std {std[0]:.2f} {std[1]:.2f}"
        )


def plot(result: Result, path: Path) -> None:
    r"""Draws the observations, their posteriors, and where they lie among the simulations."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report = result.watch.report
    if report is None:
        raise RuntimeError("the monitor heard nothing: was the posterior called?")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    colors = ("C0", "C3")
    for i, (name, color) in enumerate(zip(("honest", "drifting"), colors, strict=True)):
        left.plot(TIMES, result.observations[i], color=color, label=name)
        middle.scatter(*result.samples[:1000, i].T, s=2, alpha=0.4, color=color)
        score = report.levels["level1"].score[i].sqrt()
        right.axvline(score, color=color, label=f"{name}: p = {report.p_value[i]:.4f}")
    left.set(title="Observations", xlabel="time")
    left.legend()
    middle.plot(*result.truth.T, "k+", ms=12, mew=2, label="truth")
    middle.set(title="Posteriors", xlabel="frequency", ylabel="damping", xlim=(-1.5, 1.5))
    middle.set_ylim(-1.5, 1.5)
    middle.legend()
    right.hist(result.calibration.sqrt(), bins=50, color="0.7", label="new simulations")
    right.set(title="Distance from the simulations", xlabel="Mahalanobis distance")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("sbi_guarded.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    posterior = build()
    train(posterior, options.steps)
    arm(posterior)
    result = infer(posterior)
    tell(result)
    plot(result, options.output)
    return result


if __name__ == "__main__":
    main()
