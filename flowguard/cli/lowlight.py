r"""``flowguard lowlight``."""

__all__ = ["HELP", "parser", "run"]

from typing import Any

from flowguard.cli.enhance import add_arguments, enhance, load_model
from flowguard.cli.machine import check_device, own_device
from flowguard.cli.parsing import Parser, number, paths

#: What the command does, in one line.
HELP = "brighten dark pictures"


def parser() -> Parser:
    r"""Returns the parser."""
    lowlight = Parser(
        description=(
            "Brighten dark pictures by a low-light flow. Pictures that were made before are"
            " skipped, so that an interrupted run is resumed by the same command; what cannot be"
            " read, or would replace another file, is told of at the end, and the exit code is"
            " then 1. Started by torchrun, or by srun, the processes share the pictures out."
        )
    )
    add_arguments(lowlight, model="lowlight", temperature=0.0)
    lowlight.add_argument(
        "--brightness",
        type=number(0, 1),
        metavar="B",
        help="mean that each sample is scaled to, from 0 to 1 (default: as the model makes it)",
    )
    return lowlight


def run(args: Any) -> int:
    r"""Brightens pictures.

    Arguments:
        args: The arguments.
    """
    paths(args, "output", "model", "report")
    args.device = own_device(args.device)
    check_device(args.device)
    model = load_model(args.model, "LowLightFlow", args.device)

    def finish(x: Any) -> Any:
        if args.brightness is None:
            return x
        from flowguard.models.lowlight import rescale_brightness

        return rescale_brightness(x, args.brightness)

    return enhance(args, model, finish, lambda alpha: alpha)
