r"""The examples in the docstrings run."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest
import torch

import flowguard
import flowguard.integrations

HOSTS = ("zuko", "nflows", "glasflow", "normflows", "sbi", "lampe", "dingo")


def modules():
    for package in (flowguard, flowguard.integrations):
        yield package.__name__
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not info.name.startswith("flowguard.integrations.") or package is not flowguard:
                yield info.name


@pytest.mark.parametrize("name", sorted(set(modules())))
def test_docstring_examples_run(name):
    for host in HOSTS:
        if host in name and importlib.util.find_spec(host) is None:
            pytest.skip(f"{host} is not installed")
    torch.manual_seed(0)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    scope = {**vars(module), "torch": torch, "flowguard": flowguard}
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in finder.find(module, name, globs=scope):
        torch.manual_seed(0)
        runner.run(test)
    assert runner.failures == 0
