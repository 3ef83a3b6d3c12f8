r"""Tests for the migration of nflows' flows, and of those of its fork in glasflow."""

import copy
import importlib
import importlib.util
import math
import pickle
from functools import cache

import pytest
import torch
import torch.nn as nn

from flowguard.bounds import attack, certify
from flowguard.migration import migrate
from flowguard.migration.inscribe import inscribe
from flowguard.ood import OODConditioner, OODContextError
from flowguard.transforms import RobustSpline

HOSTS = [
    name
    for name in ("nflows", "glasflow.nflows")
    if importlib.util.find_spec(name.partition(".")[0]) is not None
]
if not HOSTS:
    pytest.skip("neither nflows nor glasflow is installed", allow_module_level=True)

from flowguard.integrations.nflows import (  # noqa: E402
    MaskedRobustSplineAutoregressiveTransform,
    RobustSplineCouplingTransform,
)
from flowguard.integrations.nflows.bases import BoundedDiagonalNormal  # noqa: E402


class Host:
    """The classes of a host."""

    def __init__(self, name):
        self.name = name
        self.T = importlib.import_module(f"{name}.transforms")
        self.nets = importlib.import_module(f"{name}.nn.nets")
        self.Flow = importlib.import_module(f"{name}.flows").Flow
        self.Normal = importlib.import_module(f"{name}.distributions").StandardNormal

    def net(self, hidden=32, context=2):
        return lambda i, o: self.nets.ResidualNet(i, o, hidden, context_features=context)

    def conv_net(self, hidden=16, context=3):
        return lambda i, o: self.nets.ConvResidualNet(i, o, hidden, context_channels=context)

    def flow(self, layers, shape=(2,), **kwargs):
        transform = layers if isinstance(layers, nn.Module) else self.T.CompositeTransform(layers)
        return self.Flow(transform, self.Normal(list(shape)), **kwargs)

    def coupling(self, mask=(1, 0), **kwargs):
        return self.T.AffineCouplingTransform(list(mask), self.net(), **kwargs)

    def masked(self, features=2):
        return self.T.MaskedAffineAutoregressiveTransform(features, 32, context_features=2)

    def spline(self, mask=(1, 0), net=None, **kwargs):
        return self.T.PiecewiseRationalQuadraticCouplingTransform(
            list(mask), net or self.net(), tails="linear", tail_bound=3.0, **kwargs
        )

    def masked_spline(self, features=2):
        return self.T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            features, 32, context_features=2, tails="linear", tail_bound=3.0, num_bins=6
        )


@pytest.fixture(params=HOSTS)
def host(request):
    return Host(request.param)


def moons(n):
    """Two moons, turned by the context, away from standard units."""
    c = torch.randn(n, 2)
    t = math.pi * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, t.cos(), 1 - t.cos()) - 0.5
    y = torch.where(upper, t.sin(), 0.5 - t.sin()) - 0.25
    points = torch.stack((x, y), -1) + 0.1 * torch.randn(n, 2)
    cos, sin = c[:, 0].cos(), c[:, 0].sin()
    turned = torch.stack(
        (cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]), -1
    )
    return 3 * torch.exp(0.3 * c[:, 1:]) * turned + 5, c


MAKE = {
    "RealNVP": lambda h: [h.coupling((1, 0) if i % 2 else (0, 1)) for i in range(4)],
    "MAF": lambda h: [m for _ in range(2) for m in (h.masked(), h.T.ReversePermutation(2))],
    "NICE": lambda h: [
        *(h.T.AdditiveCouplingTransform([1, 0] if i % 2 else [0, 1], h.net()) for i in range(4)),
        h.T.LULinear(2),
    ],
}


@cache
def trained(host, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        h = Host(host)
        flow = h.flow([h.T.ActNorm(2), *MAKE[kind](h)])
        optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
        for _ in range(200):
            x, c = moons(256)
            optimizer.zero_grad()
            (-flow.log_prob(x, c).mean()).backward()
            optimizer.step()
        return flow.eval()


def decode(flow, z, c):
    return flow._transform.inverse(z, context=flow._embedding_net(c))[0]


@pytest.mark.parametrize("kind", MAKE)
def test_a_trained_flow_becomes_robust_and_stays_the_same_flow(host, kind):
    flow = trained(host.name, kind)
    state = copy.deepcopy(flow.state_dict())
    x, c = moons(4096)
    robust, report = migrate(flow, calibration=(x, c))
    # The same density and the same samples, but where the box of a spline ends.
    x, c = moons(4096)  # not those that the units were measured on
    with torch.no_grad():
        gap = (flow.log_prob(x, c) - robust.log_prob(x, c)).abs()
        z = torch.randn(4096, 2)
        moved = (decode(flow, z, c) - decode(robust, z, c)).abs() / x.std(0)
    assert gap.median() < 1e-4
    assert gap.mean() < 0.02
    assert report.nll_swapped < report.nll_before + 0.02  # it may do without an outlier
    assert moved.median() < 1e-4
    assert moved.quantile(0.99) < 0.1
    assert report.sample_error.median < 1e-4
    assert report.sample_error.q99 < 0.1
    assert all(r.error < 0.1 for r in report.replaced)
    # The old one would not hold, the new one does.
    assert not report.certificate_before.certified
    assert report.certificate_after.certified
    far = 1e4 * torch.randn(512, 2)
    with torch.no_grad():
        samples = decode(robust, z[:512], far)
        assert not decode(flow, z[:512], far).abs().max() < 1e3
    assert samples.isfinite().all()
    assert samples.abs().max() <= report.certificate_after.bound(z[:512].abs().max().item())
    # Nothing happened to the flow that was given.
    for key, value in flow.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("kind", MAKE)
def test_an_outlier_among_the_rows_spoils_nothing(host, kind):
    flow = trained(host.name, kind)
    x, c = moons(2000)
    x[0] = x.mean(0) + 30 * x.std(0)
    robust, report = migrate(flow, x, c)
    unseen = moons(4096)
    with torch.no_grad():
        gap = (flow.log_prob(*unseen) - robust.log_prob(*unseen)).mean()
    assert gap.abs() < 1e-3
    assert report.outliers == pytest.approx(1 / 2000)
    assert report.cut == pytest.approx(1 / 2000, abs=1e-3)
    assert report.nll_swapped == pytest.approx(report.nll_before, abs=1e-3)
    assert "0.05% of the rows are outliers" in str(report)
    # Nor does it make the bound a larger one.
    x[0], c[0] = x[1], c[1]
    clean = migrate(flow, x, c)[1].certificate_after.bound(5.0)
    assert report.certificate_after.bound(5.0) == pytest.approx(clean, rel=0.05)


def test_conditional_bases_are_bounded(host):
    distributions = importlib.import_module(f"{host.name}.distributions")
    bases = {
        "BoundedDiagonalNormal": distributions.ConditionalDiagonalNormal([2], nn.Linear(2, 4)),
        "BoundedMADEMoG": distributions.MADEMoG(2, 16, 2, num_mixture_components=3),
    }
    for name, base in bases.items():
        flow, c = host.Flow(host.coupling(), base), torch.randn(512, 2)
        x = flow.sample(1, c)[:, 0].detach()
        robust, report = migrate(flow, x, c)
        assert report.replaced[-1].after == name
        assert "_distribution" in {step.name for step in report.certificate_before.refused}
        assert report.certificate_after.certified
        with torch.no_grad():
            assert torch.allclose(flow.log_prob(x, c), robust.log_prob(x, c), atol=1e-3)
            # Of ten thousand normal numbers hardly one is beyond six.
            samples = robust.sample(10, 1e10 * c)
        assert samples.abs().max() <= report.certificate_after.bound(6.0)
        assert not flow.sample(10, 1e10 * c).abs().max() < 1e6
        robust.load_state_dict(flow.state_dict())  # weights from before fit
        with torch.no_grad():
            assert torch.allclose(flow.log_prob(x, c), robust.log_prob(x, c), atol=1e-3)
        loaded = pickle.loads(pickle.dumps(robust._distribution))
        assert torch.equal(loaded.log_prob(x, c), robust._distribution.log_prob(x, c))
        _, again = migrate(robust, x, c)
        assert again.replaced == ()
        assert again.reasons[f"_distribution ({name})"] == "bounded already"


def test_the_bound_of_a_bounded_base_is_attacked_in_vain(host):
    normal = importlib.import_module(f"{host.name}.distributions").ConditionalDiagonalNormal
    flow, c = host.Flow(host.coupling(), normal([2], nn.Linear(2, 4))), torch.randn(512, 2)
    x = flow.sample(1, c)[:, 0].detach()
    robust, report = migrate(flow, x, c)
    result = attack(robust, c[:16], steps=30, restarts=2)
    bound = report.certificate_after.bound(4.0)
    assert 0.2 * bound < result.value <= bound


class Louder(BoundedDiagonalNormal):
    def _compute_params(self, context):
        mean, log_std = super()._compute_params(context)
        return 10 * mean, log_std


def test_a_bounded_base_that_works_in_its_own_way_is_refused(host):
    normal = importlib.import_module(f"{host.name}.distributions").ConditionalDiagonalNormal
    flow, c = host.Flow(host.coupling(), normal([2], nn.Linear(2, 4))), torch.randn(64, 2)
    robust, _ = migrate(flow, flow.sample(1, c)[:, 0].detach(), c)
    assert certify(robust).certified
    robust._distribution.__class__ = Louder
    (refused,) = certify(robust).refused
    assert "Louder overrides _compute_params" in refused.reason


class OwnBase(nn.Module):
    def log_prob(self, inputs, context=None):
        return -(inputs - context).square().sum(1) / 2


def test_a_base_of_the_users_own_is_kept_with_a_reason(host):
    flow = host.flow([host.coupling()])
    flow._distribution = OwnBase()
    _, report = migrate(flow, torch.randn(256, 2), torch.randn(256, 2))
    assert "does not know" in report.reasons["_distribution (OwnBase)"]


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_autograd_switched_off_is_no_obstacle(host, off):
    with off():
        flow, (x, c) = host.flow([host.coupling()]), moons(256)
        robust, report = migrate(flow, x, c, steps=2)
    assert report.nll_after is not None
    (-robust.log_prob(*moons(8)).mean()).backward()  # it can be trained on


def test_a_guard_that_raises_lets_all_pass_meanwhile(host):
    guard = OODConditioner(policy="raise", alpha=0.5)
    x, c = moons(512)
    guard.fit(c[:256], progress=False).calibrate(c[256:], progress=False)
    flow = host.flow([host.coupling()], embedding_net=guard).eval()
    robust, report = migrate(flow, x, c)
    result = attack(robust, c[:8], steps=2, restarts=2)
    assert result.value <= report.certificate_after.bound(4.0)
    assert robust._embedding_net.report is None
    with pytest.raises(OODContextError):
        robust.log_prob(x, c)


@pytest.mark.parametrize("kind", ["RealNVP", "MAF"])
def test_fine_tuning_goes_on_from_there(host, kind):
    flow = trained(host.name, kind)
    x, c = moons(4096)
    robust, report = migrate(flow, x, c, steps=60)
    assert report.nll_after < report.nll_swapped < report.nll_before + 0.02
    assert report.certificate_after.certified
    assert not any(m.training for m in robust.modules())
    held_x, held_c = moons(4096)
    with torch.no_grad():
        before, after = (-f.log_prob(held_x, held_c).mean() for f in (flow, robust))
    assert after < before + 0.02


def test_masks_networks_and_order_are_kept(host):
    flow = trained(host.name, "RealNVP")
    robust, _ = migrate(flow, *moons(512))
    old, new = flow._transform._transforms, robust._transform._transforms
    assert type(new[0]) is type(old[0])
    for a, b in zip(old[1:], new[1:], strict=True):
        assert isinstance(b, RobustSplineCouplingTransform)
        assert torch.equal(a.identity_features, b.identity_features)
        assert torch.equal(a.transform_features, b.transform_features)
        assert type(b.transform_net) is type(a.transform_net)
        for p, q in zip(a.transform_net.parameters(), b.transform_net.parameters(), strict=True):
            assert torch.equal(p, q)
            assert p is not q
    robust, _ = migrate(trained(host.name, "MAF"), *moons(512))
    masked = robust._transform._transforms[1]
    assert isinstance(masked, MaskedRobustSplineAutoregressiveTransform)
    c = torch.randn(1, 2)
    jacobian = torch.autograd.functional.jacobian(lambda x: masked(x, c)[0], torch.randn(1, 2))
    assert jacobian[0, 0, 0, 1] == 0  # still autoregressive


@pytest.mark.parametrize("slope", [1e-3, None])
def test_splines_are_carried_over_exactly(host, slope):
    unconditional = host.spline(apply_unconditional_transform=True)
    layers = [host.spline((0, 1)), host.masked_spline(), unconditional]
    flow = host.flow(layers).double()
    x, c = torch.randn(2, 512, 2).double()
    robust, report = migrate(flow, x, c, slope=slope)
    assert [r.before for r in report.replaced] == [
        "PiecewiseRationalQuadraticCouplingTransform",
        "MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
        "PiecewiseRationalQuadraticCouplingTransform",
    ]
    # nflows raises the last knot by 1e-6 while it looks for a bin.
    assert torch.allclose(robust.log_prob(x, c), flow.log_prob(x, c), atol=1e-7)
    z = torch.randn(512, 2).double()
    assert torch.allclose(decode(robust, z, c), decode(flow, z, c), atol=1e-7)
    kept = robust._transform._transforms[2].unconditional_transform
    assert type(kept) is type(unconditional.unconditional_transform)
    assert report.certificate_after.certified
    assert robust.log_prob(x, 1e30 * c).isfinite().all()


def test_extreme_logits_of_a_carried_spline(host):
    flow = host.flow([host.spline()])
    with torch.no_grad():
        flow._transform._transforms[0].transform_net.final_layer.bias.mul_(1e4)
    x, c = torch.randn(512, 2), torch.randn(512, 2)
    robust, _ = migrate(flow, x, c)
    for context in (c, 1e30 * c, torch.full_like(c, torch.inf)):
        assert robust.log_prob(x, context).isfinite().all()
        assert decode(robust, x, context).abs().max() <= max(3.0, x.abs().max())


def image_flow(host, dtype=torch.float32):
    """Glow in miniature: one scale, on a context of the same size."""
    T = host.T
    layers = [T.SqueezeTransform()]
    for i in range(2):
        mask = torch.arange(12) % 2 == i
        layers += [
            T.ActNorm(12),
            T.OneByOneConvolution(12),
            T.AffineCouplingTransform(mask, host.conv_net()),
        ]
    return host.flow(layers, (12, 4, 4)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images(host, dtype):
    torch.set_default_dtype(torch.float32)
    flow = image_flow(host, dtype)
    x, c = torch.randn(64, 3, 8, 8, dtype=dtype), torch.randn(64, 3, 4, 4, dtype=dtype)
    flow.log_prob(x, c)  # actnorm looks at its data
    robust, report = migrate(flow, x, c)
    atol = 1e-3 if dtype == torch.float32 else 1e-9
    assert torch.allclose(robust.log_prob(x, c), flow.log_prob(x, c), atol=atol)
    assert report.sample_error.q99 < 1e-4
    assert report.certificate_after.certified
    assert all(t.dtype == dtype for t in robust.state_dict().values() if t.is_floating_point())
    z = torch.randn(64, 12, 4, 4, dtype=dtype)
    assert decode(robust, z, c).dtype == dtype
    assert decode(robust, z, 1e20 * c).isfinite().all()
    # Another size, and no rows at all.
    assert decode(robust, z[:1].repeat(1, 1, 2, 2), c[:1].repeat(1, 1, 2, 2)).shape[-1] == 16
    empty, ladj = robust._transform(x[:0], c[:0])
    assert empty.shape == (0, 12, 4, 4)
    assert ladj.shape == (0,)


def test_nested_flows_and_a_module_of_the_users_own(host):
    T = host.T

    class Posterior(nn.Module):
        def __init__(self):
            super().__init__()
            self.summary = nn.Linear(5, 2)
            multiscale = T.MultiscaleCompositeTransform(2)
            shape = multiscale.add_transform(
                T.CompositeTransform([host.coupling((1, 0) * 2)]), (4,)
            )
            multiscale.add_transform(T.InverseTransform(host.coupling()), shape)
            self.parts = nn.ModuleDict({"flow": host.flow(multiscale, (4,))})

        def log_prob(self, x, y):
            return self.parts["flow"].log_prob(x, self.summary(y))

    model = Posterior()
    x, y = torch.randn(512, 4), torch.randn(512, 5)
    robust, report = migrate(model, x, y)
    assert isinstance(robust, Posterior)
    assert [r.name for r in report.replaced] == [
        "parts.flow._transform._transforms.0._transforms.0",
        "parts.flow._transform._transforms.1._transform",
    ]
    assert torch.allclose(robust.log_prob(x, y), model.log_prob(x, y), atol=1e-4)
    assert report.sample_error is None


def test_a_module_that_has_to_say_what_its_density_is(host):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList([host.coupling(), host.coupling((0, 1))])

        def forward(self, x, y):
            total = 0.0
            for step in self.steps:
                x, ladj = step(x, y)
                total = total + ladj
            return x.square().sum(1) / 2 - total

    model = Loss()
    x, y = torch.randn(256, 2), torch.randn(256, 2)
    with pytest.raises(TypeError, match="log_prob=lambda model, x, context"):
        migrate(model, x, y)
    robust, report = migrate(model, x, y, log_prob=lambda m, x, y: -m(x, y), steps=2)
    assert len(report.replaced) == 2
    assert report.nll_swapped == pytest.approx(model(x, y).mean().item(), abs=1e-4)
    assert report.nll_after is not None
    assert isinstance(robust.steps[0], RobustSplineCouplingTransform)


def test_a_lone_transform_and_one_that_is_shared(host):
    layer = host.coupling()
    x, c = torch.randn(256, 2), torch.randn(256, 2)
    robust, report = migrate(layer, x, c)
    assert isinstance(robust, RobustSplineCouplingTransform)
    assert torch.allclose(robust(x, c)[0], layer(x, c)[0], atol=1e-5)
    assert report.replaced[0].name == ""
    twice = host.T.CompositeTransform([layer, host.T.ReversePermutation(2), layer])
    robust, report = migrate(twice, x, c)
    assert len(report.replaced) == 1
    assert robust._transforms[0] is robust._transforms[2]
    assert torch.allclose(robust(x, c)[0], twice(x, c)[0], atol=1e-5)


class Peculiar:
    """A coupling of the user's own, made for a host."""

    def __new__(cls, host):
        class Doubled(host.T.AffineCouplingTransform):
            def _scale_and_shift(self, transform_params):
                scale, shift = super()._scale_and_shift(transform_params)
                return 2 * scale, shift

        return Doubled([1, 0], host.net())


def test_what_is_kept_and_why(host):
    T = host.T
    closed = T.PiecewiseRationalQuadraticCouplingTransform([1, 0], host.net(), num_bins=4)
    layers = [
        host.coupling(),
        T.AdditiveCouplingTransform([0, 1], host.net()),
        T.ActNorm(2),
        T.LULinear(2),
        T.PiecewiseQuadraticCouplingTransform([1, 0], host.net(), tails="linear"),
        Peculiar(host),
        T.Sigmoid(),
        closed,
        T.InverseTransform(T.Sigmoid()),
        RobustSplineCouplingTransform([0, 1], host.net()),
    ]
    flow = host.flow(layers)
    x, c = torch.randn(128, 2), torch.randn(128, 2)
    _, report = migrate(flow, x, c, additive="keep")
    assert [r.name for r in report.replaced] == ["_transform._transforms.0"]
    whys = {name.rpartition(".")[2]: report.reasons[name] for name in report.kept}
    assert whys["1 (AdditiveCouplingTransform)"] == "additive, and left as asked"
    assert whys["2 (ActNorm)"] == whys["3 (LULinear)"] == "no condition reaches it"
    assert "rational-quadratic" in whys["4 (PiecewiseQuadraticCouplingTransform)"]
    assert "subclass of AffineCouplingTransform" in whys["5 (Doubled)"]
    assert "tails=None" in whys["7 (PiecewiseRationalQuadraticCouplingTransform)"]
    assert whys["9 (RobustSplineCouplingTransform)"] == "robust already"
    assert len(report.kept) == 9
    for name in report.kept:
        assert f"{name}: kept, {report.reasons[name]}" in str(report)


def test_additive_couplings_are_bounded_unless_they_shall_not_be(host):
    flow = trained(host.name, "NICE")
    x, c = moons(1024)
    robust, report = migrate(flow, x, c)
    assert len(report.replaced) == 4
    assert report.certificate_after.certified
    z, ladj = robust._transform._transforms[1](x, 1e10 * c)
    assert (ladj == 0).all()  # it still keeps volumes
    assert (z - x).abs().max() < 100
    kept, report = migrate(flow, x, c, additive="keep")
    assert report.replaced == ()
    assert not report.certificate_after.certified
    assert torch.equal(kept.log_prob(x, c), flow.log_prob(x, c))


def test_nothing_to_replace_says_so(host):
    flow = host.flow([RobustSplineCouplingTransform([1, 0], host.net()), host.T.LULinear(2)])
    x, c = torch.randn(64, 2), torch.randn(64, 2)
    same, report = migrate(flow, x, c, steps=5)
    assert report.replaced == ()
    assert "nothing to replace" in str(report)
    assert torch.equal(same.log_prob(x, c), flow.log_prob(x, c))
    _, report = migrate(migrate(host.flow([host.coupling()]), x, c)[0], x, c)
    assert "nothing to replace" in str(report)


def test_dry_run_changes_nothing(host):
    flow = host.flow([host.coupling(), host.coupling((0, 1))])
    state = copy.deepcopy(flow.state_dict())
    before = torch.random.get_rng_state()
    same, plan = migrate(flow, dry_run=True)
    assert same is flow
    assert [r.before for r in plan.replaced] == ["AffineCouplingTransform"] * 2
    assert plan.certificate_after is None
    x, c = torch.randn(128, 2), torch.randn(128, 2)
    torch.random.set_rng_state(before)
    same, report = migrate(flow, x, c, dry_run=True, steps=10)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same is flow
    assert "dry run" in str(report)
    assert report.nll_swapped == pytest.approx(report.nll_before, abs=1e-3)
    assert report.nll_after is None
    assert type(flow._transform._transforms[0]).__name__ == "AffineCouplingTransform"
    assert all(torch.equal(v, state[k]) for k, v in flow.state_dict().items())
    assert flow.training


@pytest.mark.parametrize("kind", ["RealNVP", "MAF"])
def test_old_and_new_weights_load(host, kind, tmp_path):
    flow = trained(host.name, kind)
    torch.save(flow.state_dict(), tmp_path / "old.pth")
    old = torch.load(tmp_path / "old.pth")
    x, c = moons(1024)
    fresh = host.flow([host.T.ActNorm(2), *MAKE[kind](host)]).eval()
    robust, _ = migrate(fresh, x, c, state_dict=old)
    assert (robust.log_prob(x, c) - flow.log_prob(x, c)).abs().median() < 1e-4
    # Weights of the flow as it was fit into the migrated one, too.
    other, _ = migrate(flow, x, c, steps=3)
    other.load_state_dict(old)
    assert (other.log_prob(x, c) - flow.log_prob(x, c)).abs().median() < 1e-4
    # And so do those of a migrated one, with their units.
    third, _ = migrate(fresh, 2 * x, c)
    third.load_state_dict(robust.state_dict())
    assert torch.equal(third.log_prob(x, c), robust.log_prob(x, c))
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        migrate(host.flow([host.coupling((1, 0, 1))], (3,)), x, c, state_dict=old)


def test_batches_of_a_loader_are_taken(host):
    x, c = moons(600)
    flow = host.flow([host.coupling()])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, c), batch_size=256)
    _, report = migrate(flow, calibration=loader)
    assert report.nll_before == pytest.approx(-flow.log_prob(x, c).mean().item(), rel=1e-5)
    no_context = host.flow([host.T.MaskedAffineAutoregressiveTransform(2, 8)])
    _, report = migrate(no_context, calibration=[x[:300], x[300:]])
    assert len(report.replaced) == 1


def test_modes_grads_and_devices_are_kept(host):
    flow = host.flow([host.coupling(), host.coupling((0, 1))])
    flow._transform._transforms[0].eval()
    for p in flow._transform._transforms[1].parameters():
        p.requires_grad_(False)
    robust, _ = migrate(flow, *moons(128))
    first, second = robust._transform._transforms
    assert not first.training
    assert not first.transform_net.training
    assert second.training
    assert not any(p.requires_grad for p in second.parameters())
    assert robust.training


def test_layers_that_the_data_never_reach_are_kept(host):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow, self.spare = host.flow([host.coupling()]), host.coupling()

        def log_prob(self, x, c):
            return self.flow.log_prob(x, c)

    _, report = migrate(Spare(), *moons(64))
    assert report.reasons["spare (AffineCouplingTransform)"] == (
        "the calibration pairs do not reach it"
    )


def test_a_flow_without_an_inverse(host):
    class OneWay(host.T.base.Transform):
        def forward(self, inputs, context=None):
            return inputs, inputs.new_zeros(len(inputs))

    robust, report = migrate(host.flow([host.coupling(), OneWay()]), *moons(64))
    assert len(report.replaced) == 1
    assert report.sample_error is None
    assert "flowguard does not know it" in str(report)
    assert robust.log_prob(*moons(8)).isfinite().all()


def test_a_network_of_the_users_own_is_kept_as_it_is(host):
    class Net(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(inputs + 2, 8), nn.Tanh(), nn.Linear(8, outputs))

        def forward(self, x, context):
            return 2 * torch.sin(self.body(torch.cat((x, context), 1)))

    flow = host.flow([host.T.AffineCouplingTransform([1, 0], Net)])
    x, c = moons(256)
    robust, _ = migrate(flow, x, c)
    assert isinstance(robust._transform._transforms[0].transform_net, Net)
    assert torch.allclose(robust.log_prob(x, c), flow.log_prob(x, c), atol=1e-3)


def test_other_scales_of_the_fork():
    if "glasflow.nflows" not in HOSTS:
        pytest.skip("glasflow is not installed")
    host = Host("glasflow.nflows")
    general = host.T.AffineCouplingTransform.GENERAL_SCALE_ACTIVATION
    layers = [
        host.coupling(scale_activation=general),
        host.T.MaskedAffineAutoregressiveTransform(
            2, 8, context_features=2, scale_activation=lambda s: torch.exp(0.1 * s)
        ),
    ]
    flow = host.flow(layers)
    x, c = moons(256)
    robust, report = migrate(flow, x, c)
    assert len(report.replaced) == 2
    assert torch.allclose(robust.log_prob(x, c), flow.log_prob(x, c), atol=1e-3)


def test_the_flows_that_the_fork_brings():
    glasflow = pytest.importorskip("glasflow")
    x, c = torch.randn(2, 512, 2)
    flow = glasflow.RealNVP(2, 3, n_conditional_inputs=2, linear_transform="lu")
    robust, report = migrate(flow, x, c)  # its couplings are a subclass that overrides nothing
    assert len(report.replaced) == 3
    assert torch.allclose(robust.log_prob(x, c), flow.log_prob(x, c), atol=1e-3)
    assert report.sample_error.median < 1e-4
    flow = glasflow.CouplingNSF(2, 3, n_conditional_inputs=2)
    robust, report = migrate(flow, x, c)
    assert len(report.replaced) == 3
    assert torch.allclose(robust.log_prob(x, c), flow.log_prob(x, c), atol=1e-3)


def test_caches_of_linear_layers_are_not_left_stale(host):
    linear = host.T.LULinear(2, using_cache=True)
    flow = host.flow([host.coupling(), linear]).eval()
    x, c = moons(256)
    robust, _ = migrate(flow, x, c, steps=20)
    after = robust.log_prob(x, c)
    robust.train()  # forgets
    robust.eval()
    assert torch.equal(robust.log_prob(x, c), after)
    assert not torch.equal(linear.bias, robust._transform._transforms[1].bias)


def test_a_guarded_embedding_is_left_in_place(host):
    encoder = OODConditioner(nn.Linear(3, 2), policy="report")
    flow = host.flow([host.coupling()], embedding_net=encoder)
    x, c = torch.randn(256, 2), torch.randn(256, 3)
    robust, report = migrate(flow, x, c, steps=2)
    assert type(robust._embedding_net) is OODConditioner
    assert len(report.replaced) == 1


def test_save_copy_and_compile(host, tmp_path):
    # glasflow's own layers hold lambdas, which pickle refuses: what takes their place does not.
    def flow():
        additive = host.T.AdditiveCouplingTransform([0, 1], host.net())
        return host.flow(
            [host.coupling(), host.masked(), additive, host.spline(), host.masked_spline()]
        )

    x, c = moons(128)
    robust, _ = migrate(flow(), x, c)
    torch.save(robust, tmp_path / "flow.pth")
    loaded = torch.load(tmp_path / "flow.pth", weights_only=False)
    for again in (loaded, pickle.loads(pickle.dumps(robust)), copy.deepcopy(robust)):
        assert torch.equal(again.log_prob(x, c), robust.log_prob(x, c))
    second, _ = migrate(flow(), 2 * x + 1, c)
    second.load_state_dict(robust.state_dict())
    assert torch.equal(second.log_prob(x, c), robust.log_prob(x, c))
    # Compiled, the operations are others, with other roundings.
    layer, x, c = robust._transform._transforms[0].double(), x.double(), c.double()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x, c)[0], layer(x, c)[0])


def test_hooks_and_other_references_go_along(host):
    calls = []
    flow = host.flow([host.coupling()])
    layer = flow._transform._transforms[0]
    layer.register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    flow.mine = [layer]  # a list of the user's own
    x, c = moons(128)
    robust, report = migrate(flow, x, c)
    assert report.hooked == ("_transform._transforms.0 (MigratedCouplingTransform)",)
    assert "hooks are kept on _transform._transforms.0" in str(report)
    calls.clear()
    robust.log_prob(x, c)
    (found,) = calls
    assert issubclass(found, RobustSplineCouplingTransform)
    assert robust.mine == [robust._transform._transforms[0]]
    assert type(flow.mine[0]) is type(layer)


def test_an_activation_of_the_users_own_is_kept():
    if "glasflow.nflows" not in HOSTS:
        pytest.skip("of the hosts, glasflow alone lets the activation be chosen")
    host = Host("glasflow.nflows")
    flow = host.flow([host.coupling(scale_activation=torch.exp)])
    x, c = moons(512)
    robust, report = migrate(flow, x, c)
    assert report.replaced[0].error < 0.1
    formula = robust._transform._transforms[0].head.formula
    assert formula.scale_activation is torch.exp
    pickle.dumps(robust)


def test_half_precision_is_computed_in_single(host):
    robust, _ = migrate(host.flow([host.coupling(), host.masked()]), *moons(256))
    x, c = moons(64)
    half = copy.deepcopy(robust).bfloat16()
    z, ladj = half._transform(x.bfloat16(), c.bfloat16())
    assert z.dtype == torch.bfloat16
    assert z.isfinite().all()
    assert ladj.isfinite().all()


def test_nan_contexts_are_not_hidden(host):
    robust, _ = migrate(host.flow([host.coupling()]), *moons(256))
    x, c = moons(8)
    c[3] = torch.nan
    assert robust.log_prob(x, c).isnan().tolist() == [i == 3 for i in range(8)]


@pytest.mark.parametrize("slope", [1e-3, None])
@pytest.mark.parametrize("shift_bound", [5.0, None])
def test_an_inscribed_map_is_the_affine_one_where_it_can_be(slope, shift_bound):
    gain = torch.empty(4096).double().uniform_(-2, 2).exp()
    u, v = torch.randn(2, 4096).double().clamp(-3, 3)
    options = {"bound": 5.0, "shift_bound": shift_bound, "slope": slope}
    f = RobustSpline(*inscribe(gain, v - gain * u, **options), **options)
    y, ladj = f.call_and_ladj(u)
    near = (v - gain * u).abs() < 4
    assert near.double().mean() > 0.6
    assert torch.allclose(y[near], v[near], atol=1e-9)
    assert torch.allclose(ladj[near], gain.log()[near], atol=1e-9)


def test_an_inscribed_map_of_anything_is_finite_and_learns():
    extremes = [0.0, 1e-30, 1e-3, 1.0, 1e3, 1e30, torch.inf]
    gain = torch.tensor(extremes).repeat_interleave(9)
    intercept = torch.tensor([-torch.inf, -1e30, -9.0, -1.0, 0.0, 1.0, 9.0, 1e30, torch.inf])
    intercept = intercept.repeat(7).requires_grad_()
    gain.requires_grad_()
    options = {"bound": 5.0, "shift_bound": 5.0, "slope": 1e-3}
    f = RobustSpline(*inscribe(gain, intercept, **options), **options)
    for at in (-1e3, -5.0, 0.0, 0.7, 5.0, 1e3):
        x = torch.full_like(gain, at)
        y, ladj = f.call_and_ladj(x)
        assert y.isfinite().all()
        assert ladj.isfinite().all()
        assert (f.inv(x).abs() <= max(5.0, abs(at) + 5.0)).all()
        grads = torch.autograd.grad((y + ladj).sum(), (gain, intercept), retain_graph=True)
        assert all(g.isfinite().all() for g in grads)


X = torch.randn(8, 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda f: migrate(f), ValueError, "one row for each; got NoneType"),
        (lambda f: migrate(f, X, calibration=X), ValueError, "got both"),
        (lambda f: migrate(f, calibration=[]), ValueError, "no batch"),
        (lambda f: migrate(f, calibration=3), TypeError, "got int"),
        (lambda f: migrate(f, calibration=[X, X[:, :1]]), ValueError, "give a tuple"),
        (lambda f: migrate(f, calibration=(X, X[:5])), ValueError, "got 5 and 8"),
        (lambda f: migrate(f, X / 0, X), ValueError, "finite; got 8 of 8 rows of x"),
        (lambda f: migrate(f, calibration=(X, X / 0)), ValueError, "got 8 of 8 rows of context"),
        (lambda f: migrate(f.requires_grad_(False), X, X, steps=2), ValueError, "are frozen"),
        (lambda f: migrate(f, X, additive="drop"), ValueError, "'bound' or 'keep'; got 'drop'"),
        (lambda f: migrate(nn.Linear(2, 2), X), TypeError, "how to migrate Linear"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call(Host(HOSTS[0]).flow([Host(HOSTS[0]).coupling()]))


def hooked(layer):
    part = getattr(layer.head, "map", layer.head)
    part.register_forward_hook(lambda m, i, o: o)


def replaced(layer):
    layer.head.univariate = lambda raw: RobustSpline(*raw.new_zeros(3, 1), bound=1e3)


def derived(layer):
    layer.head.__class__ = type("Loud", (type(layer.head),), {"forward": lambda *a, **k: None})


@pytest.mark.parametrize("change", [hooked, replaced, derived])
@pytest.mark.parametrize("kind", ["masked", "masked_spline"])
def test_a_migrated_layer_whose_maps_are_made_otherwise_is_refused(host, kind, change):
    flow = host.flow([getattr(host, kind)()])
    robust, _ = migrate(flow, torch.randn(256, 2), torch.randn(256, 2))
    assert certify(robust).certified
    change(robust._transform._transforms[0])
    (refused,) = certify(robust).refused
    assert refused.name.endswith("head")
