import pytest
import torch
from torch import nn

nf = pytest.importorskip("normflows")


def model():
    torch.manual_seed(0)
    base = nf.distributions.base.ConditionalDiagGaussian(2, nn.Linear(3, 4))
    layers = [
        nf.flows.AutoregressiveRationalQuadraticSpline(2, 1, 8, num_context_channels=3),
        nf.flows.LULinearPermute(2),
    ]
    return nf.ConditionalNormalizingFlow(base, layers)


@pytest.mark.wound("normflows", "1.7.3", raises=pytest.RaisesExc(RuntimeError, match="size"))
def test_one_condition_serves_all_samples(change):
    flow, context = model(), torch.randn(1, 3)
    torch.manual_seed(1)
    z, log_q = flow.sample(50, context=context)
    torch.manual_seed(1)
    each, log_each = flow.sample(50, context=context.repeat(50, 1))
    assert torch.equal(z, each)
    assert torch.equal(log_q, log_each)


@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_other_numbers_of_rows_are_refused_by_name(change):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        model().sample(50, context=torch.randn(7, 3))
    assert "one for each of the 50 samples; got 7" in str(caught.value)


def test_a_row_for_each_is_as_before(fix):
    flow, context = model(), torch.randn(50, 3)
    torch.manual_seed(1)
    before = flow.sample(50, context=context)
    torch.manual_seed(1)
    with fix.applied():
        after = flow.sample(50, context)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_context_without_rows_is_passed_on_as_before(fix):
    layers = [nf.flows.InvertibleAffine(2)]
    flow = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(2), layers)
    with fix.applied():
        assert flow.sample(4, torch.tensor(1.0))[0].shape == (4, 2)
