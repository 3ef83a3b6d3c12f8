r"""Tests for the image flows of the zuko adapter."""

from functools import partial

import pytest
import torch
import torch.nn as nn

from flowguard.image import ConditionalMultiscaleFlow
from flowguard.ood import OODConditioner

zuko = pytest.importorskip("zuko")

from flowguard.integrations.zuko import (  # noqa: E402
    ConditionalMultiscaleTransform,
    GuardedFlow,
    MultiscaleFlow,
)

SMALL = {"levels": 2, "steps": 1, "hidden": 8}

# name: (flow, context for a batch shape), all over images of shape (2, 8, 12)
FLOWS = {
    "maps": (
        partial(MultiscaleFlow, 2, 3, **SMALL),
        lambda *b: [torch.randn(*b, 3, 4, 6), torch.randn(*b, 3, 2, 3)],
    ),
    "image": (partial(MultiscaleFlow, 2, 3, **SMALL), lambda *b: torch.randn(*b, 3, 8, 12)),
    "small image": (
        partial(MultiscaleFlow, 2, 3, scale=4, **SMALL),
        lambda *b: torch.randn(*b, 3, 2, 3),
    ),
    "image of another size": (
        partial(MultiscaleFlow, (2, 8, 12), 3, **SMALL),
        lambda *b: torch.randn(*b, 3, 7, 5),
    ),
    "affine": (
        partial(MultiscaleFlow, 2, 3, coupling="affine", **SMALL),
        lambda *b: torch.randn(*b, 3, 8, 12),
    ),
}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def cast(c, dtype):
    return c.to(dtype) if isinstance(c, torch.Tensor) else [m.to(dtype) for m in c]


def stir(flow: nn.Module) -> nn.Module:
    """A flow fresh from its constructor is nearly linear: its last layers are zero."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return flow


@pytest.fixture(params=FLOWS)
def case(request, dtype):
    make, context = FLOWS[request.param]
    return stir(make()).to(dtype), lambda *b: cast(context(*b), dtype)


@pytest.fixture
def glow(dtype):
    return stir(MultiscaleFlow((2, 8, 12), **SMALL)).to(dtype)


def test_log_prob_and_gradients(case, dtype):
    flow, context = case
    x = torch.randn(4, 2, 8, 12, dtype=dtype)
    log_p = flow(context(4)).log_prob(x)
    assert log_p.shape == (4,)
    assert log_p.dtype == dtype
    log_p.mean().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_training_and_evaluation_agree(case, dtype):
    flow, context = case
    x, c = torch.randn(4, 2, 8, 12, dtype=dtype), context(4)
    log_p = flow(c).log_prob(x)  # initialises the activation normalisations
    assert torch.equal(flow(c).log_prob(x), log_p)
    assert torch.equal(flow.eval()(c).log_prob(x), log_p)


def test_density_is_that_of_the_core(dtype):
    flow = stir(MultiscaleFlow(2, 3, **SMALL)).to(dtype)
    x = torch.randn(4, 2, 8, 12, dtype=dtype)
    c = [torch.randn(4, 3, 4, 6, dtype=dtype), torch.randn(4, 3, 2, 3, dtype=dtype)]
    (core,) = (m for m in flow.modules() if isinstance(m, ConditionalMultiscaleFlow))
    assert torch.allclose(flow(c).log_prob(x), core.log_prob(x, c), rtol=TOLERANCE[dtype])


def test_samples(case, dtype):
    flow, context = case
    flow.eval()
    d = flow(context(4))
    assert d.event_shape == (2, 8, 12)
    assert d.batch_shape == (4,)
    assert d.sample((5,)).shape == (5, 4, 2, 8, 12)
    assert d.sample().dtype == dtype
    assert not d.sample().requires_grad
    assert d.sample((0,)).shape == (0, 4, 2, 8, 12)
    x, log_p = d.rsample_and_log_prob((5,))
    assert log_p.shape == (5, 4)
    assert torch.allclose(d.log_prob(x), log_p, rtol=TOLERANCE[dtype])
    d.rsample().square().sum().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name


def test_batch_shapes(case, dtype):
    flow, context = case
    flow.eval()
    x = torch.randn(4, 2, 8, 12, dtype=dtype)
    one, rows, grid = context(), context(4), context(3, 4)
    assert flow(one).batch_shape == ()
    assert flow(one).log_prob(x).shape == (4,)
    assert flow(one).log_prob(x[0]).shape == ()
    assert flow(rows).log_prob(x[0]).shape == (4,)
    assert flow(grid).log_prob(x).shape == (3, 4)
    assert flow(context(0)).transform(x[:0]).shape == (0, 192)
    assert flow(context(0)).sample((5,)).shape == (5, 0, 2, 8, 12)
    # Rows do not mix: each image meets its own context, also where the contexts are broadcast.
    pick = (
        (lambda c, *i: c[i])
        if isinstance(rows, torch.Tensor)
        else (lambda c, *i: [m[i] for m in c])
    )
    column = pick(grid, slice(None), slice(0, 1))
    many = flow(column).log_prob(x)
    assert many.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            expected = flow(pick(grid, i, 0)).log_prob(x[j])
            assert torch.allclose(many[i, j], expected, rtol=10 * TOLERANCE[dtype])
    assert flow(rows).expand((3, 4)).log_prob(x).shape == (3, 4)


def test_samples_meet_their_own_context(dtype):
    flow = stir(MultiscaleFlow(2, 3, **SMALL)).to(dtype).eval()
    c = torch.randn(3, 3, 8, 12, dtype=dtype)
    x, log_p = flow(c).rsample_and_log_prob((2,))
    for i in range(3):
        assert torch.allclose(
            flow(c[i]).log_prob(x[:, i]), log_p[:, i], rtol=10 * TOLERANCE[dtype]
        )


def test_round_trip_and_jacobian_both_ways(case, dtype):
    flow, context = case
    atol = TOLERANCE[dtype]
    x, c = torch.randn(2, 8, 12, dtype=dtype), context()
    t = flow.eval()(c).transform
    z = t(x)
    assert z.shape == (192,)
    assert torch.allclose(t.inv(z), x, atol=atol)
    jacobian = torch.autograd.functional.jacobian(t, x).reshape(192, 192)
    inverse = torch.autograd.functional.jacobian(t.inv, z).reshape(192, 192)
    ladj = torch.linalg.slogdet(jacobian).logabsdet
    rtol = 10 * atol  # a sum of 192 logarithms
    assert torch.allclose(jacobian @ inverse, torch.eye(192, dtype=dtype), atol=10 * atol)
    assert torch.allclose(t.log_abs_det_jacobian(x, z), ladj, rtol=rtol)
    assert torch.allclose(t.inv.log_abs_det_jacobian(z, x), -ladj, rtol=rtol)
    assert torch.allclose(t.call_and_ladj(x)[1], ladj, rtol=rtol)
    assert torch.allclose(t.inv.call_and_ladj(z)[1], -ladj, rtol=rtol)
    assert torch.equal(t.inv.inv(x), z)


def test_transform_composes_in_zuko(dtype):
    lazy = stir(ConditionalMultiscaleTransform(2, 3, **SMALL)).to(dtype).eval()
    composed = zuko.lazy.LazyComposedTransform(
        zuko.lazy.LazyInverse(
            zuko.flows.UnconditionalTransform(torch.distributions.SigmoidTransform)
        ),
        lazy,
    )
    x, c = torch.rand(4, 2, 8, 12, dtype=dtype), torch.randn(4, 3, 8, 12, dtype=dtype)
    t = composed(c)
    z, ladj = t.call_and_ladj(x)
    assert z.shape == (4, 192)
    assert t.forward_shape(x.shape) == z.shape
    assert t.inverse_shape(z.shape) == x.shape
    expected = lazy(c).call_and_ladj(torch.logit(x))[1] - (x * (1 - x)).log().sum((1, 2, 3))
    assert torch.allclose(ladj, expected, rtol=TOLERANCE[dtype])
    assert torch.allclose(t.inv(z), x, atol=TOLERANCE[dtype])
    base = zuko.distributions.DiagNormal(
        torch.zeros(192, dtype=dtype), torch.ones(192, dtype=dtype)
    )
    flow = zuko.distributions.NormalizingFlow(t, base.expand((4,)))
    sample = flow.sample((2,))
    assert sample.shape == (2, 4, 2, 8, 12)
    assert flow.event_shape == (2, 8, 12)
    assert sample.min() >= 0
    assert sample.max() <= 1


def test_without_a_context(glow, dtype):
    x = torch.randn(4, 2, 8, 12, dtype=dtype)
    log_p = glow().log_prob(x)
    assert log_p.shape == (4,)
    assert glow().sample((3,)).shape == (3, 2, 8, 12)
    log_p.sum().backward()


def test_one_flow_takes_any_size(dtype):
    flow = MultiscaleFlow(2, 3, **SMALL).to(dtype)
    for size in ((8, 12), (4, 4), (32, 20)):
        c = torch.randn(2, 3, *size, dtype=dtype)
        x = flow(c).sample()
        assert x.shape == (2, 2, *size)
        assert flow(c).log_prob(x).shape == (2,)


def test_temperature_scales_the_base(dtype):
    flow = stir(MultiscaleFlow(2, 3, **SMALL)).to(dtype).eval()
    c = torch.randn(1, 3, 8, 12, dtype=dtype)
    t = flow(c).transform
    cold = flow(c, temperature=0.5)
    z = t(cold.sample((200,)))
    assert abs(z.std().item() - 0.5) < 0.01
    x = cold.sample()
    normal = torch.distributions.Normal(0.0, 0.5)
    z, ladj = t.call_and_ladj(x)
    assert torch.allclose(cold.log_prob(x), normal.log_prob(z).sum(-1) + ladj)
    frozen = flow(c, temperature=0.0).sample((2,))
    assert torch.allclose(frozen, t.inv(torch.zeros_like(z)), atol=TOLERANCE[dtype])


def test_it_learns():
    """The images are two-valued by their context; a flow that ignored it could not tell."""
    flow = MultiscaleFlow(1, 1, **SMALL)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)

    def batch(n):
        mean = torch.randn(n, 1, 1, 1).sign().expand(n, 1, 4, 4)
        return mean + 0.1 * torch.randn(n, 1, 4, 4), mean

    for _ in range(200):
        x, y = batch(64)
        optimizer.zero_grad()
        (-flow(y).log_prob(x).mean()).backward()
        optimizer.step()
    x, y = batch(256)
    with torch.no_grad():
        right, wrong = flow(y).log_prob(x).mean(), flow(-y).log_prob(x).mean()
        truth = torch.distributions.Normal(0.0, 0.1).log_prob(x - y).sum((1, 2, 3)).mean()
        assert right > truth - 2
        assert wrong < right - 10
        assert (flow(y).sample().mean((1, 2, 3)).sign() == y[:, 0, 0, 0]).all()


def test_save_load_and_repr(case, dtype, tmp_path):
    flow, context = case
    x, c = torch.randn(4, 2, 8, 12, dtype=dtype), context(4)
    flow(c).log_prob(x)
    torch.save(flow, tmp_path / "flow.pth")
    again = torch.load(tmp_path / "flow.pth", weights_only=False)
    assert torch.equal(again(c).log_prob(x), flow(c).log_prob(x))
    assert "ConditionalMultiscaleTransform" in repr(again)
    assert repr(flow(c)).startswith("NormalizingFlow(")


def test_guarded_image_flow(dtype):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, y):
            fine = self.net(y)
            return [fine, nn.functional.avg_pool2d(fine, 2)]

    guarded = GuardedFlow(
        MultiscaleFlow(2, 3, **SMALL), OODConditioner(Pyramid(), policy="report", alpha=0.05)
    ).to(dtype)
    y = torch.randn(64, 1, 4, 6, dtype=dtype)
    x = torch.randn(64, 2, 8, 12, dtype=dtype)
    guarded(y).log_prob(x).mean().backward()
    assert all(p.grad is not None for p in guarded.parameters())
    guarded.conditioner.fit(y, progress=False)
    guarded.conditioner.calibrate(torch.randn(64, 1, 4, 6, dtype=dtype), progress=False)
    guarded.eval()
    y = y[:2].clone()
    y[1, :, 0, 0] = 100
    assert guarded(y, temperature=0.7).sample((3,)).shape == (3, 2, 2, 8, 12)
    assert guarded.report.flagged.tolist() == [False, True]
    worst = guarded.report.levels["level1"].map[1].argmax()  # within reach of the convolution
    assert divmod(int(worst), 6) in {(0, 0), (0, 1), (1, 0), (1, 1)}


CONTEXT = torch.randn(2, 3, 8, 12)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: MultiscaleFlow(2), "without a context, shape must tell the size"),
        (lambda: MultiscaleFlow((2, 8), 3), r"number of channels or a shape"),
        (lambda: MultiscaleFlow((2, 8, 9), 3, **SMALL), "multiples of 4; got 8 and 9"),
        (lambda: MultiscaleFlow(2, 3, **SMALL)(), "got no context"),
        (lambda: MultiscaleFlow((2, 8, 8), **SMALL)(CONTEXT), "got a context"),
        (lambda: MultiscaleFlow(2, 3, **SMALL)(CONTEXT[..., :7]), "multiples of 4; got 8 and 7"),
        (lambda: MultiscaleFlow(2, 4, **SMALL)(CONTEXT), r"shapes \[\(4, 4, 6\), \(4, 2, 3\)\]"),
        (lambda: MultiscaleFlow(2, 3, **SMALL)([CONTEXT]), "a map for each of the 2 levels"),
        (
            lambda: MultiscaleFlow(2, 3, **SMALL)([CONTEXT, CONTEXT[:1, :, :4, :6]]),
            "same batch",
        ),
        (lambda: MultiscaleFlow(2, 3, **SMALL)(CONTEXT[0, 0]), "an image"),
        (lambda: MultiscaleFlow(2, 3, **SMALL)(CONTEXT, temperature=-1), "temperature"),
        (
            lambda: MultiscaleFlow(2, 3, **SMALL)(CONTEXT).log_prob(torch.zeros(2, 2, 8, 8)),
            r"images must have shape \(\*, 2, 8, 12\); got \(2, 2, 8, 8\)",
        ),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
