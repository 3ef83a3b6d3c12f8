r"""A warning where an observation is not like the simulations, for sbi 0.27.0.

    with applied():
        posterior = inference.build_posterior()
        posterior.set_default_x(x_o)  # warns, if no simulation is as strange as x_o

By hand: `posterior.x_check = MahalanobisCheck(x, embedding_net)`, or `None` for silence.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from sbi.inference import NPE_A, DirectPosterior, MCMCPosterior, VIPosterior
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from sbi.inference.trainers.npe import npe_base
from torch import Tensor, nn

ALPHA = 0.01
MAX_FEATURES = 256


class MisspecificationWarning(UserWarning):
    r"""The observation is not like the simulations that the posterior was trained on."""


class MahalanobisCheck:
    r"""Creates a test whether an observation is like the simulations.

    A Gaussian is fitted to one half of the simulations. The distances of the other half, which it
    has not seen, rank that of an observation: where it is one more simulation, p is at most α with
    a probability of at most α, whatever the distribution (Bates et al., 2023, arXiv 2104.08279).

    Args:
        x: Simulations, of shape (N, *event_shape). Rows that are not finite are left out.
        embedding_net: The trained embedding, whose output is tested where x itself is too large.
            It may be blind to what it was trained to ignore.
        alpha: The rate of false alarms.
        max_features: The largest number of elements of x that is tested itself.
        max_rows: How many simulations are used at most.
        seed: Of the choice of rows and halves.
    """

    def __init__(
        self,
        x: Tensor,
        embedding_net: nn.Module | None = None,
        alpha: float = ALPHA,
        max_features: int = MAX_FEATURES,
        max_rows: int = 20_000,
        seed: int = 0,
    ) -> None:
        x = finite(x)
        if len(x) < 4 / alpha:
            raise ValueError(
                f"x must have at least {4 / alpha:.0f} finite rows for alpha={alpha}; got {len(x)}"
            )
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        x = x[order[:max_rows].to(x.device)]
        self.alpha, self.event_shape = alpha, x.shape[1:]
        self.embedding_net = embedding_net
        self.max_features = max_features
        self.whole = x[0].numel() <= max_features
        fitted, held_out = self._features(x).tensor_split(2)
        self.mean = fitted.mean(0)
        self.scale = fitted.std(0).clamp(min=1e-12)
        unit = (fitted - self.mean) / self.scale
        # Shrunk a little towards the diagonal, as embeddings may have features that agree.
        covariance = unit.T @ unit / (len(unit) - 1)
        covariance += 1e-3 * torch.eye(len(covariance), dtype=unit.dtype, device=unit.device)
        self.factor = torch.linalg.cholesky(covariance)
        self.calibration = self._distances(held_out).sort().values

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        r"""What is tested, in float64, which not every device has: (N, features) on the CPU."""
        if self.whole:
            return x.flatten(1).cpu().double()
        if self.embedding_net is None:
            raise ValueError(
                f"x of more than {self.max_features} elements needs an embedding_net; "
                f"got {x[0].numel()} elements"
            )
        net, mode = self.embedding_net, self.embedding_net.training
        device = next(net.parameters(), x).device  # simulations may be kept on another
        try:
            embedded = net.eval()(x.to(device))
        finally:
            net.train(mode)
        return embedded.flatten(1).cpu().double()

    def _distances(self, features: Tensor) -> Tensor:
        unit = (features - self.mean) / self.scale
        solved = torch.linalg.solve_triangular(self.factor, unit.T, upper=False)
        return solved.square().sum(0)

    def p_values(self, x: Tensor) -> Tensor:
        r"""A p-value for each observation of x, of shape (n, *event_shape)."""
        distances = self._distances(self._features(x.reshape(-1, *self.event_shape)))
        at_least = len(self.calibration) - torch.searchsorted(self.calibration, distances)
        return (1 + at_least) / (len(self.calibration) + 1)


def finite(x: Tensor) -> Tensor:
    r"""The rows of x that are finite."""
    return x[x.flatten(1).isfinite().all(1)]


def simes(p: Tensor) -> float:
    r"""A p-value of all observations being like the simulations, of those of each.

    The smallest of n p-values times n would never be small enough, where there are few simulations
    and many observations: here k of them at the least possible one count k times. It holds for
    p-values that share their calibration (Bates et al., 2023).
    """
    ranks = torch.arange(1, len(p) + 1, dtype=p.dtype)
    return (len(p) * p.sort().values / ranks).min().item()


def check(posterior: NeuralPosterior, x: Tensor) -> None:
    r"""Warns where an observation is not like the simulations. Nothing else is done with it."""
    test = getattr(posterior, "x_check", None)
    if test is None:
        return
    p = simes(test.p_values(x))
    if p < test.alpha:
        warnings.warn(
            f"The observation is not like the simulations (p = {p:.2g}): the simulator may be "
            "misspecified, and the posterior is an extrapolation. See "
            "sbi.diagnostics.misspecification, or set `posterior.x_check = None` for silence.",
            MisspecificationWarning,
            stacklevel=3,
        )


def set_default_x(released: Callable) -> Callable:
    def method(self: NeuralPosterior, x: Tensor) -> NeuralPosterior:
        released(self, x)
        check(self, self._x)
        return self

    return method


def x_else_default_x(released: Callable) -> Callable:
    r"""The method `_x_else_default_x`, through which an `x=` of `sample` and the like goes."""

    def method(self: NeuralPosterior, x: Tensor | None) -> Tensor:
        processed = released(self, x)
        if x is not None:
            check(self, processed)
        return processed

    return method


def batched(released: Callable) -> Callable:
    r"""`sample_batched` or `log_prob_batched`, which look at their observations themselves."""

    def method(self: NeuralPosterior, first: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        found = released(self, first, x, *args, **options)
        check(self, torch.as_tensor(x, dtype=torch.float32))
        return found

    return method


def check_of(trainer: Any, net: Any) -> MahalanobisCheck | None:
    r"""The test of the simulations of a training; none, where there are too few or too large."""
    if not trainer._x_roundwise:  # an estimator from elsewhere
        return None
    x, embedding = finite(trainer.get_simulations()[1]), getattr(net, "embedding_net", None)
    if len(x) < 4 / ALPHA or (embedding is None and x[0].numel() > MAX_FEATURES):
        return None
    return MahalanobisCheck(x, embedding)


def build_posterior(released: Callable) -> Callable:
    r"""The method of NPE: the simulations of the training and the embedding make the test."""

    def method(self: Any, *args: Any, **options: Any) -> NeuralPosterior:
        posterior = released(self, *args, **options)
        net = options.get("density_estimator", args[0] if args else None)
        posterior.x_check = check_of(self, self._neural_net if net is None else net)
        return posterior

    return method


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into sbi, and takes them out again."""
    changes = [
        (NeuralPosterior, "set_default_x", set_default_x),
        (NeuralPosterior, "_x_else_default_x", x_else_default_x),
        (DirectPosterior, "log_prob_batched", batched),
        *(
            (made, "sample_batched", batched)
            for made in (DirectPosterior, MCMCPosterior, VIPosterior)
        ),
        # NPE_A makes a posterior of its own out of the first.
        *(
            (made, "build_posterior", build_posterior)
            for made in (npe_base.PosteriorEstimatorTrainer, NPE_A)
        ),
    ]
    with ExitStack() as stack:
        for made, name, change in changes:
            stack.enter_context(patch.object(made, name, change(getattr(made, name))))
        yield
