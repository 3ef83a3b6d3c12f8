r"""Tests for where the flows are in sbi's posteriors."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("sbi")

import sbi
from sbi.inference import (
    DirectPosterior,
    EnsemblePosterior,
    ImportanceSamplingPosterior,
    MCMCPosterior,
    RejectionPosterior,
    VIPosterior,
    likelihood_estimator_based_potential,
    posterior_estimator_based_potential,
)
from sbi.neural_nets import classifier_nn, likelihood_nn, posterior_nn
from sbi.utils import BoxUniform

from flowguard.hosts import opened
from flowguard.integrations.sbi import estimators, flow_of, with_estimators

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))


def pairs(n=200):
    theta = PRIOR.sample((n,))
    return theta, torch.cat((theta, theta[:, :1]), 1) + 0.1 * torch.randn(n, 3)


def estimator(model="maf"):
    return posterior_nn(model, hidden_features=8, num_transforms=2)(*pairs())


def of_potential(kind, **options):
    def make(estimator):
        potential, transform = posterior_estimator_based_potential(estimator, PRIOR, x_o=None)
        return kind(potential, theta_transform=transform, **options)

    return make


POSTERIORS = {
    "direct": lambda e: DirectPosterior(e, PRIOR),
    "mcmc": of_potential(
        MCMCPosterior,
        proposal=PRIOR,
        init_strategy="proposal",
        method="slice_np_vectorized",
        num_chains=2,
        warmup_steps=1,
        thin=1,
    ),
    "rejection": of_potential(RejectionPosterior, proposal=PRIOR),
    "importance": of_potential(ImportanceSamplingPosterior, proposal=PRIOR),
    "variational": of_potential(VIPosterior, prior=PRIOR, q="gaussian"),
}
OLD = sbi.__version__.startswith("0.25.")
if OLD:
    del POSTERIORS["variational"]  # there is none under recent versions of torch


@pytest.mark.parametrize("model", ["maf", "zuko_maf"])
@pytest.mark.parametrize("kind", POSTERIORS)
def test_the_estimator_of_a_posterior_is_found_and_another_put_there(kind, model):
    old, new = estimator(model), estimator(model)
    posterior = POSTERIORS[kind](old)
    x = torch.tensor([[0.3, 0.1, 0.3]])
    posterior.set_default_x(x)
    assert estimators(posterior) == [old]
    assert opened(posterior).module is old

    result = opened(posterior).closed(new)
    assert type(result) is type(posterior)
    assert estimators(result) == [new]
    assert estimators(posterior) == [old]
    assert torch.equal(result.default_x, x)
    theta = torch.zeros(1, 2)
    expected = new.log_prob(theta[None], x)[0]
    assert torch.equal(result.potential(theta), expected)
    assert not torch.equal(posterior.potential(theta), expected)


def test_the_sampler_and_the_potential_of_a_direct_posterior_share_the_new_estimator():
    posterior, new = DirectPosterior(estimator(), PRIOR), estimator()
    result = with_estimators(posterior, [new])
    assert result.posterior_estimator is new
    assert result.potential_fn.posterior_estimator is new


def test_what_a_posterior_remembers_of_its_estimator_is_forgotten():
    posterior = DirectPosterior(estimator(), PRIOR)
    posterior.set_default_x(torch.zeros(1, 3))
    posterior.map(num_iter=2, num_init_samples=5, num_to_optimize=2)
    posterior.log_prob(torch.zeros(1, 2))
    new = estimator()
    result = with_estimators(posterior, [new])
    fresh = DirectPosterior(new, PRIOR).set_default_x(torch.zeros(1, 3))
    assert posterior._map is not None
    assert result._map is None
    torch.manual_seed(0)
    told = result.log_prob(torch.zeros(1, 2))
    torch.manual_seed(0)
    assert torch.equal(told, fresh.log_prob(torch.zeros(1, 2)))


def test_a_posterior_that_has_sampled_by_mcmc_samples_from_the_new_estimator():
    posterior = POSTERIORS["mcmc"](estimator()).set_default_x(torch.zeros(1, 3))
    posterior.sample((2,), show_progress_bars=False)
    result = with_estimators(posterior, [estimator()])
    assert result.sample((2,), show_progress_bars=False).shape == (2, 2)


@pytest.mark.skipif(OLD, reason="cannot be made under recent versions of torch")
def test_a_variational_posterior_keeps_its_observation_and_has_to_be_trained_again():
    x = torch.zeros(1, 3)
    posterior = POSTERIORS["variational"](estimator()).set_default_x(x)
    posterior.train(max_num_iters=2, show_progress_bar=False, quality_control=False)
    posterior.sample((2,))
    result = with_estimators(posterior, [estimator()])
    assert torch.equal(result.default_x, x)
    with pytest.raises(ValueError, match="not fit"):
        result.sample((2,))
    result.train(max_num_iters=2, show_progress_bar=False, quality_control=False)
    assert result.sample((2,)).shape == (2, 2)


def test_all_estimators_of_an_ensemble_are_found_and_exchanged():
    old, new = [estimator(), estimator("zuko_maf")], [estimator(), estimator("zuko_maf")]
    posterior = EnsemblePosterior([DirectPosterior(e, PRIOR) for e in old])
    posterior.set_default_x(torch.zeros(1, 3))
    assert estimators(posterior) == old
    result = with_estimators(posterior, new)
    assert estimators(result) == new
    assert [p.posterior_estimator for p in result.posteriors] == new
    assert result.sample((4,), show_progress_bars=False).shape == (4, 2)

    mixture = opened(posterior).module
    theta, x = pairs(5)
    with torch.no_grad():
        each = torch.stack([e.log_prob(theta[None], x)[0] for e in old])
        told = mixture.log_prob(theta[None], x)[0]
    assert torch.allclose(told, each.exp().mean(0).log(), atol=1e-5)
    assert estimators(opened(posterior).closed(copy.deepcopy(mixture))) != old


def test_the_flow_of_a_likelihood_is_found_in_its_posterior():
    theta, x = pairs()
    likelihood = likelihood_nn("maf", hidden_features=8, num_transforms=1)(theta, x)
    potential, transform = likelihood_estimator_based_potential(likelihood, PRIOR, x_o=None)
    posterior = MCMCPosterior(potential, PRIOR, transform)
    assert estimators(posterior) == [likelihood]
    assert flow_of(likelihood) is likelihood.net


def test_a_posterior_that_was_pickled_is_opened_too():
    posterior = pickle.loads(pickle.dumps(DirectPosterior(estimator(), PRIOR)))
    assert opened(posterior).module is posterior.posterior_estimator


def test_a_posterior_without_an_estimator_is_refused():
    posterior = MCMCPosterior(lambda theta, x_o: theta.sum(-1), PRIOR)
    with pytest.raises(TypeError, match="must hold an estimator of sbi's"):
        estimators(posterior)


def test_an_estimator_that_is_no_flow_is_refused():
    ratio = classifier_nn("mlp", hidden_features=8)(*pairs())
    with pytest.raises(TypeError, match="must be a flow"):
        flow_of(ratio)


def test_as_many_estimators_as_a_posterior_holds_are_asked_for():
    posterior = DirectPosterior(estimator(), PRIOR)
    with pytest.raises(ValueError, match="each of the 1 of the DirectPosterior; got 2"):
        with_estimators(posterior, [estimator(), estimator()])
