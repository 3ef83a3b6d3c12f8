r"""The table, and that each folder holds what it should."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
FOLDERS = sorted(file.parent.name for file in ROOT.glob("*/README.md"))
ROWS = re.findall(
    r"^\| \[(.*?)\]\((.*?)\) \| (.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
)
#: What is a text alone.
TEXTS = {"zuko-multiscale"}
SECTIONS = ("Problem", "Change", "Tests", "The project's rules")


def wounds(folder):
    r"""The hosts and releases that the tests of a folder name."""
    for file in (ROOT / folder).glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.wound":
                yield " ".join(arg.value for arg in node.args)


def test_the_table_has_a_row_for_each_folder():
    assert sorted(name for name, *_ in ROWS) == FOLDERS
    assert all(name == link for name, link, _ in ROWS)
    assert {file.parent.name for file in ROOT.glob("*/*.py")} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_holds_a_text_a_test_and_a_change(folder):
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    assert any((ROOT / folder).glob("test_*.py"))
    if folder not in TEXTS:
        assert [s for s in SECTIONS if f"\n## {s}\n" not in text] == []
        tree = ast.parse((ROOT / folder / "fix.py").read_text(encoding="utf-8"))
        functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert "applied" in functions


@pytest.mark.parametrize(("folder", "_", "hosts"), ROWS, ids=FOLDERS and [r[0] for r in ROWS])
def test_the_releases_of_the_table_are_those_of_the_tests(folder, _, hosts):
    found = set(wounds(folder))
    assert found <= set(hosts.split(", "))
    assert found or folder in TEXTS | {"pytorch-batched-lu"}  # which fails on some machines alone


def test_a_change_depends_on_its_host_alone():
    allowed = {"torch", "nflows", "normflows", "zuko", "glasflow", "sbi", "torchflows"}
    allowed |= {"pytorch_ood", "collections", "contextlib", "functools", "importlib", "inspect"}
    allowed |= {"math", "pathlib", "typing", "unittest", "warnings"}
    for file in ROOT.glob("*/fix.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                assert node.module.partition(".")[0] in allowed
            elif isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
