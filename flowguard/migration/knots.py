r"""Knots: rational-quadratic splines of nflows and normflows, and the robust ones through the same
points.

Both libraries have the same splines, with the same names for their options, and compute widths,
heights and slopes of the bins from the same logits.
"""

__all__ = ["HostSpline", "Knots", "width_of"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch.nn as nn
from torch import Tensor

from flowguard.spline.invert import unconstrain_softmax
from flowguard.transforms import RobustSpline, Univariate

Logits = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Knots:
    r"""How a host makes knots of what a network says.

    Arguments:
        bound: The bound :math:`B` of the box.
        least: The least width and height, as shares of the box, and the least slope at a knot.
        slope: The least slope of the robust splines.
        width: What the host divides logits of widths and heights by, squared.
    """

    bound: float
    least: tuple[float, float, float]
    slope: float | None
    width: int = 1

    @classmethod
    def of(cls, layer: Any, slope: float | None, width: int = 1) -> Self:
        r"""Returns what a layer of nflows or normflows does.

        Arguments:
            layer: The layer.
            slope: The least slope of the robust splines.
            width: What the host divides logits of widths and heights by, squared.
        """
        least = (layer.min_bin_width, layer.min_bin_height, layer.min_derivative)
        return cls(float(layer.tail_bound), least, slope, width)

    def logits(self, phi: Tensor) -> Logits:
        r"""Returns the logits of widths, heights and slopes, as the host takes them.

        Arguments:
            phi: What the network says about each feature, with shape :math:`(*, 3 K - 1)`.
        """
        bins = (phi.shape[-1] + 1) // 3
        widths, heights, slopes = phi.split((bins, bins, bins - 1), dim=-1)
        return widths / self.width**0.5, heights / self.width**0.5, slopes

    def robust(self, logits: Logits) -> RobustSpline:
        r"""Returns the robust spline through the knots that the host makes of these logits."""
        w, h, d = unconstrain_softmax(*logits, least=self.least, slope=self.slope)
        return RobustSpline(w, h, d, bound=self.bound, slope=self.slope)


class HostSpline(Univariate):
    r"""Creates the spline of a host with these logits, to be compared with.

    Arguments:
        function: The host's ``unconstrained_rational_quadratic_spline``.
        knots: How the host makes knots of the logits.
        logits: The logits of widths, heights and slopes.
    """

    def __init__(self, function: Callable[..., Any], knots: Knots, logits: Logits) -> None:
        super().__init__()
        self.function, self.knots, self.logits = function, knots, logits

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        least_width, least_height, least_slope = self.knots.least
        y, ladj = self.function(
            x,
            *self.logits,
            inverse=inverse,
            tails="linear",
            tail_bound=self.knots.bound,
            min_bin_width=least_width,
            min_bin_height=least_height,
            min_derivative=least_slope,
        )
        return y, ladj

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, inverse=False)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(y, inverse=True)


def width_of(net: nn.Module, *names: str) -> int:
    r"""Returns the width of a network, if it tells under one of these names, otherwise 1."""
    return next((int(getattr(net, name)) for name in names if hasattr(net, name)), 1)
