r"""Tests for the robust and guarded flows of the zuko adapter."""

import pickle
import runpy
import statistics
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import flowguard
from flowguard.functional import SLOPE
from flowguard.ood import NotFittedError, OODConditioner, OODContextError, OODContextWarning

zuko = pytest.importorskip("zuko")

from flowguard.integrations.zuko import (  # noqa: E402
    GuardedFlow,
    RobustCouplingFlow,
    RobustNSF,
)

FLOWS = {
    "RobustNSF": RobustNSF,
    "RobustNSF, passes=2": partial(RobustNSF, passes=2),
    "RobustNSF, free shift": partial(RobustNSF, shift_bound=None),
    "RobustNSF, published": partial(RobustNSF, bins=2, bound=0.5, slope=None, shift_bound=None),
    "RobustCouplingFlow": RobustCouplingFlow,
    "RobustCouplingFlow, randmask": partial(RobustCouplingFlow, randmask=True),
    "MAF(univariate=RobustSpline)": partial(
        zuko.flows.MAF,
        univariate=flowguard.RobustSpline,
        shapes=flowguard.RobustSpline.shapes(8),
    ),
}

# Round trips: what zuko asks of its own flows in float32; float64 leaves nothing but rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=FLOWS)
def make(request, dtype):
    return lambda features=3, context=5, **kwargs: FLOWS[request.param](
        features, context, **kwargs
    ).to(dtype)


def test_log_prob_and_gradients(make, dtype):
    flow = make()
    x, c = torch.randn(256, 3, dtype=dtype), torch.randn(5, dtype=dtype)
    log_p = flow(c).log_prob(x)
    assert log_p.shape == (256,)
    assert log_p.dtype == dtype
    (-log_p.mean()).backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    flow.eval()
    assert torch.equal(flow(c).log_prob(x), log_p)


def test_samples_and_their_gradients(make, dtype):
    flow = make()
    c = torch.randn(7, 5, dtype=dtype)
    assert flow(c).sample((32,)).shape == (32, 7, 3)
    assert flow(c).event_shape == (3,)
    assert flow(c).batch_shape == (7,)
    x = flow(c).rsample()
    assert x.dtype == dtype
    x.square().sum().sqrt().backward()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
    x, log_p = flow(c).rsample_and_log_prob((4,))
    assert torch.allclose(flow(c).log_prob(x), log_p, atol=100 * TOLERANCE[dtype])


def test_round_trip(make, dtype):
    flow = make()
    x, c = torch.randn(256, 3, dtype=dtype), torch.randn(256, 5, dtype=dtype)
    t = flow(c).transform
    assert torch.allclose(t.inv(t(x)), x, atol=TOLERANCE[dtype])


def test_jacobian_both_ways(make, dtype):
    flow = make()
    x, c = torch.randn(3, dtype=dtype), torch.randn(5, dtype=dtype)
    t = flow(c).transform
    y = t(x)
    jacobian = torch.autograd.functional.jacobian(t, x)
    inverse = torch.autograd.functional.jacobian(t.inv, y)
    atol = 10 * TOLERANCE[dtype]  # a determinant of three rows
    assert torch.allclose(jacobian @ inverse, torch.eye(3, dtype=dtype), atol=atol)
    ladj = torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(t.log_abs_det_jacobian(x, y), ladj, atol=atol)
    assert torch.allclose(t.inv.log_abs_det_jacobian(y, x), -ladj, atol=atol)
    for f, at, value, expected in ((t, x, y, ladj), (t.inv, y, x, -ladj)):
        out, ladj_out = f.call_and_ladj(at)
        assert torch.allclose(out, value, atol=atol)
        assert torch.allclose(ladj_out, expected, atol=atol)


def test_save_and_load(make, dtype, tmp_path):
    flow = make()
    x, c = torch.randn(3, dtype=dtype), torch.randn(5, dtype=dtype)
    torch.save(flow, tmp_path / "flow.pth")
    again = torch.load(tmp_path / "flow.pth", weights_only=False)
    assert torch.equal(again(c).log_prob(x), flow(c).log_prob(x))
    assert repr(again) == repr(flow)
    fresh = make()
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(fresh(c).log_prob(x), flow(c).log_prob(x))


def test_without_context_and_one_feature(make, dtype):
    flow = make(3, 0)
    x = flow().sample((4,))
    assert flow().log_prob(x).shape == (4,)
    flow = make(1, 5)
    c = torch.randn(4, 5, dtype=dtype)
    x = flow(c).sample()
    assert flow(c).log_prob(x).shape == (4,)


@pytest.mark.parametrize("cls", [RobustNSF, RobustCouplingFlow])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_samples_are_bounded_for_every_context(cls, scale, dtype):
    transforms, bound, shift_bound = 3, 5.0, 2.0
    flow = cls(3, 5, transforms=transforms, bound=bound, shift_bound=shift_bound).to(dtype)
    c = scale * torch.randn(64, 5, dtype=dtype)
    z = flow(c).base.sample((64,))
    x = flow(c).transform.inv(z)
    # Each transformation moves what lies outside the box by the shift alone.
    assert x.isfinite().all()
    assert x.abs().max() <= max(bound, z.abs().max()) + transforms * shift_bound


def lost(make, features, context):
    r"""What a round trip in float32 loses: of 256 points the worst, of 20 flows the median, whose
    weights are far from those at the start."""
    worst = []
    for seed in range(20):
        torch.random.manual_seed(seed)
        flow = make(features, context, transforms=3)
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.2 * torch.randn_like(p))
            x = torch.randn(256, features)
            f = flow(torch.randn(256, context)).transform
            worst.append(float((f.inv(f(x)) - x).abs().max()))
    return statistics.median(worst)


@pytest.mark.parametrize("features", [2, 3, 5])
def test_flows_as_made_come_back_in_float32(features):
    # With a least slope of 1e-3 they lost 7e-4 to 3e-3, with 1e-2 they lose 6e-5 to 2e-4.
    error = lost(RobustNSF, features, 2)
    assert error <= 3e-4
    assert error < lost(zuko.flows.NSF, features, 2)


@pytest.mark.parametrize("features", [2, 3, 5])
def test_couplings_as_made_come_back_better_than_with_the_spline_of_the_host(features):
    host = zuko.transforms.MonotonicRQSTransform
    theirs = partial(zuko.flows.NICE, univariate=host, shapes=[(8,), (8,), (7,)])
    assert lost(RobustCouplingFlow, features, 2) < lost(theirs, features, 2) / 2


def spline(flow):
    r"""A spline of a flow of four features with five of context."""
    t = flow(torch.randn(5)).transform.transforms[0]
    return t.meta(torch.randn(2 if isinstance(flow, RobustCouplingFlow) else 4)).base


@pytest.mark.parametrize("slope", [1e-3, None])
@pytest.mark.parametrize("cls", [RobustNSF, RobustCouplingFlow])
def test_a_saved_flow_keeps_its_least_slope(cls, slope, monkeypatch):
    saved = pickle.dumps(cls(4, 5, slope=slope))
    as_made = pickle.dumps(cls(4, 5))
    # Whatever a later version makes of the defaults.
    for made in (cls, flowguard.RobustSpline):
        monkeypatch.setattr(
            made.__init__,
            "__defaults__",
            tuple(0.3 if value == SLOPE else value for value in made.__init__.__defaults__),
        )
    for pickled, kept in ((saved, slope), (as_made, SLOPE), (pickle.dumps(cls(4, 5)), 0.3)):
        assert spline(pickle.loads(pickled)).slope == kept


@pytest.mark.parametrize("cls", [RobustNSF, RobustCouplingFlow])
def test_arguments_reach_the_spline(cls):
    flow = cls(4, 5, bins=4, bound=2.0, shift_bound=1.0, slope=0.1)
    f = spline(flow)
    assert (f.bins, f.bound, f.shift_bound, f.slope) == (4, 2.0, 1.0, 0.1)
    assert "(base): RobustSpline(bins=4)" in repr(flow)
    with pytest.raises(TypeError, match="bogus"):
        cls(3, 5, bogus=1)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("cls", [RobustNSF, RobustCouplingFlow])
def test_compiled_log_prob_agrees(cls, dynamic):
    flow = cls(3, 5, transforms=2, hidden_features=[8], bins=2)
    x, c = torch.randn(16, 3), torch.randn(16, 5)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, c: flow(c).log_prob(x), backend="aot_eager", dynamic=dynamic
    )
    assert torch.allclose(compiled(x, c), flow(c).log_prob(x), atol=1e-5)


@pytest.mark.parametrize("cls", [RobustNSF, RobustCouplingFlow])
def test_exported_density_and_sampler_agree(cls):
    class Density(nn.Module):
        def __init__(self, flow):
            super().__init__()
            self.flow = flow

        def forward(self, x, c):
            return self.flow(c).log_prob(x), self.flow(c).transform.inv(x)

    model = Density(cls(3, 5, transforms=1, hidden_features=[8], bins=3))
    x, c = torch.randn(16, 3), torch.randn(16, 5)
    exported = torch.export.export(model, (x, c), strict=False).module()
    for a, b in zip(exported(x, c), model(x, c), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("cls", [RobustNSF, RobustCouplingFlow])
def test_vmap(cls):
    flow = cls(3, 5)
    x, c = torch.randn(16, 3), torch.randn(16, 5)
    each = torch.vmap(lambda x, c: flow(c).log_prob(x))(x, c)
    assert torch.allclose(each, flow(c).log_prob(x), atol=1e-5)


# -- guarded flows -------------------------------------------------------------------------------


def guarded_flow(policy="report", flow=None, encoder=None):
    conditioner = OODConditioner(
        nn.Linear(5, 4) if encoder is None else encoder, policy=policy, alpha=0.01
    )
    return GuardedFlow(RobustNSF(3, 4, transforms=1) if flow is None else flow, conditioner)


def fitted(guarded: GuardedFlow) -> GuardedFlow:
    guarded.conditioner.fit(torch.randn(1024, 5), progress=False)
    guarded.conditioner.calibrate(torch.randn(512, 5), progress=False)
    return guarded.eval()


def flagged(guarded: GuardedFlow) -> list[bool]:
    assert guarded.report is not None
    return guarded.report.flagged.tolist()


def test_guarded_flow_trains_end_to_end():
    guarded = guarded_flow()
    guarded(torch.randn(8, 5)).log_prob(torch.randn(8, 3)).sum().backward()
    for name, p in guarded.named_parameters():
        assert p.grad is not None, name
    assert guarded.conditioner.encoder.weight.grad.abs().sum() > 0


def test_guarded_flow_is_the_flow_where_nothing_is_flagged():
    guarded = fitted(guarded_flow())
    y, x = 0.1 * torch.randn(8, 5), torch.randn(8, 3)
    assert torch.equal(
        guarded(y).log_prob(x), guarded.flow(guarded.conditioner.encoder(y)).log_prob(x)
    )
    assert not any(flagged(guarded))


def test_report_belongs_to_the_last_call():
    guarded = fitted(guarded_flow())
    assert guarded.report is None
    y = torch.cat((torch.zeros(2, 5), torch.full((1, 5), 1e3)))
    guarded(y).sample()
    assert flagged(guarded) == [False, False, True]
    guarded(y[:1])
    assert flagged(guarded) == [False]


def test_policies_act():
    far = torch.full((2, 5), 1e3)
    with pytest.warns(OODContextWarning):
        fitted(guarded_flow("warn"))(far)
    with pytest.raises(OODContextError):
        fitted(guarded_flow("raise"))(far)
    with pytest.raises(NotFittedError):
        guarded_flow("raise").eval()(far)


def test_shrink_keeps_an_affine_flow_on_ground_it_knows():
    flow = zuko.flows.NICE(3, 5, transforms=4)  # untrained, and explosive far away
    guarded = fitted(guarded_flow("shrink", flow=flow, encoder=nn.Identity()))
    far = 1e6 * torch.randn(64, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OODContextWarning)
        shrunk = guarded(far).sample((16,))
    bare = flow(far).sample((16,))
    assert shrunk.abs().max() < 100
    assert not bare.abs().max() < 1e4


def test_guarded_flow_saves_its_guard(tmp_path):
    guarded = fitted(guarded_flow())
    torch.save(guarded.state_dict(), tmp_path / "guarded.pt")
    again = guarded_flow().eval()
    again.load_state_dict(torch.load(tmp_path / "guarded.pt"))
    y = 3 * torch.randn(8, 5)
    x = torch.randn(8, 3)
    assert torch.equal(again(y).log_prob(x), guarded(y).log_prob(x))
    assert flagged(again) == flagged(guarded)
    assert repr(again.report) == repr(guarded.report)


def test_monitor_hears_a_guarded_flow():
    guarded = fitted(guarded_flow())
    with flowguard.ood.monitor(guarded) as watch:
        guarded(torch.full((2, 5), 1e3)).sample()
    assert watch.report is not None
    assert watch.report.flagged.all()


@pytest.mark.parametrize(
    ("flow", "conditioner", "match"),
    [
        (lambda c: c, OODConditioner(), "flow must be a lazy distribution"),
        (nn.Identity(), nn.Linear(5, 4), "needs wrapping"),
    ],
)
def test_guarded_flow_refuses(flow, conditioner, match):
    with pytest.raises(TypeError, match=match):
        GuardedFlow(flow, conditioner)


# -- the benchmark, small ------------------------------------------------------------------------


def test_toy_same_likelihood_and_nothing_above_the_certificate(monkeypatch):
    folder = Path(__file__).parents[3] / "benchmarks"
    monkeypatch.syspath_prepend(folder)  # as for a script of that folder
    toy = runpy.run_path(str(folder / "zuko_toy.py"))
    x, c = toy["moons"](4096)
    nll = {}
    for name, cls in (("ours", RobustNSF), ("zuko's", zuko.flows.NSF)):
        torch.manual_seed(0)
        flow = cls(2, 2, transforms=2, hidden_features=[32, 32])
        toy["train"](flow, steps=200, batch=256, lr=5e-3)
        with torch.no_grad():
            nll[name] = -flow(c).log_prob(x).mean().item()
        if name == "ours":
            for distance in (1.0, 10.0, 100.0, 1e4, 1e30):
                wrong, _, above, largest = toy["sample"](flow, distance)
                assert wrong == above == 0
                assert largest < 30
    assert nll["ours"] < nll["zuko's"] + 0.05
