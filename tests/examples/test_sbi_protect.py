r"""Tests for the worked example of a protected posterior."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("sbi")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[2] / "examples" / "sbi_protect.py"


def test_it_warns_of_the_observations_that_have_drifted(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--simulations", "600", "--epochs", "15", "--draws", "200"]
    with torch.random.fork_rng():
        result = main([*options, "--output", str(tmp_path / "sbi.png")])
    assert (tmp_path / "sbi.png").stat().st_size > 10_000
    assert [len(messages) for messages in result.warned] == [0, 1, 1, 1]
    assert result.p_values[0] > 0.01
    assert max(result.p_values[1:]) <= 0.01
    assert result.inside["protected"] == [1, 1, 1, 1]
    assert all(samples.shape == (200, 2) for samples in result.samples["protected"])
    assert min(result.inside["stock"][1:]) < 0.1
    assert "was moved to the nearest of the simulations" in capsys.readouterr().out
