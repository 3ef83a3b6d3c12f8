r"""Tests for the migration of sbi's estimators and posteriors."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("sbi")

import sbi
from sbi.inference import (
    NLE,
    NPE,
    DirectPosterior,
    EnsemblePosterior,
    MCMCPosterior,
    posterior_estimator_based_potential,
)
from sbi.neural_nets import likelihood_nn, posterior_nn
from sbi.utils import BoxUniform
from torch import nn

import flowguard
from flowguard.integrations.sbi import estimators

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
OLD = sbi.__version__.startswith("0.25.")

#: sbi's flows that can be made robust as a whole.
MODELS = ["maf", "maf_rqs", "nsf", "zuko_maf", "zuko_nice", "zuko_nsf"]


def pairs(n=400):
    theta = PRIOR.sample((n,))
    return theta, torch.cat((theta, theta[:, :1]), 1) + 0.1 * torch.randn(n, 3)


def estimator(model, **options):
    options = {"hidden_features": 8, "num_transforms": 2, **options}
    return posterior_nn(model, **options)(*pairs())


def trained(model, **options):
    r"""An estimator after some steps, so that its layers do something."""
    est = estimator(model, **options)
    optimizer = torch.optim.Adam(est.parameters(), 1e-2)
    theta, x = pairs()
    for _ in range(30):
        optimizer.zero_grad()
        est.loss(theta, x).mean().backward()
        optimizer.step()
    return est.eval()


@pytest.mark.parametrize("model", MODELS)
def test_an_estimator_keeps_its_likelihood_and_is_certified(model):
    old, (theta, x) = trained(model), pairs()
    robust, report = flowguard.migrate(old, theta, x)
    assert type(robust) is type(old)
    with torch.no_grad():
        before, after = (e.log_prob(theta[None], x) for e in (old, robust))
    assert (after - before).mean().abs() < 1e-3
    assert report.nll_before == pytest.approx(-before.mean().item(), abs=1e-4)
    certificate = flowguard.certify(robust)
    assert certificate.certified
    far = robust.sample((64,), 1e6 * x[:2])
    assert far.isfinite().all()
    assert far.shape == (64, 2, 2)
    assert (far.abs() <= certificate.bound(8.0)).all()
    assert not flowguard.certify(old).certified


@pytest.mark.parametrize("model", ["nsf", "zuko_nsf"])
@pytest.mark.parametrize("z_score", ["none", "structured"])
def test_it_does_so_whatever_is_standardised(model, z_score):
    theta, x = pairs()
    old = trained(model, z_score_theta=z_score, z_score_x=z_score)
    _, report = flowguard.migrate(old, theta, x)
    assert abs(report.nll_swapped - report.nll_before) < 1e-3
    assert report.certificate_after.certified


@pytest.mark.parametrize("model", ["maf", "zuko_maf"])
def test_embedding_networks_stay_and_see_what_is_observed(model):
    theta, x = pairs()
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    old = trained(model, embedding_net=net)
    robust, report = flowguard.migrate(old, theta, x)
    assert abs(report.nll_swapped - report.nll_before) < 1e-3
    assert report.certificate_after.certified
    embedded = [e.embedding_net(x) for e in (old, robust)]
    assert torch.equal(*embedded)


def test_one_parameter_is_migrated_too():
    theta = 2 * torch.rand(400, 1) - 1
    x = theta + 0.1 * torch.randn(400, 2)
    for model in ("nsf", "zuko_maf"):
        old = posterior_nn(model, hidden_features=8, num_transforms=2)(theta, x)
        _, report = flowguard.migrate(old, theta, x)
        assert abs(report.nll_swapped - report.nll_before) < 1e-3
        assert report.certificate_after.certified


@pytest.mark.parametrize("model", ["maf", "zuko_maf"])
def test_a_posterior_becomes_one_of_its_class_that_samples_and_pickles(model):
    theta, x = pairs()
    posterior = DirectPosterior(trained(model), PRIOR).set_default_x(x[:1])
    state = copy.deepcopy(posterior.posterior_estimator.state_dict())
    robust, report = flowguard.migrate(posterior, theta, x)
    assert type(robust) is DirectPosterior
    assert report.certificate_after.certified
    assert flowguard.certify(robust).certified
    assert torch.equal(robust.default_x, x[:1])
    for name, value in posterior.posterior_estimator.state_dict().items():
        assert torch.equal(value, state[name])
    samples = robust.sample((8,), show_progress_bars=False)
    assert PRIOR.support.check(samples).all()
    again = pickle.loads(pickle.dumps(robust))
    assert torch.equal(again.potential(samples), robust.potential(samples))
    batched = robust.sample_batched((4,), x=x[:3], show_progress_bars=False)
    assert batched.shape == (4, 3, 2)


def test_a_dry_run_returns_the_posterior_itself():
    theta, x = pairs()
    posterior = DirectPosterior(trained("maf"), PRIOR)
    same, report = flowguard.migrate(posterior, theta, x, dry_run=True)
    assert same is posterior
    assert report.dry_run
    assert len(report.replaced) == 2


def test_a_posterior_is_fine_tuned():
    theta, x = pairs()
    posterior = DirectPosterior(estimator("zuko_maf"), PRIOR)
    robust, report = flowguard.migrate(posterior, theta, x, steps=20, lr=1e-2)
    assert report.nll_after < report.nll_swapped
    assert report.certificate_after.certified
    assert flowguard.certify(robust).certified


def test_an_ensemble_is_migrated_as_the_mixture_that_it_is():
    theta, x = pairs()
    members = [DirectPosterior(trained(m), PRIOR) for m in ("maf", "zuko_nsf")]
    ensemble = EnsemblePosterior(members, weights=torch.tensor([0.25, 0.75]))
    robust, report = flowguard.migrate(ensemble, theta, x)
    assert type(robust) is EnsemblePosterior
    assert abs(report.nll_swapped - report.nll_before) < 1e-3
    assert flowguard.certify(robust).certified
    assert torch.equal(robust.weights, ensemble.weights)
    assert {r.name.split(".")[1] for r in report.replaced} == {"0", "1"}
    with torch.no_grad():
        logs = torch.stack([e.log_prob(theta[None], x)[0] for e in estimators(ensemble)])
    mixed = (torch.tensor([[0.25], [0.75]]) * logs.exp()).sum(0).log()
    assert report.nll_before == pytest.approx(-mixed.mean().item(), abs=1e-4)


def test_a_posterior_by_mcmc_has_its_estimator_migrated():
    theta, x = pairs()
    potential, transform = posterior_estimator_based_potential(trained("maf"), PRIOR, x_o=None)
    posterior = MCMCPosterior(potential, PRIOR, transform).set_default_x(x[:1])
    robust, report = flowguard.migrate(posterior, theta, x)
    assert type(robust) is MCMCPosterior
    assert report.certificate_after.certified
    assert torch.equal(
        robust.potential(theta[:2]),
        estimators(robust)[0].log_prob(theta[:2][None], x[:1].expand(2, 3))[0],
    )


def test_the_flow_of_a_likelihood_takes_its_pairs_the_other_way_round():
    theta, x = pairs()
    trainer = NLE(PRIOR, density_estimator=likelihood_nn("maf", hidden_features=8))
    trainer.append_simulations(theta, x).train(max_num_epochs=1)
    posterior = trainer.build_posterior()
    robust, report = flowguard.migrate(posterior, x, theta)
    assert report.certificate_after.certified
    assert type(robust) is type(posterior)


def test_a_posterior_that_sbi_has_trained_is_migrated():
    theta, x = pairs()
    trainer = NPE(PRIOR, density_estimator="maf")
    trainer.append_simulations(theta, x).train(max_num_epochs=2)
    posterior = trainer.build_posterior()
    robust, report = flowguard.migrate(posterior, theta, x)
    assert abs(report.nll_swapped - report.nll_before) < 1e-3
    assert flowguard.certify(robust).certified


@pytest.mark.skipif(OLD, reason="its pickles of such a prior do not load")
def test_a_flow_in_the_unconstrained_space_of_its_prior_is_certified():
    theta, x = pairs()
    old = trained("zuko_nsf", z_score_theta="transform_to_unconstrained", x_dist=PRIOR)
    _, report = flowguard.migrate(old, theta, x)
    assert abs(report.nll_swapped - report.nll_before) < 1e-3
    assert report.certificate_after.certified
    assert report.certificate_after.bound(4.0) < 4


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("made", "flowguard does not know how"),
        ("zuko_gf", "neither affine nor a rational-quadratic spline"),
        ("zuko_ncsf", "its spline is one of a circle"),
    ],
)
def test_what_cannot_be_made_robust_is_kept_and_named(model, reason):
    theta, x = pairs()
    robust, report = flowguard.migrate(estimator(model), theta, x)
    assert not report.replaced
    assert any(reason in why for why in report.reasons.values())
    assert all(name.startswith("net.") for name in report.kept)
    assert not flowguard.certify(robust).certified


@pytest.mark.skipif(
    OLD, reason="it is a distribution of the host there, of which nothing is replaced"
)
def test_a_mixture_is_refused():
    with pytest.raises(TypeError, match="does not know how to migrate M"):
        flowguard.migrate(estimator("mdn"), *pairs())
