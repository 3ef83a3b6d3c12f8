r"""A rational-quadratic spline whose inverse does not end in an assertion, for normflows 1.7.3.

with applied():
    samples, log_q = model.sample(1000)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from normflows.utils import splines
from torch import Tensor
from torch.nn import functional as F


def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float | Tensor = 0.0,
    right: float | Tensor = 1.0,
    bottom: float | Tensor = 0.0,
    top: float | Tensor = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    *,
    released: Callable,
) -> tuple[Tensor, Tensor]:
    r"""The spline of Durkan et al. (2019): `released` forward, and our own inverse.

    Shapes are those of normflows: inputs (*,), widths and heights (*, K), derivatives (*, K + 1),
    and the ends of the interval numbers or (*,).
    """
    bins = unnormalized_widths.shape[-1]
    if not inverse or bins * max(min_bin_width, min_bin_height) > 1:  # the latter raises there
        logits = (unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
        ends = (left, right, bottom, top)
        least = (min_bin_width, min_bin_height, min_derivative)
        return released(inputs, *logits, inverse, *ends, *least)

    x = knots(unnormalized_widths, min_bin_width, left, right)
    y = knots(unnormalized_heights, min_bin_height, bottom, top)
    d = min_derivative + F.softplus(unnormalized_derivatives)

    k = (inputs[..., None] >= y[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (of.gather(-1, k + i).squeeze(-1) for of in (x, y, d) for i in (0, 1))
    w, h, u = x1 - x0, y1 - y0, inputs - y0
    s = h / w
    bend = d0 + d1 - 2 * s
    # Equations 6 to 8 of the paper: a root of at² + bt + c, from which the place in the bin is.
    a = h * (s - d0) + u * bend
    b = h * d0 - u * bend
    c = -s * u
    # It is never negative but by rounding, at a flat knot that ends a steep bin. Not zero, as the
    # gradient of the root would be 0 · ∞ there.
    discriminant = (b**2 - 4 * a * c).clamp(min=torch.finfo(a.dtype).tiny)
    # In [0, 1] but by rounding: what leaves its bin may leave the box, too.
    t = (2 * c / (-b - discriminant.sqrt())).clamp(0, 1)

    side = t * (1 - t)
    above = s**2 * (d1 * t**2 + 2 * s * side + d0 * (1 - t) ** 2)
    return x0 + t * w, 2 * (s + bend * side).log() - above.log()


def knots(logits: Tensor, least: float, low: float | Tensor, high: float | Tensor) -> Tensor:
    r"""The K + 1 ends of K bins, none of which is smaller than `least` of the whole."""
    low, high = (end[..., None] if torch.is_tensor(end) else end for end in (low, high))
    shares = least + (1 - least * logits.shape[-1]) * logits.softmax(-1)
    inner = low + (high - low) * shares.cumsum(-1)[..., :-1]
    none = torch.zeros_like(inner[..., :1])
    return torch.cat((none + low, inner, none + high), dim=-1)


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the spline into normflows, and takes it out again."""
    ours = partial(rational_quadratic_spline, released=splines.rational_quadratic_spline)
    with patch.object(splines, "rational_quadratic_spline", ours):
        yield
