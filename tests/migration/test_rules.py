r"""Robust maps in the units of each feature are bounded in these units, with all their rounding."""

import math

import pytest
import torch

from flowguard.bounds import Pointwise, Refused, Scale, certify, conditional, envelope
from flowguard.bounds.regions import Region
from flowguard.image import ConditionalMultiscaleFlow
from flowguard.migration import migrate
from flowguard.migration.imitate import Rescaled
from flowguard.migration.rules import BoundOfMap
from flowguard.transforms import AdditiveTransform, RobustSpline

U = 2.0**-24  # of float32


def spline(shift, **options):
    return RobustSpline(*torch.zeros(3, 1), torch.tensor(shift), **options)


def through(steps, region, roundoff):
    for step in steps:
        region = step.through(region, math.nan, roundoff)
    return region


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
        steps = [
            [conditional(envelope(f))],
            list(bound.steps(torch.ones(1, dtype=torch.bool))),
        ][how == "features"]
        region = Region.cube(z.double().unsqueeze(1))
        exceeded += int((x > through(steps, region, U).box[:, 0]).sum())
        exact_exceeded += int((x > through(steps, region, 0.0).box[:, 0]).sum())
    assert exact_exceeded > 0
    assert exceeded == 0
