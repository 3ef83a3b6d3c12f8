r"""Tests for the worked example of a conditional Glow."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("normflows")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

SCRIPT = Path(__file__).parents[2] / "examples" / "normflows_conditional_glow.py"


def test_stock_explodes_where_robust_and_migrated_hold(tmp_path):
    out = tmp_path / "glow.png"
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 10_000
    rows = {
        line[:26].strip(): re.findall(r"(\S+)\s+([\d.]+)%", line[26:])
        for line in run.stdout.splitlines()
        if line.count("%") == 4
    }
    assert len(rows) == 7
    (stock, _), (robust, _), (migrated, _) = rows["held-out photograph"][:3]
    assert float(stock) < 5
    assert float(migrated) == pytest.approx(float(stock), rel=0.05)
    assert float(robust) < 5
    (stock, _), *safe = rows["noise σ = 10⁴"][:3]
    assert stock == "inf" or float(stock) > 1e4
    assert all(float(largest) < 100 for largest, _ in safe)
    assert [share for _, share in safe] == ["0.0", "0.0"]
    bits = dict(re.findall(r"^  (stock|robust|migrated) +([\d.]+)$", run.stdout, re.MULTILINE))
    assert float(bits["migrated"]) == pytest.approx(float(bits["stock"]), abs=0.05)
    assert "stock      not certified" in run.stdout
    assert run.stdout.count("certified for every condition: |x| <=") == 2


def test_a_mistyped_option_is_refused():
    command = [sys.executable, str(SCRIPT), "--step", "x"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "invalid int value" in run.stderr
