r"""Tests for what stands between an observation and a network."""

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("sbi")

from flowguard.integrations.sbi import watch
from flowguard.integrations.sbi.watch import Watch, deadline, merge_trials


def fitted(event=(3,), n=400):
    found = Watch(None, 0.01)
    rows = torch.randn(2 * n, *event)
    found.fit(rows[:n], rows[n:])
    return found, rows[:n]


@pytest.mark.parametrize("event", [(3,), (2, 3), (1, 4, 4)])
@pytest.mark.parametrize("lead", [(5,), (1,), (2, 5)])
def test_embeddings_of_any_shape_are_moved_to_the_simulations(event, lead):
    found, known = fitted(event)
    found.shrinks = True
    x = torch.randn(*lead, *event)
    x[..., -1] += 1e4
    moved = found(x)
    assert moved.shape == x.shape
    distance = torch.cdist(moved.reshape(-1, known[0].numel()), known.flatten(1))
    assert (distance.amin(1) < 1e-4).all()


def test_what_is_not_flagged_is_left_bit_for_bit():
    found, known = fitted()
    found.shrinks = True
    x = torch.cat((known[:5], 1e5 * known[5:6]))
    assert torch.equal(found(x)[:5], known[:5])
    assert found(known[:5]) is not None
    assert not torch.equal(found(x)[5:], x[5:])


def test_embeddings_that_are_not_finite_move_to_the_middle():
    found, _ = fitted()
    found.shrinks = True
    moved = found(torch.tensor([[torch.inf, 0.0, 0.0]]))
    assert moved.isfinite().all()
    assert found.conditioner.score(moved.double()).flagged.tolist() == [False]


def test_a_direction_without_spread_is_watched_too():
    x = torch.randn(400, 3)
    x[:, 2] = 7.0
    found = Watch(None, 0.05)
    found.fit(x[:200], x[200:])
    report = found.score(torch.tensor([[0.0, 0.0, 7.0], [0.0, 0.0, 9.0]]))
    assert report.flagged.tolist() == [False, True]


def test_the_deadline_ends_what_asks_again(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(ticks))
    found, x = fitted()
    with deadline(3, "too late"):
        found(x)
        found(x)
        with pytest.raises(RuntimeError, match="too late"):
            found(x)
    found(x)
    with deadline(None, ""):
        for _ in range(9):
            found(x)


def test_the_merged_p_value_of_dependent_trials_is_valid():
    p = torch.rand(4000, 9)
    p[::2] = p[::2, :1]  # half of all observations repeat one trial
    merged = torch.stack([merge_trials(row) for row in p])
    for alpha in (0.05, 0.2, 0.5):
        assert (merged <= alpha).float().mean() <= alpha + 0.02


def test_merging_finds_one_odd_trial_and_a_drift_of_all():
    assert merge_trials(torch.tensor([0.001, 0.6, 0.9, 0.8])) == pytest.approx(0.008)
    assert merge_trials(torch.full((100,), 0.01)) == pytest.approx(0.04)
    assert merge_trials(torch.tensor([0.3])) == pytest.approx(0.3)


def test_the_network_is_evaluated_in_parts_and_gets_its_mode_back():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9)).train()
    found = Watch(net, 0.01)
    x = torch.randn(2500, 3)
    assert torch.allclose(found.embed(x), net[0](x))
    assert net.training
