r"""Splines with constant knots, in the arithmetic of single precision: in their box, or refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowguard.bounds.rational import constant_spline

UNIT = 2.0**-24


def random_knots(seed, size, bins, bound, rows=16):
    generator = torch.Generator().manual_seed(seed)
    parts = [size * torch.randn(rows, n, generator=generator) for n in (bins, bins, bins - 1)]
    w, h = (2 * bound * (1e-3 + (1 - 1e-3 * bins) * t.softmax(-1)) for t in parts[:2])
    d = 1e-3 + torch.nn.functional.softplus(parts[2])
    return w, h, torch.nn.functional.pad(d, (1, 1), value=1.0)


def knots_of(sides, bound):
    return torch.nn.functional.pad(sides.cumsum(-1) - bound, (1, 0), value=-bound)


def evaluate(y, w, h, d, bound, inverse):
    r"""The spline as Durkan et al. (2019) write it, operation by operation in single precision."""
    x0s, y0s = knots_of(w, bound), knots_of(h, bound)
    x0s[..., -1] = y0s[..., -1] = bound
    w, h = x0s.diff(), y0s.diff()
    k = (torch.searchsorted((y0s if inverse else x0s).contiguous(), y) - 1).clamp(
        0, w.shape[-1] - 1
    )
    x0, y0, w, h = (t.gather(-1, k) for t in (x0s, y0s, w, h))
    d0, d1 = d.gather(-1, k), d.gather(-1, k + 1)
    s = h / w
    e = d0 + d1 - 2 * s
    if not inverse:
        t = (y - x0) / w
        return y0 + h * (s * t**2 + d0 * t * (1 - t)) / (s + e * t * (1 - t))
    y = y - y0
    a, b, c = y * e + h * (s - d0), h * d0 - y * e, -s * y
    return 2 * c / (-b - (b**2 - 4 * a * c).sqrt()) * w + x0


@pytest.mark.parametrize("inverse", [False, True])
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([0.1, 1.0, 3.0, 10.0, 30.0, 1e2, 1e4]),
    bins=st.sampled_from([2, 8]),
    bound=st.sampled_from([1.0, 3.0]),
)
def test_values_stay_in_the_box_of_what_is_not_refused(inverse, seed, size, bins, bound):
    w, h, d = random_knots(seed, size, bins, bound)
    generator = torch.Generator().manual_seed(seed + 1)
    y = bound * (2 * torch.rand(len(w), 512, generator=generator) - 1)
    y[:, :64] = bound * (1 - torch.logspace(-7.2, -1, 64))
    y[:, 64] = bound
    x = evaluate(y, w, h, d, bound, inverse)
    for i in range(len(w)):
        g = constant_spline(w[i], h[i], d[i], bound, UNIT, inverse)
        if not g.reason:
            limit = g.reach(bound) * (1 + g.roundings * UNIT)
            assert x[i].abs().max().item() <= limit <= 1.3 * bound


def test_ordinary_splines_are_bounded_and_steep_ones_are_not():
    w, h, d = random_knots(0, 0.5, 8, 3.0, rows=8)
    g = constant_spline(w, h, d, 3.0, UNIT, inverse=True)
    assert g.reach(1.0) == 3.0
    assert g.roundings * UNIT < 1e-2
    d[:, 3] = 1e8
    assert "may leave its box" in constant_spline(w, h, d, 3.0, UNIT, inverse=True).reason
    d[:, 3] = math.nan
    assert constant_spline(w, h, d, 3.0, UNIT, inverse=False).reason
    d[:, 3], w[:, 3] = 1.0, 1e-9
    assert constant_spline(w, h, d, 3.0, UNIT, inverse=False).reason
