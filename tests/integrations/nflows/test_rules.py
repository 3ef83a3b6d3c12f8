r"""Certificates and attacks know nflows' layers, and those of its fork in glasflow."""

import importlib
import importlib.util
import math
from itertools import islice

import pytest
import torch
import torch.nn as nn

import flowguard

try:
    from flowguard.integrations import nflows as ours
except ImportError:
    pytest.skip("neither nflows nor glasflow is installed", allow_module_level=True)


def available(host):
    try:
        importlib.import_module(f"{host}.transforms")
    except ImportError:
        return False
    return True


HOSTS = [host for host in ("nflows", "glasflow.nflows") if available(host)]
D, CONTEXT = 4, 3
MASK = [1, 0, 1, 0]
RADIUS = 3.0


@pytest.fixture(params=HOSTS)
def host(request):
    torch.manual_seed(0)
    return Host(request.param)


class Host:
    def __init__(self, name):
        self.T = importlib.import_module(f"{name}.transforms")
        self.nets = importlib.import_module(f"{name}.nn.nets")
        self.distributions = importlib.import_module(f"{name}.distributions")
        self.Flow = importlib.import_module(f"{name}.flows").Flow

    def net(self, i, o):
        return self.nets.ResidualNet(i, o, 16, context_features=CONTEXT)

    def flow(self, *layers, shape=(D,)):
        transform = self.T.CompositeTransform(layers)
        return self.Flow(transform, self.distributions.StandardNormal(shape)).eval()


def stir(layer, std=0.3):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(std * torch.randn_like(p))
    return layer


def batch_norm(host):
    layer = host.T.BatchNorm(D)
    layer.running_var.uniform_(0.3, 2)
    layer.running_mean.normal_()
    return stir(layer).eval()


#: Constant layers, and what makes one.
CONSTANT = {
    "ActNorm": lambda h: stir(h.T.ActNorm(D)),
    "BatchNorm": batch_norm,
    "HouseholderSequence": lambda h: stir(h.T.HouseholderSequence(D, 3)),
    "IdentityTransform": lambda h: h.T.IdentityTransform(),
    "LULinear": lambda h: stir(h.T.LULinear(D, identity_init=False)),
    "LULinear, cached": lambda h: stir(h.T.LULinear(D, using_cache=True)),
    "LeakyReLU": lambda h: h.T.LeakyReLU(0.3),
    "Permutation": lambda h: h.T.Permutation(torch.tensor([2, 0, 3, 1])),
    "PointwiseAffineTransform": lambda h: h.T.PointwiseAffineTransform(
        torch.randn(D), torch.rand(D) + 0.1
    ),
    "QRLinear": lambda h: stir(h.T.QRLinear(D, 3)),
    "RandomPermutation": lambda h: h.T.RandomPermutation(D),
    "ReversePermutation": lambda h: h.T.ReversePermutation(D),
    "SVDLinear": lambda h: stir(h.T.SVDLinear(D, 2, identity_init=False)),
    "scalar": lambda h: h.T.PointwiseAffineTransform(shift=1.0, scale=2.0),
    "composite": lambda h: h.T.CompositeTransform(
        [h.T.ActNorm(D), h.T.LULinear(D), h.T.ReversePermutation(D)]
    ),
}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("inverted", [False, True])
def test_bounds_of_constant_layers_hold_and_are_not_idle(host, name, inverted):
    layer = CONSTANT[name](host)
    if inverted:
        layer = host.T.InverseTransform(layer)
    flow = host.flow(layer)
    certificate = flowguard.certify(flow)
    assert certificate.certified
    bound = certificate.bound(RADIUS)
    corners = RADIUS * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * D)
    with torch.no_grad():
        reached = flow._transform.inverse(corners)[0].abs().max().item()
    assert reached <= bound
    # The corners are the worst of a linear map. Of a pointwise map, all features get the largest.
    assert bound <= reached * 1.001 or name == "PointwiseAffineTransform"


def test_naive_linear(host):
    layer = host.T.NaiveLinear(D, orthogonal_initialization=False)
    nn.init.normal_(layer._weight)
    flow = host.flow(layer)
    corners = RADIUS * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * D)
    with torch.no_grad():
        exact = (corners.double() @ torch.linalg.inv(layer._weight.double()).T).abs().max().item()
    bound = flowguard.certify(flow).bound(RADIUS)
    assert exact <= bound <= 1.01 * exact


def robust(host):
    yield ours.RobustSplineCouplingTransform(MASK, host.net)
    yield ours.RobustSplineCouplingTransform(MASK, host.net, apply_unconditional_transform=True)
    yield ours.MaskedRobustSplineAutoregressiveTransform(D, 16, CONTEXT)
    yield ours.RobustSplineCDF([D])


@pytest.mark.parametrize("inverted", [False, True])
def test_robust_layers_are_certified_in_both_directions(host, inverted):
    for layer in robust(host):
        flow = host.flow(host.T.InverseTransform(layer) if inverted else layer)
        certificate = flowguard.certify(flow)
        assert certificate.certified
        assert certificate.bound(RADIUS) == pytest.approx(RADIUS + 3.0, rel=1e-5)
        stir(layer, 3.0)
        z = RADIUS * (2 * torch.rand(1000, D) - 1)
        with torch.no_grad():
            x, _ = flow._transform.inverse(z, 100 * torch.randn(1000, CONTEXT))
        assert x.abs().max() <= certificate.bound(RADIUS)


def test_a_free_shift_is_not_certified(host):
    layer = ours.RobustSplineCouplingTransform(MASK, host.net, shift_bound=None)
    (refused,) = flowguard.certify(host.flow(layer)).refused
    assert "give a shift_bound" in refused.reason


def test_what_is_not_certified_is_named(host):
    T = host.T
    rows = [
        (T.AffineCouplingTransform(MASK, host.net), "scale may fall to 0.001", 1000),
        (T.AdditiveCouplingTransform(MASK, host.net), "its shift is free", 1),
        (T.MaskedAffineAutoregressiveTransform(D, 16, CONTEXT), "may fall to 0.001", 1000),
        (
            T.PiecewiseRationalQuadraticCouplingTransform(MASK, host.net, tails="linear"),
            "AssertionError",
            1,
        ),
        (T.PiecewiseLinearCouplingTransform(MASK, host.net), "InputOutsideDomain", None),
        (
            T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(D, 16, tails="linear"),
            "AssertionError",
            1,
        ),
        (T.Sigmoid(), "InputOutsideDomain", None),
        (T.LogTanh(), "no rule", None),
    ]
    for layer, reason, gain in rows:
        certificate = flowguard.certify(host.flow(layer))
        assert not certificate.certified
        assert math.isinf(certificate.bound(RADIUS))
        (refused,) = certificate.refused
        assert reason in refused.reason, refused
        assert refused.gain == (None if gain is None else pytest.approx(gain))
        assert refused.name == "_transform._transforms.0"


def test_the_worst_gain_of_an_affine_coupling_is_reached(host):
    layer = host.T.AffineCouplingTransform(MASK, host.net)
    z = torch.ones(1, D)
    raw = torch.full((1, 4), -1e30)
    raw[:, :2] = 0
    x, _ = layer._coupling_transform_inverse(z[:, :2], raw)
    (refused,) = flowguard.certify(host.flow(layer)).refused
    assert x.max().item() == pytest.approx(refused.gain, rel=1e-5)


def test_inverted_affine_layers_may_grow(host):
    layer = host.T.InverseTransform(host.T.AffineCouplingTransform(MASK, host.net))
    (refused,) = flowguard.certify(host.flow(layer)).refused
    assert refused.gain == pytest.approx(1.001)


def test_logit_of_data_is_bounded_by_one(host):
    assert flowguard.certify(host.flow(host.T.Logit())).bound(50.0) == pytest.approx(1, rel=1e-5)


def test_a_subclass_with_other_maths_is_not_covered(host):
    class Doubled(host.T.ActNorm):
        def inverse(self, inputs, context=None):
            return 2 * inputs, inputs.new_zeros(len(inputs))

    (refused,) = flowguard.certify(host.flow(Doubled(D))).refused
    assert "overrides inverse" in refused.reason


def test_bases(host):
    layer = ours.RobustSplineCouplingTransform(MASK, host.net)
    flow = host.Flow(layer, host.distributions.ConditionalDiagonalNormal([D], nn.Linear(3, 2 * D)))
    (refused,) = flowguard.certify(flow).refused
    assert "mean and its scale" in refused.reason
    assert flowguard.certify(host.flow(layer)).event_size == D
    assert flowguard.certify(host.flow(layer)).bound(confidence=0.99) > 3


def image_transform(host, cls):
    flow, shape = cls(3), (3, 8, 12)
    for level in range(3):
        squeeze = [host.T.SqueezeTransform()] if level < 2 else []
        shape = squeeze[0].get_output_shape(*shape) if squeeze else shape
        steps = [ours.RobustFlowStep(shape[0], CONTEXT, 8, num_bins=2, mix=m) for m in MIXES]
        one = host.T.OneByOneConvolution(shape[0], identity_init=False)
        parts = [*squeeze, *steps, one, host.T.ActNorm(shape[0])]
        shape = flow.add_transform(host.T.CompositeTransform(parts), shape)
    return stir(flow, 0.1)


MIXES = ("orthogonal", "free")


def test_multiscale_bounds_hold(host):
    z = RADIUS * torch.randn(64, 288).sign()
    contexts = [10 * torch.randn(64, CONTEXT, *s) for s in ((4, 6), (2, 3), (2, 3))]
    flow = host.flow(image_transform(host, ours.ConditionalMultiscaleTransform), shape=(288,))
    certificate = flowguard.certify(flow)
    assert certificate.certified
    assert certificate.event_size == 288
    with torch.no_grad():
        x, _ = flow._transform.inverse(z, contexts)
    bound = certificate.bound(RADIUS)
    assert x.abs().max() <= bound < math.inf


def test_the_hosts_multiscale_transform_has_the_bound_of_ours(host):
    flows = []
    for cls in (ours.ConditionalMultiscaleTransform, host.T.MultiscaleCompositeTransform):
        torch.manual_seed(0)
        flows.append(host.flow(image_transform(host, cls), shape=(288,)))
    a, b = (flowguard.certify(flow).bound(RADIUS) for flow in flows)
    assert a == b


@pytest.mark.parametrize("features", [8, 11, 13, 16])
def test_latents_join_where_the_flow_puts_them(host, features):
    shape, flow = (features,), host.T.MultiscaleCompositeTransform(3)
    for _ in range(3):
        layer = host.T.ActNorm(shape[0])
        nn.init.normal_(layer.log_scale)  # a scale for each feature tells the features apart
        shape = flow.add_transform(layer, shape)
    with torch.no_grad():
        reached = flow.inverse(torch.full((1, features), RADIUS))[0].max().item()
    bound = flowguard.certify(host.flow(flow)).bound(RADIUS)
    assert bound == pytest.approx(reached, rel=1e-4)


def test_attack_stays_below_the_certificate(host):
    torch.manual_seed(0)
    layers = [
        stir(ours.RobustSplineCouplingTransform(MASK, host.net)),
        host.T.RandomPermutation(D),
        stir(ours.MaskedRobustSplineAutoregressiveTransform(D, 16, CONTEXT)),
    ]
    flow = host.flow(*layers)
    result = flowguard.attack(flow, torch.randn(4, CONTEXT), steps=20, restarts=2)
    assert 4.0 < result.value <= flowguard.certify(flow).bound(4.0)


def test_attack_finds_the_exploding_inverse(host):
    torch.manual_seed(0)
    layers = [
        host.T.AffineCouplingTransform(torch.tensor(MASK).roll(i), host.net) for i in range(4)
    ]
    result = flowguard.attack(host.flow(*layers), torch.randn(4, CONTEXT), steps=30, restarts=2)
    assert result.value > 1000


def test_attack_on_maps_of_each_level(host):
    flow = host.flow(image_transform(host, ours.ConditionalMultiscaleTransform), shape=(288,))
    maps = [torch.zeros(1, CONTEXT, *s) for s in ((4, 6), (2, 3), (2, 3))]
    result = flowguard.attack(flow, maps, steps=3, restarts=1)
    assert result.sample.shape == (1, 3, 8, 12)
    assert result.value <= flowguard.certify(flow).bound(4.0)


def test_attack_on_a_conditional_base(host):
    base = host.distributions.ConditionalDiagonalNormal([D], nn.Linear(CONTEXT, 2 * D))
    flow = host.Flow(host.T.IdentityTransform(), base)
    assert flowguard.attack(flow, torch.randn(1, CONTEXT), steps=20, restarts=1).value > 100


def test_attack_on_a_mixture_takes_the_farthest_of_its_likely_components(host):
    base = host.distributions.MADEMoG(D, 16, CONTEXT, num_mixture_components=3)
    flow, c = host.flow(host.T.IdentityTransform()), torch.randn(8, CONTEXT)
    flow._distribution = base
    with torch.no_grad():
        x = flow.sample(400, c).flatten(0, 1)
        still = flowguard.attack(flow, c, radius=0.0, steps=0, restarts=20, noise=4.0).value
    # Nothing was ascended: it is among the farthest of what is sampled for these contexts.
    assert x.abs().quantile(0.99) < still
    robust, report = flowguard.migrate(flow, x, c.repeat_interleave(400, 0))
    bound = report.certificate_after.bound(4.0)
    assert 0.2 * bound < flowguard.attack(robust, c, steps=30, restarts=1).value <= bound
    assert bound < flowguard.attack(flow, c, steps=30, restarts=1).value


def test_attack_refuses_an_unknown_base(host):
    flow = host.Flow(host.T.IdentityTransform(), host.distributions.DiagonalNormal([D]))
    with pytest.raises(TypeError, match="noise of a DiagonalNormal"):
        flowguard.attack(flow, torch.randn(1, CONTEXT))


@pytest.mark.skipif(importlib.util.find_spec("glasflow") is None, reason="glasflow is missing")
def test_glasflows_own_flows():
    from glasflow.flows import RealNVP

    flow = RealNVP(D, 2, n_conditional_inputs=CONTEXT)
    certificate = flowguard.certify(flow)
    assert not certificate.certified
    assert {s.kind for s in certificate.refused} == {"AffineCouplingTransform"}
    result = flowguard.attack(flow, torch.randn(2, CONTEXT), steps=20, restarts=1)
    assert result.value > 4


# What a certificate must not promise


def exceeded(transform, sample=None, radius=RADIUS, features=D, host=None):
    r"""How far samples get, the bound, and why there is none."""
    base = host.distributions.StandardNormal([features])
    certificate = flowguard.certify(host.Flow(transform, base))
    z = radius * (2 * torch.rand(256, features) - 1)
    z = torch.cat((z, radius * z.sign()))
    with torch.no_grad():
        x, _ = transform.inverse(z) if sample is None else sample(z)
    reasons = "; ".join(s.reason for s in certificate.refused)
    return x.abs().nan_to_num(0.0).max().item(), certificate.bound(radius), reasons


def test_normalisations_that_sampling_initialises_are_not_certified(host):
    image = torch.full((2, D, 2, 2), 1e-4) * torch.randn(2, D, 2, 2)
    for layer, z in ((host.T.ActNorm(D), image[:, :, 0, 0]), (ours.RobustFlowStep(D), image)):
        upside_down = host.T.InverseTransform(layer)
        certificate = flowguard.certify(upside_down)
        with torch.no_grad():
            reached = upside_down.inverse(z)[0].abs().max().item()
        assert reached <= certificate.bound(z.abs().max().item())
        assert "its next batch initialises it" in certificate.refused[0].reason
        assert flowguard.certify(upside_down).certified  # now that it is


def test_normalisations_that_sampling_does_not_touch_are_certified(host):
    assert flowguard.certify(host.T.ActNorm(D)).certified
    assert flowguard.certify(host.T.InverseTransform(host.T.ActNorm(D).eval())).certified


def test_a_batch_norm_of_the_batch_at_hand_is_not_certified(host):
    layer = host.T.InverseTransform(host.T.BatchNorm(D))
    layer._transform.running_var.fill_(1.0)
    reached, bound, reasons = exceeded(layer, radius=1e-4, host=host)
    assert reached <= bound
    assert "statistics of its batch" in reasons
    layer.eval()
    assert flowguard.certify(layer).certified


@pytest.mark.parametrize("inverted", [False, True])
def test_a_scale_that_was_loaded_may_be_negative(host, inverted):
    layer = host.T.PointwiseAffineTransform(shift=1.0, scale=2.0)
    scale = torch.tensor(-20.0 if inverted else -0.05)
    layer.load_state_dict({"_shift": torch.tensor(1.0), "_scale": scale})
    layer = host.T.InverseTransform(layer) if inverted else layer
    reached, bound, _ = exceeded(layer, host=host)
    assert 0.9 * bound < reached <= bound
    layer = host.T.PointwiseAffineTransform()
    layer._scale.zero_()
    assert not flowguard.certify(layer).certified


@pytest.mark.parametrize("slope", [-5.0, -0.2, 1e-3, 0.5, 7.0])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_leaky_relu_of_any_slope_is_bounded(host, slope, inverted):
    layer = host.T.LeakyReLU()
    layer.negative_slope = slope
    layer.log_negative_slope = torch.tensor(0.0)
    layer = host.T.InverseTransform(layer) if inverted else layer
    reached, bound, _ = exceeded(layer, host=host)
    assert 0.9 * bound < reached <= bound


def test_a_multiscale_transform_within_another_is_not_certified(host):
    shrink = host.T.PointwiseAffineTransform(scale=100.0)

    def inner(features):
        transform = host.T.MultiscaleCompositeTransform(1)
        transform.add_transform(host.T.IdentityTransform(), (features,))
        return transform

    last = host.T.MultiscaleCompositeTransform(2)
    last.add_transform(host.T.IdentityTransform(), (8,))
    last.add_transform(host.T.CompositeTransform([inner(4), shrink]), (4,))
    middle = host.T.MultiscaleCompositeTransform(3)
    middle.add_transform(host.T.IdentityTransform(), (16,))
    middle.add_transform(host.T.CompositeTransform([shrink, inner(8)]), (8,))
    middle.add_transform(shrink, (4,))
    for transform, features in ((last, 8), (middle, 16)):
        reached, bound, reasons = exceeded(transform, features=features, host=host)
        assert reached <= bound
        assert reasons == "a multiscale transform within another"


@pytest.mark.parametrize("name", ["LULinear", "QRLinear", "SVDLinear"])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_cache_that_was_filled_before_counts(host, name, inverted):
    options = {"QRLinear": (3,), "SVDLinear": (2,)}.get(name, ())
    layer = stir(getattr(host.T, name)(D, *options, using_cache=True)).eval()
    layer = host.T.InverseTransform(layer) if inverted else layer
    layer.inverse(torch.randn(2, D))
    inner = layer._transform if inverted else layer
    with torch.no_grad():
        for n, p in inner.named_parameters():
            if "diag" in n:
                p.add_(-3.0 if inverted else 3.0)
    reached, bound, _ = exceeded(layer, host=host)
    assert 0.1 * bound < reached <= bound
    inner.train()
    reached, bound, _ = exceeded(layer, host=host)
    assert 0.1 * bound < reached <= bound


@pytest.mark.parametrize("size", [1e-30, 2e-21, 1e-18, 1e-12, 1e12, 1e25])
def test_reflections_by_vectors_of_any_length_keep_their_bound(host, size):
    layer = stir(host.T.HouseholderSequence(D, 3))
    with torch.no_grad():
        layer.q_vectors.mul_(size)
    # Turned and turned back, as it is not by what underflows.
    back = host.T.InverseTransform(host.T.HouseholderSequence(D, 3))
    back._transform.q_vectors = nn.Parameter(layer.q_vectors.detach() / size)
    z = torch.cartesian_prod(*[torch.tensor([-RADIUS, RADIUS])] * D)
    flow = host.flow(layer, back)
    with torch.no_grad():
        x = flow._transform.inverse(z)[0]
    assert x.abs().nan_to_num(math.inf).max().item() <= flowguard.certify(flow).bound(RADIUS)


def test_indices_that_are_no_permutation_are_named(host):
    layer = host.T.Permutation(torch.tensor([0, 0, 0, 0]))
    flow = host.flow(host.T.InverseTransform(layer), stir(host.T.HouseholderSequence(D, 3)))
    (refused,) = flowguard.certify(flow).refused
    assert "no permutation" in refused.reason


def test_the_map_that_a_layer_runs_is_the_one_that_counts(host):
    layer = ours.RobustSplineCouplingTransform(MASK, host.net)
    other = ours.RobustSplineCouplingTransform(MASK, host.net, tail_bound=50.0, shift_bound=30.0)
    layer.head = other.head
    nn.init.constant_(layer.head.get_parameter("gain") if layer.head.gain is not None else
                      layer.transform_net.final_layer.bias, 100.0)  # fmt: skip
    y = torch.zeros(512, CONTEXT)
    reached, bound, _ = exceeded(layer, lambda z: layer.inverse(z, y), host=host)
    assert reached <= bound


def test_a_foreign_unconditional_part_is_bounded_or_named(host):
    layer = ours.RobustSplineCouplingTransform(MASK, host.net)
    y = torch.zeros(512, CONTEXT)
    layer.unconditional_transform = host.T.PointwiseAffineTransform(scale=1e-3)
    reached, bound, _ = exceeded(layer, lambda z: layer.inverse(z, y), host=host)
    assert 0.9 * bound < reached <= bound
    layer.unconditional_transform = host.T.LULinear(2)
    assert "RobustSplineCDF" in exceeded(layer, lambda z: layer.inverse(z, y), host=host)[2]


@pytest.mark.parametrize("kind", ["LULinear", "QRLinear", "SVDLinear", "NaiveLinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6, 1e-9])
def test_nearly_singular_matrices_keep_their_bound(host, kind, dtype, scale):
    layer = {
        "LULinear": lambda: host.T.LULinear(D, identity_init=False),
        "QRLinear": lambda: stir(host.T.QRLinear(D, 3)),
        "SVDLinear": lambda: stir(host.T.SVDLinear(D, 2, identity_init=False)),
        "NaiveLinear": lambda: host.T.NaiveLinear(D),
    }[kind]().to(dtype)
    with torch.no_grad():
        if kind == "NaiveLinear":
            least = max(scale, 3 * torch.finfo(dtype).eps)
            layer._weight.copy_(1 + least * torch.randn(D, D, dtype=dtype))
        elif kind == "SVDLinear":
            layer.eps = 1e-30
            layer.unconstrained_diagonal[0] = math.log(scale)
        else:
            layer.upper_entries.copy_(torch.randn(6, dtype=dtype) / scale)
        if kind == "LULinear":
            layer.lower_entries.copy_(torch.randn(6, dtype=dtype) / scale)
    z = RADIUS * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * D).to(dtype)
    flow = host.flow(layer)
    bound = flowguard.certify(flow).bound(RADIUS)
    try:
        with torch.no_grad():
            reached = layer.inverse(z)[0].abs().nan_to_num(math.inf).max().item()
    except RuntimeError:  # of the old solver, which torch has given up
        assert kind == "NaiveLinear"
        return
    assert reached <= bound


SQUASHED = {"Sigmoid": 1.0, "Tanh": 1.0, "CauchyCDF": 1.0}


@pytest.mark.parametrize("name", SQUASHED)
def test_what_squashes_is_bounded_in_one_direction(host, name):
    layer = host.T.InverseTransform(getattr(host.T, name, getattr(nonlinearities(host), name))())
    reached, bound, _ = exceeded(layer, radius=1e6, host=host)
    assert 0.99 < reached <= bound == pytest.approx(SQUASHED[name], rel=1e-5)
    certificate = flowguard.certify(layer._transform)
    assert "InputOutsideDomain" in certificate.refused[0].reason


def nonlinearities(host):
    return importlib.import_module(f"{host.T.__name__}.nonlinearities")


def test_the_inverse_of_a_cumulative_distribution_goes_both_ways(host):
    layer = nonlinearities(host).CauchyCDFInverse()
    assert flowguard.certify(layer).bound(1e6) == pytest.approx(1.0, rel=1e-5)


def test_a_diagonal_base_is_bounded_by_its_constants(host):
    normal = importlib.import_module(f"{host.distributions.__name__}.normal")
    base = normal.DiagonalNormal([D])
    nn.init.normal_(base.mean_)
    nn.init.normal_(base.log_std_)
    certificate = flowguard.certify(host.Flow(host.T.IdentityTransform(), base))
    expected = (base.mean_.abs() + RADIUS * base.log_std_.exp()).max().item()
    assert certificate.bound(RADIUS) == pytest.approx(expected, rel=1e-5)
    assert certificate.event_size == D
    assert certificate.bound(confidence=0.99) > 0


@pytest.mark.parametrize("name", ["coupling", "autoregressive"])
def test_splines_keep_their_bound_in_half_precision(host, name):
    if name == "coupling":
        layer = ours.RobustSplineCouplingTransform(
            MASK, host.net, tail_bound=5.3, shift_bound=3.7, apply_unconditional_transform=True
        )
    else:
        layer = ours.MaskedRobustSplineAutoregressiveTransform(
            D, 16, CONTEXT, tail_bound=5.3, shift_bound=3.7
        )
    flow = host.flow(stir(layer, 30.0)).to(torch.bfloat16)
    bound = flowguard.certify(flow).bound(RADIUS)
    z = (RADIUS * (2 * torch.rand(2000, D) - 1)).bfloat16()
    with torch.no_grad():
        x = flow._transform.inverse(z, 100 * torch.randn(2000, CONTEXT).bfloat16())[0]
    assert 0.8 * bound < x.abs().max().item() <= bound < 7.5


@pytest.mark.parametrize("slope", [0.0, 2.0, 8.0, 1e6, 1e10])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_spline_with_constant_knots_is_bounded_by_them_or_named(host, slope, inverted):
    layer = host.T.PiecewiseRationalQuadraticCDF([D], tails="linear", tail_bound=2.0)
    with torch.no_grad():
        layer.unnormalized_derivatives.normal_(std=slope)
    layer = host.T.InverseTransform(layer) if inverted else layer
    certificate = flowguard.certify(layer)
    z = RADIUS * (2 * torch.rand(20_000, D) - 1)
    z[::2] = 2.0 * (1 - 10 ** (-7 * torch.rand(10_000, D)))
    try:
        with torch.no_grad():
            x = layer.inverse(z)[0]
    except AssertionError:
        assert not certificate.certified
        return
    assert x.abs().nan_to_num(math.inf).max().item() <= certificate.bound(RADIUS)
    assert certificate.certified == (slope < 5.0 or (inverted and slope < 1e3))


def test_conditional_splines_of_the_host_leave_their_box(host):
    # Why they are not certified: finite samples may exceed what exact arithmetic would have.
    function = importlib.import_module(f"{host.T.__name__}.splines.rational_quadratic")
    largest = 0.0
    for _ in range(20):
        w, h, d = (1e6 * torch.randn(2000, n) for n in (2, 2, 1))
        y = torch.full((2000,), 1.0 - 1e-6)
        for rows in range(0, 2000, 20):
            part = slice(rows, rows + 20)
            try:
                x, _ = function.unconstrained_rational_quadratic_spline(
                    y[part], w[part], h[part], d[part], inverse=True
                )
            except AssertionError:
                continue
            largest = max(largest, x[x.isfinite()].abs().max().item())
    assert largest > 1.01


def test_layers_that_are_there_twice_count_twice(host):
    layer = host.T.PointwiseAffineTransform(scale=0.1)
    for twice in (
        host.T.CompositeTransform([layer, layer]),
        host.T.CompositeCDFTransform(layer, host.T.InverseTransform(layer)),
    ):
        reached, bound, _ = exceeded(twice, host=host)
        assert 0.9 * bound < reached <= bound
    flow = host.T.MultiscaleCompositeTransform(2)
    for shape in ((8,), (4,)):
        flow.add_transform(host.T.PointwiseAffineTransform(scale=0.1), shape)
    flow._transforms[1] = flow._transforms[0]
    reached, bound, _ = exceeded(flow, features=8, host=host)
    assert 0.9 * bound < reached <= bound


def loud(module, name):
    r"""Puts a method of its own into a module."""
    own = getattr(module, name)

    def louder(*args, **kwargs):
        out = own(*args, **kwargs)
        return (1e9 * out[0], *out[1:]) if isinstance(out, tuple) else 1e9 * out

    setattr(module, name, louder)


def test_parts_that_depart_from_their_class_are_named(host):
    normal = importlib.import_module(f"{host.distributions.__name__}.normal")
    identity = host.T.IdentityTransform()
    rows = [
        (host.flow(identity), "_distribution", "_sample"),
        (host.flow(identity), "_distribution", "sample"),
        (host.Flow(identity, normal.DiagonalNormal([D])), "_distribution", "sample"),
        (host.T.OneByOneConvolution(D), "permutation", "inverse"),
        (host.T.QRLinear(D, 3), "orthogonal", "inverse"),
        (host.T.SVDLinear(D, 2), "orthogonal_1", "inverse"),
        (ours.RobustSplineCouplingTransform(MASK, host.net), "head", "forward"),
        (next(islice(robust(host), 1, None)), "unconditional_transform", "inverse"),
        (ours.MaskedRobustSplineAutoregressiveTransform(D, 16), "head", "spline"),
    ]
    for model, place, name in rows:
        assert flowguard.certify(model).certified, place
        loud(model.get_submodule(place), name)
        assert flowguard.certify(model).refused, (place, name)


def test_a_base_that_overrides_its_class_is_named(host):
    class Louder(ours.MultiscaleNormal):
        def _sample(self, num_samples, context):
            return 1e9 * super()._sample(num_samples, context)

    transform = image_transform(host, ours.ConditionalMultiscaleTransform)
    assert flowguard.certify(host.Flow(transform, ours.MultiscaleNormal(transform))).certified
    assert flowguard.certify(host.Flow(transform, Louder(transform))).refused


def test_weights_that_are_made_at_each_look_are_named(host):
    layer = host.T.QRLinear(D, 3)
    torch.nn.utils.parametrize.register_parametrization(
        layer.orthogonal, "q_vectors", nn.Dropout()
    )
    (refused,) = flowguard.certify(layer).refused
    assert "parametrization" in refused.reason


def test_the_unconditional_part_of_a_migrated_coupling_is_bounded_by_its_knots(host):
    layer = host.T.PiecewiseRationalQuadraticCouplingTransform(
        MASK, host.net, tails="linear", tail_bound=3.0, apply_unconditional_transform=True
    )
    flow = host.flow(layer)
    new, _ = flowguard.migrate(flow, torch.randn(64, D), torch.randn(64, CONTEXT))
    assert flowguard.certify(new).certified
    with torch.no_grad():
        (part,) = (m for n, m in new.named_modules() if n.endswith("unconditional_transform"))
        part.unnormalized_derivatives.fill_(1e10)
    (refused,) = flowguard.certify(new).refused
    assert refused.name.endswith("unconditional_transform")
    assert "may leave its box" in refused.reason


def test_a_batch_norm_in_training_mode_is_refused(host):
    layer = batch_norm(host).train()
    assert "no inverse" in flowguard.certify(layer).refused[0].reason
    assert flowguard.certify(layer.eval()).certified
