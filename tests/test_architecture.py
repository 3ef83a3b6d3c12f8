r"""The rules of the layout, read from the syntax tree; docs/architecture.md draws them.

Each rule is a function from all modules to what breaks it, and is shown to find a planted violation.
"""

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from flowguard import hosts

ROOT = Path(__file__).parents[1]
#: A link to the folder of the root in a checkout, the folder itself in a source distribution.
ADAPTERS = ROOT / "flowguard" / "integrations"
FOLDERS = {"flowguard": ROOT / "flowguard", "flowguard.integrations": ADAPTERS}

#: The floors: whatever stands on one imports what is below it, or itself.
GROUND = {"_version", "numerics", "hosts", "io", "metrics"}
LADDER = [
    GROUND,
    {"spline"},
    {"functional"},
    {"transforms"},
    {"bounds"},
    {"migration"},
    {"autoregression", "image"},
    {"models"},
    {"data"},
    {"training"},
    {"demo"},
    {"app"},
    {"cli"},
]
FLOOR = {wing: floor for floor, wings in enumerate(LADDER) for wing in wings}
TOP = {"benchmarks", "examples"}  # folders of the root that tests mirror
FILES = {"__init__", "__main__", "_version", "hosts"}
FILES |= {"numerics", "functional", "transforms", "autoregression", "data", "metrics"}

#: Who may import the kernels of the splines, and what else an adapter may take of the core.
KERNELS = "flowguard.spline"
KERNEL_USERS = ("flowguard.functional", "flowguard.transforms", "flowguard.image.maps")
KERNEL_USERS += ("flowguard.migration", KERNELS)
FOR_ADAPTERS = {w for wings in LADDER[: LADDER.index({"models"})] for w in wings} - {"spline"}
FOR_ADAPTERS |= {"ood"}

HOSTS = {host: {host, *hosts.PACKAGES.get(host, ())} for host in (*hosts.HOSTS, *hosts.WRAPPERS)}
LIBRARIES = set().union(*HOSTS.values())

#: The names of the contract that two hosts, or a host and the core, have in common.
SHARED_NAMES = {"ConditionalMultiscaleFlow", "ConditionalMultiscaleTransform"}

#: Private attributes of named tuples, torch and hosts that the rules of bounds have to read, and
#: whose names we have given to something too.
THEIRS = {"_replace", "_inv", "_transform", "_shape", "_shift", "_permutation"}
THEIRS |= {"_elementwise_forward", "_transform_dim_multiplier", "_output_dim_multiplier"}
THEIRS |= {"_compute_params", "_cached_x_y"}

#: What imports a module whose name it is given.
IMPORTERS = r"(^|\.)(import_module|__import__)$"

#: What factorises matrices by LU. A batch of large ones never ends with two threads on some
#: processors, while single ones do: `numerics` goes matrix by matrix, and nothing else may.
BY_LU = {"inv", "inv_ex", "inverse", "lu", "lu_factor", "lu_factor_ex", "lu_solve"}
BY_LU |= {"solve", "solve_ex", "tensorinv", "tensorsolve", "matrix_power", "det", "logdet"}
BY_LU |= {"slogdet"}

#: Those among them whose name says it even as a method of a tensor.
TELLING = {"det", "logdet", "slogdet", "lu_solve", "matrix_power"}

Modules = dict[str, ast.Module]


class Import(NamedTuple):
    r"""An import of a module, or of a name of it, by whatever it is called then."""

    who: str
    what: str
    name: str  # empty for the module itself
    called: str


@pytest.fixture(scope="module")
def modules() -> Modules:
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(p for p in parts if p != "__init__")))
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
            found[name].is_package = file.stem == "__init__"
    return found


def imports(modules: Modules) -> list[Import]:
    r"""All imports: those inside functions, for type checkers, and by name too."""
    found = []
    for who, tree in modules.items():
        package = who if getattr(tree, "is_package", False) else who.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.search(IMPORTERS, ast.unparse(node.func)):
                names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
                found += [Import(who, name, "", "") for name in names]
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    called = alias.asname or alias.name.partition(".")[0]
                    found.append(Import(who, alias.name, "", called))
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    up = package.split(".")
                    base = ".".join([*up[: len(up) - node.level + 1], *filter(None, [base])])
                for alias in node.names:
                    whole, called = f"{base}.{alias.name}", alias.asname or alias.name
                    is_module = whole in modules
                    what, name = (whole, "") if is_module else (base, alias.name)
                    found.append(Import(who, what, name, called))
    return found


def ours(module: str) -> bool:
    return module.partition(".")[0] == "flowguard"


def adapter(module: str) -> str | None:
    r"""The host of an adapter's module."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["flowguard", "integrations"] and len(parts) > 2 else None


def wing(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def climbs(modules: Modules) -> list[str]:
    r"""Rule 1: imports of the core that point up, or sideways."""
    broken = []
    for who, what, *_ in imports(modules):
        if not ours(who) or not ours(what) or who.startswith("flowguard.integrations"):
            continue
        here, there = wing(who), wing(what)
        if here in ("", "__main__") or here == there:  # the face of the package sees everything
            continue
        if here == "ood":
            allowed = there in GROUND
        elif there == "ood":
            allowed = FLOOR[here] > FLOOR["spline"]
        else:
            allowed = there in FLOOR and here in FLOOR and FLOOR[there] < FLOOR[here]
            allowed |= here in GROUND and there in GROUND
        if not allowed:
            broken.append(f"{who} imports {what}")
    return broken


def touches_kernels(modules: Modules) -> list[str]:
    r"""Rule 2: who imports the kernels, and may not."""
    broken = []
    for who, what, *_ in imports(modules):
        inplace = f"{KERNELS}.inplace"
        if _within(what, inplace):
            allowed = _within(who, inplace) or who == f"{KERNELS}.autograd"
        elif _within(what, KERNELS):
            allowed = any(_within(who, user) for user in KERNEL_USERS)
            allowed |= adapter(who) is not None and what == f"{KERNELS}.invert"
        else:
            continue
        if not allowed:
            broken.append(f"{who} imports {what}")
    return broken


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def leaks(modules: Modules) -> list[str]:
    r"""Rule 3: names with a leading underscore that are used in another file."""
    broken = [
        f"{who} takes {what}.{name}"
        for who, what, name, _ in imports(modules)
        if ours(what) and (_private(name) or _is_hidden(what))
    ]
    made = {who: set(_definitions(tree)) for who, tree in modules.items()}
    everywhere = set().union(*made.values()) - THEIRS
    for who, tree in modules.items():
        for node in ast.walk(tree):
            taken = _taken(node)
            if _private(taken) and taken in everywhere - made[who]:
                broken.append(f"{who} takes {ast.unparse(node)}")
    return broken


def _taken(node: ast.AST) -> str:
    r"""The attribute that an expression takes."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
        name = node.args[1]
        return name.value if isinstance(name, ast.Constant) else ""
    return ""


def _definitions(tree: ast.Module) -> Iterator[str]:
    r"""The private names that a file makes: of functions, classes, values and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names = [node.id if isinstance(node, ast.Name) else node.attr]
        else:
            continue
        yield from filter(_private, names)


def _is_hidden(module: str) -> bool:
    return module != "flowguard._version" and any(map(_private, module.split(".")))


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def strays(modules: Modules) -> list[str]:
    r"""Rule 4: adapters that reach too high, and hosts outside of their own adapter."""
    broken = []
    for who, what, *_ in imports(modules):
        host = adapter(who)
        if host is not None and ours(what):
            other = adapter(what)
            fine = other == host if other else wing(what) in FOR_ADAPTERS
            if not fine and not _within(what, f"{KERNELS}.invert"):
                broken.append(f"{who} imports {what}")
        if who == "flowguard.integrations" and ours(what):
            broken.append(f"{who} imports {what}")  # it is the folder of the adapters, and no more
        library = what.partition(".")[0]
        if library in LIBRARIES and library not in HOSTS.get(host or "", ()):
            broken.append(f"{who} imports {what}")
    for who, tree in modules.items():
        if adapter(who) is None and who != "flowguard.hosts":
            broken += [f"{who} names {text!r}" for text in _names(tree) & LIBRARIES]
    return broken


def _names(tree: ast.Module) -> set[str]:
    r"""The words that a file's code consists of: names, and strings without spaces."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.split(r"\W", node.value)) if " " not in node.value else set()
        else:
            fields = (
                getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")
            )
            found |= {field for field in fields if isinstance(field, str)}
    return found


def circles(modules: Modules) -> list[str]:
    r"""Rule 5: modules, or folders, that import each other in a loop."""
    files, folders = defaultdict(set), defaultdict(set)
    for who, what, *_ in imports(modules):
        if what in modules and what != who:
            files[who].add(what)
            a, b = _folder(who), _folder(what)
            if a != b and "flowguard" not in (a, b):
                folders[a].add(b)
    return [*_loops(files), *_loops(folders)]


def _folder(module: str) -> str:
    r"""The wing or the adapter that a module is in, with all below it."""
    return ".".join(module.split(".")[: 3 if adapter(module) else 2])


def _loops(arrows: dict[str, set[str]]) -> list[str]:
    r"""A loop through each arrow that closes one."""
    found, done, path = [], set(), []

    def walk(name: str) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            path.append(name)
            for other in sorted(arrows.get(name, ())):
                walk(other)
            done.add(path.pop())

    for name in sorted(arrows):
        walk(name)
    return found


def twins(modules: Modules) -> list[str]:
    r"""Rule 6: public classes of the same name."""
    homes = defaultdict(list)
    for who, tree in modules.items():
        for node in _top(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(who)
    return [
        f"{name} is in {' and in '.join(sorted(places))}"
        for name, places in homes.items()
        if len(places) > 1
        and not (name in SHARED_NAMES and sum(adapter(p) is None for p in places) <= 1)
    ]


def factorises(modules: Modules) -> list[str]:
    r"""Rule 7: factorisations by LU, as functions and as methods, outside of `numerics`."""
    broken = []
    for who, what, name, _ in imports(modules):
        if what.partition(".")[0] == "torch" and name in BY_LU and who != "flowguard.numerics":
            broken.append(f"{who} takes {what}.{name}")
    for who, tree in modules.items():
        for node in ast.walk(tree) if who != "flowguard.numerics" else ():
            if _factorises(node):
                broken.append(f"{who} takes {ast.unparse(node)}")
    return broken


def _factorises(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):  # our own layers have an `inverse` too, of something
        method = isinstance(node.func, ast.Attribute) and node.func.attr == "inverse"
        return method and not node.args and not node.keywords
    name = _taken(node)
    if isinstance(node, ast.Attribute):
        of_torch = re.search(r"(^|\.)(torch|linalg)$", ast.unparse(node.value))
        return name in (BY_LU if of_torch else TELLING)
    return name in TELLING


def _top(tree: ast.AST) -> Iterator[ast.stmt]:
    r"""The statements of a file, those under a condition or a handler too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _top(node)


@pytest.mark.parametrize(
    "rule", [climbs, touches_kernels, leaks, strays, circles, twins, factorises]
)
def test_the_house_keeps_its_rules(rule, modules):
    assert rule(modules) == []


def test_the_root_holds_these_files_alone():
    assert {file.stem for file in FOLDERS["flowguard"].glob("*.py")} == FILES
    wings = {f.name for f in FOLDERS["flowguard"].iterdir() if (f / "__init__.py").exists()}
    assert wings == {*FLOOR, "ood", "integrations"} - {file for file in FLOOR if file in FILES}
    assert {file.stem for file in FOLDERS["flowguard.integrations"].glob("*.py")} == {"__init__"}


#: Tests of what no single file of that name is for.
ACROSS = {
    "bounds/test_fuzz.py",  # all rules of the core and of the adapters
    "integrations/nflows/test_layers.py",  # all that is drawn from nflows' own layers
    "models/test_golden.py",
    "models/test_migrated.py",
    "models/test_published.py",
    "ood/test_guard.py",
    "spline/test_golden.py",
    "spline/test_memory.py",
}


def test_the_tests_mirror_the_tree():
    homeless = set()
    for file in (ROOT / "tests").glob("*/**/test_*.py"):
        path = file.relative_to(ROOT / "tests")
        place = ROOT / path.parent if path.parts[0] in TOP else ROOT / "flowguard" / path.parent
        source = place / path.stem.removeprefix("test_")
        if not source.with_suffix(".py").exists() and not source.is_dir():
            homeless.add(path.as_posix())
    assert homeless == ACROSS


PLANTED = {
    "up": (climbs, "flowguard.image.planted", "from flowguard.models import SuperResolutionFlow"),
    "up, in a function": (
        climbs,
        "flowguard.bounds.planted",
        "def f():\n    import flowguard.cli",
    ),
    "up, for types": (
        climbs,
        "flowguard.spline.planted",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flowguard import transforms",
    ),
    "up, by name": (
        climbs,
        "flowguard.bounds.planted",
        "import importlib as i\ni.import_module('flowguard.models.base')",
    ),
    "one floor up": (climbs, "flowguard.data.planted", "from flowguard import training"),
    "the face": (climbs, "flowguard.demo.planted", "from flowguard import certify"),
    "ood beyond the ground": (climbs, "flowguard.ood.planted", "import flowguard.functional"),
    "kernels": (touches_kernels, "flowguard.image.planted", "from flowguard.spline import bin"),
    "kernels by an adapter": (
        touches_kernels,
        "flowguard.integrations.zuko.planted",
        "from flowguard.spline.two import evaluate",
    ),
    "in place": (touches_kernels, "flowguard.spline.planted", "import flowguard.spline.inplace"),
    "a private name": (leaks, "flowguard.cli.planted", "from flowguard.data import _private"),
    "a private attribute": (
        leaks,
        "flowguard.cli.planted",
        "from flowguard.models import base\nbase._in_words()",
    ),
    "a private method of an object": (
        leaks,
        "flowguard.image.planted",
        "def f(x):\n    return x._in_words()",
    ),
    "a private attribute by name": (leaks, "flowguard.io.planted", "getattr(x, '_in_words')"),
    "a private attribute from the face": (
        leaks,
        "flowguard.cli.planted",
        "from flowguard import models\nmodels.base._in_words()",
    ),
    "a private module": (leaks, "flowguard.image.planted", "import flowguard.image._secret"),
    "a sibling's private attribute": (
        leaks,
        "flowguard.integrations.nflows.planted",
        "from . import rules as there\nthere._in_words()",
    ),
    "an adapter above images": (
        strays,
        "flowguard.integrations.nflows.planted",
        "from flowguard.models import LowLightFlow",
    ),
    "an adapter of another host": (
        strays,
        "flowguard.integrations.nflows.planted",
        "from flowguard.integrations.zuko import rules",
    ),
    "another host": (strays, "flowguard.integrations.zuko.planted", "import normflows.flows"),
    "a host in the core": (strays, "flowguard.image.planted", "import zuko"),
    "the name of a host in the core": (
        strays,
        "flowguard.migration.planted",
        "from importlib import import_module\nimport_module('nflows.transforms')",
    ),
    "a host by name in an adapter": (
        strays,
        "flowguard.integrations.zuko.planted",
        "__import__('nflows.transforms')",
    ),
    "the folder of the adapters": (
        strays,
        "flowguard.integrations",
        "from flowguard.models import LowLightFlow",
    ),
    "a host as an argument": (strays, "flowguard.image.planted", "def f(zuko): pass"),
    "a host in a path": (strays, "flowguard.image.planted", "PATH = 'zuko/flows'"),
    "a circle": (circles, "flowguard.image.maps", "from flowguard.image import flow"),
    "a circle of folders": (
        circles,
        "flowguard.spline.planted",
        "import flowguard.bounds.regions",
    ),
    "twins": (twins, "flowguard.image.planted", "class RobustSpline:\n    pass"),
    "twins under a condition": (
        twins,
        "flowguard.image.planted",
        "try:\n    pass\nexcept ImportError:\n    class RobustSpline: pass",
    ),
    "twins in the core": (
        twins,
        "flowguard.image.planted",
        "class ConditionalMultiscaleFlow:\n    pass",
    ),
    "a batch of inverses": (
        factorises,
        "flowguard.image.planted",
        "import torch\nback = torch.linalg.inv(torch.stack([m.weight for m in layers]))",
    ),
    "a factorisation by another name": (
        factorises,
        "flowguard.integrations.zuko.planted",
        "from torch.linalg import lu_factor as f",
    ),
    "a factorisation handed on": (
        factorises,
        "flowguard.bounds.planted",
        "import torch.linalg as linalg\nfound = map(linalg.solve, a, b)",
    ),
    "a determinant as a method": (factorises, "flowguard.models.planted", "ladj = w.slogdet()[1]"),
    "an inverse as a method": (factorises, "flowguard.ood.planted", "back = w.mT.inverse()"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_rule_finds_a_planted_violation(name, modules):
    rule, where, source = PLANTED[name]
    before = set(rule(modules))
    found = set(rule({**modules, where: ast.parse(source)})) - before
    assert any(where.rpartition(".")[0] in told for told in found)


def test_the_page_and_the_picture_show_the_ladder_that_is_held():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    (ladder,) = re.findall(r"from the ground up: (.*?)\. A wing", page)
    assert [set(re.findall(r"`(\w+)`", floor)) for floor in ladder.split(" < ")] == LADDER
    drawn = re.findall(r'class="n"[^>]*>(\w+)<', picture)
    assert set(drawn) == {*FLOOR, "ood", "integrations"} - {"_version"}
    heights = {name: i for i, name in enumerate(drawn)}
    for lower, upper in itertools.pairwise(LADDER[1:]):
        assert min(heights[n] for n in lower) > max(heights[n] for n in upper)
