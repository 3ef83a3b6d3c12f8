r"""What is public says what it is."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LEAST = 0.95  # of the public functions, classes and methods


def public(body, prefix=""):
    r"""Yields what is public: functions, classes, and the methods of these, properties too.

    A setter or an overload has the docstring of what it belongs to.
    """
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from public(node.body, prefix)
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        told = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if node.name.startswith("_") or told & {"setter", "deleter", "overload"}:
            continue
        yield prefix + node.name, ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("package", ["flowguard", "flowguard/integrations"])
def test_what_is_public_has_a_docstring(package):
    found = {
        f"{path.relative_to(ROOT)}: {name}": text
        for path in sorted((ROOT / package).rglob("*.py"))
        for name, text in public(ast.parse(path.read_text(encoding="utf-8")).body)
    }
    bare = [name for name, text in found.items() if not text]
    share = 1 - len(bare) / len(found)
    assert share >= LEAST, f"{100 * share:.1f} % of {len(found)}; without:\n" + "\n".join(bare)
