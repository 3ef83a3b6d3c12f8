r"""The rational quadratic within one bin, the slope at an inner knot, and their pullbacks.

Notation, for the bin of :math:`x` with corner :math:`(x_k, y_k)`, size :math:`w \times h`, secant
:math:`s = h / w` and end slopes :math:`d_0, d_1` (Gregory & Delbourgo, 1982; Durkan et al., 2019,
https://arxiv.org/abs/1906.04032):

.. math::
    t &= (x - x_k) / w, \quad r = 1 - t, \quad a = d_0 / s, \quad b = d_1 / s \\
    P &= t + a r, \quad Q = r + b t, \quad D = t P + r Q, \quad N = t Q + r P \\
    y &= y_k + h \theta, \quad \theta = t P / D, \quad 1 - \theta = r Q / D, \quad f' = s N / D^2

All of P, Q, D and N are sums of terms that are not negative, so that no digit is lost in them.

Masks are zeros and ones as floats, made from signs, and selection is a sum over masks: in eager
mode `where` and booleans cost several times as much. A mask may weigh only what is finite. A NaN
passes through every mask, hence is never hidden.
"""

__all__ = [
    "Pull",
    "evaluate",
    "finish",
    "inner_slope",
    "inside_mask",
    "mixing",
    "pull_back",
    "sigmoid",
    "slope_limits",
    "slope_pullback",
    "solve",
]

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)
MIN_DERIVATIVE = 1e-3  # the least inner derivative of the published parameterisation
ROOM = 1e-3  # the least room above the mean of two secants for the slope at their knot


def max_logit(dtype: torch.dtype) -> float:
    r"""The logarithm of the largest derivative that the published parameterisation may take.

    Its square has to be finite beside the square of the largest ratio of two secants.
    """
    return 300.0 if dtype == torch.float64 else 30.0


def mixing(slope: float | None) -> float:
    r"""The share :math:`\lambda` that keeps all secants in :math:`[\lambda, 1/\lambda]`.

    The slope is raised by a thousandth first, so that rounding cannot break the bound.
    """
    return 0.0 if slope is None else math.sqrt(2.0 * 1.001 * slope)


def sigmoid(x: Tensor) -> Tensor:
    r"""The logistic function, in the form that is the fastest where it runs."""
    if not torch.compiler.is_compiling():
        return x.sigmoid()
    # Compiled for a CPU, a power of two takes a third of the time of an exponential.
    return 1 / (1 + torch.exp2(x * -LOG2_E))


def positive(x: Tensor) -> Tensor:
    r"""A one where `x` is positive, else a zero."""
    return x.detach().clamp(min=0.0).sign()


def inside_mask(x: Tensor, bound: float) -> Tensor:
    r"""A one where :math:`|x| < B`."""
    return positive(bound - x.abs())


def finish(v: Tensor, out: Tensor, slope: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    r"""The identity outside the box; and the logarithm of the slope."""
    inside = inside_mask(v, bound)
    outside = 1 - inside
    # Rounding may land an ulp outside of the box, and certificates rely on it.
    out = torch.addcmul(out.clamp(-bound, bound) * inside, v, outside)
    return out, torch.addcmul(outside, slope, inside).log()


def _parts(t: Tensor, r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""P, Q, D and N."""
    p, q = torch.addcmul(t, a, r), torch.addcmul(r, b, t)
    return p, q, torch.addcmul(t * p, r, q), torch.addcmul(t * q, r, p)


def evaluate(z: Tensor, w: Tensor, s: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    r"""The rise above the corner at the distance `z` from it, and the slope.

    Here and below, `z` must not lie outside of the bin by a rounding error: a and b grow it.
    """
    t = z / w
    r = 1 - t
    p, q, den, num = _parts(t, r, a, b)
    inv = den.reciprocal()
    # θ = t + t r (P - Q) / D: adding the bend to the chord keeps the identity exact.
    bend = (t * r) * ((p - q) * inv)
    return s * torch.addcmul(z, w, bend), (num * inv) * (inv * s)


def solve(
    z: Tensor, w: Tensor, h: Tensor, inv_s: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The distance from the corner at the rise `z` above it, and the slope of the inverse."""
    # θ D = t P is β t² + (1 - β) t - θ = 0 with β = (1 - a) (1 - θ) - (1 - b) θ, and, seen from
    # the other corner, -β r² + (1 + β) r - (1 - θ) = 0. With δ = a (1 - θ) - b θ both have the
    # discriminant δ² + 4 θ (1 - θ), which is not negative for θ in [0, 1]. Of their solutions
    #     t = 2 θ / (1 - β + √) and r = 2 (1 - θ) / (1 + β + √)
    # the one is taken in which no two numbers cancel.
    theta = z / h
    rest = 1 - theta
    skew = rest - theta
    delta = torch.addcmul(a * rest, b, theta, value=-1)
    beta = skew - delta  # exactly 0 for the identity
    root = torch.addcmul(delta * delta, theta, rest, value=4).sqrt()
    right = positive(beta)
    near = torch.addcmul(theta, right, skew)
    u = (2 * near / (beta.abs() + root + 1)).clamp(max=1.0)
    far = 1 - u
    t = torch.addcmul(u, right, far - u)
    r = 1 - t
    _, _, den, num = _parts(t, r, a, b)
    ratio = den / num
    # t = θ + β t r: adding the bend to the chord keeps the identity exact.
    return torch.addcmul(z * inv_s, w, beta * (u * far)), ratio * (den * inv_s)


class Pull(NamedTuple):
    r"""The gradients of one bin: to x, to z = x - x_k, to y_k, to log s, a and b; and t, θ."""

    grad: Tensor
    z: Tensor
    y: Tensor
    log_s: Tensor
    a: Tensor
    b: Tensor
    t: Tensor
    r: Tensor
    theta: Tensor
    rest: Tensor


def pull_back(
    z: Tensor,
    w: Tensor,
    h: Tensor,
    s: Tensor,
    a: Tensor,
    b: Tensor,
    grad_y: Tensor,
    grad_l: Tensor,
    inverse: bool,
) -> Pull:
    r"""The gradients to what the map is made of within the bin, at `z` from the corner.

    For the inverse, `z` is that of its *output* and the gradients are those of the implicit
    function: with x = f⁻¹(y), l = -log f'(x), the parameters receive what the forward direction
    gives them for the cotangents (-g / f', -grad_l) with g = grad_x - grad_l ∂ log f' / ∂x, and y
    receives g / f'.
    """
    t = z / w
    r = 1 - t
    p, q, den, num = _parts(t, r, a, b)
    inv_den, inv_num = den.reciprocal(), num.reciprocal()
    tau = (t * r) * inv_den
    theta, rest = (t * p) * inv_den, (r * q) * inv_den
    theta_t = (num * inv_den) * inv_den
    log_t = 2 * torch.addcmul((q - p) * inv_num, (a + b - 2) * inv_den, t - r)

    if inverse:
        to_z = -grad_y
        grad = (grad_y - grad_l * log_t / w) / (theta_t * s)
        grad_y, grad_l = -grad, -grad_l
        to_theta = grad_y * h
    else:
        to_theta = grad_y * h
        to_z = grad = torch.addcmul(to_theta * theta_t, grad_l, log_t) / w

    bent, both = to_theta * tau, 2 * tau
    to_a = torch.addcmul(bent * rest, grad_l, torch.addcmul(-both, r * r, inv_num))
    to_b = torch.addcmul(-bent * theta, grad_l, torch.addcmul(-both, t * t, inv_num))
    # a and b are inverse to s.
    to_log_s = grad_l - torch.addcmul(a * to_a, b, to_b)
    return Pull(grad, to_z, grad_y, to_log_s, to_a, to_b, t, r, theta, rest)


def slope_limits(s0: Tensor, s1: Tensor, slope: float) -> tuple[Tensor, float, Tensor]:
    r"""The slope for a raw zero at the knot between two secants, the least and the largest."""
    low = 1.001 * slope
    least = torch.minimum(s0, s1)
    return (s0 * s1).sqrt(), low, (least * least * (0.5 / low)).clamp(max=1 / low)


def inner_slope(
    raw: Tensor, s0: Tensor, s1: Tensor, slope: float | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
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

    Without a least slope, it is that of the published parameterisation. What the slope is made of
    is returned for its pullback.
    """
    if slope is None:
        grown = raw.clamp(max=max_logit(raw.dtype)).exp() * (1 - MIN_DERIVATIVE)
        return grown + MIN_DERIVATIVE, (grown,)

    mean, low, high = slope_limits(s0, s1, slope)
    p = sigmoid(raw)
    # Of two weights one is always away from zero, as there is always some room.
    room = (high - mean).clamp(min=ROOM)
    up = (mean - low) * p
    inv = torch.addcmul(room + up, room, p, value=-1).reciprocal()
    ratio = up * inv
    return (high - low) * ratio + low, (p, ratio, inv, mean, high)


def slope_pullback(
    grad: Tensor,
    raw: Tensor,
    s0: Tensor,
    s1: Tensor,
    slope: float | None,
    parts: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients of :func:`inner_slope` to `raw` and to the logarithms of the secants."""
    if slope is None:
        none = torch.zeros_like(grad)
        return grad * parts[0] * positive(max_logit(raw.dtype) - raw), none, none

    low = 1.001 * slope
    p, ratio, inv, mean, high = parts
    span, other, rest = high - low, 1 - p, 1 - ratio
    pulled = grad * span
    half = (0.5 * pulled) * (mean * inv) * torch.addcmul(ratio * other, rest, p)
    twice = 2 * high * positive(1 / low - high)  # a constant where it is cut
    to_high = (grad * ratio * twice) * (1 - span * (other * inv))
    to_first = (0.5 * (s1 - s0).detach().sign() + 0.5) * to_high  # a half each for equal ones
    return pulled * (ratio * rest), half + to_first, half + (to_high - to_first)
