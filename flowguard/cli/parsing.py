r"""How the command line is read: mistakes get one line, and exit code 2."""

__all__ = ["IfGiven", "Parser", "UserError", "add_limit", "folder", "found", "number", "whole"]

import argparse
import difflib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from flowguard.cli import COMMANDS
from flowguard.hosts import install

#: What the extra demo brings, as module and distribution.
DEMO = (
    ("skimage", "scikit-image"),
    ("matplotlib", "matplotlib"),
    ("torchmetrics", "torchmetrics"),
    ("lightning", "lightning"),
)


class UserError(Exception):
    r"""A mistake of the user, told in one line."""


class WrongValue(argparse.ArgumentTypeError, ValueError):
    r"""A value that cannot be taken: the first kind of error on the command line, the second in
    a file of options."""


class IfGiven(argparse.Action):
    r"""An argument without a name that may be missing: then a file of options may give it."""

    def __call__(self, _: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values is not None:
            setattr(namespace, self.dest, values)


class Formatter(argparse.HelpFormatter):
    r"""The help as it is written: it names the defaults."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=26, **options)


class Parser(jsonargparse.ArgumentParser):
    r"""A parser that tells a mistake in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **options)
        self.commands: dict[str, Parser] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        r"""Ends with exit code 2 and one line: what is wrong, and how to get help.

        Raises:
            UserError: In place of that, while :meth:`saved` reads options.
        """
        # jsonargparse puts the command before each name: superres.output.
        names = "|".join(COMMANDS)
        required = re.search(rf"required: ({names})\.", message)
        if required and required[1] in self.commands:
            self.commands[required[1]].miss(re.findall(rf"{required[1]}\.(\w+)", message))
        if "but it was not provided" in message:
            message = f"COMMAND must be one of {', '.join(COMMANDS)}; got none"
        plain = re.sub(rf'(?<=[ "])(?:{names})\.(?=[a-z_]+(?:[",:]|$))', "", message)
        line = " ".join(plain.split())
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", line)
        if choice:
            line += meant(choice[1], re.findall(r"'([^']*)'", choice[2]))
        if not self.exit_on_error:
            raise UserError(line)
        self.exit(2, f"{self.prog}: error: {line} (see {self.prog} --help)\n")

    def miss(self, names: Sequence[str]) -> NoReturn:
        r"""Ends with exit code 2 and one line: which arguments are missing, as they are typed.

        Arguments:
            names: What they are stored as.
        """
        typed = {
            a.dest: a.option_strings[-1] if a.option_strings else str(a.metavar or a.dest.upper())
            for a in self._actions
        }
        self.error(f"{', '.join(typed.get(n, n) for n in names)} must be given; got nothing")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        r"""Ends with an exit code, after a message on the standard error."""
        if message:
            sys.stderr.write(message)
        raise SystemExit(status)

    def check(self, values: Any) -> None:
        r"""Refuses what a file of options can give and the command line cannot: nothing, one
        value for several, several for one, words for a switch.

        Arguments:
            values: The values that were read.
        """
        for action in self._actions:
            if action.dest in ("config", "help", "print_config"):
                continue
            value, several = values[action.dest], action.nargs in ("+", "*")
            if action.nargs == 0 and not isinstance(value, bool):
                self.error(f"{action.dest} must be true or false; got {value!r}")
            elif value is None and action.default is not None:
                self.error(f"{action.dest} must be given a value; got none")
            elif value is not None and several != isinstance(value, list):
                self.error(f"{action.dest} must be {'a list' if several else 'one value'}")

    def saved(self, values: Any) -> dict[str, Any]:
        r"""Returns options that were saved, checked as if they were given now, and the others by
        default.

        Arguments:
            values: The options by name.

        Raises:
            UserError: If there is no such option, or a value cannot be taken.
        """
        before, self.exit_on_error = self.exit_on_error, False
        try:
            read = self.parse_object(values, defaults=True)
            self.check(read)
        finally:
            self.exit_on_error = before
        return dict(vars(read))

    def given(self, argv: Sequence[str], values: Any) -> dict[str, Any]:
        r"""Returns the options that were given on the command line, and not by default.

        Arguments:
            argv: The arguments of the command.
            values: The values that were read.
        """
        named, alone = self._sorted_out(argv)
        named |= {
            a.dest for a in self._actions if not a.option_strings and values.get(a.dest) in alone
        }
        return {name: values[name] for name in sorted(named) if name in values}

    def refuse_unknown(self, argv: Sequence[str]) -> None:
        r"""Refuses options that there are not, by their names: what follows one would be taken for
        an argument without a name, which then is what is complained of.

        Arguments:
            argv: The arguments of the command.
        """
        takers = [option for a in self._actions for option in a.option_strings]
        for word in self._sorted_out(argv)[1]:
            if word == "--":  # names alone follow
                return
            if word.startswith("--"):
                option = word.partition("=")[0]
                self.error(f"there is no option {option}{meant(option, takers)}")

    def _sorted_out(self, argv: Sequence[str]) -> tuple[set[str], list[str]]:
        r"""What the options that are given are stored as, and the words that are none and belong to
        none."""
        takers = {o: a for a in self._actions for o in a.option_strings}
        named: set[str] = set()
        alone: list[str] = []
        words = iter(argv)
        for word in words:
            option, is_joined, _ = word.partition("=")
            if option not in takers:
                alone.append(word)
                continue
            named.add(takers[option].dest)
            if takers[option].nargs != 0 and not is_joined:
                next(words, None)
        return named, alone

    def add_config(self) -> None:
        r"""Lets a YAML file give options."""
        self.add_argument(
            "--config",
            action="config",
            metavar="FILE",
            help="a YAML file of options; those given on the command line win when they follow it",
        )


def meant(word: str, known: Sequence[str]) -> str:
    r"""Returns a question for the known word that is most like one that is not known; nothing where
    none is like it.

    Arguments:
        word: The word.
        known: The words that are known.

    Example:
        >>> meant("superes", ["superres", "train"])
        '; did you mean superres?'
    """
    alike = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {alike[0]}?" if alike else ""


def whole(least: int, most: int) -> Callable[[Any], int]:
    r"""Returns a reader of whole numbers within bounds.

    Arguments:
        least: The least number.
        most: The greatest.
    """

    def read(text: Any) -> int:
        try:
            value = int(str(text))
        except ValueError:
            raise WrongValue(f"must be a whole number; got {text!r}") from None
        if not least <= value <= most:
            raise WrongValue(f"must be at least {least} and at most {most}; got {value}")
        return value

    return read


def number(least: float, most: float) -> Callable[[Any], float]:
    r"""Returns a reader of numbers within bounds.

    Arguments:
        least: The least number.
        most: The greatest.
    """

    def read(text: Any) -> float:
        try:
            value = float(text)
        except (TypeError, ValueError):
            raise WrongValue(f"must be a number; got {text!r}") from None
        if not least <= value <= most:
            raise WrongValue(f"must be at least {least:g} and at most {most:g}; got {value:g}")
        return value

    return read


def folder(text: Any) -> str:
    r"""Reads the name of a folder; see :func:`paths`."""
    return _name(text, "a folder")


def file(text: Any) -> str:
    r"""Reads the name of a file; see :func:`paths`."""
    return _name(text, "a file")


def _name(text: Any, what: str) -> str:
    if isinstance(text, list | dict):
        raise WrongValue(f"must name {what}; got {text!r}")
    if not str(text).strip():
        raise WrongValue(f"must name {what}; got nothing")
    if "\0" in str(text):
        raise WrongValue(f"must name {what}; got a name with a zero byte")
    return str(text)


def paths(args: Any, *names: str) -> None:
    r"""Makes paths of arguments; until then they are texts, which ``--print_config`` can print.

    Arguments:
        args: The arguments, which are changed.
        names: Which of them are paths, or lists of paths.
    """
    for name in names:
        value = getattr(args, name)
        if isinstance(value, list):
            setattr(args, name, [Path(v) for v in value])
        elif value is not None:
            setattr(args, name, Path(value))


def found(name: str | Path, option: str) -> Path:
    r"""Returns what a name means where models are named: a folder or file, or a model that the
    package brings.

    Arguments:
        name: The name.
        option: The option that gave it, for the error.

    Raises:
        UserError: If nothing can have that name, or it cannot be looked what has it.
    """
    from flowguard.models.store import PretrainedError, located

    try:
        return located(name)
    except PretrainedError as error:
        raise UserError(f"{option}: {error}") from None


def add_limit(parser: Parser) -> None:
    r"""Adds the option of how large the pictures may be that are read."""
    parser.add_argument(
        "--max-pixels",
        type=whole(1, 10**12),
        metavar="N",
        help="largest number of pixels of a picture that is read (default: 178956970)",
    )


def need(*packages: tuple[str, str], extra: str = "demo") -> None:
    r"""Refuses to go on without some packages, given as module and distribution.

    Arguments:
        packages: Pairs of module and distribution.
        extra: The extra that they come with.

    Raises:
        UserError: If one is missing.
    """
    for module, package in packages:
        try:
            __import__(module)
        except ImportError:
            raise UserError(f"{package} is missing: {install(extra)}") from None


def writable(path: Path, option: str) -> Path:
    r"""Returns a folder to write to, made if it is missing and known to be writable.

    Arguments:
        path: The folder.
        option: The option that named it, for the error.

    Raises:
        UserError: If it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{option} must be a folder; {path} is, or lies below, a file") from None
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder {path}: {error.strerror}") from None
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{option}: cannot write to the folder {path}: {error.strerror}") from None
    return path
