r"""The code of the page on speed runs as it stands."""

import re
from pathlib import Path

from flowguard.functional import kernels
from flowguard.spline import choice, compiled

PAGE = (Path(__file__).parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_its_code_runs(monkeypatch):
    monkeypatch.setattr(choice, "_state", choice._State())
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # which is soon done
    monkeypatch.setattr(compiled, "_cache", compiled._Cache())
    assert len(BLOCKS) == 1
    for block in BLOCKS:
        exec(compile(block, "docs/speed.md", "exec"), {})
    assert kernels.chosen() == "eager"


def test_it_names_all_kernels_and_the_variable():
    assert all(f'"{name}"' in PAGE for name in choice.NAMES)
    assert choice.VARIABLE in PAGE
