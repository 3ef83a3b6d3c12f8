r"""``flowguard train``."""

__all__ = ["HELP", "parser", "run"]

from pathlib import Path
from typing import Any

from flowguard.cli.machine import threads
from flowguard.cli.parsing import (
    Parser,
    UserError,
    folder,
    need,
    number,
    paths,
    whole,
    writable,
)

HELP = "train a flow on a folder of pictures"
VERSION = 1  # of the run folder


def parser() -> Parser:
    r"""Returns the parser."""
    train = Parser(
        description=(
            "Train a flow on a folder of pictures. Writes a run folder: config.yaml, metrics.csv,"
            " validation.csv, checkpoints, and the models best and model, which --model of other"
            " commands takes. Ctrl-C and SIGTERM save first; --resume goes on with a run."
        )
    )
    train.add_argument(
        "task",
        nargs="?",
        default="superres",
        choices=("superres",),
        help="what the flow does (default: superres)",
    )
    train.add_argument("--data", type=folder, metavar="DIR", help="folder of pictures, nested")
    train.add_argument("--out", type=folder, metavar="RUN", help="run folder to write")
    train.add_argument(
        "--resume", type=folder, metavar="RUN", help="run folder to go on with, by its own options"
    )
    train.add_argument("--val", type=folder, metavar="DIR", help="folder to validate with")
    train.add_argument(
        "--steps", type=whole(1, 10**9), default=20000, metavar="N", help="steps (default: 20000)"
    )
    train.add_argument(
        "--batch", type=whole(1, 10**6), default=12, metavar="N", help="crops (default: 12)"
    )
    train.add_argument(
        "--crop", type=whole(8, 10**5), default=48, metavar="N", help="their size (default: 48)"
    )
    train.add_argument(
        "--lr", type=number(1e-12, 1.0), default=1e-3, metavar="X", help="default: 1e-3"
    )
    train.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="default: 0"
    )
    train.add_argument(
        "--coupling",
        default="robust",
        choices=("affine", "reparametrized", "robust", "bspline"),
        help="default: robust",
    )
    train.add_argument("--scale", type=whole(2, 64), default=4, metavar="N", help="default: 4")
    train.add_argument("--levels", type=whole(1, 8), default=2, metavar="N", help="default: 2")
    train.add_argument(
        "--flow-steps", type=whole(1, 64), default=4, metavar="N", help="default: 4"
    )
    train.add_argument(
        "--hidden", type=whole(1, 4096), default=64, metavar="N", help="default: 64"
    )
    train.add_argument(
        "--features", type=whole(1, 4096), default=64, metavar="N", help="default: 64"
    )
    train.add_argument(
        "--encoder-blocks", type=whole(0, 100), default=8, metavar="N", help="default: 8"
    )
    train.add_argument(
        "--validate-every", type=whole(1, 10**9), default=1000, metavar="N", help="default: 1000"
    )
    train.add_argument(
        "--checkpoint-minutes",
        type=number(0.0, 10**6),
        default=10.0,
        metavar="X",
        help="default: 10",
    )
    train.add_argument(
        "--precision",
        default="32-true",
        choices=("32-true", "bf16-mixed"),
        help="default: 32-true",
    )
    train.add_argument("--threads", type=whole(1, 1024), metavar="N", help="CPU threads")
    train.add_config()
    return train


def run(args: Any) -> int:
    r"""Trains a flow.

    Arguments:
        args: The arguments.
    """
    need(("lightning", "lightning"))
    import yaml

    steps = args.steps
    if args.resume is not None:
        place = Path(args.resume)
        if not (place / "config.yaml").is_file():
            raise UserError(f"--resume: there is no run in {place}")
        saved = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
        for name, value in saved.items():
            if name != "version":
                setattr(args, name, value)
        args.steps = max(steps, args.steps) if steps != 20000 else args.steps
        args.out = str(place)
    elif args.data is None or args.out is None:
        raise UserError("--data and --out must be given, or --resume")
    paths(args, "data", "out", "val")
    if args.resume is None and (args.out / "config.yaml").exists():
        raise UserError(f"--out: {args.out} holds a run already; --resume {args.out} goes on")
    writable(args.out, "--out")
    with threads(args.threads):
        return _train(args)


def _train(args: Any) -> int:
    import torch
    import yaml

    from flowguard.io.atomic import write_text
    from flowguard.models import PyramidEncoder, SuperResolutionFlow
    from flowguard.training.callbacks import Interrupted
    from flowguard.training.crops import FolderCrops, Wholes
    from flowguard.training.guard import Conditions
    from flowguard.training.module import Diverged, FlowModule, Optimization
    from flowguard.training.run import Loading, Run, fit
    from flowguard.training.validation import PictureFolder

    place = Run(args.out)
    try:
        crops = FolderCrops(
            args.data, scale=args.scale, size=args.crop, batch=args.batch, seed=args.seed
        )
        held_out = PictureFolder(args.val, scale=args.scale)
    except ValueError as error:
        raise UserError(str(error)) from None
    torch.manual_seed(args.seed)
    model = SuperResolutionFlow(
        scale=args.scale,
        levels=args.levels,
        steps=args.flow_steps,
        hidden=args.hidden,
        features=args.features,
        coupling=args.coupling,
        encoder=PyramidEncoder(
            args.features, scale=args.scale, levels=args.levels, blocks=args.encoder_blocks
        ),
    )
    options = {
        k: str(Path(v).absolute()) if isinstance(v, Path) else v
        for k, v in vars(args).items()
        if k not in ("config", "resume", "out", "print_config")
    }
    options["threads"] = torch.get_num_threads()
    write_text(place.config, yaml.safe_dump({"version": VERSION, **options}, sort_keys=False))
    module = FlowModule(model, Optimization(steps=args.steps, lr=args.lr, seed=args.seed))
    try:
        told = fit(
            module,
            Loading(crops, held_out),
            place,
            Conditions(Wholes(crops.pairs), held_out, seed=args.seed),
            validate_every=args.validate_every,
            minutes=args.checkpoint_minutes,
            precision=args.precision,
        )
    except Interrupted as stop:
        print(f"flowguard: saved; flowguard train --resume {args.out} goes on")
        return 128 + stop.number
    except Diverged as error:
        raise UserError(str(error)) from None
    print("; ".join(f"{name} {value:.4g}" for name, value in told.items()))
    return 0
