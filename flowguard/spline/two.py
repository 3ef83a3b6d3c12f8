r"""The two-bin spline, seen from its only inner knot.

Both bins have that knot as their corner and the end :math:`e = \pm B` of the box on the side of the
element as their other corner: their sizes, :math:`e - k_x` and :math:`e - k_y`, are positive on the
right and negative on the left, and so is the distance of the element. So no bin has to be picked:
the rational quadratic only sees ratios. Distances are differences of the same knot as sizes are,
hence never the greater, as rounding is monotone. The notation is that of :mod:`flowguard.spline.bin`.

Knots, sizes and distances are in the units of :meth:`Options.unit`. In these, with the
box :math:`[-b, b]`, the secants of both bins have the harmonic mean
:math:`H = (b^2 - k_y^2) / (b^2 - k_x k_y)`. The slope at the knot is in :math:`[H / R, H R]` with
:math:`R = (1 + λ^2) / (2 λ)`, and with the smaller secant m that mean is in
:math:`[m, 2 m / (1 + λ^2)]`. So the slope is at least λ / R ≥ λ² > ε, and at most m / λ, which is
at most 1 / λ² < 1 / ε and, as m ≥ λ, at most m² / λ² = m² / 2ε. In that interval it is
:math:`H (1 + κ u) / (1 - κ u)` with u = tanh(raw / 2) and (1 + κ) / (1 - κ) = R.
"""

__all__ = ["evaluate", "pull_back"]

import torch
from torch import Tensor

from flowguard.spline import bin as rq
from flowguard.spline.bin import Cell, Pair, Params
from flowguard.spline.options import Options


def _knot(p: Tensor, q: Tensor, o: Options) -> Pair:
    # With u, v the floored sigmoids, w = (u + λ v) / (1 + λ) and h = (v + λ u) / (1 + λ). As
    # u, v > 0, the secant h / w = (v + λ u) / (u + λ v) lies in [λ, 1 / λ] whatever they are, and
    # so does that of the other bin, with 1 - u and 1 - v. Less one half, both are 0 for zeros.
    p, q, scale = p - 0.5, q - 0.5, 2 * o.reach()
    return torch.add(p, q, alpha=o.share()) * scale, torch.add(q, p, alpha=o.share()) * scale


def _cell(z: Tensor, knot: Pair, d: Tensor, o: Options) -> Cell:
    r"""The bin at the distance `z` from the knot."""
    end = torch.full((), o.unit()[0], dtype=z.dtype, device=z.device).copysign(z.detach())
    return Cell(*knot, end - knot[0], end - knot[1], d, 1.0)


def _mean(knot: Pair, o: Options) -> Pair:
    r"""Numerator and denominator of the harmonic mean of the secants."""
    (kx, ky), square = knot, o.unit()[0] ** 2
    return square - ky * ky, square - kx * ky


def _slope(raw: Tensor, mean: Pair, o: Options) -> Pair:
    r"""The slope at the knot, and what its pullback needs."""
    if o.slope is None:
        return rq.published_slope(raw)
    u = 2 * rq.sigmoid(raw) - 1
    up = o.lean() * u
    return (mean[0] * (1 + up)) / (mean[1] * (1 - up)), u


def _slope_pullback(grad: Tensor, raw: Tensor, u: Tensor, o: Options) -> Tensor:
    r"""The gradient to `raw` for that to the logarithm of the slope."""
    if o.slope is None:
        return rq.published_pullback(grad, raw, u)
    square = u * u
    return grad * (o.lean() * (1 - square)) / (1 - o.lean() ** 2 * square)


def evaluate(v: Tensor, params: Params, o: Options) -> Pair:
    r"""The spline or its inverse, and the logarithm of its slope. What was prepared are the knot
    and the slope there."""
    first, second, raw = (p[0] for p in params)
    knot, d = (first, second), raw
    if not o.prepared:
        knot = _knot(rq.sigmoid(first), rq.sigmoid(second), o)
        d, _ = _slope(raw, _mean(knot, o), o)
    scale = o.unit()[1]
    z = v.clamp(-o.bound, o.bound) * (1 / scale) - knot[o.inverse]
    cell = _cell(z, knot, d, o)
    value, steep = rq.solve(z, cell) if o.inverse else rq.evaluate(z, cell.h / cell.w, cell)
    return rq.finish(v, value * scale, steep, o.bound)


def pull_back(x: Tensor, params: Params, grads: Pair, o: Options) -> tuple[Tensor, ...]:
    r"""The gradients to the input and to the parameters; see :func:`flowguard.spline.bin.pull_back`."""
    (width, height, raw), scale = (p[0] for p in params), o.unit()[1]
    p, q = rq.sigmoid(width), rq.sigmoid(height)
    kx, ky = knot = _knot(p, q, o)
    top, bottom = mean = _mean(knot, o)
    d, u = _slope(raw, mean, o)
    z = x.clamp(-o.bound, o.bound) * (1 / scale) - kx
    cell = _cell(z, knot, d, o)
    w, h = cell.w, cell.h

    inside = x.abs() < o.bound
    # In the units of the box, all gradients but that to x are smaller by the scale.
    to_y, to_l = (
        torch.where(inside, grads[0], 0.0),
        torch.where(inside, grads[1] * (1 / scale), 0.0),
    )
    pull = rq.pull_back(z, h / w, cell, (to_y, to_l), o.inverse)
    grad_x = pull.grad + torch.where(inside, 0.0, grads[0])
    log_d = pull.d0 * d
    to_raw = _slope_pullback(log_d * scale, raw, u, o)
    to_kx = torch.addcmul(pull.log_s / w, pull.z, pull.r, value=-1)
    to_ky = torch.addcmul(pull.log_s / -h, pull.y, pull.rest)
    if o.slope is not None:
        to_bottom = log_d / bottom
        to_kx = torch.addcmul(to_kx, to_bottom, ky)
        to_ky = to_ky + to_bottom * kx - (2 * ky) * (log_d / top)

    share, scale = o.share(), scale * 2 * o.reach()
    to_width = torch.add(to_kx, to_ky, alpha=share) * ((p * (1 - p)) * scale)
    to_height = torch.add(to_ky, to_kx, alpha=share) * ((q * (1 - q)) * scale)
    return grad_x, *(g.unsqueeze(0) for g in (to_width, to_height, to_raw))
