r"""The cubic B-spline of the paper's other remedy, as a pure function of tensors.

In unit coordinates :math:`u = x / 2B + 1/2` the map is a cubic B-spline :math:`S` whose knots and
control points are both spaced by a softmax. It is evaluated through its derivative: a quadratic
B-spline with *positive* coefficients, hence on each bin a quadratic Bernstein polynomial

.. math:: S'(t) = p (1-t)^2 + 2 q t (1-t) + r t^2, \quad p, q, r > 0,

so that value, slope and inverse are sums of terms of one sign, without cancellation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cubic_b_spline"]

LEAST_GAP = 0.01
CAUCHY_STEPS = 6


def cubic_b_spline(
    x: Tensor, gaps: Tensor, controls: Tensor, *, bound: float = 0.5, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Maps :math:`x` through a monotone cubic B-spline on :math:`[-B, B]`, identity outside.

    Value and slope meet the identity at both ends, so the map is :math:`C^1` on the whole line.
    Its slope lies in :math:`[0.03, 100]` whatever the parameters, infinite ones included. Zero
    parameters are *not* the identity: the map is then off by up to :math:`0.14 B`.

    A NaN in an element of `x`, or in its parameters, makes this element NaN, and no other. Half
    precision is computed in float32 and returned in its own dtype. The inverse solves its cubic
    by a fixed number of safeguarded steps; its gradients are those of the exact inverse.

    References:
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        x: The input, with shape :math:`(*)`.
        gaps: The unconstrained gaps between the free knots, with shape :math:`(*, M)`. The
            published spline has :math:`M = 4`, which makes 8 bins.
        controls: The unconstrained gaps between the free control points, with shape
            :math:`(*, M + 2)`. The leading dimensions of `gaps` and `controls` broadcast
            against the shape of `x`.
        bound: The half-width :math:`B` of the box.
        inverse: Whether to apply the inverse map.

    Returns:
        The output and the log-derivative of the direction taken, both with the broadcast shape.

    Raises:
        TypeError: If a tensor is not of a floating dtype.
        ValueError: If the numbers of gaps do not belong together, or `bound` is not positive.

    Example:
        >>> x = torch.tensor([-2.0, 0.0, 0.5])
        >>> y, ladj = cubic_b_spline(x, torch.zeros(4), torch.zeros(6))
        >>> y
        tensor([-2.0000,  0.0000,  0.5000])
        >>> ladj.shape
        torch.Size([3])
    """
    _check(x, gaps, controls, bound)

    dtype = torch.promote_types(torch.promote_types(x.dtype, gaps.dtype), controls.dtype)
    work = torch.promote_types(dtype, torch.float32)
    x, gaps, controls = x.to(work), gaps.to(work), controls.to(work)

    table = _bins(gaps, controls)
    shape = torch.broadcast_shapes(x.shape, table.shape[:-2])
    x, table = x.expand(shape), table.expand(*shape, *table.shape[-2:])

    # NaN compares false: it counts as inside, and comes out as NaN. So does an outer x whose
    # parameters are NaN: softmax spreads it, and the last bottom is the sum of all heights.
    total = table[..., 1, -1]
    outside = (x.abs() >= bound) & (total == total)
    u = torch.where(outside, 0.0, x) / (2 * bound) + 0.5

    axis = 1 if inverse else 0
    index = (u.unsqueeze(-1) >= table[..., axis, 1:]).sum(dim=-1)
    index = index[..., None, None].expand(*shape, table.shape[-2], 1)
    left, bottom, width, p, q, r = table.gather(-1, index).squeeze(-1).unbind(-1)

    if inverse:
        t = _solve(p, q, r, (u - bottom) / width)
        v = left + width * t
    else:
        t = (u - left) / width
        v = bottom + width * _rise(p, q, r, t)

    ladj = _slope(p, q, r, t).log()
    ladj = -ladj if inverse else ladj

    # Rounding may land outside of the box, and certificates rely on it; gradients stay.
    v = v - (v - v.clamp(0, 1)).detach()
    y = torch.where(outside, x, (v - 0.5) * (2 * bound))
    ladj = torch.where(outside, 0.0, ladj)

    return y.to(dtype), ladj.to(dtype)


def _check(x: Tensor, gaps: Tensor, controls: Tensor, bound: float) -> None:
    for name, tensor in (("x", x), ("gaps", gaps), ("controls", controls)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor; got {tensor.dtype}")

    if not 0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite; got bound={bound}")

    if gaps.ndim == 0 or controls.ndim == 0 or not 1 <= gaps.shape[-1] == controls.shape[-1] - 2:
        raise ValueError(
            "gaps must have shape (*, M) with M >= 1 and controls (*, M + 2), as 4 and 6; "
            f"got {tuple(gaps.shape)} and {tuple(controls.shape)}"
        )

    if (gaps.shape[-1] + 4) * LEAST_GAP >= 1:
        raise ValueError(
            f"at most {round(1 / LEAST_GAP) - 5} knot gaps of at least {LEAST_GAP} fit into the "
            f"unit interval; got {gaps.shape[-1]}"
        )


def _spaced(logits: Tensor, ends: int) -> Tensor:
    r"""Gaps from logits, with shape :math:`(*, M)`, between `ends` least gaps at either end."""
    # The limit of the softmax at infinite logits (equal ones share) without inf - inf; the
    # quarter keeps the difference of any two logits finite.
    limit = torch.finfo(logits.dtype).max / 4
    share = logits.clamp(-limit, limit).softmax(dim=-1)
    # Four least gaps lie in the unit interval besides the free knot gaps, and two besides the
    # free control gaps, of which there are two more: the same remainder for both.
    fixed = LEAST_GAP * (logits.shape[-1] + (4 if ends == 4 else 2))

    return F.pad(LEAST_GAP + (1 - fixed) * share, (ends, ends), value=LEAST_GAP)


def _bins(gaps: Tensor, controls: Tensor) -> Tensor:
    r"""Left, bottom, width and the slope's Bernstein coefficients of every bin, (*, 6, bins)."""
    knots = _spaced(gaps, ends=4)  # M + 8, the outer two at each end lie outside the box
    rises = _spaced(controls, ends=2)  # M + 6

    # Coefficients of the derivative, a quadratic B-spline. They lie in [0.03, 100], for a rise
    # lies in [0.01, 1] and the sum of three knot gaps in [0.03, 1]; so does S', an average.
    d = 3 * rises / (knots[..., :-2] + knots[..., 1:-1] + knots[..., 2:])

    before, after = knots[..., 1:-2], knots[..., 2:-1]
    edge = (after * d[..., :-1] + before * d[..., 1:]) / (before + after)
    p, q, r = edge[..., :-1], d[..., 1:-1], edge[..., 1:]

    width = knots[..., 2:-2]
    height = width * (p + q + r) / 3
    left, bottom = (F.pad(v.cumsum(dim=-1)[..., :-1], (1, 0)) for v in (width, height))

    return torch.stack(torch.broadcast_tensors(left, bottom, width, p, q, r), dim=-2)


def _slope(p: Tensor, q: Tensor, r: Tensor, t: Tensor) -> Tensor:
    s = 1 - t
    return p * s * s + 2 * q * s * t + r * t * t


def _rise(p: Tensor, q: Tensor, r: Tensor, t: Tensor) -> Tensor:
    r"""Integral of the slope from 0 to `t`, whose terms are all of one sign."""
    return t * (p * (3 - 3 * t + t * t) + q * t * (3 - 2 * t) + r * t * t) / 3


def _curvature(p: Tensor, q: Tensor, r: Tensor, t: Tensor) -> Tensor:
    return 2 * ((q - p) * (1 - t) + (r - q) * t)


def _solve(p: Tensor, q: Tensor, r: Tensor, rise: Tensor) -> Tensor:
    r"""The `t` at which the slope has integrated to `rise`, differentiable in all arguments."""
    t = _root(p.detach(), q.detach(), r.detach(), rise.detach())

    # One step of Halley's method from a constant start. It is of third order, so its first and
    # second derivatives at the root are those of the implicit function; there rest = 0, and the
    # denominator is twice a squared slope.
    rest = rise - _rise(p, q, r, t)
    slope, curvature = _slope(p, q, r, t), _curvature(p, q, r, t)

    return t + 2 * rest * slope / (2 * slope * slope + rest * curvature)


def _root(p: Tensor, q: Tensor, r: Tensor, rise: Tensor) -> Tensor:
    r"""The same root by Cauchy's method, in a bracket, without gradients."""
    low, high = torch.zeros_like(rise), torch.ones_like(rise)
    t = 3 * rise / (p + q + r)

    # Each step solves the quadratic Taylor polynomial at t; where its root leaves the bracket, it
    # bisects. Over all coefficients in [0.03, 100], six steps from the secant reach the last
    # digits of float64, and the fifth step leaves 1e-12.
    for _ in range(CAUCHY_STEPS):
        rest = rise - _rise(p, q, r, t)
        slope, curvature = _slope(p, q, r, t), _curvature(p, q, r, t)
        low, high = torch.where(rest > 0, t, low), torch.where(rest > 0, high, t)
        root = (slope * slope + 2 * curvature * rest).clamp(min=0).sqrt()
        step = t + 2 * rest / (slope + root)
        t = torch.where((step >= low) & (step <= high), step, (low + high) / 2)

    return t
