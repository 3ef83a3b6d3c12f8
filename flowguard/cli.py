r"""The command line: ``flowguard superres``, ``lowlight``, ``convert``, ``inspect``, ``compare``
and ``demo``."""

__all__ = ["main"]

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from flowguard._version import __version__
from flowguard.commands import COMMANDS


def _commands() -> dict[str, Any]:
    return {name: importlib.import_module(f"flowguard.commands.{name}") for name in COMMANDS}


def main(argv: Sequence[str] | None = None) -> int:
    r"""Runs the command line.

    Arguments:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0, or 1 if some images could not be done, or 2 for a mistake of the user,
        or 130 after Ctrl-C.
    """
    try:
        return _run(argv)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = open(os.devnull, "w")  # closed with the process
        return 1
    except KeyboardInterrupt:
        print("\nflowguard: interrupted; no half-written file was left", file=sys.stderr)
        return 130


def _run(argv: Sequence[str] | None) -> int:
    try:
        from flowguard.commands.parsing import Parser, UserError
    except ImportError:
        print(
            'flowguard: error: jsonargparse is missing: pip install "flowguard-nf[demo]"',
            file=sys.stderr,
        )
        return 2
    parser = Parser(
        prog="flowguard",
        description="Robust conditional normalizing flows.",
        version=f"flowguard {__version__}",
    )
    subcommands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    commands = _commands()
    for name, command in commands.items():
        sub = command.parser()
        subcommands.add_subcommand(name, sub, help=command.HELP)
        sub.prog = f"flowguard {name}"
    args = parser.parse_args(argv)
    try:
        code: int = commands[args.command].run(args[args.command])
        return code
    except UserError as error:
        print(f"flowguard: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
