r"""What the benchmarks of sbi share: its simulators and posteriors trained alike."""

__all__ = ["SIMULATORS", "linear_gaussian", "moons_posterior", "trained", "two_moons"]

import contextlib
import io
import logging
import math
import warnings
from typing import Any

import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform
from torch import Tensor

#: The prior of both, and the numbers of parameters.
PRIORS = {
    "two moons": BoxUniform(-torch.ones(2), torch.ones(2)),
    "linear Gaussian": BoxUniform(-2 * torch.ones(3), 2 * torch.ones(3)),
}


def _corner(theta: Tensor) -> Tensor:
    return torch.stack((-theta.sum(-1).abs(), theta[..., 1] - theta[..., 0]), -1) / math.sqrt(2)


def two_moons(theta: Tensor) -> Tensor:
    r"""Simulates two moons (Greenberg et al., 2019): a crescent, moved by the parameters.

    Arguments:
        theta: The parameters, with shape :math:`(N, 2)`.
    """
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    crescent = torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), -1)
    return crescent + _corner(theta)


def moons_posterior(x: Tensor, n: int) -> Tensor:
    r"""Draws from the posterior of two moons, which is known in closed form.

    Given the crescent's point :math:`p`, the parameters solve :math:`x - p = (-|s|, d)/\sqrt 2` with
    their sum :math:`s` and difference :math:`d`: two solutions of equal weight, and one rejects those
    outside of the prior and points for which there is none. The map from :math:`(|s|, d)` has a
    constant Jacobian, so that this is exact.

    Arguments:
        x: The observation, with shape :math:`(2)`.
        n: The number of draws.
    """
    kept: list[Tensor] = []
    while sum(map(len, kept)) < n:
        point = two_moons(torch.zeros(4 * n, 2))
        total, difference = (math.sqrt(2) * (x - point)).unbind(-1)
        possible = total <= 0
        total = torch.where(torch.rand(4 * n) < 0.5, total, -total)
        theta = torch.stack((total - difference, total + difference), -1) / 2
        kept.append(theta[possible & (theta.abs() <= 1).all(-1)])
    return torch.cat(kept)[:n]


def linear_gaussian(theta: Tensor) -> Tensor:
    r"""Simulates the linear Gaussian: the parameters, shifted, with correlated noise.

    Arguments:
        theta: The parameters, with shape :math:`(N, 3)`.
    """
    factor = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.4, 0.0], [-0.1, 0.2, 0.3]])
    return theta - 1 + torch.randn(len(theta), 3) @ factor.T


SIMULATORS = {"two moons": two_moons, "linear Gaussian": linear_gaussian}


def trained(simulator: str, model: Any, count: int, **options: Any) -> Any:
    r"""Returns a posterior, its parameters and its simulations.

    Arguments:
        simulator: The name of the simulator.
        model: The density estimator, as NPE takes it.
        count: The number of simulations.
        options: Those of the training.
    """
    torch.manual_seed(0)
    prior = PRIORS[simulator]
    theta = prior.sample((count,))
    x = SIMULATORS[simulator](theta)
    inference = NPE(prior, density_estimator=model, show_progress_bars=False)
    with quiet():
        inference.append_simulations(theta, x).train(**options)
    return inference.build_posterior(), theta, x


@contextlib.contextmanager
def quiet() -> Any:
    r"""Silences what sbi prints, logs and warns of, within."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
