r"""zuko's splines computed by flowguard: the same numbers, and its class keeps its place."""

import copy
import math
import pickle
import threading

import pytest
import torch

import flowguard

zuko = pytest.importorskip("zuko")
from zuko.transforms import MonotonicRQSTransform  # noqa: E402

from flowguard.integrations.zuko import InPlaceRQSTransform, splines  # noqa: E402
from flowguard.integrations.zuko.standin import SPLINES  # noqa: E402

try:
    SPLINES.check()
except RuntimeError as error:
    pytest.skip(f"this zuko has other splines: {error}", allow_module_level=True)


@pytest.fixture(autouse=True)
def clean():
    yield
    flowguard.unregister("zuko")


def draw(n=500, bins=8, dtype=torch.float64):
    x = 4 * torch.randn(n, dtype=torch.float64)
    params = [torch.randn(n, size, dtype=torch.float64) for size in (bins, bins, bins - 1)]
    return [t.to(dtype) for t in (x, *params)]


def run(make, tensors, **options):
    x, *params = (t.clone().requires_grad_() for t in tensors)
    f = make(*params, **options)
    outs = *f.call_and_ladj(x), f.inv(x), f(x), f.log_abs_det_jacobian(x, x)
    grads = torch.autograd.grad(sum((o * o).sum() for o in outs), (x, *params))
    return *outs, *(g / g.abs().max() for g in grads)


@pytest.mark.parametrize("options", [{}, {"bound": 2.0, "slope": 1e-2}], ids=str)
@pytest.mark.parametrize("bins", [2, 8, 32])
def test_the_numbers_are_the_hosts(bins, options):
    torch.manual_seed(0)
    tensors = draw(bins=bins)
    for a, b in zip(
        run(InPlaceRQSTransform, tensors, **options),
        run(MonotonicRQSTransform, tensors, **options),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_its_knots_are_the_hosts():
    torch.manual_seed(0)
    _, *params = draw()
    theirs = MonotonicRQSTransform(*params)
    with splines():
        ours = MonotonicRQSTransform(*params)
        assert type(ours) is InPlaceRQSTransform
        for name in ("horizontal", "vertical", "derivatives", "bins"):
            assert torch.equal(
                torch.as_tensor(getattr(ours, name)), torch.as_tensor(getattr(theirs, name))
            )


@pytest.mark.parametrize("value", [1e4, math.inf, -math.inf])
@pytest.mark.parametrize("which", [1, 2, 3])
def test_extreme_parameters_give_finite_numbers(which, value):
    torch.manual_seed(0)
    tensors = draw(dtype=torch.float32)
    tensors[which][:, ::3] = value
    with splines():
        made = run(MonotonicRQSTransform, tensors)
    assert all(t.isfinite().all() for t in made)


@pytest.mark.parametrize("name", ["NSF", "NCSF"])
def test_a_flow_runs_on_it_unchanged(name):
    torch.manual_seed(0)
    flow = getattr(zuko.flows, name)(3, 2, transforms=2, hidden_features=(16,))
    x, c = 2 * torch.rand(20, 3) - 1, torch.randn(20, 2)
    before, z = flow(c).log_prob(x), flow(c).transform(x)
    with splines():
        inside = flow(c)
        assert torch.allclose(inside.log_prob(x), before, atol=1e-4)
        assert torch.allclose(inside.transform.inv(z), x, atol=1e-3)
        copied = copy.deepcopy(flow)
        saved = pickle.dumps(flow)
    # What was made inside goes on outside.
    assert torch.allclose(inside.log_prob(x), before, atol=1e-4)
    assert inside.sample((2,)).shape == (2, 20, 3)
    assert torch.equal(copied(c).log_prob(x), before)
    assert torch.equal(pickle.loads(saved)(c).log_prob(x), before)


def test_it_is_nested_taken_back_and_of_one_thread():
    _, *params = draw(4)
    before = MonotonicRQSTransform.__init__
    kinds = []

    def make():
        kinds.append(type(MonotonicRQSTransform(*params)))

    def in_a_thread():
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()

    with splines():
        with splines():
            make()
        make()
        in_a_thread()
    assert MonotonicRQSTransform.__init__ is before
    flowguard.register("zuko", splines=True)
    in_a_thread()
    flowguard.unregister("zuko")
    make()
    assert MonotonicRQSTransform.__init__ is before
    assert [k is InPlaceRQSTransform for k in kinds] == [True, True, False, True, False]


def test_derived_classes_and_compiled_code_keep_the_hosts():
    class Mine(MonotonicRQSTransform):
        pass

    torch.manual_seed(0)
    x, *params = draw(20)
    expected = MonotonicRQSTransform(*params)(x)

    def call(x, *params):
        return MonotonicRQSTransform(*params)(x)

    flowguard.register("zuko", splines=True)
    assert type(Mine(*params)) is Mine
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x, *params), expected)


def test_another_class_is_refused(monkeypatch):
    def call_and_ladj(self, x):
        return x, torch.zeros_like(x)

    monkeypatch.setattr(MonotonicRQSTransform, "call_and_ladj", call_and_ladj)
    with pytest.raises(RuntimeError, match=r"MonotonicRQSTransform\.__init__ is not"), splines():
        pass
    assert not SPLINES.active


def test_certificates_and_migrations_are_sound():
    torch.manual_seed(0)
    flow = zuko.flows.NSF(2, 2, transforms=2, hidden_features=(16,))
    free = zuko.flows.NSF(2, transforms=1, hidden_features=(16,))
    x, c = torch.randn(100, 2), torch.randn(100, 2)
    outside = [flowguard.certify(f) for f in (flow, free)]
    constant = MonotonicRQSTransform(*(t[0] for t in draw()[1:]))
    bound = flowguard.certify(constant).bound(9.0)
    with splines():
        inside = [flowguard.certify(f) for f in (flow, free)]
        robust, report = flowguard.migrate(copy.deepcopy(flow), x, c)
        same = MonotonicRQSTransform(*(t[0] for t in draw()[1:]))
        assert math.isclose(flowguard.certify(same).bound(9.0), bound, rel_tol=1e-6)
        z = torch.linspace(-9, 9, 999, dtype=torch.float64)
        assert same.inv(z).abs().max() <= flowguard.certify(same).bound(9.0)
    assert [c.certified for c in inside] == [c.certified for c in outside] == [False, False]
    assert len(report.replaced) == 2
    assert flowguard.certify(robust).certified
