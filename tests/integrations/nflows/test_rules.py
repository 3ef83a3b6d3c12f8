r"""Certificates and attacks know nflows' layers, and those of its fork in glasflow."""

import importlib
import importlib.util
import math

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


def image_transform(host, cls, shape=(3, 8, 12), levels=3):
    flow = cls(levels)
    for level in range(levels):
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
