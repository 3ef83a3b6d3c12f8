r"""``flowguard app``."""

__all__ = ["HELP", "parser", "run"]

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowguard.cli.enhance import chosen, load_model
from flowguard.cli.machine import add_machine, check_device, threads
from flowguard.cli.parsing import Parser, UserError, folder, need, paths, whole
from flowguard.hosts import install

#: What the command does, in one line.
HELP = "serve a page on which to try it"

KINDS = ("SuperResolutionFlow", "LowLightFlow")
#: What ``flowguard demo`` makes by default, and what its affine model is called there.
DEMO, AFFINE = Path("flowguard-demo"), "affine"
LOOPBACK = "127.0.0.1"


def parser() -> Parser:
    r"""Returns the parser."""
    app = Parser(
        description=(
            "Serve a page on which photographs can be dropped and spoilt, to see what an affine and"
            " a robust flow make of them, and what the guard says. It works offline, listens on"
            " this machine alone, and keeps nothing."
        )
    )
    app.add_argument(
        "--model",
        type=folder,
        default="superres-x4",
        metavar="DIR",
        help="folder of the super-resolution flow (default: superres-x4, of the package)",
    )
    app.add_argument(
        "--lowlight-model",
        type=folder,
        default="lowlight",
        metavar="DIR",
        help="folder of the low-light flow (default: lowlight, of the package)",
    )
    app.add_argument(
        "--affine",
        nargs="+",
        type=folder,
        metavar="DIR",
        help=(
            "folders of affine flows to compare with, one of each kind, or what flowguard demo"
            " wrote (default: flowguard-demo, if it is there)"
        ),
    )
    app.add_argument(
        "--host",
        default=LOOPBACK,
        metavar="ADDRESS",
        help=f"address to listen on (default: {LOOPBACK}, this machine alone); 0.0.0.0 for all",
    )
    app.add_argument(
        "--port",
        type=whole(1, 65535),
        metavar="N",
        help="port to listen on (default: the first free one from 7860)",
    )
    add_machine(app)
    app.add_argument(
        "--precision",
        default="float32",
        choices=("auto", "bf16", "float16", "float32"),
        help="what the networks compute in (default: float32)",
    )
    app.add_config()
    return app


def _affine(places: list[Path] | None, device: str) -> dict[str, Any]:
    r"""The affine partners by their classes."""
    from flowguard.models.store import CONFIG

    if places is None:
        places = [DEMO] if (DEMO / AFFINE / CONFIG).is_file() else []
    found: dict[str, Any] = {}
    for place in places:
        inner = place / AFFINE
        path = inner if (inner / CONFIG).is_file() else place
        model = load_model(path, KINDS, device, "--affine")
        kind = type(model).__name__
        if kind in found:
            raise UserError(f"--affine must name one folder of each kind; got two of a {kind}")
        found[kind] = model
    return found


def _partners(args: Any) -> tuple[list[Any], list[Any], str]:
    r"""The models that answer in both tabs, and what is said of a partner that is missing."""
    from flowguard.app.answers import partners

    robust = load_model(args.model, "SuperResolutionFlow", args.device)
    dark = load_model(args.lowlight_model, "LowLightFlow", args.device, "--lowlight-model")
    affine = _affine(args.affine, args.device)
    other = affine.get("SuperResolutionFlow")
    if other is not None and other.scale != robust.scale:
        raise UserError(
            f"--affine must enlarge as often as the other model, {robust.scale} times; got"
            f" {other.scale}"
        )
    note = ""
    if other is None:
        note = (
            "No affine flow answers beside the robust one: flowguard demo makes one in"
            f" {DEMO}/{AFFINE}, which --affine names."
        )
    precision = chosen(args.precision, robust)
    return (
        partners(robust, other, precision),
        partners(dark, affine.get("LowLightFlow"), precision),
        note,
    )


def run(args: Any) -> int:
    r"""Serves the page until it is interrupted.

    Arguments:
        args: The arguments.

    Raises:
        UserError: If a package is missing, or the arguments do not go together.
    """
    need(
        ("matplotlib", "matplotlib"),
        ("PIL", "Pillow"),
        ("skimage", "scikit-image"),
        extra="app",
    )
    if find_spec("gradio") is None:  # imported once its folder is chosen
        raise UserError(f"gradio is missing: {install('app')}")
    from flowguard.app.address import place
    from flowguard.app.page import build, serve

    paths(args, "model", "lowlight_model", "affine")
    check_device(args.device)
    try:
        lonely = place(args.host, args.port).lonely  # before the models are read, which takes time
    except (OSError, ValueError) as error:
        raise UserError(f"--{error}") from None
    superres, lowlight, note = _partners(args)

    def ready(address: str) -> None:
        print(f"flowguard app: open {address}; Ctrl-C ends it", flush=True)
        if not lonely:
            print(f"flowguard app: all who reach {args.host} can use it", flush=True)

    with threads(args.threads):
        try:
            serve(lambda: build(superres, lowlight, note), args.host, args.port, ready)
        except KeyboardInterrupt:
            print("\nflowguard app: ended; no photograph was kept")
        except OSError as error:
            raise UserError(f"--host, --port: cannot listen there any more: {error}") from None
    return 0
