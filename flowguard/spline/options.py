r"""How a spline is to be computed, and what follows from that for its parameterisation."""

__all__ = ["Options", "Usual"]

import math
from typing import NamedTuple

import torch

from flowguard.spline import constants


class Usual(NamedTuple):
    r"""The usual parameterisation: a softmax over all bins for their sizes, and slopes that are
    raised by a least one (Durkan et al., 2019)."""

    width: float  # the least width of a bin, as a share of the box
    height: float
    slope: float  # the least slope at a knot
    gain: float = 1.0  # of the softplus that comes on top
    # If not None, slopes are exponentials instead, of what is clipped to this smoothly; logits are
    # clipped to the half of it.
    clip: float | None = None


class Options(NamedTuple):
    r"""All that is known of a spline before its numbers are.

    What follows from it are methods: properties of named tuples are not known to the compiler of
    torch 2.6.
    """

    work: torch.dtype  # to compute in
    bound: float  # of the box
    slope: float | None  # the least one; None for the published parameterisation
    shift_bound: float | None = None  # None for a free shift
    inverse: bool = False  # whether to apply the inverse map
    steep: bool = True  # whether the logarithm of the slope is wanted
    prepared: bool = False  # whether the parameters are what was made of those of two bins ahead
    usual: Usual | None = None  # the parameterisation, if it is not ours

    def least(self, bins: int) -> float:
        r"""The least width and height of a bin, as a share of the box."""
        return min(constants.min_fraction(), 0.5 / bins)

    def low(self) -> float:
        r"""The least slope raised by a thousandth, so that rounding cannot break the bound."""
        return 0.0 if self.slope is None else 1.001 * self.slope

    def share(self) -> float:
        r"""The share :math:`\lambda` that keeps all secants in :math:`[\lambda, 1/\lambda]`."""
        return math.sqrt(2.0 * self.low())

    def unit(self) -> tuple[float, float]:
        r"""A number in [1/2, 1) and a power of two whose product is the bound.

        Scaled by that power, which no digit is lost by, products of sizes of bins are finite.
        """
        fraction, exponent = math.frexp(self.bound)
        return fraction, math.ldexp(1.0, exponent)

    def lean(self) -> float:
        r"""The :math:`\kappa` of the slope at the knot between two bins."""
        return min(((1 - self.share()) / (1 + self.share())) ** 2, constants.most_lean())

    def reach(self) -> float:
        r"""The knot for infinite logits, in the box's units and without what the other one adds."""
        return self.unit()[0] * (1 - 2 * self.least(2)) / (1 + self.share())

    def softmax(self, bins: int) -> tuple[float, float]:
        r"""What the softmax over more bins is multiplied by, and then raised by."""
        total, least = 2 * self.bound / (1 + self.share()), self.least(bins)
        return total * (1 - bins * least), total * least
