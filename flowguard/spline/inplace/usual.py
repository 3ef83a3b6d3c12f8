r"""The spline in its usual parameterisation in eager mode, without gradients recorded: in place.

The numbers are those of :mod:`flowguard.spline.usual`, computed as in
:mod:`flowguard.spline.inplace.bin`. What belongs to the bin of an element is fetched by its index.
"""

__all__ = ["evaluate", "layout", "pull_back"]

from typing import NamedTuple

import torch
from torch import Tensor

from flowguard.spline import constants
from flowguard.spline.bin import Cell, Params
from flowguard.spline.inplace import bin as rq
from flowguard.spline.inplace.memory import Layout, Pair, Rows, Tensors
from flowguard.spline.options import Options, Usual
from flowguard.spline.usual import at_ends, sizes


def layout(rows: int) -> Layout:
    r"""The memory that the functions need for as many bins: blocks for the softmaxes, for the
    knots, for the raw slopes, for masks of the knots and for what the softmax was clipped by."""
    blocks = (2, rows), (2, rows), (rows + 1,), (rows + 1,), (rows,)
    return Layout(pairs=12, singles=17, blocks=blocks)


class _Located(NamedTuple):
    r"""All that is known of each element's bin. Pairs are of widths and of heights, or of the
    knots to the left and to the right."""

    size: Pair
    corner: Pair
    raw: Pair
    number: Tensor


def _locate(m: Rows, x: Tensor, params: Params, o: Options, vertical: bool) -> _Located:
    *logits, derivatives = params
    u, bins = o.usual, len(logits[0])
    assert u is not None
    shares, before, passed, raws, spare = m.blocks
    total, most = m.pair(), m.pair()
    for part, rows in zip(shares.unbind(), logits, strict=True):
        # copies with bins first in memory: far faster by way of this operation than by a copy
        torch.clamp(rows, -constants.far(), constants.far(), out=part)
        if u.clip is not None:
            part.div_(_denominator(m, part, u.clip / 2, spare))
    torch.amax(shares, 1, out=most[0])
    # A power of two takes a third of the time of an exponential.
    shares.sub_(most[0].unsqueeze(1)).mul_(m.number(constants.log2_e())).exp2_()
    torch.sum(shares, 1, out=total[0])
    scaled = zip(shares.unbind(), total[1:], sizes(bins, o), strict=True)
    for part, whole, (scale, floor) in scaled:
        weight = torch.div(m.number(scale), whole, out=whole)
        torch.addcmul(m.number(floor), part, weight, out=part)
    m.give_pair(most)
    m.give_pair(total)

    first, *rest = before.unbind(1)
    first.fill_(-o.bound)
    for size, out in zip(shares.unbind(1), rest, strict=False):
        first = torch.add(first, size, out=out)
    # A one for each knot to the left, or on which it lies; that at the left end comes first.
    passed[0].fill_(1.0)
    passed[-1].zero_()
    torch.ge(x, before[int(vertical), 1:], out=passed[1:-1])
    number = torch.sum(passed[1:-1], 0, out=m.take())
    place = m.places(number)

    inner = raws
    if len(derivatives) < bins:
        raws[::bins].fill_(at_ends(u))
        inner = raws[1:-1]
    torch.clamp(derivatives, -constants.steepest(), constants.steepest(), out=inner)
    size, corner, raw = m.pair(), m.pair(), m.pair()
    for first, second, (_, one, other) in (
        (*shares, size),
        (*before, corner),
        (raws, raws[1:], raw),
    ):
        torch.index_select(first.view(-1), 0, place, out=one.view(-1))
        torch.index_select(second.view(-1), 0, place, out=other.view(-1))
    # A NaN anywhere is one of the element: those of the logits are in every bin already.
    bad = torch.sum(raws, 0, out=m.take()).mul_(m.number(0.0))
    raw[0].add_(bad)
    m.give(bad)
    return _Located(size, corner, raw, number)


def _denominator(m: Rows, x: Tensor, limit: float, out: Tensor) -> Tensor:
    r"""What is clipped smoothly is to be divided by, and its gradient twice."""
    torch.abs(x, out=out)
    return torch.addcmul(m.number(1.0), out, m.number(1 / limit), out=out)


def _slopes(m: Rows, raw: Pair, u: Usual, out: Pair) -> None:
    r"""Writes the slopes at both knots."""
    if u.clip is not None:
        _denominator(m, raw[0], u.clip, out[0])
        torch.div(raw[0], out[0], out=out[0]).mul_(m.number(constants.log2_e())).exp2_()
        return
    torch.ops.aten.softplus.out(raw[0], 1.0, constants.threshold(), out=out[0])
    torch.addcmul(m.number(u.slope), out[0], m.number(u.gain), out=out[0])


def _slope_pullback(m: Rows, grad: Pair, raw: Pair, d: Pair, u: Usual) -> Tensor:
    r"""The gradients to both raw slopes. Overwrites all."""
    if u.clip is not None:
        below = _denominator(m, raw[0], u.clip, raw[0])
        return grad[0].mul_(d[0]).div_(below).div_(below)
    uncut = torch.lt(raw[0], m.number(constants.steepest()), out=d[0])
    uncut.mul_(grad[0]).mul_(m.number(u.gain))
    back = torch.ops.aten.softplus_backward.grad_input
    return back(uncut, raw[0], 1.0, constants.threshold(), grad_input=grad[0])


def evaluate(m: Rows, outs: Tensors, v: Tensor, params: Params, o: Options) -> None:
    r"""Writes the spline or its inverse, and the logarithm of its slope if that is wanted."""
    assert o.usual is not None
    x = torch.clamp(v, -o.bound, o.bound, out=m.take())
    at = _locate(m, x, params, o, o.inverse)
    (_, x0, y0), (_, w, h), d = at.corner, at.size, m.pair()
    _slopes(m, at.raw, o.usual, d)
    cell = Cell(x0, y0, w, h, *d[1:])
    start, size = (y0, h) if o.inverse else (x0, w)
    z = x.sub_(start)
    torch.clamp(z, m.number(0.0), size, out=z)
    if o.inverse:
        made = rq.solve(m, z, cell, o.steep)
    else:
        made = rq.advance(m, z, torch.div(h, w, out=m.take()), cell, o.steep)
    rq.finish(m, outs, v, made, o.bound, closed=True)


def pull_back(
    m: Rows, outs: Tensors, x: Tensor, params: Params, grads: Tensors, o: Options
) -> None:
    r"""Writes the gradients to the input and to all parameters; see :func:`flowguard.spline.bin.pull_back`."""
    u, bins, one = o.usual, len(params[0]), m.number(1.0)
    assert u is not None
    z = torch.clamp(x, -o.bound, o.bound, out=m.take())
    at = _locate(m, z, params, o, False)
    d = m.pair()
    _slopes(m, at.raw, u, d)
    cell = Cell(*at.corner[1:], *at.size[1:], *d[1:])
    inside = rq.masked(m, outs, x, grads, o.bound, closed=True)
    torch.clamp(z.sub_(cell.x), m.number(0.0), cell.w, out=z)
    s = torch.div(cell.h, cell.w, out=m.take())
    pull = rq.pull_back(m, z, s, cell, inside, o.inverse)
    outs[0].add_(pull.grad)
    to_raw = _slope_pullback(m, pull.d, at.raw, d, u)

    # To the sizes of the bin, and of all bins to its left, which push it.
    to_own, to_left = m.pair(), m.pair()
    torch.div(pull.log_s, at.size[0], out=to_own[0])
    to_own[1].addcmul_(pull.z, pull.t).neg_()
    to_own[2].addcmul_(pull.y, torch.sub(one, pull.rest, out=pull.rest))
    torch.neg(pull.z, out=to_left[1])
    to_left[2].copy_(pull.y)

    # To the bins that they belong to, and through the softmax.
    shares, before, passed, own, spare = m.blocks
    own = torch.sub(passed[:-1], passed[1:], out=own[:-1])
    for k, (scale, floor) in enumerate(sizes(bins, o)):
        size, corner, share, out = at.size[k + 1], at.corner[k + 1], shares[k], outs[k + 1]
        # The floors are constants: they are taken off again.
        corner.add_(m.number(o.bound)).sub_(at.number, alpha=floor)
        mean = size.sub_(m.number(floor)).mul_(to_own[k + 1]).addcmul_(corner, to_left[k + 1])
        mean.mul_(m.number(-1 / scale))
        pulled = torch.addcmul(mean, own, to_own[k + 1], out=before[k])
        pulled.addcmul_(passed[1:], to_left[k + 1])
        torch.mul(pulled, share.sub_(m.number(floor)), out=out)
        if u.clip is not None:
            torch.clamp(params[k], -constants.far(), constants.far(), out=share)
            below = _denominator(m, share, u.clip / 2, spare)
            out.div_(below).div_(below)
    inner = outs[3]
    if len(inner) > bins:
        torch.mul(own[0], to_raw[0], out=inner[0])
        torch.mul(own[-1], to_raw[1], out=inner[-1])
        inner = inner[1:-1]
    torch.mul(own[1:], to_raw[0], out=inner).addcmul_(own[:-1], to_raw[1])
