r"""What the page says."""

import math

import pytest
import torch

from flowguard import certify
from flowguard.app import words
from flowguard.models import SuperResolutionFlow
from flowguard.ood import OODConditioner


@pytest.fixture(scope="module")
def guard():
    torch.manual_seed(0)
    guard = OODConditioner(policy="report", alpha=0.01).fit(torch.randn(2000, 3), progress=False)
    return guard.calibrate(torch.randn(499, 3), progress=False).eval()


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (0.5, "In distribution: p = 0."),
        (2.9, "Unusual, but not flagged: p = 0.0"),
        (50.0, "Out of distribution: p = 0.002; none of the 499 conditions"),
        (math.inf, "Out of distribution: the condition, or what the encoder makes of it, is not"),
    ],
)
def test_a_p_value_is_said_in_words(at, said, guard):
    assert words.chance(guard.score(torch.tensor([[at, 0.0, 0.0]]))).startswith(said)


def test_a_guard_that_is_not_calibrated_is_said_to_tell_nothing():
    assert "not calibrated" in words.chance(None)


def test_a_certificate_is_a_line_that_holds_the_bound():
    small = {"levels": 1, "steps": 1, "hidden": 8, "features": 8}
    robust = certify(SuperResolutionFlow(**small))
    told = words.certificate(robust)
    assert told.startswith("Certificate: a value of a sample never exceeds 1.25 in absolute value")
    free = certify(SuperResolutionFlow(**small, margin=None))
    assert "what is added to the enlarged condition" in words.certificate(free, added=True)
    assert f"exceeds {free.bound(words.NOISE):.4g} " in words.certificate(free, added=True)
    affine = certify(SuperResolutionFlow(**small, coupling="affine", margin=None))
    assert words.certificate(affine).startswith("Certificate: none")


def test_what_is_not_finite_is_said_to_be():
    assert words.artefacts(1.0, math.inf) == "100 % artefacts; some values are not finite"
