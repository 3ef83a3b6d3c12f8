r"""What is public says what it is, and is on a page of the reference."""

import ast
import functools
import importlib
import inspect
import pathlib
import re
import textwrap
from collections import Counter

import pytest
from torch import Tensor

from flowguard.cli import COMMANDS
from flowguard.hosts import HOSTS, PACKAGES, WRAPPERS
from flowguard.numerics import full_precision

ROOT = pathlib.Path(__file__).parent.parent
API = ROOT / "docs" / "api"
LEAST = 0.95  # of the public functions, classes and methods

#: A directive that puts what a module offers on a page, and its options.
SHOWN = re.compile(r"^\.\. automodule:: (\S+)\n((?:   :.*\n)*)", re.M)

#: Examples that cannot run everywhere, and why not.
UNRUN = {
    "flowguard.metrics.lpips": "its weights are downloaded",
    "flowguard.metrics.lpips_map": "its weights are downloaded",
}


def public(body, prefix=""):
    r"""Yields what is public: functions, classes, and the methods of these, properties too.

    A setter or an overload has the docstring of what it belongs to.
    """
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from public(node.body, prefix)
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        told = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if node.name.startswith("_") or told & {"setter", "deleter", "overload"}:
            continue
        yield prefix + node.name, ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("package", ["flowguard", "flowguard/integrations"])
def test_what_is_public_has_a_docstring(package):
    found = {
        f"{path.relative_to(ROOT)}: {name}": text
        for path in sorted((ROOT / package).rglob("*.py"))
        for name, text in public(ast.parse(path.read_text(encoding="utf-8")).body)
    }
    bare = [name for name, text in found.items() if not text]
    share = 1 - len(bare) / len(found)
    assert share >= LEAST, f"{100 * share:.1f} % of {len(found)}; without:\n" + "\n".join(bare)


# -- the pages ---------------------------------------------------------------------------------------


def sources():
    r"""Returns the syntax tree of each module, by its name."""
    found = {}
    for top in (ROOT / "flowguard", ROOT / "flowguard" / "integrations"):
        for path in top.rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
            found[name].package = name if path.stem == "__init__" else name.rpartition(".")[0]
    return found


TREES = sources()


def offered(module):
    r"""Returns what a module lists in `__all__`, but for the modules in it."""
    for node in TREES[module].body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            return [n for n in ast.literal_eval(node.value) if not is_module(module, n)]
    return []


def is_module(package, name):
    r"""Whether a name of a package means a module in it, and no function that is called like it."""
    return f"{package}.{name}" in TREES and origin(package, name) == (package, name)


@functools.cache
def imports(module):
    r"""Returns from where a module has the names that it imports of other modules of ours."""
    found = {}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom):
            up = TREES[module].package.split(".")
            base = up[: len(up) - node.level + 1] if node.level else []
            source = ".".join(filter(None, [*base, node.module]))
            if source in TREES and source != module:
                found |= {a.asname or a.name: (source, a.name) for a in node.names}
    return found


def origin(module, name):
    r"""Returns the module that makes what another offers under a name, and its name there."""
    entry = imports(module).get(name)
    return (module, name) if entry is None else origin(*entry)


def shown(page):
    r"""Yields the module and the name of all that a page shows."""
    for module, options in SHOWN.findall(page.read_text(encoding="utf-8")):
        told = dict(re.findall(r":([\w-]+):(.*)", options))
        left_out = {name.strip() for name in told.get("exclude-members", "").split(",")}
        if "members" in told:
            yield from ((module, name) for name in offered(module) if name not in left_out)


#: What a program that uses flowguard imports, and what it is built of.
SURFACE = [entry for page in sorted(API.glob("*.md")) for entry in shown(page)]
INSIDE = [entry for page in sorted(API.glob("*/*.md")) for entry in shown(page)]


def test_each_public_name_is_on_one_page():
    everything = {origin(module, name) for module in TREES for name in offered(module)}
    count = Counter(origin(module, name) for module, name in [*SURFACE, *INSIDE])
    assert len(everything) > 600
    assert sorted(everything - count.keys()) == []
    assert [name for name, times in count.items() if times > 1] == []


def test_what_packages_offer_is_on_the_first_pages():
    first = {origin(module, name) for module, name in SURFACE}
    doors = [m for m, tree in TREES.items() if tree.package == m or m.count(".") == 1]
    assert "flowguard.bounds" in doors
    assert "flowguard.metrics" in doors
    inner = {"flowguard.cli"}  # the names of the commands, which have a page of another kind
    missing = {(m, n) for m in doors for n in offered(m) if origin(m, n) not in first}
    assert {module for module, _ in missing} <= inner


def test_each_page_is_in_a_list_of_pages():
    for index in API.rglob("index.md"):
        told = index.read_text(encoding="utf-8")
        for page in index.parent.glob("*.md"):
            assert page == index or re.search(rf"^{page.stem}$", told, re.M), page
    assert re.search(r"^inside/index$", (API / "index.md").read_text(encoding="utf-8"), re.M)


def test_each_command_is_on_the_page_of_the_command_line():
    page = (API / "cli.md").read_text(encoding="utf-8")
    found = re.findall(r"^\.\. argparse::\n   :module: flowguard\.cli\.(\w+)\n", page, re.M)
    assert found == list(COMMANDS)


def test_values_say_what_they_are():
    bare = []
    for module, name in [*SURFACE, *INSIDE]:
        place, own = origin(module, name)
        lines = (ROOT / (place.replace(".", "/") + ".py")).with_suffix("")
        file = lines / "__init__.py" if lines.is_dir() else lines.with_suffix(".py")
        text = file.read_text(encoding="utf-8").splitlines()
        body = TREES[place].body
        for node, after in zip(body, [*body[1:], None], strict=True):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if own in [getattr(target, "id", None) for target in targets]:
                above = text[node.lineno - 2].startswith("#:")
                below = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if not above and not below and "  #: " not in text[node.lineno - 1]:
                    bare.append(f"{place}.{own}")
    assert bare == []


# -- what docstrings tell ----------------------------------------------------------------------------


def importable(module):
    r"""Whether the host of an adapter is installed; any other module is."""
    parts = module.split(".")
    host = parts[2] if parts[:2] == ["flowguard", "integrations"] and len(parts) > 2 else None
    if host not in (*HOSTS, *WRAPPERS):
        return True
    return any(map(importlib.util.find_spec, PACKAGES.get(host, (host,))))


def things(entries):
    r"""Yields the full name of each function and class, with what it is."""
    for module, name in entries:
        if importable(module):
            thing = getattr(importlib.import_module(module), name)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                yield f"{module}.{name}", thing


def methods(cls):
    r"""Yields the public methods and properties that a class makes itself, with their docstrings:
    those of what they override, where they have none."""
    for name, member in vars(cls).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function, inspect.getdoc(getattr(cls, name)) or ""


def told(name, thing):
    r"""Yields the names, what is called, and the docstring, of a function, or a class and its
    methods. Of a class that is what makes one."""
    doc = inspect.getdoc(thing) if thing.__doc__ else ""
    if not inspect.isclass(thing):
        yield name, thing, doc or ""
        return
    yield name, thing, doc or ""
    for method, function, text in methods(thing):
        yield f"{name}.{method}", function, text


def tree_of(thing):
    r"""Returns the syntax tree of a function, or of what makes an object of a class."""
    if inspect.isclass(thing):
        thing, owner = vars(thing).get("__init__"), thing
        if not getattr(thing, "__qualname__", "").startswith(owner.__qualname__):
            return ast.Module([], [])  # what typing gives to protocols
    if not inspect.isfunction(thing):
        return ast.Module([], [])
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):  # what dataclasses wrote
        return ast.Module([], [])


def raised(thing):
    r"""Returns the classes of the errors that a function raises itself."""
    found = set()
    for node in ast.walk(tree_of(thing)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found.add(ast.unparse(error).rpartition(".")[2])
    return {name for name in found if re.search(r"Error$|Warning$|Exception$", name)}


def section(doc, title):
    r"""Returns what a docstring says below a title."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", doc + "\n", re.M)
    return found[1] if found else ""


def says_what(name, thing):
    r"""Yields what has no docstring, nor overrides something that has."""
    for part, _, doc in told(name, thing):
        if not doc:
            yield part


def says_shapes(name, thing):
    r"""Yields what takes or returns tensors and tells no shape."""
    for part, function, doc in told(name, thing):
        try:
            signature = str(inspect.signature(function))
        except (TypeError, ValueError):  # of what is written in C
            continue
        if re.search(r"\bTensor\b", signature) and not re.search(r"\bshapes?\b", doc):
            yield part


def says_errors(name, thing):
    r"""Yields what raises something and does not name it."""
    for part, function, doc in told(name, thing):
        missing = raised(function) - set(re.findall(r"\w+", section(doc, "Raises")))
        if missing:
            yield f"{part}: {', '.join(sorted(missing))}"


def shows_itself(name, thing):
    r"""Yields what has no example that runs."""
    lines = re.findall(r"^ *>>> (.*)", thing.__doc__ or "", re.M)
    if not lines or (name not in UNRUN and all("doctest: +SKIP" in line for line in lines)):
        yield name


RULES = [says_what, says_shapes, says_errors, shows_itself]


@pytest.mark.parametrize("rule", RULES)
def test_all_that_users_import(rule):
    found = list(things(SURFACE))
    assert len(found) > 200
    assert [fault for name, thing in found for fault in rule(name, thing)] == []


@pytest.mark.parametrize("rule", [says_what, says_errors])
def test_all_that_it_is_built_of(rule):
    found = list(things(INSIDE))
    assert len(found) > 400
    assert [fault for name, thing in found for fault in rule(name, thing)] == []


class Planted:
    r"""A class that tells nothing."""

    def method(self, x: Tensor) -> Tensor:
        if not x.any():
            raise ValueError("x must not be zero; got zeros")
        return x


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        (says_what, "planted.method"),
        (says_shapes, "planted.method"),
        (says_errors, "planted.method: ValueError"),
        (shows_itself, "planted"),
    ],
)
def test_each_rule_finds_what_is_planted(rule, fault):
    assert list(rule("planted", Planted)) == [fault]
    assert list(rule("full_precision", full_precision)) == []
