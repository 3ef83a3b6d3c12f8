r"""One record of options: what follows from it, and where it can travel."""

import itertools
import math
from functools import partial

import pytest
import torch

from flowguard.functional import (
    Prepared,
    bounded,
    kernels,
    prepare,
    prepared_spline,
    saturate,
    shifted_spline,
)
from flowguard.spline import autograd
from flowguard.spline.options import Options

BINS = pytest.mark.parametrize("bins", [2, 3, 8])
SLOPES = (None, 1e-12, 1e-3, 0.1, 0.49)


def draw(n, bins, dtype=torch.float64):
    params = [torch.randn(bins - 1, n, dtype=dtype) for _ in range(3)]
    return 3 * torch.randn(n, dtype=dtype), params, torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("bound", [1e-10, 0.5, 5.0, 7.3, 1e10])
def test_what_follows(bound, slope):
    o = Options(torch.float32, bound, slope)
    fraction, scale = o.unit()
    assert fraction * scale == bound
    assert 0.5 <= fraction < 1
    assert math.log2(scale).is_integer()
    assert o.low() == (0 if slope is None else 1.001 * slope)
    assert o.share() == pytest.approx(math.sqrt(2 * o.low()), rel=1e-15)
    assert 0 <= o.share() < 1
    assert 0 < o.lean() < 1
    # The knot stays in the box however far both logits are out, and so do all bins.
    assert o.reach() * (1 + o.share()) == pytest.approx(fraction * (1 - 2 * o.least(2)), rel=1e-12)
    for bins in (3, 8, 10_000):
        assert 0 < bins * o.least(bins) <= 0.5
        weight, floor = o.softmax(bins)
        assert (1 + o.share()) * (weight + bins * floor) == pytest.approx(2 * bound, rel=1e-12)


@BINS
@pytest.mark.parametrize("inverse", [False, True])
def test_both_ways_agree_on_every_option(inverse, bins):
    for slope, shift_bound, steep in itertools.product(SLOPES[2:], (None, 0.7), (False, True)):
        o = Options(torch.float64, 5.0, slope, shift_bound, inverse, steep)
        x, params, shift = draw(500, bins)
        args = [a.requires_grad_() for a in (x, *params, shift)]
        made = []
        for which in ("eager", "traced"):
            with kernels(which):
                outs = autograd.apply(x, tuple(params), shift, o)
            assert len(outs) == 1 + steep
            made.append([*outs, *torch.autograd.grad(outs, args, (x.cos(), x.sin())[: len(outs)])])
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@BINS
def test_it_passes_through_transforms_and_graphs(bins):
    o = Options(torch.float64, 5.0, 1e-3, 1.0)
    x, params, shift = draw(20, bins)

    def call(x, *rest):
        return autograd.apply(x, rest[:3], rest[3], o)

    expected = call(x, *params, shift)
    by_row = torch.vmap(call, in_dims=(0, 1, 1, 1, 0))(x, *params, shift)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x, *params, shift)

    class Module(torch.nn.Module):
        def forward(self, x, *rest):
            return call(x, *rest)

    exported = torch.export.export(Module(), (x, *params, shift)).module()(x, *params, shift)
    for outs in (by_row, compiled, exported):
        for one, other in zip(outs, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift_bound", [None, 0.7])
def test_what_is_prepared_gives_the_same(shift_bound, dtype):
    x, params, shift = draw(3000, 2, dtype)
    options = {"bound": 2.0, "slope": 1e-2, "shift_bound": shift_bound}
    raw = [*(p[0] for p in params), shift]
    prepared = prepare(*raw, **options, out=[torch.empty_like(p) for p in raw])
    for inverse in (False, True):
        full = shifted_spline(x, *(p.T for p in params), shift, **options, inverse=inverse)
        ready = partial(prepared_spline, prepared=prepared, inverse=inverse)
        for one, other in zip(ready(x), full, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(ready(x, steep=False)[0], full[0])
        # Of what is constant the input still has a gradient; it is computed by the formulas.
        given = x.clone().requires_grad_()
        y, ladj = ready(given)
        torch.testing.assert_close((y, ladj), tuple(full))
        (slope,) = torch.autograd.grad(y.sum(), given)
        torch.testing.assert_close(slope.log(), ladj.detach(), rtol=1e-4, atol=1e-4)


def test_what_is_prepared_may_take_the_place_of_parameters():
    x, params, shift = draw(50, 2)
    raw = [*(p[0] for p in params), shift]
    options = {"bound": 2.0, "slope": 1e-2, "shift_bound": 1.0}
    expected = prepare(*raw, **options, out=[torch.empty_like(p) for p in raw])
    prepared = prepare(*raw, **options, out=raw)
    assert isinstance(prepared, Prepared)
    for one, other in zip(prepared.values, expected.values, strict=True):
        assert torch.equal(one, other)
    y = prepared_spline(x, prepared, inverse=True, steep=False)[0]
    assert (y.abs() <= torch.maximum(x.abs() + 1.0, torch.tensor(2.0))).all()


def test_what_saturates_is_a_bounded_shift():
    x = torch.cat([torch.linspace(-9, 9, 1001), torch.tensor([-math.inf, math.inf])]).double()
    y = saturate(x, 2.0)
    inner = x.abs() <= 1.6
    assert torch.equal(y[inner], x[inner])
    assert (y.abs() < 2).all()
    scale = 4 / math.pi
    torch.testing.assert_close(bounded(scale * torch.tan(y / scale), 2.0), y)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bound": -1.0}, "bound must be positive"),
        ({"slope": 0.6}, "slope must lie in"),
        ({"shift_bound": -1.0}, "the bound must be positive and finite, or None"),
    ],
    ids=str,
)
def test_what_cannot_be_prepared_is_refused(change, match):
    raw = list(torch.randn(4, 3, 5).unbind())
    options = {"bound": 5.0, "slope": 1e-3, "shift_bound": 5.0}
    with pytest.raises(ValueError, match=match):
        prepare(*raw, **(options | change), out=raw)
    with pytest.raises(TypeError, match=r"float32 or float64; got torch\.float16"):
        prepare(*(p.half() for p in raw), **options, out=raw)


def test_what_requires_gradients_is_prepared_as_a_constant():
    raw = [p.requires_grad_() for p in torch.randn(4, 3, 5).unbind()]
    out = [torch.empty(3, 5) for _ in raw]
    prepared = prepare(*raw, bound=5.0, slope=1e-3, shift_bound=5.0, out=out)
    assert not any(v.requires_grad for v in prepared.values)
    with pytest.raises(ValueError, match="must broadcast"):
        prepared_spline(torch.zeros(4, 5), prepared)
