r"""``flowguard demo``."""

__all__ = ["HELP", "parser", "run"]

from pathlib import Path
from typing import Any

from flowguard.cli.machine import add_machine, check_device, threads
from flowguard.cli.parsing import (
    DEMO,
    Parser,
    UserError,
    file,
    folder,
    found,
    need,
    paths,
    whole,
    writable,
)

#: What the command does, in one line.
HELP = "train an affine and a robust image flow and compare them"
#: What ``--task`` takes: the keys of ``flowguard.demo.run.TASKS``, which need not be imported for it.
TASKS = ("superres", "lowlight")


def parser() -> Parser:
    r"""Returns the parser."""
    demo = Parser(
        description=(
            "Train two flows on real photographs, equal but for the coupling, and ask both for"
            " conditions within and without their world: ×4 super-resolution, or with --task"
            " lowlight photographs taken in the dark. Writes report.html, metrics.json, the panels"
            " as PNG, and a folder for each model, which inspect, superres, lowlight and compare"
            " take."
        ),
    )
    demo.add_argument(
        "--task",
        default="superres",
        choices=TASKS,
        help="what the flows are for (default: superres)",
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
        default="flowguard-demo",
        metavar="DIR",
        help="folder to write (default: flowguard-demo)",
    )
    demo.add_argument(
        "--coupling",
        default="robust",
        choices=("robust", "reparametrized", "bspline"),
        help="coupling of the second model (default: robust); the first is affine",
    )
    demo.add_argument(
        "--encoder-weights",
        type=file,
        metavar="FILE",
        help=(
            "whose encoder both flows are built on, as it is: what `flowguard train` takes, or none"
            " for a small one that is trained with each (default: that of the model in the package,"
            " for superres; none with --quick)"
        ),
    )
    add_machine(demo)
    demo.add_argument(
        "--quick", action="store_true", help="tiny models and 30 steps, to see that all works"
    )
    demo.add_config()
    return demo


def _encoder(args: Any, task: Any) -> Path | None:
    r"""Whose encoder the flows are built on, which is known to fit; :py:`None` if each has its own."""
    if args.encoder_weights is None:
        own = None if args.quick else task.encoder
        return None if own is None else found(own, "--encoder-weights")
    if args.encoder_weights == "none":
        return None
    weights = found(args.encoder_weights, "--encoder-weights")
    if not weights.exists():
        raise UserError(
            f"--encoder-weights must name a file, a model folder or none; there is no {weights}"
        )
    try:
        task.build(args.coupling, args.quick, weights)
    except (ValueError, OSError) as error:
        raise UserError(f"--encoder-weights: {error}") from None
    return weights


def run(args: Any) -> int:
    r"""Runs the demo.

    Arguments:
        args: The arguments.

    Raises:
        UserError: If what was asked for cannot be done.
    """
    need(*DEMO)
    from flowguard.demo import report as demo_report
    from flowguard.demo import run as demo
    from flowguard.models.store import PretrainedError

    paths(args, "out")
    check_device(args.device)
    out = writable(args.out, "--out")
    for name in ("report.html", "metrics.json", "headline.png"):
        if (out / name).is_dir():
            raise UserError(f"--out: {out / name} is a folder, and shall become a file")
    for name in ("affine", args.coupling):
        if (out / name).is_file():
            raise UserError(f"--out: {out / name} is a file, and shall become a folder")
    options = demo.DemoOptions(
        out=out,
        steps=args.steps or (30 if args.quick else demo.TASKS[args.task].steps),
        seed=args.seed,
        device=args.device,
        coupling=args.coupling,
        quick=args.quick,
        task=args.task,
        encoder=_encoder(args, demo.TASKS[args.task]),
    )
    with threads(args.threads):
        result = demo.run_demo(options)
    print(demo_report.table(result))
    try:
        files = demo_report.write(result)
    except (OSError, PretrainedError) as error:
        raise UserError(f"--out: cannot write to {args.out}: {error}") from None
    print(
        f"\nOpen {files[0]} for the pictures. The models are folders, for such commands as"
        f"\n  flowguard inspect {files[-1]}"
        f"\n  flowguard {args.task} PICTURE OUTPUT --model {files[-1]}"
    )
    return 0
