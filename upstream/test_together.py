r"""Changes of one host stand together, in whatever order they are put in place."""

import importlib.util
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent


def applied(host, backwards):
    r"""All changes of a host, or one by its name, in place."""
    stack = ExitStack()
    for file in sorted(ROOT.glob(f"{host}*/fix.py"), reverse=backwards):
        name = f"fix_{file.parent.name}".replace("-", "_")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        stack.enter_context(module.applied())
    return stack


@pytest.mark.parametrize("backwards", [False, True])
def test_a_conditional_glow_of_normflows(backwards):
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)
    with applied("normflows-", backwards):
        layers = [nf.flows.GlowBlock(4, 8), nf.flows.Squeeze(), nf.transforms.Shift()]
        flow = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian((4, 4, 4)), layers)
        flow.forward_kld(torch.rand(8, 1, 8, 8), torch.randn(8, 3))  # initialises
        samples, log_q = flow.sample(5, torch.randn(1, 3))
        again = flow.log_prob(samples, torch.randn(5, 3))
    torch.testing.assert_close(again, log_q, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_spline_flow_of_nflows(backwards):
    nflows = pytest.importorskip("nflows.transforms")
    from nflows.distributions import DiagonalNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    torch.manual_seed(0)
    with applied("nflows-", backwards):
        coupling = nflows.PiecewiseRationalQuadraticCouplingTransform(
            torch.tensor([1, 0]), lambda i, o: ResidualNet(i, o, 8), tails="linear", tail_bound=3.0
        )
        flow = Flow(coupling, DiagonalNormal([2]))
        samples, log_q = flow.sample_and_log_prob(100)
        torch.testing.assert_close(flow.log_prob(samples), log_q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_realnvp_of_zuko(backwards):
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    with applied("zuko-", backwards):
        flow = zuko.flows.RealNVP(3, context=2, slope=0.1)
        assert flow(torch.randn(7, 2)).log_prob(torch.randn(3)).shape == (7,)


def everything(host):
    r"""What a host's modules and classes hold, by name."""
    modules = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == host and m}
    held = {}
    for name, module in modules.items():
        for key, value in list(vars(module).items()):
            held[name, key] = value
            if isinstance(value, type) and value.__module__.partition(".")[0] == host:
                held.update({(name, key, k): v for k, v in vars(value).items()})
    return held


@pytest.mark.parametrize("folder", sorted(file.parent.name for file in ROOT.glob("*/fix.py")))
def test_nothing_of_a_change_is_left_after_an_error_within_two_of_it(folder):
    host = "torch" if folder == "pytorch-batched-lu" else folder.partition("-")[0]
    host = "pytorch_ood" if host == "pytorch" else host
    pytest.importorskip(host, exc_type=ImportError)
    with applied(folder, False):
        pass  # imports what it needs
    before = everything(host)
    with pytest.raises(KeyError, match="within"), applied(folder, False), applied(folder, False):
        raise KeyError("within" if everything(host) != before else "nothing was changed")
    after = everything(host)
    assert after.keys() == before.keys()
    assert [key for key, value in after.items() if value is not before[key]] == []
