r"""Runs each test of a contribution twice: with the change, and on the released host, where it fails.

A test that shows a wound bears `@pytest.mark.wound("nflows", "0.14", raises=...)` and takes the
fixture `change`. Its row `[changed]` runs within `applied()` of the `fix.py` beside it and has to
pass; its row `[released]` runs without, and has to fail in the way that `raises` says: when it
passes, a newer release has mended the wound, and the contribution is done.
"""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "wound(host, release, raises): what is wrong in that release of a host"
    )


def pytest_generate_tests(metafunc):
    mark = metafunc.definition.get_closest_marker("wound")
    if mark is not None:
        # With the change first: the released row then shows that it was taken out again.
        rows = ["changed", pytest.param("released", marks=_fails(*mark.args, **mark.kwargs))]
        metafunc.parametrize("change", rows, indirect=True)


def _fails(host, release, raises):
    try:
        here = version(host)
    except PackageNotFoundError:
        here = "none"  # its tests are skipped
    reason = f"seen in {host} {release}, installed is {here}: where this passes, it is mended"
    return pytest.mark.xfail(strict=True, raises=raises, reason=reason)


def load(folder: Path):
    r"""The module `fix.py` of a contribution's folder."""
    spec = importlib.util.spec_from_file_location(
        f"fix_{folder.name}".replace("-", "_"), folder / "fix.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # who compiles its functions looks there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fix(request):
    return load(request.path.parent)


@pytest.fixture
def change(request):
    if request.param == "released":
        yield
    else:
        with load(request.path.parent).applied():
            yield
