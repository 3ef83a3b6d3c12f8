r"""Changes of one host stand together, in whatever order they are put in place."""

import importlib.util
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent


def applied(host, backwards):
    r"""All changes of a host in place."""
    stack = ExitStack()
    for file in sorted(ROOT.glob(f"{host}-*/fix.py"), reverse=backwards):
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
    with applied("normflows", backwards):
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
    with applied("nflows", backwards):
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
    with applied("zuko", backwards):
        flow = zuko.flows.RealNVP(3, context=2, slope=0.1)
        assert flow(torch.randn(7, 2)).log_prob(torch.randn(3)).shape == (7,)
