r"""The commands of the command line, a module each.

Each has a `HELP` of one line, `parser()`, which returns its parser, and `run(args)`, which returns
the exit code.
"""

__all__ = ["COMMANDS"]

#: The names of the commands, each of which is a module here.
COMMANDS = (
    "superres",
    "lowlight",
    "train",
    "convert",
    "inspect",
    "compare",
    "demo",
    "app",
    "doctor",
)
