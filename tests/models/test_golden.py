r"""Folders that were saved long ago load for ever, and give the same pictures."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowguard import models

SAVED = Path(__file__).parents[1] / "golden" / "saved"


@pytest.fixture(params=["robust", "guarded", "migrated", "limited"])
def saved(request):
    folder = SAVED / request.param
    return models.load(folder), load_file(folder / "expected.safetensors")


@torch.no_grad()
def test_saved_models_decode_as_ever(saved):
    # In float64, as processors differ in how they round float32.
    model, expected = saved[0].double(), saved[1]
    latents = [
        expected[name].double() for name in sorted(n for n in expected if n.startswith("z"))
    ]
    made = model.decode(latents, expected["condition"].double())
    torch.testing.assert_close(made, expected["x"], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_saved_guard_judges_as_ever():
    folder = SAVED / "guarded"
    model, expected = models.load(folder).double(), load_file(folder / "expected.safetensors")
    model.decode([expected["z0"].double()], expected["condition"].double())
    p_values = model.conditioner.report.p_value.double()
    torch.testing.assert_close(p_values, expected["p_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "calibrated"), [("robust", 0), ("guarded", 1), ("migrated", 1), ("limited", 0)]
)
def test_saved_guards_come_back(name, calibrated):
    assert models.load(SAVED / name).conditioner.calibrated == calibrated


def test_saved_models_say_what_they_were_saved_with(saved):
    model, _ = saved
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "margin"),
    [("robust", None), ("guarded", None), ("migrated", None), ("limited", 0.25)],
)
def test_saved_models_have_the_margin_that_they_were_saved_with(name, margin):
    assert models.load(SAVED / name).margin == margin
