r"""Measures how often each test tells an observation that the simulator cannot have made.

    python upstream/sbi-set-x/figures.py     # some minutes on one core

A damped oscillator, observed at 32 times with noise, of which a posterior of frequency and damping
is trained with an embedding. Rates at α = 0.05, of 100 observations of each kind.
"""

import importlib.util
import math
import time
import warnings
from pathlib import Path

import torch
from sbi.diagnostics import misspecification
from sbi.inference import NPE, MarginalTrainer
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform
from torch import Tensor, nn

TIMES = torch.linspace(0, 4, 32)
PRIOR = BoxUniform(torch.tensor([0.5, 0.1]), torch.tensor([2.0, 1.0]))
ALPHA, EACH, SHUFFLES, ROWS = 0.05, 100, 200, 300
EPOCHS = 20


def simulate(theta: Tensor) -> Tensor:
    frequency, damping = theta.unsqueeze(-1).unbind(-2)
    signal = torch.exp(-damping * TIMES) * torch.cos(2 * math.pi * frequency * TIMES)
    return signal + 0.05 * torch.randn_like(signal)


def spiked(x: Tensor) -> Tensor:
    at = torch.randint(32, (len(x), 1))
    return x.scatter_add(1, at, torch.ones(len(x), 1) * 0.5)


KINDS = {
    "simulated": lambda x: x,
    "twice the noise": lambda x: x + 0.05 * math.sqrt(3) * torch.randn_like(x),
    "a drift of 0.2": lambda x: x + 0.05 * TIMES,
    "a spike of 0.5": spiked,
    "1.5 times as large": lambda x: 1.5 * x,
}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    file = Path(__file__).with_name("fix.py")
    spec = importlib.util.spec_from_file_location("fix_sbi_set_x", file)
    fix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fix)

    theta = PRIOR.sample((4000,))
    x = simulate(theta)
    net = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    )
    build = posterior_nn("maf", embedding_net=net)
    inference = NPE(PRIOR, density_estimator=build, show_progress_bars=False)
    estimator = inference.append_simulations(theta, x).train(max_num_epochs=EPOCHS)
    embed = estimator.embedding_net.eval()

    started = time.process_time()
    marginal = MarginalTrainer(density_estimator="nsf")
    marginal = marginal.append_samples(x).train(max_num_epochs=EPOCHS)
    print(f"the marginal flow took {time.process_time() - started:.0f} s of training")

    held_out = simulate(PRIOR.sample((2000,)))
    held_log = marginal.log_prob(held_out).detach()

    def by_mmd(observed: Tensor, simulations: Tensor) -> Tensor:
        base = misspecification.calculate_baseline_mmd(
            1, simulations, n_shuffle=SHUFFLES, max_samples=ROWS
        )
        mmds = [
            misspecification.compute_rbf_mmd_median_heuristic(row[None], simulations[:ROWS])
            for row in observed
        ]
        return 1 - (base < torch.stack(mmds)[:, None]).float().mean(1)

    started = time.process_time()
    whole = fix.MahalanobisCheck(x)
    print(f"the check took {time.process_time() - started:.2f} s to fit")
    tests = {
        "guard of x": whole.p_values,
        "guard of the embedding": fix.MahalanobisCheck(x, embed, max_features=0).p_values,
        "MMD of x": lambda o: by_mmd(o, x),
        "MMD of the embedding": lambda o: by_mmd(embed(o).detach(), embed(x).detach()),
        "log-probability": lambda o: (
            (held_log <= marginal.log_prob(o).detach()[:, None]).float().mean(1)
        ),
    }
    observed = {kind: change(simulate(PRIOR.sample((EACH,)))) for kind, change in KINDS.items()}
    print("| test |", " | ".join(KINDS), "| s for 100 |")
    for name, test in tests.items():
        started = time.process_time()
        rates = [(test(o) < ALPHA).float().mean().item() for o in observed.values()]
        took = (time.process_time() - started) / len(KINDS)
        print(
            f"| {name} |",
            " | ".join(f"{100 * r:.0f} %" for r in rates),
            f"| {took:.2g} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
