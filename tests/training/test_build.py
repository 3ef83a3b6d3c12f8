"""The models that are trained from a folder."""

import pytest
import torch

from flowguard.models import LowLightFlow, SuperResolutionFlow
from flowguard.training.build import build


def test_the_standard_model_has_one_million_and_eight():
    model = build("superres")
    assert isinstance(model, SuperResolutionFlow)
    assert sum(p.numel() for p in model.parameters()) == 1838592


def test_one_for_low_light():
    model = build("lowlight", levels=2, steps=1, hidden=8, features=8, blocks=1)
    assert isinstance(model, LowLightFlow)
    assert model.multiple == 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="task must be one of superres, lowlight; got 'x'"):
        build("x")
    with pytest.raises(ValueError, match="at least 1 block; got 0"):
        build("lowlight", blocks=0)


@pytest.mark.parametrize("task", ["superres", "lowlight"])
@pytest.mark.parametrize("options", [{}, {"margin": None}, {"margin": 0.5}], ids=str)
def test_models_have_the_margin_that_is_asked_for(task, options):
    model = build(task, levels=1, steps=1, hidden=8, features=8, blocks=1, **options)
    assert model.margin == options.get("margin", 0.25)


@pytest.mark.parametrize("task", ["superres", "lowlight"])
@pytest.mark.parametrize("residual", [True, False])
def test_models_are_of_the_residual_unless_they_shall_not(task, residual):
    model = build(task, levels=1, steps=1, hidden=8, features=8, blocks=1, residual=residual)
    y = torch.rand(1, 6 if task == "lowlight" else 3, 4, 4)
    assert (model.base_of(y) is not None) == residual
