r"""Tests for certificates, attacks and monitors of sbi's estimators and posteriors."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sbi")

from sbi.inference import (
    DirectPosterior,
    EnsemblePosterior,
    MCMCPosterior,
    posterior_estimator_based_potential,
    ratio_estimator_based_potential,
)
from sbi.neural_nets import classifier_nn, posterior_nn
from sbi.utils import BoxUniform
from torch import nn

import flowguard
from flowguard.integrations.sbi import protect
from flowguard.ood import OODConditioner

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
ROBUST = {"univariate": flowguard.RobustSpline, "shapes": flowguard.RobustSpline.shapes(4)}


def pairs(n=200):
    theta = PRIOR.sample((n,))
    return theta, torch.cat((theta, theta[:, :1]), 1) + 0.1 * torch.randn(n, 3)


def estimator(model="zuko_maf", **options):
    options = {"hidden_features": 8, "num_transforms": 2, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keywords that sbi hands on to the flow
        return posterior_nn(model, **options)(*pairs())


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("model", ["zuko_maf", "zuko_nice"])
def test_no_sample_of_a_certified_posterior_exceeds_its_bound(model):
    posterior = DirectPosterior(shaken(estimator(model, **ROBUST)), PRIOR)
    certificate = flowguard.certify(posterior)
    assert certificate.certified
    assert certificate.model == "DirectPosterior"
    bound = certificate.bound(4.0)
    assert bound < 1e3
    result = flowguard.attack(posterior, pairs(4)[1], steps=30, restarts=2)
    assert 1 < result.value <= bound
    assert flowguard.certify(posterior.posterior_estimator).bound(4.0) == bound


@pytest.mark.parametrize("model", ["maf", "nsf", "zuko_maf", "zuko_nsf"])
def test_the_estimators_of_sbi_itself_are_refused_and_their_layers_named(model):
    certificate = flowguard.certify(estimator(model))
    assert not certificate.certified
    assert all(step.name.startswith("net.") for step in certificate.refused)


def test_the_context_of_an_attack_is_what_is_observed():
    embedded = estimator(embedding_net=nn.Sequential(nn.Linear(3, 5), nn.Tanh()), **ROBUST)
    embedded = embedded.double()  # a number among others is rounded as the kernels like
    result = flowguard.attack(embedded, pairs(2)[1].double(), steps=3, restarts=1)
    assert result.context.shape == (1, 3)
    drawn = embedded.net(embedded.embedding_net(result.context)).transform.inv(result.noise)
    assert torch.allclose(drawn, result.sample)


@pytest.mark.parametrize("model", ["maf", "nsf"])
def test_the_attack_on_an_estimator_of_nflows_is_that_on_its_flow(model):
    old, (_, x) = estimator(model), pairs(2)
    results = []
    for what in (old, old.net):
        torch.manual_seed(0)
        results.append(flowguard.attack(what, x, steps=3, restarts=1).value)
    assert results[0] == results[1]


def test_a_prior_with_bounds_bounds_the_samples_in_its_unconstrained_space():
    box = BoxUniform(torch.tensor([-1.0, -3.0]), torch.tensor([1.0, 3.0]))
    posterior = estimator(z_score_theta="transform_to_unconstrained", x_dist=box, **ROBUST)
    certificate = flowguard.certify(posterior)
    assert certificate.certified
    assert (
        3.0 <= certificate.bound(4.0) <= 9.1
    )  # the box, and its middle which is known as a bound
    assert certificate.growth < 1e-50


def test_the_samples_of_mcmc_are_not_bounded_by_the_flow():
    potential, transform = posterior_estimator_based_potential(
        estimator(**ROBUST), PRIOR, x_o=None
    )
    certificate = flowguard.certify(MCMCPosterior(potential, PRIOR, transform))
    (step,) = certificate.refused
    assert "its samples do not come from the flow" in step.reason
    assert "certify its ZukoFlow" in step.reason


def test_a_posterior_from_a_ratio_is_refused():
    ratio = classifier_nn("mlp", hidden_features=8)(*pairs())
    potential, transform = ratio_estimator_based_potential(ratio, PRIOR, x_o=None)
    (step,) = flowguard.certify(MCMCPosterior(potential, PRIOR, transform)).refused
    assert step.reason == "it samples by means of a RatioEstimator, which bounds nothing"


def test_an_ensemble_is_bounded_by_its_worst_member():
    members = [shaken(estimator(**ROBUST)), shaken(estimator("zuko_nice", **ROBUST))]
    bounds = [flowguard.certify(m).bound(4.0) for m in members]
    assert bounds[0] != bounds[1]
    ensemble = EnsemblePosterior([DirectPosterior(m, PRIOR) for m in members])
    certificate = flowguard.certify(ensemble)
    assert certificate.bound(4.0) == max(bounds)
    assert certificate.event_size == 2
    growth = [flowguard.certify(m).growth for m in members]
    assert certificate.growth == max(growth)
    assert math.isfinite(certificate.growth)
    assert replace(certificate.steps[-1]) != certificate.steps[-1]  # as all steps
    assert flowguard.certify(ensemble, roundoff=1e-3).bound(4.0) > max(bounds)
    assert flowguard.attack(ensemble, pairs(2)[1], steps=10, restarts=1).value <= max(bounds)


def test_the_members_of_an_ensemble_that_are_not_bounded_are_named():
    members = [DirectPosterior(e, PRIOR) for e in (estimator(**ROBUST), estimator("maf"))]
    certificate = flowguard.certify(EnsemblePosterior(members))
    assert not certificate.certified
    assert all(
        s.name.startswith("posteriors.1.posterior_estimator.net") for s in certificate.refused
    )


def test_a_posterior_whose_sampling_is_its_own_is_refused():
    class Doubled(DirectPosterior):
        def sample(self, *args, **kwargs):
            return 2 * super().sample(*args, **kwargs)

    (step,) = flowguard.certify(Doubled(estimator(**ROBUST), PRIOR)).refused
    assert "overrides sample of DirectPosterior" in step.reason


def test_what_is_not_finite_in_a_posterior_is_named():
    broken = estimator(**ROBUST)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    certificate = flowguard.certify(DirectPosterior(broken, PRIOR))
    assert [step.reason for step in certificate.refused] == [
        "it holds numbers that are not finite"
    ]


def test_a_posterior_in_double_precision_is_bounded_in_it():
    double = estimator(**ROBUST).double()
    assert flowguard.certify(DirectPosterior(double, PRIOR)).roundoff == 2.0**-50


def test_a_monitor_hears_the_guard_of_a_posterior():
    guard = OODConditioner(nn.Linear(3, 4), policy="report", alpha=0.01)
    posterior = DirectPosterior(estimator(embedding_net=guard, **ROBUST), PRIOR)
    embed = posterior.posterior_estimator.embedding_net
    inner = embed[-1]
    standardised = embed[0](pairs(2000)[1])
    inner.fit(standardised[:1500], progress=False)
    inner.calibrate(standardised[1500:], progress=False)
    with flowguard.monitor(posterior) as watch:
        posterior.potential(torch.zeros(1, 2), x=1e3 * torch.ones(1, 3))
    assert watch.report.flagged.tolist() == [True]


def test_a_protected_posterior_is_certified_as_it_was():
    theta, x = pairs(400)
    posterior = DirectPosterior(shaken(estimator(**ROBUST)), PRIOR)
    guarded = protect(posterior, theta, x, policy="shrink")
    certificate = flowguard.certify(guarded)
    assert certificate.certified
    assert certificate.bound(4.0) == flowguard.certify(posterior).bound(4.0)
    assert certificate.model == "GuardedDirectPosterior"
    result = flowguard.attack(guarded, x[:4], steps=10, restarts=1)
    assert 1 < result.value <= certificate.bound(4.0)


def test_a_protected_ensemble_is_certified_as_it_was():
    theta, x = pairs(600)
    ensemble = EnsemblePosterior([DirectPosterior(estimator(**ROBUST), PRIOR) for _ in range(2)])
    guarded = protect(ensemble, theta, x)
    assert flowguard.certify(guarded).bound(4.0) == flowguard.certify(ensemble).bound(4.0)
    members = EnsemblePosterior([protect(p, theta, x) for p in ensemble.posteriors])
    assert flowguard.certify(members).bound(4.0) == flowguard.certify(ensemble).bound(4.0)


def test_what_is_refused_without_protection_is_refused_with_it():
    theta, x = pairs(400)
    potential, transform = posterior_estimator_based_potential(
        estimator(**ROBUST), PRIOR, x_o=None
    )
    for posterior in (
        MCMCPosterior(potential, PRIOR, transform),
        DirectPosterior(estimator("maf"), PRIOR),
    ):
        plain = [step.reason for step in flowguard.certify(posterior).refused]
        told = [step.reason for step in flowguard.certify(protect(posterior, theta, x)).refused]
        assert told == plain != []


def test_a_protected_posterior_whose_sampling_is_its_own_is_refused():
    class Doubled(DirectPosterior):
        def sample(self, *args, **kwargs):
            return 2 * super().sample(*args, **kwargs)

    theta, x = pairs(400)
    (step,) = flowguard.certify(protect(Doubled(estimator(**ROBUST), PRIOR), theta, x)).refused
    assert "overrides sample of DirectPosterior" in step.reason
    guarded = protect(DirectPosterior(estimator(**ROBUST), PRIOR), theta, x)
    guarded.sample = lambda *args: 1e9
    (step,) = flowguard.certify(guarded).refused
    assert "it has a sample of its own" in step.reason
    guarded = protect(DirectPosterior(estimator(**ROBUST), PRIOR), theta, x)

    class Tripled(type(guarded)):
        def sample(self, *args, **kwargs):
            return 3 * super().sample(*args, **kwargs)

    guarded.__class__ = Tripled
    (step,) = flowguard.certify(guarded).refused
    assert "overrides" in step.reason
