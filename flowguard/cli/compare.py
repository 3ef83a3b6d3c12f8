r"""``flowguard compare``."""

__all__ = ["HELP", "parser", "run"]

from pathlib import Path
from typing import Any

from flowguard.cli.machine import add_machine, check_device, threads
from flowguard.cli.parsing import (
    DEMO,
    Parser,
    UserError,
    add_limit,
    folder,
    need,
    paths,
    whole,
    writable,
)

#: What the command does, in one line.
HELP = "train or load flows with several couplings and compare them"
NAMES = ("affine", "reparametrized", "robust2", "robust8", "bspline")


def parser() -> Parser:
    r"""Returns the parser."""
    compare = Parser(
        description=(
            "Train flows that differ in their coupling only, under one budget, and measure them"
            " on a held-out picture and on conditions from other worlds, beside models that were"
            " trained before. Writes report.html, metrics.json and a folder for each model that"
            " was trained, which --model of other commands takes."
        )
    )
    compare.add_argument(
        "--couplings",
        nargs="*",
        default=list(NAMES),
        choices=NAMES,
        metavar="NAME",
        help=(
            f"couplings to train, of {', '.join(NAMES)} (default: all); robust2 and robust8 are"
            " robust splines of 2 and 8 bins; none if only models are given: --couplings"
        ),
    )
    compare.add_argument(
        "--models",
        nargs="+",
        default=[],
        type=folder,
        metavar="DIR",
        help="folders of models to compare as they are, named by their folders (default: none)",
    )
    compare.add_argument(
        "--images",
        type=folder,
        metavar="DIR",
        help=(
            "folder of pictures to learn from, the last of which is held out; smaller ones than"
            " 96 rows and 384 columns are left out (default: photographs that scikit-image ships)"
        ),
    )
    compare.add_argument(
        "--task",
        default="superres",
        choices=("superres", "lowlight"),
        help="what the flows do (default: superres, four times)",
    )
    compare.add_argument(
        "--steps",
        type=whole(1, 10**9),
        metavar="N",
        help="training steps of each (default: 400; 30 with --quick)",
    )
    compare.add_argument(
        "--samples",
        type=whole(1, 1000),
        default=5,
        metavar="N",
        help="samples of each condition (default: 5)",
    )
    compare.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of all randomness (default: 0)",
    )
    compare.add_argument(
        "--out",
        type=folder,
        default="flowguard-compare",
        metavar="DIR",
        help="folder to write (default: flowguard-compare)",
    )
    add_limit(compare)
    add_machine(compare)
    compare.add_argument(
        "--quick", action="store_true", help="tiny models and 30 steps, to see that all works"
    )
    compare.add_config()
    return compare


def _loaded(args: Any) -> dict[str, Any]:
    from flowguard.cli.enhance import load_model

    kind = "SuperResolutionFlow" if args.task == "superres" else "LowLightFlow"
    found: dict[str, Any] = {}
    for path in args.models:
        name = path.resolve().name
        if name in found or name in args.couplings:
            name = str(path)
        if name in found or name in args.couplings:
            raise UserError(f"--models: two are called {name}; copy one to another folder")
        model = load_model(path, kind, args.device)
        if getattr(model, "scale", 4) != 4:
            raise UserError(f"--models: flows must enlarge by 4; {path} enlarges by {model.scale}")
        found[name] = model
    return found


def _images(path: Path | None) -> tuple[Any, list[Any]]:
    r"""The pictures of a folder, and those that are left out."""
    from flowguard.demo.compare import LEAST
    from flowguard.io.folder import Columns, Fault, PictureFiles, find, survey
    from flowguard.io.pictures import ImageError

    if path is None:
        return (), []
    if not path.is_dir():
        raise UserError(f"--images: there is no folder {path}")
    found = survey(find(path), rows=LEAST[0], columns=LEAST[1])
    files = PictureFiles(found.files, found.headers)
    # The last one is held out, and has to be whole; others may turn out not to be in training.
    count = len(files)
    while count:
        try:
            files.whole(count - 1)
        except ImageError as error:
            found.faults.append(Fault(files.files[count - 1], str(error)))
            count -= 1
        else:
            break
    if count < 2:
        raise UserError(
            f"--images: there must be two pictures or more of at least {LEAST[0]} rows and"
            f" {LEAST[1]} columns in {path}; got {count}"
        )
    return Columns(files, numbers=range(count)), found.faults


def run(args: Any) -> int:
    r"""Compares couplings.

    Arguments:
        args: The arguments.

    Raises:
        UserError: If what was asked for cannot be done.
    """
    need(*DEMO)
    from flowguard.demo import compare, compare_report
    from flowguard.io import pictures
    from flowguard.models.store import PretrainedError

    paths(args, "out", "models", "images")
    if not args.couplings and not args.models:
        raise UserError("--couplings: there is nothing to compare; name one, or --models")
    check_device(args.device)
    with pictures.at_most(args.max_pixels):
        images, left = _images(args.images)
    loaded = _loaded(args)
    out = writable(args.out, "--out")
    for name in ("report.html", "metrics.json"):
        if (out / name).is_dir():
            raise UserError(f"--out: {out / name} is a folder, and shall become a file")
    for name in args.couplings:
        if (out / name).is_file():
            raise UserError(f"--out: {out / name} is a file, and shall become a folder")
        if (out / name).resolve() in (path.resolve() for path in args.models):
            raise UserError(f"--out: the model of {out / name} would be replaced; name another")
    options = compare.CompareOptions(
        couplings=tuple(dict.fromkeys(args.couplings)),
        loaded=loaded,
        images=images,
        task=args.task,
        steps=args.steps or (30 if args.quick else compare.CompareOptions.steps),
        samples=args.samples,
        seed=args.seed,
        device=args.device,
        quick=args.quick,
    )
    with threads(args.threads), pictures.at_most(args.max_pixels):
        result = compare.compare(options)
    print(compare_report.table(result))
    try:
        files = compare_report.write(result, out)
    except (OSError, PretrainedError) as error:
        raise UserError(f"--out: cannot write to {args.out}: {error}") from None
    if len(images):
        left += [f"{images.files[i]}: it is corrupt" for i in images.broken()]
    for line in left:
        print(f"left out: {line}")
    print(f"\nOpen {files[0]} for the pictures; the models are in {args.out}.")
    return 0
