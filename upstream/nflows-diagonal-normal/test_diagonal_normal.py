from importlib import import_module

import pytest
import torch

pytest.importorskip("nflows")


@pytest.fixture(params=["nflows", "glasflow.nflows"])
def base(request):
    pytest.importorskip(request.param.partition(".")[0])
    made = import_module(f"{request.param}.distributions.normal").DiagonalNormal([2])
    made.mean_.data.copy_(torch.tensor([[1.0, -2.0]]))
    made.log_std_.data.copy_(torch.tensor([[0.0, -1.0]]))
    return made


@pytest.mark.wound("nflows", "0.14", raises=(AttributeError, TypeError))
def test_the_mean_is_a_tensor(change, base):
    assert base.mean().tolist() == [1.0, -2.0]
    assert base.mean(torch.zeros(5, 1)).shape == (5, 2)


@pytest.mark.wound("nflows", "0.14", raises=NotImplementedError)
def test_it_can_be_sampled(change, base):
    torch.manual_seed(0)
    samples = base.sample(20_000)
    assert samples.shape == (20_000, 2)
    # Four standard errors.
    deviations = base.log_std_.exp().squeeze(0)
    assert ((samples.mean(0) - base.mean()).abs() < 4 * deviations / 20_000**0.5).all()
    assert ((samples.std(0) - deviations).abs() < 4 * deviations / 40_000**0.5).all()
    assert base.sample(3, torch.zeros(5, 1)).shape == (5, 3, 2)
