r"""``flowguard convert``."""

__all__ = ["HELP", "parser", "run"]

import pickle
from typing import Any

from flowguard.commands.parsing import Parser, UserError, file, folder, writable

HELP = "turn a published checkpoint into a model folder"

#: What a published kind of checkpoint becomes, and by which method.
KINDS = {
    "srflow": ("SuperResolutionFlow", "from_srflow"),
    "robustnf": ("SuperResolutionFlow", "from_robustnf"),
    "llflow": ("LowLightFlow", "from_llflow"),
    "esrgan": ("SuperResolutionFlow", "from_esrgan"),
}


def parser() -> Parser:
    r"""Returns the parser."""
    convert = Parser(
        description=(
            "Turn a checkpoint of SRFlow, robustNF, LLFlow or ESRGAN (.pth, or safetensors) into a"
            " folder that `flowguard superres` and `flowguard lowlight` take as --model. The"
            " checkpoint is read as tensors only: no code in it is run. Of ESRGAN it is the"
            " encoder that is taken; the flow behind it is untrained."
        )
    )
    convert.add_argument("kind", choices=tuple(KINDS), help="whose checkpoint it is")
    convert.add_argument("file", type=file, metavar="FILE", help="the checkpoint")
    convert.add_argument("folder", type=folder, metavar="DIR", help="folder to write")
    convert.add_argument(
        "--overwrite", action="store_true", help="replace a model that is in the folder already"
    )
    convert.add_config()
    return convert


def run(args: Any) -> int:
    r"""Converts a checkpoint.

    Arguments:
        args: The arguments.
    """
    from flowguard import models, persistence

    if not args.file.is_file():
        raise UserError(f"FILE: there is no file {args.file}")
    if (args.folder / persistence.CONFIG).exists() and not args.overwrite:
        raise UserError(f"DIR: {args.folder} holds a model already; --overwrite replaces it")
    writable(args.folder, "DIR")
    kind, method = KINDS[args.kind]
    load = getattr(getattr(models, kind), method, None)
    if load is None:
        raise UserError(f"this version of flowguard cannot convert checkpoints of {args.kind}")
    try:
        model = load(args.file)
        model.save_pretrained(args.folder)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"FILE: {args.file} is no checkpoint, or holds more than tensors, which is not opened"
        ) from error
    except (EOFError, OSError, RuntimeError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"FILE: {lines[0] if lines else type(error).__name__}") from error
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{args.folder} holds a {kind} of {count:,} parameters; `flowguard inspect` tells of it."
    )
    return 0
