r"""The command line: ``flowguard demo``."""

__all__ = ["main"]

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from flowguard._version import __version__


class UserError(Exception):
    r"""A mistake of the user, told in one line."""


class Parser(argparse.ArgumentParser):
    r"""A parser that tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    r"""Reads a positive integer."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _parser() -> Parser:
    parser = Parser(
        prog="flowguard", description="Robust conditional normalizing flows.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"flowguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="train an affine and a robust super-resolution flow and compare them",
        description=(
            "Train two ×4 super-resolution flows on real photographs, equal but for the coupling,"
            " and ask both for conditions within and without their world. Writes report.html,"
            " metrics.json, the panels as PNG and both weights as safetensors."
        ),
    )
    demo.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="training steps of each model (default: 400; 30 with --quick)",
    )
    demo.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all randomness (default: 0)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("flowguard-demo"),
        metavar="DIR",
        help="folder to write (default: flowguard-demo)",
    )
    demo.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1, mps, …"
    )
    demo.add_argument(
        "--coupling",
        default="robust",
        choices=("robust", "reparametrized", "bspline"),
        help="coupling of the second model (default: robust); the first is affine",
    )
    demo.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (default: all cores)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="tiny models and 30 steps, to see that all works"
    )
    return parser


def _folder(path: Path) -> Path:
    """The folder to write to, made if it is missing and known to be writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out must be a folder; {path} is, or lies below, a file") from None
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--out: the folder {path} is not writable")
    return path


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device: {name!r} cannot be used here: {reason}") from None


def _demo(args: argparse.Namespace) -> int:
    for module, package in (("skimage", "scikit-image"), ("matplotlib", "matplotlib")):
        try:
            __import__(module)
        except ImportError:
            raise UserError(f'{package} is missing: pip install "flowguard-nf[demo]"') from None
    import torch

    from flowguard import demo, demo_report

    threads = torch.get_num_threads()
    _check_device(args.device)
    steps = args.steps or (30 if args.quick else demo.DemoOptions.steps)
    options = demo.DemoOptions(
        out=_folder(args.out),
        steps=steps,
        seed=args.seed,
        device=args.device,
        coupling=args.coupling,
        quick=args.quick,
    )
    try:
        torch.set_num_threads(args.threads or threads)
        result = demo.run(options)
    finally:
        torch.set_num_threads(threads)
    files = demo_report.write(result)
    print(demo_report.table(result))
    print(f"\nOpen {files[0]} for the pictures; {len(files)} files are in {args.out}.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    r"""Runs the command line.

    Arguments:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0, or 2 for a mistake of the user, or 130 after Ctrl-C.
    """
    try:
        args = _parser().parse_args(argv)
        return _demo(args)
    except UserError as error:
        print(f"flowguard: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nflowguard: interrupted; no half-written file was left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
