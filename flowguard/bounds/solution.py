r"""Linear systems that a layer solves in its own arithmetic, however close to singular.

For :math:`A x = b` a layer computes some :math:`\hat x` with :math:`(A + \Delta) \hat x = b` and
:math:`|\Delta| \leq \gamma S`, where :math:`S = |A|` if :math:`A` is triangular, and the product of
the absolute values of its factors otherwise (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, theorems 8.5 and 9.4). So

.. math:: |\hat x - x| \leq P |\hat x| \leq (I - P)^{-1} P \, |x|, \quad P = \gamma |A^{-1}| S

as long as :math:`(I - P)^{-1} \geq 0`; the bound of first order, :math:`P |x|`, holds for
well-conditioned matrices only. The inverse itself is known in the same way: :math:`A X = I - R` for
a computed :math:`X`, and so :math:`|A^{-1} - X| \leq |X| (I - |R|)^{-1} |R|`.
"""

__all__ = ["FINE", "Solution", "solution"]

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowguard.bounds.regions import Region, gamma
from flowguard.bounds.relaxation import Product
from flowguard.bounds.steps import Linear, Refused, constant
from flowguard.numerics import inv_ex, lu

#: The rounding of float64, which the certificate is computed in.
FINE = 2.0**-53

#: How often the sum of a series is doubled, at most.
DOUBLINGS = 64

#: What counts as one operation: a layer may also invert its factors, and multiply those.
SLACK = 3

#: The largest number of the dtypes that systems are solved in.
LARGEST = torch.finfo(torch.float32).max

SINGULAR = "its matrix is singular, or too close to it"


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution(Linear):
    r"""The solution :math:`x = A^{-1} b` of a system with a constant matrix, factor by factor.

    It is a linear map by the inverse :math:`X`, as it was computed, with shape :math:`(C, C)`.

    Arguments:
        distance: A bound of :math:`|A^{-1} - X|`, with shape :math:`(C, C)`.
        sizes: Bounds of the absolute values of the inverse of each factor, in the order in which
            they are solved with, with shape :math:`(n, C, C)`.
        spreads: The matrices :math:`S_i` of each factor, with shape :math:`(n, C, C)`.
        work: The relative error of one operation of the solver, if it is finer than the model.
    """

    distance: Tensor
    sizes: Tensor
    spreads: Tensor
    work: float | None = None

    @property
    def operations(self) -> int:
        r"""Those of all that a layer may compute with."""
        return SLACK * (self.features + 3)

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns the region of :math:`A^{-1} b`, with the rounding error of the solver and that
        of a product, which a layer may use in its place; without end where the matrix is so close
        to singular that the computed solution may be anything."""
        known = self._known(region, roundoff)
        if known is None:
            return Region.cube(torch.full_like(region.box, math.inf))
        reach, slack = known
        out = region.linear(self.matrix, reach, 0.0, self.factors)
        ball = out.ball + slack.norm(dim=1)
        return replace(out, box=out.box + slack, ball=ball, own=out.own + slack)

    def link(self, region: Region, radius: float, roundoff: float) -> Product | None:
        r"""Returns the product with the inverse, with all that the solution may differ by."""
        known = self._known(region, roundoff)
        if known is None:
            return None
        reach, slack = known
        return Product(self.matrix, slack + region.product_slack(reach, 0.0, self.factors))

    def _known(self, region: Region, roundoff: float) -> tuple[Tensor, Tensor] | None:
        r"""What the rounding of factors is relative to, and how far each feature may be off
        besides; :py:`None` where there is no bound."""
        error, reach, peak = self._error(roundoff)
        far = region.largest
        # A solution that overflows on the way is lost, however small it would have been.
        if not peak < math.inf or (far <= LARGEST and not peak * far <= LARGEST):
            return None
        return SLACK * reach, region.box @ (self.distance + error).T

    def _error(self, roundoff: float) -> tuple[Tensor, Tensor, float]:
        r"""A matrix :math:`E` such that the rounding error is at most :math:`E |b|`, one such that
        the solution is at most that times :math:`|b|`, and the largest number on the way for
        :math:`|b| \leq 1`."""
        work = roundoff if self.work is None else min(self.work, roundoff)
        relative = gamma(self.operations, work)
        if self.work is None:  # a solver in float32 may use the matrix units
            relative += self.factors * (2 + self.factors) * (1 + relative)
        reach = torch.eye(self.features, dtype=self.matrix.dtype)
        error, peak = torch.zeros_like(reach), 1.0
        for size, spread in zip(self.sizes, self.spreads, strict=True):
            grown = _resolvent(relative * (size @ spread))
            if grown is None:
                return error, reach, math.inf
            exact = size @ reach
            error = size @ error + grown @ exact
            reach = exact + grown @ exact
            peak = max(peak, *(_largest(t) for t in (reach, spread @ reach)))
        return error + gamma(self.operations, roundoff) * reach, reach, peak


def solution(
    *factors: Tensor, name: str = "", work: float | None = None, convolution: bool = False
) -> Solution | Refused:
    r"""Returns the step of a system :math:`A_1 \cdots A_n x = b`, refused if it has no solution.

    Arguments:
        factors: The matrices :math:`A_i`, with shape :math:`(C, C)`, as the layer has them.
        name: The name of the part of the layer.
        work: The relative error of one operation of the solver, if it is finer than the model.
        convolution: Whether the layer multiplies with the inverse, as a convolution.

    Example:
        >>> step = solution(torch.tensor([[2.0, 0.0], [1.0, 4.0]]))
        >>> step.matrix
        tensor([[ 0.5000,  0.0000],
                [-0.1250,  0.2500]], dtype=torch.float64)
        >>> solution(torch.zeros(2, 2)).reason
        'its matrix is singular, or too close to it'
    """
    parts = [_inverted(constant(t)) for t in factors]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return Refused(name=name, reason=SINGULAR, depends="not at all")
    inverse = torch.eye(known[0].inverse.shape[0], dtype=torch.float64)
    distance = torch.zeros_like(inverse)
    rounding = gamma(len(inverse) + 3, FINE)
    for part in known:
        product = part.inverse.abs() @ inverse.abs()
        distance = part.size @ distance + part.distance @ inverse.abs() + rounding * product
        inverse = part.inverse @ inverse
    return Solution(
        name=name,
        matrix=inverse,
        convolution=convolution,
        distance=distance,
        sizes=torch.stack([part.size for part in known]),
        spreads=torch.stack([part.spread for part in known]),
        work=work,
    )


class _Inverted(NamedTuple):
    inverse: Tensor
    distance: Tensor
    size: Tensor
    spread: Tensor


def _inverted(matrix: Tensor) -> _Inverted | None:
    r"""What is known of the inverse of a factor."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    upper, lower = (torch.equal(matrix, t) for t in (matrix.triu(), matrix.tril()))
    if upper or lower:
        if not bool((matrix.diagonal() != 0).all()):
            return None
        inverse = torch.linalg.solve_triangular(matrix, eye, upper=upper)
        spread = matrix.abs()
    else:
        inverse, info = inv_ex(matrix)
        if info.item() or not bool(inverse.isfinite().all()):
            return None
        # The layer may choose other pivots where two are equal up to rounding, and gets other
        # factors, of the same size: so no element counts for less than what it may grow to.
        p, left, right = lu(matrix)
        spread = p @ (left.abs() @ right.abs()) + right.abs().max()
    size = inverse.abs()
    residual = (eye - matrix @ inverse).abs()
    residual = residual + gamma(len(matrix) + 3, FINE) * (matrix.abs() @ size + eye)
    grown = _resolvent(residual)
    if grown is None:
        return None
    distance = size @ grown
    return _Inverted(inverse, distance, size + distance, spread)


def _resolvent(p: Tensor) -> Tensor | None:
    r"""The series :math:`P + P^2 + \dots = (I - P)^{-1} P` of a matrix :math:`P \geq 0`, if it
    converges."""
    total, power = p, p
    for _ in range(DOUBLINGS):
        if not bool(total.isfinite().all()):
            break
        if _largest(power) <= FINE:
            return total
        # All is positive: nothing cancels, and what is zero stays so.
        total, power = total + power @ total, power @ power
    return None


def _largest(matrix: Tensor) -> float:
    r"""The largest number that the matrix makes of numbers up to one."""
    return torch.linalg.matrix_norm(matrix, math.inf).item()
