r"""The usual parameterisation: both kernels agree, all derivatives are there, nothing is infinite."""

import math
import warnings

import pytest
import torch

from flowguard.functional import kernels, softmax_spline
from flowguard.spline.inplace import pieces

BOUND = 3.0
KINDS = {
    "slopes of one at the ends": (-1, {}),
    "slopes of their own at the ends": (1, {}),
    "other minima and a gain": (1, {"least": (0.01, 0.02, 0.1), "gain": 0.7}),
    "clipped": (-1, {"least": (0.0, 0.0, 0.0), "clip": -math.log(1e-3)}),
}
KIND = pytest.mark.parametrize("kind", KINDS)
INVERSE = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def draw(n, bins, kind, scale=1.0, dtype=torch.float64):
    r"""Inputs, at the ends of the box too, and parameters; infinite ones for an infinite scale."""
    more, _ = KINDS[kind]
    x = torch.randn(n, dtype=torch.float64) * 2
    x[:4] = torch.tensor([-BOUND, BOUND, 1e30, -1e30])
    params = [torch.randn(n, size, dtype=torch.float64) for size in (bins, bins, bins + more)]
    if math.isinf(scale):
        params = [torch.where(p.abs() < 0.4, p, p.sign() * math.inf) for p in params]
    else:
        params = [p * scale for p in params]
    return [t.to(dtype) for t in (x, *params)]


def run(tensors, kind, inverse):
    _, options = KINDS[kind]
    return softmax_spline(*tensors, bound=BOUND, inverse=inverse, **options)


def with_gradients(tensors, kind, inverse):
    leaves = [t.clone().requires_grad_() for t in tensors]
    outs = run(leaves, kind, inverse)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outs]
    return *(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, cotangents)


@KIND
@INVERSE
@pytest.mark.parametrize("bins", [1, 2, 8])
def test_both_ways_agree(bins, inverse, kind):
    torch.manual_seed(0)
    tensors = draw(300, bins, kind)
    fast = with_gradients(tensors, kind, inverse)
    with kernels("traced"):
        slow = with_gradients(tensors, kind, inverse)
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@KIND
@INVERSE
def test_derivatives_of_both_orders_and_both_directions(inverse, kind):
    torch.manual_seed(0)
    x, *params = draw(12, 3, kind)
    tensors = [t[4:].requires_grad_() for t in (x, *params)]

    def function(*tensors):
        return run(tensors, kind, inverse)

    assert torch.autograd.gradcheck(
        function, tensors, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(
        function, [t[:3].detach().requires_grad_() for t in tensors]
    )


@KIND
@INVERSE
@pytest.mark.parametrize("scale", [1e2, 1e4, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["eager", "traced"])
def test_finite_for_everything(which, dtype, scale, inverse, kind):
    torch.manual_seed(0)
    x, *params = draw(300, 8, kind, scale, dtype)
    x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    with kernels(which):
        made = with_gradients((x, *params), kind, inverse)
    assert all(t.isfinite().all() for t in made)


@KIND
@INVERSE
@pytest.mark.parametrize("which", ["eager", "traced"])
def test_nan_stays_in_its_element(which, inverse, kind):
    torch.manual_seed(0)
    tensors = draw(40, 4, kind)
    with kernels(which):
        before = with_gradients(tensors, kind, inverse)
        for at, spoilt in enumerate(tensors, 10):
            spoilt.view(len(spoilt), -1)[at, -1] = math.nan
        after = with_gradients(tensors, kind, inverse)
    assert after[0][10:14].isnan().all()
    assert after[1][10:14].isnan().all()
    rest = [*range(10), *range(14, 40)]
    assert all(torch.equal(a[rest], b[rest]) for a, b in zip(before, after, strict=True))


@KIND
def test_the_inverse_undoes_it_at_the_ends_of_the_box_too(kind):
    torch.manual_seed(0)
    x, *params = draw(300, 8, kind)
    y, ladj = run((x, *params), kind, False)
    back, against = run((y, *params), kind, True)
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.allclose(ladj, -against, atol=1e-7)
    assert torch.equal(y[2:4], x[2:4])
    assert (y[:2].abs() <= BOUND).all()


@KIND
@INVERSE
def test_pieces_and_layouts_change_nothing(inverse, kind, monkeypatch):
    torch.manual_seed(0)
    tensors = draw(600, 5, kind)
    whole = with_gradients(tensors, kind, inverse)
    monkeypatch.setattr(pieces, "CHUNK", 50)
    x, *params = tensors
    turned = [x, *(p.t().contiguous().t() for p in params)]
    for a, b in zip(whole, with_gradients(turned, kind, inverse), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["slopes of one at the ends", "clipped"])
@INVERSE
def test_it_passes_through_graphs_and_transforms(inverse, kind):
    torch.manual_seed(0)
    tensors = draw(20, 3, kind)
    expected = run(tensors, kind, inverse)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return run(tensors, kind, inverse)

    torch._dynamo.reset()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    dynamic = torch.compile(
        lambda *t: Module()(*Module()(*t)[:1], *t[1:]),
        fullgraph=True,
        backend="eager",
        dynamic=True,
    )
    exported = torch.export.export(Module(), tuple(tensors)).module()
    mapped = torch.func.vmap(Module())
    for function in (compiled, exported, mapped):
        for a, b in zip(function(*tensors), expected, strict=True):
            assert torch.allclose(a, b, atol=1e-12)
    # The compiler takes the closed-form gradients along.
    leaves = [t.clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(sum(o.sum() for o in compiled(*leaves)), leaves)
    others = torch.autograd.grad(sum(o.sum() for o in run(leaves, kind, inverse)), leaves)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(grads, others, strict=True))
    twice = run([run(leaves, kind, inverse)[0], *leaves[1:]], kind, inverse)
    for a, b in zip(dynamic(*leaves), twice, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@INVERSE
def test_a_trace_runs_on_other_sizes(inverse, kind, tmp_path):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that shapes are looked at, and that traces are going away
        traced = torch.jit.trace(lambda *t: run(t, kind, inverse), tuple(draw(20, 5, kind)))
        torch.jit.save(traced, str(tmp_path / "spline.pt"))
        traced = torch.jit.load(str(tmp_path / "spline.pt"))
    tensors = draw(30, 5, kind)
    for a, b in zip(traced(*tensors), run(tensors, kind, inverse), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("gain", [1e-6, 1e-3, 1e3, 1e6])
def test_slopes_of_one_at_the_ends_are_met_with_any_gain(gain):
    x = torch.tensor([-BOUND, BOUND], dtype=torch.float64)
    params = [torch.randn(2, size, dtype=x.dtype) for size in (4, 4, 3)]
    least = (0.1, 0.1, min(1e-3, 0.5 / gain))
    _, ladj = softmax_spline(x, *params, bound=BOUND, least=least, gain=gain)
    assert ladj.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gain": 0.0}, "gain must lie in"),
        ({"gain": -1.0}, "gain must lie in"),
        ({"gain": math.nan}, "gain must lie in"),
        ({"gain": 1e4}, r"least slope must lie in \[0, 1\).*got 10"),
        ({"clip": 0.0}, "clip must be positive, or None; got 0.0"),
        ({"clip": math.nan}, "clip must be positive, or None; got nan"),
    ],
)
def test_it_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        softmax_spline(*draw(5, 4, "clipped"), bound=BOUND, **options)


def test_keeps_nothing_but_its_inputs():
    x, *params = (t.requires_grad_() for t in draw(10, 4, "clipped"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run((x, *params), "clipped", False)
    assert {t.untyped_storage().data_ptr() for t in saved} <= {
        t.untyped_storage().data_ptr() for t in (x, *params)
    }
