r"""Every block of code on every page runs as it stands, or says on the page what it needs.

Python blocks of a page run one after another in one namespace; those of a file (``# name.py`` in
their first line) are written to it first. Commands of shell blocks are read by the parser of the
program that they call. A comment above a block, which no reader sees, tells what is special:

- ``<!-- skip: needs X -->``: it cannot run here; the words of the page have to say ``X`` as well;
- ``<!-- fresh -->``: it begins a namespace of its own;
- ``<!-- slow -->``: it takes more than a few seconds, and so the page is left to ``-m slow``, as
  notebooks are.
"""

import argparse
import ast
import contextlib
import importlib
import itertools
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import flowguard
import flowguard.integrations
from flowguard import hosts
from flowguard.functional import kernels
from flowguard.spline import choice, compiled

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<kind>[^\n`]*)\n(?P<code>.*?)^(?P=indent)(?P=ticks) *$",
    re.DOTALL | re.MULTILINE,
)
MARK = re.compile(r"<!-- (skip|fresh|slow)(?:: (.*?))? -->\s*\Z", re.DOTALL)
CELLS = {"{code-cell} ipython3"}
PYTHON = {"python", *CELLS}
SHELL = {"sh"}
SHOWN = {"", "text", "markdown"}  # what is only shown: output, trees of folders

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclass(frozen=True)
class Block:
    r"""A block of code: its kind, its text, the line of the page it begins in, and its marks."""

    page: str
    kind: str
    code: str
    line: int
    marks: dict[str, str]

    @property
    def place(self):
        return f"{self.page}:{self.line}"

    @property
    def file(self):
        r"""The file that a block of Python is, by its first line, or nothing."""
        told = re.match(r"# ([\w/]+\.py)\n", self.code)
        return told[1] if told else None

    def compiled(self, filename):
        r"""Returns its code, whose lines have the numbers that they have on the page."""
        return compile("\n" * (self.line - 1) + self.code, filename, "exec")


def marks(above):
    r"""Returns the marks in the comments that end a text, the last of them first."""
    found = {}
    while told := MARK.search(above):
        found[told[1]] = " ".join((told[2] or "").split())
        above = above[: told.start()]
    return found


def blocks(page, text):
    r"""Yields the blocks of a page, in order."""
    for fence in FENCE.finditer(text):
        code = re.sub(rf"^{fence['indent']}", "", fence["code"], flags=re.MULTILINE)
        code = re.sub(r"^:[\w-]+:.*$", "", code, flags=re.MULTILINE)  # options of a cell
        line = text.count("\n", 0, fence.start("code")) + 1
        yield Block(page, fence["kind"].strip(), code, line, marks(text[: fence.start()]))


def words(text):
    r"""Returns what a reader sees of a page besides its blocks, in one line."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    return " ".join(re.sub(r"[`*]|\[|\]\([^)]*\)", "", text).split())


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def pages():
    yield from ("README.md", "CONTRIBUTING.md", "upstream/README.md")
    for file in sorted((ROOT / "docs").rglob("*.md")):
        if "_build" not in file.parts:
            yield file.relative_to(ROOT).as_posix()


PAGES = {page: text_of(page) for page in pages()}
BLOCKS = [block for page, text in PAGES.items() for block in blocks(page, text)]
OF_PYTHON = [block for block in BLOCKS if block.kind in PYTHON]
OF_SHELL = [block for block in BLOCKS if block.kind in SHELL]
SKIPPED = [block for block in BLOCKS if "skip" in block.marks]


def chapters():
    r"""Returns the Python blocks that share a namespace, by the place of the first of them."""
    found = {}
    for block in (b for b in OF_PYTHON if "skip" not in b.marks):
        last = next(reversed(found), None)
        if last is None or found[last][0].page != block.page or "fresh" in block.marks:
            found[last := block.place] = []
        found[last].append(block)
    return found


CHAPTERS = chapters()


def chapter_params():
    for place, run in CHAPTERS.items():
        # Cells of notebooks are run by the build of the site, too.
        slow = any("slow" in block.marks or block.kind in CELLS for block in run)
        yield pytest.param(run, id=place, marks=pytest.mark.slow if slow else ())


# -- Python ------------------------------------------------------------------------------------------


def imports(block):
    r"""Yields the packages that a block imports."""
    for node in ast.walk(ast.parse(block.code)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        yield from (name.partition(".")[0] for name in names)


def files_of(chapter):
    return {block.file.partition("/")[0].removesuffix(".py") for block in chapter if block.file}


@pytest.fixture
def place(tmp_path, monkeypatch):
    r"""A folder to run in, with the spline's kernels, the hosts and the figures as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("KERAS_BACKEND", "torch")  # a page sets it, too: it is as it was afterwards
    monkeypatch.setattr(choice, "_state", choice._State())
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # which is soon done
    monkeypatch.setattr(compiled, "_cache", compiled._Cache())
    before = set(sys.modules)
    with torch.random.fork_rng():
        yield tmp_path
    flowguard.unregister()
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.modules.pop("page", None)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@contextlib.contextmanager
def toyhost(folder):
    r"""The library of the recipe for hosts is one that flowguard knows."""
    with pytest.MonkeyPatch.context() as patch:
        adapters = [*flowguard.integrations.__path__, str(folder / "integrations")]
        patch.setattr(flowguard.integrations, "__path__", adapters)
        patch.setattr(hosts, "HOSTS", (*hosts.HOSTS, "toyhost"))
        yield


@contextlib.contextmanager
def installed(where):
    r"""Skips where a part of flowguard, or of its benchmarks, asks for what is not installed."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "flowguard").partition(".")[0]
        if "flowguard-nf[" in str(error) or find_spec(package) is None:
            pytest.skip(f"{where}: {error}")
        raise


def run(chapter, folder):
    r"""Runs blocks one after another; returns their namespace, and the warnings they gave."""
    (page,) = {block.page for block in chapter}
    module = types.ModuleType("page")
    # What is certified is read from its file: it has the lines of the page.
    module.__file__ = str(folder / "page.py")
    source = [""] * len(PAGES[page].splitlines())
    for block in chapter:
        source[block.line - 1 : block.line - 1 + block.code.count("\n")] = block.code.splitlines()
    Path(module.__file__).write_text("\n".join(source), encoding="utf-8")
    sys.modules["page"] = module
    known = toyhost(folder) if page == "CONTRIBUTING.md" else contextlib.nullcontext()
    with warnings.catch_warnings(record=True) as told, known:
        warnings.simplefilter("always")
        for block in chapter:
            for copied in re.findall(r"# a copy of (\S+)", block.code):
                shutil.copy((ROOT / page).parent / copied, folder)
            if block.file is None:
                with installed(block.place):
                    exec(block.compiled(module.__file__), vars(module))
                continue
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.code, encoding="utf-8")
            importlib.invalidate_caches()
    return vars(module), told


def readme_holds(scope, told, shown):
    assert any("1 of 2 contexts is out of distribution" in message for message in told)
    assert scope["guard"].report.flagged.tolist() == [False, True]
    assert scope["samples"].abs().max() < 40
    assert "level1" in shown


def sbi_holds(scope, told, shown):
    heard = [message for message in told if "not like the simulations" in message]
    assert len(heard) == 1
    assert "The observation [40, -3] is not like the simulations" in heard[0]
    (printed,) = [block.code for block in BLOCKS if block.kind == "text" and "sbi" in block.page]
    assert printed.replace("\n", " ").split(": ", 1)[1].split(" (alpha")[0] in heard[0]
    assert scope["samples"].shape == (500, 2)
    assert scope["report"].flagged.tolist() == [False, True]
    assert shown.endswith("True\nTrue\n")


def speed_holds(scope, told, shown):
    assert kernels.chosen() == "eager"
    assert all(f'"{name}"' in PAGES["docs/speed.md"] for name in choice.NAMES)
    assert choice.VARIABLE in PAGES["docs/speed.md"]


#: What pages say of their code, beyond that it runs.
SAID = {"README.md": readme_holds, "docs/sbi.md": sbi_holds, "docs/speed.md": speed_holds}


@pytest.mark.parametrize("chapter", list(chapter_params()))
def test_python_runs_as_it_stands(chapter, place, capsys):
    scope, told = run(chapter, place)
    if chapter[0].page in SAID:
        SAID[chapter[0].page](scope, [str(w.message) for w in told], capsys.readouterr().out)


def test_a_block_that_fails_is_found_at_its_line(place, monkeypatch):
    text = (
        "# Page\n\n<!-- fresh -->\n```python\nx = 1\n```\n\n- as in\n  ```python\n  y = z\n  ```\n"
    )
    monkeypatch.setitem(PAGES, "planted.md", text)
    chapter = list(blocks("planted.md", text))
    assert [block.marks for block in chapter] == [{"fresh": ""}, {}]
    with pytest.raises(NameError) as raised:
        run(chapter, place)
    assert raised.traceback[-1].lineno + 1 == text.splitlines().index("  y = z") + 1


def test_there_is_a_recipe_for_each_thing_to_add():
    recipes = re.findall(r"^## How to add an? (.*)$", PAGES["CONTRIBUTING.md"], re.MULTILINE)
    assert recipes == ["coupling", "encoder", "rule of bounds", "host"]


def test_one_line_mends_a_file_that_holds_a_copy_of_the_spline(place):
    r"""Most copies call the function by its name, from within the file."""
    pytest.importorskip("normflows")
    (line,) = (block.code for block in OF_PYTHON if "noqa" in block.code)
    source = Path(find_spec("normflows").origin).parent / "utils" / "splines.py"
    source = source.read_text(encoding="utf-8") + (
        "\n\ndef transform(*args, **options):\n"
        "    return unconstrained_rational_quadratic_spline(*args, **options)\n"
    )
    for name, text in (("stock_copy", source), ("mended_copy", source + line)):
        (place / f"{name}.py").write_text(text, encoding="utf-8")
    stock, mended = (importlib.import_module(name) for name in ("stock_copy", "mended_copy"))

    torch.manual_seed(0)
    shapes = [(2, 1, 50), *((2, 1, 50, k) for k in (10, 10, 9))]
    x, *params = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for inverse in (False, True):
        options = {"inverse": inverse, "tails": "linear", "tail_bound": 5.0}
        made = (module.transform(x, *params, **options) for module in (stock, mended))
        for a, b in zip(*made, strict=True):
            assert torch.allclose(a, b, atol=1e-9)
    params[0][0, 0, 7] = torch.nan
    with pytest.raises(AssertionError):
        stock.transform(x, *params, **options)
    y, _ = mended.transform(x, *params, **options)
    assert y.isnan().sum() == 1


@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in SKIPPED])
def test_what_does_not_run_here_is_at_least_python_of_today(block, place):
    r"""What it imports is there; the page says what else it needs, in words."""
    need = re.fullmatch(r"needs (.+)", block.marks["skip"])
    assert need, f"{block.place}: say what it needs: <!-- skip: needs ... -->"
    assert need[1] in words(PAGES[block.page]), f"{block.place}: the page does not say {need[1]!r}"
    if block.kind in PYTHON:
        tree = ast.parse(block.code)
        imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), block.place, "exec"), {})
    pytest.skip(block.marks["skip"])


#: What pages import of others: a name that is mistyped shall not pass for one that is missing.
OTHERS = {"bayesflow", "matplotlib", "nflows", "normflows", "pyro", "sbi", "torch", "zuko"}
OTHERS |= {"fix"}  # of a contribution, beside its page


def test_pages_import_what_is_known():
    names = {name for block in OF_PYTHON for name in imports(block)} - files_of(OF_PYTHON)
    assert names - set(sys.stdlib_module_names) - {"flowguard"} == OTHERS


def test_all_blocks_are_of_a_kind_that_is_tested():
    known = PYTHON | SHELL | SHOWN
    others = {b.place: b.kind for b in BLOCKS if b.kind not in known and b.kind[:1] != "{"}
    assert others == {}


# -- Commands ----------------------------------------------------------------------------------------


class Parsed(Exception):
    r"""A parser has taken its arguments."""


def commands(code):
    r"""Yields the words of each command of a shell block."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in re.split(r"\s(?:&&|\|)\s", line):
            if found := shlex.split(command, comments=True):
                yield found


def parsed_by_flowguard(arguments, monkeypatch):
    from flowguard.cli import COMMANDS, main

    taken = []
    for name in COMMANDS:
        module = importlib.import_module(f"flowguard.cli.{name}")
        monkeypatch.setattr(module, "run", lambda args: taken.append(args) or 0)
    assert main.main(arguments) == 0
    assert taken


def parsed_by_a_script(file, arguments, monkeypatch):
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / file).parent))
    with installed(file), pytest.raises(Parsed):
        runpy.run_path(str(ROOT / file), run_name="__main__")


def parsed_by_torchrun(arguments, monkeypatch):
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(arguments)
    assert args.module
    assert args.training_script == "flowguard"
    parsed_by_flowguard(args.training_script_args, monkeypatch)


def parsed_by_pip(arguments):
    r"""The extras are those of the project, the files are there."""
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    for before, word in itertools.pairwise(arguments):
        own = re.fullmatch(r"(?:\.|flowguard-nf)\[([\w,]+)\]", word)
        assert not own or set(own[1].split(",")) <= set(extras), word
        assert before != "-c" or (ROOT / word).exists(), word


def parsed_by_a_tool(command):
    r"""Tools of others read what comes before ``--help``."""
    pytest.importorskip(command[2])
    if "-n" in command:
        pytest.importorskip("xdist")
    if command[1:3] == ["-m", "pytest"]:
        command = [*command, "--noconftest"]  # which takes its time
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def parsed(command, monkeypatch):
    while re.fullmatch(r"[A-Z_]+=\S*", command[0]):
        name, _, value = command[0].partition("=")
        monkeypatch.setenv(name, value)
        command = command[1:]
    program, *arguments = command
    match command:
        case "flowguard", "--version":
            assert subprocess.run(command, capture_output=True).returncode == 0
        case "flowguard", *_:
            parsed_by_flowguard(arguments, monkeypatch)
        case "python", "-m", "flowguard", *rest:
            parsed_by_flowguard(rest, monkeypatch)
        case "python", "-m", "venv", _:
            pass
        case "python", "-m", tool, *rest:
            parsed_by_a_tool([sys.executable, "-m", tool, *rest])
        case "python", file, *rest:
            parsed_by_a_script(file, rest, monkeypatch)
        case "torchrun", *_:
            parsed_by_torchrun(arguments, monkeypatch)
        case "srun", "--ntasks", _, "flowguard", *rest:
            parsed_by_flowguard(rest, monkeypatch)
        case "pip", *_:
            parsed_by_pip(arguments)
            parsed_by_a_tool([sys.executable, "-m", *command])
        case ("bash", file):
            assert (ROOT / file).exists()
        case (".", ".venv/bin/activate"):
            pass
        case ("ruff" | "mypy", *_):
            parsed_by_a_tool([sys.executable, "-m", *command])
        case _:
            pytest.fail(f"nobody knows how {program} reads its arguments: {shlex.join(command)}")


def test_a_command_of_nobody_fails(monkeypatch):
    with pytest.raises(SystemExit):
        parsed(["flowguard", "train", "superres", "--stepps", "3"], monkeypatch)
    with pytest.raises(AssertionError, match="flowguard-nf"):
        parsed(["pip", "install", "flowguard-nf[zukko]"], monkeypatch)
    with pytest.raises(SystemExit):
        parsed(["python", "benchmarks/spline.py", "--binss", "3"], monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="nobody knows"):
        parsed(["rm", "everything"], monkeypatch)


def command_params():
    for block in (b for b in OF_SHELL if "skip" not in b.marks):
        for i, command in enumerate(commands(block.code)):
            yield pytest.param(command, id=f"{block.place}-{i}")


@pytest.mark.parametrize("command", list(command_params()))
def test_a_command_is_one_that_its_program_takes(command, place, monkeypatch):
    parsed(command, monkeypatch)


def scripts_in_words():
    for page, text in PAGES.items():
        for told in re.findall(r"`(python [\w/]+\.py[^`]*)`", FENCE.sub("", text)):
            yield pytest.param(shlex.split(told), id=f"{page}-{' '.join(told.split())[:60]}")


@pytest.mark.parametrize("command", list(scripts_in_words()))
def test_a_script_that_is_named_takes_what_it_is_given(command, place, monkeypatch):
    parsed(command, monkeypatch)


def test_ci_calls_the_test_command_of_the_readme():
    (command,) = re.findall(r"^pip install .*\[test\].*$", PAGES["README.md"], re.MULTILINE)
    assert " && " in command
    assert "README.md" in text_of(".ci/run")


# -- Links -------------------------------------------------------------------------------------------


def anchors(text):
    r"""Returns what headings of a page are linked by."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


# Models carry their cards with them, to where no other page is.
CARDS = [
    file.relative_to(ROOT).as_posix() for file in ROOT.glob("flowguard/models/shipped/*/*.md")
]


@pytest.mark.parametrize("page", [*PAGES, *CARDS])
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", FENCE.sub("", text_of(page))):
        file, _, anchor = target.partition("#")
        place = (ROOT / page).parent / file if file else ROOT / page
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place.read_text(encoding="utf-8")), target
