r"""Tests for posteriors that look at an observation before they answer."""

import copy
import io
import itertools
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

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
    ratio_estimator_based_potential,
)
from sbi.neural_nets import classifier_nn, likelihood_nn, posterior_nn
from sbi.utils import BoxUniform

import flowguard
from flowguard.integrations.sbi import calibrate, protect, watch
from flowguard.ood import OODConditioner, OODContextError, OODContextWarning

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
OLD = sbi.__version__.startswith("0.25.")
QUIET = {"show_progress_bars": False}
MCMC = {"method": "slice_np_vectorized", "num_chains": 2, "warmup_steps": 1, "thin": 1}
MCMC["init_strategy"] = "proposal"  # of which the default tries thousands


def pairs(n=1000):
    theta = PRIOR.sample((n,))
    return theta, torch.cat((theta, theta[:, :1]), 1) + 0.1 * torch.randn(n, 3)


THETA, X = None, None


@pytest.fixture(autouse=True)
def _simulated(_seeded):
    global THETA, X
    THETA, X = pairs()


def estimator(model="maf", x=None, **options):
    x = X if x is None else x
    return posterior_nn(model, hidden_features=8, num_transforms=2, **options)(THETA, x)


def direct(model="maf", x=None, **options):
    return DirectPosterior(estimator(model, x, **options), PRIOR)


def of_posterior(kind, **options):
    potential, transform = posterior_estimator_based_potential(estimator(), PRIOR, x_o=None)
    return kind(potential, theta_transform=transform, **options)


def of_likelihood(kind=MCMCPosterior, **options):
    likelihood = likelihood_nn("maf", hidden_features=8, num_transforms=1)(THETA, X)
    potential, transform = likelihood_estimator_based_potential(likelihood, PRIOR, x_o=None)
    return kind(potential, theta_transform=transform, **options)


def of_ratio(**options):
    ratio = classifier_nn("mlp", hidden_features=8)(THETA, X)
    potential, transform = ratio_estimator_based_potential(ratio, PRIOR, x_o=None)
    return MCMCPosterior(potential, theta_transform=transform, **options)


def ensemble():
    return EnsemblePosterior([direct(), direct("zuko_maf")])


POSTERIORS = {
    "maf": direct,
    "nsf": lambda: direct("nsf"),
    "zuko_maf": lambda: direct("zuko_maf"),
    "mdn": lambda: direct("mdn"),
    "ensemble": ensemble,
    "mcmc": lambda: of_posterior(MCMCPosterior, proposal=PRIOR, **MCMC),
    "importance": lambda: of_posterior(ImportanceSamplingPosterior, proposal=PRIOR),
    "likelihood": lambda: of_likelihood(proposal=PRIOR, **MCMC),
    "ratio": lambda: of_ratio(proposal=PRIOR, **MCMC),
}

#: Those that sample by chains, which takes its time.
CHAINS = ("mcmc", "likelihood", "ratio")

NEAR = torch.tensor([[0.3, 0.1, 0.3]])
FAR = 1000 * NEAR


@pytest.fixture
def heard():
    r"""Records the guard's warnings."""

    class Heard(list):
        def __enter__(self):
            self.catch = warnings.catch_warnings(record=True)
            self.all = self.catch.__enter__()
            warnings.simplefilter("always")
            return self

        def __exit__(self, *error):
            self.catch.__exit__(*error)
            self[:] = [str(w.message) for w in self.all if w.category is OODContextWarning]

    return Heard()


@pytest.fixture
def late(monkeypatch):
    r"""A clock that strikes a second whenever it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(ticks))


def seeded(call):
    torch.manual_seed(1)
    np.random.seed(1)
    return call()


@pytest.mark.parametrize("kind", POSTERIORS)
def test_an_honest_observation_is_answered_bit_for_bit(kind, heard):
    posterior = POSTERIORS[kind]()
    guarded = protect(posterior, THETA, X)
    asked = {
        "potential": lambda p: p.potential(THETA[:4], x=NEAR),
        "default": lambda p: p.set_default_x(NEAR).potential(THETA[:4]),
    }
    if kind not in CHAINS:
        asked["sample"] = lambda p: p.sample((8,), **QUIET)
        asked["another"] = lambda p: p.sample((8,), x=X[:1], **QUIET)
    if kind not in (*CHAINS, "importance"):
        asked["log_prob"] = lambda p: p.log_prob(THETA[:4], x=NEAR)
        asked["sample_batched"] = lambda p: p.sample_batched((8,), x=X[:3], **QUIET)
    with heard:
        for ask in asked.values():
            plain, told = seeded(lambda: ask(posterior)), seeded(lambda: ask(guarded))  # noqa: B023
            assert torch.equal(plain, told)
    assert heard == []
    assert isinstance(guarded, type(posterior))


@pytest.mark.parametrize("kind", [k for k in POSTERIORS if k not in ("mcmc", "ratio")])
def test_a_far_observation_is_answered_after_shrinking_with_one_warning(kind, heard):
    guarded = protect(POSTERIORS[kind](), THETA, X, policy="shrink")
    count = 4 if kind in CHAINS else 500
    with heard:
        samples = guarded.sample((count,), x=FAR, **QUIET)
    assert samples.shape == (count, 2)
    assert (PRIOR.log_prob(samples) > -torch.inf).all()
    (message,) = heard
    assert "The observation [300, 100, 300] is not like the simulations: p = 0.00" in message
    assert "moved to the nearest of the simulations" in message
    assert guarded.ood_report.flagged.tolist() == [True]


METHODS = {
    "set_default_x": lambda p: p.set_default_x(FAR),
    "default_x": lambda p: setattr(p, "default_x", FAR),
    "sample": lambda p: p.sample((4,), x=FAR, **QUIET),
    "sample_batched": lambda p: p.sample_batched((4,), x=FAR, **QUIET),
    "log_prob": lambda p: p.log_prob(THETA[:4], x=FAR),
    "log_prob_batched": lambda p: p.log_prob_batched(THETA[:4, None], x=FAR),
    "potential": lambda p: p.potential(THETA[:4], x=FAR),
    "leakage_correction": lambda p: p.leakage_correction(FAR, num_rejection_samples=10),
    "map": lambda p: p.map(num_iter=2, num_init_samples=5, num_to_optimize=2),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["zuko_maf", "ensemble"])
def test_each_question_is_looked_at_once(kind, name, heard):
    posterior = POSTERIORS[kind]()
    if not hasattr(posterior, name):
        pytest.skip("this posterior has no such method")
    guarded = protect(posterior, THETA, X, policy="shrink")
    if name == "map":
        guarded.ood_policy = "report"
        guarded.set_default_x(FAR)
        guarded.ood_policy = "shrink"
    with heard:
        METHODS[name](guarded)
    assert len(heard) == 1
    guarded.ood_policy = "report"
    guarded.set_default_x(FAR)
    guarded.ood_policy = "raise"
    with pytest.raises(OODContextError, match="Nothing was computed"):
        METHODS[name](guarded)


@pytest.mark.parametrize("kind", ["maf", "zuko_maf", "mcmc"])
def test_shrinking_answers_as_for_a_simulation(kind):
    posterior = POSTERIORS[kind]()
    guarded = protect(posterior, THETA, X, policy="shrink")
    with pytest.warns(OODContextWarning):
        far = guarded.potential(THETA[:4], x=FAR)
    theta = THETA[:4, None].expand(4, len(X), 2)
    with torch.no_grad():
        simulated = posterior.potential_fn.posterior_estimator.log_prob(theta, X)
    differing = (simulated - far[:, None]).abs().amax(0)
    closest = int(differing.argmin())
    assert differing[closest] < 1e-4
    assert not guarded.ood_score(X[closest]).flagged.any()


def test_a_default_observation_stays_what_the_user_gave():
    for kind in ("maf", "likelihood", "ensemble"):
        guarded = protect(POSTERIORS[kind](), THETA, X, policy="shrink")
        with pytest.warns(OODContextWarning):
            guarded.set_default_x(FAR)
        with pytest.warns(OODContextWarning):
            assert guarded.potential(THETA[:4]).shape == (4,)
        assert torch.equal(guarded.default_x, FAR)


@pytest.mark.parametrize("model", ["maf", "zuko_maf"])
@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_honest_observations_are_flagged_as_seldom_as_promised(model, alpha):
    guarded = protect(direct(model), THETA, X, alpha=alpha)
    assert guarded.ood_score(pairs()[1]).flagged.float().mean() <= 2 * alpha


@pytest.mark.parametrize("ask", ["sample", "sample_batched", "log_prob", "map"])
def test_with_warn_a_far_observation_is_given_up_in_words(ask, late):
    posterior = direct("zuko_maf")
    with torch.no_grad():  # all is far outside of the prior
        for p in posterior.posterior_estimator.net.parameters():
            p.add_(3)
    guarded = protect(posterior, THETA, X, time_limit=50)
    if ask == "map":
        with pytest.warns(OODContextWarning):
            guarded.set_default_x(FAR)
    with (
        pytest.warns(OODContextWarning, match="policy='shrink'") as heard,
        pytest.raises(RuntimeError, match=r"(?s)given up after 50 seconds.*policy='shrink'"),
    ):
        METHODS[ask](guarded)
    assert len([w for w in heard if w.category is OODContextWarning]) == 1


def test_the_limit_is_for_flagged_observations_alone_and_the_users_own_goes_before(late):
    guarded = protect(direct(), THETA, X, time_limit=0)
    assert guarded.sample((8,), x=NEAR, **QUIET).shape == (8, 2)
    with pytest.warns(OODContextWarning), pytest.raises(RuntimeError, match="given up after 0"):
        guarded.sample((8,), x=1.5 * X.abs().amax(0), **QUIET)
    if not OLD:
        with (
            pytest.warns(OODContextWarning),
            pytest.raises(RuntimeError, match="max_sampling_time"),
        ):
            guarded.sample((10**6,), x=FAR, max_sampling_time=1e-9, **QUIET)


@pytest.mark.skipif(OLD, reason="has no limit of time")
def test_rejection_by_a_likelihood_is_given_up_too():
    guarded = protect(of_likelihood(RejectionPosterior, proposal=PRIOR), THETA, X, time_limit=0)
    with pytest.warns(OODContextWarning), pytest.raises(RuntimeError, match="max_sampling_time"):
        guarded.sample((10**6,), x=FAR, **QUIET)


def test_with_report_nothing_is_said():
    guarded = protect(direct(), THETA, X, policy="report")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OODContextWarning)
        guarded.set_default_x(FAR)
    assert guarded.ood_report.flagged.all()


@pytest.mark.parametrize("kind", POSTERIORS)
def test_a_guarded_posterior_is_copied_pickled_and_saved(kind, tmp_path):
    def answer(posterior):
        if kind in CHAINS:
            return posterior.potential(THETA[:4])
        return posterior.sample((8,), **QUIET)

    guarded = protect(POSTERIORS[kind](), THETA, X, policy="shrink")
    with pytest.warns(OODContextWarning):
        guarded.set_default_x(FAR)
    with pytest.warns(OODContextWarning):
        expected = seeded(lambda: answer(guarded))
    torch.save(guarded, tmp_path / "guarded.pt")
    copies = [
        copy.deepcopy(guarded),
        copy.copy(guarded),
        pickle.loads(pickle.dumps(guarded)),
        torch.load(tmp_path / "guarded.pt", weights_only=False),
    ]
    for other in copies:
        assert type(other) is type(guarded)
        assert other.ood_report is None
        with pytest.warns(OODContextWarning):
            assert torch.equal(seeded(lambda: answer(other)), expected)  # noqa: B023
    copies[0].ood_policy = "report"
    assert guarded.ood_policy == "shrink"


def test_the_posterior_that_was_given_is_left_alone():
    posterior = direct()
    before = pickle.dumps(posterior.posterior_estimator.state_dict())
    protect(posterior, THETA, X, policy="raise")
    assert type(posterior) is DirectPosterior
    assert pickle.dumps(posterior.posterior_estimator.state_dict()) == before
    posterior.set_default_x(FAR)


def test_a_guarded_posterior_is_guarded_anew():
    first = protect(direct(), THETA, X, policy="raise")
    second = protect(first, THETA, X + 300, policy="raise")
    assert second.ood_score(NEAR).flagged.all()
    assert not first.ood_score(NEAR).flagged.any()
    assert type(second) is type(first)
    assert len([m for m in second.posterior_estimator.modules() if type(m) is watch.Watch]) == 1


def test_the_split_is_seeded_and_the_generators_are_left_alone():
    posterior, state = direct(), torch.get_rng_state()
    scores = [
        protect(posterior, THETA, X, seed=seed).ood_score(X).levels["embedding"].score
        for seed in (0, 0, 1)
    ]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_calibration_has_not_been_fitted():
    guarded = protect(direct(), THETA, X, held_out=0.4)
    (found,) = [m for m in guarded.posterior_estimator.modules() if type(m) is watch.Watch]
    ((_, level),) = found.conditioner.guard.items()
    assert int(level.gaussian.n) == 600
    assert len(level.calibration.scores) == 400


@pytest.mark.parametrize("z_score_x", ["none", "structured", "independent"])
@pytest.mark.parametrize("model", ["maf", "zuko_nsf"])
def test_features_of_any_scale_count_however_the_estimator_standardises(model, z_score_x):
    scale = torch.tensor([1e-3, 1.0, 1e4])
    x = X * scale + 10 * scale
    guarded = protect(direct(model, x, z_score_x=z_score_x), THETA, x)
    odd = x[:1] + torch.diag(5 * scale)
    assert guarded.ood_score(odd).flagged.all()
    assert guarded.ood_score(x).flagged.float().mean() < 0.03


class Drops(nn.Module):
    r"""An embedding net that reads trials, leaves missing ones out, and has modes."""

    def __init__(self):
        super().__init__()
        self.read = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x):
        return self.read(x).nanmean(dim=-2)


@pytest.mark.parametrize("model", ["maf", "zuko_maf"])
def test_an_embedding_net_is_guarded_by_what_it_gives(model, heard):
    trials = X[:, None] + 0.1 * torch.randn(len(X), 5, 3)
    trials[::4, 3:] = torch.nan
    posterior = direct(model, trials, embedding_net=Drops(), z_score_x="none")
    posterior.posterior_estimator.eval()
    guarded = protect(posterior, THETA, trials, policy="shrink")
    assert guarded.ood_report is None
    assert guarded.ood_score(trials[:8]).flagged.tolist() == [False] * 8
    assert guarded.ood_score(100 * trials[1]).flagged.all()
    with heard:
        samples = guarded.sample((50,), x=100 * trials[1], **QUIET)
    assert len(heard) == 1
    assert samples.shape == (50, 2)
    plain = seeded(lambda: posterior.sample((8,), x=trials[1], **QUIET))
    assert torch.equal(plain, seeded(lambda: guarded.sample((8,), x=trials[1], **QUIET)))


def test_of_a_batch_the_flagged_ones_alone_are_moved_and_named(heard):
    posterior = direct()
    guarded = protect(posterior, THETA, X, policy="shrink")
    batch = torch.cat((X[:3], FAR, X[3:5]))
    with heard:
        told = seeded(
            lambda: guarded.log_prob_batched(THETA[None, :6], batch, norm_posterior=False)
        )
    (message,) = heard
    assert "1 of 6 observations are not like the simulations" in message
    assert "farthest is observation 3 [300, 100, 300]" in message
    plain = posterior.log_prob_batched(THETA[None, :6], batch, norm_posterior=False)
    same = (told == plain).flatten().tolist()
    assert same == [True, True, True, False, True, True]


@pytest.mark.parametrize("kind", ["likelihood", "ratio", "mcmc"])
def test_trials_of_one_observation_are_judged_together(kind, heard):
    guarded = protect(POSTERIORS[kind](), THETA, X, alpha=0.1)
    honest = torch.cat((THETA[:1], THETA[:1, :1]), 1) + 0.1 * torch.randn(10, 3)
    drifted = honest + torch.tensor([0.0, 0.0, 1.0])
    with heard:
        guarded.set_default_x(honest)
    assert heard == []
    assert len(guarded.ood_report) == 10
    with heard:
        guarded.set_default_x(drifted)
    assert len(heard) == 1
    assert "The observation of 10 trials is not like the simulations" in heard[0]
    if OLD and kind == "mcmc":
        return  # whose posterior takes no trials itself
    guarded.ood_policy = "shrink"
    with pytest.warns(OODContextWarning):
        assert guarded.log_prob(THETA[:4]).shape == (4,)


@pytest.mark.parametrize("kind", POSTERIORS)
def test_what_is_not_finite_is_refused(kind):
    guarded = protect(POSTERIORS[kind](), THETA, X, policy="shrink")
    for value in (torch.nan, torch.inf):
        x = NEAR.clone()
        x[0, 1] = value
        with pytest.raises(ValueError, match=r"must be finite.* in 1 of 1"):
            guarded.sample((4,), x=x, **QUIET)
    with pytest.raises(ValueError, match=r"in 2 of 4 \(at 1, 3\)"):
        guarded.sample_batched((4,), x=torch.stack((NEAR, x, NEAR, x)).squeeze(1), **QUIET)


@pytest.mark.parametrize("shape", [(2,), (4,), (1, 4), (3, 1)])
def test_another_shape_is_refused(shape):
    for kind in ("maf", "likelihood"):
        guarded = protect(POSTERIORS[kind](), THETA, X)
        with pytest.raises(ValueError, match=r"the shape \(3,\) of one simulation"):
            guarded.sample((4,), x=torch.zeros(shape), **QUIET)


def test_observations_come_as_sbi_takes_them():
    guarded = protect(direct(), THETA.numpy(), X.double().numpy())
    for x in (NEAR[0], NEAR.numpy(), NEAR[0].tolist(), NEAR.double()):
        assert guarded.set_default_x(x).sample((4,), **QUIET).shape == (4, 2)


def test_float64_as_the_default_changes_nothing():
    posterior = direct("zuko_maf")  # nflows' flows need the default that they were made under
    expected = protect(posterior, THETA, X).ood_score(X).levels["embedding"].score
    torch.set_default_dtype(torch.float64)
    try:
        exact = posterior_nn("zuko_maf", hidden_features=8)(THETA.double(), X.double())
        for given in (posterior, DirectPosterior(exact, PRIOR)):
            guarded = protect(given, THETA.double(), X.double(), policy="shrink")
            score = guarded.ood_score(X).levels["embedding"].score
            assert torch.allclose(score, expected, rtol=1e-3)
            with pytest.warns(OODContextWarning):
                assert guarded.sample((8,), x=FAR.double(), **QUIET).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_simulations_that_are_not_finite_are_left_out():
    x = X.clone()
    x[:7, 0] = torch.nan
    with pytest.warns(UserWarning, match="7 of 1000 simulations are not finite"):
        guarded = protect(direct(), THETA, x)
    assert not guarded.ood_score(NEAR).flagged.any()


def test_a_posterior_of_a_potential_of_the_users_own_is_guarded_by_the_data(heard):
    posterior = MCMCPosterior(lambda theta, x_o: -(theta - x_o[:, :2]).square().sum(-1), PRIOR)
    guarded = protect(posterior, None, X)
    assert list(guarded.ood_score(X).levels) == ["x"]
    with heard:
        guarded.potential(THETA[:4], x=FAR)
    assert len(heard) == 1


@pytest.mark.skipif(OLD, reason="cannot be made under recent versions of torch")
def test_a_variational_posterior_is_guarded_by_the_data(heard):
    posterior = of_posterior(VIPosterior, prior=PRIOR, q="gaussian")
    options = {"max_num_iters": 2, "show_progress_bar": False, "quality_control": False}
    posterior.set_default_x(NEAR).train(**options)
    guarded = protect(posterior, THETA, X, policy="shrink")
    plain = seeded(lambda: posterior.sample((8,)))
    assert torch.equal(plain, seeded(lambda: guarded.sample((8,))))
    with heard:
        guarded.set_default_x(FAR)
        guarded.train(**options)
        assert guarded.sample((8,)).shape == (8, 2)
    assert len(heard) == 3


@pytest.mark.skipif(OLD, reason="goes by another name")
def test_a_vector_field_is_guarded(heard):
    from sbi.inference import VectorFieldPosterior
    from sbi.neural_nets import posterior_flow_nn

    net = posterior_flow_nn("mlp", hidden_features=8, num_layers=1)(THETA, X)
    posterior = VectorFieldPosterior(net, PRIOR, sample_with="ode")
    guarded = protect(posterior, THETA, X, policy="shrink")
    plain = seeded(lambda: posterior.sample((4,), x=NEAR, **QUIET))
    assert torch.equal(plain, seeded(lambda: guarded.sample((4,), x=NEAR, **QUIET)))
    with heard:
        assert guarded.sample((4,), x=FAR, **QUIET).shape == (4, 2)
    assert len(heard) == 1


def test_levels_of_an_ensemble_share_alpha():
    guarded = protect(ensemble(), THETA, X, alpha=0.05)
    report = guarded.ood_score(pairs()[1])
    assert list(report.levels) == ["embedding 1", "embedding 2"]
    assert report.flagged.float().mean() <= 2 * 0.05
    assert report.alpha == 0.05


def test_another_policy_forgets_what_was_worked_out_under_the_old_one():
    guarded = protect(direct(), THETA, X, policy="report")
    guarded.set_default_x(FAR)
    options = {"num_iter": 2, "num_init_samples": 5, "num_to_optimize": 2}
    guarded.map(init_method=THETA[:5], **options)
    guarded.ood_policy = "shrink"
    assert guarded._map is None
    assert guarded._leakage_density_correction_factor is None


def test_a_monitor_hears_of_observations():
    guarded = protect(direct(), THETA, X)
    with flowguard.monitor(guarded.posterior_estimator) as watched:
        guarded.sample((4,), x=NEAR, **QUIET)
    assert watched.report.flagged.tolist() == [False]


def test_an_embedding_net_that_was_trained_on_is_refused():
    guarded = protect(direct(embedding_net=nn.Linear(3, 3)), THETA, X)
    with torch.no_grad():
        for p in guarded.posterior_estimator.embedding_net.parameters():
            p.add_(1)
    with pytest.raises(RuntimeError, match="embedding net's weights must be those of the fit"):
        guarded.sample((4,), x=NEAR, **QUIET)


def test_the_warning_names_the_line_of_the_caller():
    guarded = protect(direct(), THETA, X)
    with pytest.warns(OODContextWarning) as heard:
        guarded.set_default_x(FAR)
    assert heard[0].filename == __file__


@pytest.mark.parametrize("model", ["maf", "nsf", "zuko_maf", "zuko_nsf"])
def test_robust_migrates_the_flow_and_certifies_it(model, heard):
    posterior = direct(model)
    guarded = protect(posterior, THETA, X, policy="shrink", robust=True)
    (report,) = guarded.migrations
    assert report.certificate_after.certified
    theta, x = pairs(200)
    with torch.no_grad():
        before, after = (
            p.posterior_estimator.log_prob(theta[None], x) for p in (posterior, guarded)
        )
    assert (before - after)[0].mean() < 1e-3
    with heard:
        assert guarded.sample((500,), x=FAR, **QUIET).shape == (500, 2)
    assert len(heard) == 1
    other = pickle.loads(pickle.dumps(guarded))
    assert other.migrations[0].certificate_after.certified


REFUSED = {
    "no posterior": (
        lambda p: protect(nn.Linear(1, 1), THETA, X),
        TypeError,
        "of sbi.*got Linear",
    ),
    "policy": (lambda p: protect(p, THETA, X, "drop"), ValueError, "policy must be one of warn"),
    "alpha": (lambda p: protect(p, THETA, X, alpha=0), ValueError, "alpha must lie between"),
    "held out": (lambda p: protect(p, THETA, X, held_out=1), ValueError, "held_out must lie"),
    "time": (lambda p: protect(p, THETA, X, time_limit=-1), ValueError, "time_limit must be"),
    "few": (
        lambda p: protect(p, THETA[:99], X[:99]),
        ValueError,
        "alpha=0.01 needs 99 simulations.*got 99.*larger alpha",
    ),
    "rows": (
        lambda p: protect(p, THETA[:9], X),
        ValueError,
        r"got \(9, 2\) for x of shape \(1000",
    ),
    "one row": (lambda p: protect(p, THETA, X[0]), ValueError, r"shape \(N, ...\); got \(3,\)"),
    "no theta": (lambda p: protect(p, None, X, robust=True), ValueError, "needs the parameters"),
    "options": (lambda p: protect(p, THETA, X, steps=9), TypeError, "steps.* need robust=True"),
    "another x": (
        lambda p: protect(p, THETA, X[:, :2]),
        ValueError,
        r"x must have shape \(N, 3\), as the estimator was made for; got \(1000, 2\)",
    ),
    "another theta": (
        lambda p: protect(p, THETA[:, :1], X, robust=True),
        ValueError,
        r"theta must have shape \(N, 2\), as the estimator was made for; got \(1000, 1\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    call, error, match = REFUSED[case]
    with pytest.raises(error, match=f"(?s){match}"):
        call(direct())


def test_a_hundred_and_fifty_simulations_are_enough():
    guarded = protect(direct(), THETA[:150], X[:150])
    assert guarded.ood_score(FAR).flagged.all()


def test_a_report_is_kept_out_of_a_file():
    guarded = protect(direct(), THETA, X, policy="report")
    buffer = io.BytesIO()
    torch.save(guarded, buffer)
    size = len(buffer.getvalue())
    guarded.sample_batched((1,), x=X.repeat(4, 1)[:2000], **QUIET)
    buffer = io.BytesIO()
    torch.save(guarded, buffer)
    assert abs(len(buffer.getvalue()) - size) < 1000


def watches(posterior):
    net = posterior.potential_fn.posterior_estimator
    return [part for part in net.modules() if type(part) is watch.Watch]


def test_the_policy_of_a_shallow_copy_is_its_own():
    guarded = protect(direct(), THETA, X, policy="shrink")
    with pytest.warns(OODContextWarning):
        moved = guarded.potential(THETA[:4], x=FAR)
    copy.copy(guarded).ood_policy = "report"
    with pytest.warns(OODContextWarning, match="It was moved"):
        assert torch.equal(guarded.potential(THETA[:4], x=FAR), moved)


def test_an_observation_of_one_number_comes_as_a_number():
    x = X[:, :1]
    posterior = direct(x=x)
    guarded = protect(posterior, THETA, x)
    plain = seeded(lambda: posterior.sample((4,), x=torch.tensor([[0.3]]), **QUIET))
    for given in (0.3, torch.tensor(0.3), np.float64(0.3)):
        assert torch.equal(seeded(lambda: guarded.sample((4,), x=given, **QUIET)), plain)  # noqa: B023
    assert guarded.ood_score(1e3).flagged.tolist() == [True]


@pytest.mark.parametrize("kind", ["maf", "likelihood"])
def test_no_observation_at_all_is_refused(kind):
    guarded = protect(POSTERIORS[kind](), THETA, X)
    for ask in (guarded.set_default_x, guarded.ood_score):
        with pytest.raises(ValueError, match=r"must be at least one observation; got .*\(0, 3\)"):
            ask(X[:0])


def test_rows_that_are_not_finite_are_left_out_of_the_migration_too():
    theta, x = THETA.clone(), X.clone()
    theta[:3, 0] = torch.nan
    x[2:7, 0] = torch.inf
    with pytest.warns(UserWarning, match="5 of 1000 simulations are not finite"):
        guarded = protect(direct(), theta, x, robust=True)
    assert guarded.migrations[0].certificate_after.certified


def test_each_thread_reads_the_report_on_its_own_observation():
    guarded = protect(direct(), THETA, X, policy="report")
    found = []

    def ask():
        guarded.potential(THETA[:4], x=FAR)
        found.append(guarded.ood_report.flagged.tolist())

    guarded.potential(THETA[:4], x=NEAR)
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [[True]]
    assert guarded.ood_report.flagged.tolist() == [False]


def inner(policy, model="maf"):
    r"""A posterior with a guard of the user's own in its embedding net."""
    guard = OODConditioner(nn.Linear(3, 4), policy="report", alpha=0.01)
    posterior = direct(model, embedding_net=guard)
    posterior.posterior_estimator.eval()
    calibrate(posterior, X)
    guard.policy = policy
    return posterior


@pytest.mark.parametrize("policy", ["warn", "raise", "shrink"])
@pytest.mark.parametrize("robust", [False, True])
def test_a_guard_in_the_embedding_net_says_nothing_while_the_posterior_is_protected(
    policy, robust
):
    posterior = inner(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded = protect(posterior, THETA, X, robust=robust)
        assert guarded.ood_score(FAR).flagged.all()


def test_a_guard_in_the_embedding_net_acts_once_a_call(heard):
    for outer in ("warn", "shrink", "report"):
        guarded = protect(inner("warn"), THETA, X, policy=outer)
        with heard:
            guarded.log_prob(THETA[:4], x=FAR, norm_posterior=outer == "shrink")
        assert len(heard) == 1 + (outer != "report")
        assert heard[0].startswith("1 of 1 contexts is out of distribution")
    refusing = protect(inner("raise"), THETA, X, policy="report")
    with pytest.raises(OODContextError):
        refusing.potential(THETA[:4], x=FAR)
    assert refusing.potential(THETA[:4], x=NEAR).isfinite().all()


def test_guards_within_are_calibrated_before_the_posterior_is_protected():
    for posterior in (direct(), inner("warn")):
        with pytest.raises(
            ValueError, match=r"before the posterior is protected.*calibrate\(posterior, x\)"
        ):
            calibrate(protect(posterior, THETA, X), X)


def test_the_members_of_an_ensemble_that_are_guarded_are_guarded_anew(heard):
    members = [protect(direct(), THETA, X, policy="raise") for _ in range(2)]
    guarded = protect(EnsemblePosterior(members), THETA, X, policy="shrink")
    assert [type(m) for m in guarded.posteriors] == [DirectPosterior] * 2
    assert [len(watches(m)) for m in guarded.posteriors] == [1, 1]
    with heard:
        assert guarded.sample((8,), x=FAR, **QUIET).shape == (8, 2)
    assert len(heard) == 1
    with pytest.raises(OODContextError):
        members[0].potential(THETA[:4], x=FAR)


def test_a_proposal_that_shares_the_estimator_is_guarded_with_it():
    proposal = protect(direct(), THETA, X, policy="shrink").set_default_x(NEAR)
    posterior = RejectionPosterior(proposal.potential_fn, proposal=proposal)
    guarded = protect(posterior, THETA, X, policy="shrink")
    assert len(watches(guarded)) == 1
    assert type(guarded.proposal) is DirectPosterior
    other = protect(direct(), THETA, X, policy="shrink").set_default_x(NEAR)
    guarded = protect(RejectionPosterior(direct().potential_fn, proposal=other), THETA, X)
    assert type(guarded.proposal) is type(other)


class Normed(nn.Sequential):
    r"""An embedding net whose evaluation is not its training."""

    def __init__(self):
        super().__init__(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.eval()  # sbi tries it with one row


@pytest.mark.parametrize("model", ["maf", "zuko_maf"])
def test_an_estimator_in_training_mode_is_guarded_in_evaluation_mode(model):
    posterior = direct(model, embedding_net=Normed())
    posterior.posterior_estimator.train()
    guarded = protect(posterior, THETA, X, policy="shrink")
    options = {"reject_outside_prior": False, **QUIET} if not OLD else QUIET
    for _ in range(2):
        assert guarded.sample_batched((2,), x=X[:5], **options).shape == (2, 5, 2)
    assert posterior.posterior_estimator.training


@pytest.mark.parametrize("kind", ["maf", "likelihood"])
def test_another_device_is_no_question(kind):
    guarded = protect(POSTERIORS[kind](), THETA, X, policy="report")
    guarded.set_default_x(FAR)
    guarded.ood_policy = "raise"
    guarded.to("cpu")
    assert torch.equal(guarded.default_x, FAR)
    with pytest.raises(OODContextError):
        guarded.potential(THETA[:4])


ADVISED = {
    "maf": "most draws may fall outside of the prior.*reject_outside_prior=False",
    "ensemble": "most draws may fall outside of the prior.*reject_outside_prior=False",
    "rejection": "most draws may be rejected",
    "mcmc": "extrapolates",
    "importance": "extrapolates",
    "likelihood": "extrapolates",
}


@pytest.mark.skipif(OLD, reason="has no such option")
@pytest.mark.parametrize("kind", ADVISED)
def test_what_is_advised_is_what_the_posterior_can_do(kind, heard):
    made = {**POSTERIORS, "rejection": lambda: of_posterior(RejectionPosterior, proposal=PRIOR)}
    guarded = protect(made[kind](), THETA, X)
    with heard:
        guarded.potential(THETA[:4], x=FAR)
    (message,) = heard
    parts = ADVISED[kind].split(".*")
    assert all(part in message for part in parts)
    assert ("reject_outside_prior" in message) == (len(parts) == 2)
    assert ("fall outside" in message) == ("fall outside" in parts[0])
    assert "policy='shrink'" in message


@pytest.mark.parametrize("ask", ["log_prob", "leakage_correction"])
def test_a_density_that_is_given_up_is_to_be_had_without_its_norm(ask, late):
    guarded = protect(direct(), THETA, X, time_limit=0)
    with (
        pytest.warns(OODContextWarning),
        pytest.raises(RuntimeError, match=r"norm_posterior=False") as error,
    ):
        METHODS[ask](guarded)
    assert "reject_outside_prior" not in str(error.value)


def test_the_warning_names_the_line_that_sets_a_default():
    guarded = protect(direct(), THETA, X)
    with pytest.warns(OODContextWarning) as caught:
        guarded.default_x = FAR
    assert caught[0].filename == __file__


def test_simulations_that_are_all_the_same_have_no_distance_to_tell():
    guarded = protect(direct(), THETA, torch.ones(1000, 3), policy="shrink")
    assert not guarded.ood_score(torch.ones(3)).flagged.any()
    with pytest.warns(OODContextWarning, match=r"p = 0.002 \(alpha = 0.01\)\. It was") as caught:
        guarded.potential(THETA[:4], x=FAR)
    assert "times as far" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": "0.1"}, "alpha must be a number.*got '0.1'"),
        ({"time_limit": "9"}, "time_limit must be seconds.*got '9'"),
    ],
)
def test_numbers_are_numbers(options, match):
    with pytest.raises(TypeError, match=match):
        protect(direct(), THETA, X, **options)


def test_simulations_are_needed():
    with pytest.raises(TypeError, match=r"x must be the simulations.*got None"):
        protect(direct(), THETA, None)


def test_swapped_simulations_are_told_of():
    with pytest.raises(ValueError, match=r"theta and x seem to be swapped"):
        protect(direct(), X, THETA)


def test_a_maximum_that_is_given_up_is_not_told_of_options_that_map_lacks(late):
    guarded = protect(direct(), THETA, X, policy="report", time_limit=0)
    guarded.set_default_x(FAR)
    with pytest.raises(RuntimeError, match="given up after 0 seconds") as error:
        METHODS["map"](guarded)
    assert "=False" not in str(error.value)


def test_weights_are_loaded_with_the_guard_that_they_were_saved_with():
    posterior = direct(embedding_net=nn.Linear(3, 3))
    first, second = (protect(posterior, THETA, X + m, policy="shrink", seed=m) for m in (0, 5))
    state = io.BytesIO()
    torch.save(first.posterior_estimator.state_dict(), state)
    state.seek(0)
    second.posterior_estimator.load_state_dict(torch.load(state, weights_only=True))
    expected, told = first.ood_score(X), second.ood_score(X)
    assert torch.equal(told.p_value, expected.p_value)
    with pytest.warns(OODContextWarning):
        asked = [p.potential(THETA[:4], x=FAR) for p in (first, second)]
    assert torch.equal(*asked)
    (loaded,), (saved,) = watches(second), watches(first)
    assert loaded.threshold == saved.threshold


def test_too_large_a_share_held_out_is_told_of():
    with pytest.raises(ValueError, match=r"held_out=0\.99 leaves 10 of 1000 .* fit.*needs 49"):
        protect(direct(), THETA, X, held_out=0.99)
