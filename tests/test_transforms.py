r"""One table of univariate transforms; every law is run on every row, in both precisions."""

import copy
import functools
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Transform
from torch.func import grad, jacfwd, jacrev, vmap

from flowguard.transforms import (
    AdditiveTransform,
    AffineTransform,
    CubicBSplineTransform,
    ReparametrizedAffineTransform,
    RobustSpline,
    Univariate,
)

NOT_AT_ZERO = ("affine", "reparametrized", "b-spline")  # not the identity for zero parameters
UNBOUNDED = ("affine", "reparametrized", "additive", "free", "published", "b-spline")

# name: constructor, shapes of its parameters
TABLE: dict[str, tuple[Callable[..., Univariate], list[tuple[int, ...]]]] = {
    **{f"spline-{k}": (RobustSpline, RobustSpline.shapes(k)) for k in (2, 3, 8, 16)},
    "published": (
        functools.partial(RobustSpline, slope=None, shift_bound=None),
        RobustSpline.shapes(2),
    ),
    "published-8": (functools.partial(RobustSpline, slope=None), RobustSpline.shapes(8)),
    "unshifted": (RobustSpline, RobustSpline.shapes(8)[:3]),
    "tight": (functools.partial(RobustSpline, shift_bound=0.5), RobustSpline.shapes(4)),
    "free": (functools.partial(RobustSpline, shift_bound=None), RobustSpline.shapes(4)),
    "stiff": (functools.partial(RobustSpline, slope=0.3, bound=2.0), RobustSpline.shapes(5)),
    "affine": (AffineTransform, [(), ()]),
    "reparametrized": (ReparametrizedAffineTransform, [(), ()]),
    "additive": (AdditiveTransform, [()]),
    "additive-bounded": (functools.partial(AdditiveTransform, shift_bound=2.0), [()]),
    "b-spline": (CubicBSplineTransform, CubicBSplineTransform.shapes()),
}
# Rounding of values near 5, grown by the slopes that unit-normal parameters give (below 100).
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}
# A logarithm of a slope also changes with the rounding of the value, up to 1e3 per unit.
LADJ_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-11}

ZEROS = torch.zeros(7)

ROWS = pytest.mark.parametrize("name", TABLE)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def parameters(name, shape, dtype=torch.float64, scale=1.0):
    return [scale * torch.randn((*shape, *s), dtype=dtype) for s in TABLE[name][1]]


def build(name, shape, dtype=torch.float64, scale=1.0, **kwargs):
    return TABLE[name][0](*parameters(name, shape, dtype, scale), **kwargs)


def inputs(shape, dtype=torch.float64):
    return 2.5 * torch.randn(shape, dtype=dtype)


@DTYPES
@ROWS
def test_round_trip(name, dtype):
    # The published slopes have no bound, so that its way back loses digits early.
    f = build(name, (4000,), dtype, scale=0.3 if name.startswith("published") else 1.0)
    x = inputs((4000,), dtype)
    for g in (f, f.inv):
        y = g(x)
        torch.testing.assert_close(g.inv(y), x, rtol=0, atol=TOLERANCE[dtype])
        assert y.dtype == dtype


@DTYPES
@ROWS
def test_ladj_is_that_of_autograd_in_both_directions(name, dtype):
    f = build(name, (4000,), dtype)
    for g in (f, f.inv):
        x = inputs((4000,), dtype).requires_grad_()
        y, ladj = g.call_and_ladj(x)
        (slope,) = torch.autograd.grad(y.sum(), x)

        assert (slope > 0).all()
        torch.testing.assert_close(ladj, slope.log(), rtol=0, atol=LADJ_TOLERANCE[dtype])
        torch.testing.assert_close(
            g.log_abs_det_jacobian(x, y), ladj, rtol=0, atol=LADJ_TOLERANCE[dtype]
        )
        assert torch.equal(g(x), y)


@ROWS
def test_elements_do_not_mix(name):
    f = build(name, (6,))
    jacobian = jacrev(f)(inputs((6,)))
    assert torch.equal(jacobian, jacobian.diag().diag())


@ROWS
def test_increasing(name):
    f = build(name, (50, 1))
    x = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    assert (f(x).diff() > 0).all()
    assert (f.inv(x).diff() > 0).all()


@DTYPES
@ROWS
def test_identity_for_zero_parameters(name, dtype):
    if name in NOT_AT_ZERO:
        pytest.skip("not by definition")
    f, x = build(name, (1000,), dtype, scale=0.0), inputs((1000,), dtype)
    for g in (f, f.inv):
        y, ladj = g.call_and_ladj(x)
        assert torch.equal(y, x)
        assert torch.equal(ladj, torch.zeros_like(x))


@ROWS
def test_gradients_twice(name):
    f, params, x = TABLE[name][0], parameters(name, (4,)), inputs((4,))
    if name == "b-spline":
        pytest.skip("has tests of its own")
    args = tuple(a.requires_grad_() for a in (x, *params))
    for direction in ("call_and_ladj", "inverse_and_ladj", "_call", "_inverse"):

        def call(x, *params, direction=direction):
            return getattr(f(*params), direction)(x)

        assert gradcheck(call, args, fast_mode=name != "spline-3")
        assert gradgradcheck(call, args, rtol=1e-2, atol=1e-4, fast_mode=True)


@ROWS
def test_transforms_of_functions(name):
    f, params, x = TABLE[name][0], parameters(name, (5,)), inputs((5,))

    def call(x, *params):
        return f(*params).call_and_ladj(x)

    y, ladj = call(x, *params)
    for one, other in zip(vmap(call)(x, *params), (y, ladj), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)

    slope = vmap(grad(lambda *args: call(*args)[0]))(x, *params)
    torch.testing.assert_close(slope.log(), ladj, rtol=0, atol=1e-11)
    if name != "b-spline":
        for function in (lambda x: call(x, *params), f(*params), f(*params).inv):
            backward, forward = (jac(function)(x) for jac in (jacrev, jacfwd))
            torch.testing.assert_close(forward, backward)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4, 2), (0,), (2, 0, 3)])
@ROWS
def test_shapes(name, shape):
    params, x = parameters(name, shape), inputs(shape)
    y, ladj = TABLE[name][0](*params).call_and_ladj(x)
    assert y.shape == ladj.shape == shape

    flat = [p.reshape(-1, *s) for p, s in zip(params, TABLE[name][1], strict=True)]
    again = TABLE[name][0](*flat)(x.reshape(-1)).reshape(shape)
    torch.testing.assert_close(again, y, rtol=0, atol=1e-13)


@ROWS
def test_broadcasting(name):
    x = inputs((2, 3))
    params = parameters(name, (3,))
    wide = [p.expand(2, *p.shape).contiguous() for p in params]
    out = TABLE[name][0](*params).call_and_ladj(x)
    for one, other in zip(out, TABLE[name][0](*wide).call_and_ladj(x), strict=True):
        assert one.shape == other.shape == (2, 3)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)

    leaf = [p.requires_grad_() for p in params]
    TABLE[name][0](*leaf)(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in leaf)


@ROWS
def test_layout_of_memory_does_not_matter(name):
    x, params = inputs((3, 4, 5)), parameters(name, (3, 4, 5))
    y = TABLE[name][0](*params)(x)
    turned = [p.transpose(0, 2).contiguous().transpose(0, 2) for p in params]
    z = TABLE[name][0](*turned)(x.transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(z, y, rtol=0, atol=1e-13)


# The other splines differ in numbers only, and tracing them takes long.
@pytest.mark.parametrize(
    "name", [n for n in TABLE if n not in ("spline-16", "spline-8", "stiff", "free", "tight")]
)
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()

    def call(x, *params):
        f = TABLE[name][0](*params)
        y, ladj = f.call_and_ladj(x)
        return y, ladj, *f.inverse_and_ladj(x)

    # With gradients, two calls in one graph are two functions that have numbers in common.
    params, x = [p.requires_grad_() for p in parameters(name, (7,))], inputs((7,))
    for p in params:  # numbers of bins are known: the backward cannot ask for strides that are not
        if p.dim() > 1:
            torch._dynamo.mark_static(p, p.dim() - 1)
    outs = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)(x, *params)
    others = call(x, *params)
    for out, expected in zip(outs, others, strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grads, expected = (
        torch.autograd.grad(sum(o.sum() for o in t), params) for t in (outs, others)
    )
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-9)


@ROWS
def test_export(name):
    class Module(torch.nn.Module):
        def forward(self, x, params):
            return TABLE[name][0](*params).call_and_ladj(x)

    params, x = parameters(name, (7,)), inputs((7,))
    program = torch.export.export(Module(), (x, params))
    for out, expected in zip(program.module()(x, params), Module()(x, params), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@ROWS
def test_pickling_and_copies(name):
    f, x = build(name, (5,)), inputs((5,))
    _ = f.inv
    for g in (
        pickle.loads(pickle.dumps(f)),
        copy.deepcopy(f),
        pickle.loads(pickle.dumps(f.inv)).inv,
    ):
        assert torch.equal(g(x), f(x))
        assert torch.equal(g.inv(x), f.inv(x))
        assert g.inv.inv is g


@ROWS
def test_inverse_bound(name):
    f = build(name, (2000,), scale=1e3)
    bound = f.inverse_bound(3.0)
    assert math.isinf(bound) == (name in UNBOUNDED)
    y = torch.empty(2000, dtype=torch.float64).uniform_(-3, 3)
    assert (f.inv(y).abs() <= bound).all()
    with pytest.raises(ValueError, match="radius"):
        f.inverse_bound(-1.0)


@ROWS
def test_is_a_transform_of_torch(name):
    f = build(name, (5,))
    assert isinstance(f, Transform)
    assert f.bijective
    assert f.sign == 1
    assert f.inv is f.inv
    assert f.inv.inv is f
    assert f.with_cache(0) is f
    with pytest.raises(ValueError, match="cache_size"):
        f.with_cache(2)

    for cached in (f.with_cache(), build(name, (5,), cache_size=1)):
        x = inputs((5,))
        y = cached(x)
        assert cached(x) is y
        assert cached.inv(y) is x
        assert cached.inv(cached(x)) is x


@ROWS
def test_as_part_of_a_distribution(name):
    base = torch.distributions.Normal(torch.zeros(5, dtype=torch.float64), 1.0)
    f = build(name, (5,))
    d = torch.distributions.TransformedDistribution(base, [f.inv])
    x = inputs((5,))
    z, ladj = f.call_and_ladj(x)
    torch.testing.assert_close(d.log_prob(x), base.log_prob(z) + ladj)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@ROWS
def test_half_precision(name, dtype):
    if name == "b-spline" or "affine" in name or name == "reparametrized":
        pytest.skip("maps other than the spline compute in the dtype that they are given")
    x, params = inputs((200,), dtype), parameters(name, (200,), dtype)
    f, single = (TABLE[name][0](*p) for p in (params, [p.float() for p in params]))
    for half, full in ((f, single), (f.inv, single.inv)):
        out, expected = half.call_and_ladj(x), full.call_and_ladj(x.float())
        for one, other in zip((*out, half(x)), (*expected, full(x.float())), strict=True):
            assert one.dtype == dtype
            assert other.isfinite().all()
            if isinstance(f, RobustSpline):  # which is computed in single precision
                assert torch.equal(one, other.to(dtype))
            else:
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(one.float(), other, rtol=eps, atol=8 * eps)


def test_autocast_leaves_the_maths_alone():
    f, x = build("spline-8", (50,), torch.float32), inputs((50,), torch.float32)
    y, ladj = f.call_and_ladj(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, other = f.call_and_ladj(x)
    assert torch.equal(y, z)
    assert torch.equal(ladj, other)


@pytest.mark.parametrize("shift_bound", [0.1, 1 / 3, 1.0, 5.0, 7.3, 1e-5, 1e10])
@DTYPES
def test_a_bounded_shift_never_exceeds_its_bound(dtype, shift_bound):
    z = torch.zeros(20_000, 1, dtype=dtype)
    shift = torch.full((20_000,), -math.inf, dtype=dtype)
    f = RobustSpline(z, z, z, shift, bound=1.0, shift_bound=shift_bound)
    y = torch.rand(20_000, dtype=dtype) * 20
    limit = torch.maximum(y + torch.tensor(shift_bound, dtype=dtype), torch.tensor(1.0).to(dtype))
    assert (f.inv(y) <= limit).all()
    assert (f.shift.abs() <= torch.tensor(shift_bound, dtype=dtype)).all()


def test_largest_numbers_keep_their_shift():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        big = torch.finfo(dtype).max
        x = torch.tensor([big, -big], dtype=dtype)
        zeros = torch.zeros(2, 7, dtype=dtype)
        shift = torch.tensor([math.inf, -math.inf], dtype=dtype)
        f = RobustSpline(zeros, zeros, zeros, shift)
        assert f(x).isfinite().all()
        assert f.inv(x).isfinite().all()


@pytest.mark.parametrize("bins", [2, 8])
def test_a_spline_as_made_comes_back_in_float32_from_where_it_is_flat(bins):
    generator = torch.Generator().manual_seed(0)
    params = [30 * torch.randn(4096, *s, generator=generator) for s in RobustSpline.shapes(bins)]
    x = 2 * torch.randn(4096, generator=generator)
    f = RobustSpline(*params)
    # A few roundings of numbers up to ten, grown by one over the least slope; a slope of 1e-3 lost
    # 2e-4 with two bins, 4e-4 and more with eight.
    assert (f.inv(f(x)) - x).abs().max() <= 1.5e-4


def test_repr():
    f = build("spline-8", ())
    assert repr(f) == "RobustSpline(bins=8)"


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: RobustSpline.shapes(1), ValueError, "at least 2"),
        (lambda: RobustSpline(*torch.zeros(3, 2, 0)), ValueError, "K - 1"),
        (
            lambda: RobustSpline(torch.zeros(7), torch.zeros(7), torch.zeros(8)),
            ValueError,
            "got 7, 7 and 8",
        ),
        (lambda: RobustSpline(ZEROS, ZEROS, ZEROS, bound=-1.0), ValueError, "bound"),
        (lambda: RobustSpline(ZEROS, ZEROS, ZEROS, slope=0.6), ValueError, "slope"),
        (
            lambda: RobustSpline(ZEROS, ZEROS, ZEROS, ZEROS, shift_bound=0.0),
            ValueError,
            "must be positive",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("given", [[1.0], None, 1.0], ids=["list", "none", "number"])
def test_what_is_no_tensor_is_named(given):
    params = [torch.zeros(4, 7)] * 3
    told = rf"; got .*{type(given).__name__}"
    with pytest.raises(TypeError, match=told):
        RobustSpline(given, *params[1:], torch.zeros(4))
    with pytest.raises(TypeError, match=told):
        RobustSpline(*params, torch.zeros(4))(given)


def zeros(*shape, device="cpu"):
    return [torch.zeros(*shape, device=device) for _ in range(3)]


@pytest.mark.parametrize(
    ("call", "kind", "answer"),
    [
        (
            lambda: RobustSpline(*np.zeros((3, 2, 7))),
            TypeError,
            r"got ndarray, .*torch\.as_tensor",
        ),
        (
            lambda: RobustSpline(*zeros(2, 7))(np.zeros(2)),
            TypeError,
            r"got ndarray: torch\.as_tensor",
        ),
        (
            lambda: RobustSpline(*zeros(2, 7))(torch.arange(2)),
            TypeError,
            r"int64: call \.float\(\)",
        ),
        (
            lambda: RobustSpline(*zeros(2, 7))(torch.zeros(2, device="meta")),
            ValueError,
            "must be on one device; got meta and cpu: move one of them",
        ),
        (
            lambda: RobustSpline(*zeros(2, 7, device="meta")).inv(torch.zeros(2)),
            ValueError,
            "must be on one device; got cpu and meta",
        ),
    ],
)
def test_an_ordinary_mistake_is_answered_by_the_rule(call, kind, answer):
    with pytest.raises(kind, match=answer):
        call()
