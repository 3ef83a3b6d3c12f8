r"""Robust maps in the units of each feature are bounded in these units, with all their rounding."""

import math

import pytest
import torch

from flowguard.bounds import Pointwise, Refused, certify, conditional, envelope
from flowguard.bounds.regions import Region
from flowguard.image import ConditionalMultiscaleFlow
from flowguard.migration import migrate
from flowguard.migration.imitate import Rescaled
from flowguard.migration.rules import BoundOfMap
from flowguard.transforms import AdditiveTransform, RobustSpline

DTYPE = torch.float64
U = 2.0**-24  # of float32


def spline(shift, **options):
    return RobustSpline(*torch.zeros(3, 1), torch.tensor(shift), **options)


def through(steps, region, roundoff):
    for step in steps:
        region = step.through(region, math.nan, roundoff)
    return region


def units(n, alike=False, dtype=DTYPE):
    loc = 10 * torch.randn(2, n, dtype=dtype)
    scale = 10 ** (2 * torch.rand(2, n, dtype=dtype) - 1)
    return loc[0], scale[0], loc[1], scale[0] if alike else scale[1]


def extreme(f, n, size, alike=False):
    r"""Maps of n features in units, with parameters of any size, one for each of `size` rows."""
    shape = (size, n)
    made = [1e6 * torch.randn(3, *shape, 1, dtype=DTYPE), 1e6 * torch.randn(shape, dtype=DTYPE)]
    base = f(*made[0], made[1]) if f is spline_of else f(made[1])
    return Rescaled(base, *units(n, alike))


def spline_of(*parameters):
    return RobustSpline(*parameters, bound=2.0, shift_bound=0.5)


def shift_of(t):
    return AdditiveTransform(t, shift_bound=0.7)


def cancelling():
    r"""Maps whose units add up to something large on the way and whose results may be small."""
    for _ in range(200):
        loc = (1 + torch.rand(2)) * 10 ** float(4 * torch.rand(()))
        scale = 10 ** (2 * torch.rand(2) - 1)
        base = spline(-1e30, bound=0.1, shift_bound=0.1)
        yield Rescaled(base, loc[:1], scale[:1], -loc[1:], scale[1:])


@pytest.mark.parametrize("how", ["anywhere", "features"])
def test_the_margin_for_rounding_covers_the_units(how):
    exceeded, exact_exceeded = 0, 0
    for f in cancelling():
        z = 4 * torch.rand(200)
        x = f.inv(z).double()
        bound = BoundOfMap(f, True)
        steps = {
            "anywhere": [conditional(envelope(f))],
            "features": list(bound.steps(torch.ones(1, dtype=torch.bool))),
        }[how]
        region = Region.cube(z.double().unsqueeze(1))
        exceeded += int((x > through(steps, region, U).box[:, 0]).sum())
        exact_exceeded += int((x > through(steps, region, 0.0).box[:, 0]).sum())
    assert exact_exceeded > 0
    assert exceeded == 0


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("base", [spline_of, shift_of])
def test_what_holds_for_all_units_holds_for_each_map(base, alike, sampling):
    for _ in range(10):
        f = extreme(base, 3, 500, alike)
        g = BoundOfMap(f, sampling).overall()
        assert math.isfinite(g.displacement) == math.isfinite(g.edge) == alike
        for radius in (0.0, 1.0, 30.0, 1e4):
            z = radius * (2 * torch.rand(500, 3, dtype=DTYPE) - 1)
            x = f.inv(z) if sampling else f(z)
            reach = g.offset + (g.gain * z.abs()).clamp(min=g.floor)
            assert bool((x.abs() <= reach * (1 + 1e-9)).all())
            assert x.abs().max().item() <= g.reach(radius) * (1 + 1e-9)
            assert g.reach(radius) <= (g.offset + max(g.floor, g.gain * radius)) * (1 + 1e-9)
            moved = (x - z).abs()
            assert bool((moved <= g.displacement * (1 + 1e-9)).all())
            near = (x.abs() <= g.inside * (1 + 1e-9)) & (z.abs() <= g.edge * (1 + 1e-9))
            assert bool((near | (moved <= g.offset * (1 + 1e-9))).all())


def test_units_of_each_feature_that_undo_each_other_do_not_add_up():
    up, down = torch.tensor([1.0, 100.0]), torch.tensor([1.0, 0.01])
    zero, one = torch.zeros(2), torch.ones(2)
    base = spline(0.0, bound=1.0, shift_bound=0.5)
    first, second = Rescaled(base, zero, one, zero, up), Rescaled(base, zero, up, zero, one)
    everything = torch.ones(2, dtype=torch.bool)
    region = Region.cube(torch.full((1, 2), 4.0, dtype=DTYPE))
    for f in (second, first):
        region = through(BoundOfMap(f, True).steps(everything), region, 0.0)
    # The first goes up by a hundred and the second down again: two shifts remain.
    assert region.largest == pytest.approx(5.0)
    assert torch.equal(down * up, one)


def test_where_it_is_not_known_which_features_change_ball_and_zonotope_are_kept():
    n = 16
    region = Region.cube(torch.full((1, n), 4.0, dtype=DTYPE))
    loc, scale, after, _ = (t.expand(n).clone() for t in units(1))
    f = Rescaled(shift_of(torch.zeros(n, dtype=DTYPE)), loc, scale, after, scale)
    alike = through([BoundOfMap(f, True).anywhere()], region, 0.0)
    assert alike.ball.item() < math.inf
    assert alike.center.equal(region.center)
    f = Rescaled(spline(0.0, bound=1.0, shift_bound=0.5), 0 * loc, scale, 0 * loc, scale / 2)
    assert BoundOfMap(f, True).overall().gain == 2.0
    rotated = region.linear(w := torch.linalg.qr(torch.randn(n, n, dtype=DTYPE))[0], w.abs(), 0.0)
    after = through([BoundOfMap(f, False).anywhere()], rotated, 0.0)
    assert after.ball.item() < 0.6 * after.box.norm().item() + n**0.5


def test_maps_without_units_are_what_they_are():
    f = spline(0.0, bound=1.0, shift_bound=0.5)
    mask = torch.tensor([True, False])
    bound = BoundOfMap(f, True)
    assert bound.overall() == envelope(f)
    assert [s.envelope for s in bound.steps(mask)] == [envelope(f)]
    assert bound.anywhere().envelope.reach(4.0) == 4.5
    free = BoundOfMap(spline(0.0, shift_bound=None), True)
    assert isinstance(free.anywhere(), Refused)


class Doubled(Rescaled):
    def _backward(self, y):
        x, ladj = super()._backward(y)
        return 2 * x, ladj + math.log(2)


def test_maps_in_units_that_do_something_else_are_refused():
    f = Doubled(spline(0.0), *torch.ones(4, 2))
    bound = BoundOfMap(f, True)
    steps = list(bound.steps(torch.ones(2, dtype=torch.bool)))
    for step in (steps[1], bound.anywhere()):
        assert isinstance(step, Refused)
        assert "overrides _backward of Rescaled" in step.reason


def test_a_migrated_image_flow_is_bounded_in_the_units_of_its_channels():
    flow = ConditionalMultiscaleFlow(3, 4, levels=2, steps=2, hidden=8, coupling="affine")
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, y = torch.randn(16, 3, 8, 8), [torch.randn(16, 4, 4, 4), torch.randn(16, 4, 2, 2)]
    robust, _ = migrate(flow.eval(), x, y)
    certificate = certify(robust)
    maps = [s for s in certificate.steps if isinstance(s, Pointwise)]
    assert len(maps) == 8
    assert all(s.envelope.limit is None for s in maps)
    assert certificate.tighten(3).bound(4.0) < certificate.bound(4.0)
    z = [4 * torch.randn(16, *s).sign() for s in robust.latent_shapes(8, 8)]
    for far in (1.0, 1e5, 1e30):
        x, _ = robust.inverse(z, [far * t for t in y])
        assert x.abs().max().item() <= certificate.tighten(3).bound(4.0)
