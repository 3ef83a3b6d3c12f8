r"""``flowguard superres``."""

__all__ = ["HELP", "parser", "run"]

from typing import Any

from flowguard.cli.enhance import add_arguments, enhance, load_model
from flowguard.cli.machine import check_device, own_device
from flowguard.cli.parsing import Parser, UserError, paths, whole

#: What the command does, in one line.
HELP = "enlarge pictures"


def parser() -> Parser:
    r"""Returns the parser."""
    superres = Parser(
        description=(
            "Enlarge pictures by a super-resolution flow. Pictures that were made before are"
            " skipped, so that an interrupted run is resumed by the same command; what cannot be"
            " read, or would replace another file, is told of at the end, and the exit code is"
            " then 1. Started by torchrun, or by srun, the processes share the pictures out."
        )
    )
    add_arguments(superres, model="superres-x4", temperature=0.9)
    superres.add_argument(
        "--scale",
        type=whole(2, 64),
        metavar="N",
        help="the factor, to be sure that the model is the one that is meant (default: its own)",
    )
    return superres


def run(args: Any) -> int:
    r"""Enlarges pictures.

    Arguments:
        args: The arguments.

    Raises:
        UserError: If what was asked for cannot be done.
    """
    import torch.nn.functional as F

    paths(args, "output", "model", "report")
    args.device = own_device(args.device)
    check_device(args.device)
    model = load_model(args.model, "SuperResolutionFlow", args.device)
    if args.scale is not None and args.scale != model.scale:
        raise UserError(
            f"--scale: the model of {args.model} enlarges by {model.scale}; got {args.scale}"
        )

    def grow(alpha: Any) -> Any:
        return F.interpolate(alpha, scale_factor=float(model.scale), mode="bicubic")

    return enhance(args, model, lambda x: x, grow)
