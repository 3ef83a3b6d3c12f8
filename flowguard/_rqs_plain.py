r"""What :mod:`flowguard._rqs_bin` computes, in place: for eager mode without recorded gradients.

The formulas and the notation are those of that module; nothing here can be differentiated. What a
function gets and may overwrite is said with it.
"""

__all__ = ["finish", "inner_slope", "inner_slope_parts", "slope_pullback", "solve"]

import torch
from torch import Tensor

from flowguard import _rqs_bin as rq


def finish(v: Tensor, out: Tensor, slope: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    r"""The identity outside the box; and the logarithm of the slope. Overwrites both."""
    outside = v.abs().ge_(bound)
    inside = 1 - outside
    out.clamp_(-bound, bound).mul_(inside).addcmul_(v, outside)
    return out, outside.addcmul_(slope, inside).log_()


def solve(
    z: Tensor, w: Tensor, h: Tensor, inv_s: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The distance from the corner at the rise `z` above it, and the slope of the inverse.
    Overwrites `z`."""
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
