r"""The command line: ``flowguard demo``."""

__all__ = ["main"]

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from flowguard._version import __version__
from flowguard.files import atomic


class UserError(Exception):
    r"""A mistake of the user, told in one line."""


class Parser(argparse.ArgumentParser):
    r"""A parser that tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def whole(least: int, most: int) -> Callable[[str], int]:
    r"""Returns a reader of whole numbers within bounds."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"must be at least {least} and at most {most}; got {value}"
            )
        return value

    return read


def folder(text: str) -> Path:
    r"""Reads the name of a folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a folder; got nothing")
    return Path(text)


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
        type=whole(1, 10**9),
        metavar="N",
        help="training steps of each model (default: 400; 30 with --quick)",
    )
    demo.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of all randomness (default: 0)",
    )
    demo.add_argument(
        "--out",
        type=folder,
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
        "--threads", type=whole(1, 1024), metavar="N", help="CPU threads (default: all cores)"
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
    try:
        with atomic(path / "probe"):
            pass
        (path / "probe").unlink()
    except OSError as error:
        raise UserError(f"--out: cannot write to the folder {path}: {error.strerror}") from None
    for name in ("report.html", "metrics.json", "headline.png"):
        if (path / name).is_dir():
            raise UserError(f"--out: {path / name} is a folder, and shall become a file")
    return path


def _check_device(name: str) -> None:
    import torch

    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
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
    print(demo_report.table(result))
    try:
        files = demo_report.write(result)
    except OSError as error:
        raise UserError(f"--out: cannot write to {args.out}: {error.strerror}") from None
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
