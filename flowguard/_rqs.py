r"""The numerical core of the rational-quadratic spline: values, log-slopes and their gradients.

Everything here works on plain tensors of one common shape; the knots are the first dimension of
the parameters and are walked one after the other, so that no index, mask or shape depends on the
data. :mod:`flowguard.functional` holds the public function.

Notation, for the bin of :math:`x` with corner :math:`(x_k, y_k)`, size :math:`w \times h`, secant
:math:`s = h / w` and end slopes :math:`d_0, d_1` (Gregory & Delbourgo, 1982; Durkan et al., 2019,
https://arxiv.org/abs/1906.04032):

.. math::
    t &= (x - x_k) / w, \quad r = 1 - t, \quad \tau = t r, \quad a = d_0 / s, \quad b = d_1 / s \\
    y &= y_k + h \theta, \quad \theta = (t^2 + a \tau) / D, \quad D = 1 + (a + b - 2) \tau \\
    f' &= s N / D^2, \quad N = b t^2 + 2 \tau + a r^2
"""

__all__ = ["RationalQuadratic", "max_logit"]

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_FRACTION = 1e-3  # the least width and height of a bin, as a share of the box (published: 1e-3)
MIN_DERIVATIVE = 1e-3  # the least inner derivative of the published parameterisation
CHUNK = 2**16  # elements worked on at a time in eager mode, so that temporaries stay in the cache


class Knots(NamedTuple):
    r"""Widths, heights and secants of the bins, and the slopes at the inner knots."""

    w_prob: list[Tensor]  # softmax of the width logits, before any floor
    h_prob: list[Tensor]
    widths: list[Tensor]
    heights: list[Tensor]
    secants: list[Tensor]
    slopes: list[Tensor]


class Bin(NamedTuple):
    r"""The bin that each element falls in, picked without an index.

    `passed` holds a one for each inner knot to the left of the element, `own` a one for its bin.
    """

    x0: Tensor
    y0: Tensor
    w: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor
    passed: list[Tensor]
    own: list[Tensor]


def max_logit(dtype: torch.dtype) -> float:
    r"""The logarithm of the largest derivative that the published parameterisation may take.

    Its square has to be finite beside the square of the largest ratio of two secants.
    """
    return 300.0 if dtype == torch.float64 else 30.0


def mixing(slope: float) -> float:
    r"""The share :math:`\lambda` that keeps all secants in :math:`[\lambda, 1/\lambda]`.

    The slope is raised by a thousandth first, so that rounding cannot break the bound.
    """
    return math.sqrt(2.0 * 1.001 * slope)


def _softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    r"""The softmax over the given logits and one more that is fixed at zero."""
    if len(logits) == 1:
        p = torch.sigmoid(logits[0])
        return [p, 1 - p]

    big = torch.finfo(logits[0].dtype).max / 4
    logits = [x.clamp(-big, big) for x in logits]  # inf - inf would be NaN
    top = logits[0].clamp(min=0.0)
    for x in logits[1:]:
        top = torch.maximum(top, x)
    exps = [torch.exp(x - top) for x in logits]
    exps.append(torch.exp(-top))
    total = exps[0] + exps[1]
    for e in exps[2:]:
        total = total + e
    scale = 1 / total
    return [e * scale for e in exps]


def _floor(bins: int) -> float:
    return min(MIN_FRACTION, 0.5 / bins)


def _sizes(
    main: list[Tensor], other: list[Tensor], bound: float, slope: float | None
) -> list[Tensor]:
    r"""The sizes of all bins along one axis; they add up to the box, exactly."""
    floor = _floor(len(main))
    share = 0.0 if slope is None else mixing(slope)
    scale = 2 * bound * (1 - len(main) * floor) / (1 + share)
    least = 2 * bound * floor
    # With u, v the floored softmaxes, w = (u + λ v) / (1 + λ) and h = (v + λ u) / (1 + λ). As
    # u, v > 0, the secant h / w = (v + λ u) / (u + λ v) lies in [λ, 1 / λ] whatever they are.
    if slope is None:
        sizes = [p * scale + least for p in main[:-1]]
    else:
        sizes = [(p + share * q) * scale + least for p, q in zip(main[:-1], other, strict=False)]
    rest = 2 * bound - sizes[0]
    for s in sizes[1:]:
        rest = rest - s
    return [*sizes, rest]


def _slope_weights(
    raw: Tensor, s0: Tensor, s1: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    r"""What the slope at an inner knot is made of; see :func:`_slope`."""
    lo = 1.001 * slope
    least = torch.minimum(s0, s1)
    high = (least * least * (0.5 / lo)).clamp(max=1 / lo)
    mean = torch.sqrt(s0 * s1)
    p = torch.sigmoid(raw)
    gap_high = (high - mean).clamp(min=0.0)  # not negative but for rounding
    gap_low = mean - lo
    a = gap_high * (1 - p)
    b = gap_low * (p + 1e-30)  # keeps 0 / 0 away where mean = high
    return a, b, p, gap_high, gap_low, mean, high, lo


def _slope(raw: Tensor, s0: Tensor, s1: Tensor, slope: float) -> Tensor:
    r"""The slope at the knot between two bins with secants `s0` and `s1`.

    The whole spline has slopes in :math:`[ε, 1/ε]`. Within a bin,

    .. math:: \min(d_0, d_1, s^2 / (d_0 + d_1)) \leq f' \leq \max(d_0, d_1, 2 s)

    (left: with u = r / t, D² / N = (u² + (a+b) u + 1)² / ((1+u)² (a u² + 2 u + b)) is a ratio of
    two polynomials with positive coefficients, hence at most the largest ratio of coefficients of
    equal power, which is at most max(1/a, 1/b, a+b); right: with q = 1 - 2τ in [1/2, 1] and
    M = max(a, b), N ≤ M q + 1 - q and D ≥ q + M (1 - q) / 2, so N / D² ≤ max(2, M)).
    With all secants in [√(2ε), 1/√(2ε)], end slopes of 1 and inner slopes in
    [ε, min(1/ε, s0² / 2ε, s1² / 2ε)], both sides stay in [ε, 1/ε].

    In that interval the slope is :math:`g e^{raw}`, with :math:`g` the geometric mean of the two
    secants, saturating smoothly at both ends: a Möbius function of :math:`e^{raw}`.
    """
    a, b, _, _, _, _, high, lo = _slope_weights(raw, s0, s1, slope)
    return (lo * a + high * b) / (a + b)


def _knots(
    widths: Sequence[Tensor],
    heights: Sequence[Tensor],
    derivatives: Sequence[Tensor],
    bound: float,
    slope: float | None,
) -> Knots:
    w_prob, h_prob = _softmax(widths), _softmax(heights)
    w, h = _sizes(w_prob, h_prob, bound, slope), _sizes(h_prob, w_prob, bound, slope)
    s = [hk / wk for wk, hk in zip(w, h, strict=True)]
    if slope is None:
        cap = max_logit(w[0].dtype)
        d = [
            torch.exp(x.clamp(max=cap)) * (1 - MIN_DERIVATIVE) + MIN_DERIVATIVE
            for x in derivatives
        ]
    else:
        d = [_slope(x, s[k], s[k + 1], slope) for k, x in enumerate(derivatives)]
    return Knots(w_prob, h_prob, w, h, s, d)


def _pick(own: Sequence[Tensor], values: Sequence[Tensor | float]) -> Tensor:
    r"""The value of each element's own bin. All values are finite, so zeros may weigh them."""
    out = own[0] * values[0]
    for o, v in zip(own[1:], values[1:], strict=True):
        out = out + o if isinstance(v, float) else torch.addcmul(out, o, v)
    return out


def _locate(v: Tensor, knots: Knots, bound: float, vertical: bool) -> Bin:
    r"""Walks over the knots and picks each element's bin; the knot itself opens its bin."""
    w, h, d = knots.widths, knots.heights, knots.slopes
    knot: Tensor | float = -bound
    x0: Tensor | float = -bound
    y0: Tensor | float = -bound
    passed = []
    for wk, hk in zip(w[:-1], h[:-1], strict=True):
        knot = (hk if vertical else wk) + knot
        # Comparing in place gives zeros and ones as floats at a fraction of the cost of a mask
        # of booleans, and of `where`.
        edge = (v - knot).detach().ge_(0.0)
        # The same additions in the same order as for the knots: the corner is a knot exactly.
        x0, y0 = wk * edge + x0, hk * edge + y0
        passed.append(edge)
    own = [1 - passed[0], *(p - q for p, q in itertools.pairwise(passed)), passed[-1]]

    d0, d1 = _pick(own, [1.0, *d]), _pick(own, [*d, 1.0])
    return Bin(x0, y0, _pick(own, w), _pick(own, h), d0, d1, passed, own)


def _evaluate(
    v: Tensor,
    widths: Sequence[Tensor],
    heights: Sequence[Tensor],
    derivatives: Sequence[Tensor],
    bound: float,
    slope: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    r"""The spline or its inverse, and the logarithm of its slope."""
    inside = v.clamp(-bound, bound)
    knots = _knots(widths, heights, derivatives, bound, slope)
    x0, y0, w, h, d0, d1, _, _ = _locate(inside, knots, bound, inverse)
    s = h / w
    a, b = d0 / s, d1 / s

    if inverse:
        # θ = (t² + a τ) / D is (1 - q) t² + q t - θ = 0 with q = a (1 - θ) + (2 - b) θ. Its
        # discriminant q² + 4 (1 - q) θ = (q - 2θ)² + 4 θ (1 - θ) is not negative for θ in [0, 1],
        # and the root is taken in the form in which no two numbers cancel.
        theta = ((inside - y0) / h).clamp(0.0, 1.0)
        rest = 1 - theta
        bend = (1 - a) * rest - (1 - b) * theta  # 1 - q, exactly 0 for the identity
        q = 1 - bend
        root = torch.sqrt((q - 2 * theta).square() + 4 * theta * rest)
        positive = q >= 0
        t = torch.where(positive, 2 * theta, root - q) / torch.where(positive, root + q, 2 * bend)
        t = t.clamp(0.0, 1.0)
        r = 1 - t
        tau = t * r
        # t = θ + (1 - q) τ: adding the bend to the chord keeps the identity exact.
        out = x0 + ((inside - y0) / s + w * (bend * tau))
    else:
        t = ((inside - x0) / w).clamp(0.0, 1.0)
        r = 1 - t
        tau = t * r

    # D as a sum of positive terms, so that large a, b lose nothing
    denominator = 1 + (a + b - 2) * tau
    if not inverse:
        bend = ((a - 1) * r - (b - 1) * t) * (tau / denominator)  # θ - t
        out = y0 + (s * (inside - x0) + h * bend)
    numerator = b * t * t + 2 * tau + a * r * r
    log_slope = torch.log(s * (numerator / denominator) / denominator)

    # A NaN among the parameters shows in the slope, and is not hidden in the tails.
    outside = (v.abs() >= bound) & (log_slope == log_slope)
    out = torch.where(outside, v, out.clamp(-bound, bound))
    ladj = torch.where(outside, 0.0, -log_slope if inverse else log_slope)
    return out, ladj


def _pullback(
    x: Tensor,
    widths: Sequence[Tensor],
    heights: Sequence[Tensor],
    derivatives: Sequence[Tensor],
    grad_y: Tensor,
    grad_l: Tensor,
    bound: float,
    slope: float | None,
    inverse: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    r"""The gradients to the input and to all parameters, in closed form.

    For the inverse, `x` is its *output* and the gradients are those of the implicit function: with
    x = f⁻¹(y), l = -log f'(x), the parameters receive what the forward direction gives them for
    the cotangents (-g / f', -grad_l) with g = grad_x - grad_l ∂ log f' / ∂x, and y receives g / f'.
    """
    bins = len(widths) + 1
    inside = x.clamp(-bound, bound)
    knots = _knots(widths, heights, derivatives, bound, slope)
    x0, _, w, h, d0, d1, passed, own = _locate(inside, knots, bound, False)
    s = h / w
    a, b = d0 / s, d1 / s
    t = ((inside - x0) / w).clamp(0.0, 1.0)
    r = 1 - t
    tau = t * r
    inv_den = 1 / (1 + (a + b - 2) * tau)
    numerator = b * t * t + 2 * tau + a * r * r
    inv_num = 1 / numerator
    theta_t = numerator * inv_den * inv_den
    log_t = 2 * (((b - 1) * t - (a - 1) * r) * inv_num - (a + b - 2) * (r - t) * inv_den)

    steep = s * theta_t
    outside = (x.abs() >= bound) & (steep == steep)
    gy, gl = torch.where(outside, 0.0, grad_y), torch.where(outside, 0.0, grad_l)
    if inverse:
        total = (gy - gl * log_t / w) / steep
        grad_x = torch.where(outside, grad_y, total)
        gy, gl = -total, -gl
        # The cotangents of the parameters must vanish outside, as must their own there.
        gy = torch.where(outside, 0.0, gy)
    gh = gy * h
    to_t = gh * theta_t + gl * log_t
    t_den = tau * inv_den
    low = (t * t + a * tau) * inv_den  # θ
    to_a = gh * t_den * (1 - low) + gl * (r * r * inv_num - 2 * t_den)
    to_b = -gh * t_den * low + gl * (t * t * inv_num - 2 * t_den)
    to_d0, to_d1 = to_a / s, to_b / s
    to_s = (gl - to_a * a - to_b * b) / s
    to_x0 = -to_t / w
    to_w = to_x0 * t - to_s * s / w
    to_h = gy * low + to_s / w
    to_y0 = gy
    if not inverse:
        grad_x = torch.where(outside, grad_y, -to_x0)

    # From the bin to the knots. A bin left of the element's pushes its corner.
    to_widths, to_heights = [o * to_w for o in own], [o * to_h for o in own]
    for k, p in enumerate(passed):
        to_widths[k] = torch.addcmul(to_widths[k], p, to_x0)
        to_heights[k] = torch.addcmul(to_heights[k], p, to_y0)

    grad_derivatives = []
    for k in range(bins - 1):
        to_d = torch.addcmul(own[k] * to_d1, own[k + 1], to_d0)
        if slope is None:
            cap = max_logit(x.dtype)
            grown = torch.exp(derivatives[k].clamp(max=cap)) * (1 - MIN_DERIVATIVE)
            to_raw = torch.where(derivatives[k] > cap, torch.zeros_like(grown), to_d * grown)
            grad_derivatives.append(to_raw)
            continue
        s0, s1 = knots.secants[k], knots.secants[k + 1]
        grad_raw, to_s0, to_s1 = _slope_pullback(
            to_d, derivatives[k], s0, s1, knots.slopes[k], slope
        )
        grad_derivatives.append(grad_raw)
        for j, to_sj in ((k, to_s0), (k + 1, to_s1)):
            share = to_sj / knots.widths[j]
            to_heights[j] = to_heights[j] + share
            to_widths[j] = to_widths[j] - share * knots.secants[j]

    grad_widths, grad_heights = _sizes_pullback(knots, to_widths, to_heights, bound, slope)
    return grad_x, grad_widths, grad_heights, grad_derivatives


def _slope_pullback(
    grad: Tensor, raw: Tensor, s0: Tensor, s1: Tensor, d: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients of :func:`_slope`, by parts: d = (lo a + high b) / (a + b)."""
    a, b, p, gap_high, gap_low, mean, high, lo = _slope_weights(raw, s0, s1, slope)
    scaled = grad / (a + b)
    to_a = scaled * (lo - d)
    to_b = scaled * (high - d)
    to_p = to_b * gap_low - to_a * gap_high
    grad_raw = to_p * p * (1 - p)
    open_ = torch.where(gap_high > 0, to_a * (1 - p), torch.zeros_like(a))
    to_mean = to_b * (p + 1e-30) - open_
    to_high = scaled * b + open_
    least = torch.minimum(s0, s1)
    to_least = torch.where(least * least * 0.5 < 1.0, to_high * least / lo, torch.zeros_like(a))
    half = 0.5 * to_mean / mean
    first = s0 <= s1
    return (
        grad_raw,
        half * s1 + torch.where(first, to_least, torch.zeros_like(a)),
        half * s0 + torch.where(first, torch.zeros_like(a), to_least),
    )


def _sizes_pullback(
    knots: Knots,
    to_widths: list[Tensor],
    to_heights: list[Tensor],
    bound: float,
    slope: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    r"""From the sizes of all bins to their logits, through the mixture and the softmax."""
    bins = len(to_widths)
    share = 0.0 if slope is None else mixing(slope)
    scale = 2 * bound * (1 - bins * _floor(bins)) / (1 + share)
    grads = []
    for probs, main, other in (
        (knots.w_prob, to_widths, to_heights),
        (knots.h_prob, to_heights, to_widths),
    ):
        if slope is None:
            to_probs = main
        else:
            to_probs = [m + share * o for m, o in zip(main, other, strict=True)]
        # The last bin takes what is left of the box; with Σ p = 1 that is the same softmax.
        if bins == 2:
            grads.append([scale * probs[0] * probs[1] * (to_probs[0] - to_probs[1])])
            continue
        mean = probs[0] * to_probs[0]
        for p, g in zip(probs[1:], to_probs[1:], strict=True):
            mean = mean + p * g
        grads.append([scale * p * (g - mean) for p, g in zip(probs[:-1], to_probs, strict=False)])
    return grads[0], grads[1]


def _pieces(x: Tensor) -> tuple[int, list[int]] | None:
    r"""Along which dimension, and into which lengths, large tensors are worked on in eager mode."""
    if torch.compiler.is_compiling() or x.numel() <= CHUNK or x.device.type != "cpu":
        return None
    dim = max(range(x.dim()), key=lambda i: x.shape[i])
    size = x.shape[dim]
    step = max(1, CHUNK * size // x.numel())
    return dim, [min(step, size - i) for i in range(0, size, step)]


def _split(tensors: Sequence[Tensor], dim: int, sizes: list[int]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(sizes, dim) for t in tensors), strict=True))


def _forward(
    v: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float,
    slope: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    parts = (*widths.unbind(0), *heights.unbind(0), *derivatives.unbind(0))
    n = len(widths)

    def run(v: Tensor, *p: Tensor) -> tuple[Tensor, Tensor]:
        return _evaluate(v, p[:n], p[n : 2 * n], p[2 * n :], bound, slope, inverse)

    pieces = _pieces(v)
    if pieces is None:
        return run(v, *parts)
    dim, sizes = pieces
    outs = [run(*args) for args in _split((v, *parts), dim, sizes)]
    return torch.cat([o for o, _ in outs], dim), torch.cat([l for _, l in outs], dim)


def _backward(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    grad_y: Tensor,
    grad_l: Tensor,
    bound: float,
    slope: float | None,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = (*widths.unbind(0), *heights.unbind(0), *derivatives.unbind(0))
    n = len(widths)

    def run(x: Tensor, gy: Tensor, gl: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
        gx, gw, gh, gd = _pullback(
            x, p[:n], p[n : 2 * n], p[2 * n :], gy, gl, bound, slope, inverse
        )
        return gx, torch.stack(gw), torch.stack(gh), torch.stack(gd)

    pieces = _pieces(x)
    if pieces is None:
        gx, gw, gh, gd = run(x, grad_y, grad_l, *parts)
        return gx, gw, gh, gd
    dim, sizes = pieces
    outs = [run(*args) for args in _split((x, grad_y, grad_l, *parts), dim, sizes)]
    return (
        torch.cat([o[0] for o in outs], dim),
        torch.cat([o[1] for o in outs], dim + 1),
        torch.cat([o[2] for o in outs], dim + 1),
        torch.cat([o[3] for o in outs], dim + 1),
    )


class RationalQuadratic(torch.autograd.Function):
    r"""The spline with a closed-form backward, which keeps no intermediate tensor alive.

    Takes x of shape :math:`(*)` and parameters of shape :math:`(K - 1, *)`; returns the value and
    the logarithm of the slope. The backward is made of differentiable operations, so that it can
    be differentiated itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        v: Tensor,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        bound: float,
        slope: float | None,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        return _forward(v, widths, heights, derivatives, bound, slope, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        v, widths, heights, derivatives, bound, slope, inverse = inputs
        # The inverse saves its output: there the gradients are those of the forward direction.
        ctx.save_for_backward(output[0] if inverse else v, widths, heights, derivatives)
        ctx.options = (bound, slope, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bound, slope, inverse = ctx.options
        out = _backward(*ctx.saved_tensors, *grads, bound, slope, inverse)
        return (*out, None, None, None)
