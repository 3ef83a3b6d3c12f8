r"""``flowguard doctor``. It runs where no more than the core's own packages are installed, too."""

__all__ = ["HELP", "parser", "run"]

import importlib
import importlib.util
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.torch_version import TorchVersion

from flowguard import hosts
from flowguard._version import __version__

if TYPE_CHECKING:
    from flowguard.cli.parsing import Parser

#: What the command does, in one line.
HELP = "tell what is installed, what is missing, and what will not work"

OURS = "flowguard-nf"
PARTS = re.compile(r'([\w.-]+)(?:\[([\w,-]+)\])?\s*([^;]*)(?:;.*extra == [\'"]([\w-]+)[\'"])?')


class Requirement(NamedTuple):
    r"""A package that this one, or an extra of it, needs.

    Arguments:
        package: The name of the distribution.
        extras: Those of its extras that are needed.
        versions: The releases that will do, such as ``">=1.4"``.
        extra: The extra of ours that needs it; empty for the core.
    """

    package: str
    extras: tuple[str, ...]
    versions: str
    extra: str


class Finding(NamedTuple):
    r"""A line of what was found.

    Arguments:
        text: The line.
        wrong: Whether something will not work for it.
    """

    text: str
    wrong: bool = False


def parser() -> "Parser":
    r"""Returns the parser."""
    from flowguard.cli.parsing import Parser

    doctor = Parser(
        description=(
            "Print versions, libraries of flows, the machine and the kernels in use, and what is"
            " missing for which extra. The exit code is 1 if something will not work."
        )
    )
    doctor.add_argument(
        "--device", default="cpu", metavar="NAME", help="a device to try (default: cpu)"
    )
    doctor.add_argument(
        "--extra",
        nargs="+",
        metavar="NAME",
        help="extras that have to be complete, such as train",
    )
    doctor.add_config()
    return doctor


def run(args: Any) -> int:
    r"""Prints what was found.

    Arguments:
        args: The arguments.
    """
    return report(args.device, args.extra or ())


def report(device: str = "cpu", needed: Sequence[str] = ()) -> int:
    r"""Prints what was found, and returns the exit code: 1 if something will not work.

    Arguments:
        device: A device to try.
        needed: The extras that have to be complete.
    """
    wanted = requirements(metadata.requires(OURS) or ())
    parts = {
        "Versions": versions(wanted),
        "Libraries of flows": libraries(),
        "Machine": machine(device),
        "Kernels": kernels(device),
        "Extras": extras(wanted, needed),
    }
    wrong = []
    for title, findings in parts.items():
        print(f"{title}:")
        for finding in findings:
            print(f"  {'! ' if finding.wrong else '  '}{finding.text}", flush=True)
            wrong += [finding.text] if finding.wrong else []
    print(f"\n{len(wrong)} thing(s) will not work:" if wrong else "\nAll that is installed works.")
    for text in wrong:
        print(f"  ! {text}")
    return int(bool(wrong))


def requirements(lines: Sequence[str]) -> list[Requirement]:
    r"""Returns what the lines of a distribution's metadata ask for.

    Arguments:
        lines: The lines.

    Example:
        >>> requirements(['lightning>=2.6.6; extra == "train"'])
        [Requirement(package='lightning', extras=(), versions='>=2.6.6', extra='train')]
    """
    found = []
    for line in lines:
        match = PARTS.match(line)
        if match:
            package, extras, wanted, extra = match.groups()
            names = tuple((extras or "").split(",")) if extras else ()
            found.append(Requirement(package, names, wanted.strip(), extra or ""))
    return found


def fits(version: str, wanted: str) -> bool:
    r"""Whether a version is one of those that are asked for.

    Arguments:
        version: The version.
        wanted: Bounds, such as ``">=1.4,<2"``.

    Example:
        >>> fits("1.10", ">=1.4,<2"), fits("1.3.9", ">=1.4")
        (True, False)
    """
    known = TorchVersion(version)
    tests = {
        ">=": known.__ge__,
        "<=": known.__le__,
        "==": known.__eq__,
        "!=": known.__ne__,
        ">": known.__gt__,
        "<": known.__lt__,
    }
    for bound in filter(None, wanted.split(",")):
        match = re.match(r"\s*(>=|<=|==|!=|>|<)\s*(\S+)", bound)
        if match and not tests[match[1]](match[2]):
            return False
    return True


def installed(package: str) -> str | None:
    r"""Returns the version of a distribution, :py:`None` if it is not installed.

    Arguments:
        package: Its name.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(wanted: Sequence[Requirement]) -> Iterator[Finding]:
    r"""Yields the versions of flowguard, of Python and of what the core needs.

    Arguments:
        wanted: All that flowguard asks for.
    """
    yield Finding(f"flowguard {__version__}, in {Path(__file__).parents[1]}")
    yield Finding(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for other in hosts.rivals():
        yield Finding(
            f"the distribution {other} installs a package called flowguard, too, and the two"
            f" overwrite each other; pip uninstall {other}, and install {OURS} again",
            wrong=True,
        )
    for need in wanted:
        if need.extra:
            continue
        version = installed(need.package)
        fine = version is not None and fits(version, need.versions)
        lack = (
            ""
            if fine
            else f', needed is {need.versions}: pip install "{need.package}{need.versions}"'
        )
        yield Finding(f"{need.package} {version or 'is missing'}{lack}", wrong=not fine)


def libraries() -> Iterator[Finding]:
    r"""Yields the libraries that flowguard has an adapter for, each with whether it can be used."""
    for host in sorted({*hosts.HOSTS, *hosts.WRAPPERS}):
        there = [p for p in hosts.PACKAGES.get(host, (host,)) if _is_there(p)]
        if not there:
            yield Finding(f"{host} is not installed: {hosts.install(host)}")
            continue
        names = ", ".join(f"{p} {_version_of(p)}".strip() for p in there)
        reason = _broken(f"{hosts.ADAPTERS}.{host}")
        yield Finding(f"{names}{f' cannot be used: {reason}' if reason else ''}", bool(reason))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version_of(module: str) -> str:
    packages = metadata.packages_distributions().get(module, [module])
    return installed(packages[0]) or ""


def _broken(module: str) -> str:
    r"""Why a module cannot be imported; empty if it can."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a library of another time can fail with anything
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def machine(device: str) -> Iterator[Finding]:
    r"""Yields threads, devices and the precision of products.

    Arguments:
        device: A device that has to work.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    by = f", as OMP_NUM_THREADS says {chosen}" if chosen else ""
    yield Finding(f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} core(s){by}")
    yield Finding(f"devices: {', '.join(devices())}")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        yield Finding(f"device {device} cannot be used: {_first_line(error)}", wrong=True)
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    yield Finding(f"products of float32 in {precision} precision; default dtype {dtype}")


def devices() -> list[str]:
    r"""Returns the devices that there are, in words."""
    found = ["cpu"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found.append(f"cuda:{i} ({torch.cuda.get_device_name(i)})")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def kernels(device: str) -> Iterator[Finding]:
    r"""Yields which kernels compute, and whether they compute what they should.

    Arguments:
        device: The device to compute on.
    """
    from flowguard.transforms import RobustSpline

    yield Finding("splines: in place in eager mode on the CPU, else formulas that torch traces")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    yield Finding(
        f"torch.compile: C++ compiler {compiler}"
        if compiler
        else "torch.compile needs a C++ compiler on the CPU, and finds none; eager mode needs none"
    )
    try:
        torch.from_numpy(torch.ones(2).numpy())
        x = torch.linspace(-6, 6, 101, device=device)
        logits = torch.linspace(-2, 2, 7, device=device)
        spline = RobustSpline(logits, logits, logits)
        error = (spline.inv(spline(x)) - x).abs().max().item()
    except Exception as caught:  # of a device, of NumPy, of a broken build
        yield Finding(
            f"a spline cannot be computed on {device}: {_first_line(caught)}", wrong=True
        )
        return
    yield Finding(f"a spline there and back on {device}: off by {error:.1g}", not error < 1e-4)


def extras(wanted: Sequence[Requirement], needed: Sequence[str] = ()) -> Iterator[Finding]:
    r"""Yields what each extra lacks.

    What is too old will not work; what is missing is told of, and wrong only if it is needed.

    Arguments:
        wanted: All that flowguard asks for.
        needed: The extras that have to be complete.
    """
    names = list(dict.fromkeys(need.extra for need in wanted if need.extra))
    for name in needed:
        if name not in names:
            yield Finding(f"there is no extra {name}; there are {', '.join(names)}", wrong=True)
    for name in names:
        absent, old = [], []
        for need in _all_of(name, wanted):
            version = installed(need.package)
            if version is None:
                absent.append(need.package)
            elif not fits(version, need.versions):
                old.append(f"{need.package} {version} (needed is {need.versions})")
        if not absent and not old:
            yield Finding(f"{name}: complete")
            continue
        lacks = [f"missing {', '.join(dict.fromkeys(absent))}"] if absent else []
        lacks += [f"does not fit {', '.join(old)}"] if old else []
        text = f"{name}: {'; '.join(lacks)}: {hosts.install(name)}"
        yield Finding(text, wrong=bool(old) or name in needed)


def _all_of(extra: str, wanted: Sequence[Requirement]) -> list[Requirement]:
    r"""What an extra needs, with that of the extras that it is made of."""
    found: list[Requirement] = []
    for need in wanted:
        if need.extra == extra and need.package == OURS:
            for other in need.extras:
                found += _all_of(other, wanted)
        elif need.extra == extra:
            found.append(need)
    return list(dict.fromkeys(found))
