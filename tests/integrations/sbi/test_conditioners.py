r"""Tests for guards in the embedding networks of sbi's estimators."""

import pickle
import warnings

import pytest
import torch

pytest.importorskip("sbi")

from sbi.inference import NPE, DirectPosterior, EnsemblePosterior
from sbi.utils import BoxUniform
from torch import nn

import flowguard
from flowguard.integrations.sbi import calibrate, posterior_nn
from flowguard.ood import NotFittedError, OODConditioner, OODContextError, OODContextWarning

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
SMALL = {"hidden_features": 8, "num_transforms": 2}


def pairs(n=1000):
    theta = PRIOR.sample((n,))
    return theta, torch.cat((theta, theta[:, :1]), 1) + 0.1 * torch.randn(n, 3)


def build(net, model="robust_nsf"):
    with pytest.warns(UserWarning, match=r"knows no simulations yet.*calibrate\(posterior, x\)"):
        return posterior_nn(model, embedding_net=net, **SMALL)


def train(net):
    trainer = NPE(PRIOR, density_estimator=build(net))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.append_simulations(*pairs()).train(max_num_epochs=1)
    return trainer.build_posterior()


@pytest.mark.parametrize("policy", ["warn", "shrink", "raise", "report"])
def test_a_guard_that_knows_nothing_yet_is_trained_with_in_silence(policy):
    posterior = train(OODConditioner(policy=policy))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.sample((2,), x=torch.zeros(1, 3), show_progress_bars=False)
    assert flowguard.certify(posterior).certified


def test_once_it_is_calibrated_it_tells_of_far_observations():
    posterior = train(OODConditioner(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))))
    _, x = pairs(2000)
    assert calibrate(posterior, x) is posterior
    far, near = torch.tensor([[1.0, -1.0, -1.0]]) * 30, torch.zeros(1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.potential(torch.zeros(1, 2), x=near)
    with pytest.warns(OODContextWarning):
        posterior.potential(torch.zeros(1, 2), x=far)


def test_with_shrink_a_far_observation_does_not_hang():
    posterior = calibrate(train(OODConditioner(policy="shrink", alpha=0.01)), pairs(2000)[1])
    with pytest.warns(OODContextWarning, match="moved onto it"):
        samples = posterior.sample((50,), x=1e6 * torch.ones(1, 3), show_progress_bars=False)
    assert PRIOR.support.check(samples).all()


def test_a_guard_within_the_network_gets_what_reaches_it():
    guard = OODConditioner(nn.Linear(5, 2), policy="raise", alpha=0.01)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), guard)
    posterior = calibrate(train(net), pairs(2000)[1])
    posterior.potential(torch.zeros(1, 2), x=torch.zeros(1, 3))
    with pytest.raises(OODContextError):
        posterior.potential(torch.zeros(1, 2), x=1e4 * torch.ones(1, 3))
    again = pickle.loads(pickle.dumps(posterior))
    with pytest.raises(OODContextError):
        again.potential(torch.zeros(1, 2), x=1e4 * torch.ones(1, 3))


def test_all_members_of_an_ensemble_are_calibrated():
    posteriors = []
    for _ in range(2):
        est = build(OODConditioner(policy="raise", alpha=0.01))(*pairs()).eval()
        posteriors.append(DirectPosterior(est, PRIOR))
    ensemble = calibrate(EnsemblePosterior(posteriors), pairs(2000)[1])
    for part in ensemble.posteriors:
        with pytest.raises(OODContextError):
            part.potential(torch.zeros(1, 2), x=1e4 * torch.ones(1, 3))


def test_a_guard_that_is_calibrated_already_is_used_as_it_is():
    _, x = pairs(2000)
    guard = OODConditioner(policy="raise", alpha=0.01).fit(x[:1000], progress=False)
    guard.calibrate(x[1000:], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = posterior_nn("robust_nsf", embedding_net=guard, z_score_x="none", **SMALL)
    assert made.embedding_net is guard


def test_outside_of_it_the_guard_still_refuses():
    guard = OODConditioner().eval()
    build(guard)
    with pytest.raises(NotFittedError):
        guard(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("x", "held_out", "match"),
    [
        (torch.zeros(10, 3), 1.0, "held_out must lie between 0 and 1; got 1.0"),
        (torch.zeros(2, 3), 0.5, "got 2 rows"),
    ],
)
def test_what_calibrates_nothing_is_refused(x, held_out, match):
    est = build(OODConditioner())(*pairs())
    with pytest.raises(ValueError, match=match):
        calibrate(est, x, held_out=held_out)


def test_a_posterior_without_a_guard_is_told_of_protection():
    est = posterior_nn("robust_nsf", **SMALL)(*pairs())
    with pytest.raises(ValueError, match="must hold an OODConditioner; got a ZukoFlow"):
        calibrate(est, pairs()[1])
