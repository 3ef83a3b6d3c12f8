"""The conditioner: drop-in, policies, refusals, state."""

import copy
import io
import json
import pickle
import threading
import warnings
from collections import OrderedDict, namedtuple

import nflows.distributions
import nflows.flows
import nflows.transforms
import numpy as np
import pytest
import torch
import zuko
from safetensors.torch import load_model, save_model
from torch import nn

from flowguard.ood import (
    NotFittedError,
    OODConditioner,
    OODContextError,
    OODContextWarning,
    monitor,
    unguarded,
)

Pair = namedtuple("Pair", ["fine", "coarse"])


class Pyramid(nn.Module):
    """Two levels, in whatever container is asked for."""

    def __init__(self, container=list, channels=4):
        super().__init__()
        self.fine = nn.Conv2d(3, channels, 3, padding=1)
        self.coarse = nn.Conv2d(channels, 6, 3, stride=2, padding=1)
        self.container = container

    def forward(self, y):
        fine = torch.tanh(self.fine(y))
        return self.container([fine, self.coarse(fine)])


def as_dict(levels):
    return OrderedDict(fine=levels[0], coarse=levels[1])


def images(n=8, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, size, size, generator=generator)


def guarded(encoder=None, policy="report", data=images, **kwargs):
    kwargs.setdefault("alpha", 0.02)
    conditioner = OODConditioner(encoder, policy, **kwargs)
    conditioner.fit([data(seed=i) for i in range(8)], progress=False)
    conditioner.calibrate([data(seed=i) for i in range(20, 40)], progress=False)
    return conditioner


def vectors(n=100, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 5


@pytest.fixture
def strange():
    """Four contexts: ordinary, far away, with a NaN, ordinary."""
    y = images(4, seed=99)
    y[1] *= 30
    y[2, 0, 3, 3] = torch.nan
    return y


# -- drop-in ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "kind"),
    [
        (list, list),
        (tuple, tuple),
        (lambda levels: Pair(*levels), Pair),
        (as_dict, OrderedDict),
        (lambda levels: levels[0], torch.Tensor),
    ],
)
@pytest.mark.parametrize("policy", ["report", "shrink"])
def test_output_has_the_type_of_the_encoders(container, kind, policy, strange):
    encoder = Pyramid(container)
    conditioner = guarded(encoder, policy)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", OODContextWarning)
        output, plain = conditioner(strange), encoder(strange)
    assert type(output) is type(plain) is kind
    if kind is OrderedDict:
        assert list(output) == list(conditioner.report.levels) == ["fine", "coarse"]
        output, plain = list(output.values()), list(plain.values())
    if kind is torch.Tensor:
        output, plain = [output], [plain]
    levels = conditioner.report.levels.values()
    for ours, theirs, level in zip(output, plain, levels, strict=True):
        assert ours.shape == theirs.shape
        inside = (level.map <= level.boundary)[:, None].expand_as(ours)
        assert inside[[0, 3]].float().mean() > 0.9
        assert torch.equal(ours[inside], theirs[inside])
        assert torch.equal(ours[1], theirs[1]) == (policy == "report")


def test_report_has_what_it_promises(strange):
    conditioner = guarded(Pyramid())
    conditioner(strange)
    report = conditioner.report
    assert list(report.levels) == ["level1", "level2"]
    assert report.levels["level1"].map.shape == (4, 12, 12)
    assert report.levels["level2"].map.shape == (4, 6, 6)
    assert report.flagged.tolist() == [False, True, True, False]
    assert report.non_finite.tolist() == [False, False, True, False]
    for level in report.levels.values():
        assert level.score.isinf().tolist() == [False, False, True, False]
        assert level.score.shape == level.p_value.shape == level.flagged.shape == (4,)
        assert torch.equal(level.flagged, level.score > level.threshold)
        assert 0 <= float(level.quantile.min()) <= float(level.quantile.max()) <= 1
    smallest = torch.stack([level.p_value for level in report.levels.values()]).amin(dim=0)
    torch.testing.assert_close(report.p_value, (2 * smallest).clamp(max=1))


def test_level_names():
    named = guarded(Pyramid(), levels=["fine", "coarse"])
    named(images())
    assert list(named.report.levels) == ["fine", "coarse"]
    one = guarded(Pyramid(as_dict), "shrink", levels=["coarse"])
    y = images(seed=99) * 30
    with pytest.warns(OODContextWarning, match="coarse"):
        output = one(y)
    assert list(one.report.levels) == ["coarse"]
    assert torch.equal(output["fine"], one.encoder(y)["fine"])  # unscored levels pass


def test_a_single_vector_is_one_context():
    conditioner = guarded(data=vectors, policy="shrink")
    with pytest.warns(OODContextWarning, match="1 of 1 contexts is"):
        moved = conditioner(torch.full((3,), 1e3))
    assert moved.shape == (3,)
    assert conditioner.report.flagged.tolist() == [True]
    assert conditioner.score(vectors()[0]).flagged.tolist() == [False]


def test_empty_batches_pass():
    conditioner = guarded(Pyramid(), "shrink")
    assert conditioner(torch.empty(0, 3, 12, 12))[0].shape == (0, 4, 12, 12)
    assert conditioner.report.flagged.shape == (0,)
    assert "0 contexts" in conditioner.report.table()
    assert guarded(data=vectors)(torch.empty(0, 3)).shape == (0, 3)


def test_in_front_of_a_zuko_flow_gradients_reach_the_encoder():
    conditioner = OODConditioner(nn.Linear(3, 2))
    flow = zuko.flows.NSF(2, context=2, transforms=1)
    y = vectors(seed=3)

    def gradient():
        conditioner.zero_grad()
        flow(conditioner(y)).log_prob(torch.zeros(2)).mean().backward()
        return conditioner.encoder.weight.grad.clone()

    unfitted = gradient()
    assert unfitted.abs().sum() > 0
    conditioner.fit(vectors(), progress=False).calibrate(vectors(1000, 1), progress=False)
    conditioner.policy = "report"
    torch.testing.assert_close(gradient(), unfitted)


def test_as_the_embedding_net_of_nflows():
    flow = nflows.flows.Flow(
        nflows.transforms.MaskedAffineAutoregressiveTransform(2, 8, context_features=2),
        nflows.distributions.StandardNormal([2]),
        embedding_net=guarded(nn.Linear(3, 2), "raise", data=vectors),
    )
    assert flow.sample(5, context=vectors(4)).shape == (4, 5, 2)
    with pytest.raises(OODContextError):
        flow.sample(5, context=vectors(4) * 1e3)


# -- policies --------------------------------------------------------------------------------


def test_warn_says_it_once_and_changes_nothing(strange):
    conditioner = guarded(Pyramid(), "warn")
    with pytest.warns(OODContextWarning) as caught:
        output = conditioner(strange)
    (warning,) = caught
    text = str(warning.message)
    assert "2 of 4 contexts are out of distribution" in text
    assert "level1" in text or "level2" in text
    assert "1 not finite (NaN or inf): 2" in text
    assert "Nothing was dropped or changed" in text
    assert warning.filename == __file__  # the line to look at is the caller's
    for ours, theirs in zip(output, conditioner.encoder(strange), strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditioner(strange[:1])


def test_report_is_silent(strange):
    conditioner = guarded(Pyramid(), "report")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditioner(strange)
    assert conditioner.report.flagged.sum() == 2


def test_raise_names_the_contexts(strange):
    conditioner = guarded(Pyramid(), "raise")
    conditioner(strange[[0, 3]])
    with pytest.raises(OODContextError, match="2 of 4 contexts are") as caught:
        conditioner(strange)
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.indices == [1, 2]
    assert error.levels == [["level1", "level2"]] * 2
    assert error.scores["level2"][1] == float("inf")
    assert len(error.p_values) == 2
    assert error.p_values == conditioner.report.p_value[[1, 2]].tolist()


def test_score_never_acts_and_leaves_modes_and_report_alone(strange):
    conditioner = guarded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "raise")
    conditioner.train()
    conditioner.encoder[0].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = conditioner.score(strange)
    assert report.flagged.tolist() == [False, True, True, False]
    assert conditioner.report is None
    assert conditioner.encoder[1].training
    assert not conditioner.encoder[0].training


def test_non_finite_contexts_are_named_although_the_encoder_hides_them():
    class Hide(nn.Module):
        def forward(self, y):
            return y.nan_to_num(0.0, 0.0, 0.0)

    conditioner = guarded(Hide(), "warn", data=vectors)
    y = vectors(3)
    y[1, 0] = torch.inf
    with pytest.warns(OODContextWarning, match=r"1 not finite \(NaN or inf\): 1"):
        conditioner(y)
    assert conditioner.report.levels["level1"].score.isinf().tolist() == [False, True, False]


# -- shrink ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e2, 1e10, 1e30])
def test_shrink_lands_on_the_boundary_along_the_radius(dtype, scale):
    conditioner = guarded(data=vectors, policy="shrink")
    gaussian = conditioner.guard.items()[0][1].gaussian
    y = vectors(50, seed=7).to(dtype)
    y[::2] = (y[::2] - 5) * scale
    moved = conditioner(y)
    level = conditioner.report.levels["level1"]
    inside = level.score <= level.boundary
    assert inside[1::2].float().mean() > 0.9
    assert not inside[::2].any()
    assert torch.equal(moved[inside], y[inside])
    after = conditioner.score(moved).levels["level1"].score[~inside]
    torch.testing.assert_close(after, torch.full_like(after, level.boundary), rtol=1e-4, atol=0)
    mean = gaussian.mean.to(dtype)
    cosine = nn.functional.cosine_similarity((y - mean)[::2] / scale, (moved - mean)[::2])
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
def test_shrink_makes_everything_finite_per_pixel(strange):
    conditioner = guarded(policy="shrink")
    strange[0, :, 2, 5] = 1e38
    strange[3, 1, 0, 0] = -torch.inf
    output = conditioner(strange)
    assert output.isfinite().all()
    assert conditioner.report.non_finite.tolist() == [False, False, True, True]
    level = conditioner.report.levels["level1"]
    inside = level.map <= level.boundary
    assert inside[0].float().mean() > 0.9
    assert not inside[0, 2, 5]
    rows, wanted = output.movedim(1, -1), strange.movedim(1, -1)
    assert torch.equal(rows[inside], wanted[inside])
    mean = conditioner.guard.items()[0][1].gaussian.mean.float()
    assert torch.equal(output[2, :, 3, 3], mean)
    assert float(conditioner.score(output).levels["level1"].map.max()) <= level.boundary * 1.001


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
def test_shrink_is_differentiable():
    conditioner = guarded(data=lambda n=100, seed=0: vectors(n, seed).double(), policy="shrink")
    y = (vectors(6, seed=5).double() - 5) * torch.tensor([[1], [1], [5], [9], [20], [1e3]]) + 5
    y.requires_grad_()
    moved = conditioner(y)
    assert (moved != y).any(dim=1).tolist() == [False, False, True, True, True, True]
    assert torch.autograd.gradcheck(conditioner, (y,))
    broken = vectors(3)
    broken[1, 1], broken[2, 0] = torch.nan, torch.inf
    broken.requires_grad_()
    conditioner(broken).sum().backward()
    assert broken.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
def test_shrink_of_maps_gives_the_same_with_and_without_gradients():
    conditioner = guarded(policy="shrink")
    y = images(seed=5) * 10
    with torch.no_grad():
        expected = conditioner(y)
    z = y.clone().requires_grad_()
    torch.testing.assert_close(conditioner(z), expected)


def test_shrink_in_distribution_returns_the_very_tensor():
    conditioner = guarded(policy="shrink", boundary=1.0)
    y = images(2, seed=20)  # of the calibration set, hence within the boundary
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert conditioner(y) is y


# -- life: training, evaluation, fit ---------------------------------------------------------


def test_unfitted_it_is_an_ordinary_encoder_in_training():
    conditioner = OODConditioner(Pyramid(), "raise").train()
    y = images() * 1e6
    for ours, theirs in zip(conditioner(y), conditioner.encoder(y), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", ["warn", "raise", "shrink"])
def test_unfitted_it_refuses_in_evaluation(policy):
    conditioner = OODConditioner(Pyramid(), policy).eval()
    with pytest.raises(NotFittedError, match="not fitted; call `fit"):
        conditioner(images())
    conditioner.fit(images(), progress=False)
    with pytest.raises(NotFittedError, match="not calibrated; call `calibrate"):
        conditioner(images())


def test_unfitted_under_report_it_passes_and_the_report_refuses():
    conditioner = OODConditioner(Pyramid(), "report").eval()
    conditioner(images())
    with pytest.raises(NotFittedError, match="call `fit"):
        _ = conditioner.report


def test_training_mode_switches_the_guard_off_and_evaluation_on(strange):
    model = nn.Sequential(guarded(Pyramid(), "raise"))
    with pytest.raises(OODContextError):
        model(strange)
    model.train()
    model(strange)
    model.eval()
    with pytest.raises(OODContextError):
        model(strange)


def test_calibrate_switches_the_guard_on(strange):
    conditioner = OODConditioner(Pyramid(), "raise", alpha=0.02).train()
    conditioner.fit(images(64), progress=False).calibrate(images(160, seed=1), progress=False)
    with pytest.raises(OODContextError):
        conditioner(strange)


def test_fit_uses_evaluation_mode_and_gives_modes_back():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    encoder[2].eval()
    conditioner = OODConditioner(encoder)
    before = copy.deepcopy(encoder.state_dict())
    conditioner.fit(vectors(), progress=False)
    assert [m.training for m in encoder] == [True, True, False]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])
    exact = OODConditioner(copy.deepcopy(encoder).eval()).fit(vectors(), progress=False)
    a, b = (c.guard.items()[0][1].gaussian for c in (conditioner, exact))
    assert torch.equal(a.cholesky, b.cholesky)


def moody():
    """An encoder that computes something else in training mode, and remembers what it saw there."""
    encoder = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
    for seed in range(50):
        encoder(vectors(seed=seed))
    return encoder


def _never_in_evaluation_mode(conditioner):
    assert conditioner.training


def _encoder_in_training_mode(conditioner):
    conditioner.eval()
    conditioner.encoder.train()


def _dropout_in_training_mode(conditioner):
    conditioner.eval()
    conditioner.encoder[2].train()


@pytest.mark.parametrize(
    "mode", [_never_in_evaluation_mode, _encoder_in_training_mode, _dropout_in_training_mode]
)
def test_an_encoder_in_training_mode_is_scored_as_it_was_calibrated(mode):
    conditioner = guarded(moody(), data=vectors)
    mode(conditioner)
    modes = [m.training for m in conditioner.modules()]
    before = copy.deepcopy(conditioner.encoder.state_dict())
    calls = []
    conditioner.encoder[1].register_forward_hook(lambda m, x, y: calls.append(m.training))
    y = vectors(1000, seed=77).requires_grad_()
    output = conditioner(y)
    assert calls == [False]
    assert [m.training for m in conditioner.modules()] == modes
    assert float(conditioner.report.flagged.double().mean()) < 0.05
    for key, value in conditioner.encoder.state_dict().items():
        assert torch.equal(value, before[key])
    output.sum().backward()
    assert y.grad.abs().sum() > 0
    report = conditioner.report
    assert torch.equal(conditioner.eval().score(y).p_value, report.p_value)
    assert torch.equal(conditioner(y), output)


def test_an_encoder_that_another_thread_scores_too_is_in_evaluation_mode_until_both_are_done():
    conditioner = guarded(moody(), data=vectors)
    _encoder_in_training_mode(conditioner)
    first_runs, second_runs, first_is_done = (threading.Event() for _ in range(3))
    modes = []

    def see(module, inputs, output):
        if not first_runs.is_set():
            first_runs.set()
            second_runs.wait(20)
        else:
            second_runs.set()
            first_is_done.wait(20)
            modes.extend(m.training for m in conditioner.encoder)

    def call_first():
        conditioner(vectors(2))
        first_is_done.set()

    conditioner.encoder[0].register_forward_hook(see)
    first = threading.Thread(target=call_first)
    first.start()
    first_runs.wait(20)
    conditioner(vectors(2))
    first.join()
    assert modes == [False] * 3
    assert [m.training for m in conditioner.encoder] == [True] * 3


def test_compiled_an_encoder_in_training_mode_is_scored_as_it_was_calibrated():
    conditioner = guarded(moody(), data=vectors)
    model = torch.compile(nn.Sequential(conditioner, nn.Linear(16, 2)), backend="eager")
    y = vectors(1000, seed=77)
    model(y)
    assert float(conditioner.report.flagged.double().mean()) < 0.05
    assert torch.equal(conditioner.score(y).p_value, conditioner.report.p_value)


def test_a_failed_fit_leaves_the_old_one():
    conditioner = guarded(data=vectors)
    expected = conditioner.score(vectors()).p_value
    bad = vectors()
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"level 'level1': .*finite"):
        conditioner.fit([vectors(), bad], progress=False)
    with pytest.raises(ValueError, match=r"level 'level1': .*finite"):
        conditioner.calibrate([vectors(), bad], progress=False)
    assert torch.equal(conditioner.score(vectors()).p_value, expected)


def test_batches_of_many_kinds_give_the_same_fit():
    y = vectors(128)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(y), batch_size=32)
    pairs = [(None, part) for part in y.split(50)]
    dicts = [{"theta": 0, "y": part} for part in y.split(50)]
    fits = [
        OODConditioner().fit(y, progress=False),
        OODConditioner().fit(loader, progress=False),
        OODConditioner().fit((part for part in y.split(7)), progress=False),
        OODConditioner().fit(pairs, progress=False, context=1),
        OODConditioner().fit(dicts, progress=False, context="y"),
        OODConditioner().fit(pairs, progress=False, context=lambda batch: batch[1]),
    ]
    for conditioner in fits[1:]:
        a, b = (c.guard.items()[0][1].gaussian for c in (conditioner, fits[0]))
        torch.testing.assert_close(a.cholesky, b.cholesky, rtol=1e-10, atol=1e-12)


def test_progress_can_be_seen_and_silenced(capfd):
    conditioner = OODConditioner().fit([vectors()])
    assert "fit" in capfd.readouterr().err
    conditioner.calibrate([vectors(2000)], progress=False)
    assert capfd.readouterr().err == ""


# -- refusals --------------------------------------------------------------------------------


def _trained(conditioner):
    with torch.no_grad():
        conditioner.encoder.fine.weight += 1e-3
    return conditioner


def _other_levels(conditioner):
    conditioner.encoder.container = lambda levels: [*levels, levels[0]]
    return conditioner


def _vectors_now(conditioner):
    conditioner.encoder.container = lambda levels: [v.mean(dim=(2, 3)) for v in levels]
    return conditioner


def _different_batches(conditioner):
    conditioner.encoder.container = lambda levels: [levels[0], levels[1][:1]]
    return conditioner


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda c: OODConditioner(lambda y: y),
            TypeError,
            "torch.nn.Module or None; got function",
        ),
        (
            lambda c: OODConditioner(policy="drop"),
            ValueError,
            "policy must be one of.*; got 'drop'",
        ),
        (lambda c: setattr(c, "policy", "off"), ValueError, "policy must be one of.*; got 'off'"),
        (lambda c: OODConditioner(alpha=0.0), ValueError, "alpha must lie between 0 and 1; got 0"),
        (
            lambda c: OODConditioner(boundary=0),
            ValueError,
            r"boundary must lie in \(0, 1\]; got 0",
        ),
        (lambda c: OODConditioner(levels="fine"), ValueError, "levels must be a list"),
        (lambda c: OODConditioner(levels=["a", "a"]), ValueError, "different names"),
        (lambda c: OODConditioner(shrinkage="lw"), ValueError, "shrinkage must be .*'lw'"),
        (lambda c: OODConditioner(normalize="l1"), ValueError, "normalize must be"),
        (lambda c: OODConditioner(statistic="median"), ValueError, "statistic must be one of"),
        (
            lambda c: OODConditioner(policy="shrink", normalize="l2"),
            ValueError,
            "'shrink' needs normalize=None",
        ),
        (lambda c: OODConditioner().score(images()), NotFittedError, "call `fit"),
        (lambda c: OODConditioner().calibrate(images()), NotFittedError, "call `fit"),
        (
            lambda c: OODConditioner().fit(images(), progress=False).score(images()),
            NotFittedError,
            "call `calibrate",
        ),
        (lambda c: _trained(c).score(images()), RuntimeError, "weights must be those of the fit"),
        (lambda c: _trained(c)(images()), RuntimeError, "weights must be those of the fit"),
        (lambda c: _trained(c).calibrate(images()), RuntimeError, "call `fit"),
        (lambda c: c.double().half()(images().half()), RuntimeError, "cast to another precision"),
        (lambda c: _other_levels(c)(images()), ValueError, "those of the fit, .*; got .*'level3'"),
        (lambda c: _vectors_now(c)(images()), ValueError, r"must be maps .*; got shape \(8, 4\)"),
        (
            lambda c: OODConditioner().fit([{}], context=lambda b: b),
            ValueError,
            "give a level at least; got an empty",
        ),
        (lambda c: _different_batches(c)(images()), ValueError, "same batch size.*'level2': 1"),
        (
            lambda c: c.fit(iter(())),
            ValueError,
            "`fit` needs a batch .*; got none: an iterator is spent",
        ),
        (lambda c: c.fit(3), TypeError, "`fit` needs an iterable of batches.*; got int"),
        (lambda c: c.fit([(images(), 0)]), ValueError, "`context=` must say .*; got a tuple of 2"),
        (
            lambda c: c.fit([{"y": images()}]),
            ValueError,
            r"`context=` must .* by a key \(\['y'\]\)",
        ),
        (lambda c: c.calibrate([images(0)]), ValueError, "hold a context at least; got none"),
        (lambda c: c.fit([images(0)]), NotFittedError, "at least 2 vectors"),
        (
            lambda c: OODConditioner(levels=["a"]).fit(
                [(images(), images())], context=lambda b: b
            ),
            ValueError,
            "the 2 levels that the encoder gives; got 1 names",
        ),
        (
            lambda c: OODConditioner(levels=["b"]).fit([{"a": 1}], context=lambda b: b),
            ValueError,
            r"have a level 'b'; got \['a'\]",
        ),
        (
            lambda c: OODConditioner().fit([torch.ones(3, 2).int()], progress=False),
            TypeError,
            "'level1' must be a floating point tensor; got a tensor of torch.int32",
        ),
        (
            lambda c: OODConditioner().fit([torch.ones(3, 2, 4)], progress=False),
            ValueError,
            r"\(N, C\) or \(N, C, H, W\).*\(3, 2, 4\)",
        ),
        (
            lambda c: OODConditioner().fit([[torch.tensor(1.0)]], context=lambda b: b),
            ValueError,
            r"'level1' must have shape \(N, C\).*got a scalar",
        ),
        (lambda c: guarded()(torch.ones(1, 5, 9, 9)), ValueError, "3 channels of the fit; got 5"),
        (
            lambda c: c.fit(images(), progress=False, distributed=True),
            RuntimeError,
            "init_process_group",
        ),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call(guarded(Pyramid()))


def test_too_few_calibration_images_are_told_and_flagged_beyond_the_largest():
    conditioner = OODConditioner(alpha=0.001).fit(vectors(1000), progress=False)
    with pytest.warns(UserWarning, match=r"on 30 images, too few.*Calibrate on 999 images"):
        conditioner.calibrate(vectors(30, seed=1), progress=False)
    report = conditioner.score(torch.cat([vectors(30, seed=1), vectors(1) * 100]))
    assert report.flagged.tolist() == [False] * 30 + [True]
    assert report.attained_alpha == pytest.approx(1 / 31)
    assert float(report.p_value[-1]) == pytest.approx(1 / 31)


# -- state -----------------------------------------------------------------------------------


def _by_state_dict(source, target, path):
    target.load_state_dict(source.state_dict())


def _by_torch_load(source, target, path):
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))


def _by_assignment(source, target, path):
    target.load_state_dict(source.state_dict(), assign=True)


def _by_safetensors(source, target, path):
    save_model(source, str(path / "model.safetensors"))
    load_model(target, str(path / "model.safetensors"))


@pytest.mark.parametrize("move", [_by_state_dict, _by_torch_load, _by_assignment, _by_safetensors])
def test_the_state_moves_to_a_fresh_conditioner(move, tmp_path, strange):
    source, target = guarded(Pyramid()), OODConditioner(Pyramid(), "raise", alpha=0.02)
    move(nn.ModuleDict({"encoder": source}), nn.ModuleDict({"encoder": target}), tmp_path)
    a, b = source.score(strange), target.score(strange)
    assert list(a.levels) == list(b.levels)
    for name in a.levels:
        assert torch.equal(a.levels[name].map.nan_to_num(), b.levels[name].map.nan_to_num())
        assert torch.equal(a.levels[name].quantile, b.levels[name].quantile)
        assert a.levels[name].threshold == b.levels[name].threshold
    assert torch.equal(a.p_value, b.p_value)
    with pytest.raises(OODContextError):  # it guards from then on
        target(strange)


def test_an_unfitted_state_loads_too():
    fitted, unfitted = guarded(Pyramid()), OODConditioner(Pyramid())
    fitted.load_state_dict(unfitted.state_dict())
    assert not fitted.fitted
    assert not unfitted.fitted


def test_weights_that_are_replaced_are_seen():
    conditioner = guarded(Pyramid())
    conditioner.score(images())
    weight = conditioner.encoder.fine.weight
    for change in (1e-3, 1e-2):
        conditioner.encoder.fine.weight = nn.Parameter(weight.detach() + change)
        with pytest.raises(RuntimeError, match="must be those of the fit"):
            conditioner.score(images())
    conditioner.encoder.fine.weight = nn.Parameter(weight.detach().clone())
    conditioner.score(images())


def test_the_state_of_another_encoder_is_refused():
    target = OODConditioner(Pyramid())
    state = guarded(Pyramid()).state_dict()
    target.load_state_dict({k: v for k, v in state.items() if k.startswith("guard")}, strict=False)
    with pytest.raises(RuntimeError, match="another encoder"):
        target.score(images())


def test_a_state_fitted_in_another_way_is_refused():
    state = guarded(data=vectors).state_dict()
    with pytest.raises(RuntimeError, match=r"normalize=None, .*; got normalize='l2'"):
        OODConditioner(normalize="l2").load_state_dict(state)
    newer = bytes(state["guard._extra_state"].tolist()).replace(b'"format": 2', b'"format": 9')
    state["guard._extra_state"] = torch.tensor(list(newer), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="got format 9, written by flowguard"):
        OODConditioner().load_state_dict(state)


def of_format_1(state):
    """As it was saved when there were no frames, and no edges of the fit."""
    told = json.loads(bytes(state.pop("guard._extra_state").tolist()))
    del told["edges_of_fit"]
    told["format"] = 1
    state["guard._extra_state"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    return {key: value for key, value in state.items() if not key.endswith("frame.ratios")}


def test_a_state_without_frames_loads_and_scores_as_it_was_calibrated():
    source, target = guarded(Pyramid()), OODConditioner(Pyramid())
    target.load_state_dict(of_format_1(source.state_dict()))
    gaussian = target.guard.items()[0][1].gaussian
    level = target.score(images(seed=50)).levels["level1"]
    assert torch.equal(level.map, gaussian.mahalanobis(target.encoder(images(seed=50))[0]))
    again = OODConditioner(Pyramid())
    again.load_state_dict(target.state_dict())
    assert not again.guard.edges_of_fit
    target.calibrate([images(seed=i) for i in range(20, 40)], progress=False)


def test_a_state_whose_share_is_not_of_the_fit_says_so_and_asks_for_a_fit():
    source = guarded(Pyramid(), statistic="share")
    target = OODConditioner(Pyramid(), statistic="share")
    with pytest.warns(UserWarning, match="format 1: .*more than a share alpha.*Call `fit"):
        target.load_state_dict(of_format_1(source.state_dict()))
    assert target.score(images()).p_value.shape == (8,)
    with pytest.raises(RuntimeError, match=r"needs the score that a fit sets.*format 1"):
        target.calibrate(images(), progress=False)
    target.fit(images(), progress=False)
    target.alpha = 0.5
    target.calibrate(images(seed=1), progress=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_guard_too(again, strange):
    conditioner = guarded(Pyramid(), "report")
    conditioner(strange)
    other = again(conditioner)
    assert other.report is None
    other(strange)
    assert torch.equal(other.report.p_value, conditioner.report.p_value)


def test_a_model_in_float64_is_the_same_encoder(strange):
    conditioner = guarded(Pyramid())
    expected = conditioner.score(strange)
    report = conditioner.double().score(strange.double())
    assert report.levels["level1"].score.dtype == torch.float64
    torch.testing.assert_close(report.p_value.float(), expected.p_value, rtol=0.05, atol=0.01)


# -- compile ---------------------------------------------------------------------------------


def test_compiled_models_guard():
    conditioner = guarded(nn.Linear(3, 3), "shrink", data=vectors)
    model = torch.compile(nn.Sequential(conditioner, nn.Linear(3, 2)), backend="eager")
    y = vectors(4)
    torch.testing.assert_close(model(y), model._orig_mod(y))
    with pytest.warns(OODContextWarning, match="4 of 4"):
        model(y * 1e3)
    assert conditioner.report.flagged.all()


def test_training_compiles_to_one_graph():
    conditioner = OODConditioner(nn.Linear(3, 3)).train()
    model = torch.compile(
        nn.Sequential(conditioner, nn.Linear(3, 2)), backend="eager", fullgraph=True
    )
    y = vectors(4)
    torch.testing.assert_close(model(y), model._orig_mod(y))


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
def test_what_was_fitted_in_inference_mode_serves_autograd():
    conditioner = OODConditioner(nn.Linear(3, 3), "shrink", alpha=0.05)
    with torch.inference_mode():
        conditioner.fit(vectors(), progress=False).calibrate(vectors(seed=1), progress=False)
        conditioner(vectors() * 100)
    y = (vectors(5) * 100).requires_grad_()
    conditioner(y).sum().backward()
    assert y.grad.isfinite().all()
    conditioner.load_state_dict(copy.deepcopy(conditioner.state_dict()))
    assert conditioner.score(vectors() * 100).flagged.all()


@pytest.mark.parametrize("policy", ["warn", "report", "raise"])
def test_unguarded_nothing_is_scored(policy, recwarn):
    conditioner = OODConditioner(policy=policy, alpha=0.1)
    y = torch.randn(512, 3)
    conditioner.fit(y[:256], progress=False).calibrate(y[256:], progress=False)
    far = 1e3 * y[:4]
    with monitor(conditioner) as heard, unguarded(conditioner):
        assert conditioner(far) is far
    assert conditioner.report is None
    assert not heard.reports
    assert not recwarn.list
    if policy == "raise":
        with pytest.raises(OODContextError):
            conditioner(far)


def test_unguarded_embeddings_shrink_in_silence(recwarn):
    conditioner = OODConditioner(policy="shrink", alpha=0.1)
    y = torch.randn(512, 3)
    conditioner.fit(y[:256], progress=False).calibrate(y[256:], progress=False)
    far = 1e3 * y[:4]
    with unguarded(conditioner):
        near = conditioner(far)
    assert near.abs().max() < 10
    assert conditioner.report is None
    assert not recwarn.list


def test_unguarded_is_of_one_thread():
    conditioner = OODConditioner(policy="raise").eval()
    raised = []

    def call():
        try:
            conditioner(torch.zeros(1, 2))
        except NotFittedError:
            raised.append(True)

    with unguarded(conditioner):
        assert conditioner(torch.zeros(1, 2)).shape == (1, 2)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert raised == [True]


# -- ordinary mistakes -----------------------------------------------------------------------

MISTAKES = {
    "an array": (lambda c: c.fit(np.zeros((9, 3)), False), TypeError, r"got an array .*as_tensor"),
    "arrays as batches": (
        lambda c: c.fit([np.zeros((9, 3))], False),
        TypeError,
        "is a ndarray: torch",
    ),
    "numbers as batches": (
        lambda c: c.fit([1.0, 2.0], False),
        TypeError,
        "got one that is a float",
    ),
    "a single number": (
        lambda c: c.fit(torch.tensor(1.0), False),
        ValueError,
        "one in each row; got",
    ),
    "one vector": (
        lambda c: c.fit(torch.zeros(3), False),
        NotFittedError,
        "at least 2 vectors; got 1: give more contexts, one in each row",
    ),
    "a key that is not there": (
        lambda c: c.fit([{"y": torch.zeros(9, 3)}], False, context="x"),
        ValueError,
        r"got 'x', for a batch that is a dict with the keys \['y'\]",
    ),
    "an index beyond": (
        lambda c: c.fit([(torch.zeros(9, 3),)], False, context=1),
        ValueError,
        "got 1, for a batch that is a tuple",
    ),
}


@pytest.mark.parametrize("encoder", [None, lambda: nn.Linear(3, 2)], ids=["bare", "encoder"])
@pytest.mark.parametrize("name", MISTAKES)
def test_an_ordinary_mistake_is_answered_by_the_rule(name, encoder):
    call, kind, answer = MISTAKES[name]
    conditioner = OODConditioner(encoder and encoder())
    with pytest.raises(kind, match=answer):
        call(conditioner)
    assert not conditioner.fitted
