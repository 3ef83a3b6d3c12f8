r"""Tests for inverses of zuko's masked layers, in which each feature is worked out once."""

import pickle
from functools import partial

import pytest
import torch
import torch.nn as nn

import flowguard
from flowguard.spline import autograd

zuko = pytest.importorskip("zuko")

from flowguard.integrations.zuko import RobustNSF  # noqa: E402
from flowguard.integrations.zuko.autoregressive import (  # noqa: E402
    GroupedAutoregressiveTransform,
)

ADJACENCY = torch.tensor(  # of a feature on features, then on both numbers of a context
    [
        [1, 0, 1, 0, 1, 0],
        [1, 1, 1, 0, 0, 1],
        [0, 0, 1, 0, 1, 1],
        [0, 0, 1, 1, 0, 0],
    ],
    dtype=torch.bool,
)
if not hasattr(zuko.flows, "RealNVP"):  # before 1.5, a context went to all features
    ADJACENCY = ADJACENCY[:, :4]

FLOWS = {
    "fully autoregressive": partial(RobustNSF, 4, 2),
    "random orders": partial(RobustNSF, 4, 2, randperm=True),
    "two passes": partial(RobustNSF, 4, 2, passes=2),
    "three passes for four": partial(RobustNSF, 4, 2, passes=3),
    "residual": partial(RobustNSF, 4, 2, residual=True, hidden_features=(16, 16)),
    "another activation": partial(RobustNSF, 4, 2, activation=nn.SiLU),
    "a graph": partial(RobustNSF, 4, 2, adjacency=ADJACENCY),
    "one hidden layer, no context": partial(RobustNSF, 4, 0, hidden_features=(12,)),
}


def stirred(flow):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return flow


def both_ways(flow, c, z):
    r"""What a flow makes of noise, and what zuko's own inverse makes of it."""
    return flow(c).transform.inv(z), flow.transform(c).inv(z)


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_is_zukos_up_to_rounding(make, dtype):
    flow = stirred(make(transforms=2).to(dtype))
    context = flow.transform.transforms[0].hyper.in_features - 4
    c = torch.randn(50, context, dtype=dtype) if context else None
    z = torch.randn(50, 4, dtype=dtype)
    assert isinstance(flow(c).transform.transforms[0], GroupedAutoregressiveTransform)
    new, old = both_ways(flow, c, z)
    assert torch.allclose(new, old, atol=1e-4 if dtype is torch.float32 else 1e-11)
    assert new.dtype == dtype


def test_gradients_are_those_of_zukos_inverse():
    flow = stirred(RobustNSF(3, 2, transforms=2).double())
    c, z = torch.randn(20, 2).double(), torch.randn(20, 3).double()
    grads = [
        torch.autograd.grad(x.square().sum(), flow.parameters()) for x in both_ways(flow, c, z)
    ]
    for new, old in zip(*grads, strict=True):
        assert torch.allclose(new, old, atol=1e-9)


@pytest.mark.parametrize(
    ("z", "c"), [((4,), (5, 2)), ((3, 1, 4), (5, 2)), ((0, 4), (2,)), ((3, 5, 4), (5, 2))]
)
def test_shapes_broadcast_as_in_zuko(z, c):
    new, old = both_ways(RobustNSF(4, 2, transforms=2), torch.randn(c), torch.randn(z))
    assert new.shape == old.shape
    assert torch.allclose(new, old, atol=1e-5)


@pytest.mark.parametrize(("passes", "groups"), [(None, 4), (2, 2)])
def test_each_unit_is_worked_out_once_and_hidden_layers_with_hooks_once_a_pass(passes, groups):
    flow = RobustNSF(4, 2, transforms=1, passes=passes)
    (layer,) = flow.transform.transforms
    rows = []
    hook = layer.hyper[0].register_forward_hook(lambda m, i, o: rows.append(len(o)))
    flow(torch.randn(7, 2)).sample()
    hook.remove()
    assert rows == [7] * groups
    seen = []
    addmm = torch.addmm
    for grad in (False, True):
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(grad):
            patch.setattr(torch, "addmm", lambda b, w, h: seen.append(len(w)) or addmm(b, w, h))
            flow(torch.randn(7, 2)).transform.inv(torch.randn(7, 4))
    # Each unit of both hidden layers and each parameter of a spline once, in all passes together.
    assert sum(seen) == 2 * (64 + 64 + layer.hyper.out_features)


def test_splines_are_counted_one_for_each_feature(monkeypatch):
    counted = []
    old = autograd.apply

    def counting(x, *rest):
        counted.append(x.numel())
        return old(x, *rest)

    monkeypatch.setattr(autograd, "apply", counting)
    flow = RobustNSF(6, 2, transforms=1)
    c = torch.randn(10, 2)
    flow(c).sample()
    assert sum(counted) == 10 * 6
    counted.clear()
    flow.transform(c).inv(torch.randn(10, 6))
    assert sum(counted) == 10 * 6 * 6


class Loud(zuko.nn.MaskedMLP):
    def forward(self, x):
        return 2 * super().forward(x)


def _hook_network(layer, told):
    layer.hyper.register_forward_hook(lambda *_: told.append(1))


def _hook_last(layer, told):
    layer.hyper[-1].register_forward_hook(lambda *_: told.append(1))


def _train_a_dropout(layer, told):
    layer.hyper[1] = nn.Sequential(nn.ReLU(), nn.Dropout(0.0))


def _train_a_random_slope(layer, told):
    layer.hyper[1] = nn.RReLU()


def _derive_the_network(layer, told):
    layer.hyper.__class__ = Loud


def _put_other_maps(layer, told):
    layer.univariate = lambda *phi: flowguard.RobustSpline(*phi, bound=3.0)


def _put_shifts_of_their_own(layer, told):
    univariate = partial(flowguard.RobustSpline, bound=5.0, shift=torch.arange(3.0))
    layer.__init__(3, 2, univariate=univariate, shapes=flowguard.RobustSpline.shapes(8)[:3])


def _compile_the_network(layer, told):
    layer.hyper.compile(backend="eager")


def _hide_a_forward(layer, told):
    whole = layer.hyper.forward
    layer.hyper.forward = lambda x: 3 * whole(x)


@pytest.mark.parametrize(
    "change",
    [
        _hook_network,
        _hook_last,
        _train_a_dropout,
        _train_a_random_slope,
        _derive_the_network,
        _put_other_maps,
        _put_shifts_of_their_own,
        _hide_a_forward,
        _compile_the_network,
    ],
)
def test_what_is_not_known_runs_as_in_zuko(change):
    flow = stirred(RobustNSF(3, 2, transforms=1))
    told = []
    change(flow.transform.transforms[0], told)
    c, z = torch.randn(5, 2), torch.randn(5, 3)
    torch.manual_seed(2)
    new = flow(c).transform.inv(z)
    heard = len(told)
    torch.manual_seed(2)
    assert torch.equal(new, flow.transform(c).inv(z))
    assert len(told) == 2 * heard
    assert heard == (3 if "hook" in change.__name__ else 0)


def test_gradients_follow_samples_of_inference_mode():
    flow = RobustNSF(3, 2, transforms=1)
    c, z = torch.randn(5, 2), torch.randn(5, 3)
    with torch.inference_mode():  # whose tensors no graph may hold
        first = flow(c).transform.inv(z)
    x = flow(c).transform.inv(z)
    x.square().sum().backward()
    assert torch.allclose(first, x, atol=1e-5)
    assert all(p.grad.isfinite().all() for p in flow.parameters())


def test_it_runs_under_vmap_and_is_certified():
    flow = stirred(RobustNSF(3, 2, transforms=1))
    c, z = torch.randn(5, 2), torch.randn(5, 3)
    whole = flow(c).transform.inv(z)
    single = torch.func.vmap(lambda c, z: flow(c).transform.inv(z))(c, z)
    assert torch.allclose(single, whole, atol=1e-4)
    given = flowguard.certify(flow(c))
    assert given.certified
    assert given.bound(3.0) == pytest.approx(flowguard.certify(flow).bound(3.0))


def test_a_saved_flow_gains_too():
    flow = stirred(RobustNSF(3, 2, transforms=1))
    again = pickle.loads(pickle.dumps(flow))
    d = again(torch.randn(5, 2))
    assert isinstance(d.transform.transforms[0], GroupedAutoregressiveTransform)
    f = pickle.loads(pickle.dumps(d.transform))
    z = torch.randn(5, 3)
    assert torch.allclose(f.inv(z), d.transform.inv(z))


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
@torch.no_grad()
def test_the_inverse_is_zukos_where_nothing_is_recorded(make):
    flow = stirred(make(transforms=2).double())
    context = flow.transform.transforms[0].hyper.in_features - 4
    z = torch.randn(3, 5, 4, dtype=torch.float64)
    for shape in ((), (5,), (3, 1), (2, 3, 5), (0, 1, 1)) if context else [None]:
        c = None if shape is None else torch.randn(*shape, context, dtype=torch.float64)
        new, old = both_ways(flow, c, z)
        assert new.shape == old.shape
        assert torch.allclose(new, old, atol=1e-11)


@pytest.mark.parametrize("how", ["a hook", "a parameter", "autocast", "another dtype"])
@torch.no_grad()
def test_networks_that_cannot_be_split_into_units_are_run_as_they_are(how):
    activation = nn.PReLU if how == "a parameter" else nn.ReLU
    flow = stirred(RobustNSF(3, 2, transforms=1, activation=activation))
    c, z, seen = torch.randn(7, 2), torch.randn(7, 3), []
    if how == "a hook":
        hidden = flow.transform.transforms[0].hyper[1]
        hidden.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    if how == "another dtype":
        with pytest.raises(RuntimeError, match="dtype"):
            flow(c.double()).transform.inv(z)
        return
    with torch.autocast("cpu", enabled=how == "autocast"):
        new, old = both_ways(flow, c, z)
    assert torch.allclose(new.float(), old.float(), atol=0.1 if how == "autocast" else 1e-4)
    assert all(shape == (7, 64) for shape in seen)
    assert bool(seen) == (how == "a hook")


@pytest.mark.parametrize("c", [None, torch.zeros(5, 1), torch.zeros(5, 3)], ids=["none", "1", "3"])
@torch.no_grad()
def test_contexts_of_another_size_are_refused_as_by_zuko(c):
    flow = RobustNSF(4, 2, transforms=1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        flow(c).transform.inv(torch.zeros(5, 4))


ADDITIVE = getattr(zuko.transforms, "AdditiveTransform", None)
MIGRATED = {
    "affine": zuko.flows.MAF,
    "splines": zuko.flows.NSF,
    "shifts": partial(zuko.flows.MAF, univariate=ADDITIVE, shapes=[()]),
}
if ADDITIVE is None:  # before zuko 1.5
    del MIGRATED["shifts"]


@pytest.mark.parametrize("make", MIGRATED.values(), ids=MIGRATED)
@pytest.mark.parametrize("listened", [False, True])
def test_migrated_layers_work_out_each_unit_once_too(make, listened, monkeypatch):
    old = stirred(make(4, 2, transforms=1))
    x, c, z = 2 * torch.randn(500, 4) + 1, torch.randn(500, 2), torch.randn(7, 4)
    flow, _ = flowguard.migrate(old, x, c)
    f, seen, addmm = flow(c[:7]).transform, [], torch.addmm
    (layer,) = flow.transform.transforms
    if listened:
        layer.univariate.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        expected = zuko.transforms.AutoregressiveTransform._inverse(f.transforms[0], z)
        monkeypatch.setattr(torch, "addmm", lambda b, w, h: seen.append(len(w)) or addmm(b, w, h))
        new = flow(c[:7]).transform.inv(z)
    assert torch.allclose(new, expected, atol=1e-4)
    assert sum(seen) == (0 if listened else 64 + 64 + layer.hyper.out_features)
