r"""What :mod:`flowguard.spline.bin` computes, in place: for eager mode without recorded gradients.

Here each pass over the elements counts, and so does each call: temporaries come from memory that
is at hand, and numbers come as tensors. Nothing here can be differentiated. The functions take
temporaries to work with, and what they return lies in some of these.

Of the transcendental functions those are used that PyTorch computes itself. Others it leaves to a
library that takes up to four times as long, the logarithm, the exponential and the arctangent of
one argument among them.
"""

__all__ = [
    "Pulled",
    "advance",
    "finish",
    "masked",
    "published_pullback",
    "published_slope",
    "pull_back",
    "solve",
    "squash",
    "squash_factor",
    "squash_pullback",
]

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowguard.spline import constants
from flowguard.spline.bin import Cell
from flowguard.spline.inplace.memory import Pair, Rows, Tensors

Made = tuple[Tensor, Tensor | None]  # value and slope


@functools.lru_cache(maxsize=256)
def _beside(bound: float, towards: float, double: bool) -> float:
    r"""The number next to the bound, as the dtype sees it."""
    kind = np.float64 if double else np.float32
    return float(np.nextafter(kind(bound), kind(towards)))


def squash(m: Rows, x: Tensor, bound: float | None, out: Tensor) -> Tensor:
    r"""Writes the shift, but for :func:`squash_factor`."""
    if bound is None:
        return out.copy_(x)
    return torch.atan2(x, m.number(2 * bound / constants.pi()), out=out)


@functools.lru_cache(maxsize=256)
def squash_factor(bound: float | None, double: bool) -> float:
    r"""What a shift is still to be multiplied by, which is free beside a sum: the largest number
    whose product with the arctangent of infinity is not above the bound."""
    if bound is None:
        return 1.0
    kind = np.float64 if double else np.float32
    right, limit = float(kind(constants.pi() / 2)), min(bound, float(kind(bound)))
    factor = kind(limit / right)
    while Fraction(float(factor)) * Fraction(right) > Fraction(limit):
        factor = np.nextafter(factor, kind(0))
    return float(factor)


def squash_pullback(m: Rows, x: Tensor, grad: Tensor, bound: float | None, out: Tensor) -> None:
    r"""Writes the gradient to what was squashed."""
    if bound is None:
        out.copy_(grad)
        return
    y = torch.mul(x, m.number(constants.pi() / (2 * bound)), out=m.take())
    torch.div(grad, torch.addcmul(m.number(1.0), y, y, out=y), out=out)


def finish(
    m: Rows,
    outs: Tensors,
    v: Tensor,
    made: Made,
    bound: float,
    *,
    factor: float = 1.0,
    even: bool = False,
    closed: bool = False,
) -> None:
    r"""Writes the value times a factor, or the identity outside the box, to which its ends belong
    if it is `closed`; and the logarithm of the slope, if there is one, which may be known to be
    `even` with one outside. Overwrites both."""
    value, slope = made
    # What is not below the bound, or is above it, else zero.
    limit = bound if closed else _beside(bound, 0.0, v.dtype == torch.float64)
    outside = torch.hardshrink(v, limit, out=m.take())
    inside = torch.eq(outside, m.number(0.0), out=m.take())
    # Rounding may land an ulp outside of the box, and certificates rely on it.
    limit = bound / factor
    torch.addcmul(outside, value.clamp_(-limit, limit), inside, value=factor, out=outs[0])
    if slope is not None:
        if not even:
            torch.lerp(m.number(1.0), slope, inside, out=slope)
        # The logarithm of x is that of 1 + y with y = x - 1, or minus that of 1 + y with
        # y = (1 - x) / x for x < 1: no digit is lost in either.
        y = torch.sub(slope, m.number(1.0), out=outside)
        y.div_(slope.clamp_(max=1.0))
        torch.copysign(torch.abs(y, out=slope).log1p_(), y, out=outs[1])
    m.give(outside, inside)


def advance(m: Rows, z: Tensor, s: Tensor, cell: Cell, steep: bool, sign: int = 1) -> Made:
    r"""The value at the distance `z` from the corner, times a sign, in a bin with secant `s`, and
    the slope if that is wanted. The size has the same sign. Overwrites `z` and the secant."""
    t = torch.div(z, cell.w, out=m.take())
    p = torch.lerp(cell.d0, s, t, out=m.take())
    q = torch.lerp(s, m.number(1.0) if isinstance(cell.d1, float) else cell.d1, t, out=m.take())
    den = torch.lerp(q, p, t, out=m.take())
    z.mul_(s)
    slope = None
    if steep:
        s.div_(den)
        slope = s.mul_(s).mul_(torch.lerp(p, q, t, out=q))
    # P / D is exactly one for the identity.
    value = torch.addcmul(cell.y, z, p.div_(den), value=sign, out=z)
    m.give(t, p, q, den)
    return value, slope


def solve(m: Rows, z: Tensor, cell: Cell, steep: bool, sign: int = 1) -> Made:
    r"""The inverse at the rise `z` above the corner, times a sign, and its slope if that is wanted.
    The size has the same sign. Overwrites `z`."""
    one = m.number(1.0)
    inv_s = torch.div(cell.w, cell.h, out=m.take())
    theta = torch.div(z, cell.h, out=m.take())
    rest = torch.sub(one, theta, out=m.take())
    skew = torch.sub(rest, theta, out=m.take())
    a = torch.mul(cell.d0, inv_s, out=m.take())
    b = inv_s if isinstance(cell.d1, float) else torch.mul(cell.d1, inv_s, out=m.take())
    delta = torch.mul(a, rest, out=m.take()).addcmul_(b, theta, value=-1)
    beta = torch.sub(skew, delta, out=m.take())
    root = delta.mul_(delta).addcmul_(theta, rest, value=4).sqrt_()
    near = theta.addcmul_(torch.gt(beta, m.number(0.0), out=rest), skew)
    half = near.div_(torch.abs(beta, out=rest).add_(root).add_(one)).clamp_(max=0.5)
    # half of t r
    both = half.mul_(torch.sub(one, half, alpha=2, out=skew))
    slope = None
    if steep:
        excess = a.add_(b).sub_(m.number(2.0)).mul_(inv_s)
        bent = torch.ne(beta, m.number(0.0), out=skew)
        torch.lerp(one, root, bent, out=root)  # one for β = 0, which rounding would miss
        slope = torch.addcmul(inv_s, excess, both, value=2, out=excess).div_(root)
    # t = θ + β t r: adding the bend to the chord keeps the identity exact.
    torch.addcmul(cell.x, z, inv_s, value=sign, out=z)
    return z.addcmul_(cell.w, both.mul_(beta), value=2 * sign), slope


def published_slope(m: Rows, raw: Tensor, share: Tensor, out: Tensor) -> None:
    r"""Writes that of :func:`flowguard.spline.bin.published_slope`."""
    torch.clamp(raw, max=constants.max_logit(raw.dtype), out=share)
    share.exp_().mul_(m.number(1 - constants.min_derivative()))
    torch.add(share, m.number(constants.min_derivative()), out=out)
    share.div_(out)


def published_pullback(m: Rows, grad: Tensor, raw: Tensor, share: Tensor, out: Tensor) -> None:
    r"""Writes the gradient to `raw` for that to the logarithm of the slope; overwrites the share."""
    torch.mul(share, grad, out=share)
    torch.lt(raw, m.number(constants.max_logit(raw.dtype)), out=out).mul_(share)


def masked(
    m: Rows, outs: Tensors, x: Tensor, grads: Tensors, bound: float, *, closed: bool = False
) -> Tensors:
    r"""Both gradients inside the box, to which its ends belong if it is `closed`. Writes what the
    gradient to `x` is outside, where it is that to the value."""
    if closed:
        bound = _beside(bound, math.inf, x.dtype == torch.float64)
    mask = torch.ops.aten.hardtanh_backward.grad_input
    gy, gl = (mask(g, x, -bound, bound, grad_input=m.take()) for g in grads)
    torch.sub(grads[0], gy, out=outs[0])
    return gy, gl


class Pulled(NamedTuple):
    r"""Those of :class:`flowguard.spline.bin.Pull`, but for θ."""

    grad: Tensor
    z: Tensor
    y: Tensor
    log_s: Tensor
    d: Pair
    t: Tensor
    r: Tensor
    rest: Tensor


def pull_back(m: Rows, z: Tensor, s: Tensor, cell: Cell, grads: Tensors, inverse: bool) -> Pulled:
    r"""The gradients to what the map is made of within the bin; see :func:`flowguard.spline.bin.pull_back`.
    Overwrites the gradients."""
    take, (grad_y, grad_l), w, h, d0 = m.take, grads, cell.w, cell.h, cell.d0
    one = m.number(1.0)
    d1 = one if isinstance(cell.d1, float) else cell.d1
    ends, to_d = m.pair(), m.pair()
    both, r, t = ends
    torch.div(z, w, out=t)
    torch.sub(one, t, out=r)
    p = torch.lerp(d0, s, t, out=take())
    q = torch.lerp(s, d1, t, out=take())
    inv_den = torch.lerp(q, p, t, out=take()).reciprocal_()
    num = torch.lerp(p, q, t, out=take())
    inv_num = torch.reciprocal(num, out=take())

    # ∂ log f' / ∂t, halved: (Q - P) / N - (d0 + d1 - 2 s) (r - t) / D
    log_t = torch.sub(q, p, out=p).mul_(inv_num)
    rest = q.mul_(r).mul_(inv_den)
    turn = torch.sub(r, t, out=take()).mul_(inv_den)
    excess = torch.add(d0, d1, out=take()).sub_(s, alpha=2)
    log_t.addcmul_(turn, excess, value=-1).mul_(grad_l)
    tau = torch.mul(t, r, out=turn).mul_(inv_den)
    theta_t = num.mul_(inv_den).mul_(inv_den.mul_(s))
    if inverse:
        to_z = torch.neg(grad_y, out=take())
        grad = grad_y.sub_(log_t.div_(w), alpha=2).div_(theta_t.mul_(s))
        grad_y, grad_l = torch.neg(grad, out=take()), grad_l.neg_()
        bent = torch.mul(grad_y, h, out=excess)
    else:
        bent = torch.mul(grad_y, h, out=excess)
        to_z = grad = theta_t.mul_(bent).add_(log_t, alpha=2).div_(w)
    bent.mul_(tau)

    of_d = torch.mul(both, both, out=to_d[0]).mul_(inv_num).sub_(tau, alpha=2).mul_(grad_l)
    of_d.addcmul_(bent, rest)
    to_d[2].sub_(bent)
    # Where s and both end slopes grow alike, θ stays, and so does f' / s.
    log_s = torch.addcmul(grad_l, to_d[1], d0, value=-1, out=bent)
    log_s = log_s.sub_(to_d[2]) if d1 is one else log_s.addcmul_(to_d[2], d1, value=-1)
    m.give(p, inv_den, inv_num, tau)
    return Pulled(grad, to_z, grad_y, log_s, to_d, t, r, rest)
