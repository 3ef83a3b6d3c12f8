r"""The two-bin spline, seen from its only inner knot.

Both bins have that knot as their corner and the end :math:`e = \pm B` of the box on the side of the
element as their other corner: their sizes, :math:`e - k_x` and :math:`e - k_y`, are positive on the
right and negative on the left, and so is the distance of the element. So no bin has to be picked:
the rational quadratic only sees ratios. Distances are differences of the same knot as sizes are,
hence never the greater, as rounding is monotone. The notation is that of :mod:`flowguard._rqs_bin`.
"""

__all__ = ["evaluate", "evaluate_at", "pull_back"]

import torch
from torch import Tensor

from flowguard import _rqs_bin as rq

Pair = tuple[Tensor, Tensor]


def _scale(bound: float, slope: float | None, least: float) -> float:
    return 2 * bound * (1 - 2 * least) / (1 + rq.mixing(slope))


def _knot(p: Tensor, q: Tensor, bound: float, slope: float | None, least: float) -> Pair:
    # With u, v the floored sigmoids, w = (u + λ v) / (1 + λ) and h = (v + λ u) / (1 + λ). As
    # u, v > 0, the secant h / w = (v + λ u) / (u + λ v) lies in [λ, 1 / λ] whatever they are, and
    # so does that of the other bin, with 1 - u and 1 - v. Less one half, both are 0 for zeros.
    share, scale = rq.mixing(slope), _scale(bound, slope, least)
    p, q = p - 0.5, q - 0.5
    return torch.add(p, q, alpha=share) * scale, torch.add(q, p, alpha=share) * scale


def _end(z: Tensor, bound: float) -> Tensor:
    return torch.full((), bound, dtype=z.dtype, device=z.device).copysign(z.detach())


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
    z = v.clamp(-bound, bound) - (ky if inverse else kx)
    end = _end(z, bound)
    w, h = end - kx, end - ky
    s = h / w
    d, _ = rq.inner_slope(raw, s, (end + ky) / (end + kx), slope)
    return _within(v, z, kx, ky, w, h, s, d, bound, inverse)


def evaluate_at(v: Tensor, kx: Tensor, ky: Tensor, d: Tensor, bound: float, inverse: bool) -> Pair:
    r"""The same for a known knot and the slope there, made of differentiable operations."""
    z = v.clamp(-bound, bound) - (ky if inverse else kx)
    end = _end(z, bound)
    w, h = end - kx, end - ky
    return _within(v, z, kx, ky, w, h, h / w, d, bound, inverse)


def _within(
    v: Tensor,
    z: Tensor,
    kx: Tensor,
    ky: Tensor,
    w: Tensor,
    h: Tensor,
    s: Tensor,
    d: Tensor,
    bound: float,
    inverse: bool,
) -> Pair:
    b = w / h
    a = d * b
    if inverse:
        rise, steep = rq.solve(z, w, h, b, a, b)
        return rq.finish(v, kx + rise, steep, bound)
    rise, steep = rq.evaluate(z, w, s, a, b)
    return rq.finish(v, ky + rise, steep, bound)


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
    r"""The gradients to the input and to the parameters; see :func:`_rqs_bin.pull_back`."""
    p, q = rq.sigmoid(width), rq.sigmoid(height)
    kx, ky = _knot(p, q, bound, slope, least)
    z = x.clamp(-bound, bound) - kx
    end = _end(z, bound)
    w, h = end - kx, end - ky
    s, b = h / w, w / h
    w1, h1 = end + kx, end + ky
    s1 = h1 / w1
    d, parts = rq.inner_slope(raw, s, s1, slope)

    inside = rq.inside_mask(x, bound)
    pull = rq.pull_back(z, w, h, s, d * b, b, grad_y * inside, grad_l * inside, inverse)
    grad_x = torch.addcmul(pull.grad * inside, grad_y, 1 - inside)
    to_raw, to_log, to_log1 = rq.slope_pullback(pull.a * b, raw, s, s1, slope, parts)
    to_log = pull.log_s + to_log
    to_kx = torch.addcmul(to_log / w - to_log1 / w1, pull.z, pull.r, value=-1)
    to_ky = torch.addcmul(to_log1 / h1 - to_log / h, pull.y, pull.rest)

    share, scale = rq.mixing(slope), _scale(bound, slope, least)
    to_width = torch.add(to_kx, to_ky, alpha=share) * ((p * (1 - p)) * scale)
    to_height = torch.add(to_ky, to_kx, alpha=share) * ((q * (1 - q)) * scale)
    return grad_x, to_width, to_height, to_raw
