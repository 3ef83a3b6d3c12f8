import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("sbi.inference", exc_type=ImportError)  # of sbi, or of what it needs

from sbi.inference import NPE, NPE_A
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform


def simulate(theta):
    r"""Five numbers of two parameters, with noise of a tenth."""
    mixed = theta @ torch.tensor([[1.0, 0.5, -1, 0, 1], [0, 1, 1, -0.5, 1]])
    return mixed + 0.1 * torch.randn_like(mixed)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    embedding = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    build = posterior_nn("maf", hidden_features=8, num_transforms=1, embedding_net=embedding)
    inference = NPE(prior, density_estimator=build, show_progress_bars=False)
    theta = prior.sample((1000,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.append_simulations(theta, simulate(theta)).train(max_num_epochs=1)
    return inference, prior


def is_told(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return any("not like the simulations" in str(w.message) for w in caught)


@pytest.mark.wound("sbi", "0.27.0", raises=AssertionError)
def test_an_observation_that_no_parameters_explain_is_told(change, trained):
    posterior = trained[0].build_posterior()
    strange = torch.tensor([[1.0, -1, 1, -1, 1]])  # each number for itself is usual
    assert is_told(lambda: posterior.set_default_x(strange))
    assert is_told(lambda: posterior.sample((2,), x=strange, show_progress_bars=False))
    assert torch.equal(posterior.default_x, strange)


def test_false_alarms_are_as_rare_as_asked_for(trained, fix):
    inference, prior = trained
    torch.manual_seed(1)
    with fix.applied():
        posterior = inference.build_posterior()
    p = posterior.x_check.p_values(simulate(prior.sample((2000,))))
    for alpha in (0.01, 0.05, 0.2):
        # Of 500 held-out simulations, and 2000 others: four standard errors.
        error = (alpha * (1 - alpha) * (1 / 500 + 1 / 2000)) ** 0.5
        assert abs((p <= alpha).float().mean() - alpha) < 4 * error + 1 / 501


def test_a_usual_observation_is_not_told_and_the_test_can_be_put_off(trained, fix):
    with fix.applied():
        posterior = trained[0].build_posterior()
        usual = simulate(torch.zeros(1, 2))
        assert not is_told(lambda: posterior.set_default_x(usual))
        posterior.x_check = None
        assert not is_told(lambda: posterior.set_default_x(torch.full((1, 5), 100.0)))


def test_too_few_simulations_are_refused(fix):
    with pytest.raises(ValueError, match=r"at least 400 finite rows for alpha=0\.01; got 100"):
        fix.MahalanobisCheck(torch.randn(100, 3))
    with pytest.raises(ValueError, match="more than 256 elements needs an embedding_net; got 300"):
        fix.MahalanobisCheck(torch.randn(500, 300))


def test_large_observations_are_tested_by_their_embedding(fix):
    torch.manual_seed(0)
    x = torch.randn(1000, 300)
    test = fix.MahalanobisCheck(x, nn.Linear(300, 4).train())
    assert test.embedding_net.training
    assert test.p_values(100 * x[:5]).max() < 0.01


@pytest.mark.wound("sbi", "0.27.0", raises=AssertionError)
def test_batches_of_observations_are_told_too(change, trained):
    posterior = trained[0].build_posterior()
    strange = torch.tensor([[1.0, -1, 1, -1, 1], [0.0, 0, 0, 0, 0]])
    theta = torch.zeros(1, 2, 2)
    assert is_told(lambda: posterior.sample_batched((2,), x=strange, show_progress_bars=False))
    assert is_told(lambda: posterior.log_prob_batched(theta, x=strange))


def test_many_observations_with_few_simulations_can_be_told(trained, fix):
    with fix.applied():
        posterior = trained[0].build_posterior()
        # The least p-value of 500 held-out simulations is 0.002, which is more than 0.01 / 10.
        strange = torch.tensor([[1.0, -1, 1, -1, 1]]).repeat(10, 1)
        options = {"show_progress_bars": False}
        assert is_told(lambda: posterior.sample_batched((2,), x=strange, **options))
        usual = simulate(torch.zeros(10, 2))
        assert not is_told(lambda: posterior.sample_batched((2,), x=usual, **options))


def test_an_estimator_without_simulations_makes_a_posterior_as_before(trained, fix):
    inference, prior = trained
    with fix.applied():
        posterior = NPE(prior).build_posterior(density_estimator=inference._neural_net)
    assert posterior.sample((2,), x=torch.zeros(1, 5), show_progress_bars=False).shape == (2, 2)


def test_simulations_of_which_few_are_finite_make_a_posterior_as_before(trained, fix, monkeypatch):
    inference, _ = trained
    theta, x, masks = inference.get_simulations()
    gaps = torch.where(torch.arange(5) == 4, torch.nan, x)  # as those of unequal numbers of trials
    monkeypatch.setattr(inference, "get_simulations", lambda *_: (theta, gaps, masks))
    with fix.applied():
        posterior = inference.build_posterior()
        assert not is_told(lambda: posterior.set_default_x(torch.full((1, 5), 100.0)))


def test_the_embedding_is_asked_on_its_own_device(fix):
    class Elsewhere(nn.Module):
        r"""An embedding on a device that is not that of the simulations, as a GPU is."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, device="meta"))

        def forward(self, x):
            asked.append(x.device)
            return torch.randn(len(x), 3)

    asked = []
    fix.MahalanobisCheck(torch.randn(500, 300), Elsewhere())
    assert {device.type for device in asked} == {"meta"}


@pytest.mark.wound("sbi", "0.27.0", raises=AssertionError)
def test_the_posterior_of_npe_a_is_tested_too(change):
    torch.manual_seed(0)
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    inference = NPE_A(prior, num_components=1, show_progress_bars=False)
    theta = prior.sample((500,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inference.append_simulations(theta, simulate(theta)).train(max_num_epochs=1)
        posterior = inference.build_posterior()
    assert is_told(lambda: posterior.set_default_x(torch.full((1, 5), 100.0)))
