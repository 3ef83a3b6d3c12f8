import pytest
import torch

pytest.importorskip("sbi.inference", exc_type=ImportError)  # of sbi, or of what it needs

from sbi.neural_nets import posterior_nn


def estimator():
    r"""An estimator whose parameters depend on the condition, as after training."""
    torch.manual_seed(0)
    theta, x = torch.randn(100, 2), torch.randn(100, 3)
    made = posterior_nn("maf", hidden_features=8, num_transforms=2)(theta, x)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
@pytest.mark.wound("sbi", "0.27.0", raises=AssertionError)
def test_each_sample_has_the_density_of_its_own_condition(change, shape):
    flow, x = estimator(), torch.tensor([[-2.0, 0.0, 2.0], [2.0, 2.0, -2.0], [0.0, 0.0, 0.0]])
    samples, log_probs = flow.sample_and_log_prob(torch.Size(shape), x)
    assert samples.shape == (*shape, 3, 2)
    assert log_probs.shape == (*shape, 3)
    expected = flow.log_prob(samples.flatten(0, -3), x).reshape(*shape, 3)
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.wound("sbi", "0.27.0", raises=AssertionError)
def test_it_draws_what_sample_draws(change):
    flow, x = estimator(), torch.randn(3, 3)
    torch.manual_seed(1)
    samples = flow.sample(torch.Size((4,)), x)
    torch.manual_seed(1)
    both, _ = flow.sample_and_log_prob(torch.Size((4,)), x)
    assert torch.equal(both, samples)


def test_one_condition_is_as_before(fix):
    flow, x = estimator(), torch.randn(1, 3)

    def run():
        torch.manual_seed(1)
        return flow.sample_and_log_prob(torch.Size((4,)), x)

    before = run()
    with fix.applied():
        after = run()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
