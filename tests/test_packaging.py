r"""What is built and what is imported."""

import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folders(root, name):
    for init in sorted((ROOT / root).rglob("__init__.py")):
        parts = init.parent.relative_to(ROOT / root).parts
        yield ".".join((name, *parts))


def test_the_list_of_packages_is_complete():
    there = {
        *folders("flowguard", "flowguard"),
        *folders("integrations", "flowguard.integrations"),
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == there


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.split(b"\0")
    for name in filter(None, map(bytes.decode, files)):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield file.name, set(archive.namelist())


def test_the_wheel_holds_what_it_should(wheel):
    name, files = wheel
    assert name.startswith("flowguard_nf-")
    assert {f.split("/")[0] for f in files if ".dist-info" not in f} == {"flowguard"}
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        assert package.replace(".", "/") + "/__init__.py" in files
    assert "flowguard/py.typed" in files
    roots = {"flowguard": ROOT / "flowguard", "flowguard/integrations": ROOT / "integrations"}
    for package, root in roots.items():
        sources = {f"{package}/{p.relative_to(root).as_posix()}" for p in root.rglob("*.py")}
        assert sources <= files


def test_importing_flowguard_imports_no_host_and_no_optional_package():
    code = (
        "import sys, flowguard; "
        "print([m for m in ('zuko', 'nflows', 'normflows', 'skimage', 'matplotlib', 'PIL',"
        " 'sklearn', 'scipy', 'torchmetrics', 'flowguard.integrations') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == "[]"


def test_importing_flowguard_loads_no_wing_that_is_not_asked_for():
    code = (
        "import sys, flowguard; flowguard.RobustSpline; "
        "print(*(m for m in sys.modules if m.partition('.')[0] == 'flowguard'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    loaded = done.stdout.split()
    assert len(loaded) <= 45
    assert not {"flowguard.models", "flowguard.image", "flowguard.ood"} & set(loaded)


def test_the_public_names_are_there_when_asked_for():
    code = (
        "import flowguard, types; from flowguard import *; "
        "assert all(hasattr(flowguard, name) for name in flowguard.__all__);"
        "assert set(flowguard.__all__) <= set(dir(flowguard));"
        "assert flowguard.persistence.load is flowguard.models.load\n"
        "try: flowguard.certifi\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == "module 'flowguard' has no attribute 'certifi'"


def test_every_public_name_has_a_docstring():
    import flowguard

    for name in flowguard.__all__:
        if name != "__version__":
            assert getattr(flowguard, name).__doc__, name
