r"""The spline of three and more bins in eager mode, without gradients recorded: in place.

The numbers are those of :mod:`flowguard.spline.many`, which says why the formulas hold, computed as
in :mod:`flowguard.spline.inplace.bin`. What belongs to the bin of an element is fetched by its
index, all at once, out of one table; so are the softmaxes of its neighbours.

A call costs as much as a pass over a thousand elements. So what can be done at once for widths and
heights, for several bins or for both knots lies side by side in memory, of which as little as can be is
touched: what is out of reach of the nearest caches takes thrice the time.
"""

__all__ = ["evaluate", "layout", "pull_back"]

from collections.abc import Sequence

import torch
from torch import Tensor

from flowguard.spline import constants
from flowguard.spline.bin import Cell, Params
from flowguard.spline.inplace import bin as rq
from flowguard.spline.inplace.memory import Layout, Pair, Rows, Tensors
from flowguard.spline.options import Options

FOUND = 11  # numbers of each element's bin
FETCHED = 10  # numbers that these are made of
FEW = 2000  # elements up to which a call costs more than to write an index for all of these
RAW = 1e3  # beyond, all maps of a raw slope are constant; a sum of these is finite


def layout(rows: int) -> Layout:
    r"""The memory that the functions need for as many rows of widths: blocks for the table, for
    gradients to two softmaxes, for masks of the bins, for what is fetched and by which index, for
    sums and weights of softmaxes, for the gradients to sizes, for three secants and the gradients to
    their logarithms."""
    bins = rows + 1
    rest = (FETCHED,), (FETCHED,), (2, 1), (2, 4), (3,), (3,)
    return Layout(13, 17, blocks=((FOUND + 6 * bins,), (2, bins), (bins,), *rest))


class _Desk:
    r"""The memory, divided once for all calls.

    Of each element's bin is *found*, for widths, then for heights: the size of its left neighbour,
    its own, that of its right neighbour, and its corner; then raw slopes at both knots, and its
    number. The neighbours that bins at the ends of the box do not have are fetched too, and all that
    comes of them is multiplied by zero: as what the softmaxes border on in the table is not
    negative, their secants are finite.
    """

    def __init__(self, m: Rows) -> None:
        table, to_logits, self.own, fetched, index, *rest = m.blocks
        self.weight, to_found, secants, self.to_logs = rest
        shape, self.bins = table.shape[1:], len(self.own)
        bins = self.bins
        parts = [FOUND, 2 * bins, bins - 1, 2 * bins, bins + 1]
        self.found, softmax, self.passed, sums, self.raws = table.split(parts)
        self.softmax, self.sums = (t.view(2, bins, *shape) for t in (softmax, sums))
        # The logit of the last bin is zero.
        self.logits, self.last = [s[:-1] for s in self.softmax.unbind()], self.softmax[:, -1]
        # Of each bin its sizes, what is before it and what is after it.
        before = self.sums.unbind(1)
        self.steps = [*zip(self.softmax.unbind(1), before, before[1:], strict=False)]
        self.first, self.knots = before[0], self.sums[:, 1:].unbind()
        self.ends, self.inner = self.raws[::bins], self.raws[1:-1]

        size, summed = shape.numel(), FOUND + 3 * bins - 1
        start, raw = FOUND, summed + 2 * bins
        sides = [[start + k - 1, start + k, start + k + 1, summed + k] for k in (0, bins)]
        starts = [*sides[0], *sides[1], raw, raw + 1]
        self.numbers, self.limits, self.signs = (
            m.counted(*values).view(-1, *(1,) * len(shape))
            for values in ((0, 1, bins), (0, bins - 1, 2), (1, -2, 2))
        )
        # Where to fetch from: with one index for all, or all with one index.
        self.starts: Tensor | None = None
        if m.size <= FEW and m.at_home:
            self.starts = m.index([size * start for start in starts]).unsqueeze(1)
        self.places = m.as_index(index).view(FETCHED, -1)
        self.whole = table.view(-1), self.places.view(-1), fetched.view(-1)
        sources = [table[start : start + bins].view(-1) for start in starts]
        self.each = [*zip(sources, fetched.view(FETCHED, -1).unbind(), strict=True)]
        self.softmaxes, self.raw_fetched = fetched[:8].split(4), fetched[8:]
        mixed = self.found[:8].view(2, 4, *shape)
        self.mixed, self.raw, self.number = mixed.unbind(), self.found[8:10], self.found[10]

        # A bin and its neighbours, and the secants to the left and to the right of its knots.
        (_, self.w, _, self.x), (_, self.h, _, self.y) = (side.unbind() for side in mixed)
        self.sizes, (self.widths, self.heights) = mixed[:, :3], mixed[:, :3].unbind()
        self.secants, self.beside = secants, (secants[:2], secants[1:])
        self.s = secants[1]

        # Gradients: to what is found, to the softmaxes it is mixed of, and to all softmaxes, which
        # take the places of these.
        self.to_logs_of = self.to_logs.unbind()
        self.to_found, self.to_sizes = to_found.unbind(), to_found[:, :3]
        (_, self.to_w, _, self.to_x), (_, self.to_h, _, self.to_y) = (t.unbind() for t in to_found)
        self.to_softmaxes = fetched[:8].view(2, 4, *shape)
        self.of_left, self.of_own, self.of_right, self.of_passed = self.to_softmaxes.split(1, 1)
        self.to_lefts, self.to_rights = to_logits[:, :-1], to_logits[:, 1:]
        self.own_but_first, self.own_but_last = self.own[1:], self.own[:-1]
        self.to_logits, self.pulled = to_logits, [g[:-1] for g in to_logits.unbind()]


def _mix(pairs: Tensors, share: float, out: Tensors) -> None:
    torch.add(pairs[0], pairs[1], alpha=share, out=out[0])
    torch.add(pairs[1], pairs[0], alpha=share, out=out[1])


def _locate(
    m: Rows,
    desk: _Desk,
    x: Tensor,
    params: Params,
    o: Options,
    vertical: bool,
    uncut: Tensors = (),
) -> None:
    r"""Finds the bin of each element, and what there is to know of it. Writes ones to where no
    logit was cut, if there is something to write to."""
    scale, floor = o.softmax(desk.bins)
    for uneven, part in zip(params, desk.logits, strict=False):
        # copies with bins first in memory: far faster by way of this operation than by a copy
        torch.clamp(uneven, max=constants.most(), out=part)
    desk.last.zero_()
    desk.softmax.mul_(m.number(constants.log2_e())).exp2_()  # thrice as fast as exp
    for part, ones in zip(desk.logits, uncut, strict=False):
        torch.le(part, m.number(constants.top()), out=ones)
    # The scaled softmaxes over logits and a zero, raised; and, from the end of the box, their sums.
    weight = torch.sum(desk.softmax, 1, keepdim=True, out=desk.weight)
    torch.div(m.number(scale), weight, out=weight)
    torch.addcmul(m.number(floor), desk.softmax, weight, out=desk.softmax)
    desk.first.fill_(-o.bound / (1 + o.share()))
    for row, before, after in desk.steps:
        torch.add(before, row, out=after)
    along, across = desk.knots[::-1] if vertical else desk.knots
    passed = torch.add(along, across, alpha=o.share(), out=desk.passed)
    torch.ge(x, passed, out=passed)  # a one for each knot to the left, or on which it lies
    torch.sum(passed, 0, out=desk.number)

    desk.ends.zero_()
    torch.clamp(params[2], -RAW, RAW, out=desk.inner)
    place = m.places(desk.number)
    if desk.starts is not None:
        torch.add(desk.starts, place, out=desk.places)
        table, index, out = desk.whole
        torch.index_select(table, 0, index, out=out)
    else:
        for table, out in desk.each:
            torch.index_select(table, 0, place, out=out)
    _mix(desk.softmaxes, o.share(), desk.mixed)
    # A NaN anywhere is one of the element: those of the logits are in every bin already.
    bad = torch.sum(desk.raws, 0, out=m.take())
    torch.addcmul(desk.raw_fetched, bad, m.number(0.0), out=desk.raw)
    m.give(bad)


def _inner(m: Rows, desk: _Desk, most: Tensor) -> Tensor:
    r"""Zeros for the knots at the ends of the box, where the slope is one; `most` for others."""
    beside = torch.addcmul(desk.limits, desk.number, desk.signs, out=m.pair()[0])
    return torch.minimum(beside, most, out=beside)


def _inner_slope(m: Rows, desk: _Desk, rows: Tensors, o: Options) -> None:
    r"""Writes the slopes at both knots of the bin; and the largest of them and those for a raw
    zero, with what else :func:`_slope_pullback` needs, in eight rows."""
    d, p, ratio, part, gain, mean, high, span = rows
    if o.slope is None:
        rq.published_slope(m, desk.raw, p, d)
        return
    low, (left, right) = m.number(o.low()), desk.beside
    torch.minimum(left, right, out=high)
    torch.addcmul(m.number(0.0), high, high, value=0.5 / o.low(), out=high).clamp_(max=1 / o.low())
    torch.mul(left, right, out=mean).sqrt_()
    torch.sigmoid(desk.raw, out=p)
    torch.sub(mean, low, out=part)
    # The mean of both weights is away from zero, as one of them is.
    torch.sub(high, mean, out=gain).clamp_(min=constants.room()).lerp_(part, p)
    torch.mul(part.div_(gain), p, out=ratio)
    torch.sub(high, low, out=span)
    torch.addcmul(low, span, ratio, out=d)


def _slope_pullback(
    m: Rows, desk: _Desk, rows: Sequence[Pair], grad: Tensor, o: Options, to_raw: Tensor
) -> tuple[Pair, Pair] | None:
    r"""Writes the gradient to `raw`; returns those to the logarithms of the secants to the left and
    to the right of both knots, if there are any. Overwrites the rows."""
    # With up = mean - low, room = high - mean and span = up + room, the slope is
    #     d = low + span ratio, ratio = part p, part = up / R, R = up p + room (1 - p)
    # and, as R - span (1 - p) = up (2 p - 1), with gain = span / R
    #     ∂d / ∂raw = span ratio (1 - ratio), ∂d / ∂mean = gain² p (1 - p),
    #     ∂d / ∂high = part² p (2 p - 1).
    # Where the room is taken as a constant, ∂d / ∂mean is smaller by room / span, and
    # ∂d / ∂high = ratio.
    d, p, ratio, part, gain, mean, high, span = (pair[0] for pair in rows)
    if o.slope is None:
        rq.published_pullback(m, d.mul_(grad), desk.raw, p, to_raw)
        return None
    free = torch.sub(high, mean, out=d)
    torch.gt(free, m.number(constants.room()), out=free)
    squashed = torch.ops.aten.sigmoid_backward.grad_input
    to_mean = squashed(mean.mul_(grad), p, grad_input=mean)
    spare = m.pair()[0]
    torch.lerp(m.number(constants.room()), span, free, out=spare).mul_(span)
    to_mean.mul_(spare.div_(gain).div_(gain))
    squashed(span.mul_(grad), ratio, grad_input=to_raw)
    uncut = torch.lt(high, m.number(1 / o.low()), out=gain)
    high.mul_(uncut).mul_(grad)
    to_high = p.addcmul_(p, p, value=-2).mul_(part).mul_(part).neg_()
    to_high = torch.lerp(ratio, to_high, free, out=p).mul_(high)
    # The logarithm of the mean is half of each, that of the highest slope twice the smaller one:
    # once each for equal ones.
    smaller = torch.sub(*desk.beside[::-1], out=spare).sign_()
    both = torch.add(to_high, to_mean, alpha=0.5, out=mean)
    to_high.mul_(smaller)
    torch.add(both, to_high, out=high)
    both.sub_(to_high)
    return rows[6], rows[5]


def evaluate(m: Rows, outs: Tensors, v: Tensor, params: Params, o: Options) -> None:
    r"""Writes the spline or its inverse, and the logarithm of its slope if that is wanted."""
    desk, one = m.desk(_Desk), m.number(1.0)
    x = torch.clamp(v, -o.bound, o.bound, out=m.take())
    _locate(m, desk, x, params, o, o.inverse)
    torch.div(desk.heights, desk.widths, out=desk.secants)
    d, p, bent, mean, high = (m.pair() for _ in range(5))
    # Without a pullback rows may be in common.
    _inner_slope(m, desk, [r[0] for r in (d, p, p, d, bent, mean, high, high)], o)
    most = one
    if o.slope is not None:
        # A zero between two secants of one gives a slope of one, but for rounding. Their mean does
        # not tell them: that of a secant and its inverse is one too.
        most = torch.ne(torch.add(mean[0], desk.raw, alpha=1e30, out=bent[0]), one, out=bent[0])
        torch.maximum(most, torch.ne(desk.s, one, out=mean[1]), out=most)
    torch.lerp(one, d[0], _inner(m, desk, most), out=d[0])
    cell = Cell(desk.x, desk.y, desk.w, desk.h, *d[1:])
    start, size = (cell.y, cell.h) if o.inverse else (cell.x, cell.w)
    z = torch.sub(x, start, out=m.take())
    torch.clamp(z, m.number(0.0), size, out=z)
    back = torch.add(start, z, out=m.take())
    if o.inverse:
        value, grown = rq.solve(m, z, cell, o.steep)
    else:
        value, grown = rq.advance(m, z, desk.s, cell, o.steep)
    # What the identity adds to the corner is what the distance was rounded to: it is undone.
    same = torch.eq(value, back, out=m.take())
    value.lerp_(x, same)
    m.give(back, same, x)
    rq.finish(m, outs, v, (value, grown), o.bound)


def pull_back(
    m: Rows, outs: Tensors, x: Tensor, params: Params, grads: Tensors, o: Options
) -> None:
    r"""Writes the gradients to the input and to all parameters; see :func:`flowguard.spline.bin.pull_back`."""
    desk, one = m.desk(_Desk), m.number(1.0)
    z = torch.clamp(x, -o.bound, o.bound, out=m.take())
    _locate(m, desk, z, params, o, False, outs[1:3])
    torch.div(desk.heights, desk.widths, out=desk.secants)
    rows = [m.pair() for _ in range(8)]
    _inner_slope(m, desk, [r[0] for r in rows], o)
    d, inner = m.pair(), _inner(m, desk, one)
    torch.lerp(one, rows[0][0], inner, out=d[0])

    inside = rq.masked(m, outs, x, grads, o.bound)
    torch.clamp(z.sub_(desk.x), m.number(0.0), desk.w, out=z)
    cell = Cell(desk.x, desk.y, desk.w, desk.h, *d[1:])
    pull = rq.pull_back(m, z, desk.s, cell, inside, o.inverse)
    outs[0].add_(pull.grad)
    to_d, (to_raw, *of_raw), of = pull.d[0].mul_(inner), d, desk.to_logs_of
    logs = _slope_pullback(m, desk, rows, to_d, o, to_raw)
    if logs is None:
        of[1].copy_(pull.log_s)
    else:
        # The bin is to the right of its left knot, and to the left of its right one.
        (_, first, own), (_, own_too, last) = logs
        torch.add(own, own_too, out=of[1]).add_(pull.log_s)
        of[0].copy_(first)
        of[2].copy_(last)

    # To the sizes of the bin and of its neighbours, and to the corner, which all bins to the left
    # push: to widths with the other sign.
    torch.div(desk.to_logs, desk.sizes, out=desk.to_sizes)
    desk.to_w.addcmul_(pull.z, pull.t)
    desk.to_h.addcmul_(pull.y, torch.sub(one, pull.rest, out=pull.rest))
    desk.to_x.copy_(pull.z)
    desk.to_y.copy_(pull.y)
    _mix(desk.to_found, -o.share(), desk.softmaxes)
    desk.softmaxes[0].neg_()

    # To the bins that they belong to, and through the softmax.
    torch.eq(desk.number, desk.numbers, out=desk.own)
    torch.mul(desk.own, desk.of_own, out=desk.to_logits)
    desk.to_lefts.addcmul_(desk.passed, desk.of_passed)
    if logs is not None:
        desk.to_lefts.addcmul_(desk.own_but_first, desk.of_left)
        desk.to_rights.addcmul_(desk.own_but_last, desk.of_right)
    # The floors are constants: they are taken off again.
    scale, floor = o.softmax(desk.bins)
    desk.to_logits.mul_(desk.softmax.sub_(m.number(floor)))
    mean = torch.sum(desk.to_logits, 1, keepdim=True, out=desk.weight)
    desk.to_logits.addcmul_(desk.softmax, mean, value=-1 / scale)
    for out, pulled in zip(outs[1:], desk.pulled, strict=False):
        out.mul_(pulled)
    to_inner = torch.mul(desk.own_but_last, of_raw[1], out=desk.passed)
    outs[3].copy_(to_inner.addcmul_(desk.own_but_first, of_raw[0]))
