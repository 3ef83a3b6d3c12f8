r"""Runs a host's own tests with a change in place.

From the root of the repository, with the host's repository at HOST:

    PYTHONPATH=upstream python -m pytest -p with_change --change nflows-discriminant HOST/tests
"""

import importlib.util
import sys
from contextlib import ExitStack
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--change", action="append", default=[], help="folders of contributions")


def pytest_configure(config):
    stack = ExitStack()
    for name in config.getoption("--change"):
        file = Path(__file__).parent / name / "fix.py"
        spec = importlib.util.spec_from_file_location(f"fix_{name}".replace("-", "_"), file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # who compiles its functions looks there
        spec.loader.exec_module(module)
        stack.enter_context(module.applied())
    config.add_cleanup(stack.close)
