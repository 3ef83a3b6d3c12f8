r"""The page on splines holds: its code runs as it stands, and its one line mends a copied file."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import flowguard

HOSTS = "glasflow", "nflows", "normflows", "zuko"
PAGE = (Path(__file__).parents[1] / "docs" / "splines.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LINE = next(block for block in BLOCKS if "noqa" in block)


@pytest.fixture(autouse=True)
def clean():
    yield
    flowguard.unregister()


def test_its_code_runs():
    for host in HOSTS:
        pytest.importorskip(host)
    assert len(BLOCKS) == 4
    for block in BLOCKS:
        torch.manual_seed(0)
        exec(compile(block, "docs/splines.md", "exec"), {})


def test_one_line_mends_a_file_that_holds_a_copy(tmp_path):
    r"""Most copies call the function by its name, from within the file."""
    found = importlib.util.find_spec("normflows")
    if found is None:
        pytest.skip("normflows is not installed")
    source = (Path(found.origin).parent / "utils" / "splines.py").read_text(encoding="utf-8")
    source += "\n\ndef transform(*args, **options):\n"
    source += "    return unconstrained_rational_quadratic_spline(*args, **options)\n"
    modules = []
    for name, text in (("stock", source), ("mended", source + LINE)):
        file = tmp_path / f"{name}.py"
        file.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
    stock, mended = modules

    torch.manual_seed(0)
    shapes = [(2, 1, 50), *((2, 1, 50, k) for k in (10, 10, 9))]
    x, *params = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for inverse in (False, True):
        options = {"inverse": inverse, "tails": "linear", "tail_bound": 5.0}
        made = (module.transform(x, *params, **options) for module in (stock, mended))
        for a, b in zip(*made, strict=True):
            assert torch.allclose(a, b, atol=1e-9)
    params[0][0, 0, 7] = torch.nan
    with pytest.raises(AssertionError):
        stock.transform(x, *params, **options)
    y, _ = mended.transform(x, *params, **options)
    assert y.isnan().sum() == 1
