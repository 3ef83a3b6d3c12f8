r"""Rational-quadratic splines of other libraries, whose own arithmetic does not keep their box.

The inverse in a bin divides by :math:`D = b + \sqrt{b^2 - 4 a c}` (Durkan et al., 2019, equations 6
to 8), where numbers cancel if the slopes at the knots and the slope of the bin differ much: then
the result lies beyond the bin, and is NaN or infinite at worst. So only splines with constant knots
are bounded, by those: each bin is cut into pieces, and on each the error of first order in the
roundoff :math:`u` is bounded, with generous constants.
"""

__all__ = ["constant_spline", "softmax_knots"]

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowguard.bounds.regions import Envelope
from flowguard.bounds.steps import constant

#: The pieces that each bin is cut into.
PIECES = 64

#: How many units of roundoff, times the bound, a bin has to have for its slope to be known.
LEAST = 256

STEEP = "its slopes differ so much that its arithmetic may leave its box, or return NaN"


def softmax_knots(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns widths, heights and slopes at the knots of a spline made of softmax shares.

    Arguments:
        layer: A layer with the logits ``unnormalized_widths``, ``unnormalized_heights`` and
            ``unnormalized_derivatives``, of which the outer ones are left out.
    """
    bound = float(layer.tail_bound)
    sides = []
    for name, least in (("widths", layer.min_bin_width), ("heights", layer.min_bin_height)):
        logits = constant(getattr(layer, f"unnormalized_{name}"))
        shares = torch.softmax(logits, dim=-1)
        sides.append(2 * bound * (least + (1 - least * logits.shape[-1]) * shares))
    slopes = layer.min_derivative + F.softplus(constant(layer.unnormalized_derivatives))
    return sides[0], sides[1], F.pad(slopes, (1, 1), value=1.0)


def constant_spline(
    widths: Tensor, heights: Tensor, slopes: Tensor, bound: float, roundoff: float, inverse: bool
) -> Envelope:
    r"""Returns what is known of a spline with these knots, the identity outside of its box.

    Arguments:
        widths: The widths of the bins, with shape :math:`(*, K)`.
        heights: The heights of the bins, with shape :math:`(*, K)`.
        slopes: The slopes at the knots, with shape :math:`(*, K + 1)`.
        bound: The bound :math:`B` of the box.
        roundoff: The relative error of one operation of the spline.
        inverse: Whether it runs from heights to widths.

    Example:
        >>> ones = torch.ones(4)
        >>> constant_spline(ones, ones, torch.ones(5), 2.0, 2**-24, inverse=True).reach(1.0)
        2.0
    """
    w, h, d = (constant(t) for t in (widths, heights, slopes))
    least = min(w.min().item(), h.min().item(), d.min().item() * bound)
    if not (least >= LEAST * roundoff * bound and d.isfinite().all()):
        return Envelope(reason=STEEP)
    over = (_overshoot_inverse if inverse else _overshoot)(w, h, d, roundoff)
    side = (w if inverse else h).cumsum(-1) - bound  # where each bin ends
    beyond = (side.unsqueeze(-1) + over - bound).max().clamp(min=0).item() / bound
    if not beyond < 0.25:
        return Envelope(reason=STEEP)
    # As a number of operations, so that it grows with the roundoff that is asked for.
    return Envelope(
        gain=1.0,
        offset=0.0,
        floor=bound,
        displacement=2 * bound,
        depends="not at all",
        roundings=math.ceil(beyond / roundoff) + 8,
    )


def _pieces(d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Where pieces begin and end, and the slopes at the ends of each bin."""
    t = torch.linspace(0, 1, PIECES + 1, dtype=d.dtype)
    return t[:-1], t[1:], d[..., :-1, None], d[..., 1:, None]


def _overshoot(w: Tensor, h: Tensor, d: Tensor, u: float) -> Tensor:
    r"""How far the values of each piece may lie beyond their bin, with shape :math:`(*, K, n)`."""
    low, high, d0, d1 = _pieces(d)
    h = h.unsqueeze(-1)
    s = h / w.unsqueeze(-1)
    share, least, _ = _share(low, high, s, d0, d1)
    size = s + (d0 + d1 + 2 * s) / 4
    error = 16 * u * (size / least) + 16 * u
    return _beyond(h, share, error)


def _overshoot_inverse(w: Tensor, h: Tensor, d: Tensor, u: float) -> Tensor:
    r"""The same of the inverse."""
    low, high, d0, d1 = _pieces(d)
    h, w = h.unsqueeze(-1), w.unsqueeze(-1)
    s = h / w
    share, _, most = _share(low, high, s, d0, d1)
    total = d0 + d1 + 2 * s
    # The sizes of the terms of b and a, which their errors are relative to, and c.
    b, a, c = h * (d0 + share * total), h * (share * total + s + d0), s * h * share
    # The root of the discriminant is h s q(t) / r(t), and D = 2 h s (s t + d0 (1 - t)) / r(t).
    product = torch.minimum(low * (1 - low), high * (1 - high))
    q = d1 * low**2 + 2 * s * product + d0 * (1 - high) ** 2
    root = h * s * q / most
    divisor = 2 * h * s * (s * low + d0 * (1 - high)) / most
    error = 32 * u * b**2 + 96 * u * a * c
    known = error < root**2 / 4
    # D is also 2 c / t, which is the better bound where the slope at the end is the smaller one.
    divisor = torch.maximum(divisor, 2 * s * h * _share(low, low, s, d0, d1)[0] / high)
    error = (10 * u * b + 2 * error / root) / divisor + 8 * u
    return torch.where(known, _beyond(w, high, error), math.inf)


def _share(
    low: Tensor, high: Tensor, s: Tensor, d0: Tensor, d1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The share of its height that a bin has reached at the end of a piece, and the least and the
    greatest denominator r(t) on it."""
    p = high * (1 - high)
    r = s * (1 - 2 * p) + (d0 + d1) * p
    share = (s * high**2 + d0 * p) / r
    ends = [t * (1 - t) for t in (low, high)]
    values = [s * (1 - 2 * t) + (d0 + d1) * t for t in ends]
    least, most = torch.minimum(*values), torch.maximum(*values)
    return share.clamp(max=1.0), least, most


def _beyond(length: Tensor, share: Tensor, error: Tensor) -> Tensor:
    # Knots and slopes are those of the layer up to a sixty-fourth.
    grown = share * (1 + 2.5 * error) - 1
    return torch.where(error < 0.2, length * grown.clamp(min=0), math.inf)
