r"""Splines of three bins and more, as the compiler sees them."""

import ast
from pathlib import Path

import pytest

import flowguard.spline

SPLINE = Path(flowguard.spline.__file__).parent
FILES = sorted(SPLINE.glob("*.py"))  # those in place are never traced
FILES += [SPLINE.parent / "functional.py", SPLINE.parent / "transforms.py"]


def annotated_within(tree: ast.Module) -> list[str]:
    r"""The functions made within others with annotations that take more than a name."""
    found = []
    for outer in ast.walk(tree):
        for inner in ast.walk(outer) if isinstance(outer, ast.FunctionDef) else ():
            if not isinstance(inner, ast.FunctionDef) or inner is outer:
                continue
            arguments = [*inner.args.posonlyargs, *inner.args.args, *inner.args.kwonlyargs]
            told = [*(a.annotation for a in arguments), inner.returns]
            if any(not isinstance(t, ast.Name | None) for t in told):
                found.append(f"{outer.name}.{inner.name}")
    return found


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_no_function_is_made_with_annotations_while_the_compiler_looks_on(file):
    """Those are worked out anew in each call, and torch 2.6 cannot trace a union of types."""
    assert annotated_within(ast.parse(file.read_text(encoding="utf-8"))) == []


def test_such_a_function_is_found():
    planted = "def f(x):\n    def pick(y: 'Tensor' | float): ...\n    return pick(x)"
    assert annotated_within(ast.parse(planted)) == ["f.pick"]
