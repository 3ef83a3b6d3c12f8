r"""The two-bin spline in eager mode, without gradients recorded: in place, and with fewer passes.

The numbers are those of :mod:`flowguard._rqs_two`, which says why the formulas hold. Here each pass
over the elements counts: temporaries are overwritten, and slopes are left unscaled. With the secant
:math:`s`, the slope :math:`d` at the knot and the slope one at the end of the box,

.. math::
    P &= s t + d r, \quad Q = s r + t, \quad D = t P + r Q, \quad N = t Q + r P \\
    \theta &= t P / D, \quad f' = s^2 N / D^2

are those of :mod:`flowguard._rqs_bin` times :math:`s`.
"""

__all__ = ["evaluate", "evaluate_at", "knots", "pull_back"]

import torch
from torch import Tensor

from flowguard import _rqs_bin as rq
from flowguard import _rqs_plain as plain


def _stack(first: Tensor, second: Tensor) -> Tensor:
    r"""The sigmoids of both, in one tensor: what they have in common is done in one pass."""
    out = first.new_empty(2, *first.shape)
    torch.sigmoid(first, out=out[0])
    torch.sigmoid(second, out=out[1])
    return out


def _knot(sigmoids: Tensor, bound: float, slope: float | None, least: float) -> Tensor:
    share = rq.mixing(slope)
    scale = 2 * bound * (1 - 2 * least) / (1 + share)
    shares = torch.rsub(sigmoids, -0.5 * scale, alpha=-scale)  # both are 0 for zeros
    out = torch.empty_like(shares)
    torch.add(shares[0], shares[1], alpha=share, out=out[0])
    torch.add(shares[1], shares[0], alpha=share, out=out[1])
    return out


def _end(z: Tensor, bound: float) -> Tensor:
    return torch.full((), bound, dtype=z.dtype, device=z.device).copysign(z)


def knots(
    width: Tensor, height: Tensor, raw: Tensor, bound: float, slope: float | None, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The inner knot and the slope there: all that the spline needs to know."""
    kx, ky = _knot(_stack(width, height), bound, slope, least)
    s, s1 = (bound - ky) / (bound - kx), (bound + ky) / (bound + kx)
    return kx, ky, plain.inner_slope(raw, s, s1, slope)


def evaluate(
    v: Tensor,
    width: Tensor,
    height: Tensor,
    raw: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
    steep: bool,
) -> tuple[Tensor, ...]:
    r"""The spline or its inverse, and the logarithm of its slope if that is wanted."""
    knot = _knot(_stack(width, height), bound, slope, least)
    kx, ky = knot
    z = v.clamp(-bound, bound).sub_(ky if inverse else kx)
    end = _end(z, bound)
    size, other = end - knot, end + knot
    w, h = size
    s = h / w
    d = plain.inner_slope(raw, s, other[1].div_(other[0]), slope)
    if inverse:
        b = w / h
        return _invert(v, z, kx, w, h, d.mul_(b), b, bound, steep)
    return _advance(v, z, ky, w, s, d, bound, steep)


def evaluate_at(
    v: Tensor, kx: Tensor, ky: Tensor, d: Tensor, bound: float, inverse: bool, steep: bool
) -> tuple[Tensor, ...]:
    r"""The same as :func:`evaluate`, for what :func:`knots` computed."""
    z = v.clamp(-bound, bound).sub_(ky if inverse else kx)
    end = _end(z, bound)
    w, h = end - kx, end.sub_(ky)
    if inverse:
        b = w / h
        return _invert(v, z, kx, w, h, d * b, b, bound, steep)
    return _advance(v, z, ky, w, h.div_(w), d.clone(), bound, steep)


def _invert(
    v: Tensor,
    z: Tensor,
    kx: Tensor,
    w: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    bound: float,
    steep: bool,
) -> tuple[Tensor, ...]:
    r"""The inverse at the rise `z` above the knot. Overwrites `z`."""
    rise, slope = plain.solve(z, w, h, b, a, b, steep)
    return plain.finish(v, rise.add_(kx), slope, bound)


def _advance(
    v: Tensor, z: Tensor, ky: Tensor, w: Tensor, s: Tensor, d: Tensor, bound: float, steep: bool
) -> tuple[Tensor, ...]:
    r"""The spline at the distance `z` from the knot. Overwrites `z`, the secant and the slope."""
    t = z / w
    r = 1 - t
    p, q = (s * t).addcmul_(d, r), torch.addcmul(t, s, r, out=d)
    inv = (t * p).addcmul_(r, q).reciprocal_()
    num = t.mul_(q).addcmul_(r, p) if steep else None
    bend = p.sub_(q).mul_(r).mul_(inv)
    z.mul_(s)
    slope = None if num is None else s.mul_(inv).square_().mul_(num)
    # The chord and the bend from it: this keeps the identity exact.
    return plain.finish(v, torch.addcmul(z, z, bend, out=z).add_(ky), slope, bound)


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
    sigmoids = _stack(width, height)
    knot = _knot(sigmoids, bound, slope, least)
    z = x.clamp(-bound, bound).sub_(knot[0])
    end = _end(z, bound)
    size, other = end - knot, end.add(knot)
    w, h = size
    s, s1 = h / w, other[1] / other[0]
    d, parts = plain.inner_slope_parts(raw, s, s1, slope)

    outside = x.abs().ge_(bound)
    inside = 1 - outside
    gy, gl = grad_y * inside, grad_l * inside
    del end, knot, inside
    t = z.div_(w)
    r = 1 - t
    p, q = (s * t).addcmul_(d, r), torch.addcmul(t, s, r)
    rest = r * q  # (1 - θ) D
    inv_den = torch.addcmul(rest, t, p).reciprocal_()
    rest.mul_(inv_den)
    tq, rp = t * q, r * p
    num = tq + rp
    inv_num = num.reciprocal()
    rel = s * inv_den
    swing = tq.sub_(rp).mul_(rel)  # s D ∂θ/∂s / (t r)
    theta_t = num.mul_(rel).mul_(inv_den)
    del rp, rel
    # ∂ log f' / ∂t, halved
    log_t = q.sub_(p).mul_(inv_num)
    log_t.addcmul_(torch.sub(d, s, alpha=2).add_(1).mul_(inv_den), t - r)
    gl2 = gl * 2
    if inverse:
        to_z = -gy
        grad = gy.sub_(log_t.mul_(gl2).div_(w)).div_(theta_t.mul_(s))
        gy, gl, gl2 = -grad, gl.neg_(), gl2.neg_()
        to_theta = gy * h
    else:
        to_theta = gy * h
        to_z = grad = log_t.mul_(gl2).addcmul_(to_theta, theta_t).div_(w)
    grad_x = torch.addcmul(grad, grad_y, outside, out=outside)
    del log_t, theta_t, p, q

    u = t * r
    tau = u * inv_den
    bent = to_theta.mul_(tau)
    # d log f' / d log s = 2 + 2 s (t r / N - (t² + r²) / D), and t² + r² = 1 - 2 t r
    log_s = u.mul_(inv_num).sub_(inv_den).add_(tau, alpha=2).mul_(s).add_(1).mul_(gl2)
    log_s.addcmul_(swing, bent)
    to_d = (r * r).mul_(inv_num).sub_(tau, alpha=2).mul_(gl).addcmul_(bent, rest)
    del u, tau, bent, swing, inv_num, inv_den, t

    to_raw, to_log, to_log1 = plain.slope_pullback(to_d, raw, s, s1, slope, parts)
    to_knot = (to_log1 / other).sub_(log_s.add_(to_log) / size)
    to_kx, to_ky = to_knot
    to_kx.addcmul_(to_z, r).neg_()
    to_ky.addcmul_(gy, rest)

    share = rq.mixing(slope)
    pulled = size  # overwritten
    torch.add(to_kx, to_ky, alpha=share, out=pulled[0])
    torch.add(to_ky, to_kx, alpha=share, out=pulled[1])
    pulled.mul_(2 * bound * (1 - 2 * least) / (1 + share))
    pulled = torch.ops.aten.sigmoid_backward(pulled, sigmoids)
    return grad_x, pulled[0], pulled[1], to_raw
