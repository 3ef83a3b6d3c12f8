r"""Laws and golden numbers of the cubic B-spline."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck
from torch.torch_version import TorchVersion

from flowguard.spline.cubic import cubic_b_spline

GOLDEN = Path(__file__).parents[1] / "golden"
DIRECTIONS = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
PRECISE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SCALES = pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e4, math.inf])

# The slope lies in [0.03, 100], so rounding grows by up to 33 on the way back.
ROUND_TRIP = {torch.float32: 2e-5, torch.float64: 4e-14}


def parameters(shape, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, gaps, controls = 0.4 * draw(*shape), scale * draw(*shape, 4), scale * draw(*shape, 6)

    return x.to(dtype), gaps.to(dtype), controls.to(dtype)


def test_golden_forward():
    g = load_file(GOLDEN / "bspline.safetensors")
    y, ladj = cubic_b_spline(g["x"], g["gaps"], g["controls"])

    torch.testing.assert_close(y, g["fwd_out"], rtol=0, atol=1e-13)
    torch.testing.assert_close(ladj, g["fwd_ladj"], rtol=0, atol=1e-12)


def test_golden_inverse():
    g = load_file(GOLDEN / "bspline.safetensors")
    y, ladj = cubic_b_spline(g["y"], g["gaps"], g["controls"], inverse=True)

    # The published inverse is off by this much: its own forward map misses g["y"] by 4e-8 ...
    torch.testing.assert_close(y, g["inv_out"], rtol=0, atol=5e-9)
    torch.testing.assert_close(ladj, g["inv_ladj"], rtol=0, atol=2e-6)

    # ... hence the sharp tests: the forward map of ours, and the way back from its golden.
    z, back = cubic_b_spline(y, g["gaps"], g["controls"])
    torch.testing.assert_close(z, g["y"], rtol=0, atol=1e-13)
    torch.testing.assert_close(back, -ladj, rtol=0, atol=1e-12)

    x, ladj = cubic_b_spline(g["fwd_out"], g["gaps"], g["controls"], inverse=True)
    torch.testing.assert_close(x, g["x"], rtol=0, atol=1e-13)
    torch.testing.assert_close(ladj, -g["fwd_ladj"], rtol=0, atol=1e-11)


@DIRECTIONS
def test_golden_float32(inverse):
    g = load_file(GOLDEN / "bspline.safetensors")
    x, out, ladj = ("y", "inv_out", "inv_ladj") if inverse else ("x", "fwd_out", "fwd_ladj")
    arguments = (g[k].float() for k in (x, "gaps", "controls"))
    y, log_slope = cubic_b_spline(*arguments, inverse=inverse)

    torch.testing.assert_close(y.double(), g[out], rtol=0, atol=1e-5)
    torch.testing.assert_close(log_slope.double(), g[ladj], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("prefix", "dtype"), [("", torch.float64), ("f32_", torch.float32)])
def test_golden_coupling(prefix, dtype):
    g = load_file(GOLDEN / "coupling_bspline.safetensors")

    def invert(y, raw):
        raw = raw.unflatten(1, (-1, 11)).movedim(2, -1).to(y)
        gaps, controls, shift = raw[..., :4], raw[..., 4:10], raw[..., 10]
        return cubic_b_spline(y - shift, gaps, controls, inverse=True)

    y = g["y"].to(dtype)
    second, ladj_second = invert(y[:, 6:], g["self_raw"])
    x, ladj = invert(torch.cat([y[:, :6], second], dim=1), g["features_raw"])
    ladj = ladj.sum(dim=(1, 2, 3)) + ladj_second.sum(dim=(1, 2, 3))

    # In float32, against float64: the published float32 numbers are worse than ours.
    torch.testing.assert_close(x.double(), g["rev"], rtol=0, atol=1e-5 if prefix else 1e-9)
    torch.testing.assert_close(ladj.double(), g["rev_ladj"], rtol=0, atol=1e-3 if prefix else 1e-7)


@PRECISE
@SCALES
@DIRECTIONS
def test_round_trip(inverse, scale, dtype):
    x, gaps, controls = parameters((20000,), dtype, scale)
    y, ladj = cubic_b_spline(x, gaps, controls, inverse=inverse)
    z, back = cubic_b_spline(y, gaps, controls, inverse=not inverse)

    torch.testing.assert_close(z, x, rtol=0, atol=ROUND_TRIP[dtype])
    assert ladj.abs().max() <= math.log(100)
    # The log-slope changes by up to 1e4 per unit of x within the narrowest bins.
    torch.testing.assert_close(back, -ladj, rtol=0, atol=1e4 * ROUND_TRIP[dtype])


@DIRECTIONS
def test_ladj_is_log_derivative(inverse):
    x, gaps, controls = parameters((1000,))
    x.requires_grad_()
    y, ladj = cubic_b_spline(x, gaps, controls, inverse=inverse)
    (slope,) = torch.autograd.grad(y.sum(), x)

    torch.testing.assert_close(slope.log(), ladj, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bound", [0.5, 3.0])
@DIRECTIONS
def test_gradients(inverse, bound):
    x, gaps, controls = (v.requires_grad_() for v in parameters((5,)))

    def f(x, gaps, controls):
        return cubic_b_spline(2 * bound * x, gaps, controls, bound=bound, inverse=inverse)

    assert gradcheck(f, (x, gaps, controls), check_forward_ad=True)
    assert gradgradcheck(f, (x, gaps, controls))


@SCALES
@DIRECTIONS
def test_monotone_and_meets_identity(inverse, scale):
    _, gaps, controls = parameters((20, 1), scale=scale)
    x = torch.linspace(-0.6, 0.6, 12001, dtype=torch.float64)
    y, ladj = cubic_b_spline(x, gaps, controls, inverse=inverse)

    slope = y.diff(dim=-1) / x.diff()
    assert (slope > 0.0099).all()
    assert (slope < 100).all()

    outer = x.abs() >= 0.5
    assert torch.equal(y[:, outer], x[outer].expand(20, -1))
    assert (ladj[:, outer] == 0).all()


@PRECISE
@SCALES
@DIRECTIONS
def test_junction_is_smooth(inverse, scale, dtype):
    _, gaps, controls = parameters((100, 1), dtype, scale)
    end = torch.tensor([-0.5, 0.5], dtype=dtype)
    inside = end.nextafter(torch.zeros_like(end))
    y, ladj = cubic_b_spline(inside, gaps, controls, inverse=inverse)

    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, end.expand(100, -1), rtol=0, atol=4 * eps)
    # The slope's own slope is at most 2e4 (2 * 100 over a bin of 0.01).
    torch.testing.assert_close(ladj, torch.zeros_like(ladj), rtol=0, atol=2e4 * 4 * eps)


@DIRECTIONS
def test_bound_scales_the_box(inverse):
    x, gaps, controls = parameters((1000,))
    y, ladj = cubic_b_spline(x, gaps, controls, inverse=inverse)
    z, log_slope = cubic_b_spline(6 * x, gaps, controls, bound=3.0, inverse=inverse)

    torch.testing.assert_close(z, 6 * y, rtol=0, atol=1e-13)
    torch.testing.assert_close(log_slope, ladj, rtol=0, atol=1e-11)


def test_zero_parameters_are_not_the_identity():
    x = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64)
    y, _ = cubic_b_spline(x, x.new_zeros(4), x.new_zeros(6))

    assert 0.0700 < (y - x).abs().max() < 0.0706


def test_other_number_of_bins():
    x, gaps, controls = parameters((1000,))
    gaps, controls = torch.cat([gaps, gaps], -1), torch.cat([gaps, controls], -1)
    y, _ = cubic_b_spline(x, gaps, controls)
    z, _ = cubic_b_spline(y, gaps, controls, inverse=True)

    torch.testing.assert_close(z, x, rtol=0, atol=ROUND_TRIP[torch.float64])


@pytest.mark.parametrize(
    ("x", "gaps", "controls", "shape"),
    [
        ((), (), (), ()),
        ((3,), (), (), (3,)),
        ((), (3,), (2, 1), (2, 3)),
        ((2, 3), (3,), (2, 1), (2, 3)),
        ((2, 3, 4), (2, 3, 4), (2, 3, 4), (2, 3, 4)),
        ((2, 3, 4, 5), (2, 1, 4, 1), (5,), (2, 3, 4, 5)),
        ((1, 5), (0, 1), (), (0, 5)),
        ((0,), (), (), (0,)),
    ],
)
@DIRECTIONS
def test_broadcasting(inverse, x, gaps, controls, shape):
    x, _, _ = parameters(x, seed=1)
    _, gaps, _ = parameters(gaps, seed=2)
    _, _, controls = parameters(controls, seed=3)
    y, ladj = cubic_b_spline(x, gaps, controls, inverse=inverse)
    full = cubic_b_spline(
        x.expand(shape).contiguous(),
        gaps.expand(*shape, 4).contiguous(),
        controls.expand(*shape, 6).contiguous(),
        inverse=inverse,
    )

    assert y.shape == ladj.shape == shape
    assert torch.equal(y, full[0])
    assert torch.equal(ladj, full[1])


@DIRECTIONS
def test_layout_does_not_matter(inverse):
    x, gaps, controls = parameters((6, 8))
    dense = cubic_b_spline(x, gaps, controls, inverse=inverse)
    strided = cubic_b_spline(
        x.t().contiguous().t(),
        gaps.movedim(-1, 0).contiguous().movedim(0, -1),
        controls.repeat_interleave(2, dim=-1)[..., ::2],
        inverse=inverse,
    )

    for a, b in zip(dense, strided, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@DIRECTIONS
def test_half_precision_is_rounded_float32(inverse, dtype):
    x, gaps, controls = parameters((1000,), dtype)
    half = cubic_b_spline(x, gaps, controls, inverse=inverse)
    single = cubic_b_spline(x.float(), gaps.float(), controls.float(), inverse=inverse)

    for a, b in zip(half, single, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


def test_dtypes_promote():
    x, gaps, controls = parameters((3,), torch.float32)
    y, ladj = cubic_b_spline(x, gaps.double(), controls.bfloat16())

    assert y.dtype == ladj.dtype == torch.float64


def test_autocast_changes_nothing():
    x, gaps, controls = parameters((1000,), torch.float32)
    plain = cubic_b_spline(x, gaps, controls, inverse=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cubic_b_spline(x, gaps, controls, inverse=True)

    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@SCALES
@DIRECTIONS
def test_finite_whatever_the_parameters(inverse, scale, dtype):
    x, gaps, controls = parameters((20000,), dtype, scale)
    limit = torch.finfo(dtype).max
    x[:6] = torch.tensor([limit, -limit, 0.5, -0.5, 0.0, -0.0], dtype=dtype)
    leaves = [v.requires_grad_() for v in (x, gaps, controls)]
    y, ladj = cubic_b_spline(*leaves, inverse=inverse)

    assert y.isfinite().all()
    assert ladj.isfinite().all()
    for cotangent in (y, ladj):
        grads = torch.autograd.grad(cotangent, leaves, torch.ones_like(y), retain_graph=True)
        assert all(g.isfinite().all() for g in grads)


@DIRECTIONS
def test_infinite_logits_are_limits(inverse):
    x, gaps, controls = parameters((100,))
    large, infinite = gaps.clone(), gaps.clone()
    large[:, 1:3], infinite[:, 1:3] = 1e3, math.inf
    large[:, 0], infinite[:, 0] = -1e3, -math.inf
    limit = cubic_b_spline(x, infinite, controls, inverse=inverse)

    for a, b in zip(limit, cubic_b_spline(x, large, controls, inverse=inverse), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", [0, 1, 2], ids=["x", "gaps", "controls"])
@pytest.mark.parametrize("value", [0.1, 0.7], ids=["inside", "outside"])
@DIRECTIONS
def test_nan_stays_in_its_element(inverse, value, where):
    arguments = list(parameters((10,)))
    arguments[0][3] = value
    clean = cubic_b_spline(*arguments, inverse=inverse)
    arguments[where].view(10, -1)[3, -1] = math.nan
    leaves = [v.requires_grad_() for v in arguments]
    y, ladj = cubic_b_spline(*leaves, inverse=inverse)

    others = torch.arange(10) != 3
    assert y[3].isnan()
    assert torch.equal(y[others], clean[0][others])
    assert torch.equal(ladj[others], clean[1][others])
    for grad in torch.autograd.grad((y.sum(), ladj.sum()), leaves):
        assert grad[others].isfinite().all()


@given(
    values=arrays("float32", (12,), elements=st.floats(width=32, allow_nan=False)),
    x=st.floats(-0.75, 0.75, width=32),
    inverse=st.booleans(),
)
def test_torture(values, x, inverse):
    leaves = [torch.tensor(v, requires_grad=True) for v in (x, values[:4], values[6:])]
    y, ladj = cubic_b_spline(*leaves, inverse=inverse)
    z, _ = cubic_b_spline(y, *leaves[1:], inverse=not inverse)
    grads = torch.autograd.grad(y + ladj, leaves)

    assert abs(z.item() - x) <= ROUND_TRIP[torch.float32]
    assert abs(ladj.item()) <= math.log(100)
    assert all(g.isfinite().all() for g in grads)


@DIRECTIONS
def test_compile(inverse):
    if TorchVersion(torch.__version__) < "2.7":
        pytest.skip("making C++ of this backward, torch 2.6 ends in an assertion of its own")
    arguments = [v.requires_grad_() for v in parameters((100,), torch.float32)]

    def f(x, gaps, controls):
        return cubic_b_spline(x, gaps, controls, inverse=inverse)

    eager, compiled = f(*arguments), torch.compile(f, fullgraph=True)(*arguments)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    grads = (torch.autograd.grad(y.sum() + ladj.sum(), arguments) for y, ladj in (eager, compiled))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@DIRECTIONS
def test_vmap_and_jacrev(inverse):
    x, gaps, controls = parameters((50,))

    def f(x, gaps, controls):
        return cubic_b_spline(x, gaps, controls, inverse=inverse)

    y, ladj = torch.vmap(f)(x, gaps, controls)
    (slope, _) = torch.vmap(torch.func.jacrev(f))(x, gaps, controls)

    assert torch.equal(y, f(x, gaps, controls)[0])
    torch.testing.assert_close(slope.log(), ladj, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("gaps", "controls", "bound", "dtype", "error", "match"),
    [
        (4, 5, 0.5, torch.float32, ValueError, r"\(\*, M \+ 2\).*got \(4,\) and \(5,\)"),
        (0, 2, 0.5, torch.float32, ValueError, "M >= 1"),
        (96, 98, 0.5, torch.float32, ValueError, "at most 95 knot gaps.*got 96"),
        (4, 6, 0.0, torch.float32, ValueError, "bound must be positive.*got bound=0.0"),
        (4, 6, math.inf, torch.float32, ValueError, "finite.*got bound=inf"),
        (4, 6, 0.5, torch.int64, TypeError, "x must be a floating point tensor; got torch.int64"),
    ],
)
def test_errors(gaps, controls, bound, dtype, error, match):
    with pytest.raises(error, match=match):
        cubic_b_spline(
            torch.zeros(3, dtype=dtype), torch.zeros(gaps), torch.zeros(controls), bound=bound
        )


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [1.0, 3.0])
def test_nothing_leaves_the_box(bound, dtype, inverse):
    torch.manual_seed(0)
    edge = torch.tensor(bound, dtype=dtype).nextafter(torch.zeros((), dtype=dtype))
    for scale in (1, 10, 100, 1e30):
        gaps, controls = scale * torch.randn(20000, 4), scale * torch.randn(20000, 6)
        for x in (edge, -edge):
            y, _ = cubic_b_spline(
                x.expand(20000), gaps.to(dtype), controls.to(dtype), bound=bound, inverse=inverse
            )
            assert y.abs().max() <= bound
