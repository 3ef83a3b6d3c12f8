r"""Robust couplings within the flows of glasflow, which know a copy of nflows of their own."""

import copy
import pickle

import pytest
import torch

import flowguard

glasflow = pytest.importorskip("glasflow")
from glasflow.flows.coupling import CouplingFlow  # noqa: E402

from flowguard.integrations.nflows import RobustSplineCouplingTransform  # noqa: E402
from flowguard.integrations.nflows.host import available, part  # noqa: E402


def flow(**options):
    torch.manual_seed(0)
    options = {"n_conditional_inputs": 2, "n_neurons": 8, **options}
    return CouplingFlow(RobustSplineCouplingTransform, 3, 2, **options)


def test_glasflow_takes_it_for_one_of_its_couplings():
    model = flow(num_bins=4, linear_transform="permutation")
    x, c = torch.randn(20, 3), torch.randn(20, 2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert model.log_prob(x, conditional=c).shape == (20,)
    assert model.sample(20, conditional=1e6 * c).isfinite().all()
    loss = -model.log_prob(x, conditional=c).mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    certificate = flowguard.certify(model)
    assert certificate.certified
    assert model.sample(20, conditional=1e30 * c).abs().max() <= certificate.bound(10.0)


@pytest.mark.parametrize("host", available())
def test_every_installed_host_knows_it(host):
    layer = flow()._transform._transforms[0]
    assert isinstance(layer, part("transforms.coupling", host).CouplingTransform)


def test_it_is_pickled_and_copied():
    model = flow()
    x, c = torch.randn(20, 3), torch.randn(20, 2)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again.log_prob(x, conditional=c), model.log_prob(x, conditional=c))


@pytest.mark.parametrize("activation", ["nflows_general", "wide", "log2", "log1.5"])
def test_what_takes_the_place_of_glasflows_layers_is_pickled(activation):
    torch.manual_seed(0)
    model = glasflow.RealNVP(3, 2, n_conditional_inputs=2, scale_activation=activation)
    x, c = torch.randn(100, 3), torch.randn(100, 2)
    robust, report = flowguard.migrate(model, x, c)
    assert len(report.replaced) == 2
    again = pickle.loads(pickle.dumps(robust))
    assert torch.equal(again.log_prob(x, conditional=c), robust.log_prob(x, conditional=c))
