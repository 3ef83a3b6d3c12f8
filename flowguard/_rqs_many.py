r"""The spline of three and more bins, whose knots are walked one after the other.

No index and no shape depends on the data. What a bin is made of is picked first, knot by knot; all
that costs more than a sum is done once, for the bin of the element. What there is for every bin
comes as a list, of which the compiler makes one loop over the elements, without reductions in it.
The notation is that of :mod:`flowguard._rqs_bin`.
"""

__all__ = ["ROOM", "evaluate", "pull_back", "slope_limits"]

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from flowguard import _rqs_bin as rq

ROOM = 1e-3  # the least room above the mean of two secants for the slope at their knot
RAW = 1e3  # beyond, all maps of a raw slope are constant; a sum of these is finite

Rows = Sequence[Tensor]
Pair = tuple[Tensor, Tensor]  # of widths and of heights


class Bin(NamedTuple):
    r"""The bin of each element. Sizes are softmaxes: of widths and of heights, not yet mixed."""

    passed: list[Tensor]  # for each inner knot, whether it lies to its left, or is where it lies
    number: Tensor
    own: Pair
    left: Pair  # the neighbours: itself, where there is none
    right: Pair
    sums: Pair  # of all bins to its left
    raw: tuple[Tensor, Tensor]  # at its left and right knot


def _scale(bins: int, bound: float, slope: float | None, least: float) -> tuple[float, float]:
    r"""What the softmax is multiplied by, and then raised by."""
    total = 2 * bound / (1 + rq.mixing(slope))
    return total * (1 - bins * least), total * least


def _softmax(logits: Rows, scale: float, floor: float) -> list[Tensor]:
    r"""The scaled softmax over the given logits and one more that is fixed at zero."""
    big = torch.finfo(logits[0].dtype).max / 4
    logits = [x.clamp(max=big) for x in logits]  # inf - inf would be NaN
    logits = [*logits, torch.zeros_like(logits[0])]
    *_, top = accumulate((x.detach() for x in logits), torch.maximum)
    exps = [((x - top) * rq.LOG2_E).exp2() for x in logits]  # see rq.sigmoid
    *_, total = accumulate(exps)
    weight = scale / total
    return [e * weight + floor for e in exps]


def _mix(pair: Pair, slope: float | None) -> tuple[Tensor, Tensor]:
    r"""The width and the height."""
    # With u, v the floored softmaxes, w = u + λ v and h = v + λ u. As u, v > 0, the secant
    # h / w = (v + λ u) / (u + λ v) lies in [λ, 1 / λ] whatever they are.
    share, (u, v) = rq.mixing(slope), pair
    return torch.add(u, v, alpha=share), torch.add(v, u, alpha=share)


def _locate(
    x: Tensor,
    u: Rows,
    v: Rows,
    raws: Rows,
    bound: float,
    slope: float | None,
    vertical: bool,
) -> Bin:
    r"""Walks over the knots and picks each element's bin; the knot itself opens its bin."""
    sizes = list(zip(u, v, strict=True))
    sums = list(zip(accumulate(u[:-1]), accumulate(v[:-1]), strict=True))
    passed = [x >= _mix(total, slope)[vertical] - bound for total in sums]
    zero = torch.zeros_like(x)
    # A NaN anywhere is one of the element: those of the logits are in every bin already.
    *_, bad = accumulate((d != d for d in raws), torch.logical_or)
    picked = [zero, *sizes[0], *sizes[0], *sizes[1], zero, zero, raws[0], raws[0]]
    for k, p in enumerate(passed):
        after, next_raw = sizes[min(k + 2, len(raws))], raws[min(k + 1, len(raws) - 1)]
        number = zero + (k + 1.0)
        new = [number, *sizes[k + 1], *sizes[k], *after, *sums[k], raws[k], next_raw]
        picked = [torch.where(p, a, b) for a, b in zip(new, picked, strict=True)]
    number, u1, v1, u0, v0, u2, v2, p, q, raw0, raw1 = picked
    raw = torch.where(bad, torch.nan, raw0), torch.where(bad, torch.nan, raw1)
    return Bin(passed, number, (u1, v1), (u0, v0), (u2, v2), (p, q), raw)


def slope_limits(s0: Tensor, s1: Tensor, slope: float) -> tuple[Tensor, float, Tensor]:
    r"""The slope for a raw zero at the knot between two secants, the least and the largest."""
    low = 1.001 * slope
    least = torch.minimum(s0, s1)
    return (s0 * s1).sqrt(), low, (least * least * (0.5 / low)).clamp(max=1 / low)


def _inner_slope(
    raw: Tensor, s0: Tensor, s1: Tensor, slope: float | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""The slope at the knot between two bins with secants `s0` and `s1`.

    It is :math:`g e^{raw}`, with :math:`g` the geometric mean of the two secants, saturating
    smoothly at both ends of the interval that :mod:`flowguard._rqs_bin` allows: a Möbius function
    of :math:`e^{raw}`. Without a least slope, it is that of the published parameterisation. What
    the slope is made of is returned for its pullback.
    """
    if slope is None:
        parts = rq.published_slope(raw)
        return parts[0], parts
    mean, low, high = slope_limits(s0, s1, slope)
    p = rq.sigmoid(raw)
    # Of two weights one is always away from zero, as there is always some room.
    room = (high - mean).clamp(min=ROOM)
    up = (mean - low) * p
    inv = torch.addcmul(up, room, 1 - p).reciprocal()
    ratio = up * inv
    return (high - low) * ratio + low, (p, ratio, inv, mean, high)


def _slope_pullback(
    grad: Tensor,
    raw: Tensor,
    s0: Tensor,
    s1: Tensor,
    slope: float | None,
    parts: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients to `raw` and to the logarithms of the secants."""
    if slope is None:
        none = torch.zeros_like(grad)
        d, share = parts
        return rq.published_slope_pullback(grad * d, raw, share), none, none
    low = 1.001 * slope
    p, ratio, inv, mean, high = parts
    # The slope is low + span ratio with ratio = up p / R and R = up p + room (1 - p), where the room
    # that is left, high - mean, may be less than what is taken for it.
    span, up, room = high - low, mean - low, high - mean
    free = room > ROOM
    mixed = grad * span * inv * (p * (1 - p) * inv)
    half = 0.5 * mean * mixed * torch.where(free, span, ROOM)
    twice = torch.where(high < 1 / low, 2 * high, 0.0)  # a constant where it is cut
    to_high = (grad * ratio - torch.where(free, mixed * up, 0.0)) * twice
    to_first = (0.5 * (s1 - s0).detach().sign() + 0.5) * to_high  # a half each for equal ones
    to_raw = grad * span * (ratio * (1 - ratio))
    return to_raw, half + to_first, half + (to_high - to_first)


class State(NamedTuple):
    r"""The bin of each element and the slopes at its ends; with what these come from."""

    u: list[Tensor]
    v: list[Tensor]
    bin: Bin
    corner: Pair
    size: Pair
    left: Pair  # the sizes of the neighbours
    right: Pair
    s: tuple[Tensor, Tensor, Tensor]  # secants: of its own, of its left and its right neighbour
    d: tuple[Tensor, Tensor]
    parts: list[tuple[Tensor, ...]]  # what the pullbacks of these slopes need


def _prepare(
    x: Tensor,
    widths: Rows,
    heights: Rows,
    derivatives: Rows,
    bound: float,
    slope: float | None,
    least: float,
    vertical: bool,
) -> State:
    scale = _scale(len(widths) + 1, bound, slope, least)
    u, v = _softmax(widths, *scale), _softmax(heights, *scale)
    found = _locate(x, u, v, derivatives, bound, slope, vertical)
    size, left, right = (_mix(pair, slope) for pair in (found.own, found.left, found.right))
    s, s0, s1 = (h / w for w, h in (size, left, right))
    d0, of_left = _inner_slope(found.raw[0], s0, s, slope)
    d1, of_right = _inner_slope(found.raw[1], s, s1, slope)
    # The slope is one at both ends of the box.
    d0 = torch.where(found.passed[0], d0, 1 + (d0 - d0))
    d1 = torch.where(found.passed[-1], 1 + (d1 - d1), d1)
    x0, y0 = (total - bound for total in _mix(found.sums, slope))
    parts = [of_left, of_right]
    return State(u, v, found, (x0, y0), size, left, right, (s, s0, s1), (d0, d1), parts)


def _within(z: Tensor, size: Tensor) -> Tensor:
    return torch.minimum(z, size).clamp(min=0.0)


def evaluate(
    v: Tensor,
    widths: Rows,
    heights: Rows,
    derivatives: Rows,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    r"""The spline or its inverse, and the logarithm of its slope."""
    inside = v.clamp(-bound, bound)
    at = _prepare(inside, widths, heights, derivatives, bound, slope, least, inverse)
    (x0, y0), (w, h) = at.corner, at.size
    if inverse:
        rise, steep = rq.solve(_within(inside - y0, h), w, h, *at.d)
        return rq.finish(v, x0 + rise, steep, bound)
    rise, steep = rq.evaluate(_within(inside - x0, w), w, at.s[0], *at.d)
    return rq.finish(v, y0 + rise, steep, bound)


def pull_back(
    x: Tensor,
    widths: Rows,
    heights: Rows,
    derivatives: Rows,
    grad_y: Tensor,
    grad_l: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    r"""The gradients to the input and to all parameters; see :func:`_rqs_bin.pull_back`."""
    inner = x.clamp(-bound, bound)
    at = _prepare(inner, widths, heights, derivatives, bound, slope, least, False)
    found, (w, h), (s, s0, s1) = at.bin, at.size, at.s
    passed = found.passed

    inside = x.abs() < bound
    z = _within(inner - at.corner[0], w)
    to_y, to_l = torch.where(inside, grad_y, 0.0), torch.where(inside, grad_l, 0.0)
    pull = rq.pull_back(z, w, h, s, *at.d, to_y, to_l, inverse)
    grad_x = pull.grad + torch.where(inside, 0.0, grad_y)

    to_d0 = torch.where(passed[0], pull.d0, 0.0)
    to_d1 = torch.where(passed[-1], 0.0, pull.d1)
    raw0, log0, log = _slope_pullback(to_d0, found.raw[0], s0, s, slope, at.parts[0])
    raw1, own_log, log1 = _slope_pullback(to_d1, found.raw[1], s, s1, slope, at.parts[1])
    log = pull.log_s + log + own_log

    # To the sizes of the bin, of its neighbours, and of all bins to its left, which push it.
    pairs = (
        (-torch.addcmul(log / w, pull.z, pull.t), torch.addcmul(log / h, pull.y, pull.theta)),
        (-log0 / at.left[0], log0 / at.left[1]),
        (-log1 / at.right[0], log1 / at.right[1]),
        (-pull.z, pull.y),
    )
    to_u, to_v = zip(*(_mix(pair, slope) for pair in pairs), strict=True)
    picked = list(zip(found.own, found.left, found.right, found.sums, strict=True))
    scale = _scale(len(at.u), bound, slope, least)
    to_raw = []
    for k, p in enumerate(passed):
        before = raw1 if k == 0 else torch.where(passed[k - 1], raw1, 0.0)
        after = raw0 if k + 1 == len(passed) else torch.where(passed[k + 1], 0.0, raw0)
        to_raw.append(torch.where(p, after, before))
    return (
        grad_x,
        _softmax_pullback(at.u, picked[0], to_u, found, scale),
        _softmax_pullback(at.v, picked[1], to_v, found, scale),
        to_raw,
    )


def _softmax_pullback(
    values: Rows,
    picked: Rows,
    grads: Rows,
    found: Bin,
    scale: tuple[float, float],
) -> list[Tensor]:
    r"""Hands the gradients to the bins that they belong to, and through the softmax.

    The gradients are those of the bin, of its left and its right neighbour, and of all to its left.
    The last bin takes what is left of the box; as probabilities add up, so does its softmax.
    """
    passed, (of_own, of_left, of_right, of_passed) = found.passed, grads
    factor, floor = scale
    mean = torch.addcmul((picked[0] - floor) * of_own, picked[1] - floor, of_left)
    mean = torch.addcmul(mean, picked[2] - floor, of_right)
    mean = torch.addcmul(mean, picked[3] - found.number * floor, of_passed)
    mean = mean * (1 / factor)

    none, before = -mean, of_passed - mean
    next_to, its, after = before + of_left, of_own - mean, of_right - mean
    pulled = []
    for k, p in enumerate(passed):
        # an element of this bin, of one after it, or of one before it
        here = its
        if k > 0:
            beyond = after if k == 1 else torch.where(passed[k - 2], after, none)
            here = torch.where(passed[k - 1], its, beyond)
        far = next_to if k + 1 == len(passed) else torch.where(passed[k + 1], before, next_to)
        pulled.append((values[k] - floor) * torch.where(p, far, here))
    return pulled
