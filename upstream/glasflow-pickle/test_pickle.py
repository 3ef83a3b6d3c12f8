import copy
import pickle

import pytest
import torch

glasflow = pytest.importorskip("glasflow")
utils = pytest.importorskip("glasflow.transforms.utils")

NAMES = ["nflows", "nflows_general", "wide", "log1", "log2", "log3", "log1.5"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.wound(
    "glasflow",
    "0.4.1",
    raises=(pickle.PicklingError, AttributeError),  # local ones in `logN`
)
def test_a_flow_comes_back_from_its_pickle(change, name):
    torch.manual_seed(0)
    flow = glasflow.RealNVP(n_inputs=2, n_transforms=2, scale_activation=name)
    x = torch.randn(5, 2)
    again = pickle.loads(pickle.dumps(flow))
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert torch.equal(copy.deepcopy(flow).log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_activations_are_those_of_the_released_one(name, fix):
    x = torch.linspace(-20, 20, 101)
    before = utils.get_scale_activation(name)(x)
    with fix.applied():
        after = utils.get_scale_activation(name)(x)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_others_are_refused_or_taken_as_before(fix):
    with fix.applied():
        assert utils.get_scale_activation(torch.exp) is torch.exp
        with pytest.raises(ValueError, match="Unknown activation: sin"):
            utils.get_scale_activation("sin")
