r"""What :mod:`flowguard._rqs_bin` computes, in place: for eager mode without recorded gradients.

The formulas and the notation are those of that module; nothing here can be differentiated. What a
function gets and may overwrite is said with it.
"""

__all__ = [
    "Pull",
    "finish",
    "inner_slope",
    "inner_slope_parts",
    "pull_back",
    "slope_pullback",
    "solve",
]

from typing import NamedTuple

import torch
from torch import Tensor

from flowguard import _rqs_bin as rq


def finish(v: Tensor, out: Tensor, slope: Tensor | None, bound: float) -> tuple[Tensor, ...]:
    r"""The identity outside the box; and the logarithm of the slope, if there is one. Overwrites
    both."""
    outside = v.abs().ge_(bound)
    inside = 1 - outside
    out.clamp_(-bound, bound).mul_(inside).addcmul_(v, outside)
    return (out,) if slope is None else (out, outside.addcmul_(slope, inside).log_())


def solve(
    z: Tensor, w: Tensor, h: Tensor, inv_s: Tensor, a: Tensor, b: Tensor, steep: bool
) -> tuple[Tensor, Tensor | None]:
    r"""The distance from the corner at the rise `z` above it, and the slope of the inverse if that
    is wanted. Overwrites `z`."""
    theta = z / h
    rest = 1 - theta
    skew = rest - theta
    delta = (a * rest).addcmul_(b, theta, value=-1)
    beta = skew - delta
    root = delta.square_().addcmul_(theta, rest, value=4).sqrt_()
    right = torch.gt(beta, 0, out=rest)
    theta.addcmul_(right, skew)  # that of the nearer corner
    u = theta.mul_(2).div_(root.add_(beta.abs()).add_(1)).clamp_(max=1.0)
    far = torch.rsub(u, 1)
    if not steep:
        return z.mul_(inv_s).addcmul_(w, u.mul_(far).mul_(beta)), None
    t = torch.addcmul(u, right, torch.sub(far, u, out=skew))
    r = 1 - t
    p, q = torch.addcmul(t, a, r), torch.addcmul(r, b, t)
    den = (t * p).addcmul_(r, q)
    num = t.mul_(q).addcmul_(r, p)
    slope = num.reciprocal_().mul_(den).mul_(den.mul_(inv_s))
    return z.mul_(inv_s).addcmul_(w, u.mul_(far).mul_(beta)), slope


def inner_slope(raw: Tensor, s0: Tensor, s1: Tensor, slope: float | None) -> Tensor:
    r"""The slope at the knot between two bins with secants `s0` and `s1`."""
    if slope is None:
        return _grown(raw).add_(rq.MIN_DERIVATIVE)
    low = 1.001 * slope
    high, mean = _limits(s0, s1, low)
    p = raw.sigmoid()
    room = (high - mean).clamp_(min=rq.ROOM)
    mean.sub_(low)
    # The mean of both weights is away from zero, as one of them is.
    room.lerp_(mean, p)
    return high.sub_(low).mul_(mean.mul_(p).div_(room)).add_(low)


def inner_slope_parts(
    raw: Tensor, s0: Tensor, s1: Tensor, slope: float | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""The slope at the knot, and what it is made of for its pullback."""
    if slope is None:
        grown = _grown(raw)
        return grown + rq.MIN_DERIVATIVE, (grown,)
    low = 1.001 * slope
    high, mean = _limits(s0, s1, low)
    p = raw.sigmoid()
    room = (high - mean).clamp_(min=rq.ROOM)
    up = mean - low
    inv = room.lerp_(up, p).reciprocal_()
    ratio = up.mul_(p).mul_(inv)
    span = high - low
    return (span * ratio).add_(low), (p, ratio, inv, mean, high, span)


def slope_pullback(
    grad: Tensor,
    raw: Tensor,
    s0: Tensor,
    s1: Tensor,
    slope: float | None,
    parts: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    r"""The gradients of :func:`inner_slope_parts` to `raw` and to the logarithms of the secants.
    Overwrites `grad` and the parts."""
    if slope is None:
        return grad.mul_(parts[0]).mul_(rq.positive(rq.max_logit(raw.dtype) - raw)), 0.0, 0.0
    p, ratio, inv, mean, high, span = parts
    rest = 1 - ratio
    other = torch.rsub(p, 1).mul_(inv)
    pulled = span * grad
    # with h = 0.5 ∂d / ∂ log mean and k = 0.5 ∂d / ∂ log high, of which each secant gets h, and
    # the smaller one 2 k besides: k each for equal ones
    whole = p.mul_(inv).mul_(rest).addcmul_(ratio, other).mul_(mean).mul_(pulled)
    uncut = torch.rsub(high, 1 / (1.001 * slope)).sign_()
    cut = span.mul_(other).neg_().add_(1).mul_(ratio).mul_(high).mul_(uncut).mul_(grad)
    sign = torch.sub(s1, s0, out=mean).sign_()
    both = torch.add(cut, whole, alpha=0.5, out=whole)
    cut.mul_(sign)
    to_raw = pulled.mul_(ratio).mul_(rest)
    return to_raw, both + cut, both.sub_(cut)


def _grown(raw: Tensor) -> Tensor:
    return raw.clamp(max=rq.max_logit(raw.dtype)).exp_().mul_(1 - rq.MIN_DERIVATIVE)


def _limits(s0: Tensor, s1: Tensor, low: float) -> tuple[Tensor, Tensor]:
    r"""The largest slope at the knot and that for a raw zero."""
    high = torch.minimum(s0, s1)
    return high.square_().mul_(0.5 / low).clamp_(max=1 / low), (s0 * s1).sqrt_()


class Pull(NamedTuple):
    r"""The gradients of one bin: to x, to z = x - x_k, to y_k, to log s and to both slopes; and
    t, θ."""

    grad: Tensor
    z: Tensor
    y: Tensor
    log_s: Tensor
    d0: Tensor
    d1: Tensor
    t: Tensor
    theta: Tensor


def pull_back(
    z: Tensor,
    w: Tensor,
    h: Tensor,
    s: Tensor,
    d0: Tensor,
    d1: Tensor,
    grad_y: Tensor,
    grad_l: Tensor,
    inverse: bool,
) -> Pull:
    r"""The gradients to what the map is made of within the bin; see :func:`_rqs_bin.pull_back`.
    Overwrites `z` and the gradients."""
    t = z.div_(w)
    r = 1 - t
    p, q = (s * t).addcmul_(d0, r), (s * r).addcmul_(d1, t)
    theta, rest = t * p, r * q
    inv_den = (theta + rest).reciprocal_()
    theta.mul_(inv_den)
    rest.mul_(inv_den)
    tq, rp = t * q, r * p
    num = tq + rp
    inv_num = num.reciprocal()
    rel = s * inv_den
    swing = tq.sub_(rp).mul_(rel)  # s D ∂θ/∂s / (t r)
    theta_t = num.mul_(rel).mul_(inv_den)
    # ∂ log f' / ∂t, halved
    log_t = q.sub_(p).mul_(inv_num)
    log_t.addcmul_((d0 + d1).sub_(s, alpha=2).mul_(inv_den), torch.sub(t, r, out=p))
    twice = torch.add(grad_l, grad_l, out=rp)
    if inverse:
        to_z = -grad_y
        grad = grad_y.sub_(log_t.mul_(twice).div_(w)).div_(theta_t.mul_(s))
        grad_y, grad_l, twice = -grad, grad_l.neg_(), twice.neg_()
        to_theta = grad_y * h
    else:
        to_theta = grad_y * h
        to_z = grad = log_t.mul_(twice).addcmul_(to_theta, theta_t).div_(w)

    u = torch.mul(t, r, out=p)
    tau = u * inv_den
    bent = to_theta.mul_(tau)
    tau.mul_(2)
    to_d0 = r.square_().mul_(inv_num).sub_(tau).mul_(grad_l).addcmul_(bent, rest)
    to_d1 = (t * t).mul_(inv_num).sub_(tau).mul_(grad_l).addcmul_(bent, theta, value=-1)
    # ∂ log f' / ∂ log s = 2 + 2 s (t r / N - (t² + r²) / D), and t² + r² = 1 - 2 t r
    log_s = u.mul_(inv_num).sub_(inv_den).add_(tau).mul_(s).add_(1).mul_(twice)
    return Pull(grad, to_z, grad_y, log_s.addcmul_(swing, bent), to_d0, to_d1, t, theta)
