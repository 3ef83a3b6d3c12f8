r"""Tests for the robust couplings, blocks and the guard of the normflows adapter."""

import copy
import importlib
import pickle
import unittest
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

import flowguard
from flowguard.functional import FINE_SLOPE, SLOPE
from flowguard.ood import OODConditioner

nf = pytest.importorskip("normflows")

from normflows.flows.flow_test import FlowTest  # noqa: E402

from flowguard.integrations.normflows import (  # noqa: E402
    ConditionalMultiscaleFlow,
    ContextAdapter,
    GuardedConditionalFlow,
    RobustCouplingBlock,
    RobustGlowBlock,
    RobustSplineAutoregressive,
    RobustSplineCoupling,
)

CONTEXT = 3
VECTOR, IMAGE = (5,), (5, 4, 6)


def vector(cls, features=5, **kwargs):
    return lambda context: cls(features, 1, 16, context, init_identity=False, **kwargs)


def glow(channels=5, **kwargs):
    return lambda context: RobustGlowBlock(channels, 8, context, init_zeros=False, **kwargs)


def block(context):
    return RobustCouplingBlock(nn.Conv2d(3 + (context or 0), 2 * 4, 1), context)


# name: (constructor, shape of the input, shape of the context)
LAYERS = {
    "coupling": (vector(RobustSplineCoupling), VECTOR, (CONTEXT,)),
    "coupling, reversed": (vector(RobustSplineCoupling, reverse_mask=True), VECTOR, (CONTEXT,)),
    "coupling, two bins": (vector(RobustSplineCoupling, num_bins=2), VECTOR, (CONTEXT,)),
    "coupling, all transformed": (
        vector(RobustSplineCoupling, apply_unconditional_transform=True),
        VECTOR,
        (CONTEXT,),
    ),
    "coupling, one feature": (vector(RobustSplineCoupling, 1), (1,), (CONTEXT,)),
    "coupling, free shift": (vector(RobustSplineCoupling, shift_bound=None), VECTOR, (CONTEXT,)),
    "autoregressive": (vector(RobustSplineAutoregressive), VECTOR, (CONTEXT,)),
    "autoregressive, permuted": (
        vector(RobustSplineAutoregressive, permute_mask=True),
        VECTOR,
        (CONTEXT,),
    ),
    "autoregressive, one feature": (vector(RobustSplineAutoregressive, 1), (1,), (CONTEXT,)),
    "Glow": (glow(), IMAGE, (CONTEXT, 4, 6)),
    "Glow, context for all positions": (glow(), IMAGE, (CONTEXT,)),
    "Glow, channel_inv": (glow(split_mode="channel_inv"), IMAGE, (CONTEXT, 4, 6)),
    "Glow, checkerboard": (glow(split_mode="checkerboard"), IMAGE, (CONTEXT, 4, 6)),
    "Glow, checkerboard_inv": (glow(split_mode="checkerboard_inv"), IMAGE, (CONTEXT, 4, 6)),
    "Glow, one channel": (glow(1, split_mode="checkerboard"), (1, 4, 6), (CONTEXT, 4, 6)),
    "Glow, no LU": (glow(use_lu=False), IMAGE, (CONTEXT, 4, 6)),
    "Glow, orthogonal": (glow(orthogonal=True), IMAGE, (CONTEXT, 4, 6)),
    "Glow, additive": (glow(scale=False), IMAGE, (CONTEXT, 4, 6)),
    "Glow, eight bins": (glow(num_bins=8), IMAGE, (CONTEXT, 4, 6)),
    "Glow, normalized network": (glow(net_actnorm=True, leaky=0.1), IMAGE, (CONTEXT, 4, 6)),
    "block": (block, IMAGE, (CONTEXT, 4, 6)),
}

# Log-determinants are sums of up to 120 numbers.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=LAYERS)
def entry(request):
    return LAYERS[request.param]


def build(entry, dtype=torch.float32, conditional=True, batch=4):
    make, shape, context_shape = entry
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a rotation rounded to float32 is none in float64
    try:
        layer = make(CONTEXT if conditional else None)
    finally:
        torch.set_default_dtype(default)
    z = torch.randn(batch, *shape, dtype=dtype)
    context = torch.randn(batch, *context_shape, dtype=dtype) if conditional else None
    layer.inverse(torch.randn(8, *shape, dtype=dtype), None if context is None else context[:1])
    return layer, z, context


def check(layer, z, context, tolerance):
    FlowTest().checkForwardInverse(layer, z, context, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("conditional", [True, False], ids=["context", "no context"])
def test_hosts_own_check(entry, dtype, conditional):
    layer, z, context = build(entry, dtype, conditional)
    check(layer, z, context, TOLERANCE[dtype])
    x, log_det = layer(z) if context is None else layer(z, context)
    assert log_det.shape == (len(z),)
    assert log_det.dtype == dtype
    assert not torch.allclose(x, z)


@pytest.mark.parametrize("name", LAYERS)
def test_hosts_own_check_before_any_batch(name):
    # In training mode the first batch initialises; a sample must come back all the same.
    make, shape, context_shape = LAYERS[name]
    check(make(CONTEXT), torch.randn(4, *shape), torch.randn(4, *context_shape), 1e-3)


def test_log_det_is_that_of_the_jacobian(entry):
    layer, z, context = build(entry, torch.float64, batch=1)
    for direction in (layer.forward, layer.inverse):
        jacobian = torch.autograd.functional.jacobian(lambda z, f=direction: f(z, context)[0], z)
        expected = torch.linalg.slogdet(jacobian.reshape(z.numel(), z.numel())).logabsdet
        torch.testing.assert_close(direction(z, context)[1][0], expected)


def test_empty_batch(entry):
    layer, z, context = build(entry)
    for direction in (layer.forward, layer.inverse):
        x, log_det = direction(z[:0], context[:0])
        assert x.shape == z[:0].shape
        assert log_det.shape == (0,)


def test_rows_of_the_context_are_shared(entry):
    layer, z, context = build(entry)
    z = torch.cat((z, z + 1))
    for direction in (layer.forward, layer.inverse):
        torch.testing.assert_close(
            direction(z, context), direction(z, torch.cat((context, context)))
        )
        torch.testing.assert_close(
            direction(z, context[:1]), direction(z, context[:1].expand(8, *context.shape[1:]))
        )
    with pytest.raises(ValueError, match="multiple of the contexts' number"):
        layer(z[:3], context[:2])


def test_copies_and_reloads(entry):
    layer, z, context = build(entry)
    expected = layer(z, context)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(z, context), expected, rtol=0, atol=0)
    other = entry[0](CONTEXT)
    if isinstance(layer, RobustSplineAutoregressive):
        other = copy.deepcopy(layer)  # the order of its features is part of it
        nn.init.normal_(other.net.final_layer.weight)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(z, context), expected, rtol=0, atol=0)


def test_not_contiguous_inputs(entry):
    layer, z, context = build(entry)

    def strided(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    torch.testing.assert_close(layer(strided(z), strided(context)), layer(z, context))


# The core's own convolutions switch autocast off, which the meta device does not know.
@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"Glow, no LU", "Glow, orthogonal"}))
def test_all_tensors_are_where_the_input_is(name):
    layer, z, context = build(LAYERS[name])
    layer, z, context = layer.eval().to("meta"), z.to("meta"), context.to("meta")
    for direction in (layer.forward, layer.inverse):
        x, log_det = direction(z, context)
        assert x.is_meta
        assert log_det.is_meta


def test_half_precision_and_autocast(entry):
    layer, z, context = build(entry)
    layer.eval()
    expected = layer(z, context)
    for direction in (layer.forward, layer.inverse):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x, log_det = direction(z, context)
        assert x.isfinite().all()
        assert log_det.isfinite().all()
    half = copy.deepcopy(layer).bfloat16()
    x, log_det = half(z.bfloat16(), context.bfloat16())
    assert x.dtype == log_det.dtype == torch.bfloat16
    torch.testing.assert_close(x.float(), expected[0], atol=0.2, rtol=0.2)


def test_vmap(entry):
    layer, z, context = build(entry)
    layer.eval()

    def one(z, context):
        x, log_det = layer(z.unsqueeze(0), context.unsqueeze(0))
        return x[0], log_det[0]

    expected = layer(z, context)
    torch.testing.assert_close(torch.func.vmap(one)(z, context), expected, atol=1e-4, rtol=1e-4)


def test_gradients_reach_inputs_context_and_network(entry):
    layer, z, context = build(entry)
    for direction in (layer.forward, layer.inverse):
        layer.zero_grad()
        z, context = z.detach().requires_grad_(), context.detach().requires_grad_()
        x, log_det = direction(z, context)
        (x.square().sum() - log_det.sum()).backward()
        assert z.grad.isfinite().all()
        assert context.grad.isfinite().all()
        assert context.grad.abs().sum() > 0
        for name, p in layer.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("far", [1e3, 1e10, 1e30, torch.inf])
def test_no_context_explodes(entry, far):
    layer, z, context = build(entry)
    if "None" in str(layer.__dict__.get("univariate", "")):
        pytest.skip("a free shift has no bound")
    x, log_det = layer.eval()(z, far * context)
    assert x.isfinite().all()
    assert log_det.isfinite().all()
    assert x.abs().max() <= flowguard.certify(layer).bound(z.abs().max().item())


@pytest.mark.parametrize(
    "name",
    [
        "coupling",
        pytest.param("autoregressive", marks=pytest.mark.slow),  # a pass for each feature
        "Glow",
        "Glow, checkerboard",
    ],
)
def test_compiles_in_one_graph(name):
    layer, z, context = build(LAYERS[name])
    for direction in (layer.forward, layer.inverse):
        compiled = torch.compile(direction, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z, context), direction(z, context))


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("block",)])
def test_layers_start_as_the_identity_by_default(name):
    _, shape, context_shape = LAYERS[name]
    z, context = torch.randn(4, *shape), torch.randn(4, *context_shape)
    if len(shape) == 1:
        for cls in (RobustSplineCoupling, RobustSplineAutoregressive):
            layer = cls(shape[0], 2, 16, CONTEXT)
            torch.testing.assert_close(layer(z, context), (z, torch.zeros(4)))
    else:
        mode = "channel" if shape[0] > 1 else "checkerboard"
        coupling = RobustGlowBlock(shape[0], 8, CONTEXT, mode).coupling
        torch.testing.assert_close(coupling(z, context), (z, torch.zeros(4)))


# Direction: `forward` goes from noise to data, so that `inverse` is the one pass of a flow with
# many features, and its output, not its input, is computed feature by feature.


def test_least_slopes_of_layers_as_made():
    for name, (make, *_) in LAYERS.items():
        layer = getattr(make(CONTEXT), "coupling", make(CONTEXT))
        if name != "Glow, additive":
            slope = SLOPE if name.startswith(("coupling", "autoregressive")) else FINE_SLOPE
            assert layer.univariate.keywords["slope"] == slope


def test_forward_goes_from_noise_to_data():
    layer = RobustSplineAutoregressive(3, 1, 16, init_identity=False).double()
    x = torch.randn(1, 3, dtype=torch.double)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer.inverse(x)[0], x).reshape(3, 3)
    raw = layer.net(x)  # parameters are functions of the data
    spline = flowguard.RobustSpline(*_split(raw.reshape(1, 3, 22)), bound=3.0)
    torch.testing.assert_close(layer.inverse(x)[0], spline(x))
    assert (jacobian.triu(1) == 0).all()


def test_coupling_reads_what_is_kept_of_the_data():
    layer = RobustSplineCoupling(4, 1, 16, init_identity=False)
    x = torch.randn(6, 4)
    raw = layer.net(x[:, ::2]).reshape(6, 2, 22)
    z, log_det = layer.inverse(x)
    spline = flowguard.RobustSpline(*_split(raw), bound=3.0)
    expected, ladj = spline.call_and_ladj(x[:, 1::2])
    torch.testing.assert_close(z[:, 1::2], expected)
    torch.testing.assert_close(z[:, ::2], x[:, ::2])
    torch.testing.assert_close(log_det, ladj.sum(1))


def _split(raw):
    widths, heights, derivatives, shift = raw.split((7, 7, 7, 1), dim=-1)
    return widths, heights, derivatives, shift.squeeze(-1)


def test_glow_block_runs_its_parts_as_normflows_does():
    layer = RobustGlowBlock(4, 8, init_zeros=False)
    layer.inverse(3 * torch.randn(16, 4, 4, 4) + 2)  # data: the mean is in the normalization
    z = torch.randn(2, 4, 4, 4)
    x, _ = layer.coupling(z)
    x, _ = layer.mix.inverse(x)
    x, _ = layer.actnorm.inverse(x)
    torch.testing.assert_close(layer(z)[0], x)
    assert x.mean() > 1
    normed, _ = layer.actnorm(3 * torch.randn(64, 4, 8, 8) + 2)
    assert normed.mean().abs() < 0.2


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_first_batch_is_normalized_in_training_only(direction):
    z = 3 * torch.randn(64, 4, 4, 4) + 2
    layer = RobustGlowBlock(4, 8).eval()
    getattr(layer, direction)(z)
    assert not layer.actnorm.initialized
    layer.train()
    getattr(layer, direction)(z[:0])
    assert not layer.actnorm.initialized
    out, _ = getattr(layer, direction)(z)
    assert layer.actnorm.initialized
    torch.testing.assert_close(out.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.square().mean(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", ["channel", "channel_inv", "checkerboard", "checkerboard_inv"])
@pytest.mark.parametrize("shape", [(4, 3, 6), (6, 4, 4), (8,)])
def test_splits_are_those_of_normflows(mode, shape):
    layer = RobustCouplingBlock(nn.Identity(), split_mode=mode)
    z = torch.randn(2, *shape)
    kept, changed = layer.split(z)
    torch.testing.assert_close([kept, changed], nf.flows.Split(mode)(z)[0], rtol=0, atol=0)
    assert torch.equal(layer.merge(kept, changed), z)


def test_additive_block_keeps_the_volume():
    layer = RobustGlowBlock(4, 8, CONTEXT, scale=False, orthogonal=True, init_zeros=False)
    z, context = torch.randn(2, 4, 4, 4), torch.randn(2, CONTEXT, 4, 4)
    assert (layer.coupling(z, context)[1] == 0).all()


# Within normflows' own models


def conditional_flow(context=CONTEXT):
    layers = [
        RobustSplineCoupling(4, 1, 16, context, init_identity=False),
        nf.flows.LULinearPermute(4),
        RobustSplineAutoregressive(4, 1, 16, context, init_identity=False),
        ContextAdapter(nf.flows.AffineConstFlow((4,))),
        ContextAdapter(nf.flows.Reverse(RobustSplineCoupling(4, 1, 16, context))),
    ]
    target = nf.distributions.target.ConditionalDiagGaussian()
    return nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(4), layers, target)


@pytest.mark.parametrize(("samples", "contexts"), [(6, 1), (6, 2), (6, 3), (6, 6), (1, 1)])
def test_number_of_samples(samples, contexts):
    flow, context = conditional_flow(), torch.randn(contexts, CONTEXT)
    x, log_q = flow.sample(samples, context)
    assert x.shape == (samples, 4)
    torch.testing.assert_close(flow.log_prob(x, context), log_q, atol=1e-4, rtol=1e-4)
    rows = context.repeat(samples // contexts, 1)  # sample i belongs to context i mod B
    torch.testing.assert_close(flow.log_prob(x, rows), log_q, atol=1e-4, rtol=1e-4)


def test_number_of_samples_must_fit_the_contexts():
    with pytest.raises(ValueError, match="batch of 3 and 2 contexts"):
        conditional_flow().sample(3, torch.randn(2, CONTEXT))


def test_conditional_flow_trains():
    flow = conditional_flow()
    context = torch.randn(512, CONTEXT)
    x = torch.cat((context, context[:, :1] ** 2), dim=1) + 0.1 * torch.randn(512, 4)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = flow.forward_kld(x, context)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_reverse_kld_of_the_host():
    flow, context = conditional_flow(8), torch.rand(5, 8) + 0.5
    for score_fn in (True, False):
        flow.reverse_kld(5, context, score_fn=score_fn).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())


def test_context_adapter_passes_the_context_by_signature():
    class Takes(nf.flows.Flow):
        def forward(self, z, context=None):
            return z + context, 0

        def inverse(self, z, context=None):
            return z - context, 0

    z, context = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.equal(ContextAdapter(Takes())(z, context)[0], z + context)
    assert torch.equal(ContextAdapter(nf.flows.Reverse(Takes()))(z, context)[0], z - context)
    both = nf.flows.Composite([Takes(), nf.flows.Permute(2, "swap"), Takes()])
    adapter = ContextAdapter(both)
    torch.testing.assert_close(adapter(z, context)[0], (z + context).flip(1) + context)
    check(adapter, z, context, 1e-5)
    assert torch.equal(ContextAdapter(nf.flows.Permute(2, "swap"))(z, context)[0], z.flip(1))
    blind = ContextAdapter(RobustSplineCoupling(2, 1, 8))
    assert torch.equal(blind(z, context)[0], RobustSplineCoupling(2, 1, 8)(z)[0])


# The guard


def guarded(policy="report"):
    conditioner = OODConditioner(nn.Linear(5, CONTEXT), policy=policy, alpha=0.01)
    return GuardedConditionalFlow(conditional_flow(), conditioner)


def test_guard_hands_the_embedding_to_the_flow():
    flow = guarded()
    y, x = torch.randn(6, 5), torch.randn(6, 4)
    embedding = flow.conditioner.encoder(y)
    torch.testing.assert_close(flow.log_prob(x, y), flow.flow.log_prob(x, embedding))
    torch.testing.assert_close(flow.forward_kld(x, y), flow.flow.forward_kld(x, embedding))
    torch.testing.assert_close(flow(x, y), flow.flow(x, embedding))
    torch.testing.assert_close(flow.inverse(flow(x, y), y), x, atol=1e-3, rtol=1e-3)
    out, log_det = flow.forward_and_log_det(x, y)
    torch.testing.assert_close(flow.inverse_and_log_det(out, y)[1], -log_det, atol=1e-3, rtol=1e-3)
    assert flow.sample(6, y)[0].shape == (6, 4)
    assert isinstance(flow, nf.ConditionalNormalizingFlow)


def test_guard_trains_both_ends():
    flow = guarded()
    flow.forward_kld(torch.randn(8, 4), torch.randn(8, 5)).backward()
    assert flow.conditioner.encoder.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
def test_guard_reports_and_shrinks():
    flow = guarded("shrink")
    y = torch.randn(1024, 5)
    flow.conditioner.fit(y[:512], progress=False)
    flow.conditioner.calibrate(y[512:], progress=False)
    near, _ = flow.sample(64, y[:1])
    assert not flow.report.flagged.any()
    far, _ = flow.sample(64, 1e6 * y[:1])
    assert flow.report.flagged.all()
    assert far.abs().max() < 10 * near.abs().max()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((nn.Linear(2, 2), None), "flow must be a flow"),
        ((None, None), "flow must be a flow"),
        ((nf.NormalizingFlow(None, []), nn.Linear(2, 2)), "needs wrapping"),
    ],
)
def test_guard_refuses(arguments, match):
    with pytest.raises(TypeError, match=match):
        GuardedConditionalFlow(*arguments)


class OneWay(nf.flows.Flow):
    def forward(self, z, context=None):
        return z, 0

    def inverse(self, z):
        return z, 0


coupling = partial(RobustSplineCoupling, 4, 1, 8)


@pytest.mark.parametrize(
    ("call", "exception", "match"),
    [
        (lambda: coupling(CONTEXT, tails="circular"), ValueError, "identity outside"),
        (lambda: coupling(CONTEXT, 8, "linear"), TypeError, "tail_bound must be a number"),
        (lambda: coupling(CONTEXT, 1), ValueError, "at least 2 bins"),
        (lambda: coupling(CONTEXT, 8, -1.0), ValueError, "bound must be positive"),
        (lambda: coupling(CONTEXT, 8, 3.0, -1.0), ValueError, "bound must be positive"),
        (lambda: coupling(0), ValueError, "num_context_channels must be a positive"),
        (lambda: RobustSplineCoupling(0, 1, 8), ValueError, "num_input_channels must be"),
        (lambda: RobustSplineAutoregressive(0, 1, 8), ValueError, "num_input_channels must be"),
        (lambda: coupling()(torch.randn(2, 3)), ValueError, r"shape \(B, 4\); got \(2, 3\)"),
        (lambda: coupling()(torch.randn(2, 4), torch.randn(2, 3)), ValueError, "without a con"),
        (lambda: coupling(3)(torch.randn(2, 4)), ValueError, "context of 3 channels; got none"),
        (
            lambda: coupling(3)(torch.randn(2, 4), torch.randn(2, 5)),
            ValueError,
            r"shape \(B, 3\); got \(2, 5\)",
        ),
        (
            lambda: coupling(3)(torch.randn(2, 4), torch.ones(2, 3, dtype=torch.long)),
            TypeError,
            "one_hot",
        ),
        (lambda: RobustGlowBlock(4, 8, 0), ValueError, "context_channels must be a positive"),
        (lambda: coupling(CONTEXT, 2.5), ValueError, "num_bins must be a positive number"),
        (lambda: RobustGlowBlock(4, 8, split_mode="rows"), ValueError, "split_mode must be one"),
        (lambda: RobustGlowBlock(4, 8, scale_map="tanh"), ValueError, "scale_map must be one"),
        (lambda: RobustGlowBlock(1, 8), ValueError, "at least 2 of them; got 1"),
        (lambda: RobustGlowBlock(4, 8)(torch.randn(2, 3, 4, 4)), ValueError, r"\(B, 4, H, W\)"),
        (
            lambda: RobustGlowBlock(4, 8, 3)(torch.randn(2, 4, 4, 4), torch.randn(2, 3, 2, 2)),
            ValueError,
            r"size \(4, 4\) of the image at this layer",
        ),
        (
            lambda: RobustGlowBlock(4, 8, None, "checkerboard")(torch.randn(2, 4, 4, 5)),
            ValueError,
            "even last dimension",
        ),
        (lambda: RobustCouplingBlock(nn.Identity(), shapes=[()]), ValueError, "belong together"),
        (lambda: ContextAdapter(nn.Linear(2, 2)), TypeError, "with `forward` and `inverse`"),
        (lambda: ContextAdapter(OneWay()), TypeError, "forward direction only"),
    ],
)
def test_mistakes_are_named(call, exception, match):
    with pytest.raises(exception, match=match):
        call()


def test_sizes_may_be_numbers_of_numpy():
    sizes = np.array([5, 1, 16, 3])
    x, context = torch.randn(7, 5), torch.randn(7, 3)
    for layer in (RobustSplineCoupling(*sizes), RobustSplineAutoregressive(*sizes)):
        assert layer(x, context)[0].shape == (7, 5)
    block = RobustGlowBlock(*np.array([6, 8, 3]))
    assert block(torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4))[0].shape == (2, 6, 4, 4)


def test_registers_into_the_flows_of_normflows():
    flowguard.register("normflows")
    try:
        assert nf.flows.RobustSplineCoupling is RobustSplineCoupling
        assert nf.flows.RobustGlowBlock is RobustGlowBlock
    finally:
        flowguard.unregister("normflows")
    assert not hasattr(nf.flows, "RobustGlowBlock")


# normflows' own test classes, with our layers in the place of theirs

SWAPPED = {
    "normflows.flows.affine.glow_test": {"GlowBlock": RobustGlowBlock},
    "normflows.flows.neural_spline.wrapper_test": {
        "CoupledRationalQuadraticSpline": RobustSplineCoupling,
        "AutoregressiveRationalQuadraticSpline": RobustSplineAutoregressive,
    },
    "normflows.core_test": {
        "GlowBlock": RobustGlowBlock,
        "MultiscaleFlow": ConditionalMultiscaleFlow,
        "AutoregressiveRationalQuadraticSpline": RobustSplineAutoregressive,
    },
}


@pytest.mark.parametrize("name", SWAPPED)
@pytest.mark.filterwarnings("ignore")
def test_hosts_own_test_classes(name, monkeypatch):
    module = importlib.import_module(name)
    for swapped, ours in SWAPPED[name].items():
        monkeypatch.setattr(module, swapped, ours)
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
    assert result.testsRun > 0
    assert [trace for _, trace in result.failures + result.errors] == []


@pytest.mark.parametrize("context", [None, 2])
def test_each_unit_is_worked_out_once(context, monkeypatch):
    seen, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda b, w, h: seen.append(len(w)) or addmm(b, w, h))
    layer = RobustSplineAutoregressive(5, 2, 16, context, num_bins=4)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            layer(torch.randn(9, 5), context and torch.randn(9, context))
    # Of five masked layers, and of ten numbers for each feature.
    assert sum(seen) == 2 * (5 * 16 + 5 * 10)


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("context", [None, 2])
def test_features_are_worked_out_once_with_the_same_result(permute, context, monkeypatch):
    torch.manual_seed(0)
    counted, spline = [], flowguard.RobustSpline._spline

    def counting(self, x, inverse, steep):
        counted.append(x.numel())
        return spline(self, x, inverse, steep)

    layer = RobustSplineAutoregressive(
        5, 2, 16, context, permute_mask=permute, init_identity=False
    ).double()
    z, c = torch.randn(9, 5).double(), context and torch.randn(9, context).double()
    monkeypatch.setattr(flowguard.RobustSpline, "_spline", counting)
    new = layer(z, c)
    assert sum(counted) == 9 * 5
    hook = layer.net.register_forward_hook(lambda *_: None)  # which wants all of its output
    old = layer(z, c)
    hook.remove()
    assert sum(counted) == 9 * 5 * (1 + 5)
    for a, b in zip(new, old, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    grads = [
        torch.autograd.grad(x.square().sum() + ladj.sum(), layer.net.parameters())
        for x, ladj in (new, old)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-7)
