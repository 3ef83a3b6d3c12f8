r"""normflows' splines computed by flowguard: circles and bounds of features too."""

import copy

import pytest
import torch

import flowguard
from flowguard.functional import unconstrained_rational_quadratic_spline

nf = pytest.importorskip("normflows")
from normflows.utils import splines as module  # noqa: E402

from flowguard.integrations.normflows import splines  # noqa: E402
from flowguard.integrations.normflows.standin import SPLINES  # noqa: E402

INVERSE = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
TAILS = {
    "linear": ("linear", -1, 3.0),
    "circular": ("circular", 0, 3.0),
    "both": (["linear", "circular"], 1, 3.0),
    "bounds": ("circular", 0, torch.tensor([1.5, 3.0], dtype=torch.float64)),
    "both, bounds": (["circular", "linear"], 1, torch.tensor([1.5, 3.0], dtype=torch.float64)),
}


@pytest.fixture(autouse=True)
def clean():
    yield
    flowguard.unregister("normflows")


@INVERSE
@pytest.mark.parametrize("kind", TAILS)
def test_the_numbers_are_the_hosts(kind, inverse):
    torch.manual_seed(0)
    tails, more, bound = TAILS[kind]
    x = 2 * torch.randn(2000, 2, dtype=torch.float64)
    x[:2], x[2:4] = bound, -torch.as_tensor(bound)
    if isinstance(tails, list):  # outside of the box the host makes zeros of them
        x = x.clamp(-torch.as_tensor(bound), torch.as_tensor(bound))
    params = [torch.randn(2000, 2, size, dtype=x.dtype) / 2 for size in (8, 8, 8 + more)]
    made = []
    for function in (
        unconstrained_rational_quadratic_spline,
        module.unconstrained_rational_quadratic_spline,
    ):
        leaves = [t.clone().requires_grad_() for t in (x, *params)]
        outs = function(*leaves, inverse=inverse, tails=tails, tail_bound=bound)
        grads = torch.autograd.grad(sum((o * o).sum() for o in outs), leaves)
        made.append((*outs, *(g / g.abs().max() for g in grads)))
    for at, (a, b) in enumerate(zip(*made, strict=True)):
        a, b = (a[4:], b[4:]) if at == 2 else (a, b)  # at the ends of the box there are two slopes
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def test_a_list_of_tails_leaves_what_is_outside_as_it_is():
    params = [torch.randn(3, 2, size) for size in (4, 4, 5)]
    x = torch.tensor([[5.0, 5.0], [-5.0, -5.0], [torch.inf, -torch.inf]])
    options = {"tails": ["linear", "circular"], "tail_bound": torch.tensor([1.0, 2.0])}
    assert not module.unconstrained_rational_quadratic_spline(x, *params, **options)[0].any()
    y, ladj = unconstrained_rational_quadratic_spline(x, *params, **options)
    assert torch.equal(y, x)
    assert not ladj.any()


LAYERS = {
    "coupling": lambda f: f.CoupledRationalQuadraticSpline(3, 1, 8, tail_bound=3.0),
    "autoregressive": lambda f: f.AutoregressiveRationalQuadraticSpline(3, 1, 8),
    "circular coupling": lambda f: f.CircularCoupledRationalQuadraticSpline(
        3, 1, 8, ind_circ=[1], tail_bound=torch.tensor([2.0, 3.0, 3.0])
    ),
    "circular autoregressive": lambda f: f.CircularAutoregressiveRationalQuadraticSpline(
        3, 1, 8, ind_circ=[0, 2], tail_bound=3.0
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_runs_on_it_unchanged(name):
    torch.manual_seed(0)
    layer = LAYERS[name](nf.flows)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    z = 4 * torch.rand(40, 3) - 2
    before = *layer(z), *layer.inverse(z)
    with splines():
        after = *layer(z), *layer.inverse(z)
        copied = copy.deepcopy(layer)
    for a, b in zip(after, before, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.equal(copied(z)[0], before[0])


def test_it_is_taken_back():
    before = dict(vars(module))
    with splines():
        assert vars(module) != before
    assert vars(module) == before
    flowguard.register("normflows", splines=True)
    assert SPLINES.active
    flowguard.unregister("normflows")
    assert vars(module) == before


def test_another_function_is_refused(monkeypatch):
    def other(inputs, *args, **options):
        return inputs, inputs

    monkeypatch.setattr(module, "unconstrained_rational_quadratic_spline", other)
    with pytest.raises(RuntimeError, match="is not the function that flowguard knows"), splines():
        pass


def test_certificates_and_migrations_are_what_they_were():
    torch.manual_seed(0)
    layer = nf.flows.CoupledRationalQuadraticSpline(2, 1, 8, num_context_channels=2)
    flow = nf.ConditionalNormalizingFlow(
        nf.distributions.DiagGaussian(2, trainable=False), [layer]
    )
    x, context = torch.randn(100, 2), torch.randn(100, 2)
    outside = flowguard.certify(flow)
    with splines():
        inside = flowguard.certify(flow)
        robust, _ = flowguard.migrate(copy.deepcopy(flow), x, context)
    assert str(inside) == str(outside)
    assert flowguard.certify(robust).certified
