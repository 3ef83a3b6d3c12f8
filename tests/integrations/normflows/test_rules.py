r"""Tests for the certificates and attacks of normflows' layers."""

import pytest
import torch
import torch.nn as nn

import flowguard

nf = pytest.importorskip("normflows")

from flowguard.integrations.normflows import (  # noqa: E402
    ConditionalMultiscaleFlow,
    ContextAdapter,
    GaussianPrior,
    GuardedConditionalFlow,
    RobustCouplingBlock,
    RobustGlowBlock,
    RobustSplineAutoregressive,
    RobustSplineCoupling,
)

RADIUS = 4.0
ROWS = 2048


def glow(*args, **kwargs):
    return lambda: RobustGlowBlock(5, 8, *args, init_zeros=False, **kwargs)


def scaled(shape):
    # Its `forward` shrinks and its `inverse` grows: a bound of the wrong direction is seen.
    layer = nf.flows.AffineConstFlow(shape)
    nn.init.constant_(layer.s, -2.0)
    nn.init.normal_(layer.t)
    return layer


def normed():
    layer = nf.flows.ActNorm((5, 1, 1))
    layer.inverse(3 * torch.randn(64, 5, 2, 2) + 1)
    return layer


def vector(cls, *args, **kwargs):
    return lambda: cls(5, 1, 8, *args, init_identity=False, **kwargs)


# name: (constructor, shape of the noise, shape of the context, how far the bound may be off)
CERTIFIED = {
    "coupling": (vector(RobustSplineCoupling, 3), (5,), (3,), 1.1),
    "coupling, all transformed": (
        vector(RobustSplineCoupling, 3, apply_unconditional_transform=True),
        (5,),
        (3,),
        1.1,
    ),
    "autoregressive": (vector(RobustSplineAutoregressive, 3), (5,), (3,), 1.1),
    "coupling, without a context": (vector(RobustSplineCoupling), (5,), None, 1.5),
    "Glow": (glow(3), (5, 4, 4), (3, 4, 4), 1.5),
    "Glow, channel_inv": (glow(3, "channel_inv"), (5, 4, 4), (3, 4, 4), 1.5),
    "Glow, checkerboard": (glow(3, "checkerboard"), (5, 4, 4), (3, 4, 4), 1.5),
    "Glow, no LU": (glow(3, use_lu=False), (5, 4, 4), (3, 4, 4), 1.5),
    "Glow, orthogonal": (glow(3, orthogonal=True), (5, 4, 4), (3, 4, 4), 1.5),
    "Glow, additive": (glow(3, scale=False), (5, 4, 4), (3, 4, 4), 1.5),
    "block": (
        lambda: RobustCouplingBlock(nn.Conv2d(3 + 3, 8, 1), 3),
        (5, 4, 4),
        (3, 4, 4),
        1.1,
    ),
    "reversed coupling": (
        lambda: ContextAdapter(nf.flows.Reverse(vector(RobustSplineCoupling, 3)())),
        (5,),
        (3,),
        1.1,
    ),
    "constants": (lambda: scaled((5,)), (5,), None, 1.01),
    "constants, reversed": (lambda: nf.flows.Reverse(scaled((5,))), (5,), None, 1.01),
    "constants, reversed twice": (
        lambda: nf.flows.Reverse(nf.flows.Reverse(scaled((5,)))),
        (5,),
        None,
        1.01,
    ),
    "constants of each pixel": (lambda: scaled((3, 2, 2)), (3, 2, 2), None, 1.5),
    "constants of each pixel, reversed": (
        lambda: nf.flows.Reverse(scaled((3, 2, 2))),
        (3, 2, 2),
        None,
        1.5,
    ),
    "ActNorm": (normed, (5, 2, 2), None, 1.01),
    "Permute": (lambda: nf.flows.Permute(5), (5,), None, 1.01),
    "Permute, swap": (lambda: nf.flows.Permute(5, "swap"), (5,), None, 1.01),
    "LU, permuted": (lambda: nf.flows.LULinearPermute(5, identity_init=False), (5,), None, 1.01),
    "LU, permuted, reversed": (
        lambda: nf.flows.Reverse(nf.flows.LULinearPermute(5, identity_init=False)),
        (5,),
        None,
        1.01,
    ),
    "affine": (lambda: nf.flows.InvertibleAffine(5), (5,), None, 1.01),
    "affine, no LU": (lambda: nf.flows.InvertibleAffine(5, use_lu=False), (5,), None, 1.01),
    "affine, reversed": (
        lambda: nf.flows.Reverse(nf.flows.InvertibleAffine(5)),
        (5,),
        None,
        1.01,
    ),
    "1x1": (lambda: nf.flows.Invertible1x1Conv(5), (5, 4, 4), None, 1.01),
    "1x1, LU": (lambda: nf.flows.Invertible1x1Conv(5, use_lu=True), (5, 4, 4), None, 1.01),
    "composite": (
        # Swapped first and then scaled, so that the order matters.
        lambda: nf.flows.Composite([nf.flows.Permute(5, "swap"), scaled((5,))]),
        (5,),
        None,
        1.01,
    ),
    "logit": (nf.transforms.Logit, (3, 2, 2), None, 1.1),
    "shift": (lambda: nf.transforms.Shift(0.5), (3, 2, 2), None, 1.01),
}


def shaken(layer, scale=0.3):
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name[-2:] not in (".s", ".t") and name not in ("s", "t"):
                p.add_(scale * torch.randn_like(p))
    return layer.eval()


@pytest.mark.parametrize("name", CERTIFIED)
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
def test_bound_holds_for_forward_and_is_not_far_off(name):
    make, shape, context_shape, slack = CERTIFIED[name]
    layer = shaken(make())
    certificate = flowguard.certify(layer)
    assert certificate.certified, str(certificate)
    # Corners, above all those that linear maps are largest at.
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * shape[0])
    z = RADIUS * signs.reshape(len(signs), -1, *[1] * (len(shape) - 1)).expand(-1, *shape)
    z = torch.cat((z, RADIUS * (2 * torch.rand(ROWS, *shape) - 1)))
    contexts = [None] if context_shape is None else [1.0, 30.0, 1e4]
    worst = 0.0
    with torch.no_grad():
        for far in contexts:
            if far is None:
                x = layer(z.clone())[0]
            else:
                x = layer(z.clone(), far * torch.randn(len(z), *context_shape))[0]
            worst = max(worst, x.abs().max().item())
    assert worst <= certificate.bound(RADIUS) <= slack * worst


REFUSED = {
    "AffineCouplingBlock, exp": (
        lambda: nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4])),
        r"scale exp\(s\)",
        None,
    ),
    "AffineCouplingBlock, sigmoid": (
        lambda: nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]), scale_map="sigmoid"),
        "divides by a sigmoid",
        None,
    ),
    "AffineCouplingBlock, sigmoid_inv": (
        lambda: nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]), scale_map="sigmoid_inv"),
        "its shift is free",
        1.0,
    ),
    "sigmoid_inv, reversed": (
        lambda: nf.flows.Reverse(
            nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]), scale_map="sigmoid_inv")
        ),
        "divides by a sigmoid",
        None,
    ),
    "AffineCoupling, no scale": (
        lambda: nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 2]), scale=False),
        "its shift is free",
        1.0,
    ),
    "MaskedAffineFlow": (
        lambda: nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0]), nn.Identity(), nn.Identity()),
        r"scale exp\(s\)",
        None,
    ),
    "MaskedAffineAutoregressive": (
        lambda: nf.flows.MaskedAffineAutoregressive(4, 8),
        "0.001",
        1.001,
    ),
    "MaskedAffineAutoregressive, reversed": (
        lambda: nf.flows.Reverse(nf.flows.MaskedAffineAutoregressive(4, 8)),
        "0.001",
        1000.0,
    ),
    "GlowBlock": (lambda: nf.flows.GlowBlock(4, 8), "divides by a sigmoid", None),
    "coupled spline": (
        lambda: nf.flows.CoupledRationalQuadraticSpline(4, 1, 8),
        "exact arithmetic only",
        1.0,
    ),
    "autoregressive spline": (
        lambda: nf.flows.AutoregressiveRationalQuadraticSpline(4, 1, 8),
        "exact arithmetic only",
        1.0,
    ),
    "Planar": (lambda: nf.flows.Planar((4,)), "no rule for normflows.flows.planar.Planar", None),
    "ActNorm, not initialised": (lambda: nf.flows.ActNorm((4,)), "initialises it", None),
    "logit, reversed": (lambda: nf.flows.Reverse(nf.transforms.Logit()), "poles", None),
    "free shift": (lambda: RobustSplineCoupling(4, 1, 8, shift_bound=None), "shift is free", 1.0),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
def test_what_has_no_bound_is_named_with_the_reason(name):
    make, reason, gain = REFUSED[name]
    certificate = flowguard.certify(make())
    assert not certificate.certified
    assert certificate.bound(1.0) == torch.inf
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(certificate.refused[0].reason)
    assert certificate.refused[0].gain == (None if gain is None else pytest.approx(gain))


def conditional(base, *layers):
    return nf.ConditionalNormalizingFlow(base, layers)


def robust_flow(features=3):
    base = nf.distributions.DiagGaussian(features)
    nn.init.normal_(base.loc)
    nn.init.normal_(base.log_scale, std=0.3)
    return conditional(
        base,
        RobustSplineCoupling(features, 1, 8, 4, init_identity=False),
        nf.flows.LULinearPermute(features, identity_init=False),
        ContextAdapter(scaled((features,))),
        RobustSplineAutoregressive(features, 1, 8, 4, init_identity=False),
    )


def test_flow_starts_from_its_base():
    flow = robust_flow()
    certificate = flowguard.certify(flow)
    assert certificate.certified
    assert certificate.event_size == 3
    base = conditional(flow.q0)
    expected = (flow.q0.loc.abs() + RADIUS * flow.q0.log_scale.exp()).max().item()
    assert flowguard.certify(base).bound(RADIUS) == pytest.approx(expected, rel=1e-5)
    assert flowguard.certify(base).bound(confidence=0.99) > 0


@pytest.mark.parametrize("guard", [False, True], ids=["bare", "guarded"])
def test_attack_stays_below_the_certificate(guard):
    flow, y = robust_flow(), torch.randn(2, 4)
    if guard:
        conditioner = flowguard.OODConditioner(nn.Linear(4, 4), policy="report")
        flow = GuardedConditionalFlow(flow, conditioner)
    result = flowguard.attack(flow, y, steps=20, restarts=2)
    bound = flowguard.certify(flow).bound(RADIUS)
    assert 0.5 * bound < result.value <= bound


def test_attack_breaks_an_affine_flow():
    maf = [nf.flows.MaskedAffineAutoregressive(3, 16, context_features=4) for _ in range(3)]
    layers = [ContextAdapter(nf.flows.Reverse(layer)) for layer in maf]
    flow = conditional(nf.distributions.DiagGaussian(3), *layers)
    assert flowguard.attack(flow, torch.randn(2, 4), steps=30, restarts=1).value > 1e4


def test_bases_that_depend_on_the_context():
    encoder = nn.Linear(4, 6)
    base = nf.distributions.base.ConditionalDiagGaussian(3, encoder)
    certificate = flowguard.certify(conditional(base))
    assert certificate.refused[0].reason.startswith("its mean and its scale depend on the context")
    y = torch.randn(2, 4)
    assert flowguard.attack(conditional(base), y, steps=10, restarts=1).value > 100
    mixture = conditional(nf.distributions.GaussianMixture(3, 2))
    assert flowguard.certify(mixture).certified
    with pytest.raises(ValueError, match="not standard normal"):
        flowguard.certify(mixture).bound(confidence=0.9)


def test_class_conditional_bases():
    for base in (
        nf.distributions.ClassCondDiagGaussian((12, 2, 2), 3),
        nf.distributions.GlowBase((12, 2, 2), 3),
        nf.distributions.GlowBase((12, 2, 2)),
    ):
        shaken(base, 0.5)
        flow = ConditionalMultiscaleFlow([base], [[nf.flows.Squeeze()]], []).eval()
        certificate = flowguard.certify(flow)
        assert certificate.certified
        torch.manual_seed(0)
        x = torch.cat([flow.sample(512, torch.randint(3, (512,)))[0] for _ in range(4)])
        radius = 5.0  # some of 100 000 numbers come close
        assert x.abs().max() <= certificate.bound(radius)


@pytest.mark.parametrize("merge", ["channel", "channel_inv"])
def test_multiscale_bound(merge):
    bases = [GaussianPrior(8), GaussianPrior(2, 3, given_channels=2)]
    levels = [[nf.flows.Squeeze()], [RobustGlowBlock(4, 8, 3), scaled((4, 1, 1))]]
    levels[1].append(nf.flows.Squeeze())
    flow = shaken(ConditionalMultiscaleFlow(bases, levels, [nf.flows.Merge(merge)]))
    certificate = flowguard.certify(flow)
    assert certificate.certified
    y = 100 * torch.randn(256, 3, 8, 8)
    noise = [RADIUS * torch.randn(256, *s).sign() for s in flow.noise_shapes(y)]
    worst = flow.decode(noise, y).abs().max().item()
    assert 0.3 * certificate.bound(RADIUS) < worst <= certificate.bound(RADIUS)


def test_multiscale_parts_without_a_bound():
    def flow(base, merge="channel"):
        levels = [[nf.flows.Squeeze()], [nf.flows.Squeeze()]]
        return ConditionalMultiscaleFlow([GaussianPrior(8), base], levels, [nf.flows.Merge(merge)])

    checkered = flowguard.certify(flow(GaussianPrior(2), "checkerboard"))
    assert "merges of channels" in checkered.refused[0].reason
    other = flowguard.certify(flow(nf.distributions.base.Uniform((2, 4, 4))))
    assert "Uniform" in other.refused[0].reason
    stock = nf.MultiscaleFlow([GaussianPrior(8)], [[nf.flows.GlowBlock(8, 8)]], [])
    assert not flowguard.certify(stock).certified


def test_monitor_sees_the_conditioner_of_a_guarded_flow():
    conditioner = flowguard.OODConditioner(nn.Linear(5, 4), policy="report", alpha=0.01)
    flow = GuardedConditionalFlow(robust_flow(), conditioner)
    y = torch.randn(1024, 5)
    conditioner.fit(y[:512], progress=False)
    conditioner.calibrate(y[512:], progress=False)
    with flowguard.monitor(flow) as record:
        flow.log_prob(torch.randn(2, 3), 1e4 * y[:2])
    assert record.report.flagged.all()
