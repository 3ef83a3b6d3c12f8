r"""Tests for what follows affine maps."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flowguard.migration import inscribe
from flowguard.migration.imitate import Rescaled, RescaledSpline
from flowguard.migration.inscribe import (
    InscribedAffine,
    InscribedLine,
    InscribedShift,
    middle,
)
from flowguard.transforms import RobustSpline


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


OPTIONS = [
    {"bound": bound, "shift_bound": shift_bound, "slope": slope}
    for bound, shift_bound in ((5.0, 5.0), (1.0, None), (3.0, 1.0))
    for slope in (1e-3, 1e-2, 5e-2, None)
]
UNITS = torch.tensor([[0.3, -1.0], [1.0, 2.0], [0.2, 0.1], [1.5, 0.7]])


def lines(options, n=500, dtype=torch.float64):
    r"""Maps of which some are lines at what is drawn, some bends, and some cannot follow."""
    torch.manual_seed(0)
    scale = (1.5 * torch.randn(n, 2, dtype=dtype)).exp()
    shift, x = 2 * torch.randn(n, 2, dtype=dtype), 3 * torch.randn(n, 2, dtype=dtype)
    f = InscribedAffine(*UNITS.to(dtype), **options)(
        scale.requires_grad_(), shift.requires_grad_()
    )
    return f, x.requires_grad_()


def as_spline(f):
    return Rescaled(f.base, *f.units)


def elements(monkeypatch):
    r"""How many elements splines were evaluated at, in a list that grows."""
    counted, old = [], RobustSpline._spline

    def counting(self, x, inverse, steep):
        counted.append(x.numel())
        return old(self, x, inverse, steep)

    monkeypatch.setattr(RobustSpline, "_spline", counting)
    return counted


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["call_and_ladj", "inverse_and_ladj"])
def test_values_slopes_and_gradients_are_those_of_the_spline(options, name, monkeypatch):
    monkeypatch.setattr(inscribe, "MANY", 1.0)
    f, x = lines(options)
    outs = [getattr(g, name)(x) for g in (f, as_spline(f))]
    grads = [
        torch.autograd.grad(y.square().sum() + ladj.sum(), (x, f.scale, f.shift))
        for y, ladj in outs
    ]
    for new, old in zip((*outs[0], *grads[0]), (*outs[1], *grads[1]), strict=True):
        assert torch.allclose(new, old, rtol=1e-6, atol=1e-8)
        assert new.dtype == old.dtype


def test_single_precision_agrees_to_its_rounding(monkeypatch):
    monkeypatch.setattr(inscribe, "MANY", 1.0)
    f, x = lines(OPTIONS[0], dtype=torch.float32)
    for new, old in zip(f.call_and_ladj(x), as_spline(f).call_and_ladj(x), strict=True):
        assert torch.allclose(new, old, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slope", [None, 1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("name", ["call_and_ladj", "inverse_and_ladj"])
def test_slopes_for_which_the_middle_bin_would_be_too_small_are_the_splines(
    slope, name, monkeypatch
):
    monkeypatch.setattr(inscribe, "MANY", 1.0)
    scale = torch.logspace(-3.1, 3.1, 2001, dtype=torch.float64)
    options = {"bound": 5.0, "shift_bound": 5.0, "slope": slope}
    units = torch.tensor([0.0, 1.0, 0.0, 1.0]).double().unbind()
    f = InscribedLine(scale, 0.1 * scale, units, **options)
    x = torch.full_like(scale, 0.2) / scale.clamp_min(1)
    v = x if name == "call_and_ladj" else scale * x + 0.1 * scale
    for new, old in zip(getattr(f, name)(v), getattr(as_spline(f), name)(v), strict=True):
        assert torch.allclose(new, old, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("far", [1.0, 1e3], ids=["straight", "bent"])
@pytest.mark.parametrize("name", ["call_and_ladj", "inverse_and_ladj"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes_are_those_of_the_spline(dtype, name, far):
    units = torch.tensor([0.0, 1.0, 0.0, 1.5]).unbind()
    options = {"bound": 5.0, "shift_bound": 5.0, "slope": 1e-3}
    x = torch.tensor([0.5, 0.3, 0.1, 0.2, far], dtype=dtype)
    for kind in (torch.float32, torch.float64):
        f = InscribedLine(torch.full((5,), 1.7, dtype=kind), torch.zeros(5), units, **options)
        for new, old in zip(getattr(f, name)(x), getattr(as_spline(f), name)(x), strict=True):
            assert new.dtype == old.dtype


@pytest.mark.parametrize("far", [1.0, 1e3], ids=["straight", "bent"])
def test_one_line_in_the_units_of_many_features_has_their_shape(far):
    f = InscribedAffine(*UNITS)(torch.full((6, 1), 1.5), torch.zeros(6, 1))
    x = torch.ones(6, 1)
    x[0] = far
    for new, old in zip(f.call_and_ladj(x), as_spline(f).call_and_ladj(x), strict=True):
        assert new.shape == old.shape == (6, 2)


def test_what_holds_no_numbers_takes_the_spline():
    maps = InscribedAffine(*UNITS)

    def run(scale, shift, x):
        return maps(scale, shift).inverse_and_ladj(x)

    given = torch.full((3, 2), 1.5), torch.zeros(3, 2), torch.ones(3, 2)
    with FakeTensorMode() as mode:
        fake = InscribedAffine(*(mode.from_tensor(t) for t in maps.units))
        scale, shift, x = (mode.from_tensor(t) for t in given)
        x, ladj = fake(scale, shift).inverse_and_ladj(x)
        assert x.shape == ladj.shape == (3, 2)
    # What was recorded with some numbers holds for others, which bend.
    traced = make_fx(run)(*given)
    far = given[0], given[1], torch.full((3, 2), 40.0)
    for new, old in zip(traced(*far), run(*far), strict=True):
        assert torch.allclose(new, old, atol=1e-4)


def test_a_line_is_no_spline_and_bends_are_few(monkeypatch):
    counted = elements(monkeypatch)
    f = InscribedAffine(*UNITS)(torch.tensor([1.5, 0.5]), torch.tensor([0.1, -0.2]))
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    y, _ = f.inverse_and_ladj(f.call_and_ladj(x)[0])
    assert counted == []
    assert torch.allclose(y, x, atol=1e-6)
    x[3], x[7, 1] = 50.0, -40.0
    y, _ = f.inverse_and_ladj(f.call_and_ladj(x)[0])
    assert counted == [3, 3]
    assert torch.allclose(y, x, atol=1e-4)


def test_many_bends_go_through_the_spline_at_once(monkeypatch):
    counted = elements(monkeypatch)
    f = InscribedAffine(*UNITS)(torch.tensor([1.5, 0.5]), torch.tensor([0.1, -0.2]))
    f.call_and_ladj(torch.full((9, 2), 30.0))
    assert counted == [18]


def test_what_is_infinite_has_finite_gradients_and_nan_is_one_element():
    scale = torch.tensor([1.0, math.inf, 0.0, 1.0]).repeat(8).requires_grad_()
    shift = torch.tensor([0.0, 0.0, math.inf, -math.inf]).repeat(8).requires_grad_()
    x = torch.tensor([0.5, 0.5, 0.5, 0.5]).repeat(8).requires_grad_()
    f = InscribedAffine(*torch.tensor([[0.0], [1.0], [0.0], [1.0]]))
    y, ladj = f(scale.clamp(1e-20, 1e20), shift.clamp(-1e20, 1e20)).inverse_and_ladj(x)
    (y.sum() + ladj.sum()).backward()
    for t in (y, ladj, x.grad, scale.grad, shift.grad):
        assert t.isfinite().all()
    with torch.no_grad():
        x[0] = math.nan
    y, ladj = f(torch.ones(32), torch.zeros(32)).call_and_ladj(x)
    assert y.isnan().tolist() == [True] + 31 * [False]


def test_other_ways_of_running_take_the_spline(monkeypatch):
    counted = elements(monkeypatch)
    maps = InscribedAffine(*UNITS)
    scale, shift, x = torch.full((3, 2), 1.5), torch.zeros(3, 2), torch.ones(3, 2)
    y = torch.func.vmap(lambda *t: maps(*t[:2])(t[2]))(scale, shift, x)
    assert counted
    assert torch.allclose(y, maps(scale, shift)(x), atol=1e-5)


def test_some_features_have_their_own_units():
    maps = InscribedAffine(*UNITS)
    scale, shift, x = torch.full((3, 2), 1.5), torch.full((3, 2), 0.3), 9 * torch.ones(3, 2)
    whole = maps(scale, shift)(x)
    for of in (torch.tensor([1]), torch.tensor([1, 0])):
        assert torch.equal(maps(scale[:, of], shift[:, of], of)(x[:, of]), whole[:, of])


def test_a_line_without_rows():
    f = InscribedAffine(*UNITS)(torch.ones(0, 2), torch.ones(0, 2))
    assert f.call_and_ladj(torch.ones(0, 2))[0].shape == (0, 2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_called_straight_throughout_is_straight_everywhere(options):
    told, (loc_in, scale_in, loc_out, scale_out) = 0, UNITS.double()
    for seed in range(100):
        torch.manual_seed(seed)
        # In units, with as many draws that are narrow as wide ones.
        wide = torch.rand(3, 1, 1).double().square()
        a, b, u = wide * torch.randn(3, 20, 2).double()
        u, b, scale = options["bound"] * u, options["bound"] * b, a.exp() * scale_out / scale_in
        x, shift = loc_in + scale_in * u, loc_out + scale_out * b - scale * loc_in
        f = InscribedAffine(*UNITS.double(), **options)(scale, shift)
        y, ladj = as_spline(f).call_and_ladj(x)
        seen = f._in_units(x, scale * x + shift)
        if f._is_throughout_straight(*seen):
            told += 1
            assert f._is_straight(*seen).all()
            assert torch.allclose(y, scale * x + shift, atol=1e-9)
            assert torch.allclose(ladj, scale.log(), atol=1e-9)
    assert told >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_what_is_straight_throughout_are_those_of_the_line(inverse, dtype):
    """What is looked at without gradients is not what is returned."""
    units = torch.tensor([0.0, 1.0, 0.0, 1.0]).unbind()
    f = InscribedLine(
        torch.tensor([2.0]), torch.tensor([0.5]), units, bound=5.0, shift_bound=5.0, slope=1e-3
    )
    x = torch.tensor([0.25], dtype=dtype, requires_grad=True)
    y = f.inv(x) if inverse else f(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.tolist() == [0.5 if inverse else 2.0]
