r"""Laws of the image layers and of the multiscale flow."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from torch.autograd import gradcheck
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from flowguard.functional import FINE_SLOPE
from flowguard.image import (
    ActNorm,
    ConditionalCoupling,
    ConditionalMultiscaleFlow,
    FixedConv1x1,
    FlowStep,
    InvertibleConv1x1,
    OrthogonalConv1x1,
    Robust,
    Split,
    Squeeze,
    TransitionStep,
    ZeroConv2d,
    elementwise,
)
from flowguard.image.layers import folded, laid_out, pixelwise
from flowguard.image.maps import Affine, apply, work_out

COUPLINGS = {
    "affine": "affine",
    "reparametrized": "reparametrized",
    "bspline": "bspline",
    "robust": "robust",
    "robust, 5 bins": Robust(bins=5, bound=2.0, shift_bound=0.5),
    "robust, published": Robust(bound=0.5, shift_bound=None, slope=None),
}


class Alone(torch.nn.Module):
    """A layer that takes no context."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, context=None):
        return self.layer(x)

    def inverse(self, z, context=None):
        return self.layer.inverse(z)


LAYERS = {
    "Squeeze": lambda c: Squeeze(),
    "ActNorm": lambda c: ActNorm(12),
    "InvertibleConv1x1": lambda c: InvertibleConv1x1(12),
    **{
        f"ConditionalCoupling ({name})": lambda c, value=value: ConditionalCoupling(
            12, 5, hidden=8, coupling=value
        )
        for name, value in COUPLINGS.items()
    },
    "ConditionalCoupling (odd channels)": lambda c: ConditionalCoupling(7, 5, hidden=8),
    "FlowStep": lambda c: FlowStep(12, 5, hidden=8),
    "TransitionStep": lambda c: Alone(TransitionStep(12)),
}
# A chain of convolutions in float32 loses a few digits; in float64 next to none.
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}
DTYPES = (torch.float32, torch.float64)


def shaken(module, x, context=None, scale=0.1):
    """The module initialised on x, then away from its special start."""
    module.train()
    module(x, context) if context is not None else module(x)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module.eval()


def layer_and_input(name, dtype, batch=3):
    layer = LAYERS[name](None).to(dtype)
    channels = 7 if "odd" in name else 12
    x = torch.randn(batch, channels, 4, 6, dtype=dtype)
    context = torch.randn(batch, 5, 4, 6, dtype=dtype)
    return shaken(layer, x, context), x, context


@pytest.mark.parametrize("make", [InvertibleConv1x1, OrthogonalConv1x1, FixedConv1x1])
def test_mixing_is_exact_where_products_are_of_medium_precision(make, medium):
    layer, x = make(12), torch.randn(3, 12, 4, 6)
    expected, _ = layer(x)
    with medium():
        z, _ = layer(x)
        back, _ = layer.inverse(z)
    assert torch.equal(z, expected)
    assert torch.equal(back, layer.inverse(z)[0])


@torch.no_grad()
def test_the_round_trip_of_a_flow_at_medium_precision_is_that_of_float32(medium):
    flow = ConditionalMultiscaleFlow(3, 4, levels=2, steps=3, hidden=16)
    x = torch.rand(4, 3, 16, 16)
    context = [torch.randn(4, 4, 8, 8), torch.randn(4, 4, 4, 4)]
    flow(x, context)  # initialises
    for p in flow.parameters():
        p.add_(0.02 * torch.randn_like(p))
    flow.eval()

    def lost():
        back, _ = flow.inverse(flow(x, context)[0], context)
        return float((back - x).square().mean().sqrt())

    exact = lost()
    with medium():
        assert lost() < 10 * exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_invert_and_their_ladj_cancel(name, dtype):
    layer, x, context = layer_and_input(name, dtype)
    z, ladj = layer(x, context)
    back, inverse_ladj = layer.inverse(z, context)
    assert z.dtype == ladj.dtype == dtype
    assert ladj.shape == (3,)
    assert (back - x).abs().max() < TOLERANCE[dtype]
    assert (ladj + inverse_ladj).abs().max() < 100 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", LAYERS)
def test_ladj_of_layers_is_that_of_the_jacobian(name):
    layer, x, context = layer_and_input(name, torch.float64, batch=1)
    for direction in (layer.forward, layer.inverse):
        jacobian = torch.autograd.functional.jacobian(lambda v, f=direction: f(v, context)[0], x)
        jacobian = jacobian.reshape(x.numel(), x.numel())
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert torch.allclose(direction(x, context)[1], expected, atol=1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_an_empty_batch(name):
    layer, x, context = layer_and_input(name, torch.float32)
    z, ladj = layer(x[:0], context[:0])
    assert z.shape[0] == 0
    assert ladj.shape == (0,)
    back, _ = layer.inverse(z, context[:0])
    assert back.shape == x[:0].shape


@pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
def test_couplings_start_as_they_should(coupling):
    x, context = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4)
    z, ladj = ConditionalCoupling(6, 3, hidden=8, coupling=coupling)(x, context)
    if isinstance(coupling, Robust) or coupling == "robust":
        assert torch.allclose(z, x, atol=1e-6)
        assert torch.allclose(ladj, torch.zeros(2), atol=1e-4)
    else:
        assert torch.isfinite(z).all()


def test_the_self_conditional_half_reads_the_first_half_and_the_context():
    layer, x, context = layer_and_input("ConditionalCoupling (robust)", torch.float64)
    z, _ = layer(x, context)
    other, _ = layer(x, context + 1)
    assert (z[:, :6] - other[:, :6]).abs().max() > 1e-3  # feature-conditional half
    moved = x.clone()
    moved[:, 0] += 1
    changed = layer(moved, context)[0] - z
    assert changed[:, 6:].abs().max() > 1e-4
    assert changed[:, 1:6].abs().max() == 0  # channels of the first half do not see each other


def test_squeeze_is_its_own_definition():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    z, _ = Squeeze()(x)
    assert torch.equal(z[0, :, 0, 0], torch.tensor([0.0, 1.0, 4.0, 5.0]))


class TestActNorm:
    def test_first_training_batch_gets_mean_zero_and_variance_one(self):
        x = 3 * torch.randn(8, 5, 6, 6) + torch.arange(5.0).reshape(1, 5, 1, 1)
        z, _ = ActNorm(5)(x)
        assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(5), atol=1e-5)
        assert torch.allclose(z.std((0, 2, 3), correction=0), torch.ones(5), atol=1e-4)

    def test_a_second_batch_changes_nothing(self):
        layer = ActNorm(2)
        layer(torch.randn(4, 2, 3, 3))
        bias = layer.bias.clone()
        layer(torch.randn(4, 2, 3, 3) + 10)
        assert torch.equal(layer.bias, bias)

    def test_evaluation_does_not_initialise(self):
        layer = ActNorm(2).eval()
        x = torch.randn(4, 2, 3, 3) + 5
        assert torch.equal(layer(x)[0], x)
        assert not layer.initialized

    def test_being_initialised_is_saved_and_loaded(self):
        layer = ActNorm(2)
        layer(torch.randn(4, 2, 3, 3) + 5)
        fresh = ActNorm(2)
        fresh.load_state_dict(load(save(layer.state_dict())))
        x = torch.randn(4, 2, 3, 3) - 7
        assert torch.equal(fresh(x)[0], layer(x)[0])  # in training mode

    def test_a_constant_channel_is_only_shifted(self):
        layer = ActNorm(1)
        z, ladj = layer(torch.full((2, 1, 4, 4), 7.0))
        assert torch.equal(z, torch.zeros(2, 1, 4, 4))
        assert torch.equal(ladj, torch.zeros(2))

    def test_a_batch_that_is_not_finite_does_not_initialise(self):
        layer = ActNorm(1)
        layer(torch.full((2, 1, 4, 4), torch.nan))
        assert not layer.initialized
        z, _ = layer(torch.randn(64, 1, 4, 4) + 5)
        assert z.mean().abs() < 1e-5

    def test_a_buffer_written_by_hand_counts(self):
        """As by an average of weights, or by a broadcast among processes."""
        trained, other = ActNorm(1), ActNorm(1)
        trained(torch.randn(64, 1, 4, 4) + 5)
        with torch.no_grad():
            for a, b in zip(other.parameters(), trained.parameters(), strict=True):
                a.copy_(b)
        other.initialized.copy_(trained.initialized)
        x = torch.randn(2, 1, 4, 4)
        assert torch.equal(other(x)[0], trained(x)[0])


def test_the_1x1_convolution_starts_as_a_rotation():
    layer = InvertibleConv1x1(16).double()
    w = layer.weight
    assert torch.allclose(w @ w.T, torch.eye(16, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("mix", ["free", "orthogonal"])
def test_weights_are_saved_as_they_are(mix):
    flow = ConditionalMultiscaleFlow(3, 5, levels=2, steps=1, hidden=4, mix=mix)
    state = flow.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in load(save(state)).items())


def test_zero_conv_gain_scales_the_output():
    layer = ZeroConv2d(3, 2)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(1, 3, 4, 4)
    before = layer(x)
    torch.nn.init.constant_(layer.logs, 0.5)
    assert torch.allclose(layer(x), before * torch.exp(torch.tensor(1.5)), rtol=1e-4)


def test_a_fixed_convolution_undoes_itself_and_is_not_trained():
    layer = FixedConv1x1(12)
    x = torch.randn(2, 12, 4, 6)
    z, ladj = layer(x)
    assert torch.allclose(layer.inverse(z)[0], x, atol=1e-5)
    assert torch.equal(ladj, torch.zeros(2))
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"weight", "transpose"}


@pytest.mark.parametrize("bias", [None, torch.randn(5)], ids=["without", "with"])
def test_pixelwise_products_are_1x1_convolutions(bias):
    x, matrix = torch.randn(3, 4, 6, 5), torch.randn(5, 4)
    expected = torch.nn.functional.conv2d(x, matrix[:, :, None, None], bias)
    assert torch.allclose(pixelwise(x, matrix, bias), expected, atol=1e-5)


def test_only_convolutions_can_be_folded():
    with pytest.raises(TypeError, match="only convolutions can be folded; got Linear"):
        folded(torch.nn.Linear(2, 2))


class TestSplit:
    @pytest.mark.parametrize(("share", "dropped"), [(0.5, 6), (0.25, 3), (0.9, 10), (0.01, 1)])
    def test_share_of_the_channels_that_leave(self, share, dropped):
        split = Split(12, share=share)
        x = torch.randn(2, 12, 4, 6)
        kept, latent, _ = split(x)
        assert (kept.shape[1], latent.shape[1]) == (12 - dropped, dropped)
        assert torch.allclose(split.inverse(kept, latent)[0], x, atol=1e-6)

    def test_a_tamed_prior_is_as_it_was_within_its_bounds(self):
        free = Split(12, 5, mean_bound=None, scale_bound=None)
        torch.nn.init.normal_(free.net.weight, std=0.1)
        x, context = torch.randn(2, 12, 4, 4), torch.randn(2, 5, 4, 4)
        before = free(x, context)
        free.tame(20.0, 20.0)
        after = free(x, context)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        mean, logs = free.prior(1e6 * x[:, :6], context)
        assert mean.abs().max() <= 20
        assert logs.abs().max() <= 20

    def test_mistakes_are_told(self):
        with pytest.raises(ValueError, match="a share between 0 and 1; got 12 and 1"):
            Split(12, share=1.0)
        with pytest.raises(ValueError, match="needs a context"):
            Split(12, 5)(torch.randn(1, 12, 2, 2))

    def split(self):
        split = Split(12, 5).double()
        x = torch.randn(2, 12, 4, 6, dtype=torch.float64)
        context = torch.randn(2, 5, 4, 6, dtype=torch.float64)
        with torch.no_grad():
            for p in split.parameters():
                p.normal_(0, 0.3)
        return split, x, context

    def test_inverts(self):
        split, x, context = self.split()
        kept, latent, ladj = split(x, context)
        back, inverse_ladj = split.inverse(kept, latent, context)
        assert torch.allclose(back, x)
        assert torch.allclose(ladj, -inverse_ladj)

    def test_ladj_is_that_of_the_latent_given_the_rest(self):
        split, x, context = self.split()
        x, context = x[:1], context[:1]
        kept, dropped = x[:, :6], x[:, 6:]

        def latent(d):
            return split(torch.cat((kept, d), 1), context)[1]

        jacobian = torch.autograd.functional.jacobian(latent, dropped)
        expected = torch.linalg.slogdet(jacobian.reshape(dropped.numel(), -1)).logabsdet
        assert torch.allclose(split(x, context)[2], expected)

    @pytest.mark.parametrize("size", [1e3, 1e30])
    def test_the_inverse_is_bounded_for_every_context(self, size):
        split = Split(12, 5)
        with torch.no_grad():
            split.net.weight.normal_(0, 1)
        kept, latent = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
        x, _ = split.inverse(kept, latent, size * torch.randn(2, 5, 4, 4))
        bound = split.mean_bound + latent.abs().max() * torch.e**split.scale_bound
        assert x[:, 6:].abs().max() <= bound * (1 + 1e-6)


def flow_and_input(coupling, dtype=torch.float64, size=(8, 12), batch=3, levels=2):
    flow = ConditionalMultiscaleFlow(3, 5, levels=levels, steps=2, hidden=8, coupling=coupling)
    flow = flow.to(dtype)
    x = torch.randn(batch, 3, *size, dtype=dtype)
    context = [
        torch.randn(batch, 5, size[0] >> k, size[1] >> k, dtype=dtype)
        for k in range(1, levels + 1)
    ]
    return shaken(flow, x, context, 0.1), x, context


class TestMultiscaleFlow:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [(8, 8), (4, 20), (16, 12)], ids=str)
    @pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
    def test_inverts_at_any_size(self, coupling, size, dtype):
        flow, x, context = flow_and_input(coupling, dtype, size)
        latents, ladj = flow(x, context)
        back, inverse_ladj = flow.inverse(latents, context)
        assert [tuple(z.shape[1:]) for z in latents] == flow.latent_shapes(*size)
        assert (back - x).abs().max() < 10 * TOLERANCE[dtype]
        assert (ladj + inverse_ladj).abs().max() < 1000 * TOLERANCE[dtype]

    @pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
    def test_ladj_is_that_of_the_jacobian(self, coupling):
        flow, x, context = flow_and_input(coupling, size=(4, 8), batch=1)

        def flat(v):
            return torch.cat([z.flatten() for z in flow(v, context)[0]])

        jacobian = torch.autograd.functional.jacobian(flat, x).reshape(x.numel(), x.numel())
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert torch.allclose(flow(x, context)[1], expected, atol=1e-8)

    def test_dimensions_are_kept(self):
        flow, x, context = flow_and_input("robust", levels=3, size=(16, 24))
        assert sum(z.numel() for z in flow(x, context)[0]) == x.numel()

    def test_log_prob_is_a_density(self):
        """Importance sampling: the mean of p(x) / q(x) over draws from q is 1."""
        flow = ConditionalMultiscaleFlow(1, 2, levels=1, steps=1, hidden=4).double()
        context = [torch.randn(1, 2, 1, 1, dtype=torch.float64)]
        shaken(flow, torch.randn(8, 1, 2, 2).double(), context, 0.3)
        q = torch.distributions.Normal(0.0, 3.0)
        x = q.sample((300000, 1, 2, 2)).double()
        with torch.no_grad():
            log_p = flow.log_prob(x, context)
        weights = torch.exp(log_p - q.log_prob(x).sum((1, 2, 3)))
        error = weights.std() / len(weights) ** 0.5
        assert error < 0.02
        assert abs(weights.mean() - 1) < 4 * error

    def test_shared_condition_agrees_with_the_plain_path(self):
        flow, x, context = flow_and_input("robust")
        one = [c[:1] for c in context]
        latents = flow(x, context)[0]
        condition = flow.condition(one)
        several = flow.inverse(latents, condition)[0]
        single = torch.cat(
            [flow.inverse([z[i : i + 1] for z in latents], one)[0] for i in range(3)]
        )
        assert torch.allclose(several, single, atol=1e-12)

    def test_every_parameter_gets_a_finite_gradient(self):
        flow, x, context = flow_and_input("robust", torch.float32)
        flow.log_prob(x, context).sum().backward()
        for name, p in flow.named_parameters():
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name

    def test_reloads(self):
        flow, x, context = flow_and_input("robust", torch.float32)
        stream = io.BytesIO()
        torch.save(flow.state_dict(), stream)
        stream.seek(0)
        fresh = ConditionalMultiscaleFlow(3, 5, levels=2, steps=2, hidden=8)
        fresh.load_state_dict(torch.load(stream, weights_only=True))
        assert torch.equal(fresh.log_prob(x, context), flow.log_prob(x, context))

    def test_the_robust_flow_stays_finite_where_the_affine_one_explodes(self):
        """Weights such as training may leave them, contexts far away."""
        largest = {}
        for coupling in ("affine", "robust"):
            torch.manual_seed(1)
            flow, x, context = flow_and_input(coupling, torch.float32)
            with torch.no_grad():
                latents = flow(x, context)[0]
                far = flow.inverse(latents, [1e4 * c for c in context])[0]
            largest[coupling] = far.abs().nan_to_num(torch.inf).max()
        assert largest["affine"] > 1e6
        assert largest["robust"] < 1e3

    def test_contiguity_does_not_matter(self):
        flow, x, context = flow_and_input("robust")
        strided = x.to(memory_format=torch.channels_last)
        assert torch.allclose(flow(strided, context)[1], flow(x, context)[1])


FLOW = ConditionalMultiscaleFlow(3, 5, levels=2, steps=1, hidden=4)
CONTEXT = [torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 2, 2)]
IMAGE = torch.zeros(1, 3, 8, 8)
ERRORS = {
    "size": (lambda: FLOW(torch.zeros(1, 3, 6, 8), CONTEXT), ValueError, "multiples of 4"),
    "no context": (lambda: FLOW(IMAGE), ValueError, "needs a context"),
    "context is a tensor": (lambda: FLOW(IMAGE, CONTEXT[0]), TypeError, "one map for each level"),
    "levels": (lambda: FLOW(IMAGE, CONTEXT[:1]), ValueError, "each of the 2 levels; got 1"),
    "context channels": (
        lambda: FLOW(IMAGE, [c[:, :4] for c in CONTEXT]),
        ValueError,
        r"\(B, 5, H, W\)",
    ),
    "context size": (
        lambda: FLOW(IMAGE, [CONTEXT[0], CONTEXT[0]]),
        ValueError,
        "size .2, 2. of the image at this level",
    ),
    "rows": (
        lambda: FLOW(IMAGE.expand(3, -1, -1, -1), [c.expand(2, -1, -1, -1) for c in CONTEXT]),
        ValueError,
        "multiple of the contexts",
    ),
    "latents": (lambda: FLOW.inverse([IMAGE], CONTEXT), ValueError, "one latent for each"),
    "coupling name": (lambda: elementwise("afine"), ValueError, "affine, bspline"),
    "coupling type": (lambda: elementwise(3), TypeError, "name, an object"),
    "channels": (lambda: ConditionalCoupling(1, 5), ValueError, "at least 2 channels"),
    "odd size": (lambda: Squeeze()(torch.zeros(1, 3, 3, 4)), ValueError, "multiples of 2"),
    "no levels": (lambda: ConditionalMultiscaleFlow(3, 5, levels=0), ValueError, "positive"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_mistakes_are_told(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_rotation_made_in_float32_is_one_in_float64():
    layer = OrthogonalConv1x1(24).double()
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64)
    z, ladj = layer(x)
    assert torch.allclose(layer.inverse(z)[0], x, atol=1e-12)
    assert torch.allclose(torch.linalg.slogdet(layer.weight)[1], ladj[0] / 9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_that_are_worked_out_give_the_same_map(dtype):
    family = Robust(bound=2.0, shift_bound=0.7)
    raw = 3 * torch.randn(2, 5 * 4, 6, 7, dtype=dtype)
    x = 2 * torch.randn(2, 5, 6, 7, dtype=dtype)
    before = raw.clone()
    ready, parameters = work_out(family, raw, 5)
    assert ready != family
    assert parameters.shape == raw.shape
    assert torch.equal(raw, before)
    replaced = work_out(family, before, 5, overwrite=True)[1]
    assert replaced is before
    assert torch.equal(replaced, parameters)
    for inverse in (False, True):
        with torch.no_grad():
            y, ladj = apply(family, x, raw, inverse=inverse)
            z, other = apply(ready, x, parameters, inverse=inverse)
            value, nothing = apply(ready, x, parameters, inverse=inverse, ladj=False)
        assert torch.equal(z, y)
        assert torch.equal(other, ladj)
        assert torch.equal(value, y)
        assert nothing.isnan().all()
        if dtype == torch.float64:
            inputs = x[:, :, :2, :2].clone().requires_grad_()

            def call(x, inverse=inverse):
                return apply(ready, x, parameters[..., :2, :2], inverse=inverse)

            assert gradcheck(call, (inputs,), fast_mode=True)
            torch.testing.assert_close(call(inputs)[0], y[..., :2, :2])


def test_only_two_bins_are_worked_out():
    raw = torch.randn(1, 3 * 7, 2, 2)
    for family, numbers in ((Robust(bins=3), raw), (Affine(), raw[:, :6])):
        assert work_out(family, numbers, 3) == (family, numbers)


def test_least_slope_of_images():
    assert Robust().slope == FINE_SLOPE
    family = ConditionalMultiscaleFlow(3, 2, levels=1, steps=1, hidden=4).steps[0][0].coupling.map
    assert family.slope == FINE_SLOPE


def test_a_callable_stands_for_the_map_that_it_makes():
    assert elementwise(Robust) == Robust()
    assert elementwise(partial(Robust, bins=8)) == Robust(bins=8)
    assert elementwise(lambda: Affine(eps=0.1)) == Affine(eps=0.1)
    layer = ConditionalCoupling(4, 2, hidden=4, coupling=partial(Robust, bound=2.0))
    assert layer.map == Robust(bound=2.0)
    with pytest.raises(TypeError, match="callable that makes one; got int"):
        elementwise(lambda: 3)


# -- conditions know whose they are -----------------------------------------------------------


def a_condition(**options):
    torch.manual_seed(0)
    flow = ConditionalMultiscaleFlow(3, 5, levels=2, steps=2, hidden=4, **options).eval()
    with torch.no_grad():
        condition = flow.condition([torch.randn(1, 5, 4, 4), torch.randn(1, 5, 2, 2)])
    return flow, condition


def use(flow, condition):
    z = [torch.zeros(1, 6, 4, 4), torch.zeros(1, 24, 2, 2)]
    with torch.no_grad():
        x, _ = flow.inverse([t.to(condition.features[0].dtype) for t in z], condition)
        flow(x, condition)
    return x


def a_step(flow, optimizer=torch.optim.Adam):
    for p in flow.parameters():
        p.grad = torch.ones_like(p)
    optimizer(flow.parameters(), lr=0.1).step()


def other_weights(flow):
    torch.manual_seed(1)
    return ConditionalMultiscaleFlow(3, 5, levels=2, steps=2, hidden=4).state_dict()


@torch.no_grad()
def swap_data(flow):
    for _ in range(2):  # what comes second may lie where the first was
        for p in flow.parameters():
            p.data = p.data.clone().mul_(2)


@torch.no_grad()
def swap_layer(flow):
    flow.steps[0][1].coupling.rest[1] = torch.nn.Conv2d(4, 4, 1)


@torch.no_grad()
def add_units(flow):
    flow.steps[0][1].coupling.add_module("injector_units", torch.nn.Identity())


@torch.inference_mode()
def change_in_inference_mode(flow):
    flow.steps[1][0].mix.weight.mul_(2)


def swap(name):
    def change(flow):
        flow.set_submodule(name, copy.deepcopy(flow.get_submodule(name)))

    return change


CHANGES = {
    "a step of training": a_step,
    "a step of SGD": lambda flow: a_step(flow, torch.optim.SGD),
    "one parameter": lambda flow: torch.nn.init.ones_(flow.steps[1][0].coupling.rest[3].logs),
    "a transition": lambda flow: torch.nn.init.ones_(flow.transitions[1][0].actnorm.logs),
    "other weights": lambda flow: flow.load_state_dict(other_weights(flow), strict=False),
    "other tensors": lambda flow: flow.load_state_dict(
        {**flow.state_dict(), **other_weights(flow)}, strict=True, assign=True
    ),
    "other data": swap_data,
    "another dtype": lambda flow: flow.double(),
    "to and fro": lambda flow: flow.half().float(),
    "another layer": swap_layer,
    "another step": swap("steps.0.1"),
    "a level": swap("steps.0"),
    "another coupling": swap("steps.0.1.coupling"),
    "another transition": swap("transitions.0.0"),
    "one step more": lambda flow: flow.steps[0].append(copy.deepcopy(flow.steps[0][0])),
    "a split": lambda flow: torch.nn.init.ones_(flow.splits[0].net.logs),
    "another map": add_units,
    "in inference mode": change_in_inference_mode,
}


@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_condition_is_refused_once_the_weights_change(change, grad):
    flow, condition = a_condition(transition_steps=1)
    if grad:
        condition = flow.condition(condition.features)
    use(flow, condition)
    use(flow, condition)
    change(flow)
    with pytest.raises(
        ValueError, match=r"weights that it was made with; got .*condition\(\.\.\."
    ):
        use(flow, condition)


OTHERS = {
    "another flow": lambda flow: ConditionalMultiscaleFlow(3, 5, levels=2, steps=2, hidden=4),
    "a copy": copy.deepcopy,
    "a shallow copy": copy.copy,
    "a pickle": lambda flow: pickle.loads(pickle.dumps(flow)),
    "a replica": lambda flow: flow._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_condition_is_refused_by_others(other):
    flow, condition = a_condition()
    with pytest.raises(ValueError, match="that made it; got one of another"):
        use(other(flow).eval(), condition)
    use(flow, condition)


def test_a_condition_is_copied_with_its_origin_and_pickled_without():
    flow, condition = a_condition()
    use(flow, copy.deepcopy(condition))
    copies = copy.deepcopy([flow, condition])
    with pytest.raises(ValueError, match="that made it; got one of another"):
        use(*copies)
    again = pickle.loads(pickle.dumps(condition))
    with pytest.raises(ValueError, match=r"of which that is not known.*sign\(condition\)"):
        use(flow, again)
    use(flow, flow.sign(again))


def test_what_is_no_weight_may_change():
    flow, condition = a_condition()
    flow.train()
    flow.requires_grad_(False)
    for p in flow.parameters():
        p.grad = torch.ones_like(p)
    use(flow.eval(), condition)


def test_a_condition_with_gradients_serves_until_the_step_of_training():
    flow, _ = a_condition()
    flow.train()
    optimizer = torch.optim.Adam(flow.parameters())
    condition = flow.condition([torch.randn(2, 5, 4, 4), torch.randn(2, 5, 2, 2)])
    x = torch.randn(2, 3, 8, 8)
    # The first batch initialises normalisations, which do not go into it.
    (-flow.log_prob(x, condition).sum() - flow.log_prob(x, condition).sum()).backward()
    assert flow.steps[0][0].coupling.injector[0].weight.grad is not None
    optimizer.step()
    with pytest.raises(ValueError, match="got one from before they changed"):
        flow.log_prob(x, condition)


def test_a_condition_knows_of_normalisations_that_the_first_batch_initialises():
    flow = ConditionalMultiscaleFlow(3, 5, levels=1, steps=1, hidden=4, normed=True)
    condition = flow.condition([torch.randn(2, 5, 4, 4)])
    x = torch.randn(2, 3, 8, 8)
    flow(x, condition)
    with pytest.raises(ValueError, match="got one from before they changed"):
        flow(x, condition)


@torch.no_grad()
def test_the_first_batch_initialises_without_gradients_too():
    flow = ConditionalMultiscaleFlow(3, 5, levels=1, steps=1, hidden=4)
    z, _ = flow(3 + 5 * torch.randn(4, 3, 8, 8), [torch.randn(4, 5, 4, 4)])
    assert bool(flow.steps[0][0].actnorm.initialized)
    assert abs(z[0].std() - 1) < 0.1


@torch.inference_mode()
def test_conditions_work_in_inference_mode():
    flow, condition = a_condition()  # of tensors that count no versions
    assert flow.steps[0][0].mix.weight.is_inference()
    x = use(flow, condition)
    assert torch.equal(use(flow, condition), x)
    flow.steps[0][0].mix.weight.mul_(2)
    with pytest.raises(ValueError, match="got one from before they changed"):
        use(flow, condition)


def test_conditions_of_ordinary_weights_work_in_inference_mode():
    flow, condition = a_condition()
    with torch.inference_mode():
        x = use(flow, condition)
        made = flow.condition([c.clone() for c in condition.features])
        assert torch.equal(use(flow, made), x)
    assert torch.equal(use(flow, made), x)


def test_conditions_work_under_autocast():
    flow, _ = a_condition()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        condition = flow.condition([torch.randn(1, 5, 4, 4), torch.randn(1, 5, 2, 2)])
        inside = use(flow, condition)
    assert (use(flow, condition) - inside).abs().max() < 0.1


def test_replicas_make_conditions_of_their_own():
    flow, condition = a_condition()
    replica = flow._replicate_for_data_parallel()
    with torch.no_grad():
        own = replica.condition(condition.features)
    assert torch.equal(use(replica, own), use(flow, condition))


class Density(torch.nn.Module):
    r"""A density that makes its condition itself."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, context):
        return self.flow.log_prob(x, self.flow.condition(context)).sum()


def test_transforms_of_functions_make_conditions():
    density = Density(a_condition()[0])
    inputs = torch.randn(1, 3, 8, 8), [torch.randn(1, 5, 4, 4), torch.randn(1, 5, 2, 2)]
    weights = {n: p.detach() for n, p in density.named_parameters()}
    gradients = torch.func.grad(torch.func.functional_call, argnums=1)(density, weights, inputs)
    assert all(torch.isfinite(g).all() for g in gradients.values())


class Batched(TorchDispatchMode):
    """Records the factorisations by LU, and backward ones, that are given more than a matrix."""

    NAMES = ("linalg_inv", "slogdet", "linalg_det", "linalg_lu", "linalg_solve_ex")

    def __init__(self):
        super().__init__()
        self.single, self.batches = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in self.NAMES):
            shape = tuple(args[0].shape)
            self.single += len(shape) == 2
            self.batches += [(func.name(), shape)] * (len(shape) > 2)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mix", ["free", "orthogonal", "fixed"])
def test_matrices_are_factorised_one_by_one(mix):
    # A batch of large ones never returns with two threads on some processors.
    options = {"levels": 2, "steps": 3, "hidden": 8, "transition_steps": 2, "mix": mix}
    flow = ConditionalMultiscaleFlow(3, 4, **options)
    x = torch.randn(2, 3, 8, 8)
    context = [torch.randn(2, 4, 4, 4), torch.randn(2, 4, 2, 2)]
    with Batched() as seen:
        flow.log_prob(x, context).sum().backward()
        with torch.no_grad():
            condition = flow.condition(context)
            flow.inverse(flow(x, condition)[0], condition)
    assert seen.batches == []
    assert (seen.single > 0) == (mix != "fixed")


def test_compiled_code_takes_conditions_and_does_not_ask():
    flow, condition = a_condition()
    torch._dynamo.reset()
    encode = torch.compile(flow.forward, fullgraph=True, backend="eager")
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        z, _ = encode(x, condition)
        expected, _ = flow(x, condition)
        condition_of = torch.compile(flow.condition, backend="eager")
        made = condition_of(condition.features)
    torch.testing.assert_close(z, expected)
    with pytest.raises(ValueError, match=r"of which that is not known.*sign\(condition\)"):
        use(flow, made)  # nobody knows of which weights
    assert torch.equal(use(flow, flow.sign(made)), use(flow, condition))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda f, x, c: f(x, 3),
            r"context must be a list of tensors, one map for each level, .*; got int",
        ),
        (lambda f, x, c: f(x, c[0]), r"list of tensors, one map for each level, .*; got Tensor"),
        (lambda f, x, c: f(x, [None, c[1]]), r"got list of \['NoneType', 'Tensor'\]"),
        (
            lambda f, x, c: f.condition(zip(c)),
            r"list of tensors, one map for each level, .*; got zip",
        ),
        (lambda f, x, c: f.inverse(3, c), r"latents must be a list of tensors; got int"),
        (lambda f, x, c: f(x[0], c), r"x must have shape \(B, C, H, W\); got \(3, 8, 8\)"),
    ],
    ids=["a number", "a tensor", "no tensor", "an iterator", "latents", "one image"],
)
def test_what_is_no_list_of_tensors_is_named(call, match):
    flow, condition = a_condition()
    with pytest.raises((TypeError, ValueError), match=match):
        call(flow, torch.rand(1, 3, 8, 8), condition.features)


# -- layout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, torch.randn(7)], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (1, 5, 1, 1), (0, 5, 4, 6), (3, 1, 2, 2)])
def test_pixels_are_multiplied_in_both_layouts(shape, bias):
    x, matrix = torch.randn(shape), torch.randn(7, shape[1])
    expected = torch.nn.functional.conv2d(x, matrix[..., None, None], bias)
    for given in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        torch.testing.assert_close(pixelwise(given, matrix, bias), expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_channels_of_a_pixel_together(half):
    flow, _ = a_condition()
    context = [torch.randn(1, 5, 4, 4), torch.randn(1, 5, 2, 2)]
    with torch.no_grad(), torch.autocast("cpu", half):
        steps = [s for level in flow.condition(context).steps for s in level]
    for step in steps:
        assert step.hidden.dtype == half
        assert step.hidden.movedim(1, -1).is_contiguous()
        assert step.injected.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precision_keeps_the_pixels_of_a_channel_together(dtype):
    x = torch.randn(1, 3, 4, 5)
    for given in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        assert laid_out(given, dtype).is_contiguous()
        assert not laid_out(given, torch.bfloat16).is_contiguous()


def test_samples_are_taken_under_vmap():
    flow, _ = a_condition()
    context = [torch.randn(1, 5, 4, 4), torch.randn(1, 5, 2, 2)]
    z = [torch.randn(3, 1, *shape) for shape in flow.latent_shapes(8, 8)]
    with torch.no_grad():
        condition = flow.condition(context)
        together = torch.func.vmap(lambda *z: flow.inverse(z, condition, ladj=False)[0])(*z)
        for i in range(3):
            alone, _ = flow.inverse([t[i] for t in z], condition)
            torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-5)


def changed_flow(change, normed=False):
    """A flow away from its start, whose first step has been changed by somebody."""
    torch.manual_seed(0)
    flow = ConditionalMultiscaleFlow(
        3, 5, levels=1, steps=3, hidden=8, normed=normed, transition_steps=1
    )
    x, context = torch.randn(2, 3, 8, 8).double(), [torch.randn(2, 5, 4, 4).double()]
    shaken(flow.double(), x, context, scale=0.03)
    change(flow.steps[0][0])
    return flow.double().eval(), x, context


class Free(torch.nn.Module):
    """A 1×1 convolution of a user's own."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(4 * torch.linalg.qr(torch.randn(12, 12))[0])

    def forward(self, x, context=None):
        ladj = torch.linalg.slogdet(self.weight)[1] * x[0, 0].numel()
        return torch.einsum("ij,bjhw->bihw", self.weight, x), ladj.expand(len(x))

    def inverse(self, z, context=None):
        ladj = torch.linalg.slogdet(self.weight)[1] * z[0, 0].numel()
        return torch.einsum("ij,bjhw->bihw", self.weight.inverse(), z), -ladj.expand(len(z))


def replace_first(part, layer):
    def change(step):
        net = getattr(step.coupling, part)
        net[1 if part == "rest" else 0] = layer()

    return change


def append_activation(step):
    step.coupling.injector.append(torch.nn.ReLU())


def hook(name):
    return lambda step: step.get_submodule(name).register_forward_hook(lambda m, i, o: 0.5 * o)


def pruned(step):
    for module in step.modules():
        if isinstance(module, torch.nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount=0.3)


def around(step):
    conv = step.coupling.first_kept
    conv._conv_forward = lambda x, weight, bias: torch.nn.functional.conv2d(
        torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias
    )


def patched(step):
    before = step.coupling.condition

    def condition(context, noise=None):
        made = before(context, noise)
        return made._replace(hidden=0.5 * made.hidden)

    step.coupling.condition = condition


def weight_norm(step):
    torch.nn.utils.parametrizations.weight_norm(step.coupling.first_context)
    torch.nn.utils.parametrizations.spectral_norm(step.coupling.first_kept)


CHANGED = {
    "another 1×1 convolution": lambda step: setattr(step, "mix", OrthogonalConv1x1(12)),
    "a user's 1×1 convolution": lambda step: setattr(step, "mix", Free()),
    "dilation": replace_first("injector", lambda: torch.nn.Conv2d(5, 8, 3, padding=2, dilation=2)),
    "groups": replace_first("rest", lambda: torch.nn.Conv2d(8, 8, 1, groups=4)),
    "padding": replace_first(
        "injector", lambda: torch.nn.Conv2d(5, 8, 3, padding=1, padding_mode="reflect")
    ),
    "one layer more": append_activation,
    "a wider coupling": lambda step: setattr(
        step, "coupling", ConditionalCoupling(12, 5, hidden=16)
    ),
    "a hook of a network": hook("coupling.rest"),
    "a hook of an activation": hook("coupling.injector.1"),
    "a hook of the first layer": hook("coupling.first_context"),
    "a first layer with a bias": lambda step: setattr(
        step.coupling, "first_kept", torch.nn.Conv2d(6, 8, 3, padding=1)
    ),
    "another border": around,
    "a method of its own": patched,
    "pruned": pruned,
    "parametrised": weight_norm,
}


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_what_somebody_changed_counts_without_gradients_too(change, normed):
    flow, x, context = changed_flow(change, normed)
    z, ladj = flow(x, context)
    back, undone = flow.inverse(z, context)
    with torch.no_grad():
        told, told_ladj = flow(x, context)
        sampled, sampled_ladj = flow.inverse(z, context)
    pairs = [*zip(told, z, strict=True), (told_ladj, ladj), (sampled, back)]
    pairs += [(sampled_ladj, undone), (sampled, x)]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)


def test_hooks_of_norms_and_of_the_first_layer_are_called():
    flow, x, context = changed_flow(lambda step: None)
    step, heard = flow.steps[0][0], []
    for name in ("actnorm", "mix", "coupling.first_context", "coupling.injector.3"):
        step.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: heard.append(name)
        )
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            flow(x, context)
        assert sorted(heard) == ["actnorm", "coupling.first_context", "coupling.injector.3", "mix"]
        heard.clear()


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
def test_pruned_weights_load_and_train(normed):
    (one, x, context), (other, _, _) = (changed_flow(pruned, normed) for _ in range(2))
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.log_prob(x, context), one.log_prob(x, context))
    optimizer = torch.optim.SGD(one.parameters(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        one.log_prob(x, context).sum().backward()
        optimizer.step()
    assert one.steps[0][0].coupling.first_context.weight_orig.grad.abs().max() > 0
