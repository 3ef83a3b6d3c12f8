r"""The spline of three and more bins, whose knots are walked one after the other.

No index, mask or shape depends on the data. What a bin is made of is picked first, by masks; all
that costs more than a sum is done once, for the bin of the element. The notation is that of
:mod:`flowguard._rqs_bin`.

What there is for every bin comes in rows: as one tensor, the bins first, or as a list of tensors.
A tensor needs few calls, which is faster in eager mode; of a list the compiler makes one loop over
the elements, without reductions in it.
"""

__all__ = ["ROOM", "Rows", "evaluate", "pull_back", "slope_limits", "softmax_scale"]

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowguard import _rqs_bin as rq

RAW = 1e3  # beyond, all maps of a raw slope are constant; a sum of these is finite
ROOM = 1e-3  # the least room above the mean of two secants for the slope at their knot
Rows = Any  # Tensor | list[Tensor]; both can be indexed, sliced and iterated


def _each(function: Callable[..., Tensor], *rows: Rows) -> Rows:
    r"""Applies an element-wise function to the rows of each bin."""
    if isinstance(rows[0], Tensor):
        return function(*rows)
    return [function(*r) for r in zip(*rows, strict=True)]


def _join(*rows: Rows) -> Rows:
    if isinstance(rows[0], Tensor):
        return torch.cat(rows)
    return [r for part in rows for r in part]


def _total(rows: Rows) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.sum(0)
    *_, total = accumulate(rows)
    return total


def _pick(own: Rows, values: Rows) -> Tensor:
    r"""The sum of the values weighed by masks. All are finite, so that zeros may weigh them."""
    if isinstance(own, Tensor):
        return (own * values).sum(0)
    out = own[0] * values[0]
    for o, v in zip(own[1:], values[1:], strict=True):
        out = torch.addcmul(out, o, v)
    return out


def _near(own: Rows, x: Rows) -> tuple[Tensor, Tensor, Tensor]:
    r"""The values of each element's bin, and of its neighbours: itself, where there is none."""
    left = torch.addcmul(_pick(own[1:], x[:-1]), own[0], x[0])
    right = torch.addcmul(_pick(own[:-1], x[1:]), own[-1], x[-1])
    return _pick(own, x), left, right


class Bin(NamedTuple):
    r"""The bin of each element."""

    own: Rows  # a one for the bin of the element
    passed: Rows  # a one for each inner knot to its left, or on which it lies
    near: list[tuple[Tensor, Tensor]]  # u and v of itself, of its left and of its right neighbour
    sums: tuple[Tensor, Tensor]  # of u and of v of all bins to its left
    w: list[Tensor]
    h: list[Tensor]
    s: list[Tensor]
    raw: tuple[Tensor, Tensor]  # at its left and right knot


def softmax_scale(
    bins: int, bound: float, slope: float | None, least: float
) -> tuple[float, float]:
    r"""What the softmax is multiplied by, and then raised by."""
    total = 2 * bound / (1 + rq.mixing(slope))
    return total * (1 - bins * least), total * least


def _finite(x: Tensor) -> Tensor:
    big = torch.finfo(x.dtype).max / 4
    return x.clamp(-big, big)


def _cut(x: Tensor) -> Tensor:
    return x.clamp(max=torch.finfo(x.dtype).max / 4)


def _softmax(logits: Rows, scale: float, floor: float) -> Rows:
    r"""The scaled softmax over the given logits and one more that is fixed at zero."""
    zero = torch.zeros_like(logits[0])
    logits = _each(_cut, logits)  # inf - inf would be NaN
    if isinstance(logits, Tensor):
        return torch.cat((logits, zero.unsqueeze(0))).softmax(0) * scale + floor

    logits = [*logits, zero]
    *_, top = accumulate((x.detach() for x in logits), torch.maximum)
    exps = [((x - top) * rq.LOG2_E).exp2() for x in logits]  # see rq.sigmoid
    weight = scale / _total(exps)
    return [e * weight + floor for e in exps]


def _locate(
    x: Tensor,
    u: Rows,
    v: Rows,
    derivatives: Rows,
    bound: float,
    slope: float | None,
    vertical: bool,
) -> Bin:
    r"""Walks over the knots and picks each element's bin; the knot itself opens its bin."""
    # With u, v the floored softmaxes, w = u + λ v and h = v + λ u. As u, v > 0, the secant
    # h / w = (v + λ u) / (u + λ v) lies in [λ, 1 / λ] whatever they are.
    share = rq.mixing(slope)

    def mix(p: Tensor, q: Tensor) -> Tensor:
        return torch.add(p, q, alpha=share)

    sizes = _each(mix, v[:-1], u[:-1]) if vertical else _each(mix, u[:-1], v[:-1])
    knots = sizes.cumsum(0) if isinstance(sizes, Tensor) else list(accumulate(sizes))
    # a one for x ≥ knot: signs are faster than comparisons
    passed = _each(lambda k: (x - (k - bound)).detach().sign().add(1.0).clamp(max=1.0), knots)
    own = _join(
        _each(lambda p: 1 - p, passed[:1]),
        _each(torch.sub, passed[:-1], passed[1:]),
        passed[-1:],
    )
    near = list(zip(_near(own, u), _near(own, v), strict=True))
    w, h = [mix(p, q) for p, q in near], [mix(q, p) for p, q in near]
    s = [hk / wk for wk, hk in zip(w, h, strict=True)]
    raw = _each(_finite, derivatives)  # zeros may not weigh infinities
    raw0 = torch.addcmul(_pick(own[1:], raw), own[0], raw[0])
    raw1 = torch.addcmul(_pick(own[:-1], raw), own[-1], raw[-1])
    sums = _pick(passed, u[:-1]), _pick(passed, v[:-1])
    return Bin(own, passed, near, sums, w, h, s, (raw0, raw1))


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

    u: Rows
    v: Rows
    bin: Bin
    x0: Tensor
    y0: Tensor
    d0: Tensor
    d1: Tensor
    left: tuple[Tensor, ...]  # what the pullback of the slope at the left knot needs
    right: tuple[Tensor, ...]


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
    scale = softmax_scale(len(widths) + 1, bound, slope, least)
    u, v = _softmax(widths, *scale), _softmax(heights, *scale)
    found = _locate(x, u, v, derivatives, bound, slope, vertical)
    own, (s, s0, s1) = found.own, found.s
    d0, left = _inner_slope(found.raw[0], s0, s, slope)
    d1, right = _inner_slope(found.raw[1], s, s1, slope)
    # The slope is one at both ends of the box.
    d0 = torch.addcmul(own[0], found.passed[0], d0)
    d1 = torch.addcmul(own[-1], 1 - own[-1], d1)
    share = rq.mixing(slope)
    p, q = found.sums
    x0 = torch.add(p, q, alpha=share) - bound
    y0 = torch.add(q, p, alpha=share) - bound
    return State(u, v, found, x0, y0, d0, d1, left, right)


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
    state = _prepare(inside, widths, heights, derivatives, bound, slope, least, inverse)
    w, h, s = state.bin.w[0], state.bin.h[0], state.bin.s[0]
    if inverse:
        rise, steep = rq.solve(_within(inside - state.y0, h), w, h, state.d0, state.d1)
        return rq.finish(v, state.x0 + rise, steep, bound)
    rise, steep = rq.evaluate(_within(inside - state.x0, w), w, s, state.d0, state.d1)
    return rq.finish(v, state.y0 + rise, steep, bound)


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
) -> tuple[Tensor, Rows, Rows, Rows]:
    r"""The gradients to the input and to all parameters; see :func:`_rqs_bin.pull_back`."""
    inner = x.clamp(-bound, bound)
    state = _prepare(inner, widths, heights, derivatives, bound, slope, least, False)
    found = state.bin
    own, passed, w, h, s = found.own, found.passed, found.w, found.h, found.s

    inside = x.abs() < bound
    z = _within(inner - state.x0, w[0])
    to_y, to_l = torch.where(inside, grad_y, 0.0), torch.where(inside, grad_l, 0.0)
    pull = rq.pull_back(z, w[0], h[0], s[0], state.d0, state.d1, to_y, to_l, inverse)
    grad_x = pull.grad + torch.where(inside, 0.0, grad_y)

    to_d0, to_d1 = pull.d0 * passed[0], pull.d1 * (1 - own[-1])
    raw0, log0, log = _slope_pullback(to_d0, found.raw[0], s[1], s[0], slope, state.left)
    raw1, own_log, log1 = _slope_pullback(to_d1, found.raw[1], s[0], s[2], slope, state.right)
    log = pull.log_s + log + own_log

    # To the sizes of the bin, of its neighbours, and of all bins to its left, which push it.
    pairs = (
        (
            -torch.addcmul(log / w[0], pull.z, pull.t),
            torch.addcmul(log / h[0], pull.y, pull.theta),
        ),
        (-log0 / w[1], log0 / h[1]),
        (-log1 / w[2], log1 / h[2]),
        (-pull.z, pull.y),
    )
    share = rq.mixing(slope)
    to_u = [torch.add(to_w, to_h, alpha=share) for to_w, to_h in pairs]
    to_v = [torch.add(to_h, to_w, alpha=share) for to_w, to_h in pairs]
    scale = softmax_scale(len(own), bound, slope, least)
    (u, u0, u1), (v, v0, v1) = zip(*found.near, strict=True)
    return (
        grad_x,
        _softmax_pullback(state.u, [u, u0, u1, found.sums[0]], to_u, found, scale),
        _softmax_pullback(state.v, [v, v0, v1, found.sums[1]], to_v, found, scale),
        _each(lambda p, q: torch.addcmul(p * raw1, q, raw0), own[:-1], own[1:]),
    )


def _softmax_pullback(
    values: Rows,
    picked: list[Tensor],
    grads: list[Tensor],
    found: Bin,
    scale: tuple[float, float],
) -> Rows:
    r"""Hands the gradients to the bins that they belong to, and through the softmax.

    The gradients are those of the bin, of its left and its right neighbour, and of all to its left.
    The last bin takes what is left of the box; as probabilities add up, so does its softmax.
    """
    own, passed = found.own, found.passed
    of_own, of_left, of_right, of_passed = grads
    factor, floor = scale
    mean = torch.addcmul((picked[0] - floor) * of_own, picked[1] - floor, of_left)
    mean = torch.addcmul(mean, picked[2] - floor, of_right)
    mean = torch.addcmul(mean, picked[3] - _total(passed) * floor, of_passed)
    mean = mean * (1 / factor)

    def mine(own: Tensor, right: Tensor, passed: Tensor) -> Tensor:
        g = torch.addcmul(own * of_own, right, of_left)
        return torch.addcmul(g, passed, of_passed) - mean

    pulled = _each(mine, own[:-1], own[1:], passed)
    right = _each(lambda g, left: torch.addcmul(g, left, of_right), pulled[1:], own[:-2])
    pulled = _join(pulled[:1], right)
    return _each(lambda g, value: (value - floor) * g, pulled, values[:-1])
