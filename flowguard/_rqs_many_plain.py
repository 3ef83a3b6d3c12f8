r"""The spline of three and more bins in eager mode, without gradients recorded: in place.

The numbers are those of :mod:`flowguard._rqs_many`, which says why the formulas hold. Here what
belongs to the bin of an element is fetched by its index, with one row of padding on either side for
its neighbours, and slopes are left unscaled as in :mod:`flowguard._rqs_two_plain`.
"""

__all__ = ["Rows", "evaluate", "pull_back"]

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowguard import _rqs_bin as rq
from flowguard import _rqs_plain as plain

RAW = 1e3  # beyond, all maps of a raw slope are constant; a sum of these is finite


class Rows:
    r"""Memory for rows of numbers, taken one after the other.

    One large block is cheaper than many of medium size, which the system hands out and takes back.
    """

    def __init__(self, like: Tensor, bins: int, size: int, dtype: torch.dtype) -> None:
        self.memory = like.new_empty((10 * bins + 16) * size, dtype=dtype)
        self.size = size
        self.taken = 0

    def restart(self, size: int) -> None:
        r"""Makes all memory free again, for rows of that size."""
        self.size = size
        self.taken = 0

    def take(self, *rows: int) -> Tensor:
        start = self.taken
        self.taken += math.prod(rows) * self.size
        return self.memory[start : self.taken].view(*rows, self.size)


def _finite(x: Tensor, out: Tensor, limit: float) -> None:
    r"""Copies with bins first in memory: far faster by way of this operation than by a copy."""
    torch.clamp(x, -limit, limit, out=out.view(x.shape))


def _softmax(logits: Tensor, scale: float, floor: float, memory: Rows) -> Tensor:
    r"""The scaled softmax over the given logits and a zero; first and last row come twice."""
    padded = memory.take(len(logits) + 3)
    out = padded[1:-1]
    _finite(logits, out[:-1], torch.finfo(logits.dtype).max / 4)  # inf - inf would be NaN
    out[-1].zero_()
    out.sub_(out.amax(0)).mul_(1 / math.log(2)).exp2_()  # thrice as fast as exp
    weight = out.sum(0).reciprocal_().mul_(scale)
    out.mul_(weight).add_(floor)
    padded[0].copy_(out[0])
    padded[-1].copy_(out[-1])
    return padded


def _cumulated(padded: Tensor, memory: Rows) -> Tensor:
    r"""The sum of all bins to the left, for each bin."""
    out = memory.take(len(padded) - 2)
    total, *rest = out.unbind()
    total.zero_()
    for row, total_row in zip(padded[1:].unbind(), rest, strict=False):
        total = torch.add(total, row, out=total_row)
    return out


def _mixed(u: Tensor, v: Tensor, share: float) -> tuple[Tensor, Tensor]:
    return torch.add(u, v, alpha=share), torch.add(v, u, alpha=share)


class State(NamedTuple):
    r"""All that is known of each element's bin; pairs are of its left and right side."""

    u: Tensor  # padded
    v: Tensor
    passed: Tensor  # a one for each inner knot to its left, or on which it lies
    near: tuple[Tensor, Tensor, Tensor, Tensor]  # u and v of itself, pairs of its neighbours'
    sums: tuple[Tensor, Tensor]  # of u and of v of all bins to its left
    x0: Tensor
    y0: Tensor
    w: Tensor
    h: Tensor
    s: Tensor
    sizes: tuple[Tensor, Tensor, Tensor]  # pairs of widths, heights and secants
    raw: Tensor  # a pair
    inner: Tensor  # a pair: zero at the ends of the box, where the slope is one


def _locate(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    vertical: bool,
    memory: Rows,
) -> State:
    bins, size = len(widths) + 1, x.numel()
    memory.restart(size)
    share = rq.mixing(slope)
    total = 2 * bound / (1 + share)
    scale, floor = total * (1 - bins * least), total * least
    u, v = (_softmax(p, scale, floor, memory) for p in (widths, heights))
    left_u, left_v = _cumulated(u, memory), _cumulated(v, memory)
    first, second = (left_v, left_u) if vertical else (left_u, left_v)
    passed = memory.take(bins - 1)
    torch.add(first[1:], second[1:], alpha=share, out=passed).sub_(bound)
    torch.ge(x, passed, out=passed)
    number = passed.sum(0)
    place = number.long().mul_(size).add_(torch.arange(size, device=x.device))

    def fetch(rows: Tensor, out: Tensor) -> None:
        torch.index_select(rows.view(-1), 0, place, out=out)

    raws = memory.take(bins + 1)
    raws[::bins].zero_()
    _finite(derivatives, raws[1:-1], RAW)
    found, pairs = memory.take(4), memory.take(3, 2)
    own_u, own_v, sum_u, sum_v = found.unbind()
    for row, rows in ((own_u, u[1:]), (own_v, v[1:]), (sum_u, left_u), (sum_v, left_v)):
        fetch(rows, row)
    for pair, rows, step in zip(pairs, (u, v, raws), (2, 2, 1), strict=True):
        left, right = pair.unbind()
        fetch(rows, left)
        fetch(rows[step:], right)
    # A NaN anywhere is one of the element: those of the logits are in every bin already.
    sum_u = sum_u.add_(raws.sum(0).mul_(0))
    x0, y0 = _mixed(sum_u, sum_v, share)
    w, h = _mixed(own_u, own_v, share)
    ws, hs = _mixed(pairs[0], pairs[1], share)
    inner = memory.take(2)
    left, right = inner.unbind()
    torch.clamp(number, max=1, out=left)
    torch.clamp(number.neg_().add_(bins - 1), max=1, out=right)
    return State(
        u,
        v,
        passed,
        (own_u, own_v, pairs[0], pairs[1]),
        (sum_u, sum_v),
        x0.sub_(bound),
        y0.sub_(bound),
        w,
        h,
        h / w,
        (ws, hs, hs / ws),
        pairs[2],
        inner,
    )


def _within(z: Tensor, size: Tensor) -> Tensor:
    return torch.minimum(z, size, out=z).clamp_(min=0.0)


def evaluate(
    v: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
    memory: Rows,
) -> tuple[Tensor, Tensor]:
    r"""The spline or its inverse, and the logarithm of its slope."""
    shape, v = v.shape, v.reshape(-1)
    z = v.clamp(-bound, bound)
    at = _locate(z, widths, heights, derivatives, bound, slope, least, inverse, memory)
    w, h, s = at.w, at.h, at.s
    d = plain.inner_slope(at.raw, s, at.sizes[2], slope)
    d = torch.lerp(torch.ones_like(s), d, at.inner)
    if inverse:
        inv_s = w / h
        a, b = d.mul_(inv_s)
        rise, steep = plain.solve(_within(z.sub_(at.y0), h), w, h, inv_s, a, b)
        y, ladj = plain.finish(v, rise.add_(at.x0), steep, bound)
        return y.view(shape), ladj.view(shape)

    d0, d1 = d
    _within(z.sub_(at.x0), w)
    t = z / w
    r = 1 - t
    p, q = (s * t).addcmul_(d0, r), (s * r).addcmul_(d1, t)
    inv = (t * p).addcmul_(r, q).reciprocal_()
    num = t.mul_(q).addcmul_(r, p)
    bend = p.sub_(q).mul_(r).mul_(inv)
    z.mul_(s)
    steep = s.mul_(inv).square_().mul_(num)
    y, ladj = plain.finish(v, torch.addcmul(z, z, bend, out=z).add_(at.y0), steep, bound)
    return y.view(shape), ladj.view(shape)


def pull_back(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    grad_y: Tensor,
    grad_l: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
    memory: Rows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients to the input and to all parameters; see :func:`_rqs_bin.pull_back`."""
    shape = x.shape
    x, grad_y, grad_l = x.reshape(-1), grad_y.reshape(-1), grad_l.reshape(-1)
    z = x.clamp(-bound, bound)
    at = _locate(z, widths, heights, derivatives, bound, slope, least, False, memory)
    w, h, s = at.w, at.h, at.s
    ws, hs, ss = at.sizes
    d, parts = plain.inner_slope_parts(at.raw, s, ss, slope)
    d0, d1 = torch.lerp(torch.ones_like(s), d, at.inner)

    outside = x.abs().ge_(bound)
    inside = 1 - outside
    pull = plain.pull_back(
        _within(z.sub_(at.x0), w), w, h, s, d0, d1, grad_y * inside, grad_l * inside, inverse
    )
    grad_x = torch.addcmul(pull.grad, grad_y, outside, out=outside)

    to_d = torch.stack((pull.d0, pull.d1)).mul_(at.inner)
    to_raw, to_log, to_logs = plain.slope_pullback(to_d, at.raw, s, ss, slope, parts)
    log_s = pull.log_s
    if isinstance(to_log, Tensor):
        log_s.add_(to_log[0]).add_(to_log[1])

    # To the sizes of the bin, of its neighbours, and of all bins to its left, which push it.
    to_w = (log_s / w).addcmul_(pull.z, pull.t).neg_()
    to_h = (log_s / h).addcmul_(pull.y, pull.theta)
    of_own = _mixed(to_w, to_h, rq.mixing(slope))
    of_left = _mixed(pull.z.neg(), pull.y, rq.mixing(slope))
    near = _mixed(to_logs / ws.neg_(), to_logs / hs, rq.mixing(slope))
    own = memory.take(len(at.u) - 2)
    torch.sub(at.passed[:-1], at.passed[1:], out=own[1:-1])
    own[0].copy_(at.passed[0]).neg_().add_(1)
    own[-1].copy_(at.passed[-1])

    bins = len(own)
    total = 2 * bound / (1 + rq.mixing(slope))
    scale, floor = total * (1 - bins * least), total * least
    count = at.passed.sum(0)
    out = memory.take(3, bins - 1)
    for k, padded in enumerate((at.u, at.v)):
        left, right = near[k].unbind()
        mean = (at.near[k] - floor).mul_(of_own[k])
        sides = (at.near[2 + k] - floor).mul_(near[k])
        mean.add_(sides.sum(0))
        mean.addcmul_(at.sums[k].sub(count, alpha=floor), of_left[k]).mul_(-1 / scale)
        # To the bins that they belong to, and through the softmax. The last bin takes what is left
        # of the box; as probabilities add up, so does its softmax.
        pulled = torch.addcmul(mean, own[:-1], of_own[k], out=out[k])
        pulled.addcmul_(own[1:], left).addcmul_(at.passed, of_left[k])
        pulled[1:].addcmul_(own[:-2], right)
        pulled.mul_(padded[1:-2].sub_(floor))
    left, right = to_raw.unbind()
    torch.mul(own[:-1], right, out=out[2]).addcmul_(own[1:], left)
    return grad_x.view(shape), *out.view(3, bins - 1, *shape).unbind()  # type: ignore[return-value]
