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
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from sbi.inference.trainers.npe import npe_base
from torch import Tensor, nn


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
        alpha: float = 0.01,
        max_features: int = 256,
        max_rows: int = 20_000,
        seed: int = 0,
    ) -> None:
        x = x[x.flatten(1).isfinite().all(1)]
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
        r"""What is tested, in float64: (N, features)."""
        if self.whole:
            return x.flatten(1).double()
        if self.embedding_net is None:
            raise ValueError(
                f"x of more than {self.max_features} elements needs an embedding_net; "
                f"got {x[0].numel()} elements"
            )
        mode = self.embedding_net.training
        embedded = self.embedding_net.eval()(x)
        self.embedding_net.train(mode)
        return embedded.flatten(1).double()

    def _distances(self, features: Tensor) -> Tensor:
        unit = (features - self.mean) / self.scale
        solved = torch.linalg.solve_triangular(self.factor, unit.T, upper=False)
        return solved.square().sum(0)

    def p_values(self, x: Tensor) -> Tensor:
        r"""A p-value for each observation of x, of shape (n, *event_shape)."""
        distances = self._distances(self._features(x.reshape(-1, *self.event_shape)))
        at_least = len(self.calibration) - torch.searchsorted(self.calibration, distances)
        return (1 + at_least) / (len(self.calibration) + 1)


def check(posterior: NeuralPosterior, x: Tensor) -> None:
    r"""Warns where an observation is not like the simulations. Nothing else is done with it."""
    test = getattr(posterior, "x_check", None)
    if test is None:
        return
    p = test.p_values(x)
    worst = p.min().item()
    if worst < test.alpha / len(p):  # as many tests as observations
        warnings.warn(
            f"The observation is not like the simulations (p = {worst:.2g}): the simulator may be "
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


def build_posterior(released: Callable) -> Callable:
    r"""The method of NPE: the simulations of the training and the embedding make the test."""

    def method(self: Any, *args: Any, **options: Any) -> NeuralPosterior:
        posterior = released(self, *args, **options)
        x = self.get_simulations()[1]
        if len(x) >= 400:
            net = options.get("density_estimator", args[0] if args else None) or self._neural_net
            embedding = getattr(net, "embedding_net", None)
            posterior.x_check = MahalanobisCheck(x, embedding)
        return posterior

    return method


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into sbi, and takes them out again."""
    made, trainer = NeuralPosterior, npe_base.PosteriorEstimatorTrainer
    with ExitStack() as stack:
        put = lambda *to: stack.enter_context(patch.object(*to))  # noqa: E731
        put(made, "set_default_x", set_default_x(made.set_default_x))
        put(made, "_x_else_default_x", x_else_default_x(made._x_else_default_x))
        put(trainer, "build_posterior", build_posterior(trainer.build_posterior))
        yield
