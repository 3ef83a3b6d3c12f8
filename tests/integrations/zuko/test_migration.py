r"""Tests for the migration of zuko's flows."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn as nn

from flowguard.bounds import Pointwise, attack, certify
from flowguard.migration import migrate
from flowguard.migration.imitate import Rescaled, RescaledSpline
from flowguard.ood import OODConditioner, OODContextError
from flowguard.spline.invert import unconstrain
from flowguard.transforms import (
    AffineTransform,
    ReparametrizedAffineTransform,
    RobustSpline,
)

zuko = pytest.importorskip("zuko")

from flowguard.integrations.zuko import GuardedFlow, RobustNSF  # noqa: E402
from flowguard.integrations.zuko.autoregressive import GroupedAutoregressive  # noqa: E402

SUCCESSORS = {zuko.flows.autoregressive.MaskedAutoregressiveTransform: GroupedAutoregressive}
NICE, MAF, NSF = zuko.flows.NICE, zuko.flows.MAF, zuko.flows.NSF
AFFINE_COUPLING = getattr(zuko.flows, "RealNVP", NICE)  # as it is called from 1.5 on


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


def moons(n):
    """Two moons, turned by the context."""
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
    return 3 * torch.exp(0.3 * c[:, 1:]) * turned + 5, c  # away from standard units


@pytest.fixture(scope="module")
def trained():
    flows = {}

    def train(name):
        if name not in flows:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                make = {"RealNVP": partial(NICE, transforms=4), "MAF": partial(MAF, transforms=3)}
                flow = make[name](2, 2, hidden_features=(32, 32))
                optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
                for _ in range(300):
                    x, c = moons(256)
                    optimizer.zero_grad()
                    (-flow(c).log_prob(x).mean()).backward()
                    optimizer.step()
                flows[name] = flow
        return flows[name]

    return train


@pytest.mark.parametrize("name", ["RealNVP", "MAF"])
def test_a_trained_flow_becomes_robust_at_the_same_likelihood(trained, name):
    flow = trained(name)
    state = copy.deepcopy(flow.state_dict())
    x, c = moons(8192)
    robust, report = migrate(flow, x, c, steps=200, fit_steps=100)
    x, c = moons(8192)  # pairs that the migration has not seen
    with torch.no_grad():
        before, after = (-f(c).log_prob(x).mean().item() for f in (flow, robust))
    assert after < before + 0.05
    assert not report.certificate_before.certified
    assert report.certificate_after.certified
    assert len(report.replaced) == len(flow.transform.transforms)
    assert all(r.error < 0.5 for r in report.replaced)
    assert report.nll_after is not None
    assert report.nll_after < report.nll_swapped
    # The given flow stays what it was.
    for key, value in flow.state_dict().items():
        assert torch.equal(value, state[key])
    assert certify(flow).certified is False
    # And the promise holds where the old flow explodes.
    far = 1e4 * torch.randn(256, 2)
    z = robust(far).base.sample((16,))
    samples = robust(far).transform.inv(z)
    assert samples.isfinite().all()
    assert samples.abs().max() <= certify(robust).bound(z.abs().max().item())
    assert not flow(far).sample((16,)).abs().max() < 1e4


def test_a_migrated_flow_is_bounded_in_the_units_of_its_features(trained):
    flow = trained("MAF")
    x, c = moons(1024)
    robust, _ = migrate(flow, x, c, fit_steps=5)
    certificate = certify(robust)
    maps = [s for s in certificate.steps if isinstance(s, Pointwise)]
    assert len(maps) == 3
    assert all(s.envelope.limit is None for s in maps)
    # What the layers move is bounded beside what their units make of the noise.
    assert certificate.growth < 1.1 * sum(x.std(0)).item()
    assert certificate.tighten(20).bound(4.0) <= certificate.bound(4.0)


@pytest.mark.parametrize("name", ["RealNVP", "MAF"])
def test_affine_maps_are_inscribed_and_lose_nothing(trained, name):
    flow = trained(name)
    robust, report = migrate(flow, *moons(4096))
    x, c = moons(4096)  # pairs that the migration has not seen
    with torch.no_grad():
        gap = (flow(c).log_prob(x) - robust(c).log_prob(x)).mean()
        z = torch.randn(4096, 2)
        moved = (flow(c).transform.inv(z) - robust(c).transform.inv(z)).abs()
    assert gap.abs() < 1e-3
    assert moved.median() < 1e-4 * x.std()
    assert report.cut < 0.001
    assert report.outliers == 0
    assert report.certificate_after.certified
    # The networks stay as they are, and weights from before fit.
    for old, new in zip(flow.transform.transforms, robust.transform.transforms, strict=True):
        assert type(new) is SUCCESSORS.get(type(old), type(old))
        assert new.hyper is not old.hyper  # of a copy
        assert all(map(torch.equal, old.hyper.parameters(), new.hyper.parameters()))
    before = robust(c).log_prob(x)
    robust.load_state_dict(flow.state_dict())
    assert torch.equal(robust(c).log_prob(x), before)


@pytest.mark.parametrize("name", ["RealNVP", "MAF"])
def test_an_outlier_among_the_rows_spoils_nothing(trained, name):
    flow = trained(name)
    x, c = moons(2000)
    x[0] = x.mean(0) + 30 * x.std(0)
    robust, report = migrate(flow, x, c)
    unseen, contexts = moons(4096)
    with torch.no_grad():
        gap = (flow(contexts).log_prob(unseen) - robust(contexts).log_prob(unseen)).mean()
    assert gap.abs() < 1e-3
    assert report.outliers == pytest.approx(1 / 2000)
    assert report.cut == pytest.approx(1 / 2000, abs=1e-3)
    assert report.nll_swapped == pytest.approx(report.nll_before, abs=1e-3)
    assert "0.05% of the rows are outliers" in str(report)
    # Nor does it make the bound a larger one.
    x[0] = x[1]
    c[0] = c[1]
    _, clean = migrate(flow, x, c)
    bounds = [r.certificate_after.bound(5.0) for r in (report, clean)]
    assert bounds[0] == pytest.approx(bounds[1], rel=0.05)


def test_splines_with_bins_keep_hidden_layers_and_imitate(trained):
    flow = trained("RealNVP")
    x, c = moons(4096)
    robust, report = migrate(flow, x, c, bins=8)
    assert report.nll_after is None
    for old, new in zip(flow.transform.transforms, robust.transform.transforms, strict=True):
        assert type(new) is SUCCESSORS.get(type(old), type(old))
        assert new.hyper[-1].out_features == new.hyper.out_features == 22
        for a, b in zip(list(old.hyper)[:-1], list(new.hyper)[:-1], strict=True):
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                assert torch.equal(p, q)
    # Nearer to the old flow than splines of zero parameters, which know nothing of the context.
    _, untaught = migrate(flow, x, c, bins=8, fit_steps=0)
    taught_gap, untaught_gap = (r.nll_swapped - r.nll_before for r in (report, untaught))
    assert taught_gap < 0.3 * untaught_gap
    for r, u in zip(report.replaced, untaught.replaced, strict=True):
        assert r.error < u.error
    z = torch.randn(4096, 2)
    with torch.no_grad():
        error = (flow(c).transform.inv(z) - robust(c).transform.inv(z)).abs()
    assert error.median() < 0.1 * x.std()


@pytest.mark.parametrize("make", [NICE, MAF, NSF])
def test_an_inverted_transform_is_migrated(make):
    inner = make(2, 2, transforms=2)
    flow = zuko.flows.Flow(inner.transform.inv, inner.base)
    x, c = torch.randn(512, 2), torch.randn(512, 2)
    _, plan = migrate(flow, x, c, dry_run=True)
    robust, report = migrate(flow, x, c)
    assert len(plan.replaced) == len(report.replaced) == 2
    with torch.no_grad():
        assert torch.allclose(flow(c).log_prob(x), robust(c).log_prob(x), atol=1e-3)
    assert robust(1e6 * c).sample().isfinite().all()


class Gaussian(zuko.lazy.LazyDistribution):
    """A base of the user's own."""

    def __init__(self, features, context):
        super().__init__()
        self.net = nn.Linear(context, 2 * features)

    def forward(self, c):
        mean, logs = self.net(c).chunk(2, dim=-1)
        return zuko.distributions.DiagNormal(mean, logs.exp())


def test_a_conditional_base_is_bounded():
    flow = zuko.flows.Flow(MAF(2, 3, transforms=2).transform, Gaussian(2, 3))
    c = torch.randn(512, 3)
    x = flow(c).sample()
    robust, report = migrate(flow, x, c)
    assert report.replaced[-1].name == "base"
    assert report.replaced[-1].before == "Gaussian"
    assert not report.certificate_before.certified
    assert report.certificate_after.certified
    with torch.no_grad():
        assert torch.allclose(flow(c).log_prob(x), robust(c).log_prob(x), atol=1e-3)
        far = robust(1e10 * c)
        z = torch.randn(512, 2).clamp(-4, 4)
        noise = far.base.base_dist.loc + far.base.base_dist.scale * z
        samples = far.transform.inv(noise)
        assert not flow(1e10 * c).sample().isfinite().all()
    bound = report.certificate_after.bound(4.0)
    assert samples.abs().max() <= bound
    result = attack(robust, c[:8], steps=20, restarts=2)
    assert 0.2 * bound < result.value <= bound
    # Weights from before the migration fit, and so do those from after.
    for state in (flow.state_dict(), robust.state_dict()):
        robust.load_state_dict(state)
        with torch.no_grad():
            assert torch.allclose(flow(c).log_prob(x), robust(c).log_prob(x), atol=1e-3)
    _, again = migrate(robust, x, c)
    assert again.replaced == ()
    # A base that works in its own way is no longer covered.
    robust.base.forward = lambda c: flow.base(c)
    (refused,) = certify(robust).refused
    assert "forward of its own" in refused.reason


class Heavy(Gaussian):
    """One whose distribution is none that is bounded."""

    def forward(self, c):
        loc = super().forward(c).base_dist.loc
        return torch.distributions.Independent(torch.distributions.StudentT(3.0, loc), 1)


def test_another_conditional_base_is_kept_with_a_reason():
    flow = zuko.flows.Flow(MAF(2, 3, transforms=1).transform, Heavy(2, 3))
    robust, report = migrate(flow, torch.randn(256, 2), torch.randn(256, 3))
    assert "its distribution is a StudentT" in report.reasons["base (Heavy)"]
    assert isinstance(robust.base, Heavy)
    assert not report.certificate_after.certified


def test_a_conditional_mixture_is_kept_with_a_reason():
    flow = zuko.flows.Flow(MAF(2, 3, transforms=1).transform, zuko.flows.GMM(2, 3))
    _, plan = migrate(flow, dry_run=True)
    assert "Mixture" in plan.reasons["base (GMM)"]
    _, report = migrate(flow, torch.randn(256, 2), torch.randn(256, 3))
    assert report.reasons == plan.reasons
    assert not report.certificate_after.certified
    assert [step.name for step in report.certificate_after.refused] == ["base"]


KEPT = {
    "NCSF": "one of a circle",
    "SOSPF": "SOSPolynomialTransform",
    "NAF": "MonotonicTransform",
    "UNAF": "UnconstrainedMonotonicTransform",
    "CNF": "differential equation",
    "GF": "GaussianizationTransform",
    "BPF": "BoundedBernsteinTransform",
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_has_a_reason(name):
    flow = getattr(zuko.flows, name)(2, 2)
    _, report = migrate(flow, torch.rand(32, 2), torch.randn(32, 2))
    assert report.replaced == ()
    assert report.kept
    assert all(report.reasons[part] for part in report.kept)
    assert KEPT[name] in report.reasons[report.kept[0]]


def test_a_soft_clip_is_named():
    layers = [
        zuko.flows.MaskedAutoregressiveTransform(2, 2),
        zuko.flows.UnconditionalTransform(zuko.transforms.SoftclipTransform, bound=11.0),
    ]
    flow = zuko.flows.Flow(layers, MAF(2).base)
    _, report = migrate(flow, torch.randn(256, 2), torch.randn(256, 2))
    assert len(report.replaced) == 1
    (name,) = report.kept
    assert "poles at -11 and 11" in report.reasons[name]
    assert not report.certificate_after.certified


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bins", [None, 4])
def test_autograd_switched_off_is_no_obstacle(off, bins):
    with off():
        flow, x, c = MAF(2, 2, transforms=1), torch.randn(256, 2), torch.randn(256, 2)
        robust, report = migrate(flow, x, c, steps=2, bins=bins, fit_steps=2)
        assert not torch.is_grad_enabled()
    assert report.nll_after is not None
    x, c = torch.randn(8, 2), torch.randn(8, 2)
    (-robust(c).log_prob(x).mean()).backward()  # it can be trained on
    assert all(p.grad is not None for p in robust.parameters())


@pytest.mark.parametrize("policy", ["raise", "warn", "report"])
def test_a_guard_lets_all_pass_meanwhile(policy, recwarn):
    conditioner = OODConditioner(policy=policy, alpha=0.5)
    y = torch.randn(512, 4)
    conditioner.fit(y[:256], progress=False).calibrate(y[256:], progress=False)
    guarded = GuardedFlow(NICE(2, 4), conditioner).eval()
    robust, report = migrate(guarded, torch.randn(512, 2), y)
    result = attack(robust, y[:8], steps=2, restarts=2)
    assert not recwarn.list
    assert result.value <= report.certificate_after.bound(4.0)
    assert robust.report is None  # nothing was scored
    if policy == "raise":
        with pytest.raises(OODContextError):
            robust(1e3 * y)


def test_additive_maps_are_bounded_unless_they_shall_not_be():
    additive = getattr(zuko.transforms, "AdditiveTransform", None)
    if additive is None:
        pytest.skip("this zuko has no additive transform")
    flow = NICE(2, 2, transforms=2, univariate=additive, shapes=[()])
    x, c = torch.randn(256, 2), torch.randn(256, 2)
    robust, report = migrate(flow, x, c)
    assert report.certificate_after.certified
    with torch.no_grad():
        assert torch.allclose(flow(c).log_prob(x), robust(c).log_prob(x), atol=1e-4)
    _, report = migrate(flow, x, c, additive="keep")
    assert report.replaced == ()


@pytest.mark.parametrize("slope", [1e-3, None])
@pytest.mark.parametrize("kwargs", [{}, {"passes": 2, "bins": 5}])
def test_splines_are_carried_over_exactly(kwargs, slope):
    flow = NSF(3, 2, transforms=2, **kwargs).double()
    x, c = 2 * torch.randn(512, 3).double(), torch.randn(512, 2).double()
    robust, report = migrate(flow, x, c, slope=slope)
    assert torch.allclose(robust(c).log_prob(x), flow(c).log_prob(x), atol=1e-8)
    z = torch.randn(512, 3).double()
    assert torch.allclose(robust(c).transform.inv(z), flow(c).transform.inv(z), atol=1e-8)
    assert report.nll_swapped == pytest.approx(report.nll_before, abs=1e-8)
    assert report.certificate_after.certified
    for layer in robust.transform.transforms:
        assert isinstance(layer.univariate(*map(torch.zeros, layer.shapes)), RobustSpline)


def test_steep_splines_are_carried_over_as_far_as_they_may():
    flow = NSF(2, 2, transforms=1, hidden_features=(8,))
    with torch.no_grad():
        flow.transform.transforms[0].hyper[-1].bias.mul_(100)
    x, c = torch.randn(512, 2), torch.randn(512, 2)
    robust, report = migrate(flow, x, c)
    assert report.certificate_after.certified
    assert robust(c).log_prob(x).isfinite().all()
    assert robust(1e30 * c).sample().abs().max() <= 6


@pytest.mark.parametrize("slope", [1e-3, 1e-2, None])
@pytest.mark.parametrize("bins", [2, 3, 8])
def test_unconstrain_gives_the_knots(bins, slope):
    widths, heights = (torch.rand(64, bins).double() + 0.3 for _ in range(2))
    widths, heights = (t / t.sum(-1, keepdim=True) for t in (widths, heights))
    slopes = torch.empty(64, bins - 1).double().uniform_(0.5, 2)
    raw = unconstrain(widths, heights, slopes, slope=slope)
    w, h, d = (r[:, None] for r in raw)
    spline = RobustSpline(w, h, d, bound=3.0, slope=slope)
    knots, values = (6 * t.cumsum(-1)[:, :-1] - 3 for t in (widths, heights))
    y, ladj = spline.call_and_ladj(knots)
    assert torch.allclose(y, values, atol=1e-9)
    assert torch.allclose(ladj, slopes.log(), atol=1e-7)


def test_a_flow_without_a_context_and_other_layers():
    rotation = zuko.transforms.RotationTransform
    layers = [
        zuko.flows.MaskedAutoregressiveTransform(3, 0),
        zuko.flows.UnconditionalTransform(rotation, torch.randn(3, 3)),
        zuko.flows.GeneralCouplingTransform(3, 0),
    ]
    flow = zuko.flows.Flow(layers, NICE(3, 0).base)
    x = flow().sample((1024,))
    robust, report = migrate(flow, x, fit_steps=50)
    assert report.kept == ("transform.transforms.1 (UnconditionalTransform)",)
    assert [r.name for r in report.replaced] == [
        "transform.transforms.0",
        "transform.transforms.2",
    ]
    assert robust().log_prob(x).shape == (1024,)
    text = str(report)
    assert "GeneralCouplingTransform[MonotonicAffineTransform]" in text
    assert "before: not certified" in text
    assert "after: certified" in text


@pytest.mark.parametrize("univariate", [AffineTransform, ReparametrizedAffineTransform])
def test_flowguards_own_affine_maps_are_replaced_in_zukos_layers(univariate):
    flow = NICE(2, 2, transforms=3, hidden_features=(16,), univariate=univariate, shapes=[(), ()])
    x, c = moons(1024)
    x = (x - x.mean(0)) / x.std(0)
    robust, report = migrate(flow, x, c)
    kind = f"GeneralCouplingTransform[{univariate.__name__}]"
    assert [r.before for r in report.replaced] == [kind] * 3
    assert not report.certificate_before.certified
    assert report.certificate_after.certified
    # Nothing was trained: the splines follow the maps wherever the data lie.
    old, new = flow(c).log_prob(x), robust(c).log_prob(x)
    assert (old - new).abs().median() < 1e-3
    far = robust(1e6 * c).sample((8,))
    assert far.isfinite().all()


def test_one_feature_and_residual_networks():
    x, c = torch.randn(256, 1), torch.randn(256, 2)
    robust, report = migrate(MAF(1, 2, transforms=2), x, c, fit_steps=20)
    assert report.certificate_after.certified
    assert robust(c).sample().shape == (256, 1)
    x = torch.randn(256, 4)
    robust, report = migrate(MAF(4, 2, residual=True), x, c, fit_steps=20)
    t = robust(c).transform
    assert torch.allclose(t.inv(t(x)), x, atol=1e-4)
    jacobian = torch.autograd.functional.jacobian(robust.transform.transforms[0](c[0]), x[0])
    assert (jacobian.triu(1) == 0).all()  # still autoregressive


def test_a_robust_flow_is_left_alone():
    flow = RobustNSF(2, 2, transforms=1)
    x, c = torch.randn(64, 2), torch.randn(64, 2)
    robust, report = migrate(flow, x, c)
    assert report.replaced == ()
    assert torch.equal(robust(c).log_prob(x), flow(c).log_prob(x))
    _, report = migrate(migrate(MAF(2, 2), x, c, fit_steps=5)[0], x, c)
    assert report.replaced == ()
    assert report.certificate_before.certified


def test_a_guarded_flow_is_migrated_inside_its_guard():
    guarded = GuardedFlow(NICE(2, 4), OODConditioner(nn.Linear(2, 4), policy="report"))
    x, c = torch.randn(256, 2), torch.randn(256, 2)
    robust, report = migrate(guarded, x, c, fit_steps=20, steps=2)
    assert isinstance(robust, GuardedFlow)
    assert report.certificate_after.certified
    assert robust.training


@pytest.mark.parametrize("make", [NICE, MAF, NSF])
def test_save_and_load(make, tmp_path):
    x, c = torch.randn(256, 2), torch.randn(256, 3)
    robust, _ = migrate(make(2, 3, transforms=2).eval(), x, c, fit_steps=5)
    assert not robust.training
    torch.save(robust, tmp_path / "flow.pth")
    again = torch.load(tmp_path / "flow.pth", weights_only=False)
    assert torch.equal(again(c).log_prob(x), robust(c).log_prob(x))
    other, _ = migrate(make(2, 3, transforms=2), 2 * x, c, fit_steps=5)
    other.load_state_dict(robust.state_dict())
    assert torch.equal(other(c).log_prob(x), robust(c).log_prob(x))
    assert f"RobustSpline(bins={8 if make is NSF else 3})" in repr(robust)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [AFFINE_COUPLING, MAF, NSF])
def test_half_precision_and_autocast(make, dtype):
    x, c = torch.randn(64, 3), torch.randn(64, 2)
    flow = make(3, 2, transforms=2, hidden_features=(16,))
    robust, _ = migrate(flow, x, c)
    expected = flow(c).log_prob(x)
    with torch.autocast("cpu", dtype):
        assert torch.allclose(robust(c).log_prob(x), expected, atol=0.5)
    half, _ = migrate(flow.to(dtype), x.to(dtype), c.to(dtype))
    for new in (half, robust.to(dtype)):
        assert torch.allclose(new(c.to(dtype)).log_prob(x.to(dtype)).float(), expected, atol=0.7)
        far = 1e4 * torch.randn(64, 2).to(dtype)
        samples = new(far).transform.inv(x.clamp(-3, 3).to(dtype))
        assert samples.dtype == dtype
        assert samples.abs().max() <= certify(new).bound(3.0)


def test_rescaled_map_and_its_bound():
    units = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 4.0], [2.0, 1.0]]).double()
    spline = RescaledSpline(*units, bins=4)
    f = spline(*(torch.randn(64, 2, *s).double() for s in spline.shapes))
    assert isinstance(f, Rescaled)
    x = 5 * torch.randn(64, 2).double()
    x.requires_grad_()
    y, ladj = f.call_and_ladj(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(ladj, slope.log())
    back, back_ladj = f.inverse_and_ladj(y)
    assert torch.allclose(back, x)
    assert torch.allclose(back_ladj, -ladj)
    for radius in (0.0, 1.0, 50.0):
        extreme = spline(*(1e6 * torch.randn(512, 2, *s).double() for s in spline.shapes))
        y = radius * torch.randn(512, 2).sign().double()
        assert extreme.inv(y).abs().max() <= f.inverse_bound(radius)


X = torch.randn(8, 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: migrate(nn.Linear(2, 2), X), TypeError, "how to migrate Linear"),
        (lambda: migrate(NICE(2), X[0]), ValueError, r"one row for each; got \(2,\)"),
        (lambda: migrate(NICE(2), X[:1]), ValueError, r"at least two rows.*got \(1, 2\)"),
        (lambda: migrate(NICE(2, 3), X, torch.randn(7, 3)), ValueError, "got 7 and 8"),
        (lambda: migrate(NICE(2), X.long()), ValueError, r"got torch\.int64: x\.float\(\)"),
        (lambda: migrate(NICE(2, 3), X, {"y": X}), TypeError, "context must be.*got dict"),
        (lambda: migrate(NICE(2), X, steps=-1), ValueError, "got -1 and 256"),
        (lambda: migrate(NICE(2), X, bound=0), ValueError, "bound must be positive.*got 0"),
        (
            lambda: migrate(NICE(2), X, shift_bound=-1),
            ValueError,
            "bound must be positive.*got -1",
        ),
        (lambda: migrate(NICE(2), X, slope=0.0), ValueError, r"slope must lie in.*got 0\.0"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
