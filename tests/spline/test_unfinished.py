r"""What is left in the compiler's cache by a process that was killed while it compiled."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from filelock import FileLock

from flowguard.spline import compiled
from flowguard.spline.unfinished import remove_unfinished

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="libraries of another format")


@pytest.fixture
def library(tmp_path):
    r"""A library that is whole, where the compiler keeps its own."""
    path = tmp_path / "ab" / "cabc.main.so"
    path.parent.mkdir()
    shutil.copy(torch._C.__file__, path)
    return path


@LINUX
@pytest.mark.parametrize("size", [0, 10, 64, 4000])
def test_a_library_that_is_cut_off_is_removed(library, size):
    os.truncate(library, size)
    assert remove_unfinished(library.parents[1]) == [library]
    assert not library.exists()


@LINUX
def test_a_library_of_zeros_is_removed(library):
    library.write_bytes(bytes(library.stat().st_size))
    assert remove_unfinished(library.parents[1]) == [library]


def test_what_is_whole_stays(library):
    module = library.with_name("cabc.py")
    module.write_text("x = 1")
    source = library.with_name("cabc.main.cpp")
    source.touch()
    assert remove_unfinished(library.parents[1]) == []
    assert library.exists()
    assert source.exists()


@LINUX
def test_a_library_of_another_kind_of_machine_stays(library):
    whole = library.read_bytes()
    library.write_bytes(whole[:4] + b"\x01\x02" + whole[6:4000])
    assert remove_unfinished(library.parents[1]) == []


def test_an_empty_module_is_removed(tmp_path):
    module = tmp_path / "ab" / "cabc.py"
    module.parent.mkdir()
    module.touch()
    assert remove_unfinished(tmp_path) == [module]


def test_what_a_process_is_writing_stays(library):
    os.truncate(library, 0)
    folder = library.parents[1]
    (folder / "locks").mkdir()
    with FileLock(folder / "locks" / "cabc.lock"):
        assert remove_unfinished(folder) == []
    assert remove_unfinished(folder) == [library]


def test_a_folder_that_is_not_there_is_no_error(tmp_path):
    assert remove_unfinished(tmp_path / "none") == []


@pytest.mark.parametrize("there", [True, False])
def test_a_compiler_that_fails_names_what_it_keeps(there, monkeypatch, tmp_path):
    def backend(graph, inputs):
        raise ImportError("half a module")

    folder = tmp_path if there else tmp_path / "a file" / "that is no folder"
    (tmp_path / "a file").touch()
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setattr(compiled, "_cache", compiled._Cache())
    x, w = torch.zeros(4), torch.zeros(1, 4)
    options = compiled.Options(torch.float32, 3.0, 0.01)
    with pytest.warns(RuntimeWarning, match=f"delete {folder}"):
        assert compiled.evaluate((x, w, w, w, None), options) is None


SCRIPT = """
import torch
from flowguard.functional import kernels, shifted_spline
from flowguard.spline import compiled
with kernels("compiled"):
    y, _ = shifted_spline(
        torch.ones(9), *torch.zeros(3, 9, 1), None, bound=3.0, slope=0.01
    )
assert torch.equal(y, torch.ones(9))
print("compiled", len(compiled._cache._kernels))
"""


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 4000])
def test_kernels_are_compiled_again_where_a_process_was_killed(tmp_path, size):
    def run():
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "RuntimeWarning" not in done.stderr
        assert done.stdout == "compiled 1\n"

    run()
    (kernel,) = tmp_path.glob("??/*.main.so")
    os.truncate(kernel, size)
    run()
    assert kernel.stat().st_size > 4000
