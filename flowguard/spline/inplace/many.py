r"""The spline of three and more bins in eager mode, without gradients recorded: in place.

The numbers are those of :mod:`flowguard.spline.many`, which says why the formulas hold, computed as
in :mod:`flowguard.spline.inplace.bin`. What belongs to the bin of an element is fetched by its index, with
one row of padding on either side for its neighbours.
"""

__all__ = ["evaluate", "layout", "pull_back"]

from typing import NamedTuple

import torch
from torch import Tensor

from flowguard.spline.bin import LOG2_E, Cell, Params
from flowguard.spline.inplace import bin as rq
from flowguard.spline.inplace.memory import Layout, Pair, Rows, Tensors
from flowguard.spline.many import CUT, ROOM, TOP
from flowguard.spline.options import Options

RAW = 1e3  # beyond, all maps of a raw slope are constant; a sum of these is finite


def layout(rows: int) -> Layout:
    r"""The memory that the functions need for as many rows of widths: blocks for both softmaxes, padded, for their sums, for
    the knots, for the raw slopes and for masks of the bins."""
    bins = rows + 1
    blocks = (2, bins + 2), (2, bins), (bins - 1,), (bins + 1,), (bins,)
    return Layout(pairs=23, singles=17, blocks=blocks)


def _mixed(to_u: Tensor, to_v: Tensor, share: float, out: Pair) -> Pair:
    torch.add(to_u, to_v, alpha=share, out=out[1])
    torch.add(to_v, to_u, alpha=share, out=out[2])
    return out


class Located(NamedTuple):
    r"""All that is known of each element's bin. Softmaxes are of widths and of heights, raised to
    their floor; what has a side is a pair of the left and of the right one."""

    own: Pair  # softmaxes of its bin
    left: Pair  # softmaxes of its left neighbour
    right: Pair
    sums: Pair  # over all bins to its left
    corner: Pair
    size: Pair
    s: Tensor
    ws: Pair  # of its neighbours
    hs: Pair
    ss: Pair
    raw: Pair
    number: Tensor  # of its bin


def _locate(
    m: Rows, x: Tensor, params: Params, o: Options, vertical: bool, uncut: Tensors = ()
) -> Located:
    r"""Writes ones to where no logit was cut, if there is something to write to."""
    *logits, derivatives = params
    bins, share, bound = len(derivatives) + 1, o.share(), o.bound
    scale, floor = o.softmax(bins)
    padded, cumulated, passed, raws, _ = m.blocks
    # The scaled softmaxes over logits and a zero, raised; first and last row come twice.
    softmax, total = padded[:, 1:-1], m.pair()
    for part, uneven in zip(softmax.unbind(), logits, strict=True):
        # copies with bins first in memory: far faster by way of this operation than by a copy
        torch.clamp(uneven, max=CUT, out=part[:-1])
    softmax[:, -1].zero_()
    softmax.mul_(m.number(LOG2_E)).exp2_()  # thrice as fast as exp
    for part, ones in zip(softmax.unbind(), uncut, strict=False):
        torch.le(part[:-1], m.number(TOP), out=ones)
    torch.sum(softmax, 1, out=total[0])
    weight = torch.div(m.number(scale), total[0], out=total[0]).unsqueeze(1)
    torch.addcmul(m.number(floor), softmax, weight, out=softmax)
    padded[:, :: bins + 1].copy_(padded[:, 1 :: bins - 1])
    m.give_pair(total)

    before, *rest = cumulated.unbind(1)  # over all bins to the left, for each bin
    before.zero_()
    for row, out in zip(softmax.unbind(1), rest, strict=False):
        before = torch.add(before, row, out=out)
    along, across = cumulated[:, 1:].unbind()
    if vertical:
        along, across = across, along
    torch.add(along, across, alpha=share, out=passed).sub_(m.number(bound))
    torch.ge(x, passed, out=passed)  # a one for each knot to the left, or on which it lies
    number = torch.sum(passed, 0, out=m.take())
    place = m.places(number, bins + 2)

    raws[::bins].zero_()
    torch.clamp(derivatives, -RAW, RAW, out=raws[1:-1])
    own, left, right, sums, raw = (m.pair() for _ in range(5))

    def fetch(rows: Tensor, *outs: Tensor) -> None:
        for k, out in enumerate(outs):
            torch.index_select(rows[k:].view(-1), 0, place, out=out.view(-1))

    for k in range(2):
        fetch(padded[k], left[k + 1], own[k + 1], right[k + 1])
        fetch(cumulated[k], sums[k + 1])
    fetch(raws, *raw[1:])
    # A NaN anywhere is one of the element: those of the logits are in every bin already.
    bad = torch.sum(raws, 0, out=m.take()).mul_(m.number(0.0))
    sums[0].add_(bad)

    corner, its = (
        _mixed(sums[1], sums[2], share, m.pair()),
        _mixed(own[1], own[2], share, m.pair()),
    )
    corner[0].sub_(m.number(bound))
    # of the left and of the right one each: widths and heights, then sorted by these
    ws, hs, ss = m.pair(), m.pair(), m.pair()
    for side, near in enumerate((left, right), 1):
        _mixed(near[1], near[2], share, (ss[0], ws[side], hs[side]))
    torch.div(hs[0], ws[0], out=ss[0])
    s = torch.div(its[2], its[1], out=bad)
    return Located(own, left, right, sums, corner, its, s, ws, hs, ss, raw, number)


def _inner(m: Rows, number: Tensor, bins: int, most: Tensors | Tensor) -> Tensor:
    r"""Zeros for the knots at the ends of the box, where the slope is one; `most` for others."""
    both, left, right = m.pair()
    torch.minimum(number, most[0], out=left)
    torch.sub(m.number(bins - 1.0), number, out=right)
    torch.minimum(right, most[1], out=right)
    return both


def _inner_slope(m: Rows, rows: Tensors, at: Located, o: Options) -> None:
    r"""Writes the slopes at both knots of the bin; and the largest of them and those for a raw
    zero, with what else :func:`_slope_pullback` needs, in eight rows."""
    d, p, ratio, part, gain, mean, high, span = rows
    if o.slope is None:
        rq.published_slope(m, at.raw[0], p, d)
        return
    low, s, ss = m.number(o.low()), at.s, at.ss[0]
    torch.minimum(s, ss, out=high)
    torch.addcmul(m.number(0.0), high, high, value=0.5 / o.low(), out=high).clamp_(max=1 / o.low())
    torch.mul(s, ss, out=mean).sqrt_()
    torch.sigmoid(at.raw[0], out=p)
    torch.sub(mean, low, out=part)
    # The mean of both weights is away from zero, as one of them is.
    torch.sub(high, mean, out=gain).clamp_(min=ROOM).lerp_(part, p)
    torch.mul(part.div_(gain), p, out=ratio)
    torch.sub(high, low, out=span)
    torch.addcmul(low, span, ratio, out=d)


def _slope_pullback(
    m: Rows, rows: Tensors, grad: Tensor, at: Located, o: Options, out: Tensor
) -> tuple[Tensor, Tensor] | None:
    r"""Writes the gradient to `raw`; returns *twice* those to the logarithms of both secants, if
    there are any. Overwrites the rows."""
    # With up = mean - low, room = high - mean and span = up + room, the slope is
    #     d = low + span ratio, ratio = part p, part = up / R, R = up p + room (1 - p)
    # and, as R - span (1 - p) = up (2 p - 1), with gain = span / R
    #     ∂d / ∂raw = span ratio (1 - ratio), ∂d / ∂mean = gain² p (1 - p),
    #     ∂d / ∂high = part² p (2 p - 1).
    # Where the room is taken as a constant, ∂d / ∂mean is smaller by room / span, and
    # ∂d / ∂high = ratio.
    d, p, ratio, part, gain, mean, high, span = rows
    if o.slope is None:
        rq.published_pullback(m, d.mul_(grad), at.raw[0], p, out)
        return None
    free = torch.sub(high, mean, out=d)
    torch.gt(free, m.number(ROOM), out=free)
    torch.div(span, gain, out=gain)
    smaller = m.pair()[0]
    torch.lerp(torch.div(m.number(ROOM), span, out=smaller), m.number(1.0), free, out=smaller)
    squashed = torch.ops.aten.sigmoid_backward.grad_input
    to_mean = squashed(mean.mul_(grad), p, grad_input=mean)
    to_mean.mul_(gain).mul_(gain).mul_(smaller)
    squashed(span.mul_(grad), ratio, grad_input=out)
    uncut = torch.lt(high, m.number(1 / o.low()), out=gain)
    high.mul_(uncut).mul_(grad)
    to_high = p.addcmul_(p, p, value=-2).mul_(part).mul_(part).neg_()
    to_high = torch.lerp(ratio, to_high, free, out=p).mul_(high)
    # The logarithm of the mean is half of each, that of the highest slope twice the smaller one:
    # once each for equal ones.
    smaller = torch.sub(at.ss[0], at.s, out=smaller).sign_()
    both = to_mean.add_(to_high, alpha=2)
    to_high.mul_(smaller)
    to_first = torch.add(both, to_high, alpha=2, out=high)
    return to_first, both.sub_(to_high, alpha=2)


def evaluate(m: Rows, outs: Tensors, v: Tensor, params: Params, o: Options) -> None:
    r"""Writes the spline or its inverse, and the logarithm of its slope if that is wanted."""
    x = torch.clamp(v, -o.bound, o.bound, out=m.take())
    at = _locate(m, x, params, o, o.inverse)
    (_, x0, y0), (_, w, h) = at.corner, at.size
    for pair in (at.own, at.left, at.right, at.sums):
        m.give_pair(pair)
    d, p, bent, mean, high = (m.pair()[0] for _ in range(5))
    _inner_slope(m, (d, p, p, d, bent, mean, high, high), at, o)  # no pullback: rows in common
    one = m.number(1.0)
    if o.slope is not None:
        # A zero between two secants of one gives a slope of one, but for rounding.
        torch.ne(torch.add(mean, at.raw[0], alpha=1e30, out=bent), one, out=bent)
    inner = _inner(m, at.number, len(params[0]) + 1, (one, one) if o.slope is None else bent)
    cell = Cell(x0, y0, w, h, *torch.lerp(one, d, inner, out=d))
    start, size = (y0, h) if o.inverse else (x0, w)
    z = torch.sub(x, start, out=m.take())
    torch.clamp(z, m.number(0.0), size, out=z)
    back = torch.add(start, z, out=m.take())
    if o.inverse:
        value, grown = rq.solve(m, z, cell, o.steep)
    else:
        value, grown = rq.advance(m, z, at.s, cell, o.steep)
    # What the identity adds to the corner is what the distance was rounded to: it is undone.
    same = torch.eq(value, back, out=m.take())
    value.lerp_(x, same)
    m.give(back, same, x)
    rq.finish(m, outs, v, (value, grown), o.bound)


def pull_back(
    m: Rows, outs: Tensors, x: Tensor, params: Params, grads: Tensors, o: Options
) -> None:
    r"""Writes the gradients to the input and to all parameters; see :func:`flowguard.spline.bin.pull_back`."""
    bins, one = len(params[0]) + 1, m.number(1.0)
    z = torch.clamp(x, -o.bound, o.bound, out=m.take())
    at = _locate(m, z, params, o, False, outs[1:3])
    pairs = [m.pair() for _ in range(8)]
    rows = [p[0] for p in pairs]
    _inner_slope(m, rows, at, o)
    d = m.pair()
    inner = _inner(m, at.number, bins, (one, one))
    torch.lerp(one, rows[0], inner, out=d[0])
    cell = Cell(*at.corner[1:], *at.size[1:], *d[1:])

    inside = rq.masked(m, outs, x, grads, o.bound)
    torch.clamp(z.sub_(cell.x), m.number(0.0), cell.w, out=z)
    pull = rq.pull_back(m, z, at.s, cell, inside, o.inverse)
    outs[0].add_(pull.grad)
    to_raw, log_s = at.corner, pull.log_s
    to_d = pull.d[0].mul_(inner)
    logs = _slope_pullback(m, rows, to_d, at, o, to_raw[0])
    if logs is not None:
        for to_log in logs[0].unbind():
            log_s.add_(to_log, alpha=0.5)
    # Of the rows only the logarithms of the neighbours' secants are still needed.
    for pair in pairs:
        if logs is None or pair[0] is not logs[1]:
            m.give_pair(pair)
    m.give_pair(d)
    m.give_pair(pull.d)

    # To the sizes of the bin, of its neighbours, and of all bins to its left, which push it.
    share = o.share()
    to_size, corner = m.pair(), m.pair()
    torch.div(log_s, at.size[0], out=to_size[0])
    to_size[1].addcmul_(pull.z, pull.t).neg_()
    to_size[2].addcmul_(pull.y, torch.sub(one, pull.rest, out=pull.rest))
    of_own = _mixed(to_size[1], to_size[2], share, m.pair())
    torch.neg(pull.z, out=corner[1])
    of_passed = _mixed(corner[1], pull.y, share, m.pair())
    of_near = []
    if logs is not None:
        to_ws = torch.div(logs[1], at.ws[0], out=to_size[0]).mul_(m.number(-0.5))
        to_hs = torch.div(logs[1], at.hs[0], out=corner[0]).mul_(m.number(0.5))
        of_near = [_mixed(to_ws[k], to_hs[k], share, m.pair()) for k in range(2)]

    # To the bins that they belong to, and through the softmax. The last bin takes what is left of
    # the box; as probabilities add up, so does its softmax.
    softmax, cumulated, passed, _, own = m.blocks
    torch.sub(passed[:-1], passed[1:], out=own[1:-1])
    torch.sub(one, passed[0], out=own[0])
    own[-1].copy_(passed[-1])
    mean = torch.mul(at.own[0], of_own[0], out=at.own[0]).addcmul_(at.sums[0], of_passed[0])
    for side, of_side in zip((at.left, at.right), of_near, strict=False):
        mean.addcmul_(side[0], of_side[0])
    # The floors are constants: they are taken off again.
    scale, floor = o.softmax(bins)
    mean.addcmul_(at.number, of_passed[0], value=-floor)
    for of_side in (of_own, *of_near):
        mean.sub_(of_side[0], alpha=floor)
    mean.mul_(m.number(-1 / scale))
    pulled = cumulated[:, :-1]
    torch.addcmul(mean.unsqueeze(1), own[:-1], of_own[0].unsqueeze(1), out=pulled)
    pulled.addcmul_(passed, of_passed[0].unsqueeze(1))
    if of_near:
        pulled.addcmul_(own[1:], of_near[0][0].unsqueeze(1))
        pulled[:, 1:].addcmul_(own[:-2], of_near[1][0].unsqueeze(1))
    pulled.mul_(softmax[:, 1:-2].sub_(m.number(floor)))
    for out, part in zip(outs[1:], pulled.unbind(), strict=False):
        out.mul_(part)
    torch.mul(own[:-1], to_raw[2], out=passed).addcmul_(own[1:], to_raw[1])
    outs[3].copy_(passed)
