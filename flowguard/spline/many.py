r"""The spline of three and more bins, whose knots are walked one after the other.

No index or shape depends on the data: what belongs to the bin of an element is picked by its number,
and all that costs more than a sum is done once, for that bin. The notation is that of
:mod:`flowguard.spline.bin`.

What there is for every bin comes as a list of tensors. Of that the compiler makes one loop over the
elements, without reductions in it. It makes no more than one loop of some 64 tensors that are used
more than once, hence the fewer of these the better.
"""

__all__ = ["evaluate", "pull_back", "slope_limits"]

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from flowguard.spline import bin as rq
from flowguard.spline import constants
from flowguard.spline.bin import Cell, Pair, Params
from flowguard.spline.options import Options

FEW = 7  # rows of parameters that the compiler reads from strided memory; more it copies first

# The compiler of torch 2.6 ends at a backward that looks at strides; its loops are slower then.
SEES_STRIDES = TorchVersion(torch.__version__) >= "2.7"

Rows = Sequence[Tensor]  # of bins or knots, from left to right


class Softmax(NamedTuple):
    r"""The softmax of logits and of a zero, scaled: the exponentials, or one for the last bin,
    times a weight; and that weight times the share that goes to the other side of the bins."""

    exps: Rows
    sums: Rows  # over the bins to the left of each inner knot
    weight: Tensor
    crossed: Tensor


def _compiling() -> bool:
    return SEES_STRIDES and torch.compiler.is_compiling()


def _once(made: Tensor) -> Tensor:
    r"""Lets the compiler work out once what is used often, as a view wants memory to look at."""
    return made.as_strided(made.shape, made.stride()) if _compiling() else made


def _is_strided(x: Tensor) -> bool:
    r"""Whether the compiler would see strided loads."""
    return _compiling() and x.dim() > 0 and x.stride(-1) != 1


def _rows(params: Sequence[Tensor]) -> list[Rows]:
    r"""The rows of widths, of heights and of derivatives."""
    if _is_strided(params[0]) and len(params[0]) > FEW:
        params = torch.cat([*params]).chunk(3)
    # Of `unbind` all would be kept for the backward, rather than worked out anew.
    return [[p[k] for k in range(len(p))] for p in params]


def _loaded_once(made: Tensor, source: Tensor) -> Tensor:
    # Of a loop with many strided loads the compiler makes no vectors.
    return _once(made) if _is_strided(source) else made


def _exp(x: Tensor) -> Tensor:
    # What is compiled keeps powers of two for the backward, while it computes exponentials anew. In
    # eager mode a power takes a third of the time.
    return x.exp() if torch.compiler.is_compiling() else (x * constants.log2_e()).exp2()


def _softmax(logits: Rows, scale: float, share: float) -> Softmax:
    # The zero keeps the sum away from zero, and the cut keeps it finite: no need for the maximum.
    exps = [_loaded_once(_exp(x.clamp(max=constants.most())), x) for x in logits]
    sums = list(accumulate(exps))
    weight = _once(scale / (sums[-1] + 1))
    return Softmax(exps, sums, weight, weight * share)


def _sizes(u: Softmax, v: Softmax, of: Pair, raised: Tensor | float) -> Pair:
    r"""Widths and heights for what is weighed."""
    # With u, v the floored softmaxes, w = u + λ v and h = v + λ u. As u, v > 0, the secant
    # h / w = (v + λ u) / (u + λ v) lies in [λ, 1 / λ] whatever they are.
    p, q = of
    w = torch.addcmul(p * u.weight, q, v.crossed)
    h = torch.addcmul(q * v.weight, p, u.crossed)
    return w + raised, h + raised


def _pick(number: Tensor, values: Sequence[Tensor | float], first: int = 0) -> Tensor:
    r"""The value of that number, which are counted from `first`: zero before it, and the last one
    also behind."""
    picked: Tensor | float = 0.0
    for k, value in enumerate(values, first):
        picked = value if k <= 0 else torch.where(number >= k, value, picked)
    assert isinstance(picked, Tensor)
    return picked


def _of_both(
    number: Tensor, u: Softmax, v: Softmax, values: Callable[[Softmax], Sequence[Tensor | float]]
) -> Pair:
    r"""What :func:`_pick` takes of widths and of heights. A function of its own: those that are
    made while the compiler looks on have their annotations worked out, at which torch 2.6 stops."""
    return _pick(number, values(u)), _pick(number, values(v))


def slope_limits(s0: Tensor, s1: Tensor, low: float) -> Pair:
    r"""The slope for a raw zero at the knot between two secants, and the largest one, where the
    least one is `low`."""
    least = torch.minimum(s0, s1)
    return (s0 * s1).sqrt(), (least * least * (0.5 / low)).clamp(max=1 / low)


def _inner_slope(raw: Tensor, s0: Tensor, s1: Tensor, o: Options) -> Rows:
    r"""The slope at the knot between two bins with secants `s0` and `s1`.

    It is :math:`g e^{raw}`, with :math:`g` the geometric mean of the two secants, saturating
    smoothly at both ends of the interval that :mod:`flowguard.spline.bin` allows: a Möbius function
    of :math:`e^{raw}`. Without a least slope, it is that of the published parameterisation. What
    the slope is made of follows it, for its pullback.
    """
    if o.slope is None:
        return rq.published_slope(raw)
    low = o.low()
    mean, high = slope_limits(s0, s1, low)
    decay = _exp(-raw.clamp(-constants.most(), constants.most()))
    # Of two terms one is always away from zero, as there is always some room.
    up, room = mean - low, high - mean
    whole = torch.addcmul(up, room.clamp(min=constants.room()), decay)
    inv = whole.reciprocal()
    # For a raw zero the fraction is exactly one, and so is the slope between two secants of one.
    return up * ((up + room) / whole) + low, decay, up * inv, inv, mean, high


def _slope_pullback(
    grad: Tensor, raw: Tensor, s0: Tensor, s1: Tensor, parts: Rows, o: Options
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients to `raw` and to the logarithms of the secants."""
    if o.slope is None:
        none, (d, share) = torch.zeros_like(grad), parts
        return rq.published_pullback(grad * d, raw, share), none, none
    low = o.low()
    _, decay, ratio, inv, mean, high = parts
    # The slope is low + span ratio with ratio = up / R and R = up + room e, e = exp(-raw), where the
    # room that is left, high - mean, may be less than what is taken for it. If it is not,
    #     ∂d / ∂mean = span² e / R², ∂d / ∂high = ratio² (1 - e);
    # if it is, there is a constant in place of one span, and ∂d / ∂high = ratio.
    span, free = high - low, high - mean > constants.room()
    mixed = grad * span * inv * (decay * inv)
    half = 0.5 * mean * mixed * torch.where(free, span, constants.room())
    twice = torch.where(high < 1 / low, 2 * high, 0.0)  # a constant where it is cut
    to_high = grad * torch.where(free, ratio * ratio * (1 - decay), ratio) * twice
    to_first = (0.5 * (s1 - s0).detach().sign() + 0.5) * to_high  # a half each for equal ones
    to_raw = grad * span * (ratio * (1 - ratio))
    return to_raw, half + to_first, half + (to_high - to_first)


class State(NamedTuple):
    r"""The bin of each element and what it comes from. Pairs are of widths and of heights."""

    u: Softmax
    v: Softmax
    number: Tensor  # of the bin
    own: Pair  # exponentials of the bin
    left: Pair  # those of its neighbours; of some bin, where there is none
    right: Pair
    passed: Pair  # their sums over all bins to the left
    raw: Pair  # the raw slopes at the left and at the right knot
    cell: Cell
    w: Rows  # of the bin, of its left and of its right neighbour
    h: Rows
    s: Rows
    ends: tuple[Rows, Rows]  # what the pullbacks of the slopes need


def _prepare(x: Tensor, rows: Sequence[Rows], o: Options, vertical: bool) -> State:
    widths, heights, derivatives = rows
    if _is_strided(derivatives[0]):
        derivatives = [_once(d.clone()) for d in derivatives]
    bins, share = len(widths) + 1, o.share()
    scale, floor = o.softmax(bins)
    floor *= 1 + share
    u, v = _softmax(widths, scale, share), _softmax(heights, scale, share)

    # Walks over the knots, of which each opens its bin.
    number = torch.zeros_like(x)
    for k, sums in enumerate(zip(u.sums, v.sums, strict=True), 1):
        # Of the sign of a difference the compiler keeps nothing for the backward.
        beyond = x - _sizes(u, v, sums, k * floor - o.bound)[vertical]
        number = torch.where(beyond >= 0, float(k), number)

    # A NaN in any of them is one of the element; this adds it, or else zero.
    *_, total = accumulate(d.detach().abs() for d in derivatives)
    bad = (-total).relu()
    own = _of_both(number, u, v, lambda s: [*s.exps, 1.0])
    left = _of_both(number, u, v, lambda s: [s.exps[0], *s.exps])
    right = _of_both(number, u, v, lambda s: [*s.exps[1:], 1.0])
    passed = _of_both(number, u, v, lambda s: [0.0, *s.sums])
    raw = _pick(number, [0.0, *derivatives]) + bad, _pick(number, derivatives) + bad

    x0, y0 = _sizes(u, v, passed, number * floor - o.bound)
    w, h = zip(*(_sizes(u, v, of, floor) for of in (own, left, right)), strict=True)
    s, s0, s1 = secants = tuple(_once(q / p) for p, q in zip(w, h, strict=True))
    ends = _inner_slope(raw[0], s0, s, o), _inner_slope(raw[1], s, s1, o)
    # The slope is one at both ends of the box.
    d0 = torch.where(number >= 1, ends[0][0], 1.0)
    d1 = torch.where(number >= bins - 1, 1.0, ends[1][0])
    cell = Cell(x0, y0, w[0], h[0], d0, d1)
    return State(u, v, number, own, left, right, passed, raw, cell, w, h, secants, ends)


def evaluate(v: Tensor, params: Params, o: Options) -> Pair:
    r"""The spline or its inverse, and the logarithm of its slope."""
    inside = v.clamp(-o.bound, o.bound)
    at = _prepare(inside, _rows(params), o, o.inverse)
    cell = at.cell
    if o.inverse:
        start, z = cell.y, rq.within(inside - cell.y, cell.h)
        value, steep = rq.solve(z, cell)
    else:
        start, z = cell.x, rq.within(inside - cell.x, cell.w)
        value, steep = rq.evaluate(z, at.s[0], cell)
    # What the identity adds to the corner is what the distance was rounded to.
    return rq.finish(v, torch.where(value == start + z, inside, value), steep, o.bound)


def pull_back(x: Tensor, params: Params, grads: Pair, o: Options) -> tuple[Tensor, ...]:
    r"""The gradients to the input and to all parameters; see :func:`flowguard.spline.bin.pull_back`."""
    rows, bins, share = _rows(params), len(params[0]) + 1, o.share()
    inner = x.clamp(-o.bound, o.bound)
    at = _prepare(inner, rows, o, False)
    w, h, s, number = at.w, at.h, at.s, at.number

    inside = x.abs() < o.bound
    z = rq.within(inner - at.cell.x, w[0])
    to_y, to_l = torch.where(inside, grads[0], 0.0), torch.where(inside, grads[1], 0.0)
    pull = rq.pull_back(z, s[0], at.cell, (to_y, to_l), o.inverse)
    grad_x = pull.grad + torch.where(inside, 0.0, grads[0])

    to_d0 = torch.where(number >= 1, pull.d0, 0.0)
    to_d1 = torch.where(number >= bins - 1, 0.0, pull.d1)
    raw0, log0, log = _slope_pullback(to_d0, at.raw[0], s[1], s[0], at.ends[0], o)
    raw1, own_log, log1 = _slope_pullback(to_d1, at.raw[1], s[0], s[2], at.ends[1], o)
    log = pull.log_s + log + own_log

    # To the softmaxes of the bin, of its neighbours, and of all bins to its left, which push it.
    logs = log, log0, log1
    to_u = [g * (share / hk - 1 / wk) for g, wk, hk in zip(logs, w, h, strict=True)]
    to_v = [g * (1 / hk - share / wk) for g, wk, hk in zip(logs, w, h, strict=True)]
    to_w, to_h = -pull.z * pull.t, pull.y * pull.theta
    to_u[0] = to_u[0] + torch.add(to_w, to_h, alpha=share)
    to_v[0] = to_v[0] + torch.add(to_h, to_w, alpha=share)
    to_u.append(torch.add(-pull.z, pull.y, alpha=share))
    to_v.append(torch.add(pull.y, pull.z, alpha=-share))
    scale, _ = o.softmax(bins)
    of_u = _softmax_pullback(at.u, at, 0, to_u, scale)
    spread = [raw1, raw0, *of_u, *_softmax_pullback(at.v, at, 1, to_v, scale)]
    if torch.compiler.is_compiling():
        # A second loop begins here, which needs no more than these of the first one.
        spread = list(torch.stack(spread).unbind())
    to_widths = _spread_softmax(number, rows[0], spread[2:7])
    to_heights = _spread_softmax(number, rows[1], spread[7:])
    to_raws = [_pick(number, (*spread[:2], 0.0), k - 1) for k in range(1, bins)]
    return grad_x, *map(torch.stack, (to_widths, to_heights, to_raws))


def _softmax_pullback(
    softmax: Softmax, at: State, which: int, grads: Sequence[Tensor], scale: float
) -> tuple[Tensor, ...]:
    r"""What :func:`_spread_softmax` needs. The gradients are those to the bin, to its left and its
    right neighbour, and to all to its left."""
    own, left, right, passed = (g * softmax.weight for g in grads)
    mean = torch.addcmul(at.own[which] * own, at.left[which], left)
    mean = torch.addcmul(mean, at.right[which], right)
    mean = torch.addcmul(mean, at.passed[which], passed) * (softmax.weight * (1 / scale))
    return mean, right, own, left + passed, passed


def _spread_softmax(number: Tensor, logits: Rows, values: Rows) -> list[Tensor]:
    r"""Hands the gradients to the bins that they belong to, and through the softmax.

    The first of these is for the elements of the bin to the left, the second for its own, and the
    last one also for all that lie further to the right. The last bin takes what is left of the
    box; as probabilities add up, so does its softmax.
    """
    mean, *grads = values
    out = []
    for k, x in enumerate(logits):
        # Other than above, or the compiler would keep that one for the second loop.
        e = _loaded_once((x.clamp(max=constants.most()) * constants.log2_e()).exp2(), x)
        pulled = e * (_pick(number, grads, k - 1) - mean)
        out.append(torch.where(e > constants.top(), 0.0, pulled))
    return out
