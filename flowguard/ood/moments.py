r"""Streaming moments and the shrinkage intensities that follow from them.

Sums of squares in float32 lose the covariance of features whose mean is far from zero (2 % error
and a negative eigenvalue were measured at mean 20). The moments here are central, in float64,
and two sets of them merge exactly, whether they come from two chunks or from two ranks.
"""

__all__ = ["Moments", "ledoit_wolf", "merge", "moments", "oas"]

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    r"""Central moments of :math:`n` vectors :math:`x_i`, with :math:`\delta_i = x_i - \bar{x}`."""

    n: Tensor
    r""":math:`n`, with shape :math:`()`."""
    mean: Tensor
    r""":math:`\bar{x}`, with shape :math:`(C)`."""
    scatter: Tensor
    r""":math:`\sum_i \delta_i \delta_i^\top`, with shape :math:`(C, C)`."""
    third: Tensor
    r""":math:`\sum_i \|\delta_i\|^2 \delta_i`, with shape :math:`(C)`."""
    fourth: Tensor
    r""":math:`\sum_i \|\delta_i\|^4`, with shape :math:`()`; what Ledoit and Wolf need."""


def moments(columns: Tensor) -> Moments:
    r"""Returns the moments of the columns of a float64 matrix with shape :math:`(C, N)`.

    Arguments:
        columns: The matrix, with shape :math:`(C, N)`.
    """
    count = columns.new_full((), columns.shape[1])
    mean = columns.mean(dim=1)
    delta = columns - mean[:, None]
    squared = delta.square().sum(dim=0)
    return Moments(count, mean, delta @ delta.T, delta @ squared, squared @ squared)


def _recentre(m: Moments, d: Tensor) -> Moments:
    r"""Moments about ``mean + d``; expand (δ - d) and use Σδ = 0."""
    n, squared, spread = m.n, d @ d, m.scatter @ d
    trace = m.scatter.trace()
    return Moments(
        n,
        m.mean + d,
        m.scatter + n * torch.outer(d, d),
        m.third - 2 * spread - d * (trace + n * squared),
        m.fourth + 4 * (d @ spread) + n * squared**2 - 4 * (d @ m.third) + 2 * squared * trace,
    )


def merge(a: Moments, b: Moments) -> Moments:
    r"""Returns the moments of the union of two samples.

    References:
        | Updating Formulae and a Pairwise Algorithm for Computing Sample Variances
          (Chan, Golub and LeVeque, 1979)

    Arguments:
        a: The moments of one sample.
        b: Those of the other.
    """
    if not a.n:
        return b
    if not b.n:
        return a
    total = a.n + b.n
    gap = b.mean - a.mean
    a = _recentre(a, gap * (b.n / total))
    b = _recentre(b, -gap * (a.n / total))
    return Moments(total, a.mean, a.scatter + b.scatter, a.third + b.third, a.fourth + b.fourth)


def ledoit_wolf(m: Moments) -> Tensor:
    r"""Returns the shrinkage intensity of Ledoit and Wolf, in :math:`[0, 1]`.

    References:
        | A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices
          (Ledoit and Wolf, 2004)

    Arguments:
        m: The moments.
    """
    covariance = m.scatter / m.n
    distance = covariance.square().sum() - covariance.trace() ** 2 / len(m.mean)
    noise = (m.fourth / m.n - covariance.square().sum()) / m.n
    return torch.where(distance > 0, (noise / distance).clamp(0, 1), 1.0)


def oas(m: Moments) -> Tensor:
    r"""Returns the oracle approximating shrinkage intensity, in :math:`[0, 1]`.

    As scikit-learn does, this leaves out the two terms in :math:`2/d` of the paper's formula.

    References:
        | Shrinkage Algorithms for MMSE Covariance Estimation (Chen et al., 2010)
        | https://arxiv.org/abs/0907.4698

    Arguments:
        m: The moments.
    """
    size = len(m.mean)
    covariance = m.scatter / m.n
    energy = covariance.square().mean()
    level = (covariance.trace() / size) ** 2
    excess = (m.n + 1) * (energy - level / size)
    return torch.where(excess > 0, ((energy + level) / excess).clamp(0, 1), 1.0)
