r"""Tests for the bounds of conditional bases."""

import torch

from flowguard.migration.moments import BoundedMoments


def test_what_was_met_is_left_and_all_else_bounded():
    torch.manual_seed(0)
    mean, logs = 3 + 2 * torch.randn(500, 3).double(), -1 + 0.3 * torch.randn(500, 3).double()
    bounds = BoundedMoments.around(mean, logs)
    again = bounds(mean, logs)
    assert torch.allclose(again[0], mean, atol=1e-12)
    assert torch.allclose(again[1], logs, atol=1e-12)
    # A little beyond what was met, too.
    low, high = mean.amin(0), mean.amax(0)
    beyond = high + 0.2 * (high - low)
    assert torch.allclose(bounds(beyond, logs[0])[0], beyond, atol=1e-12)
    for far in (torch.inf, -torch.inf, 1e30):
        m, s = bounds(torch.full_like(mean, far), torch.full_like(logs, far))
        assert ((m - bounds.mean).abs() <= bounds.mean_room).all()
        assert ((s - bounds.log_scale).abs() <= bounds.log_scale_room).all()
        assert (s <= bounds.largest).all()


def test_constant_moments_leave_room():
    bounds = BoundedMoments.around(torch.zeros(10, 2), torch.zeros(10, 2))
    assert (bounds.mean_room > 1).all()
    assert (bounds.log_scale_room > 0.5).all()


def test_older_weights_leave_the_bounds():
    bounds = BoundedMoments.around(torch.randn(10, 2), torch.randn(10, 2))
    before = bounds.mean.clone()
    bounds.load_state_dict({})
    assert torch.equal(bounds.mean, before)
