r"""Tests for what follows affine maps."""

import math

import pytest
import torch

from flowguard.migration.imitate import RescaledSpline
from flowguard.migration.inscribe import InscribedAffine, InscribedShift, middle


def test_one_row_far_off_does_not_move_the_interval_of_slopes():
    logs = torch.linspace(-1, 1, 2000)[:, None].repeat(1, 3)
    spoilt = logs.clone()
    spoilt[7] = torch.tensor([-13.0, 0.0, 13.0])
    assert (middle(spoilt, 2.4) - middle(logs, 2.4)).abs().max() < 0.01


def test_the_interval_takes_in_what_it_can():
    # Within reach of the middle of most rows, or a little beyond it, all are followed.
    logs = torch.cat((torch.linspace(-1, 1, 999), torch.tensor([3.0])))[:, None]
    assert (logs - middle(logs, 2.4)).abs().max() <= 2.4 + 1e-6
    # And it moves no further than it has to, for that.
    assert middle(logs, 2.4).item() == pytest.approx(0.6, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_no_interval_costs_less_likelihood(seed):
    torch.manual_seed(seed)
    logs = torch.randn(500, 1).double().exp() * torch.randn(500, 1).sign()
    reach = 0.8

    def cost(m):
        return ((logs - m).abs() - reach).clamp_min(0).sum().item()

    best = min(cost(m) for m in torch.linspace(-4, 4, 1601).double())
    assert cost(middle(logs, reach)) <= best + 0.8  # within a row's share of the best


@pytest.mark.parametrize("outlier", [1e-6, 1e6])
def test_the_bulk_is_followed_beside_an_outlier(outlier):
    torch.manual_seed(0)
    x = torch.randn(2000, 1).double()
    scale = (0.5 * torch.randn(2000, 1).double()).exp()
    shift = torch.randn(2000, 1).double()
    scale[0] = outlier
    units = torch.tensor([[0.0], [1.0], [0.0], [1.5]]).double()
    f = InscribedAffine.around(RescaledSpline(*units), x, scale, shift)(scale, shift)
    y, ladj = f.call_and_ladj(x)
    error = (ladj - scale.log()).abs()[1:]
    assert error.max() < 1e-6
    assert (y - (scale * x + shift)).abs()[1:].max() < 1e-6


def test_shifts_beyond_the_bound_widen_it():
    units = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    shift = torch.linspace(-9, 9, 101)[:, None]
    f = InscribedShift(RescaledSpline(*units), shift)
    x = torch.zeros(101, 1)
    assert torch.allclose(f(shift)(x), shift, atol=1e-4)
    far = f(torch.full((1, 1), math.inf))(torch.zeros(1, 1))
    assert far.isfinite().all()
    assert far.max() <= 4 * 5


def test_half_precision_is_computed_in_single():
    units = torch.tensor([[0.0], [1.0], [0.0], [1.0]]).half()
    f = InscribedAffine(*units)(torch.tensor([2.0]).half(), torch.tensor([0.5]).half())
    y, ladj = f.call_and_ladj(torch.tensor([1.0]).half())
    assert y.item() == pytest.approx(2.5, abs=1e-3)
    assert ladj.item() == pytest.approx(math.log(2), abs=1e-3)
    assert f.inverse_bound(4.0) < 20
