r"""The two-bin spline, seen from its only inner knot.

Both bins have that knot as their corner and the end :math:`e = \pm B` of the box on the side of the
element as their other corner: their sizes, :math:`e - k_x` and :math:`e - k_y`, are positive on the
right and negative on the left, and so is the distance of the element. So no bin has to be picked:
the rational quadratic only sees ratios. Distances are differences of the same knot as sizes are,
hence never the greater, as rounding is monotone. The notation is that of :mod:`flowguard.spline.bin`.

Knots, sizes and distances are in the units of :func:`flowguard.spline.bin.unit`. In these, with the
box :math:`[-b, b]`, the secants of both bins have the harmonic mean
:math:`H = (b^2 - k_y^2) / (b^2 - k_x k_y)`. The slope at the knot is in :math:`[H / R, H R]` with
:math:`R = (1 + λ^2) / (2 λ)`, and with the smaller secant m that mean is in
:math:`[m, 2 m / (1 + λ^2)]`. So the slope is at least λ / R ≥ λ² > ε, and at most m / λ, which is
at most 1 / λ² < 1 / ε and, as m ≥ λ, at most m² / λ² = m² / 2ε. In that interval it is
:math:`H (1 + κ u) / (1 - κ u)` with u = tanh(raw / 2) and (1 + κ) / (1 - κ) = R.
"""

__all__ = ["evaluate", "evaluate_at", "knot_scale", "lean", "pull_back"]

import torch
from torch import Tensor

from flowguard.spline import bin as rq

Pair = tuple[Tensor, Tensor]
MOST_LEAN = 1 - 1e-5  # for the slope at the knot to stay finite in single precision


def lean(slope: float) -> float:
    r"""The :math:`\kappa` of the slope at the knot."""
    share = rq.mixing(slope)
    return min(((1 - share) / (1 + share)) ** 2, MOST_LEAN)


def knot_scale(bound: float, slope: float | None, least: float) -> float:
    r"""The knot for logits that are infinite, without what the other one adds."""
    return rq.unit(bound)[0] * (1 - 2 * least) / (1 + rq.mixing(slope))


def _knot(p: Tensor, q: Tensor, bound: float, slope: float | None, least: float) -> Pair:
    # With u, v the floored sigmoids, w = (u + λ v) / (1 + λ) and h = (v + λ u) / (1 + λ). As
    # u, v > 0, the secant h / w = (v + λ u) / (u + λ v) lies in [λ, 1 / λ] whatever they are, and
    # so does that of the other bin, with 1 - u and 1 - v. Less one half, both are 0 for zeros.
    share, scale = rq.mixing(slope), 2 * knot_scale(bound, slope, least)
    p, q = p - 0.5, q - 0.5
    return torch.add(p, q, alpha=share) * scale, torch.add(q, p, alpha=share) * scale


def _end(z: Tensor, bound: float) -> Tensor:
    return torch.full((), bound, dtype=z.dtype, device=z.device).copysign(z.detach())


def _mean(kx: Tensor, ky: Tensor, bound: float) -> Pair:
    r"""Numerator and denominator of the harmonic mean of the secants."""
    square = rq.unit(bound)[0] ** 2
    return square - ky * ky, square - kx * ky


def _slope(raw: Tensor, mean: Pair, slope: float | None) -> Pair:
    r"""The slope at the knot, and what its pullback needs."""
    if slope is None:
        return rq.published_slope(raw)
    u = 2 * rq.sigmoid(raw) - 1
    up = lean(slope) * u
    return (mean[0] * (1 + up)) / (mean[1] * (1 - up)), u


def _slope_pullback(grad: Tensor, raw: Tensor, u: Tensor, slope: float | None) -> Tensor:
    r"""The gradient to `raw` for that to the logarithm of the slope."""
    if slope is None:
        return rq.published_slope_pullback(grad, raw, u)
    square = u * u
    return grad * (lean(slope) * (1 - square)) / (1 - lean(slope) ** 2 * square)


def evaluate(
    v: Tensor,
    width: Tensor,
    height: Tensor,
    raw: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
) -> Pair:
    r"""The spline or its inverse, and the logarithm of its slope."""
    kx, ky = _knot(rq.sigmoid(width), rq.sigmoid(height), bound, slope, least)
    d, _ = _slope(raw, _mean(kx, ky, bound), slope)
    return evaluate_at(v, kx, ky, d, bound, inverse)


def evaluate_at(v: Tensor, kx: Tensor, ky: Tensor, d: Tensor, bound: float, inverse: bool) -> Pair:
    r"""The same for a known knot and the slope there."""
    fraction, scale = rq.unit(bound)
    z = v.clamp(-bound, bound) * (1 / scale) - (ky if inverse else kx)
    end = _end(z, fraction)
    w, h = end - kx, end - ky
    if inverse:
        rise, steep = rq.solve(z, w, h, d, 1.0)
        value = kx + rise
    else:
        rise, steep = rq.evaluate(z, w, h / w, d, 1.0)
        value = ky + rise
    return rq.finish(v, value * scale, steep, bound)


def pull_back(
    x: Tensor,
    width: Tensor,
    height: Tensor,
    raw: Tensor,
    grad_y: Tensor,
    grad_l: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients to the input and to the parameters; see :func:`flowguard.spline.bin.pull_back`."""
    fraction, scale = rq.unit(bound)
    p, q = rq.sigmoid(width), rq.sigmoid(height)
    kx, ky = _knot(p, q, bound, slope, least)
    top, bottom = mean = _mean(kx, ky, bound)
    d, u = _slope(raw, mean, slope)
    z = x.clamp(-bound, bound) * (1 / scale) - kx
    end = _end(z, fraction)
    w, h = end - kx, end - ky

    inside = x.abs() < bound
    # In the units of the box, all gradients but that to x are smaller by the scale.
    to_y, to_l = torch.where(inside, grad_y, 0.0), torch.where(inside, grad_l * (1 / scale), 0.0)
    pull = rq.pull_back(z, w, h, h / w, d, 1.0, to_y, to_l, inverse)
    grad_x = pull.grad + torch.where(inside, 0.0, grad_y)
    log_d = pull.d0 * d
    to_raw = _slope_pullback(log_d * scale, raw, u, slope)
    to_kx = torch.addcmul(pull.log_s / w, pull.z, pull.r, value=-1)
    to_ky = torch.addcmul(pull.log_s / -h, pull.y, pull.rest)
    if slope is not None:
        to_bottom = log_d / bottom
        to_kx = torch.addcmul(to_kx, to_bottom, ky)
        to_ky = to_ky + to_bottom * kx - (2 * ky) * (log_d / top)

    share, scale = rq.mixing(slope), scale * 2 * knot_scale(bound, slope, least)
    to_width = torch.add(to_kx, to_ky, alpha=share) * ((p * (1 - p)) * scale)
    to_height = torch.add(to_ky, to_kx, alpha=share) * ((q * (1 - q)) * scale)
    return grad_x, to_width, to_height, to_raw
