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
        self.memory = like.new_empty((10 * bins + 22) * size, dtype=dtype)
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


def _softmax(widths: Tensor, heights: Tensor, scale: float, memory: Rows) -> Tensor:
    r"""The scaled softmaxes over the given logits and a zero; first and last row come twice."""
    bins = len(widths) + 1
    padded = memory.take(2, bins + 2)
    for part, logits in zip(padded.unbind(), (widths, heights), strict=True):
        # inf - inf would be NaN
        _finite(logits, part[1:-2], torch.finfo(logits.dtype).max / 4)
    out = padded[:, 1:-1]
    out[:, -1].zero_()
    out.sub_(out.amax(1, keepdim=True)).mul_(rq.LOG2_E).exp2_()  # thrice as fast as exp
    out.mul_(out.sum(1, keepdim=True).reciprocal_().mul_(scale))
    padded[:, :: bins + 1].copy_(padded[:, 1 :: bins - 1])
    return padded


def _cumulated(padded: Tensor, memory: Rows) -> Tensor:
    r"""The sum of all bins to the left, for each bin."""
    out = memory.take(2, padded.shape[1] - 2)
    total, *rest = out.unbind(1)
    total.zero_()
    for row, total_row in zip(padded[:, 1:].unbind(1), rest, strict=False):
        total = torch.add(total, row, out=total_row)
    return out


def _mixed(uv: Tensor, share: float) -> tuple[Tensor, Tensor]:
    u, v = uv.unbind()
    return torch.add(u, v, alpha=share), torch.add(v, u, alpha=share)


class State(NamedTuple):
    r"""All that is known of each element's bin. Softmaxes are of widths and of heights, without
    their floors; pairs are of the left and of the right side."""

    softmax: Tensor  # padded
    passed: Tensor  # a one for each inner knot to its left, or on which it lies
    own: Tensor  # softmaxes of its bin
    near: Tensor  # pairs of its neighbours'
    sums: Tensor  # over all bins to its left
    x0: Tensor
    y0: Tensor
    w: Tensor
    h: Tensor
    s: Tensor
    ws: Tensor  # pairs of its neighbours
    hs: Tensor
    ss: Tensor
    raw: Tensor  # a pair
    inner: Tensor  # a pair: zero at the ends of the box, where the slope is one


def _scales(bins: int, bound: float, slope: float | None, least: float) -> tuple[float, float]:
    r"""What the softmax is multiplied by, and then raised by."""
    total = 2 * bound / (1 + rq.mixing(slope))
    return total * (1 - bins * least), total * least


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
    scale, floor = _scales(bins, bound, slope, least)
    softmax = _softmax(widths, heights, scale, memory)
    left = _cumulated(softmax, memory)
    along, across = reversed(left[:, 1:].unbind()) if vertical else left[:, 1:].unbind()
    passed = memory.take(bins - 1)
    offset = torch.arange(1, bins, dtype=x.dtype, device=x.device).unsqueeze(1)
    offset.mul_(-floor * (1 + share)).add_(bound)
    torch.add(along, across, alpha=share, out=passed).sub_(offset)
    torch.ge(x, passed, out=passed)
    number = passed.sum(0)
    place = number.long().mul_(size).add_(torch.arange(size, device=x.device))

    raws = memory.take(bins + 1)
    raws[::bins].zero_()
    _finite(derivatives, raws[1:-1], RAW)
    own, near, sums, raw = memory.take(2), memory.take(2, 2), memory.take(2), memory.take(2)

    def fetch(rows: Tensor, *outs: Tensor) -> None:
        for k, out in enumerate(outs):
            torch.index_select(rows[k:].view(-1), 0, place, out=out)

    for rows, cumulated, one, pair, total in zip(
        *(t.unbind() for t in (softmax, left, own, near, sums)), strict=True
    ):
        fetch(rows, pair[0], one, pair[1])
        fetch(cumulated, total)
    fetch(raws, *raw.unbind())
    # A NaN anywhere is one of the element: those of the logits are in every bin already.
    sums.add_(raws.sum(0).mul_(0))
    x0, y0 = _mixed(torch.add(sums, number, alpha=floor), share)
    w, h = _mixed(own + floor, share)
    ws, hs = _mixed(near + floor, share)
    inner = memory.take(2)
    before, after = inner.unbind()
    torch.clamp(number, max=1, out=before)
    torch.clamp(number.neg_().add_(bins - 1), max=1, out=after)
    x0.sub_(bound)
    y0.sub_(bound)
    return State(
        softmax, passed, own, near, sums, x0, y0, w, h, h / w, ws, hs, hs / ws, raw, inner
    )


def _within(z: Tensor, size: Tensor) -> Tensor:
    return torch.minimum(z, size, out=z).clamp_(min=0.0)


def evaluate(
    memory: Rows,
    v: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
    steep: bool,
) -> tuple[Tensor, ...]:
    r"""The spline or its inverse, and the logarithm of its slope if that is wanted."""
    shape, v = v.shape, v.reshape(-1)
    z = v.clamp(-bound, bound)
    at = _locate(z, widths, heights, derivatives, bound, slope, least, inverse, memory)
    w, h, s = at.w, at.h, at.s
    d = plain.inner_slope(at.raw, s, at.ss, slope)
    d = torch.lerp(torch.ones_like(s), d, at.inner)
    if inverse:
        inv_s = w / h
        a, b = d.mul_(inv_s)
        rise, grown = plain.solve(_within(z.sub_(at.y0), h), w, h, inv_s, a, b, steep)
        outs = plain.finish(v, rise.add_(at.x0), grown, bound)
        return tuple(t.view(shape) for t in outs)

    d0, d1 = d
    _within(z.sub_(at.x0), w)
    t = z / w
    r = 1 - t
    p, q = (s * t).addcmul_(d0, r), (s * r).addcmul_(d1, t)
    inv = (t * p).addcmul_(r, q).reciprocal_()
    num = t.mul_(q).addcmul_(r, p) if steep else None
    bend = p.sub_(q).mul_(r).mul_(inv)
    z.mul_(s)
    grown = None if num is None else s.mul_(inv).square_().mul_(num)
    outs = plain.finish(v, torch.addcmul(z, z, bend, out=z).add_(at.y0), grown, bound)
    return tuple(t.view(shape) for t in outs)


def pull_back(
    memory: Rows,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The gradients to the input and to all parameters; see :func:`_rqs_bin.pull_back`."""
    shape = x.shape
    x, grad_y, grad_l = x.reshape(-1), grad_y.reshape(-1), grad_l.reshape(-1)
    z = x.clamp(-bound, bound)
    at = _locate(z, widths, heights, derivatives, bound, slope, least, False, memory)
    w, h, s = at.w, at.h, at.s
    d, parts = plain.inner_slope_parts(at.raw, s, at.ss, slope)
    d0, d1 = torch.lerp(torch.ones_like(s), d, at.inner)

    outside = x.abs().ge_(bound)
    inside = 1 - outside
    pull = plain.pull_back(
        _within(z.sub_(at.x0), w), w, h, s, d0, d1, grad_y * inside, grad_l * inside, inverse
    )
    grad_x = torch.addcmul(pull.grad, grad_y, outside, out=outside)
    to_d = torch.stack((pull.d0, pull.d1)).mul_(at.inner)
    to_raw, to_log, to_logs = plain.slope_pullback(to_d, at.raw, s, at.ss, slope, parts)
    log_s = pull.log_s
    if isinstance(to_log, Tensor):
        log_s.add_(to_log.sum(0))

    # To the sizes of the bin, of its neighbours, and of all bins to its left, which push it.
    share = rq.mixing(slope)

    def mixed(to_w: Tensor, to_h: Tensor) -> Tensor:
        out = memory.take(2, *to_w.shape[:-1])
        u, v = out.unbind()
        torch.add(to_w, to_h, alpha=share, out=u)
        torch.add(to_h, to_w, alpha=share, out=v)
        return out

    of_own = mixed(
        (log_s / w).addcmul_(pull.z, pull.t).neg_(), (log_s / h).addcmul_(pull.y, pull.theta)
    )
    of_near = mixed(to_logs / at.ws.neg_(), to_logs / at.hs)
    of_left = mixed(-pull.z, pull.y)
    bins = len(widths) + 1
    own = memory.take(bins)
    torch.sub(at.passed[:-1], at.passed[1:], out=own[1:-1])
    first, last = own[:: bins - 1].unbind()
    torch.sub(torch.ones_like(s), at.passed[0], out=first)
    last.copy_(at.passed[-1])

    # To the bins that they belong to, and through the softmax. The last bin takes what is left of
    # the box; as probabilities add up, so does its softmax.
    mean = torch.mul(at.own, of_own).add_(at.near.mul_(of_near).sum(1))
    mean.addcmul_(at.sums, of_left).mul_(-1 / _scales(bins, bound, slope, least)[0])
    out = memory.take(3, bins - 1)
    pulled = out[:2]
    mean, of_own, of_left = mean.unsqueeze(1), of_own.unsqueeze(1), of_left.unsqueeze(1)
    torch.addcmul(mean, own[:-1], of_own, out=pulled)
    pulled.addcmul_(own[1:], of_near[:, :1]).addcmul_(at.passed, of_left)
    pulled[:, 1:].addcmul_(own[:-2], of_near[:, 1:])
    pulled.mul_(at.softmax[:, 1:-2])
    before, after = to_raw.unbind()
    torch.mul(own[:-1], after, out=out[2]).addcmul_(own[1:], before)
    return grad_x.view(shape), *out.view(3, bins - 1, *shape).unbind()  # type: ignore[return-value]
