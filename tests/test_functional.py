r"""The spline as a function: bounds by construction, finite for everything, exact in its tails."""

import itertools
import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flowguard.functional import (
    affine,
    bounded,
    kernels,
    limited,
    rational_quadratic_spline,
    reparametrized_affine,
    straight_rational_quadratic_spline,
    unconstrained_rational_quadratic_spline,
)
from flowguard.spline import formulas
from flowguard.spline.inplace import pieces
from flowguard.spline.options import Options

BOUND = 5.0
SCALES = [1.0, 10.0, 100.0, 1e4, math.inf]
HALF = (torch.float16, torch.bfloat16)
BINS = pytest.mark.parametrize("bins", [2, 3, 8])
ALL = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
spline = partial(rational_quadratic_spline, bound=BOUND)


def draw(n, bins, dtype, scale, generator=None):
    r"""Parameters of any size; for an infinite scale one third is finite."""
    out = []
    for _ in range(3):
        p = torch.randn(n, bins - 1, dtype=torch.float64, generator=generator)
        p = torch.where(p.abs() < 0.4, p, p.sign() * math.inf) if math.isinf(scale) else p * scale
        out.append(p.to(dtype))
    return out


def points(n, dtype, generator=None):
    r"""Normal numbers, and all that are special, each many times."""
    x = 3 * torch.randn(n, dtype=torch.float64, generator=generator)
    x = x.to(dtype)
    end, zero = torch.tensor(BOUND, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    big = torch.finfo(dtype).max
    special: list[Any] = [
        end,
        end.nextafter(zero),
        end.nextafter(2 * end),
        zero,
        torch.tensor(1e-40),
        big,
    ]
    values = torch.tensor([*(float(v) for v in special), math.inf], dtype=torch.float64).to(dtype)
    values = torch.cat([values, -values])
    x[::2] = values.repeat(n)[: len(x[::2])]
    return x


def knots(widths, slope, bound=BOUND):
    r"""The inner knots, found by their definition alone."""
    full = [torch.cat([p, torch.zeros_like(p[..., :1])], dim=-1) for p in widths]
    bins = full[0].shape[-1]
    u, v = ((1 - bins * 1e-3) * p.softmax(-1) + 1e-3 for p in full)
    share = 0.0 if slope is None else math.sqrt(2 * 1.001 * slope)
    return 2 * bound * ((u + share * v) / (1 + share)).cumsum(-1)[..., :-1] - bound


def check_finite(x, params, dtype, slope):
    args = [a.requires_grad_() for a in (x, *params)]
    for inverse in (False, True):
        y, ladj = spline(*args, slope=slope, inverse=inverse)
        assert y.dtype == ladj.dtype == dtype
        assert torch.equal(y.isfinite(), x.isfinite())
        assert torch.equal(y[x.isinf()], x[x.isinf()])
        assert ladj.isfinite().all()
        for grad in torch.autograd.grad((y, ladj), args, (torch.ones_like(y),) * 2):
            assert grad.isfinite().all()


@ALL
@BINS
@pytest.mark.parametrize("slope", [1e-3, 0.49, None])
@pytest.mark.parametrize("scale", SCALES)
def test_finite_for_everything(scale, slope, bins, dtype):
    check_finite(points(2000, dtype), draw(2000, bins, dtype, scale), dtype, slope)


@given(
    arrays(np.float32, (4, 7), elements=st.floats(width=32, allow_nan=False)),
    st.floats(width=32, allow_nan=False),
    st.sampled_from([1e-3, 0.1, None]),
)
@settings(max_examples=200)
def test_finite_for_any_float(raw, x, slope):
    widths, heights, derivatives, _ = torch.from_numpy(raw).unsqueeze(1)
    check_finite(torch.tensor([x]), [widths, heights, derivatives], torch.float32, slope)
    two = [p[:, :1].detach() for p in (widths, heights, derivatives)]
    check_finite(torch.tensor([x]), two, torch.float32, slope)


@BINS
@pytest.mark.parametrize("slope", [1e-3, None])
def test_on_and_beside_every_knot(slope, bins):
    widths, heights, derivatives = draw(500, bins, torch.float64, 1.5)
    kx, ky = knots((widths, heights), slope), knots((heights, widths), slope)
    for k in range(bins - 1):
        for step in (0.0, 1e-13, -1e-13):
            x, y = kx[:, k] + step, ky[:, k] + step
            out, ladj = spline(x, widths, heights, derivatives, slope=slope)
            # both sides meet: the value within the rounding of the knot times the slope
            torch.testing.assert_close(out, ky[:, k], rtol=0, atol=1e-9)
            back, ladj_back = spline(y, widths, heights, derivatives, slope=slope, inverse=True)
            torch.testing.assert_close(back, kx[:, k], rtol=0, atol=1e-9)
            # published slopes have no bound, nor does how fast they change
            atol = 1e-6 if slope else 1e-4
            torch.testing.assert_close(ladj, -ladj_back, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@BINS
@pytest.mark.parametrize("scale", SCALES)
def test_round_trip_at_every_scale(scale, bins, dtype):
    x, params = points(20000, dtype), draw(20000, bins, dtype, scale)
    inside = x.abs() <= 2 * BOUND
    # One ulp of the box grows by 1 / slope at most, and a few of them add up.
    atol = 20 * BOUND * torch.finfo(dtype).eps / 1e-3
    for inverse in (False, True):
        y, _ = spline(x, *params, inverse=inverse)
        z, _ = spline(y, *params, inverse=not inverse)
        torch.testing.assert_close(z[inside], x[inside], rtol=0, atol=atol)
        assert torch.equal(y[~inside], x[~inside])
        assert (y[inside].abs() <= 2 * BOUND).all()


@BINS
@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("inverse", [False, True])
def test_single_precision_against_double(inverse, scale, bins):
    x, params = 3 * torch.randn(20000), draw(20000, bins, torch.float32, scale)
    y, ladj = spline(x, *params, slope=0.1, inverse=inverse)
    exact, exact_ladj = spline(
        x.double(), *(p.double() for p in params), slope=0.1, inverse=inverse
    )
    # The knots are rounded to an ulp of the box, which slopes up to 10 grow. At large scales bins
    # are down to a thousandth of the box: of two bins, the smaller is a difference, with as much
    # of a relative error in its secant, hence in the slope at the knot.
    ulp = BOUND * torch.finfo(torch.float32).eps
    ulps = 40 if scale == 1.0 else 200 if bins > 2 else 2000
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=ulps * ulp)
    torch.testing.assert_close(ladj.double(), exact_ladj, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("slope", [1e-3, 0.03, 0.49])
@BINS
@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0, math.inf])
def test_slope_is_bounded_on_the_whole_line(scale, bins, slope):
    params = draw(400, bins, torch.float64, scale)
    x = torch.linspace(-BOUND - 0.1, BOUND + 0.1, 4001, dtype=torch.float64)
    _, ladj = spline(x, *(p.unsqueeze(1) for p in params), slope=slope)
    assert ladj.abs().max() <= -math.log(slope)


@given(
    arrays(np.float64, (3, 3), elements=st.floats(-60, 60)),
    st.floats(-BOUND, BOUND),
    st.sampled_from([1e-3, 0.1, 0.49]),
    st.sampled_from([1, 3]),
)
@settings(max_examples=500)
def test_no_counterexample_to_the_bound(raw, x, slope, free):
    params = torch.from_numpy(raw)[:, :free]
    # also where the slope is least: near the knots and at many points between
    x = torch.cat([torch.tensor([x]), torch.linspace(-BOUND, BOUND, 501)]).double()
    for inverse in (False, True):
        _, ladj = spline(x, *params, slope=slope, inverse=inverse)
        assert ladj.abs().max() <= -math.log(slope)


def test_climbing_does_not_break_the_bound():
    slope = 1e-2
    for bins, sign in itertools.product((2, 4), (1.0, -1.0)):
        x = torch.empty(2000, dtype=torch.float64).uniform_(-BOUND, BOUND)
        args = [a.requires_grad_() for a in (x, *draw(2000, bins, torch.float64, 3.0))]
        optimizer = torch.optim.Adam(args, lr=0.2)
        for _ in range(120):
            _, ladj = spline(*args, slope=slope)
            optimizer.zero_grad()
            (sign * ladj).sum().backward()
            optimizer.step()
        extreme = spline(*args, slope=slope)[1].abs().max()
        # the bound holds, and is not loose
        assert 0.5 * -math.log(slope) <= extreme <= -math.log(slope)


@ALL
@BINS
def test_nan_makes_its_own_element_nan(bins, dtype):
    x = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.3, 9.0, 9.0, 9.0], dtype=dtype)
    params = [torch.zeros(8, bins - 1, dtype=dtype) for _ in range(3)]
    x[0] = math.nan
    for k, p in enumerate(params):
        p[k + 1, -1] = math.nan
        p[k + 5, 0] = math.nan
    expected = torch.tensor([True, True, True, True, False, True, True, True])
    args = [a.requires_grad_() for a in (x, *params)]
    for inverse in (False, True):
        y, ladj = spline(*args, inverse=inverse)
        assert torch.equal(y.isnan(), expected)
        assert torch.equal(ladj.isnan(), expected)
        grads = torch.autograd.grad((y, ladj), args, (torch.ones_like(y),) * 2)
        assert all(g[4].isfinite().all() for g in grads)
        assert grads[0][expected].isnan().all()


@BINS
def test_identity_for_zeros_to_the_last_bit(bins):
    # Many layers and elements add what one of them misses by, always to the same side.
    zeros = torch.zeros(bins - 1)
    for dtype, slope, bound, inverse in itertools.product(
        (torch.float32, torch.float64), (None, 1e-3, 1e-2, 0.03, 0.3), (0.5, 3.0, 7.3), (0, 1)
    ):
        x = (torch.linspace(-1.2, 1.2, 5001, dtype=dtype) * bound).requires_grad_()
        params = [zeros.to(dtype)] * 3
        options = {"bound": bound, "slope": slope, "inverse": bool(inverse)}
        y, ladj = rational_quadratic_spline(x, *params, **options)
        assert torch.equal(y, x)
        assert torch.equal(ladj, torch.zeros_like(x))
        first = (p.unsqueeze(-1).expand(-1, len(x)) for p in params)
        settings = Options(dtype, bound, slope, inverse=bool(inverse))
        traced, slopes = formulas.evaluate(x.detach(), *first, None, settings)
        assert torch.equal(traced, x)
        assert torch.equal(slopes, torch.zeros_like(x))


@BINS
def test_identity_outside_to_the_last_bit(bins):
    x = torch.tensor([BOUND, 5.3, 1e4, 3e38, math.inf])
    x = torch.cat([x, -x])
    for inverse in (False, True):
        y, ladj = spline(x, *draw(10, bins, torch.float32, 3.0), inverse=inverse)
        assert torch.equal(y, x)
        assert torch.equal(ladj, torch.zeros(10))
        assert not ladj.signbit().any()


@BINS
def test_exchanging_axes_inverts(bins):
    x, (w, h, d) = points(500, torch.float64), draw(500, bins, torch.float64, 2.0)
    x = x[x.abs() < 10]
    w, h, d = (p[: len(x)] for p in (w, h, d))
    forward, _ = spline(x, w, h, d.zero_())
    inverse, _ = spline(x, h, w, d, inverse=True)
    torch.testing.assert_close(forward[x.abs() >= BOUND], inverse[x.abs() >= BOUND])
    # With raw zeros the slope at a knot is the mean of the secants in either direction.
    torch.testing.assert_close(spline(inverse, h, w, d)[0], x, rtol=0, atol=1e-10)


@BINS
@pytest.mark.parametrize("slope", [1e-3, 0.1])
def test_slope_at_the_knots(slope, bins):
    widths, heights, zeros = draw(200, bins, torch.float64, 1.5)
    zeros = torch.zeros_like(zeros)
    # both ends of the box are knots too
    x, y = (
        torch.nn.functional.pad(
            torch.nn.functional.pad(k, (1, 0), value=-BOUND), (0, 1), value=BOUND
        )
        for k in (knots((widths, heights), slope), knots((heights, widths), slope))
    )
    secants = y.diff(dim=-1) / x.diff(dim=-1)
    before, after = secants[:, :-1], secants[:, 1:]

    def at_knots(raw):
        args = (p.unsqueeze(1) for p in (widths, heights, raw))
        return spline(x[:, 1:-1], *args, slope=slope)[1].exp()

    mean = 2 / (1 / before + 1 / after) if bins == 2 else (before * after).sqrt()
    torch.testing.assert_close(at_knots(zeros), mean, rtol=1e-6, atol=0)
    least, most = (at_knots(zeros + sign * math.inf) for sign in (-1, 1))
    if bins == 2:
        share = math.sqrt(2 * 1.001 * slope)
        factor = (1 + share**2) / (2 * share)
        torch.testing.assert_close(least, mean / factor, rtol=1e-6, atol=0)
        torch.testing.assert_close(most, mean * factor, rtol=1e-6, atol=0)
    else:
        smaller = torch.minimum(before, after)
        most_of_all = (smaller.square() / (2 * 1.001 * slope)).clamp(max=1 / (1.001 * slope))
        torch.testing.assert_close(least, torch.full_like(least, 1.001 * slope), rtol=1e-6, atol=0)
        torch.testing.assert_close(most, most_of_all, rtol=1e-6, atol=0)


@BINS
def test_half_precision_is_computed_in_single(bins):
    for dtype in HALF:
        x, params = points(500, dtype), draw(500, bins, dtype, 2.0)
        for inverse in (False, True):
            half = spline(x, *params, inverse=inverse)
            single = spline(x.float(), *(p.float() for p in params), inverse=inverse)
            assert all(torch.equal(a, b.to(dtype)) for a, b in zip(half, single, strict=True))


@pytest.mark.parametrize("slope", [1e-3, 0.35, 0.45, 0.49])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_where_the_slope_at_a_knot_has_no_room(inverse, slope):
    x, params = points(400, torch.float64), draw(400, 3, torch.float64, 4.0)
    x = x[x.abs() < 10]
    # one in which the largest slope is next to the mean
    params = [p[: len(x)] for p in params]
    for p, first in zip(
        params, ((-1.876, -0.7957), (7.459, -0.8643), (-6.76, 0.794)), strict=True
    ):
        p[0] = torch.tensor(first)
    x[0] = -2.1275
    args = [a.clone().requires_grad_() for a in (x, *params)]
    options = Options(torch.float64, BOUND, slope, inverse=inverse)
    first = [a.movedim(-1, 0) if a.dim() > 1 else a for a in args]
    # what automatic differentiation makes of the formulas themselves
    expected = torch.autograd.grad(
        formulas.evaluate(*first, None, options), args, (x.cos(), x.sin())
    )
    out = spline(*args, slope=slope, inverse=inverse)
    for create_graph in (False, True):
        grads = torch.autograd.grad(
            out, args, (x.cos(), x.sin()), retain_graph=True, create_graph=create_graph
        )
        on_knots = (expected[0] - grads[0]).abs() > 1e-6  # where it takes one side
        assert on_knots.double().mean() < 0.3
        for one, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(one[~on_knots], other[~on_knots], rtol=1e-6, atol=1e-7)


@BINS
@pytest.mark.parametrize("bound", [1e-10, 1e10])
@pytest.mark.parametrize("slope", [1e-12, 1e-8, 1e-3, None])
def test_finite_at_extreme_bounds_and_slopes(slope, bound, bins):
    params = draw(4000, bins, torch.float32, math.inf)
    x = (bound * 2 * torch.randn(4000)).clamp(-2 * bound, 2 * bound)
    args = [a.requires_grad_() for a in (x, *params)]
    for inverse in (False, True):
        out = rational_quadratic_spline(*args, bound=bound, slope=slope, inverse=inverse)
        first = [a.movedim(-1, 0) if a.dim() > 1 else a for a in args]
        options = Options(torch.float32, bound, slope, inverse=inverse)
        traced = formulas.evaluate(*first, None, options)  # what is compiled
        for tensor in (*out, *traced, *torch.autograd.grad(out, args, (torch.ones(4000),) * 2)):
            assert tensor.isfinite().all()


def test_dtypes_are_promoted():
    x, (w, h, d) = torch.zeros(3, dtype=torch.bfloat16), draw(3, 4, torch.float32, 1.0)
    assert spline(x, w, h, d)[0].dtype == torch.float32
    assert spline(x, w, h, d.double())[0].dtype == torch.float64
    x.requires_grad_()
    spline(x, w, h, d)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@BINS
@pytest.mark.parametrize("shape", [(50, 7), (3, 2, 61), (2, 5, 8, 9), (1, 6, 40, 40)])
def test_pieces_change_nothing(shape, bins, monkeypatch):
    x = 3 * torch.randn(shape, dtype=torch.float64)
    stacked = torch.randn(shape[0], 3 * (bins - 1), *shape[1:], dtype=torch.float64)
    params = [p.movedim(1, -1) for p in stacked.chunk(3, dim=1)]

    def run():
        args = [a.detach().requires_grad_() for a in (x, *params)]
        out = spline(*args)
        return *out, *torch.autograd.grad(out, args, (x, x))

    whole = run()
    monkeypatch.setattr(pieces, "CHUNK", 64 // torch.get_num_threads())
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_keeps_nothing_but_its_inputs():
    x = torch.randn(1000).requires_grad_()
    params = [p.requires_grad_() for p in draw(1000, 8, torch.float32, 1.0)]
    held = []

    def pack(t):
        held.append(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = spline(x, *params)
    assert set(held) <= {t.untyped_storage().data_ptr() for t in (x, y, *params)}


@BINS
def test_vmap_is_not_slow_in_silence(bins):
    x, params = torch.randn(5), draw(5, bins, torch.float32, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.vmap(torch.func.grad(lambda *args: spline(*args)[0]))(x, *params)


@pytest.mark.parametrize("bins", [3, 8])
def test_logits_are_cut(bins):
    x = torch.randn(50, dtype=torch.float64)
    widths, heights, derivatives = 40 + 40 * torch.randn(3, 50, bins - 1, dtype=torch.float64)
    leaves = [p.requires_grad_() for p in (widths, heights, derivatives)]
    y, ladj = rational_quadratic_spline(x, *leaves, bound=5.0)
    cut = rational_quadratic_spline(
        x, widths.clamp(max=60), heights.clamp(max=60), derivatives, bound=5.0
    )
    assert torch.equal(y, cut[0])
    assert torch.equal(ladj, cut[1])

    grads = torch.autograd.grad((y.sum() + ladj.sum(),), leaves)
    # What was cut is a constant; the others get what automatic differentiation gives.
    by_autograd = torch.autograd.grad(cut[0].sum() + cut[1].sum(), leaves)
    for grad, expected, logits in zip(grads, by_autograd, leaves[:2], strict=False):
        assert (logits > 60).any()
        assert (grad[logits > 60] == 0).all()
        torch.testing.assert_close(grad, expected)


@pytest.mark.slow
def test_compiled_by_the_default_backend():
    for bins, inverse in itertools.product((2, 8), (False, True)):
        torch._dynamo.reset()
        f = torch.compile(partial(spline, inverse=inverse), fullgraph=True)
        for n in (100, 200, 300):
            args = [a.requires_grad_() for a in (torch.randn(n), *draw(n, bins, torch.float32, 1))]
            out, expected = f(*args), spline(*args, inverse=inverse)
            grads = [torch.autograd.grad(o, args, (torch.ones(n),) * 2) for o in (out, expected)]
            for a, b in zip((*out, *grads[0]), (*expected, *grads[1]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("scale", SCALES)
def test_torture(scale, dtype):
    r"""Ten million elements each; round trips in single and double precision."""
    generator = torch.Generator().manual_seed(1)
    worst, n = 0.0, 500_000
    for bins in (2, 8):
        for _ in range(10):
            x, params = points(n, dtype, generator), draw(n, bins, dtype, scale, generator)
            check_finite(x, params, dtype, 1e-3)
            if dtype not in HALF:
                with torch.no_grad():
                    y, _ = spline(spline(x, *params)[0], *params, inverse=True)
                    worst = max(worst, (y - x)[x.abs() < 2 * BOUND].abs().max().item())
    print(f"{dtype}, {scale}: round trip within {worst / BOUND:.1e} of the bound")
    assert worst <= 1e-3 * BOUND


@pytest.mark.parametrize("function", [affine, reparametrized_affine])
def test_affine_gain(function):
    shift, scale = torch.zeros(3), torch.tensor([-1e4, 0.0, 1e4])
    y, ladj = function(torch.ones(3), shift, scale)
    gain = torch.sigmoid(scale + 2) + 1e-4
    torch.testing.assert_close(y, gain if function is affine else 1 / gain)
    torch.testing.assert_close(ladj, y.log())


def test_bounded_wants_a_number():
    with pytest.raises(TypeError, match="got Tensor"):
        bounded(torch.zeros(2), torch.tensor(1.0))
    with pytest.raises(ValueError, match="got nan"):
        bounded(torch.zeros(2), math.nan)


@BINS
def test_eager_agrees_with_what_is_differentiated(bins):
    # Without gradients recorded the spline works in place, by other passes over the elements.
    for slope, inverse in itertools.product((1e-3, 0.3, None), (False, True)):
        x, params = 2 * torch.randn(3000, dtype=torch.float64), draw(3000, bins, torch.float64, 1)
        args = [a.requires_grad_() for a in (x, *params)]
        out = spline(*args, slope=slope, inverse=inverse)
        inplace, traced = (
            torch.autograd.grad(out, args, (x.cos(), x.sin()), retain_graph=True, create_graph=c)
            for c in (False, True)
        )
        for one, other in zip(inplace, traced, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("slope", [1e-3, 0.1, 0.45])
def test_eager_agrees_where_secants_are_inverse_to_each_other(slope):
    # Their mean is one, but no slope at their knot is, where that has no room.
    x = torch.linspace(-BOUND, BOUND, 101, dtype=torch.float64)
    rows = torch.tensor([[60.0, -60.0], [-60.0, 60.0], [0.0, 0.0]], dtype=torch.float64)
    for inverse in (False, True):
        with kernels("eager"):
            eager = spline(x, *rows, slope=slope, inverse=inverse)
        with kernels("traced"):
            traced = spline(x, *rows, slope=slope, inverse=inverse)
        for one, other in zip(eager, traced, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@BINS
@pytest.mark.filterwarnings("ignore")  # that shapes are looked at, and that traces are going away
def test_a_trace_runs_on_other_sizes(bins):
    first, other = ((torch.randn(n).double(), *draw(n, bins, torch.float64, 1)) for n in (7, 20))
    traced = torch.jit.trace(lambda *args: spline(*args), first)
    for one, expected in zip(traced(*other), spline(*other), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


@BINS
def test_batched_cotangents(bins):
    args = [a.requires_grad_() for a in (torch.randn(5), *draw(5, bins, torch.float32, 1.0))]
    out = spline(*args)
    eye = torch.eye(5), torch.zeros(5, 5)
    batched = torch.autograd.grad(out, args, eye, is_grads_batched=True, retain_graph=True)
    for k in range(5):
        row = torch.autograd.grad(out, args, (eye[0][k], eye[1][k]), retain_graph=True)
        for one, other in zip(batched, row, strict=True):
            torch.testing.assert_close(one[k], other)


@ALL
def test_bounded(dtype):
    big = torch.finfo(dtype).max
    x = torch.tensor([0.0, 0.1, 1.0, 10.0, 1e3, big, math.inf], dtype=dtype)
    x = torch.cat([-x.flip(0), x]).requires_grad_()
    y = bounded(x, 2.0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (y.abs() <= 2).all()
    assert (y.diff() >= 0).all()
    torch.testing.assert_close(y[-1].item(), 2.0, rtol=torch.finfo(dtype).eps, atol=0)
    assert y[7] == 0
    assert grad.isfinite().all()
    assert (grad[x.abs() <= 10] > 0).all()
    assert bounded(x, None) is x


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError, "floating point"),
        ({"x": torch.zeros(4)}, ValueError, "broadcast"),
        ({"widths": torch.zeros(3, 6)}, ValueError, "got 6, 7 and 7"),
        ({"bound": 0.0}, ValueError, "bound"),
        ({"bound": math.inf}, ValueError, "bound"),
        ({"bound": math.nan}, ValueError, "got nan"),
        ({"bound": 1e-45}, ValueError, "1e-10"),
        ({"bound": 1e300}, ValueError, "Rescale"),
        ({"bound": torch.tensor(5.0)}, TypeError, "number.*got Tensor"),
        ({"bound": "5"}, TypeError, "number.*got str"),
        ({"slope": 0.5}, ValueError, "slope"),
        ({"slope": 0.0}, ValueError, "slope"),
    ],
)
def test_errors(change, error, match):
    zeros = torch.zeros(3, 7)
    args = {"x": torch.zeros(3), "widths": zeros, "heights": zeros, "derivatives": zeros}
    with pytest.raises(error, match=match):
        rational_quadratic_spline(**{**args, "bound": BOUND, **change})


def usual(shape, bins=4, more=-1, dtype=torch.float32):
    shapes = [shape, *((*shape, size) for size in (bins, bins, bins + more))]
    return [torch.randn(size, dtype=dtype) for size in shapes]


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0), (2, 3), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("bound", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
def test_the_unconstrained_spline_takes_any_shape(bound, shape):
    y, ladj = unconstrained_rational_quadratic_spline(*usual(shape), tail_bound=bound)
    assert y.shape == ladj.shape == shape


def test_the_unconstrained_spline_broadcasts():
    x, w, h, d = usual((5, 3))
    whole = unconstrained_rational_quadratic_spline(x, w[:1].expand_as(w), h, d[0].expand_as(d))
    parts = unconstrained_rational_quadratic_spline(x, w[:1], h, d[0])
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bound", [1.5, torch.tensor(1.5)], ids=["number", "tensor"])
def test_the_unconstrained_spline_has_the_dtype_of_its_inputs(bound, dtype):
    x, *params = usual((50,), dtype=dtype)
    y, ladj = unconstrained_rational_quadratic_spline(x, *params, tail_bound=bound)
    assert y.dtype == ladj.dtype == dtype
    wide = unconstrained_rational_quadratic_spline(
        x, *(p.float() for p in params), tail_bound=bound
    )
    assert torch.equal(y, wide[0])  # what is narrow was computed in single precision
    assert torch.equal(ladj, wide[1])


def test_a_tensor_of_bounds_is_a_bound_for_each():
    x, *params = usual((200, 2), dtype=torch.float64)
    bounds = torch.tensor([0.5, 2.0], dtype=x.dtype, requires_grad=True)
    y, ladj = unconstrained_rational_quadratic_spline(3 * x, *params, tail_bound=bounds)
    for k, bound in enumerate((0.5, 2.0)):
        column = [p[:, k] for p in params]
        one = unconstrained_rational_quadratic_spline(3 * x[:, k], *column, tail_bound=bound)
        assert torch.allclose(y[:, k], one[0], atol=1e-12)
        assert torch.allclose(ladj[:, k], one[1], atol=1e-11)
    far = torch.tensor([[math.inf, -1e30]], dtype=x.dtype)
    few = [p[:1] for p in params]
    y, ladj = unconstrained_rational_quadratic_spline(far, *few, tail_bound=bounds)
    assert torch.equal(y, far)
    assert not ladj.any()
    (grad,) = torch.autograd.grad(y.sum() + ladj.sum(), bounds)
    assert grad.isfinite().all()
    far[0, 0] = math.nan
    for made in unconstrained_rational_quadratic_spline(far, *few, tail_bound=bounds):
        assert made.isnan().tolist() == [[True, False]]


def test_a_list_of_one_kind_is_that_kind():
    x, w, h, d = usual((50, 2), more=1, dtype=torch.float64)
    spline = partial(unconstrained_rational_quadratic_spline, x, w, h, tail_bound=2.0)
    lists = spline(d, tails=["linear", "linear"]), spline(d, tails=["circular"] * 2)
    ones = spline(d[..., 1:-1], tails="linear"), spline(d[..., :-1], tails="circular")
    for a, b in zip(lists, ones, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-12)
        assert torch.allclose(a[1], b[1], atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_straight_spline_keeps_corners_and_goes_on(inverse):
    x, w, h, d = usual((50,), more=1, dtype=torch.float64)
    box = {"left": -1.0, "right": 3.0, "bottom": 10.0, "top": 11.0}
    spline = partial(straight_rational_quadratic_spline, **box)
    start, stop, low, high = (10.0, 11.0, -1.0, 3.0) if inverse else (-1.0, 3.0, 10.0, 11.0)
    x = torch.linspace(start, stop, 50, dtype=x.dtype)
    y, ladj = spline(x, w, h, d, inverse)
    assert torch.allclose(y[[0, -1]], torch.tensor([low, high], dtype=x.dtype))
    back, against = spline(y, w, h, d, not inverse)
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.allclose(ladj, -against, atol=1e-8)
    beyond = x + (stop - start) + 1e-9
    y, ladj = spline(beyond, w, h, d, inverse)
    slope = (high - low) / (stop - start)
    assert torch.allclose(y, low + (beyond - start) * slope)
    assert torch.allclose(ladj, torch.full_like(ladj, math.log(slope)))


USUAL = dict(zip("xwhd", usual((3,)), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(3, dtype=torch.int64)}, TypeError, "floating point"),
        ({"w": [1.0]}, TypeError, "must be tensors; got list"),
        ({"h": torch.zeros(3, 5)}, ValueError, "got 4 and 5, and slopes at 3 knots"),
        ({"d": torch.zeros(3, 4)}, ValueError, "K - 1 for linear tails, K for circular"),
        ({"w": torch.zeros(4, 4)}, ValueError, "must broadcast"),
        ({"tails": "round"}, ValueError, "tails must be 'linear' or 'circular'.*got 'round'"),
        ({"tails": None}, ValueError, "tails must be 'linear' or 'circular'.*got None"),
        ({"tails": ["linear", "round"]}, ValueError, "got .'linear', 'round'"),
        ({"tails": ["linear", "circular"]}, ValueError, "got 2 for inputs of shape"),
        ({"tail_bound": 0.0}, ValueError, "bound must be positive and finite; got 0"),
        ({"min_bin_width": 0.3}, ValueError, r"width of a bin .* got 0.3 for K = 4 bins"),
        ({"min_bin_height": -0.1}, ValueError, r"height of a bin .* got -0.1"),
        ({"min_derivative": 1.0}, ValueError, r"least slope must lie in \[0, 1\).*got 1.0"),
        ({"tails": 5}, ValueError, "tails must be 'linear' or 'circular'.*got 5"),
        ({"d": torch.zeros(3, 2), "tails": "circular"}, ValueError, "4 slopes.*got 2"),
        ({"tails": ["linear"]}, ValueError, "5 slopes.*got 3"),
        ({"d": torch.zeros(3, 5)}, ValueError, "3 slopes.*got 5"),
        ({"d": torch.zeros(()), "tails": "circular"}, ValueError, "4 slopes.*got 0"),
        ({"d": None, "tails": "circular"}, TypeError, "must be tensors; got .*NoneType"),
        ({"d": torch.zeros(4, 5), "tails": ["linear"]}, ValueError, "must broadcast"),
    ],
)
def test_the_unconstrained_spline_refuses(change, error, match):
    given = {**USUAL, **change}
    tensors = [given.pop(name) for name in "xwhd"]
    with pytest.raises(error, match=match):
        unconstrained_rational_quadratic_spline(*tensors, **given)


def test_a_list_of_tails_broadcasts_and_goes_with_a_number():
    x, w, h, d = usual((5, 2), more=1)
    spline = partial(unconstrained_rational_quadratic_spline, tails=["linear", "circular"])
    whole = spline(x, w, h, d[0, 0].expand_as(d))
    parts = spline(x, w, h, d[0, 0])
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    one, *params = usual((), more=1)
    made = unconstrained_rational_quadratic_spline(one, *params, tails=["linear"])
    few = *params[:2], params[2][1:-1]
    for a, b in zip(made, unconstrained_rational_quadratic_spline(one, *few), strict=True):
        assert a.shape == ()
        assert torch.allclose(a, b, atol=1e-6)


def test_a_tensor_of_bounds_that_are_no_bounds_explodes_nothing():
    bounds = torch.tensor([0.0, -1.0, math.inf, math.nan], requires_grad=True)
    x, *params = usual((9, 4))
    x[:3] = torch.tensor([[0.0], [1.0], [-1.0]])
    x.requires_grad_()
    y, ladj = unconstrained_rational_quadratic_spline(x, *params, tail_bound=bounds)
    assert torch.equal(y[:, :2], x[:, :2])  # no box: the identity
    assert not ladj[:, :2].any()
    assert bool(y[:, 2:].isnan().all())
    assert bool(ladj[:, 2:].isnan().all())
    for grad in torch.autograd.grad(y[:, :2].sum() + ladj[:, :2].sum(), [x, bounds]):
        assert bool(grad[..., :2].isfinite().all())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"right": 1e300}, r"size of the box must lie in \[1e-10, 1e\+10\].*got .*1e\+300"),
        ({"top": 1e-30}, "size of the box must lie in"),
        ({"right": 1e7, "top": 1e-7}, "1e-06 to 1e.06 times as high as wide; got 1e-14"),
    ],
)
def test_the_straight_spline_refuses_boxes_that_it_cannot_compute_with(change, match):
    with pytest.raises(ValueError, match=match):
        straight_rational_quadratic_spline(*usual((3,), more=1), **change)


def test_the_straight_spline_refuses_slopes_at_inner_knots_alone():
    with pytest.raises(ValueError, match=r"5 slopes.*got 3"):
        straight_rational_quadratic_spline(*usual((3,)), right=1000.0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("steep", [1e-6, 1e-3, 1e3, 1e6])
def test_the_straight_spline_is_finite_in_the_flattest_and_steepest_boxes(steep, inverse):
    x, *params = usual((200,), bins=8, more=1)
    x = 3 * x * (steep if inverse else 1.0)
    for scale in (1.0, 1e2, 1e30):
        leaves = [t.requires_grad_() for t in (x.detach(), *(scale * p for p in params))]
        outs = straight_rational_quadratic_spline(*leaves, inverse, top=steep)
        grads = torch.autograd.grad(sum(o.sum() for o in outs), leaves)
        assert all(bool(t.isfinite().all()) for t in (*outs, *grads))


def test_the_straight_spline_refuses_an_empty_box():
    with pytest.raises(ValueError, match=r"positive, finite width and height; got \[1.0, 1.0\]"):
        straight_rational_quadratic_spline(*usual((3,), more=1), left=1.0, right=1.0)


# -- the limit -------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("margin", [0.01, 0.25, 0.3, 4.0])
def test_the_limit_is_the_identity_within_the_inner_half_of_its_margin(margin, dtype):
    inside = torch.linspace(-margin / 2, 1 + margin / 2, 4001, dtype=dtype)
    exact = inside.double()  # a number beside a tensor of half precision would be rounded
    inside = inside[(exact >= -0.499 * margin) & (exact <= 1 + 0.499 * margin)]
    assert len(inside) > 3000
    for inverse in (False, True):
        y, ladj = limited(inside, margin, inverse=inverse)
        assert torch.equal(y, inside)
        assert not ladj.any()
        assert y.dtype == ladj.dtype == dtype


@ALL
@pytest.mark.parametrize("margin", [0.01, 0.25, 0.3, 4.0])
def test_the_limit_leaves_no_number_beyond_its_margin(margin, dtype):
    far = torch.tensor([1.2, 3.0, 1e3, 6e4, torch.finfo(dtype).max, math.inf], dtype=dtype)
    y, _ = limited(torch.cat((far, -far)), margin)
    most = torch.tensor(1 + margin, dtype=dtype)
    least = torch.tensor(-margin, dtype=dtype)
    assert (y <= most).all()
    assert (y >= least).all()
    torch.testing.assert_close(y[[5, 11]], torch.stack((most, least)))
    assert (y[:5].diff() >= 0).all()
    nan, ladj = limited(torch.tensor([torch.nan, 0.5], dtype=dtype), margin)
    assert nan.isnan().tolist() == ladj.isnan().tolist() == [True, False]


@pytest.mark.parametrize("ends", [{}, {"low": -2.0, "high": 3.0}], ids=str)
def test_the_inverse_of_the_limit_takes_back_what_it_did(ends):
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    y, ladj = limited(x, 0.25, **ends)
    back, other = limited(y, 0.25, **ends, inverse=True)
    assert torch.allclose(back, x, rtol=1e-11, atol=1e-11)
    assert torch.allclose(other, -ladj, rtol=1e-10, atol=1e-10)
    assert (y.diff() > 0).all()
    single, _ = limited(limited(x.float(), 0.25, **ends)[0], 0.25, **ends, inverse=True)
    assert (single - x).abs().max() < 1e-3


def test_the_determinant_of_the_limit_is_its_derivative():
    x = torch.linspace(-3, 4, 701, dtype=torch.float64, requires_grad=True)
    y, ladj = limited(x, 0.25)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope.log(), ladj)
    assert slope.max() == 1  # no distance grows
    z = y.detach().requires_grad_()
    u, ladj = limited(z, 0.25, inverse=True)
    (slope,) = torch.autograd.grad(u.sum(), z)
    assert torch.allclose(slope.log(), ladj)
    assert torch.autograd.gradcheck(lambda t: limited(t, 0.25, inverse=True)[1], z[150:-150])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_beyond_its_ends_the_limit_has_no_density_and_finite_numbers(dtype):
    x = torch.tensor([-1e30, -0.26, -0.25, 1.25, 1.26, math.inf], dtype=dtype, requires_grad=True)
    u, ladj = limited(x, 0.25, inverse=True)
    assert u.isfinite().all()
    assert ladj.isneginf().tolist() == [True, True, False, False, True, True]
    (grad,) = torch.autograd.grad(u.sum() + ladj[2:4].sum(), x)
    assert grad.isfinite().all()
    far = torch.tensor([1e38, -1e38, 1e20], dtype=dtype, requires_grad=True)
    y, ladj = limited(far, 0.25)
    (grad,) = torch.autograd.grad(y.sum() + ladj.sum(), far)
    assert grad.isfinite().all()
    assert ladj.isfinite().all()


def test_the_limit_compiles_as_a_whole():
    limit = torch.compile(limited, backend="eager", fullgraph=True)
    x = torch.linspace(-3, 4, 50)
    for inverse in (False, True):
        for mine, its in zip(
            limit(x, 0.25, inverse=inverse), limited(x, 0.25, inverse=inverse), strict=True
        ):
            assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("margin", "error", "match"),
    [
        (0.0, ValueError, "positive and finite; got 0"),
        (-1, ValueError, "positive and finite; got -1"),
        (math.nan, ValueError, "positive and finite; got nan"),
        (math.inf, ValueError, "positive and finite; got inf"),
        (1e300, ValueError, r"must lie in \[1e-10, 1e\+10\].*; got 1e\+300"),
        (1e-300, ValueError, r"must lie in \[1e-10, 1e\+10\].*; got 1e-300"),
        ("wide", TypeError, "must be a number; got str"),
        (True, TypeError, "must be a number; got bool"),
        (None, TypeError, "must be a number; got NoneType"),
    ],
)
def test_a_margin_is_a_positive_number(margin, error, match):
    with pytest.raises(error, match=match):
        limited(torch.zeros(2), margin)


def test_the_limit_is_for_floating_point_tensors():
    with pytest.raises(TypeError, match="floating"):
        limited(torch.zeros(2, dtype=torch.long), 0.25)


def test_the_limit_is_of_an_interval():
    with pytest.raises(ValueError, match="low must be less than high; got 1 and 0"):
        limited(torch.zeros(2), 0.25, low=1, high=0)
    with pytest.raises(ValueError, match=r"at most 1e\+10, .*; got 0 and 1e\+39"):
        limited(torch.zeros(2), 0.25, low=0, high=1e39)
    with pytest.raises(TypeError, match="low and high must be numbers; got str and str"):
        limited(torch.zeros(2), 0.25, low="a", high="b")
