r"""What is built and what is imported."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folders(root, name):
    for init in sorted((ROOT / root).rglob("__init__.py")):
        parts = init.parent.relative_to(ROOT / root).parts
        yield ".".join((name, *parts))


def test_the_list_of_packages_is_complete():
    there = {
        *folders("flowguard", "flowguard"),
        *folders("flowguard/integrations", "flowguard.integrations"),
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == there


def lower_bounds():
    groups = PYPROJECT["project"]["optional-dependencies"].values()
    for need in (*PYPROJECT["project"]["dependencies"], *(n for group in groups for n in group)):
        name, _, version = need.partition(">=")
        if version:
            yield name, version


def numbers(version):
    found = [int(n) for n in version.split(".")]
    return found + [0] * (3 - len(found))


def test_the_oldest_releases_are_the_lower_bounds():
    text = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line)
    bounds = dict(lower_bounds())
    assert {name: numbers(bounds[name]) for name in pins} == {
        name: numbers(version) for name, version in pins.items()
    }
    core = {need.partition(">=")[0] for need in PYPROJECT["project"]["dependencies"]}
    assert {*core, "zuko", "nflows", "normflows", "pyro-ppl", "sbi", "lampe"} <= set(pins)


def test_what_cites_the_project_names_its_version():
    from flowguard import __version__

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == __version__


def test_the_recipe_asks_for_what_the_package_asks_for():
    recipe = (ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8")
    needs = dict(re.findall(r"^    - ([\w-]+) >=([\w.]+)$", recipe, re.MULTILINE))
    needs["torch"] = needs.pop("pytorch")
    cli = PYPROJECT["project"]["optional-dependencies"]["cli"]
    for need in (*PYPROJECT["project"]["dependencies"], *cli):
        name, _, version = need.lower().partition(">=")
        assert needs[name] == version, name
    assert ">=" + needs["python"] == PYPROJECT["project"]["requires-python"]


def test_the_workflow_runs_what_is_run_here():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: bash .ci/run" in workflow
    assert "-c .ci/oldest.txt" in workflow
    told = {c.rpartition(" ")[2] for c in PYPROJECT["project"]["classifiers"] if ":: 3." in c}
    assert set(re.findall(r'"(3\.\d+)"', workflow)) == told


def test_the_wheel_brings_the_page_for_an_index(wheel):
    with zipfile.ZipFile(wheel[0]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        page = archive.read(name).decode("utf-8")
    assert "Description-Content-Type: text/markdown" in page
    assert "# flowguard" in page


def test_links_of_the_page_on_an_index_are_whole():
    address = "https://example.org/flowguard"
    code = "import runpy, sys; print(runpy.run_path('setup.py')['absolute'](sys.argv[1], sys.argv[2]))"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # A process of its own: setuptools wants to be there before distutils.
    done = subprocess.run(
        [sys.executable, "-c", code, readme, address],
        capture_output=True, text=True, check=True, cwd=ROOT, encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    page = done.stdout
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(targets) > 10
    for target in targets:
        assert target.startswith(("https://", "#")), target
        if target.startswith(address):
            kind, _, file = target.removeprefix(address + "/").partition("/main/")
            assert (ROOT / file.partition("#")[0]).exists(), target
            assert kind == ("raw" if file.endswith((".png", ".svg")) else "blob"), target


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of the project, without what was built of them."""
    folder = tmp_path_factory.mktemp("source")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("it is no checkout of git, which knows what belongs to the project")
    for name in filter(None, map(bytes.decode, listed.stdout.split(b"\0"))):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def built(source, what):
    """Runs the build here: an environment of its own would be downloaded for each test."""
    out = source.parent / f"{source.name}-{what}"
    out.mkdir(exist_ok=True)
    code = f"import sys, setuptools.build_meta as b; b.build_{what}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(source):
    file = built(source, "wheel")
    with zipfile.ZipFile(file) as archive:
        yield file, set(archive.namelist())


def test_the_source_distribution_holds_what_its_tests_need(source):
    with tarfile.open(built(source, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kept = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    left_out = {n for n in kept - names if not n.startswith("integrations/")}
    assert {n for n in left_out if "egg-info" not in n and not n.startswith("build/")} == set()
    adapters = (p.relative_to(ROOT) for p in (ROOT / "flowguard/integrations").rglob("*.py"))
    assert {path.as_posix() for path in adapters} <= names


def test_an_editable_install_is_a_path_that_type_checkers_follow(source):
    with zipfile.ZipFile(built(source, "editable")) as archive:
        names = archive.namelist()
        assert not [n for n in names if n.endswith(".py")]  # such as a hook of the import
        (path,) = (archive.read(n).decode() for n in names if n.endswith(".pth"))
    root = pathlib.Path(path.strip())
    assert (root / "flowguard" / "py.typed").is_file()
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        assert (root / package.replace(".", "/") / "__init__.py").is_file()


USER = """
from torch import Tensor

import flowguard
from flowguard.integrations.zuko import RobustNSF
from flowguard.models import SuperResolutionFlow


def shown(y: Tensor) -> float:
    guard = flowguard.OODConditioner(policy="warn", alpha=0.01).fit(y, progress=False)
    flow = RobustNSF(2, 2, bins=8)
    reveal_type(guard)
    reveal_type(flow)
    reveal_type(SuperResolutionFlow(scale=2))
    return flowguard.certify(flow).bound(3.0)


flowguard.OODConditioner(policy="wrong")
"""

#: torch is left out: it takes a minute to be read.
STRICT = """
[mypy]
strict = true
[mypy-torch.*,numpy.*,einops.*,safetensors.*]
follow_imports = skip
[mypy-zuko.*,nflows.*,normflows.*]
ignore_missing_imports = true
"""


@pytest.mark.slow
def test_a_users_file_is_checked_strictly_against_an_editable_install(source, tmp_path):
    with zipfile.ZipFile(built(source, "editable")) as archive:
        (path,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".pth"))
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").rglob("site-packages")
    beside = pathlib.Path(torch.__file__).parents[1]  # where torch is
    (site / "flowguard.pth").write_text(f"{path.strip()}\n{beside}\n")
    (tmp_path / "mine.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(STRICT)
    options = ["--python-executable", str(tmp_path / "venv" / "bin" / "python"), "mine.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options], cwd=tmp_path, capture_output=True, text=True
    )
    told = re.findall(r"Revealed type is \"([\w.]+)\"", done.stdout)
    assert told == [
        "flowguard.ood.conditioner.OODConditioner",
        "flowguard.integrations.zuko.flows.RobustNSF",
        "flowguard.models.superres.SuperResolutionFlow",
    ], done.stdout
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout
    assert 'Argument "policy" to "OODConditioner" has incompatible type' in errors[0]


def test_the_wheel_holds_what_it_should(wheel):
    file, files = wheel
    assert file.name.startswith("flowguard_nf-")
    assert {f.split("/")[0] for f in files if ".dist-info" not in f} == {"flowguard"}
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        assert package.replace(".", "/") + "/__init__.py" in files
    assert "flowguard/py.typed" in files
    roots = {
        "flowguard": ROOT / "flowguard",
        "flowguard/integrations": ROOT / "flowguard/integrations",
    }
    for package, root in roots.items():
        sources = {f"{package}/{p.relative_to(root).as_posix()}" for p in root.rglob("*.py")}
        assert sources <= files
    shipped = {f.relative_to(ROOT).as_posix() for f in ROOT.glob("flowguard/models/shipped/*/*")}
    assert len(shipped) == 6
    assert shipped <= files


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


def test_no_wing_loads_the_compiler_before_it_is_used():
    """Which would be two thousand modules more, and longer than all else together."""
    code = (
        "import sys, torch; before = 'torch._dynamo' in sys.modules; "
        "import flowguard.ood, flowguard.models, flowguard.migration, flowguard.training; "
        "guard = flowguard.OODConditioner(policy='report').fit(torch.randn(64, 2), progress=False); "
        "guard.calibrate(torch.randn(2048, 2), progress=False).eval()(torch.zeros(1, 2)); "
        "print(before, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    before, after = done.stdout.split()
    assert after == before  # torch itself may have loaded it


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
