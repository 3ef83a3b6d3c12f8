r"""Tests for the migration of normflows' flows."""

import copy
import math
import pickle
from functools import cache, partial

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from torch.torch_version import TorchVersion

from flowguard.bounds import attack, certify
from flowguard.migration import migrate

nf = pytest.importorskip("normflows")

from flowguard.integrations.normflows import (  # noqa: E402
    ConditionalMultiscaleFlow,
    ContextAdapter,
    GuardedConditionalFlow,
    RobustSplineCoupling,
)
from flowguard.ood import OODConditioner  # noqa: E402

F = nf.flows
Reverse = F.base.Reverse
Planar = F.Planar
MASK = torch.tensor([1.0, 0.0, 1.0])
SPLIT_MODES = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")
SCALE_MAPS = ("exp", "sigmoid", "sigmoid_inv")


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


def mlp(i, o, scale=0.15, **kwargs):
    """A network that has been somewhere: at their initialisation many of them say zero."""
    net = nf.nets.MLP([i, 16, o], **kwargs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn_like(p))
    return net


def stirred(layer, scale=0.2):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(scale * torch.randn_like(p))
    return layer


def block(mode="channel", scale_map="exp", features=4, scale=True):
    kept = (features + 1) // 2 if mode == "channel" else features // 2
    rest = features - kept
    return F.AffineCouplingBlock(
        mlp(kept, 2 * rest if scale else rest), scale=scale, scale_map=scale_map, split_mode=mode
    )


def three(*layers):
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(3, trainable=False), list(layers))


def four(*layers):
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(4, trainable=False), list(layers))


def masked(mask=MASK, **kwargs):
    return F.MaskedAffineFlow(mask, mlp(3, 3, **kwargs), mlp(3, 3))


def arqs(**kwargs):
    return stirred(F.AutoregressiveRationalQuadraticSpline(3, 1, 8, **kwargs), 0.1)


def crqs(**kwargs):
    return stirred(F.CoupledRationalQuadraticSpline(3, 1, 8, **kwargs), 0.1)


AFFINE = {
    **{
        f"block-{mode}-{scale_map}": partial(block, mode, scale_map)
        for mode in SPLIT_MODES
        for scale_map in SCALE_MAPS
    },
    "block-additive": partial(block, scale=False),
    "block-odd": partial(block, "channel", "sigmoid", features=3),
    "block-odd-inv": partial(block, "channel_inv", "sigmoid", features=3),
    "masked": masked,
    "masked-tanh": partial(masked, output_fn="tanh"),
    "masked-additive": lambda: F.MaskedAffineFlow(MASK, mlp(3, 3)),
    "masked-scaling": lambda: F.MaskedAffineFlow(MASK, s=mlp(3, 3)),
    "autoregressive": lambda: stirred(F.MaskedAffineAutoregressive(3, 8)),
}
SPLINES = {
    "coupled": crqs,
    "coupled-reverse": partial(crqs, reverse_mask=True, num_bins=4, tail_bound=2.0),
    "autoregressive": arqs,
    "autoregressive-permuted": partial(arqs, permute_mask=True),
}


def width(name):
    return 4 if name.startswith("block") and "odd" not in name else 3


def moons(n):
    """Two moons, away from standard units."""
    t = math.pi * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, t.cos(), 1 - t.cos()) - 0.5
    y = torch.where(upper, t.sin(), 0.5 - t.sin()) - 0.25
    return 3 * torch.stack((x, y), -1) + 0.3 * torch.randn(n, 2) + 5


def turned_moons(n):
    """Two moons, turned by the context."""
    c = torch.randn(n, 2)
    points = moons(n) - 5
    cos, sin = c[:, 0].cos(), c[:, 0].sin()
    turned = torch.stack(
        (cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]), -1
    )
    return torch.exp(0.3 * c[:, 1:]) * turned + 5, c


def _base(**kwargs):
    return nf.distributions.DiagGaussian(2, **kwargs)


def real_nvp(kind):
    layers = []
    for i in range(4):
        if kind == "block":
            net = nf.nets.MLP([1, 32, 32, 2], init_zeros=True)
            layers += [F.AffineCouplingBlock(net), F.Permute(2, mode="swap")]
        else:
            mask = torch.tensor([i % 2, 1 - i % 2])
            nets = (nf.nets.MLP([2, 32, 32, 2], init_zeros=True) for _ in range(2))
            layers.append(F.MaskedAffineFlow(mask, *nets))
    return nf.NormalizingFlow(_base(), [*layers, F.AffineConstFlow((2,))])


def maf(reverse):
    layers = [F.MaskedAffineAutoregressive(2, 32, context_features=2) for _ in range(3)]
    return nf.ConditionalNormalizingFlow(
        _base(), [ContextAdapter(Reverse(f)) for f in layers] if reverse else layers
    )


@cache
def trained(name):
    make = {
        "blocks": partial(real_nvp, "block"),
        "masked": partial(real_nvp, "masked"),
        "MAF": partial(maf, True),
        "IAF": partial(maf, False),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = make[name]()
        optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
        for _ in range(200):
            optimizer.zero_grad()
            if isinstance(flow, nf.ConditionalNormalizingFlow):
                flow.forward_kld(*turned_moons(256)).backward()
            else:
                flow.forward_kld(moons(256)).backward()
            optimizer.step()
    return flow


@pytest.mark.parametrize("name", ["blocks", "masked", "MAF", "IAF"])
def test_a_trained_flow_becomes_robust_at_the_same_likelihood(name):
    flow = trained(name)
    state = copy.deepcopy(flow.state_dict())
    conditional = isinstance(flow, nf.ConditionalNormalizingFlow)
    pairs = turned_moons if conditional else lambda n: (moons(n),)
    robust, report = migrate(flow, *pairs(4096), steps=200)
    unseen = pairs(4096)
    with torch.no_grad():
        before, after = (-f.log_prob(*unseen).mean().item() for f in (flow, robust))
    assert after < before + 0.05
    assert report.nll_swapped == pytest.approx(report.nll_before, abs=0.02)
    assert report.nll_after < report.nll_swapped
    assert not report.certificate_before.certified
    assert report.certificate_after.certified
    assert len(report.replaced) == (3 if conditional else 4)
    assert all("no condition" in why for why in report.reasons.values())
    # The given flow stays what it was.
    for key, value in flow.state_dict().items():
        assert torch.equal(value, state[key])
    assert torch.equal(-flow.log_prob(*unseen).mean(), torch.tensor(before))
    # And the promise holds where the old flow explodes.
    z = 3 * torch.randn(1024, 2)
    far = {"context": 1e4 * torch.randn(1024, 2)} if conditional else {}
    if conditional:
        x = robust.forward(z, **far)
        assert x.isfinite().all()
        radius = (z - flow.q0.loc).abs() / flow.q0.log_scale.exp()
        assert x.abs().max() <= report.certificate_after.bound(radius.max().item())
        assert not flow.forward(z, **far).abs().max() < 1e4


@pytest.mark.parametrize("name", ["blocks", "masked", "MAF", "IAF"])
def test_an_outlier_among_the_rows_spoils_nothing(name):
    flow = trained(name)
    conditional = isinstance(flow, nf.ConditionalNormalizingFlow)

    def draw(n):
        return turned_moons(n) if conditional else (moons(n),)

    x, *c = draw(2000)
    x[0] = x.mean(0) + 30 * x.std(0)
    robust, report = migrate(flow, x, *c)
    unseen = draw(4096)
    with torch.no_grad():
        gap = (flow.log_prob(*unseen) - robust.log_prob(*unseen)).mean()
    assert gap.abs() < 1e-3
    assert report.outliers == pytest.approx(1 / 2000)
    assert report.cut == pytest.approx(1 / 2000, abs=1e-3)
    assert report.nll_swapped == pytest.approx(report.nll_before, abs=1e-3)


def test_a_conditional_base_is_bounded():
    base = nf.distributions.base.ConditionalDiagGaussian(2, mlp(2, 4))
    layer = stirred(F.MaskedAffineAutoregressive(2, 8, context_features=2))
    flow = nf.ConditionalNormalizingFlow(base, [layer])
    c = torch.randn(512, 2)
    x = flow.sample(512, c)[0].detach()
    robust, report = migrate(flow, x, c)
    assert report.replaced[0].after == "BoundedDiagGaussian"
    assert report.certificate_after.certified
    with torch.no_grad():
        assert torch.allclose(flow.log_prob(x, c), robust.log_prob(x, c), atol=1e-3)
        samples, density = robust.sample(512, 1e10 * c)
        assert not flow.sample(512, 1e10 * c)[0].abs().max() < 1e6
        assert torch.allclose(robust.log_prob(samples, 1e10 * c), density, atol=1e-2)
    bound = report.certificate_after.bound(6.0)
    assert samples.abs().max() <= bound
    result = attack(robust, c[:8], noise=6.0, steps=20, restarts=2)
    assert 0.2 * bound < result.value <= bound
    robust.load_state_dict(flow.state_dict())  # weights from before fit
    with torch.no_grad():
        assert torch.allclose(flow.log_prob(x, c), robust.log_prob(x, c), atol=1e-3)
    _, again = migrate(robust, x, c)
    assert again.replaced == ()
    # A base that works in its own way is no longer covered.
    robust.q0.moments.forward = lambda mean, log_scale: (mean, log_scale)
    (refused,) = certify(robust).refused
    assert "forward of its own" in refused.reason


@pytest.mark.parametrize("layer", [lambda: Planar((2,)), lambda: F.BatchNorm()])
def test_layers_that_go_one_way_are_named(layer):
    flow = nf.NormalizingFlow(
        _base(), [F.MaskedAffineFlow(torch.tensor([0, 1]), mlp(2, 2)), layer()]
    )
    kind = type(flow.flows[1]).__name__
    _, plan = migrate(flow, dry_run=True)
    assert "one way only" in plan.reasons[f"flows.1 ({kind})"]
    with pytest.raises(TypeError, match=rf"from data to noise.*Leave out flows.1 \({kind}\)"):
        migrate(flow, torch.randn(64, 2))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", AFFINE)
def test_an_affine_layer_is_followed_exactly(name, reverse):
    old = AFFINE[name]()
    old = (Reverse(old) if reverse else old).double()
    flow = (four if width(name) == 4 else three)(old).double()
    x = flow.sample(512)[0].detach()
    robust, report = migrate(flow, x)
    (new,) = robust.flows
    assert len(report.replaced) == 1
    z = 0.5 * torch.randn(512, width(name)).double()
    for method in ("forward", "inverse"):
        data = z if method == "forward" else x
        (y, log_det), (y_old, log_det_old) = (getattr(f, method)(data) for f in (new, old))
        # Where a slope is far from the middle of all, the box is too narrow to follow.
        assert ((y - y_old).abs().amax(1) < 1e-6).double().mean() > 0.9
        assert ((log_det - log_det_old).abs() < 1e-6).double().mean() > 0.9
        assert log_det.shape == (512,)
    back, log_det_back = new.inverse(new(z)[0])
    assert torch.allclose(back, z, atol=1e-8)
    assert torch.allclose(log_det_back, -new(z)[1], atol=1e-8)
    # The log-determinant is that of the direction taken.
    for row in z[:3]:
        jacobian = torch.autograd.functional.jacobian(lambda z: new(z[None])[0][0], row)
        assert torch.allclose(new(row[None])[1], jacobian.det().abs().log(), atol=1e-7)


@pytest.mark.parametrize("slope", [1e-3, None])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SPLINES)
def test_splines_are_carried_over_exactly(name, reverse, slope):
    old = SPLINES[name]()
    flow = three(Reverse(old) if reverse else old).double()
    x = 2 * torch.randn(512, 3).double()
    robust, report = migrate(flow, x, slope=slope)
    assert torch.allclose(robust.log_prob(x), flow.log_prob(x), atol=1e-6)
    z = torch.randn(512, 3).double()
    assert torch.allclose(robust.forward(z), flow.forward(z), atol=1e-6)
    assert report.nll_swapped == pytest.approx(report.nll_before, abs=1e-7)
    assert [r.error < 1e-6 for r in report.replaced] == [True]


@pytest.mark.parametrize("make", [crqs, arqs])
def test_steep_splines_are_carried_over_as_far_as_they_may(make):
    flow = three(make())
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if "final_layer.bias" in name:
                p.copy_(1e3 * torch.randn_like(p))
    x = torch.randn(512, 3)
    layer = migrate(flow, x)[0].flows[0]
    z = torch.tensor([-1e30, -3.0, 0.0, 3.0, 1e30])[:, None].expand(5, 3)
    for method in (layer.forward, layer.inverse):
        y, log_det = method(z)
        assert y.isfinite().all()
        assert log_det.isfinite().all()


def glow(mode="channel", scale_map="sigmoid", classes=None):
    """A Glow of two levels for small images, whose weights have been somewhere."""
    bases, layers, merges = [], [], []
    for i in range(2):
        c = 2 ** (4 - i)
        steps = [F.GlowBlock(c, 8, split_mode=mode, scale_map=scale_map) for _ in range(2)]
        layers.append([*steps, F.Squeeze()])
        shape = (4, 4, 4) if i else (16, 2, 2)
        bases.append(nf.distributions.GlowBase(shape, num_classes=classes))
        if i > 0:
            merges.append(F.Merge())
    flow = nf.MultiscaleFlow(bases, layers, merges, class_cond=classes is not None)
    flow.log_prob(images(64), *([torch.zeros(64).long()] if classes else [None]))
    for name, p in flow.named_parameters():
        if "param_map" in name:
            with torch.no_grad():
                p.add_(0.05 * torch.randn_like(p))
    return flow


def images(n, channels=2, size=8):
    x = torch.rand(n, channels, size, size)
    return nn.functional.avg_pool2d(x, 3, stride=1, padding=1) + 0.05 * torch.randn_like(x)


@pytest.mark.parametrize("mode", SPLIT_MODES)
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid"])
def test_glow(mode, scale_map):
    flow = glow(mode, scale_map)
    x = images(256)
    robust, report = migrate(flow, x)
    assert len(report.replaced) == 4
    assert [name for name in report.kept if "ActNorm" in name or "Invertible1x1Conv" in name]
    assert set(report.reasons.values()) == {"no condition reaches it"}
    assert abs(report.nll_swapped - report.nll_before) < 0.05 * x[0].numel()
    assert report.certificate_after.certified
    assert report.sample_error.median < 1e-3
    for level in robust.flows:
        for old_block in list(level)[:2]:
            assert isinstance(old_block, F.GlowBlock)
            assert old_block.flows[0].flows[0].mode == mode
    samples, log_q = robust.sample(16)
    assert samples.shape == (16, 2, 8, 8)
    assert torch.allclose(robust.log_prob(samples, None), log_q, atol=0.1)


def test_glow_with_classes():
    flow = glow(classes=3)
    x, y = images(128), torch.randint(3, (128,))
    robust, report = migrate(flow, x, y, steps=3, batch_size=16)
    assert report.nll_after is not None
    assert report.sample_error is not None
    assert robust.log_prob(x, y).shape == (128,)
    base = nf.distributions.ClassCondDiagGaussian(4, 3)
    flow = nf.ClassCondFlow(base, [block()])
    robust, report = migrate(flow, torch.randn(64, 4), torch.randint(3, (64,)))
    assert [r.name for r in report.replaced] == ["flows.0.flows.1"]
    assert report.sample_error is not None


def test_all_that_is_not_the_map_is_kept():
    flow = four(block(), F.Permute(4), block("channel_inv", "sigmoid")).double().eval()
    flow.flows[2].train()
    x = torch.randn(256, 4).double()
    robust, _ = migrate(flow, x)
    assert [m.training for m in robust.modules() if isinstance(m, nn.Linear)] == [
        m.training for m in flow.modules() if isinstance(m, nn.Linear)
    ]
    assert all(
        p.dtype == torch.float64 for p in robust.state_dict().values() if p.is_floating_point()
    )
    for key, value in flow.state_dict().items():
        assert torch.equal(robust.state_dict()[key], value)
    # What was trained further on the old model loads into the new one; its units stay.
    later = copy.deepcopy(flow)
    stirred(later, 0.01)
    robust.load_state_dict(later.state_dict())
    assert torch.allclose(robust.log_prob(x), later.log_prob(x), atol=1e-3)
    again = migrate(four(block(), F.Permute(4), block("channel_inv", "sigmoid")).double(), 2 * x)[
        0
    ]
    again.load_state_dict(robust.state_dict())
    assert torch.equal(again.log_prob(x), robust.log_prob(x))


def test_a_state_dict_of_the_old_model():
    old = four(block(), block("channel_inv"))
    architecture = four(block(), block("channel_inv"))
    x = old.sample(512)[0].detach()
    robust, report = migrate(architecture, x, state_dict=old.state_dict())
    assert report.nll_before == pytest.approx(-old.log_prob(x).mean().item(), abs=1e-4)
    assert torch.allclose(robust.log_prob(x), old.log_prob(x), atol=1e-3)


def test_what_is_kept_and_why():
    class OwnCoupling(F.AffineCoupling):
        pass

    class OwnBlock(F.AffineCouplingBlock):
        def __init__(self):
            super().__init__(mlp(2, 4))
            self.flows[1] = OwnCoupling(mlp(2, 4))

    base = nf.distributions.DiagGaussian(4, trainable=False)
    flow = nf.NormalizingFlow(
        base,
        [
            OwnBlock(),
            F.CircularCoupledRationalQuadraticSpline(4, 1, 8, ind_circ=[0]),
            F.CoupledRationalQuadraticSpline(4, 1, 8, tails=None, tail_bound=1.0),
            F.MaskedAffineFlow(torch.tensor([0.5, 0.0, 1.0, 1.0]), mlp(4, 4), mlp(4, 4)),
            RobustSplineCoupling(4, 1, 8),
            F.ActNorm((4,)),
            F.LULinearPermute(4),
        ],
    )
    _, report = migrate(flow, dry_run=True)
    reasons = {name.partition(" ")[0]: why for name, why in report.reasons.items()}
    assert reasons["flows.0.flows.1"].startswith("a subclass of AffineCoupling")
    assert reasons["flows.1.prqct"].startswith("no condition leads out of its box")
    assert reasons["flows.2.prqct"] == "no condition leads out of its box (tails=None)"
    assert reasons["flows.3"] == "its mask is not of zeros and ones"
    assert reasons["flows.4"] == "robust already"
    assert reasons["flows.5"] == reasons["flows.6"] == "no condition reaches it"
    assert report.replaced == ()
    assert "nothing to replace" in str(report)


def test_a_robust_flow_is_left_alone():
    x = torch.randn(64, 4)
    robust, _ = migrate(four(block(), block("channel_inv")), x)
    again, report = migrate(robust, x)
    assert report.replaced == ()
    assert set(report.reasons.values()) == {"robust already"}
    assert "nothing to replace" in str(report)
    assert torch.equal(again.log_prob(x), robust.log_prob(x))
    for make, n in ((crqs, 3), (arqs, 3), (AFFINE["autoregressive"], 3)):
        robust, _ = migrate(three(make()), torch.randn(64, n))
        assert migrate(robust, torch.randn(64, n))[1].replaced == ()


def test_a_dry_run_changes_nothing():
    flow = four(block(), F.Permute(4), block("channel_inv", "sigmoid"))
    state = copy.deepcopy(flow.state_dict())
    same, report = migrate(flow, torch.randn(64, 4), dry_run=True)
    assert same is flow
    assert [r.name for r in report.replaced] == ["flows.0.flows.1", "flows.2.flows.1"]
    assert [type(f) for f in flow.flows] == [
        F.AffineCouplingBlock,
        F.Permute,
        F.AffineCouplingBlock,
    ]
    assert all(torch.equal(v, state[k]) for k, v in flow.state_dict().items())
    text = str(report)
    assert text.startswith("dry run")
    assert "AffineCoupling[exp]" in text
    assert "AffineCoupling[sigmoid]" in text
    assert "flows.1 (Permute): kept, no condition reaches it" in text


def test_additive_couplings_are_bounded_or_left():
    flow = three(block(scale=False, features=3), F.MaskedAffineFlow(MASK, mlp(3, 3)))
    x = torch.randn(256, 3)
    robust, report = migrate(flow, x)
    assert len(report.replaced) == 2
    assert torch.allclose(robust.log_prob(x), flow.log_prob(x), atol=1e-3)
    with torch.no_grad():
        for p in robust.parameters():
            p.mul_(1e10)
    assert robust.forward(torch.randn(64, 3)).isfinite().all()
    _, report = migrate(flow, x, additive="keep")
    assert report.replaced == ()
    assert set(report.reasons.values()) == {"additive, and left as asked"}


def test_other_models_that_hold_layers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(4))
            self.inner = nn.ModuleDict({"flow": nf.NormalizingFlow(_base_of(4), [block()])})

        def log_prob(self, x):
            return self.inner["flow"].log_prob(x * self.scale.exp()) + self.scale.sum()

    x = torch.randn(128, 4)
    robust, report = migrate(Own(), x, steps=2)
    assert [r.name for r in report.replaced] == ["inner.flow.flows.0.flows.1"]
    assert robust.log_prob(x).isfinite().all()

    # A lone layer is taken to standard normal noise; others need to be told.
    lone = F.GlowBlock(4, 8)
    robust, report = migrate(lone, images(32, 4))
    assert [r.name for r in report.replaced] == ["flows.0.flows.1"]
    stack = nn.Sequential(block(), block("channel_inv"))

    def log_prob(model, x, context):
        for layer in model:
            x, _ = layer.inverse(x)
        return x.sum(1)

    with pytest.raises(TypeError, match="has no method log_prob"):
        migrate(stack, x)
    assert len(migrate(stack, x, log_prob=log_prob)[1].replaced) == 2


def _base_of(n):
    return nf.distributions.DiagGaussian(n, trainable=False)


def test_a_layer_that_is_used_twice():
    layer = block()
    flow = four(layer, F.Permute(4, mode="swap"), layer)
    x = torch.randn(256, 4)
    robust, report = migrate(flow, x)
    assert len(report.replaced) == 1
    assert robust.flows[0] is robust.flows[2]
    z = torch.randn(64, 4)
    assert torch.allclose(robust.inverse(robust.forward(z)), z, atol=1e-4)


def test_composites_and_lists():
    composite = F.base.Composite([block(), Reverse(block("channel_inv"))])
    split = [F.Split("checkerboard"), F.AffineCoupling(mlp(2, 4)), F.Merge("checkerboard")]
    flow = four(composite, *split)
    x = flow.sample(512)[0].detach()
    robust, report = migrate(flow, x)
    assert len(report.replaced) == 3
    assert ((robust.log_prob(x) - flow.log_prob(x)).abs() < 1e-3).float().mean() > 0.9
    z = torch.randn(64, 4)
    assert torch.allclose(robust.inverse(robust.forward(z)), z, atol=1e-3)


def test_a_masked_flow_of_images():
    mask = (torch.arange(6)[:, None] + torch.arange(6)) % 2
    nets = [
        nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
        for _ in range(2)
    ]
    layer = F.MaskedAffineFlow(mask.expand(2, 6, 6).float(), *nets)
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian((2, 6, 6)), [layer])
    x = torch.randn(128, 2, 6, 6)
    robust, _ = migrate(flow, x)
    assert torch.allclose(robust.log_prob(x), flow.log_prob(x), atol=1e-2)
    z = torch.randn(8, 2, 6, 6)
    y = robust.forward(z)
    assert torch.equal(y[:, mask.bool().expand(2, 6, 6)], z[:, mask.bool().expand(2, 6, 6)])
    assert torch.allclose(robust.inverse(y), z, atol=1e-4)


def test_a_guarded_flow_is_migrated_inside_its_guard():
    layers = [F.MaskedAffineAutoregressive(2, 16, context_features=4)]
    flow = nf.ConditionalNormalizingFlow(_base(), layers)
    conditioner = OODConditioner(nn.Linear(3, 4), policy="report")
    x, context = torch.randn(256, 2), torch.randn(256, 3)
    robust, report = migrate(GuardedConditionalFlow(flow, conditioner), x, context, steps=2)
    assert isinstance(robust, GuardedConditionalFlow)
    assert [r.name for r in report.replaced] == ["flow.flows.0"]
    assert report.sample_error is not None


def test_stock_blocks_within_a_conditional_multiscale_flow():
    stock = glow()
    flow = ConditionalMultiscaleFlow(stock.q0, [list(f) for f in stock.flows], list(stock.merges))
    x, context = images(64), torch.randn(64, 1, 8, 8)
    robust, report = migrate(flow, x, context)
    assert len(report.replaced) == 4
    assert report.sample_error is not None
    samples, _ = robust.sample(4, torch.randn(4, 1, 8, 8))
    assert samples.shape == (4, 2, 8, 8)


EXTREMES = [0.0, 1.0, -1.0, 1e4, -1e4, 1e30, -1e30, math.inf, -math.inf]


class _Says(nn.Module):
    """A network that says the same whatever it is asked."""

    def __init__(self, what):
        super().__init__()
        self.what = nn.Parameter(what)

    def forward(self, z):
        return self.what.expand(len(z), -1) + 0 * z[:, :1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_whatever_the_network_says_samples_are_finite(scale_map, dtype):
    flow = four(block("channel", scale_map)).to(dtype)
    robust, _ = migrate(flow, torch.randn(256, 4, dtype=dtype))
    layer = robust.flows[0]
    for a in EXTREMES:
        for b in EXTREMES:
            what = torch.tensor([a, b, b, a], dtype=dtype)
            layer.flows[1].param_map = _Says(what)
            z = torch.tensor([[0.0, 1.0, -2.0, 3.0], [1e4, 0.0, 1e4, -1e4]], dtype=dtype)
            z.requires_grad_()
            for method in (layer.forward, layer.inverse):
                y, log_det = method(z)
                assert y.isfinite().all()
                assert log_det.isfinite().all()
                grads = torch.autograd.grad(
                    y.sum() + log_det.sum(), (z, layer.flows[1].param_map.what)
                )
                assert all(g.isfinite().all() for g in grads)


@given(st.sampled_from(sorted(AFFINE)), st.booleans(), st.integers(0, 1000), st.floats(0, 100))
def test_the_certificate_of_a_layer_holds(name, reverse, seed, radius):
    torch.manual_seed(seed)
    layer = AFFINE[name]()
    layer = Reverse(layer) if reverse else layer
    flow = (four if width(name) == 4 else three)(layer)
    robust, _ = migrate(flow, 3 * torch.randn(64, width(name)) + 1)
    (layer,) = robust.flows
    certificate = certify(layer)
    assert certificate.certified
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(10 ** float(torch.randint(-1, 4, ())) * torch.randn_like(p))
    z = radius * torch.cat(
        (torch.randn(64, width(name)).sign(), 2 * torch.rand(64, width(name)) - 1)
    )
    assert layer(z)[0].abs().max() <= certificate.bound(radius)


@pytest.mark.parametrize("name", ["block-channel-exp", "masked", "autoregressive"])
def test_copies_of_all_kinds(name, tmp_path):
    flow = (four if width(name) == 4 else three)(AFFINE[name]())
    x = torch.randn(64, width(name))
    robust, _ = migrate(flow, x)
    for again in (copy.deepcopy(robust), pickle.loads(pickle.dumps(robust))):
        assert torch.equal(again.log_prob(x), robust.log_prob(x))
    robust.save(tmp_path / "flow.pth")
    other, _ = migrate(flow, 2 * x + 1)
    other.load(tmp_path / "flow.pth")
    assert torch.equal(other.log_prob(x), robust.log_prob(x))
    assert "Inscribed" in repr(robust)


@pytest.mark.parametrize("name", SPLINES)
def test_copies_of_splines(name, tmp_path):
    x = torch.randn(64, 3)
    robust, _ = migrate(three(SPLINES[name]()), x)
    torch.save(robust, tmp_path / "flow.pth")
    again = torch.load(tmp_path / "flow.pth", weights_only=False)
    assert torch.equal(again.log_prob(x), robust.log_prob(x))
    other, _ = migrate(three(SPLINES[name]()), x)
    other.load_state_dict(robust.state_dict())
    assert torch.equal(other.log_prob(x), robust.log_prob(x))


def test_hooks_and_wrappers_are_kept():
    calls = []
    flow = three(masked(), crqs())
    for layer in (flow.flows[0], flow.flows[1].prqct):
        layer.register_forward_hook(lambda module, inputs, output: calls.append(module))
    robust, _ = migrate(flow, torch.randn(64, 3))
    assert type(robust.flows[1]) is F.CoupledRationalQuadraticSpline
    calls.clear()
    robust.flows[0](torch.randn(2, 3))
    assert calls == [robust.flows[0]]


@pytest.mark.parametrize("name", ["block-channel-exp", "block-channel_inv-sigmoid", "masked"])
def test_odd_inputs(name):
    flow = (four if width(name) == 4 else three)(AFFINE[name]())
    robust, _ = migrate(flow, torch.randn(64, width(name)))
    (layer,) = robust.flows
    z = torch.randn(width(name), 8).T  # not contiguous
    assert torch.equal(layer(z)[0], layer(z.contiguous())[0])
    y, log_det = layer(z[:0])
    assert y.shape == (0, width(name))
    assert log_det.shape == (0,)
    # How many features are masked is read from a tensor, which breaks the graph of torch 2.6.
    whole = name != "masked" or TorchVersion(torch.__version__) >= "2.7"
    compiled = torch.compile(layer, fullgraph=whole, backend="aot_eager")
    assert torch.allclose(compiled(z)[0], layer(z)[0], atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: F.MaskedAffineAutoregressive(4, 16, context_features=3),
        lambda: F.CoupledRationalQuadraticSpline(4, 1, 16, num_context_channels=3),
        lambda: F.AutoregressiveRationalQuadraticSpline(4, 1, 16, num_context_channels=3),
    ],
    ids=["affine", "coupled", "autoregressive"],
)
def test_infinite_contexts_and_empty_batches(layer):
    flow = nf.ConditionalNormalizingFlow(_base_of(4), [stirred(layer())])
    x, c = torch.randn(64, 4), torch.randn(64, 3)
    robust, _ = migrate(flow, x, c)
    for far in (math.inf, -math.inf, 1e30):
        samples, log_q = robust.sample(5, torch.full((5, 3), far))
        assert samples.isfinite().all()
        assert log_q.isfinite().all()
        assert robust.log_prob(x[:5], torch.full((5, 3), far)).isfinite().all()
    assert robust.sample(5, torch.full((5, 3), math.nan))[0].isnan().any()  # not hidden
    assert robust.log_prob(x[:0], c[:0]).shape == (0,)
    assert robust.forward(x[:0], c[:0]).shape == (0, 4)


def test_half_precision():
    robust, _ = migrate(four(block()), torch.randn(64, 4))
    layer = robust.flows[0].bfloat16()
    z = torch.randn(16, 4, dtype=torch.bfloat16)
    x, log_det = layer(z)
    assert x.dtype == log_det.dtype == torch.bfloat16
    assert torch.allclose(layer.inverse(x)[0], z, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_splines_work_in_half_precision_and_under_autocast(dtype):
    x, c = torch.randn(64, 4), torch.randn(64, 2)
    layer = nf.flows.CoupledRationalQuadraticSpline(4, 2, 16, num_context_channels=2)
    flow = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(4), [layer])
    robust, _ = migrate(flow, x, c)
    expected = flow.log_prob(x, c)
    with torch.autocast("cpu", dtype):
        assert torch.allclose(robust.log_prob(x, c), expected, atol=0.5)
    half = robust.flows[0].to(dtype)
    z = half.inverse(x.to(dtype), c.to(dtype))[0]
    assert z.dtype == dtype
    assert torch.allclose(half(z, c.to(dtype))[0].float(), x, atol=0.2)


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))  # 1e38 times it is finite


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: migrate(four(block()), X, X), ValueError, "NormalizingFlow takes no context"),
        (
            lambda: migrate(nf.ClassCondFlow(_base_of(4), [block()]), X),
            ValueError,
            "ClassCondFlow is class-conditional: give the classes",
        ),
        (lambda: migrate(four(block()), X[0]), ValueError, r"one row for each; got \(4,\)"),
        (lambda: migrate(four(block()), X, X[:7]), ValueError, "got 7 and 8"),
        (
            lambda: migrate(four(block()), X / 0),
            ValueError,
            "must be finite; got 8 of 8 rows of x",
        ),
        (lambda: migrate(four(block()), 1e38 * X), ValueError, "NaN or infinity, at flows.0"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
