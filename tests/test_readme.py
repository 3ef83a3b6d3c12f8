r"""The README is true: its code runs as pasted."""

import pathlib
import re
import warnings

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_code_runs_as_pasted(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope = {"__name__": "readme"}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        exec(compile(code, "README.md", "exec"), scope)
    assert any("1 of 2 contexts is out of distribution" in str(w.message) for w in told)
    assert scope["guard"].report.flagged.tolist() == [False, True]
    assert scope["samples"].abs().max() < 40
    assert "level1" in capsys.readouterr().out


def test_ci_calls_the_test_command_of_the_readme():
    commands = re.findall(r"^pip install .*\[test\].*$", README, flags=re.MULTILINE)
    assert len(commands) == 1
    assert " && " in commands[0]
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
