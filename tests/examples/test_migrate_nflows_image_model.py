r"""Tests for the worked example of a migration."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nflows")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

SCRIPT = Path(__file__).parents[2] / "examples" / "migrate_nflows_image_model.py"


def test_the_quick_run_migrates_and_certifies(tmp_path):
    picture = tmp_path / "migration.png"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--steps", "10", "--out", str(picture)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert picture.stat().st_size > 10_000
    assert run.stdout.count("AffineCouplingTransform -> ") > 0
    assert "certified for every condition" in run.stdout
    stock, migrated, tuned = (
        float(number)
        for number in re.findall(r"(?:stock|migrated|fine-tuned) +(\d\.\d{4})", run.stdout)
    )
    assert abs(migrated - stock) < 0.05
    assert tuned < stock + 0.05
    # A row for each condition: largest value and share lost, of stock, migrated and guarded.
    number = r" +(\S+) +(\d+\.\d)%"
    rows = re.findall(rf"{number}{number}{number} +\d+\.\d%$", run.stdout, re.MULTILINE)
    assert len(rows) == 6
    for *_, migrated_lost, guarded, guarded_lost in rows:
        assert float(migrated_lost) == float(guarded_lost) == 0
        assert float(guarded) < 1e4
