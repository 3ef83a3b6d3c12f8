r"""Tests for the worked example of guarded inference."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("zuko")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[2] / "examples" / "sbi_guarded.py"


def test_it_warns_of_the_observation_that_no_parameters_explain(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    with torch.random.fork_rng():
        result = main(["--steps", "200", "--output", str(tmp_path / "sbi.png")])
    assert (tmp_path / "sbi.png").stat().st_size > 10_000
    assert result.watch.report.flagged.tolist() == [False, True]
    assert len(result.warned) == 1
    assert "worst is context 1" in result.warned[0]
    assert result.samples.isfinite().all()
    # The posterior of the honest observation holds the truth, and knows more than the prior.
    honest = result.samples[:, 0]
    assert ((honest.mean(0) - result.truth).abs() < 4 * honest.std(0)).all()
    assert (honest.std(0) < 0.4).all()
    assert "OUT OF DISTRIBUTION" in capsys.readouterr().out
