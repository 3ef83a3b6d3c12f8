r"""From the knots of a spline back to the parameters that give them."""

__all__ = ["unconstrain", "unconstrain_softmax"]

import torch
from torch import Tensor
from torch.nn import functional as F

from flowguard.spline import constants
from flowguard.spline.many import slope_limits
from flowguard.spline.options import Options

LEAST = 1e-6  # the least share of a bin that has a finite logit
LARGEST = 1e20  # what logits are cut at
MARGIN = 1e-4  # how near to its limits, relatively, a slope has a finite logit


def unconstrain(
    widths: Tensor, heights: Tensor, slopes: Tensor, *, slope: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns the unconstrained parameters, with shape :math:`(*, K - 1)`, of the spline with these
    knots: with the widths and heights of all bins, as shares of the box, with shape
    :math:`(*, K)`, and the slopes at the inner knots, with shape :math:`(*, K - 1)`.

    It inverts the parameterisation of :func:`flowguard.functional.rational_quadratic_spline` with
    the least slope `slope`. Where a bin is smaller than it allows, or a slope out of its bounds,
    the result is the nearest that it can do.
    """
    bins = widths.shape[-1]
    o = Options(widths.dtype, bound=1.0, slope=slope)  # in shares of any box
    floor, share = o.least(bins), o.share()
    # Without the floor the sizes are w = (u + λ v) / (1 + λ) and h = (v + λ u) / (1 + λ).
    w, h = ((size - floor) / (1 - bins * floor) for size in (widths, heights))
    u, v = ((p / (1 - share)).clamp_min(LEAST) for p in (w - share * h, h - share * w))
    u, v = (p / p.sum(dim=-1, keepdim=True) for p in (u, v))
    raw_w, raw_h = (p[..., :-1].log() - p[..., -1:].log() for p in (u, v))
    if slope is None:
        rest = (slopes - constants.min_derivative()).clamp_min(constants.min_derivative() * MARGIN)
        return raw_w, raw_h, torch.log(rest / (1 - constants.min_derivative()))
    scale = (1 - bins * floor) / (1 + share)
    secants = ((v + share * u) * scale + floor) / ((u + share * v) * scale + floor)
    s0, s1 = secants[..., :-1], secants[..., 1:]
    if bins == 2:
        # The slope is H (1 + κ u) / (1 - κ u) with u = tanh(raw / 2), H the harmonic mean.
        ratio = slopes * (s0 + s1) / (2 * s0 * s1)
        u = (ratio - 1) / (ratio + 1) / o.lean()
        return raw_w, raw_h, 2 * torch.atanh(u.clamp(MARGIN - 1, 1 - MARGIN))
    low = o.low()
    mean, high = slope_limits(s0, s1, low)
    # The slope is (a low + b high) / (a + b) with a = (high - mean) (1 - p), b = (mean - low) p.
    d = torch.minimum(slopes.clamp_min(low * (1 + MARGIN)), high * (1 - MARGIN))
    up, down = (high - mean).clamp_min(constants.room()) * (d - low), (mean - low) * (high - d)
    return raw_w, raw_h, torch.log(up / down)


def unconstrain_softmax(
    widths: Tensor,
    heights: Tensor,
    slopes: Tensor,
    *,
    least: tuple[float, float, float],
    slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns those of :func:`unconstrain` for a spline whose sizes come from a softmax over all
    bins, and slopes from a softplus (Durkan et al., 2019, https://arxiv.org/abs/1906.04032).

    There `least` holds the least width and height, as shares of the box, and the least slope.
    """
    # A softmax makes NaN of what is infinite, and half precision has no room for the cut.
    work = torch.promote_types(widths.dtype, torch.float32)
    w, h, d = (p.to(work).clamp(-LARGEST, LARGEST) for p in (widths, heights, slopes))
    bins = w.shape[-1]
    w, h = (
        size + (1 - size * bins) * F.softmax(p, dim=-1)
        for size, p in zip(least, (w, h), strict=False)
    )
    w, h, d = unconstrain(w, h, least[2] + F.softplus(d), slope=slope)
    return w.to(widths.dtype), h.to(widths.dtype), d.to(widths.dtype)
