r"""``flowguard convert``."""

__all__ = ["HELP", "parser", "run"]

import contextlib
import warnings
from typing import Any

from flowguard.cli.parsing import (
    Parser,
    UserError,
    file,
    folder,
    number,
    paths,
    whole,
    writable,
)

#: What the command does, in one line.
HELP = "turn a published checkpoint into a model folder"

KINDS = ("srflow", "robustnf", "llflow", "esrgan", "ncnn")


def parser() -> Parser:
    r"""Returns the parser."""
    convert = Parser(
        description=(
            "Turn a checkpoint of SRFlow, robustNF, LLFlow or ESRGAN (.pth, or safetensors), or an"
            " RRDB network in ncnn's format (.param and .bin), into a folder that `flowguard"
            " superres` and `flowguard lowlight` take as --model. The checkpoint is read as tensors"
            " only: no code in it is run. Of ESRGAN and ncnn it is the encoder that is taken; the"
            " flow behind it is untrained."
        )
    )
    convert.add_argument("kind", choices=KINDS, help="whose checkpoint it is")
    convert.add_argument(
        "file", type=file, metavar="FILE", help="the checkpoint; of ncnn either file"
    )
    convert.add_argument("folder", type=folder, metavar="DIR", help="folder to write")
    convert.add_argument(
        "--scale",
        type=whole(2, 16),
        metavar="N",
        help=(
            "factor of the model, where it is not the one that the number of the encoder's"
            " doublings tells (default: that one); for srflow and robustnf"
        ),
    )
    convert.add_argument(
        "--stacked",
        type=whole(0, 1000),
        nargs="+",
        metavar="N",
        help=(
            "blocks of the encoder whose outputs the flow sees, which no shape tells (default:"
            " those of the published configurations)"
        ),
    )
    convert.add_argument(
        "--margin",
        type=number(0.0, 1e3),
        default=0.0,
        metavar="X",
        help=(
            "how far from [0, 1] pictures of the model may lie; 0: anywhere, as published"
            " (default: 0)"
        ),
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace a model that is in the folder already"
    )
    convert.add_config()
    return convert


def _imported(args: Any) -> Any:
    from flowguard.models import LowLightFlow, RRDBEncoder, SuperResolutionFlow

    given: dict[str, Any] = {}
    if args.scale is not None:
        given["scale"] = args.scale
    if args.stacked is not None:
        given["stacked"] = tuple(args.stacked)
    if args.scale is not None and args.kind not in ("srflow", "robustnf"):
        raise UserError(f"--scale: the checkpoint of {args.kind} tells all; leave it out")
    if args.kind == "llflow":
        return LowLightFlow.from_llflow(args.file, **given)
    if args.kind == "srflow":
        return SuperResolutionFlow.from_srflow(args.file, **given)
    if args.kind == "robustnf":
        return SuperResolutionFlow.from_robustnf(args.file, **given)
    read = RRDBEncoder.from_ncnn if args.kind == "ncnn" else RRDBEncoder.from_esrgan
    encoder = read(args.file, **given)
    return SuperResolutionFlow(
        scale=encoder.scale,
        levels=encoder.levels,
        steps=16,
        encoder=encoder,
        architecture="published",
    )


def run(args: Any) -> int:
    r"""Converts a checkpoint.

    Arguments:
        args: The arguments.

    Raises:
        UserError: If what was asked for cannot be done.
    """
    from flowguard.models import store

    paths(args, "file", "folder")
    if not args.file.is_file():
        raise UserError(f"FILE: there is no file {args.file}")
    held = any((args.folder / name).exists() for name in (store.CONFIG, store.WEIGHTS))
    if held and not args.overwrite:
        raise UserError(f"DIR: {args.folder} holds a model already; --overwrite replaces it")
    new = not args.folder.exists()
    writable(args.folder, "DIR")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.")  # of pickles that are refused
            model = _imported(args).limit(args.margin or None)
        model.save_pretrained(args.folder)
    except (EOFError, OSError, RuntimeError, TypeError, ValueError) as error:
        if new:
            with contextlib.suppress(OSError):  # something is in it after all
                args.folder.rmdir()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"FILE: {lines[0] if lines else type(error).__name__}") from error
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{args.folder} holds a {type(model).__name__} of {count:,} parameters; `flowguard inspect` tells of it."
    )
    return 0
