r"""The page on sbi is true: its code runs as pasted."""

import pathlib
import re
import warnings

import pytest
import torch

pytest.importorskip("sbi")

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "sbi.md").read_text(encoding="utf-8")


def test_python_code_runs_as_pasted(capsys):
    scope = {"__name__": "page"}
    with torch.random.fork_rng(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
            exec(compile(code, "sbi.md", "exec"), scope)
    heard = [str(w.message) for w in told if w.category.__name__ == "OODContextWarning"]
    assert len(heard) == 1
    assert "The observation [40, -3] is not like the simulations" in heard[0]
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    said = shown.replace("\n", " ").split(": ", 1)[1].split(" (alpha")[0]
    assert said in heard[0]
    assert scope["samples"].shape == (500, 2)
    assert scope["report"].flagged.tolist() == [False, True]
    assert capsys.readouterr().out.endswith("True\nTrue\n")
