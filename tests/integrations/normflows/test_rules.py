r"""Tests for the certificates and attacks of normflows' layers."""

import math
import pickle

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
    "BatchNorm": (nf.flows.BatchNorm, "no rule for normflows.flows.normalization.Batch", None),
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


def test_glow_base_without_classes():
    base = shaken(nf.distributions.GlowBase((12, 2, 2)), 0.5)
    flow = ConditionalMultiscaleFlow([base], [[nf.flows.Squeeze()]], []).eval()
    certificate = flowguard.certify(flow)
    assert certificate.certified
    torch.manual_seed(0)
    x = torch.cat([flow.sample(512)[0] for _ in range(4)])
    radius = 5.0  # some of 100 000 numbers come close
    assert 0.5 * certificate.bound(radius) < x.abs().max() <= certificate.bound(radius)


@pytest.mark.parametrize("size", [1.0, 8.0, 30.0])
@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("kind", ["GlowBase", "DiagGaussian"])
def test_the_bound_of_a_base_holds_to_the_last_digit(kind, temperature, size, monkeypatch):
    """The exponential grows the rounding of its exponent: by as much as that is large."""
    noise = torch.tensor([3.0, -3.0]).reshape(2, 1, 1, 1)
    monkeypatch.setattr(torch, "randn", lambda shape, **options: noise)
    for _ in range(200):
        base = getattr(nf.distributions, kind)((1, 1, 1))
        with torch.no_grad():
            for name, p in base.named_parameters():
                p.uniform_(-1.0, 1.0).mul_(size if name == "log_scale" else 0.1)
        base.temperature = temperature
        certificate = flowguard.certify(nf.NormalizingFlow(base, []))
        reached = base(2)[0].abs().max().item()
        assert reached <= certificate.bound(3.0) < (1 + 1e-4) * reached


def test_a_temperature_of_zero_leaves_no_noise():
    base = nf.distributions.DiagGaussian(2, trainable=False)
    base.temperature = 0.0
    assert flowguard.certify(nf.NormalizingFlow(base, [])).bound(3.0) == 0.0


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


# What a certificate must not promise


def reached_and_bound(model, sample):
    r"""The largest of some samples, and the bound: none where the model is refused."""
    certificate = flowguard.certify(model)
    with torch.no_grad():
        x = sample()
    return x.abs().nan_to_num(0.0).max().item(), certificate.bound(RADIUS)


def cube(*shape, rows=64):
    return RADIUS * (2 * torch.rand(rows, *shape) - 1)


@pytest.mark.parametrize("backwards", [False, True], ids=["to data", "to noise"])
def test_a_block_that_the_next_batch_initialises_is_not_certified(backwards):
    block = RobustGlowBlock(4, 8)
    layer = nf.flows.Reverse(block) if backwards else block
    z = 1e-3 * cube(4, 4, 4)
    certificate = flowguard.certify(layer)
    with torch.no_grad():
        x = layer(z)[0]
    assert x.abs().max() <= certificate.bound(1e-3 * RADIUS)
    assert [s.name.rpartition(".")[2] for s in certificate.refused] == ["actnorm"]
    assert "its next batch initialises it" in certificate.refused[0].reason
    assert flowguard.certify(layer).certified  # now that it is
    assert flowguard.certify(RobustGlowBlock(4, 8).eval()).certified


@pytest.mark.parametrize("name", ["ClassCondDiagGaussian", "GlowBase"])
def test_a_base_that_takes_any_vector_for_a_class_is_not_certified(name):
    base = shaken(getattr(nf.distributions, name)((3,), 2), 0.5)
    y = 1e3 * torch.eye(2).repeat(32, 1)
    models = {
        nf.ClassCondFlow(base, []): lambda m: m.sample(64, y)[0],
        nf.MultiscaleFlow([base], [[]], []): lambda m: m.sample(64, y)[0],
        ConditionalMultiscaleFlow([base], [[]], []): lambda m: m.sample(64, y)[0],
    }
    for model, sample in models.items():
        reached, bound = reached_and_bound(model, lambda m=model, f=sample: f(m))
        assert reached <= bound, type(model).__name__
        assert "any vector" in flowguard.certify(model).refused[0].reason


@pytest.mark.parametrize("name", ["ClassCondDiagGaussian", "GlowBase"])
def test_a_base_that_draws_its_classes_itself_is_certified(name):
    base = shaken(getattr(nf.distributions, name)((3,), 2), 0.5)
    for model in (nf.NormalizingFlow(base, []), nf.MultiscaleFlow([base], [[]], [], None, False)):
        reached = max(model.sample(512)[0].abs().max().item() for _ in range(8))
        assert reached <= flowguard.certify(model).bound(6.0) < 100


@pytest.mark.parametrize(
    "make",
    [
        lambda: nf.distributions.DiagGaussian((3,)),
        lambda: nf.distributions.GlowBase((3,)),
        lambda: nf.distributions.GlowBase((3,), 2),
        lambda: nf.distributions.ClassCondDiagGaussian((3,), 2),
    ],
)
def test_the_temperature_of_a_base_counts(make):
    base = make()
    base.temperature = 50.0
    model = nf.NormalizingFlow(base, [])
    reached = max(model.sample(512)[0].abs().max().item() for _ in range(8))
    assert 50.0 < reached <= flowguard.certify(model).bound(6.0) <= 301.0


def test_the_temperature_of_a_prior_counts():
    base = GaussianPrior(4)
    base.temperature = 50.0
    model = ConditionalMultiscaleFlow([base], [[nf.flows.Squeeze()]], [])
    reached = model.sample(512, size=(4, 4))[0].abs().max().item()
    assert 50.0 < reached <= flowguard.certify(model).bound(6.0) <= 301.0


@pytest.mark.parametrize("backwards", [False, True], ids=["to data", "to noise"])
def test_indices_that_are_no_permutation_are_named(backwards):
    layer = nf.flows.Permute(4)
    layer.perm.fill_(1)
    layer.inv_perm.fill_(1)
    model = nf.flows.Composite([shaken(nf.flows.InvertibleAffine(4, use_lu=False)), layer])
    assert not flowguard.certify(nf.flows.Reverse(model) if backwards else model).certified


def test_a_stored_permutation_that_is_none_is_transposed_as_the_layer_does():
    for cls, shape in ((nf.flows.InvertibleAffine, (4,)), (nf.flows.Invertible1x1Conv, (4, 2, 2))):
        layer = cls(4, use_lu=True)
        layer.P.mul_(3.0)
        z = cube(*shape).sign() * RADIUS
        reached, bound = reached_and_bound(layer, lambda f=layer, z=z: f(z)[0])
        assert reached <= bound
    block = RobustGlowBlock(4, 8).eval()
    block.mix.permutation.mul_(3.0)
    z = cube(4, 2, 2).sign() * RADIUS
    reached, bound = reached_and_bound(block, lambda: block(z)[0])
    assert reached <= bound


@pytest.mark.parametrize("alpha", [-0.1, 0.05, 0.6, 0.9])
def test_a_logit_of_any_margin_is_bounded(alpha):
    layer = nf.transforms.Logit(alpha)
    reached, bound = reached_and_bound(layer, lambda: layer(10 * cube(3))[0])
    assert 0.9 * bound < reached <= bound


def test_a_logit_without_width_is_named():
    assert not flowguard.certify(nf.transforms.Logit(0.5)).certified


def test_a_shift_by_a_tensor_is_bounded():
    layer = nf.transforms.Shift(torch.tensor([-1.0, 2.0, 30.0]))
    reached, bound = reached_and_bound(layer, lambda: layer(cube(3))[0])
    assert 0.9 * bound < reached <= bound


def test_a_univariate_whose_box_depends_on_its_parameters_is_not_certified():
    def grown(w, h, d, shift):
        bound = float(5 + shift.abs().max())
        return flowguard.RobustSpline(w, h, d, shift, bound=bound, shift_bound=1.0)

    net = nn.Conv2d(2, 2 * 4, 1)
    nn.init.constant_(net.bias, 100.0)
    layer = RobustCouplingBlock(net, None, "channel", grown, flowguard.RobustSpline.shapes(2))
    z = cube(4, 2, 2)
    reached, bound = reached_and_bound(layer, lambda: layer(z)[0])
    assert reached <= bound
    assert "may depend on its parameters" in flowguard.certify(layer).refused[0].reason


def test_a_cache_that_was_filled_before_counts():
    layer = nf.flows.LULinearPermute(3, identity_init=False).eval()
    layer.linear.use_cache()
    z = cube(3)
    backwards = nf.flows.Reverse(layer)
    backwards(z)
    with torch.no_grad():
        layer.linear.unconstrained_upper_diag.fill_(-5.0)
        layer.linear.bias.zero_()
    reached, bound = reached_and_bound(backwards, lambda: backwards(z)[0])
    assert reached <= bound


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@pytest.mark.parametrize("scale", [1e-2, 1e-6, 1e-8, 1e-15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["1x1", "1x1, LU", "affine", "affine, LU", "LU, permuted", "LU"])
def test_nearly_singular_matrices_keep_their_bound(kind, scale, dtype):
    def rank_one(n):
        least = max(scale, 3 * torch.finfo(dtype).eps)  # anything less is singular
        return torch.ones(n, n, dtype=dtype) + least * torch.randn(n, n, dtype=dtype)

    layer = {
        "1x1": lambda: nf.flows.Invertible1x1Conv(5),
        "1x1, LU": lambda: nf.flows.Invertible1x1Conv(5, use_lu=True),
        "affine": lambda: nf.flows.InvertibleAffine(5, use_lu=False),
        "affine, LU": lambda: nf.flows.InvertibleAffine(5),
        "LU, permuted": lambda: nf.flows.LULinearPermute(5),
        "LU": lambda: RobustGlowBlock(5, 8),
    }[kind]()
    layer = layer.to(dtype).eval()
    with torch.no_grad():
        if hasattr(layer, "W"):
            layer.W.copy_(rank_one(5))
        elif hasattr(layer, "linear"):
            layer.linear.lower_entries.fill_(-1 / scale)
            layer.linear.upper_entries.fill_(1 / scale)
        elif hasattr(layer, "mix"):
            layer.mix.lower.fill_(-1 / scale)
            layer.mix.upper.fill_(1 / scale)
        else:
            layer.L.fill_(-1 / scale)
            layer.U.fill_(1 / scale)
    image = "affine" not in kind and kind != "LU, permuted"
    z = cube(5, *((2, 2) if image else ()), rows=512).to(dtype)
    z = torch.cat((z, RADIUS * z.sign(), 1e-3 * z))
    reached, bound = reached_and_bound(layer, lambda: layer(z)[0])
    assert reached <= bound


def test_layers_that_are_there_twice_count_twice():
    layer = scaled((3,))
    nn.init.constant_(layer.s, 2.0)
    base = nf.distributions.DiagGaussian(3)
    once, twice = (
        [
            flowguard.certify(model).bound(1.0)
            for model in (
                nf.NormalizingFlow(base, layers),
                nf.MultiscaleFlow([base], [layers], [], None, False),
                nf.flows.Composite(layers),
            )
        ]
        for layers in ([layer], [layer, layer])
    )
    for a, b in zip(once, twice, strict=True):
        assert b > 7 * a


def blown(module, name="forward"):
    r"""A module with a method of its own, whose outputs are larger."""
    own = getattr(module, name)

    def louder(*args, **kwargs):
        out = own(*args, **kwargs)
        return (1e9 * out[0], *out[1:]) if isinstance(out, tuple) else 1e9 * out

    setattr(module, name, louder)


PARTS = {
    "base": (lambda: nf.NormalizingFlow(nf.distributions.DiagGaussian(4), []), "q0"),
    "noise": (lambda: nf.NormalizingFlow(nf.distributions.GaussianMixture(2, 4), []), "q0"),
    "prior": (lambda: ConditionalMultiscaleFlow([GaussianPrior(4)], [[]], []), "q0.0"),
    "merge": (
        lambda: ConditionalMultiscaleFlow(
            [GaussianPrior(4), GaussianPrior(4)], [[], []], [nf.flows.Merge()]
        ),
        "merges.0",
    ),
    "coupling": (lambda: RobustGlowBlock(4, 8).eval(), "coupling"),
    "mix": (lambda: RobustGlowBlock(4, 8).eval(), "mix"),
    "actnorm": (lambda: RobustGlowBlock(4, 8).eval(), "actnorm"),
    "linear": (lambda: nf.flows.LULinearPermute(4), "linear"),
    "permutation": (lambda: nf.flows.LULinearPermute(4), "permutation"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_depart_from_their_class_are_named(name):
    make, place = PARTS[name]
    for spoil in (
        lambda part: blown(part),
        lambda part: blown(part, "inverse") if hasattr(part, "inverse") else blown(part),
        lambda part: part.register_forward_hook(lambda m, args, out: (1e9 * out[0], out[1])),
    ):
        model = make()
        assert flowguard.certify(model).certified, place
        spoil(model.get_submodule(place))
        certificate = flowguard.certify(model)
        assert any(s.name.startswith(place) for s in certificate.refused), str(certificate)


def test_parts_whose_weights_are_made_at_each_look_are_named():
    for make, place, weight in (
        (lambda: nf.flows.LULinearPermute(4), "linear", "bias"),
        (lambda: nf.NormalizingFlow(nf.distributions.DiagGaussian(4), []), "q0", "loc"),
        (lambda: RobustGlowBlock(4, 8).eval(), "mix", "upper"),
        (lambda: nf.flows.InvertibleAffine(4, use_lu=False), "", "W"),
    ):
        model = make()
        torch.nn.utils.parametrize.register_parametrization(
            model.get_submodule(place), weight, nn.Dropout()
        )
        (refused,) = flowguard.certify(model).refused
        assert "parametriz" in refused.reason.lower()


def test_a_block_whose_merge_is_not_that_of_its_split_is_named():
    flow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian(4), [nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]))]
    )
    new, _ = flowguard.migrate(flow.eval(), torch.randn(64, 4))
    assert flowguard.certify(new).certified
    new.flows[0].flows[2].mode = "channel_inv"
    assert "split" in flowguard.certify(new).refused[0].reason
    new.flows[0].flows[2].mode = "channel"
    blown(new.flows[0].flows[1])
    assert flowguard.certify(new).refused


def test_layers_that_run_the_other_way_are_refused():
    layer = flowguard.image.ActNorm(2)
    with torch.no_grad():
        layer.logs.fill_(2.0)
    base = nf.distributions.DiagGaussian((2, 1, 1))
    flow = nf.NormalizingFlow(base, [layer.eval()])
    refused = flowguard.certify(flow).refused
    assert "may be the way to noise" in refused[0].reason
    for around in (nf.flows.Reverse(layer), nf.flows.Composite([layer])):
        assert "may be the way to noise" in flowguard.certify(around).refused[0].reason


class Stated(flowguard.transforms.Univariate):
    r"""A map that states its own bound."""

    def __init__(self, phi):
        super().__init__()

    def inverse_bound(self, radius):
        return radius / 2


def test_a_certificate_of_a_map_that_states_its_bound_can_be_pickled():
    net = nn.Conv2d(2, 2, 1)
    certificate = flowguard.certify(RobustCouplingBlock(net, None, "checkerboard", Stated, [()]))
    assert pickle.loads(pickle.dumps(certificate)).bound(3.0) == certificate.bound(3.0) >= 3.0


def test_a_migrated_layer_whose_maps_are_made_otherwise_is_refused():
    block = nf.flows.AffineCouplingBlock(nf.nets.MLP([1, 8, 2]))
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [block])
    robust, _ = flowguard.migrate(flow, torch.randn(256, 2))
    assert flowguard.certify(robust).certified
    robust.flows[0].flows[1].map.register_forward_hook(lambda m, i, o: o)
    assert "hooks" in flowguard.certify(robust).refused[0].reason


def test_a_prior_whose_parameter_became_a_plain_tensor_is_bounded_by_that():
    prior = GaussianPrior(4)
    value = torch.full((1, 8, 1, 1), 1.5)
    del prior.constant
    prior.constant = value
    flow = ConditionalMultiscaleFlow([prior], [[nf.flows.Squeeze()]], [])
    reached = (1.5 + math.exp(prior.scale_bound) * 4) * 1.01
    assert flowguard.certify(flow).bound(4.0) <= reached
