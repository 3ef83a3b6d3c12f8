r"""What all tests share: a seed for each, and nothing of torch's global state left changed."""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

HERE = Path(__file__).parent
LARGE = "FLOWGUARD_GOLDEN"

# The tensors of the tests are small: a second thread costs more than it brings, and the processes
# that share the tests need the cores.
torch.set_num_threads(1)

# No test depends on how busy the machine is.
hypothesis.settings.register_profile("flowguard", deadline=None)
hypothesis.settings.load_profile("flowguard")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def published():
    """The published networks by their formulas: the module `published.py` beside this file."""
    spec = importlib.util.spec_from_file_location("published_networks", HERE / "published.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden():
    """Finds a file of published numbers: in the repository, or among the large ones elsewhere."""

    def find(name):
        if (HERE / "golden" / name).is_file():
            return HERE / "golden" / name
        if not os.environ.get(LARGE):
            pytest.skip(f"{LARGE} does not name the folder of the large files of golden numbers")
        file = Path(os.environ[LARGE]) / name
        assert file.is_file(), f"{LARGE} names a folder without {name}"
        return file

    return find


@pytest.fixture(autouse=True)
def _global_state_is_left_alone():
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    assert before == after, "a test left torch's global state changed"
