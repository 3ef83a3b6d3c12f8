r"""Training pairs that are corrupted a little."""

import numpy as np
import pytest
import torch

from flowguard.training.corrupt import blurred, compressed, corrupted, noisy, patterned

pytest.importorskip("PIL.Image")

CHANGES = {"noise": noisy, "jpeg": compressed, "blur": blurred}


def photograph(height=12, width=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def drawn(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_a_little_one_and_follows_its_numbers(change):
    y = photograph()
    for seed in range(20):
        made = change(y, drawn(seed))
        assert made.shape == y.shape
        assert made.dtype == y.dtype
        assert 0 <= made.min() <= made.max() <= 1
        assert 1e-4 < (made - y).square().mean().sqrt() < 0.15
        assert torch.equal(made, change(y, drawn(seed)))
    assert not torch.equal(change(y, drawn(0)), change(y, drawn(1)))
    assert torch.equal(y, photograph())  # which is left as it was


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3)], ids=str)
def test_changes_take_any_size_and_views(change, size):
    made = change(torch.rand(1, *size).expand(3, -1, -1), drawn(0))
    assert made.shape == (3, *size)
    assert made.isfinite().all()


def test_dark_conditions_get_less_noise():
    y = torch.full((3, 64, 64), 0.5)
    for seed in range(5):
        bright, dark = noisy(y, drawn(seed)) - y, noisy(0.1 * y, drawn(seed)) - 0.1 * y
        assert dark.std() < 0.3 * bright.std()


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_a_pattern_is_the_same_in_target_and_condition(scale):
    y = torch.full((3, 12, 20), 0.4)
    x = y.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    seen = set()
    for seed in range(60):
        hr, lr = patterned(x, y, scale, drawn(seed))
        # A target of blocks stays one: the pattern lies on the pixels of the condition.
        assert torch.allclose(hr, lr.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
        assert 0 <= lr.min() <= lr.max() <= 1
        assert (lr - y).abs().max() > 0.005
        rows, columns = (lr.diff(dim=d).abs().amax() > 1e-3 for d in (1, 2))
        seen.add((bool(rows), bool(columns)))
    assert {(True, True), (True, False), (False, True)} <= seen  # checkerboards and stripes


def test_patterns_are_of_one_to_eight_pixels():
    widths = set()
    for seed in range(200):
        _, lr = patterned(torch.zeros(3, 64, 64), torch.zeros(3, 64, 64), 1, drawn(seed))
        edges = (lr[0].diff(dim=1).abs() > 1e-6).any(0).nonzero().flatten()
        widths |= set(edges.diff().tolist())
    assert widths == set(range(1, 9))


def test_targets_of_corrupted_conditions_stay_unless_there_is_a_pattern():
    x, y = photograph(48, 80), photograph()
    kinds = {"pattern": 0, "condition": 0}
    for seed in range(100):
        hr, lr = corrupted(x, y, 4, drawn(seed))
        assert not torch.equal(lr, y)
        kinds["condition" if torch.equal(hr, x) else "pattern"] += 1
        alone, _ = corrupted(x, y, 4, drawn(seed), patterns=False)
        assert torch.equal(alone, x)
    assert min(kinds.values()) > 30
