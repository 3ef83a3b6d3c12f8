r"""What all tests share: a seed for each, and nothing of torch's global state left changed."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from torch.torch_version import TorchVersion
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
LARGE = "FLOWGUARD_GOLDEN"

# The compiler imports it, and it refuses to come after `distutils`, which other packages import.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

# The tensors of the tests are small: a second thread costs more than it brings, and the processes
# that share the tests need the cores.
torch.set_num_threads(1)

# What the compiler of torch 2.6 looks for in a graph it looks for along all ways: see docs/speed.md.
if TorchVersion(torch.__version__) < "2.7":
    import torch._functorch.config

    torch._functorch.config.ban_recompute_used_far_apart = False

# No test depends on how busy the machine is.
hypothesis.settings.register_profile("flowguard", deadline=None)
hypothesis.settings.load_profile("flowguard")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _beside(name, known_as):
    spec = importlib.util.spec_from_file_location(known_as, HERE / name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def published():
    """The published networks by their formulas: the module `published.py` beside this file."""
    return _beside("published.py", "published_networks")


@pytest.fixture(scope="session")
def ncnn():
    """Networks in ncnn's format: the module `ncnn_files.py` beside this file."""
    return _beside("ncnn_files.py", "ncnn_files")


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
    before = _global_state()
    yield
    assert before == _global_state(), "a test left torch's global state changed"


def _global_state():
    precision = torch.get_float32_matmul_precision()
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), precision


PRODUCTS = {f"aten.{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "mv", "convolution")}


class MatrixUnits(TorchDispatchMode):
    r"""Rounds float32 matrices to bfloat16 before they are multiplied, where torch's settings allow it.

    So do the matrix units of newer processors, which not every machine has.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func.overloadpacket) in PRODUCTS and self.allowed():
            args = pytree.tree_map_only(torch.Tensor, self.rounded, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def allowed():
        products = getattr(torch.backends.mkldnn, "matmul", None)
        if products is None:  # torch before 2.9
            return torch.get_float32_matmul_precision() == "medium"
        return products.fp32_precision in ("bf16", "tf32")

    @staticmethod
    def rounded(t):
        return t.bfloat16().float() if t.dtype == torch.float32 else t


@pytest.fixture
def medium():
    r"""A context in which a user has asked for products of medium precision, and gets them."""

    @contextlib.contextmanager
    def medium():
        torch.set_float32_matmul_precision("medium")
        try:
            with MatrixUnits():
                yield
        finally:
            torch.set_float32_matmul_precision("highest")

    return medium
