r"""What flows make of a condition."""

import warnings

import pytest
import torch

from flowguard.app.answers import answer, partners
from flowguard.models import LowLightEncoder, LowLightFlow, SuperResolutionFlow

SMALL = {"levels": 1, "steps": 1, "hidden": 8, "features": 8}


def test_the_affine_flow_answers_twice_and_only_one_of_its_guards_shrinks(model):
    found = partners(model("robust", 1), model("affine", 1, margin=None))
    policies = {p.name: p.model.conditioner.policy for p in found}
    assert policies == {
        "affine": "report",
        "affine, its guard shrinks": "shrink",
        "robust": "report",
    }
    assert found[0].model is not found[1].model


def test_a_robust_flow_whose_guard_shrinks_is_said_to(model):
    robust = model("robust", 1)
    robust.conditioner.policy = "shrink"
    assert [p.name for p in partners(robust)] == ["robust, its guard shrinks"]


@pytest.mark.parametrize("policy", ["warn", "raise"])
def test_no_guard_warns_or_raises(policy, model):
    robust = model("robust", 1)
    robust.conditioner.policy = policy
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = answer(*partners(robust), 9 + torch.rand(3, 16, 16), 0.8)
    assert bool(made.report.flagged[0])


def test_a_model_without_a_guard_answers_all_the_same():
    (robust,) = partners(SuperResolutionFlow(**SMALL))
    made = answer(robust, torch.rand(3, 16, 20), 0.0)
    assert made.report is None
    assert made.sample.shape == (1, 3, 64, 80)


@pytest.mark.parametrize("margin", [None, 0.25])
def test_a_certificate_says_what_it_bounds(margin):
    encoder = LowLightEncoder(8, growth=4, blocks=1, stacked=(), levels=1)
    dark = LowLightFlow(levels=1, steps=1, hidden=8, encoder=encoder, margin=margin)
    (bright,) = partners(dark)  # the first guess is within the bound
    assert "a value of a sample never exceeds" in bright.certificate
    (large,) = partners(SuperResolutionFlow(**SMALL, margin=margin))
    assert ("added to the enlarged condition" in large.certificate) == (margin is None)


def test_an_answer_is_the_same_each_time_and_another_for_another_seed(model):
    (robust,) = partners(model("robust", 1))
    y = torch.rand(3, 16, 16)
    first = answer(robust, y, 0.8, seed=1)
    assert torch.equal(answer(robust, y, 0.8, seed=1).sample, first.sample)
    assert not torch.equal(answer(robust, y, 0.8, seed=2).sample, first.sample)
