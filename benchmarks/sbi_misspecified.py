r"""Misspecified simulators: who tells of an observation that the simulator would not make.

On the examples of sbi's tutorial on misspecification: a Gaussian whose prior has another mean, and
the Hodgkin-Huxley neuron with conductances outside of the prior, by its summary statistics and by
its trace through an embedding net. For each: the area under the ROC curve of single observations,
drawn as the simulations were against drawn from elsewhere, by the guard, by sbi's MMD of one
observation and of a batch, and by sbi's marginal log-probability; and the seconds that each takes
to be ready and for one observation more, sbi's with the test that it comes with.

    python benchmarks/sbi_misspecified.py        # about ten minutes on one core
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from sbi.diagnostics.misspecification import (
    calc_misspecification_logprob,
    calc_misspecification_mmd,
)
from sbi.inference import NPE
from sbi.inference.trainers.marginal import MarginalTrainer
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.embedding_nets import FCEmbedding
from sbi.utils import BoxUniform
from sbi_toys import quiet
from torch import Tensor
from torch.distributions import MultivariateNormal

from flowguard.integrations.sbi import protect
from flowguard.ood.metrics import auroc

BATCH = 10


def gaussian(theta: Tensor) -> Tensor:
    return theta + torch.randn_like(theta)


def _rate(u: Tensor) -> Tensor:
    r"""The function u / (exp(u) - 1), which is 1 at zero."""
    small = u.abs() < 1e-6
    safe = torch.where(small, 1.0, u)
    return torch.where(small, 1 - u / 2, safe / safe.expm1())


def traces(theta: Tensor) -> Tensor:
    r"""Simulates the voltage of a neuron (Pospischil et al., 2008) under a step of current.

    Arguments:
        theta: The conductances of sodium and potassium, with shape :math:`(N, 2)`.
    """
    dt, every = 0.025, 8  # milliseconds, and steps between two that are returned
    g_na, g_k = theta.double().unbind(-1)
    leak, g_m, slow, threshold = 0.1, 0.07, 6e2, -60.0
    e_na, e_k, e_leak = 53.0, -107.0, -70.0
    area = torch.pi * 70e-4**2
    v = torch.full_like(g_na, -70.0)
    gates: list[Tensor] | None = None
    kept = []
    for step in range(int(120 / dt)):
        u = v - threshold
        am, bm = 0.32 * 4 * _rate(-(u - 13) / 4), 0.28 * 5 * _rate((u - 40) / 5)
        ah, bh = 0.128 * (-(u - 17) / 18).exp(), 4 / (1 + (-(u - 40) / 5).exp())
        an, bn = 0.032 * 5 * _rate(-(u - 15) / 5), 0.5 * (-(u - 10) / 40).exp()
        p = 1 / (1 + (-(v + 35) / 10).exp())
        tau_p = slow / (3.3 * ((v + 35) / 20).exp() + (-(v + 35) / 20).exp())
        ends = [am / (am + bm), ah / (ah + bh), an / (an + bn), p]
        taus = [1 / (am + bm), 1 / (ah + bh), 1 / (an + bn), tau_p]
        if gates is None:
            gates = ends
        gates = [
            q + (end - q) * -torch.expm1(-dt / tau)
            for q, end, tau in zip(gates, ends, taus, strict=True)
        ]
        m, h, n, p = gates
        current = 5e-4 / area if 10 <= step * dt < 110 else 0.0
        conductances = [leak, g_na * m**3 * h, g_k * n**4, g_m * p]
        whole: Any = sum(conductances)
        drive = sum(c * e for c, e in zip(conductances, (e_leak, e_na, e_k, e_k), strict=True))
        noise = 0.1 * torch.randn_like(v) / dt**0.5
        end = (drive + current + noise) / whole
        v = end + (v - end) * (-dt * whole).exp()
        if step % every == 0:
            kept.append(v)
    return torch.stack(kept, -1).float()


def statistics(trace: Tensor) -> Tensor:
    r"""Returns the number of spikes, the resting potential and its deviation, and the first four
    moments under the current, with shape :math:`(N, 7)`."""
    step = 120 / trace.shape[-1]
    rest, stimulus = trace[:, : int(10 / step)], trace[:, int(10 / step) : int(110 / step)]
    above = (stimulus > -10).float()
    spikes = (above.diff(dim=-1) > 0).sum(-1).float()
    mean, deviation = stimulus.mean(-1), stimulus.std(-1)
    z = (stimulus - mean[:, None]) / deviation[:, None]
    columns = [spikes, rest.mean(-1), rest.std(-1), mean, deviation]
    return torch.stack([*columns, z.pow(3).mean(-1), z.pow(4).mean(-1)], -1)


def gaussian_of(offset: float) -> Callable[[int], tuple[Tensor, Tensor, Any, Tensor]]:
    def draw(count: int) -> tuple[Tensor, Tensor, Any, Tensor]:
        prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
        theta = prior.sample((count,))
        return theta, gaussian(theta), prior, gaussian(offset + prior.sample((count,)))

    return draw


def neuron(
    read: Callable[[Tensor], Tensor],
) -> Callable[[int], tuple[Tensor, Tensor, Any, Tensor]]:
    def draw(count: int) -> tuple[Tensor, Tensor, Any, Tensor]:
        prior = BoxUniform(torch.tensor([0.5, 1e-4]), torch.tensor([40.0, 5.0]))
        other = BoxUniform(torch.tensor([40.0, 5.0]), torch.tensor([80.0, 15.0]))
        theta = prior.sample((count,))
        both = read(traces(torch.cat((theta, other.sample((count // 2,))))))
        return theta, both[:count], prior, both[count:]

    return draw


EXAMPLES: dict[str, tuple[Callable[..., Any], Callable[[int], Any]]] = {
    "Gaussian, mean 1": (gaussian_of(1.0), lambda d: FCEmbedding(d, d, 2, 20)),
    "Gaussian, mean 2": (gaussian_of(2.0), lambda d: FCEmbedding(d, d, 2, 20)),
    "Gaussian, mean 4": (gaussian_of(4.0), lambda d: FCEmbedding(d, d, 2, 20)),
    "neuron, statistics": (neuron(statistics), lambda d: torch.nn.Identity()),
    "neuron, trace": (neuron(lambda t: t), lambda d: FCEmbedding(d, 20, 4, 50)),
}


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    with quiet():
        result = call()
    return result, time.perf_counter() - start


def measured(name: str, count: int, tested: int, epochs: int) -> dict[str, tuple[float, ...]]:
    r"""Returns area, seconds to be ready and seconds for one observation, by the method."""
    torch.manual_seed(0)
    draw, embedding = EXAMPLES[name]
    theta, x, prior, odd = draw(count + tested)
    theta, x, honest, odd = theta[:count], x[:count], x[count:], odd[:tested]
    inference = NPE(
        prior,
        density_estimator=posterior_nn("maf", embedding_net=embedding(x.shape[1])),
        show_progress_bars=False,
    )
    with quiet():
        inference.append_simulations(theta, x).train(max_num_epochs=epochs)
    posterior = inference.build_posterior()

    def area(score: Callable[[Tensor], Tensor]) -> float:
        with quiet():
            low, high = score(honest), score(odd)
        truth = torch.cat((torch.zeros(len(low)), torch.ones(len(high)))).bool()
        return float(auroc(torch.cat((low, high)), truth))

    found: dict[str, tuple[float, ...]] = {}
    guarded, ready = clocked(lambda: protect(posterior, theta, x))
    _, one = clocked(lambda: guarded.ood_score(honest[:1]))
    found["guard"] = (area(lambda t: guarded.ood_score(t).levels["embedding"].score), ready, one)

    mode = "embedding" if name != "neuron, statistics" else "x_space"

    def mmd(batch: Tensor, shuffles: int = 1) -> Tensor:
        return calc_misspecification_mmd(
            batch, x[:1000], inference, mode=mode, n_shuffle=shuffles
        )[1][1]

    for size, called in ((1, "MMD of one"), (BATCH, f"MMD of {BATCH}")):
        _, one = clocked(lambda: mmd(honest[:size], 1000))  # noqa: B023
        score = area(lambda t: torch.stack([mmd(b) for b in t.split(size) if len(b) == size]))  # noqa: B023
        found[called] = (score, 0.0, one)

    if name != "neuron, trace":  # of so many numbers no marginal flow is to be had
        trainer = MarginalTrainer(density_estimator="NSF")
        trainer.append_samples(x)
        marginal, ready = clocked(lambda: trainer.train(max_num_epochs=epochs))
        _, one = clocked(lambda: calc_misspecification_logprob(x[:1000], honest[:1], marginal))
        score = area(lambda t: -marginal.log_prob(t).detach())
        found["marginal log-probability"] = (score, ready, one)
    return found


def main(arguments: list[str] | None = None) -> dict[str, dict[str, tuple[float, ...]]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", nargs="+", default=list(EXAMPLES), choices=list(EXAMPLES))
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--tested", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2**31 - 1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| example | method | AUROC | s to be ready | s for one observation |")
    print("|---|---|---|---|---|")
    found = {}
    for name in options.examples:
        found[name] = measured(name, options.simulations, options.tested, options.epochs)
        for method, (area, ready, one) in found[name].items():
            print(f"| {name} | {method} | {area:.3f} | {ready:.2f} | {one:.4f} |", flush=True)
    return found


if __name__ == "__main__":
    main()
