r"""The code of docs/neighbours.md runs as pasted, block after block."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "neighbours.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
*FIRST, LAST = BLOCKS


def run(code):
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    done = subprocess.run(
        [sys.executable, "-"], input=code, text=True, capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_the_blocks_run_one_after_another(tmp_path):
    for host in ("zuko", "pyro"):
        pytest.importorskip(host)
    file = tmp_path / "page.py"  # what is certified is read from its file
    file.write_text("\n".join(FIRST), encoding="utf-8")
    done = subprocess.run([sys.executable, str(file)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("bayesflow") is None, reason="bayesflow is missing")
def test_the_block_for_bayesflow_runs():
    run(f"import torch\nimport flowguard\n{LAST}")
