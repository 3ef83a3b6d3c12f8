r"""Tests for the migration of image flows."""

import pytest
import torch

from flowguard.bounds import certify
from flowguard.image import ConditionalMultiscaleFlow
from flowguard.migration import migrate


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


def affine_flow():
    return ConditionalMultiscaleFlow(3, 8, levels=2, steps=1, hidden=16, coupling="affine")


def pairs(n):
    return torch.rand(n, 3, 16, 16), [torch.randn(n, 8, 8, 8), torch.randn(n, 8, 4, 4)]


def test_a_migrated_flow_in_half_precision_is_certified_and_runs():
    robust, report = migrate(affine_flow(), *pairs(16))
    half = robust.half()
    certificate = certify(half)
    assert certificate.certified
    single = report.certificate_after.bound(4.0)
    assert single <= certificate.bound(4.0) < 1.2 * single
    x, y = pairs(2)
    x, y = x.half(), [t.half() for t in y]
    z, _ = half(x, y)
    back, _ = half.inverse(z, y)
    assert back.dtype == torch.float16
    assert (back - x).abs().max() < 0.01


def test_a_flow_in_half_precision_is_migrated():
    x, y = pairs(16)
    robust, report = migrate(affine_flow().half(), x.half(), [t.half() for t in y])
    assert report.certificate_after.certified
    assert report.nll_swapped == pytest.approx(report.nll_before, rel=1e-3)
    assert all(p.dtype == torch.float16 for p in robust.parameters())


def test_all_that_is_kept_has_a_reason():
    robust, _ = migrate(affine_flow(), *pairs(16))
    _, report = migrate(robust, *pairs(16))
    assert report.replaced == ()
    assert len(report.kept) == 3
    assert all(report.reasons[name] for name in report.kept)
