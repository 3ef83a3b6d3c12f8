r"""The command line: ``flowguard superres``, ``lowlight``, ``train``, ``convert``, ``inspect``,
``compare``, ``demo``, ``app`` and ``doctor``."""

__all__ = ["main"]

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from flowguard._version import __version__
from flowguard.cli import COMMANDS
from flowguard.cli.signals import Terminated, termination
from flowguard.hosts import install


def _commands() -> dict[str, Any]:
    return {name: importlib.import_module(f"flowguard.cli.{name}") for name in COMMANDS}


def main(argv: Sequence[str] | None = None) -> int:
    r"""Runs the command line.

    Arguments:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0, or 1 if some images could not be done, or 2 for a mistake of the user,
        or 130 after Ctrl-C, or 143 after SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a letter must not end the work
    try:
        with termination():
            return _run(argv)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = open(os.devnull, "w")  # closed with the process
        return 1
    except (KeyboardInterrupt, Terminated) as stop:
        print("\nflowguard: interrupted; no half-written file was left", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130


def _bare(words: Sequence[str]) -> int:
    r"""Runs what needs no parser, where there is none."""
    if words == ["--version"]:
        print(f"flowguard {__version__}")
        return 0
    if words == ["doctor"]:
        return importlib.import_module("flowguard.cli.doctor").report()
    print(
        f"flowguard: error: the command line needs jsonargparse, which is missing: {install('cli')};"
        " without it there are flowguard --version and flowguard doctor",
        file=sys.stderr,
    )
    return 2


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        from flowguard.cli.parsing import Parser, UserError
    except ImportError:
        return _bare(words)
    parser = Parser(
        prog="flowguard",
        description="Robust conditional normalizing flows.",
        version=__version__,
    )
    subcommands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    commands, parsers = _commands(), {}
    for name, command in commands.items():
        sub = parsers[name] = command.parser()
        subcommands.add_subcommand(name, sub, help=command.HELP)
        sub.prog = f"flowguard {name}"
    parser.commands = parsers
    if words and words[0] in parsers:
        parsers[words[0]].refuse_unknown(words[1:])
    try:
        args = parser.parse_args(words)
    except UnicodeDecodeError as error:
        parser.error(f"config: {error}")
    except AssertionError:  # where several choices are taken, jsonargparse asserts a list
        parser.error("config: what takes several values must be given a list of them")
    parsers[args.command].check(args[args.command])
    if args.command == "train":  # where a run that goes on has its own options
        args.train.given = parsers["train"].given(words, args.train)
    try:
        code: int = commands[args.command].run(args[args.command])
        return code
    except UserError as error:
        print(f"flowguard: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # a folder that may not be read, a name that is too long
        print(f"flowguard: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
