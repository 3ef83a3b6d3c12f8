r"""The spline in its usual parameterisation: that of other libraries, with any number of bins.

With :math:`K` logits each for widths and heights, bins take the shares
:math:`\epsilon + (1 - K \epsilon) \mathrm{softmax}` of the box. Of slopes there are :math:`K - 1`, at
the inner knots, with ones at the ends of the box, or :math:`K + 1`, at all of them. A slope is a
softplus raised by the least one, or an exponential of what was clipped smoothly; nothing else
bounds it (Durkan et al., 2019, https://arxiv.org/abs/1906.04032).

Within its bin the map is that of :mod:`flowguard.spline.bin`, so that there is no discriminant to
become negative. What is too large to compute with is cut: logits where the softmax is constant
anyway, and raw slopes at a million.
"""

__all__ = ["at_ends", "evaluate", "pull_back", "sizes"]

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowguard.spline import bin as rq
from flowguard.spline import constants
from flowguard.spline.bin import Cell, Pair, Params
from flowguard.spline.options import Options, Usual


def sizes(bins: int, o: Options) -> list[tuple[float, float]]:
    r"""What the softmax of widths, and that of heights, is multiplied by and then raised by."""
    assert o.usual is not None
    box = 2 * o.bound
    return [(box * (1 - bins * least), box * least) for least in (o.usual.width, o.usual.height)]


def at_ends(u: Usual) -> float:
    r"""The raw slope that says one, for the ends of the box."""
    if u.clip is not None:
        return 0.0
    above = (1 - u.slope) / u.gain
    return above + math.log(-math.expm1(-above))  # what the softplus undoes, without overflow


def _clip(x: Tensor, limit: float) -> Pair:
    r"""Squashes smoothly into (-limit, limit); and the derivative."""
    shrunk = 1 / (1 + x.abs() / limit)
    return x * shrunk, shrunk * shrunk


def _shares(logits: Tensor, u: Usual) -> Pair:
    r"""The softmax, and what its gradients are multiplied by."""
    logits = logits.clamp(-constants.far(), constants.far())
    if u.clip is None:
        return F.softmax(logits, dim=0), torch.ones_like(logits[:1])
    logits, by = _clip(logits, u.clip / 2)
    return F.softmax(logits, dim=0), by


def _slope(raw: Tensor, u: Usual) -> Pair:
    r"""The slope at a knot, and its derivative."""
    cut = raw.clamp(-constants.steepest(), constants.steepest())
    if u.clip is not None:
        clipped, by = _clip(cut, u.clip)
        d = clipped.exp()
        return d, d * by
    share = torch.where(cut > constants.threshold(), 1.0, rq.sigmoid(cut)) * u.gain
    share = torch.where(raw < constants.steepest(), share, share - share)
    return F.softplus(cut, threshold=constants.threshold()) * u.gain + u.slope, share


def _pick(rows: Tensor, number: Tensor) -> Tensor:
    return rows.gather(0, number.unsqueeze(0)).squeeze(0)


class _Located(NamedTuple):
    r"""The bin of each element and what it comes from. Pairs are of widths and of heights, or of
    the knots to the left and to the right."""

    number: Tensor
    cell: Cell
    shares: list[Pair]  # the softmaxes of all bins, and what their gradients are multiplied by
    left: list[Tensor]  # their sums over all bins to the left
    to_raw: list[Tensor]  # the derivatives of the slopes


def _locate(x: Tensor, params: Params, o: Options, vertical: bool) -> _Located:
    *logits, raw = params
    u, bins = o.usual, len(logits[0])
    assert u is not None
    scaled = sizes(bins, o)
    shares = [_shares(p, u) for p in logits]
    sums = [p.cumsum(0) for p, _ in shares]
    scale, floor = scaled[vertical]
    before = torch.arange(1, bins, dtype=x.dtype, device=x.device).mul(floor).sub(o.bound)
    knots = sums[vertical][:-1] * scale + before.reshape(-1, *(1,) * x.dim())
    number = (x >= knots).sum(0)
    count = number.to(x.dtype)

    own, left, corner, size = [], [], [], []
    for (p, _), total, (scale, floor) in zip(shares, sums, scaled, strict=True):
        own.append(_pick(p, number))
        left.append(torch.where(number > 0, _pick(total, (number - 1).clamp(min=0)), 0.0))
        corner.append(left[-1] * scale + (count * floor - o.bound))
        size.append(own[-1] * scale + floor)

    # A NaN in any of them is one of the element.
    bad = raw.detach().clamp(-constants.steepest(), constants.steepest()).sum(0) * 0.0
    if len(raw) < bins:
        end = torch.full_like(x, at_ends(u)).unsqueeze(0)
        raw = torch.cat((end, raw, end))
    slopes = [_slope(_pick(raw, number + k) + bad, u) for k in range(2)]
    d, to_raw = zip(*slopes, strict=True)
    return _Located(number, Cell(*corner, *size, *d), shares, left, [*to_raw])


def evaluate(v: Tensor, params: Params, o: Options) -> Pair:
    r"""The spline or its inverse, and the logarithm of its slope."""
    inside = v.clamp(-o.bound, o.bound)
    cell = _locate(inside, params, o, o.inverse).cell
    if o.inverse:
        value, steep = rq.solve(rq.within(inside - cell.y, cell.h), cell)
    else:
        value, steep = rq.evaluate(rq.within(inside - cell.x, cell.w), cell.h / cell.w, cell)
    return rq.finish(v, value, steep, o.bound, closed=True)


def pull_back(x: Tensor, params: Params, grads: Pair, o: Options) -> tuple[Tensor, ...]:
    r"""The gradients to the input and to all parameters; see :func:`flowguard.spline.bin.pull_back`."""
    inner, bins = x.clamp(-o.bound, o.bound), len(params[0])
    at = _locate(inner, params, o, False)
    w, h = at.cell.w, at.cell.h
    inside = x.abs() <= o.bound
    to_y, to_l = torch.where(inside, grads[0], 0.0), torch.where(inside, grads[1], 0.0)
    z = rq.within(inner - at.cell.x, w)
    pull = rq.pull_back(z, h / w, at.cell, (to_y, to_l), o.inverse)
    grad_x = pull.grad + torch.where(inside, 0.0, grads[0])

    # To the sizes of the bin, and of all bins to its left, which push it.
    to_own = -pull.log_s / w - pull.z * pull.t, pull.log_s / h + pull.y * pull.theta
    to_left = -pull.z, pull.y
    counted = torch.arange(bins, device=x.device).reshape(-1, *(1,) * x.dim())
    own, passed = counted == at.number, counted < at.number
    out = []
    scales = [scale for scale, _ in sizes(bins, o)]
    for (p, by), left, g, gl, scale in zip(
        at.shares, at.left, to_own, to_left, scales, strict=True
    ):
        mean = _pick(p, at.number) * g + left * gl
        of_bins = torch.where(own, g, torch.where(passed, gl, 0.0))
        out.append(p * (of_bins - mean) * (by * scale))
    to_raw = [
        torch.where(own, g * by, 0.0) for g, by in zip((pull.d0, pull.d1), at.to_raw, strict=True)
    ]
    none = torch.zeros_like(to_raw[0][:1])
    to_knots = torch.cat((to_raw[0], none)) + torch.cat((none, to_raw[1]))
    return grad_x, *out, to_knots if len(params[2]) > bins else to_knots[1:-1]
