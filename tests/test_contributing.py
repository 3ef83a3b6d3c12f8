r"""The recipes for contributors work as they are written."""

import re
import sys
from pathlib import Path

import flowguard.integrations
from flowguard import hosts

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = {
    title: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for title, text in re.findall(
        r"^## (How to add .*?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.M | re.S
    )
}


def test_there_is_a_recipe_for_each():
    assert [title.rpartition("a ")[2].rpartition("n ")[2] for title in RECIPES] == [
        "coupling",
        "encoder",
        "rule of bounds",
        "host",
    ]


def run(code):
    scope = {"__name__": "recipe"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)


def test_a_coupling():
    (code,) = RECIPES["How to add a coupling"]
    run(code)


def test_an_encoder():
    (code,) = RECIPES["How to add an encoder"]
    run(code)


def test_a_rule():
    (code,) = RECIPES["How to add a rule of bounds"]
    run(code)


def test_a_host(tmp_path, monkeypatch):
    *files, code = RECIPES["How to add a host"]
    for text in files:
        path = tmp_path / re.match(r"# (\S+)", text)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    folders = [*flowguard.integrations.__path__, str(tmp_path / "integrations")]
    monkeypatch.setattr(flowguard.integrations, "__path__", folders)
    monkeypatch.setattr(hosts, "HOSTS", (*hosts.HOSTS, "toyhost"))
    try:
        run(code)
    finally:
        for name in [m for m in sys.modules if "toyhost" in m]:
            del sys.modules[name]
