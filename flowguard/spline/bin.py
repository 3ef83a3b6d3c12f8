r"""The rational quadratic within one bin, the slope at an inner knot, and their pullbacks.

Notation, for the bin of :math:`x` with corner :math:`(x_k, y_k)`, size :math:`w \times h`, secant
:math:`s = h / w` and end slopes :math:`d_0, d_1` (Gregory & Delbourgo, 1982; Durkan et al., 2019,
https://arxiv.org/abs/1906.04032):

.. math::
    t &= (x - x_k) / w, \quad r = 1 - t, \quad P = s t + d_0 r, \quad Q = s r + d_1 t \\
    D &= t P + r Q, \quad N = t Q + r P \\
    y &= y_k + h \theta, \quad \theta = t P / D, \quad 1 - \theta = r Q / D, \quad f' = s^2 N / D^2

All of P, Q, D and N are sums of terms that are not negative, so that no digit is lost in them.

The slopes of a spline stay in :math:`[ε, 1/ε]`, as within a bin

.. math:: \min(d_0, d_1, s^2 / (d_0 + d_1)) \leq f' \leq \max(d_0, d_1, 2 s)

(left: with u = r / t and the end slopes in units of the secant, a = d_0 / s and b = d_1 / s,
D² / N = (u² + (a+b) u + 1)² / ((1+u)² (a u² + 2 u + b)) is a ratio of two polynomials with
positive coefficients, hence at most the largest ratio of coefficients of equal power, which is at
most max(1/a, 1/b, a+b); right: with q = 1 - 2 t r in [1/2, 1] and M = max(a, b),
N ≤ M q + 1 - q and D ≥ q + M (1 - q) / 2, so N / D² ≤ max(2, M)). All secants are kept in
[λ, 1/λ] with λ² = 2 ε, so that 2 s ≤ 2 / λ ≤ 1/ε, and an end slope d satisfies both sides if it
lies in [ε, min(1/ε, s² / 2ε)]. One does, as it is the slope at the ends of the box.

These functions can be differentiated, and are what the compiler sees. What runs in eager mode is
:mod:`flowguard.spline.inplace.bin`. A NaN is never hidden by a selection.
"""

__all__ = [
    "Cell",
    "Pair",
    "Params",
    "Pull",
    "evaluate",
    "finish",
    "from_arc",
    "published_pullback",
    "published_slope",
    "pull_back",
    "sigmoid",
    "solve",
    "squash",
    "squash_pullback",
    "within",
]

from typing import NamedTuple

import torch
from torch import Tensor

from flowguard.spline import constants

#: Both coordinates of a point, each with shape :math:`(*)`.
Pair = tuple[Tensor, Tensor]
Params = tuple[Tensor, Tensor, Tensor]  #: widths, heights and derivatives, with bins in front


def sigmoid(x: Tensor) -> Tensor:
    r"""The logistic function, in the form that is the fastest where it runs."""
    if not torch.compiler.is_compiling():
        return x.sigmoid()
    # Compiled for a CPU, a power of two takes a third of the time of an exponential.
    return 1 / (1 + torch.exp2(x * -constants.log2_e()))


def squash(x: Tensor, bound: float | None) -> Tensor:
    r"""That of :func:`flowguard.functional.bounded`."""
    return x if bound is None else from_arc(torch.atan(x / (2 * bound / constants.pi())), bound)


def from_arc(arc: Tensor, bound: float | None) -> Tensor:
    r"""The same for an arctangent that is known; what is not squashed is known as it is."""
    if bound is None:
        return arc
    y = 2 * bound / constants.pi() * arc
    # Rounding may land an ulp outside, and certificates rely on the bound. What is too much is
    # taken as a constant: the backward of a clamp costs more than all the rest.
    far = min(bound, torch.finfo(y.dtype).max)
    return y - (y - y.clamp(-far, far)).detach()


def squash_pullback(x: Tensor, grad: Tensor, bound: float | None) -> Tensor:
    r"""The gradient to what was squashed."""
    if bound is None:
        return grad
    y = x * (constants.pi() / (2 * bound))
    return grad / (y * y + 1)


def finish(v: Tensor, out: Tensor, slope: Tensor, bound: float, *, closed: bool = False) -> Pair:
    r"""The identity outside the box, to which its ends belong if it is `closed`; and the logarithm
    of the slope."""
    inside = v.abs() <= bound if closed else v.abs() < bound
    # Rounding may land an ulp outside of the box, and certificates rely on it.
    out = out.clamp(-bound, bound)
    # What is added is zero, or NaN where a parameter is.
    out = torch.where(inside, out, v + (out - out))
    return out, torch.where(inside, slope, 1 + (slope - slope)).log()


def within(z: Tensor, size: Tensor) -> Tensor:
    r"""A distance from the corner, cut to the size of the bin."""
    return torch.minimum(z, size).clamp(min=0.0)


class Cell(NamedTuple):
    r"""A bin: its corner, its size and the slopes at its ends."""

    x: Tensor
    y: Tensor
    w: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor | float


def _parts(t: Tensor, r: Tensor, s: Tensor, cell: Cell) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""P, Q, D and N."""
    p, q = torch.addcmul(s * t, cell.d0, r), s * r + cell.d1 * t
    return p, q, torch.addcmul(t * p, r, q), torch.addcmul(t * q, r, p)


def evaluate(z: Tensor, s: Tensor, cell: Cell) -> Pair:
    r"""The value at the distance `z` from the corner of a bin with secant `s`, and the slope.

    Here and below, `z` must not lie outside of the bin by a rounding error: steep ends grow it.
    """
    t = z / cell.w
    r = 1 - t
    p, q, den, num = _parts(t, r, s, cell)
    inv = den.reciprocal()
    # θ = t + t r (P - Q) / D: adding the bend to the chord keeps the identity exact.
    bend = r * ((p - q) * inv)
    g = s * inv
    return cell.y + s * torch.addcmul(z, z, bend), (g * g) * num


def solve(z: Tensor, cell: Cell) -> Pair:
    r"""The inverse at the rise `z` above the corner, and its slope."""
    # With a = d0 / s and b = d1 / s, θ D = t P is β t² + (1 - β) t - θ = 0 with
    # β = (1 - a) (1 - θ) - (1 - b) θ, and, seen from the other corner,
    # -β r² + (1 + β) r - (1 - θ) = 0. With δ = a (1 - θ) - b θ both have the discriminant
    # δ² + 4 θ (1 - θ), which is not negative for θ in [0, 1]. Of their solutions
    #     t = 2 θ / (1 - β + √) and r = 2 (1 - θ) / (1 + β + √)
    # the one is taken in which no two numbers cancel. The root is 2 β t + 1 - β, so that the
    # derivative of the equation is dt / dθ = (1 + (a + b - 2) t r) / √.
    inv_s = cell.w / cell.h
    a, b = cell.d0 * inv_s, cell.d1 * inv_s
    theta = z / cell.h
    rest = 1 - theta
    skew = rest - theta
    delta = torch.addcmul(a * rest, b, theta, value=-1)
    beta = skew - delta  # exactly 0 for the identity
    root = torch.addcmul(delta * delta, theta, rest, value=4).sqrt()
    # That of the identity is one, but for rounding; with its gradients, if they are recorded here.
    one = 1.0 if torch.compiler.is_compiling() else root + (1.0 - root).detach()
    root = torch.where(beta == 0, one, root)
    near = torch.where(beta > 0, rest, theta)
    u = (2 * near / (beta.abs() + root + 1)).clamp(max=1.0)
    both = u * (1 - u)  # t r
    # t = θ + β t r: adding the bend to the chord keeps the identity exact.
    slope = torch.addcmul(inv_s, (a + b - 2) * inv_s, both) / root
    return cell.x + torch.addcmul(z * inv_s, cell.w, beta * both), slope


class Pull(NamedTuple):
    r"""The gradients of one bin: to x, to z = x - x_k, to y_k, to log s and to the end slopes; and
    t, r, θ and 1 - θ."""

    grad: Tensor
    z: Tensor
    y: Tensor
    log_s: Tensor
    d0: Tensor
    d1: Tensor
    t: Tensor
    r: Tensor
    theta: Tensor
    rest: Tensor


def pull_back(z: Tensor, s: Tensor, cell: Cell, grads: Pair, inverse: bool) -> Pull:
    r"""The gradients to what the map is made of within the bin, at `z` from the corner.

    For the inverse, `z` is that of its *output* and the gradients are those of the implicit
    function: with x = f⁻¹(y), l = -log f'(x), the parameters receive what the forward direction
    gives them for the cotangents (-g / f', -grad_l) with g = grad_x - grad_l ∂ log f' / ∂x, and y
    receives g / f'.
    """
    (grad_y, grad_l), w, h, d0, d1 = grads, cell.w, cell.h, cell.d0, cell.d1
    t = z / w
    r = 1 - t
    p, q, den, num = _parts(t, r, s, cell)
    inv_den, inv_num = den.reciprocal(), num.reciprocal()
    tau = (t * r) * inv_den
    theta, rest = (t * p) * inv_den, (r * q) * inv_den
    theta_t = (s * inv_den) * (num * inv_den)
    turn = (d0 + d1 - 2 * s) * inv_den
    log_t = 2 * torch.addcmul((q - p) * inv_num, turn, t - r)

    if inverse:
        to_z = -grad_y
        grad = (grad_y - grad_l * log_t / w) / (theta_t * s)
        grad_y, grad_l = -grad, -grad_l
        to_theta = grad_y * h
    else:
        to_theta = grad_y * h
        to_z = grad = torch.addcmul(to_theta * theta_t, grad_l, log_t) / w

    bent, both = to_theta * tau, 2 * tau
    to_d0 = torch.addcmul(bent * rest, grad_l, r * r * inv_num - both)
    to_d1 = torch.addcmul(-bent * theta, grad_l, t * t * inv_num - both)
    # Where s and both end slopes grow alike, θ stays, and so does f' / s.
    to_log_s = grad_l - to_d0 * d0 - to_d1 * d1
    return Pull(grad, to_z, grad_y, to_log_s, to_d0, to_d1, t, r, theta, rest)


def published_slope(raw: Tensor) -> Pair:
    r"""The slope at an inner knot of the published parameterisation; and the share of it that
    grows with `raw`."""
    grown = raw.clamp(max=constants.max_logit(raw.dtype)).exp() * (1 - constants.min_derivative())
    d = grown + constants.min_derivative()
    return d, grown / d


def published_pullback(grad: Tensor, raw: Tensor, share: Tensor) -> Tensor:
    r"""The gradient to `raw` for that to the logarithm of the slope."""
    return torch.where(raw < constants.max_logit(raw.dtype), grad * share, share - share)
