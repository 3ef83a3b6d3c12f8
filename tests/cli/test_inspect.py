r"""``flowguard inspect``: what it says of a model."""

import shutil

import pytest
import torch

from flowguard.cli import main as cli
from flowguard.cli.inspect import certificate
from flowguard.models import SuperResolutionFlow, store


@pytest.mark.parametrize("margin", [0.25, None])
def test_the_margin_is_told_with_the_certificate(margin):
    torch.manual_seed(0)
    model = SuperResolutionFlow(levels=1, steps=1, hidden=4, features=4, margin=margin)
    told = certificate(model, 4.0)
    assert ("Images lie within -0.25 and 1.25" in told) == (margin is not None)
    assert ("no element of the flow's output exceeds 1.25." in told) == (margin is not None)


def test_a_copy_of_a_model_of_the_package_is_told_of(tmp_path, capsys):
    pytest.importorskip("jsonargparse")
    shutil.copytree(store.SHIPPED / "superres-x4", tmp_path / "mine")
    assert cli.main(["inspect", str(tmp_path / "mine")]) == 0
    told = capsys.readouterr().out
    assert "mine: SuperResolutionFlow, written by flowguard" in told
    assert "SuperResolutionFlow, float32" in told
    assert "fitted and calibrated" in told
