r"""Tests for robust estimators that sbi trains."""

import pickle
import warnings

import pytest
import torch

pytest.importorskip("sbi")

import sbi
from sbi.inference import NPE, NPE_A, NPE_B, DirectPosterior, MCMCPosterior
from sbi.neural_nets.estimators import ZukoFlow
from sbi.utils import BoxUniform
from torch import nn

import flowguard
from flowguard.integrations.sbi import posterior_nn
from flowguard.integrations.sbi.builders import MODELS

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
#: sbi 0.25 trains none of zuko's flows by NPE_C in a second round.
KINDS = [NPE_B] if sbi.__version__.startswith("0.25.") else [NPE, NPE_B]
SMALL = {"hidden_features": 8, "num_transforms": 2}


def pairs(n=400):
    theta = PRIOR.sample((n,))
    return theta, torch.cat((theta, theta[:, :1]), 1) + 0.1 * torch.randn(n, 3)


def train(trainer, pairs, proposal=None, epochs=2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        trainer.append_simulations(*pairs, **({} if proposal is None else {"proposal": proposal}))
        return trainer.train(max_num_epochs=epochs, training_batch_size=50, learning_rate=5e-3)


@pytest.fixture(scope="module", params=MODELS)
def posterior(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(tmp_path_factory.mktemp("logs"))
        torch.manual_seed(0)
        trainer = NPE(PRIOR, density_estimator=posterior_nn(request.param, **SMALL))
        train(trainer, pairs(), epochs=15)
        return trainer.build_posterior()


def test_what_sbi_has_trained_is_certified(posterior):
    assert type(posterior) is DirectPosterior
    assert type(posterior.posterior_estimator) is ZukoFlow
    certificate = flowguard.certify(posterior)
    assert certificate.certified
    far = posterior.posterior_estimator.sample((100,), 1e8 * pairs(2)[1])
    assert (far.abs() <= certificate.bound(8.0)).all()


def test_it_learns(posterior):
    theta, x = pairs(200)
    with torch.no_grad():
        log_prob = posterior.posterior_estimator.log_prob(theta[None], x)[0].mean()
    prior = PRIOR.log_prob(theta).mean()
    assert log_prob > prior + 0.3


def test_it_does_what_posteriors_of_sbi_do(posterior):
    theta, x = pairs(3)
    samples = posterior.sample((10,), x=x[:1], show_progress_bars=False)
    assert samples.shape == (10, 2)
    batched = posterior.sample_batched((5,), x=x, show_progress_bars=False)
    assert batched.shape == (5, 3, 2)
    assert posterior.log_prob(theta, x=x[:1]).isfinite().all()
    assert posterior.log_prob_batched(theta[:, None].expand(3, 3, 2), x=x).shape == (3, 3)
    posterior.set_default_x(x[:1])
    best = posterior.map(num_iter=3, num_init_samples=20, num_to_optimize=2)
    assert best.shape == (1, 2)
    assert posterior.potential(best).isfinite()


def test_it_is_saved_and_loaded(posterior, tmp_path):
    theta, x = pairs(3)
    again = pickle.loads(pickle.dumps(posterior))
    torch.save(posterior, tmp_path / "posterior.pt")
    loaded = torch.load(tmp_path / "posterior.pt", weights_only=False)
    for other in (again, loaded):
        assert torch.equal(other.potential(theta, x=x[:1]), posterior.potential(theta, x=x[:1]))
        assert flowguard.certify(other).certified


def test_weights_load_into_what_is_built_anew():
    build = pickle.loads(pickle.dumps(posterior_nn("robust_nsf", **SMALL)))
    old, new = build(*pairs()), build(*pairs())
    theta, x = pairs(5)
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        assert torch.equal(new.log_prob(theta[None], x), old.log_prob(theta[None], x))


def test_the_trainer_itself_pickles():
    trainer = NPE(PRIOR, density_estimator=posterior_nn("robust_coupling", **SMALL))
    train(trainer, pairs())
    assert type(pickle.loads(pickle.dumps(trainer)).build_posterior()) is DirectPosterior


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_in_several_rounds(kind):
    torch.manual_seed(1)
    trainer = kind(PRIOR, density_estimator=posterior_nn("robust_nsf", **SMALL))
    train(trainer, pairs(), PRIOR if kind is NPE_B else None, epochs=5)  # as sbi asks of it
    proposal = trainer.build_posterior().set_default_x(torch.zeros(1, 3))
    theta = proposal.sample((200,), show_progress_bars=False)
    x = torch.cat((theta, theta[:, :1]), 1) + 0.1 * torch.randn(200, 3)
    train(trainer, (theta, x), proposal)
    posterior = trainer.build_posterior()
    assert flowguard.certify(posterior).certified
    posterior.set_default_x(torch.zeros(1, 3))
    assert posterior.sample((5,), show_progress_bars=False).isfinite().all()


def test_mcmc_samples_from_it():
    trainer = NPE(PRIOR, density_estimator=posterior_nn("robust_maf", **SMALL))
    train(trainer, pairs())
    posterior = trainer.build_posterior(sample_with="mcmc")
    options = {"num_chains": 2, "warmup_steps": 1, "thin": 1, "method": "slice_np_vectorized"}
    options["init_strategy"] = "proposal"
    assert type(posterior) is MCMCPosterior
    samples = posterior.sample((4,), x=torch.zeros(1, 3), show_progress_bars=False, **options)
    assert samples.isfinite().all()


def test_npe_a_is_told_that_it_takes_mixtures_alone():
    trainer = NPE_A(PRIOR, density_estimator=posterior_nn("robust_nsf", **SMALL))
    with pytest.raises(TypeError, match=r"builds a flow, where a mixture .* NPE_B or NPE_C"):
        train(trainer, pairs())


@pytest.mark.parametrize("z_score", ["independent", "structured", "none", None])
@pytest.mark.parametrize("model", MODELS)
def test_whatever_is_standardised_it_is_certified(model, z_score):
    theta, x = pairs()
    build = posterior_nn(model, z_score_theta=z_score, z_score_x=z_score, **SMALL)
    est = build(10 + 3 * theta, x)
    certificate = flowguard.certify(est)
    assert certificate.certified
    inner = est.net.transform.transforms
    assert len(inner) == 2 + (z_score in ("independent", "structured"))


def test_the_prior_bounds_what_is_in_its_unconstrained_space():
    build = posterior_nn(z_score_theta="transform_to_unconstrained", x_dist=PRIOR, **SMALL)
    est = build(*pairs())
    assert flowguard.certify(est).bound(4.0) < 4.0
    assert est.sample((50,), 1e9 * pairs(1)[1]).abs().max() <= 1.0


def test_images_are_embedded():
    theta = PRIOR.sample((200,))
    x = theta[:, :1, None, None] + 0.1 * torch.randn(200, 1, 8, 8)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    build = posterior_nn("robust_coupling", embedding_net=net, **SMALL)
    trainer = NPE(PRIOR, density_estimator=build)
    est = train(trainer, (theta, x))
    assert flowguard.certify(est).certified
    assert trainer.build_posterior().sample((3,), x=x[:1], show_progress_bars=False).shape == (
        3,
        2,
    )


def test_one_parameter_is_enough():
    theta = 2 * torch.rand(200, 1) - 1
    est = posterior_nn("robust_nsf", **SMALL)(theta, theta + 0.1 * torch.randn(200, 1))
    assert flowguard.certify(est).certified


def test_sbi_keywords_reach_the_flow():
    est = posterior_nn(
        "robust_nsf", hidden_features=[12], num_transforms=3, num_bins=6, tail_bound=3.0,
        shift_bound=1.0, slope=0.05, randperm=True, num_components=3,
    )(*pairs())  # fmt: skip
    layers = est.net.transform.transforms[1:]
    assert len(layers) == 3
    assert layers[0].hyper[0].out_features == 12
    spline = layers[0].univariate(*(torch.zeros(s) for s in layers[0].shapes))
    assert repr(spline) == "RobustSpline(bins=6)"
    assert spline.inverse_bound(10.0) == 11.0
    assert spline.inverse_bound(0.0) == 3.0


def test_the_splines_of_robust_maf_have_two_bins():
    shapes = {m: posterior_nn(m, **SMALL).options["shapes"][0] for m in MODELS}
    assert shapes == {"robust_coupling": (9,), "robust_maf": (1,), "robust_nsf": (9,)}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"model": "robust_nfs"},
            ValueError,
            "one of 'robust_coupling', 'robust_maf', 'robust_nsf'",
        ),
        ({"hiden_features": 64}, TypeError, "'hiden_features'"),
        ({"num_blocks": 2}, TypeError, "'num_blocks'"),
        ({"num_bins": 1}, ValueError, "at least 2 bins; got 1"),
        ({"num_transforms": 0}, ValueError, "num_transforms must be positive; got 0"),
        ({"tail_bound": -1.0}, ValueError, "bound must be positive"),
        ({"slope": 2.0}, ValueError, "slope must lie in"),
        ({"z_score_theta": "standard"}, ValueError, "Invalid z-scoring option"),
        ({"z_score_x": "standard"}, ValueError, "Invalid z-scoring option"),
    ],
)
def test_what_is_wrong_is_told_when_it_is_asked_for(options, error, match):
    state = torch.get_rng_state()
    with pytest.raises(error, match=match):
        posterior_nn(**options)
    assert torch.equal(torch.get_rng_state(), state)
