r"""``flowguard train``."""

__all__ = ["HELP", "parser", "run"]

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowguard.cli.machine import own_share, threads, usable_cores
from flowguard.cli.parsing import (
    IfGiven,
    Parser,
    UserError,
    file,
    folder,
    found,
    need,
    number,
    paths,
    whole,
    writable,
)

#: What the command does, in one line.
HELP = "train a flow on pictures"
TASKS = ("superres", "lowlight")
VERSION = 2  # of what a run folder holds: the greatest that --version takes
LISTED = 20  # files that are named one by one
#: What a run may be resumed with, other than what it began with: it changes no step that is made.
HARMLESS = {"steps", "validate_every", "checkpoint_minutes", "guard_pictures", "threads"}
HARMLESS |= {"margin", "policy", "boundary", "ood", "workers", "cache", "keep_maps"}
HARMLESS |= {"accelerator", "devices", "num_nodes", "strategy"}
#: What a run means that does not say it: runs that were begun before there were these options.
UNSAID = {"margin": 0.0, "corrupt": 0.0, "policy": "warn", "boundary": 0.999}
UNSAID |= {"pixel_weight": 0.0, "pixel_loss": "l1"}
#: Couplings whose flows have no bound: a margin, or a guard that acts, would hide it.
UNBOUNDED = ("affine", "reparametrized")
#: Options that name folders of pictures, and what else is to be read.
FOLDERS = ("data", "pairs", "val", "val_pairs", "ood")
PLACES = (*FOLDERS, "encoder_weights", "model")
#: What a model is: a trained one, from which a run begins, says it of itself.
OF_MODEL = (
    *("coupling", "bins", "scale", "levels", "flow_steps", "hidden", "no_residual"),
    *("features", "encoder", "encoder_weights", "encoder_blocks"),
)
#: What is no option of a run: it says which run is meant.
MEANT = ("out", "resume", "config", "print_config", "given", "version")
#: Where processes that work together find their number.
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


def parser() -> Parser:
    r"""Returns the parser."""
    train = Parser(
        description=(
            "Train a flow on a folder of pictures: to enlarge them (superres), or to brighten"
            " those taken in the dark (lowlight). Writes a run folder: config.yaml, metrics.csv,"
            " validation.csv, checkpoints, and the models best and model, which --model of other"
            " commands takes. Ctrl-C and SIGTERM save first; --resume goes on with the very steps"
            " of a run that was never stopped."
        )
    )
    train.add_argument(
        "task",
        nargs="?",
        choices=TASKS,
        action=IfGiven,
        help="what the flow is for (default: that of --model, or superres)",
    )
    _add_run(train)
    _add_data(train)
    _add_model(train)
    _add_optimization(train)
    _add_trainer(train)
    train.add_config()
    train.add_argument(
        "--version",
        type=whole(1, VERSION),
        default=VERSION,
        metavar="N",
        help=f"layout of the run folder, which its config.yaml names (default: {VERSION})",
    )
    return train


def _add_run(train: Parser) -> None:
    train.add_argument("--out", type=folder, metavar="RUN", help="run folder to write")
    train.add_argument(
        "--resume",
        type=folder,
        metavar="RUN",
        help=(
            "run folder to go on with, by its own options; of others, only those that change no"
            " step are taken: --steps to go further, and those of machine and validation"
        ),
    )


def _add_data(train: Parser) -> None:
    train.add_argument(
        "--data", type=folder, metavar="DIR", help="folder of pictures to learn from, nested"
    )
    train.add_argument(
        "--pairs",
        type=folder,
        metavar="DIR",
        help=(
            "folder of their conditions, by the same names: small pictures, or dark ones"
            " (default: they are made of the pictures)"
        ),
    )
    train.add_argument(
        "--val",
        type=folder,
        metavar="DIR",
        help="folder of pictures to validate with (default: each twentieth of --data, held out)",
    )
    train.add_argument(
        "--val-pairs",
        type=folder,
        metavar="DIR",
        help="folder of their conditions; it may be that of --val: NAME_HR.png, NAME_LRx4.png",
    )
    train.add_argument(
        "--ood",
        type=folder,
        metavar="DIR",
        help=(
            "folder of pictures that the flow is asked to take as conditions at each validation,"
            " beside corrupted ones (default: these alone)"
        ),
    )
    train.add_argument(
        "--batch",
        type=whole(1, 10**6),
        default=12,
        metavar="N",
        help="crops in a batch, of all processes together (default: 12)",
    )
    train.add_argument(
        "--crop",
        type=whole(1, 10**5),
        default=48,
        metavar="N",
        help="rows and columns of a crop (default: 48)",
    )
    train.add_argument(
        "--corrupt",
        type=number(0.0, 1.0),
        default=0.0,
        metavar="SHARE",
        help=(
            "share of the crops that are corrupted a little: noise, JPEG or blur on the condition;"
            " for superres also patterns, on both (default: 0)"
        ),
    )
    train.add_argument(
        "--cache",
        type=number(0.0, 10**6),
        default=2.0,
        metavar="GB",
        help="memory for decoded pictures; more are read again (default: 2)",
    )
    train.add_argument(
        "--workers",
        type=whole(0, 1024),
        default=0,
        metavar="N",
        help="processes that make batches; 0: the training itself (default: 0)",
    )


def _add_model(train: Parser) -> None:
    train.add_argument(
        "--model",
        type=folder,
        metavar="DIR",
        help=(
            "folder of a trained model, or the name of one of the package's, with whose weights the"
            " run begins; what it is (--coupling to --encoder-blocks) follows from it"
        ),
    )
    train.add_argument(
        "--coupling",
        default="robust",
        choices=("affine", "reparametrized", "robust", "bspline"),
        help="coupling of the flow (default: robust)",
    )
    train.add_argument(
        "--bins",
        type=whole(2, 256),
        metavar="N",
        help="bins of the splines of --coupling robust (default: 2)",
    )
    train.add_argument(
        "--scale",
        type=whole(2, 64),
        default=4,
        metavar="N",
        help="factor of superres (default: 4)",
    )
    for name, most, default, words in (
        ("--levels", 16, 2, "levels of the flow"),
        ("--flow-steps", 256, 4, "steps of the flow at each level"),
        ("--hidden", 65536, 64, "channels of the couplings' hidden layers"),
    ):
        train.add_argument(
            name,
            type=whole(1, most),
            default=default,
            metavar="N",
            help=f"{words} (default: {default})",
        )
    train.add_argument(
        "--margin",
        type=number(0.0, 1e3),
        metavar="X",
        help=(
            "how far from [0, 1] pictures may lie; 0: anywhere (default: that of --model; 0.25; 0 for"
            " the affine couplings, whose artefacts it would hide)"
        ),
    )
    train.add_argument(
        "--no-residual",
        action="store_true",
        help=(
            "model the picture itself, not what it adds to the bicubic enlargement or, for"
            " lowlight, to a first guess"
        ),
    )
    train.add_argument(
        "--features",
        type=whole(1, 65536),
        metavar="N",
        help=(
            "channels of the encoder's maps (default: those of --encoder-weights, or 64; 32 for"
            " lowlight)"
        ),
    )
    _add_encoder(train)


def _add_encoder(train: Parser) -> None:
    train.add_argument(
        "--encoder",
        choices=("pyramid", "rrdb"),
        help="encoder of superres (default: that of --encoder-weights, or pyramid)",
    )
    train.add_argument(
        "--encoder-weights",
        type=file,
        metavar="FILE",
        help=(
            "where the encoder begins: a checkpoint of ESRGAN or Real-ESRGAN, the .param or .bin of"
            " such a network in ncnn's format, a model folder, or a model of the package's, by"
            " its name"
        ),
    )
    train.add_argument(
        "--encoder-blocks",
        type=whole(0, 1024),
        metavar="N",
        help=(
            "blocks of the encoder (default: those of --encoder-weights, or 8; 23 for rrdb;"
            " 4 for lowlight)"
        ),
    )
    train.add_argument(
        "--encoder-lr",
        type=number(0.0, 1e3),
        metavar="X",
        help="greatest learning rate of the encoder (default: --lr); 0 freezes it",
    )
    train.add_argument(
        "--freeze-encoder", action="store_true", help="leave the encoder's weights as they are"
    )
    train.add_argument(
        "--keep-maps",
        type=number(0.0, 10**6),
        default=1.0,
        metavar="GB",
        help="memory for a frozen encoder's maps of validation pictures (default: 1)",
    )


def _add_optimization(train: Parser) -> None:
    train.add_argument(
        "--steps",
        type=whole(1, 10**9),
        default=20000,
        metavar="N",
        help="steps of the run (default: 20000)",
    )
    train.add_argument(
        "--accumulate",
        type=whole(1, 10**6),
        default=1,
        metavar="N",
        help="batches that make a step (default: 1)",
    )
    train.add_argument(
        "--lr",
        type=number(1e-12, 1e3),
        default=1e-3,
        metavar="X",
        help="greatest learning rate (default: 0.001)",
    )
    train.add_argument(
        "--warmup",
        type=whole(0, 10**9),
        metavar="N",
        help="steps until it is reached (default: 50, or a tenth of the steps)",
    )
    train.add_argument(
        "--schedule",
        default="cosine",
        choices=("cosine", "steps", "constant"),
        help=(
            "how it falls: by a cosine, or halved after 50, 75, 90 and 95%% of the steps"
            " (default: cosine)"
        ),
    )
    train.add_argument(
        "--clip",
        type=number(1e-12, 1e12),
        default=10.0,
        metavar="X",
        help="greatest norm of the gradient (default: 10)",
    )
    train.add_argument(
        "--pixel-weight",
        type=number(0.0, 1e6),
        default=0.0,
        metavar="X",
        help=(
            "how much the error of the picture at temperature 0 counts beside the bits per"
            " dimension: more PSNR, slower steps (default: 0)"
        ),
    )
    train.add_argument(
        "--pixel-loss",
        default="l1",
        choices=("l1", "l2"),
        help="that error: the mean absolute, or the mean squared one (default: l1)",
    )
    train.add_argument(
        "--average",
        type=number(0.0, 1.0),
        default=0.999,
        metavar="X",
        help="what the averaged weights keep of themselves in a step (default: 0.999)",
    )
    train.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of all randomness (default: 0)",
    )


def _add_trainer(train: Parser) -> None:
    train.add_argument(
        "--validate-every",
        type=whole(1, 10**9),
        default=1000,
        metavar="N",
        help="steps between two validations (default: 1000)",
    )
    train.add_argument(
        "--checkpoint-minutes",
        type=number(0.0, 10**6),
        default=10.0,
        metavar="X",
        help="minutes between two checkpoints (default: 10)",
    )
    train.add_argument(
        "--guard-pictures",
        type=whole(1, 10**9),
        default=64,
        metavar="N",
        help="pictures that the guard is fitted on (default: 64)",
    )
    train.add_argument(
        "--policy",
        choices=("warn", "report", "raise", "shrink"),
        help=(
            "what the guard does with strange conditions: tell, keep to itself, refuse, or pull"
            " what the encoder makes of them back to what it knows, and tell (default: that of"
            " --model; shrink for superres; warn for lowlight and for the affine couplings)"
        ),
    )
    train.add_argument(
        "--boundary",
        type=number(0.5, 1.0),
        default=0.95,
        metavar="X",
        help=(
            "share of held-out pixels that shrink leaves as they are (default: that of --model;"
            " 0.95)"
        ),
    )
    train.add_argument(
        "--precision",
        default="32-true",
        choices=("32-true", "bf16-mixed", "64-true"),
        help="of the networks; the flow's own maths is never below 32 (default: 32-true)",
    )
    train.add_argument("--compile", action="store_true", help="compile the model")
    train.add_argument(
        "--accelerator",
        default="auto",
        metavar="NAME",
        help="auto (default), cpu, gpu, mps, …: Lightning's, as the three that follow",
    )
    train.add_argument(
        "--devices",
        type=whole(1, 4096),
        default=1,
        metavar="N",
        help="devices, or processes on the CPU, on each machine (default: 1)",
    )
    train.add_argument(
        "--num-nodes", type=whole(1, 4096), default=1, metavar="N", help="machines (default: 1)"
    )
    train.add_argument("--strategy", default="auto", metavar="NAME", help="auto (default), ddp, …")
    train.add_argument(
        "--threads",
        type=whole(1, 1024),
        metavar="N",
        help="CPU threads of each process (default: as many as there are cores at leisure)",
    )


def run(args: Any) -> int:
    r"""Trains a flow.

    Arguments:
        args: The arguments.
    """
    need(("lightning", "lightning"), ("PIL", "Pillow"), extra="train")
    args.task = args.task or TASKS[0]
    if args.resume is not None:
        _resume(args)
    else:
        _begin(args)
    count = args.threads
    if count is None and args.devices > 1:
        count = max(1, len(usable_cores()) // args.devices)
    with threads(count):
        return _train(args)


def first_process() -> bool:
    r"""Whether this is the process that writes, if several work together."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def _place(option: str, path: str) -> str:
    r"""The whole name of a place, which may be that of a model of the package's."""
    if option in ("encoder_weights", "model"):
        return os.path.abspath(found(path, f"--{option.replace('_', '-')}"))
    return os.path.abspath(path)


def _begin(args: Any) -> None:
    if args.data is None or args.out is None:
        got = (
            " alone".join(f"--{name}" for name in ("data", "out") if getattr(args, name))
            or "neither"
        )
        raise UserError(f"--data and --out must be given, or --resume; got {got}")
    for name in PLACES:
        if getattr(args, name) is not None:
            setattr(args, name, _place(name, getattr(args, name)))
    paths(args, "out")
    if args.model is not None:
        _leave_to_the_model(_given(args))
    else:
        _go_by_what_is_usual(args)
    if args.val_pairs is not None and args.val is None:
        raise UserError(
            "--val-pairs must come with --val, whose conditions it names; got it alone"
        )
    if args.pixel_loss != "l1" and not args.pixel_weight:
        raise UserError(
            "--pixel-loss l2 must come with --pixel-weight, which says how much it counts; got it"
            " alone"
        )
    for name in FOLDERS:
        place = getattr(args, name)
        if place is not None and _lies_in(args.out, place):
            raise UserError(
                f"--out must not lie in --{name.replace('_', '-')}, as the pictures that a run"
                f" writes would be taken for those to read; got {args.out} in {place}"
            )
    if args.task == "lowlight" and "scale" in args.given:
        raise UserError(
            "--scale must be left out for lowlight, whose pictures keep their size; got"
            f" {args.scale}"
        )
    if not first_process():
        return
    _refuse_a_run(args.out)
    if args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(f"--out must be a new or an empty folder; {args.out} holds other files")


def _go_by_what_is_usual(args: Any) -> None:
    r"""Takes what is not given, and depends on the model, from what models usually have."""
    from flowguard.models.base import MARGIN

    if args.margin is None:
        args.margin = 0.0 if args.coupling in UNBOUNDED else MARGIN
    if args.policy is None:
        acts = args.task == "superres" and args.coupling not in UNBOUNDED
        args.policy = "shrink" if acts else "warn"


def _given(args: Any) -> dict[str, Any]:
    r"""What is given, by a file of options as well."""
    usual = {**parser().get_defaults(), "task": TASKS[0]}
    return {n: v for n, v in vars(args).items() if n in args.given or v != usual.get(n)}


def _go_by(model: Any, args: Any) -> None:
    r"""Takes what is not given from the model that the run begins with."""
    given, conditioner = _given(args), model.conditioner
    task = TASKS[type(model).__name__ == "LowLightFlow"]
    if given.get("task", task) != task:
        raise UserError(f"--model must name a model of {args.task}; {args.model} is of {task}")
    args.task = task
    if args.margin is None:
        args.margin = model.margin or 0.0
    if args.policy is None:
        args.policy = conditioner.policy
    if "boundary" not in given:
        args.boundary = max(0.5, conditioner.boundary)


def _leave_to_the_model(given: dict[str, Any]) -> None:
    for name in OF_MODEL:
        if name in given:
            raise UserError(
                f"--{name.replace('_', '-')} must be left out with --model, which says it of itself;"
                f" got {given[name]}"
            )


def _trained(path: Path) -> Any:
    from flowguard.cli.enhance import load_model

    return load_model(path, ("SuperResolutionFlow", "LowLightFlow"), "cpu")


def _lies_in(inner: Path, outer: str) -> bool:
    return Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer))


def _resume(args: Any) -> None:
    import yaml

    place = Path(args.resume)
    given = dict(args.given)
    named = given.pop("out", None)
    if "config" in given:
        raise UserError("--resume goes by the options of the run; leave --config out")
    if named is not None and Path(named).resolve() != place.resolve():
        raise UserError(f"--out must be the run that is resumed; got {named} and {place}")
    try:
        held = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
        version = held["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--resume must name a run folder; {place} has no config.yaml") from None
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"--resume: {place / 'config.yaml'} cannot be read") from None
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"--resume: {place} was written by a newer flowguard; got {version}")
    try:
        # Flows for low light had no first guess.
        unsaid = {**UNSAID, "no_residual": held.get("task") == "lowlight"}
        saved = parser().saved({**unsaid, **held})
        if saved["data"] is None:
            raise UserError("data must name a folder; got nothing")
    except UserError as error:
        raise UserError(f"--resume: {place / 'config.yaml'}: {error}") from None
    if saved["model"] is not None:
        _leave_to_the_model(given)
    for name, value in given.items():
        if name in MEANT:
            continue
        value = _place(name, value) if name in PLACES else value
        if name not in HARMLESS and saved.get(name) != value:
            option = name if name == "task" else f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} must be that of the run in {place}, {saved.get(name)}; got {value}"
            )
        saved[name] = value
    for name in saved.keys() - set(MEANT):
        setattr(args, name, saved[name])
    args.out = place


def _own_words(error: Exception) -> str:
    r"""What an error says: a process of the loader puts its traceback before that."""
    kind = type(error)
    last = str(error).rstrip().splitlines()[-1]
    return last.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")


def _train(args: Any) -> int:
    from flowguard.io.folder import Unreadable
    from flowguard.training.callbacks import Interrupted
    from flowguard.training.module import Diverged
    from flowguard.training.pictures import Undecodable
    from flowguard.training.run import WrongMachine

    try:
        with contextlib.ExitStack() as held:
            return _run(args, held)
    except Interrupted as stop:
        if not first_process():
            return 0  # the first process tells
        told = "saved" if stop.saved else "what was done since the last checkpoint is lost"
        print(f"\nflowguard: {told}; flowguard train --resume {args.out} goes on")
        return 128 + stop.number
    except Diverged as error:
        if first_process():
            print(f"flowguard: error: {error}", file=sys.stderr)
        return 1
    except WrongMachine as error:
        raise UserError(
            f"--accelerator {args.accelerator}, --devices {args.devices}, --strategy"
            f" {args.strategy}: {error}"
        ) from None
    except Undecodable as error:
        raise UserError(f"{_own_words(error)} in {args.data}") from None
    except Unreadable as error:
        raise UserError(
            f"cannot read {_own_words(error)}; the pictures must stay while the run goes on: bring"
            f" them back and go on by --resume {args.out}"
        ) from None
    except OSError as error:
        told = f"cannot write to {args.out}: {error.strerror or error}"
        if not (args.out / "config.yaml").exists():
            raise UserError(f"{told}; the run folder must stay while the run goes on") from None
        raise UserError(
            f"{told}; what was saved before is whole: make room and go on by --resume {args.out}"
        ) from None


def _run(args: Any, held: contextlib.ExitStack) -> int:
    import torch

    from flowguard.demo import training_report
    from flowguard.training.board import Board, Gallery
    from flowguard.training.encoders import keep_encoder
    from flowguard.training.guard import Conditions
    from flowguard.training.module import FlowModule, Optimization
    from flowguard.training.outside import Outside, questions
    from flowguard.training.run import Loading, Run, fit, steps_done
    from flowguard.training.validation import Wholes

    place = Run(args.out)
    try:
        done = steps_done(place)
    except ValueError as error:
        raise UserError(str(error)) from None
    if done > args.steps:
        raise UserError(f"--steps must be at least the {done} that are done; got {args.steps}")
    _check_machine(args)
    frozen = _frozen(args)
    weights = args.encoder_weights
    if weights is not None and not (place.encoder.exists() or os.path.exists(weights)):
        raise UserError(
            f"--encoder-weights must name a file, or a model folder; there is no {weights}"
        )
    try:
        torch.manual_seed(args.seed)
        model = _model(args, place)
        if frozen:
            model.freeze_encoder()
        multiple = model.scale * model.multiple
        if args.precision == "64-true":
            model = model.double()  # with its averages
        if args.crop % multiple:
            raise UserError(f"--crop must be a multiple of {multiple}; got {args.crop}")
        batches, training, held_out = _pictures(args, model.scale)
        judged = Wholes(held_out, args.seed)
        asked, faults = questions(judged, folder=args.ood, size=96 // model.scale, seed=args.seed)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None

    def begin() -> None:
        if not first_process():
            return
        _name(faults, "left out")
        writable(args.out, "--out")
        _keep_out_others(args, held)
        place.sweep()
        if args.encoder_weights is not None and not place.encoder.exists():
            keep_encoder(model.conditioner.get_submodule("encoder"), place.encoder)
        if args.model is not None and not place.began:
            model.save_pretrained(place.start)
        _write_config(args, place.config)

    optimization = Optimization(
        steps=args.steps,
        lr=args.lr,
        warmup=args.warmup,
        schedule=args.schedule,
        clip=args.clip,
        seed=args.seed,
        encoder_lr=None if frozen else args.encoder_lr,
        pixel_weight=args.pixel_weight,
        pixel_loss=args.pixel_loss,
    )
    conditions = Conditions(
        Wholes(training, args.seed),
        judged,
        most=args.guard_pictures,
        size=96 // model.scale,
        seed=args.seed,
        policy=args.policy,
        boundary=args.boundary,
    )
    keep = int(args.keep_maps * 1e9)
    told = fit(
        FlowModule(model, optimization, compiled=args.compile, keep=keep),
        Loading(batches, judged, args.workers),
        place,
        conditions,
        validate_every=args.validate_every,
        minutes=args.checkpoint_minutes,
        decay=args.average,
        accumulate=args.accumulate,
        precision=args.precision,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=args.strategy,
        accelerator=args.accelerator,
        begin=begin,
        callbacks=[
            Outside(args.out / "outside.csv", asked, conditions, args.seed),
            Gallery(args.out / "pictures", judged, args.seed),
            Board(args.out / "tensorboard"),
        ],
    )
    if first_process():
        _name(batches.pairs.broken(), "corrupt")
        print("; ".join(f"{name} {value:.4g}" for name, value in told.items()))
        print(f"The model is in {place.model}, the best one in {place.best};")
        print(f"open {training_report.write(args.out)} for the curves.")
    return 0


def _model(args: Any, place: Any) -> Any:
    r"""The model as a run begins with it: a fresh one, or a trained one that goes on."""
    from flowguard.training import build
    from flowguard.training.encoders import kept_encoder

    if args.model is not None:
        trained = _trained(place.start if place.began else args.model)
        if args.resume is None:
            _go_by(trained, args)
        return build.begun(trained, args.margin or None)
    return build.build(
        args.task,
        coupling=_coupling(args),
        scale=args.scale,
        levels=args.levels,
        steps=args.flow_steps,
        hidden=args.hidden,
        features=args.features,
        blocks=args.encoder_blocks,
        encoder=kept_encoder(place.encoder) if place.encoder.exists() else args.encoder,
        weights=args.encoder_weights,
        margin=args.margin or None,
        residual=not args.no_residual,
    )


def _keep_out_others(args: Any, held: contextlib.ExitStack) -> None:
    r"""Refuses a run that another process is at, and holds it against others until the end."""
    from flowguard.io.lock import alone

    try:
        held.enter_context(alone(args.out))
    except BlockingIOError:
        raise UserError(
            f"a run must be trained by one command at a time; another is at {args.out}: wait for"
            " its end, or end it by Ctrl-C or SIGTERM"
        ) from None
    if args.resume is None:
        _refuse_a_run(args.out)  # that another command began meanwhile


def _refuse_a_run(out: Path) -> None:
    if (out / "config.yaml").exists():
        raise UserError(
            f"--out: {out} holds a run already: go on with it by --resume {out}, or name another"
            " folder"
        )


def _coupling(args: Any) -> Any:
    r"""The map of the couplings: its name, or one of as many bins as were asked for."""
    if args.bins is None:
        return args.coupling
    if args.coupling != "robust":
        raise UserError(
            f"--bins must come with --coupling robust, whose splines it is about; got it with"
            f" {args.coupling}: leave it out"
        )
    from flowguard.image.maps import Robust

    return Robust(bins=args.bins)


def _frozen(args: Any) -> bool:
    r"""Whether the encoder is left as it is."""
    if args.freeze_encoder and args.encoder_lr:
        raise UserError(
            f"--encoder-lr must be 0, or be left out, with --freeze-encoder; got {args.encoder_lr:g}"
        )
    frozen: bool = args.freeze_encoder or args.encoder_lr == 0
    if frozen and args.encoder_weights is None and args.model is None:
        raise UserError(
            "--encoder-weights, or --model, must be given with a frozen encoder, which would stay"
            " untrained"
        )
    return frozen


def _check_machine(args: Any) -> None:
    r"""Refuses more processes than there are cores, or others than were started, and batches that
    they cannot share."""
    import torch

    cores = len(usable_cores())
    on_cpu = args.accelerator == "cpu" or (
        args.accelerator == "auto" and not torch.accelerator.is_available()
    )
    if on_cpu and args.devices > cores:
        raise UserError(f"--devices must be at most the {cores} core(s) here; got {args.devices}")
    world, share = args.devices * args.num_nodes, own_share()
    if share.world > 1 and share.world != world:  # each would train alone, all in one folder
        nodes = max(1, share.world // share.local_world)
        meant = f"--devices {share.local_world}" + (f" --num-nodes {nodes}" if nodes > 1 else "")
        raise UserError(
            f"--devices times --num-nodes must be the {share.world} processes that torchrun or srun"
            f" started; got {args.devices} times {args.num_nodes}: add {meant}"
        )
    if args.batch % world:
        raise UserError(f"--batch must be a multiple of the {world} processes; got {args.batch}")


def _pictures(args: Any, scale: int) -> tuple[Any, Any, Any]:
    r"""Batches, and the whole pairs that are trained with and validated with."""
    from flowguard.training.pictures import CropBatches, own_partners, pairs_of
    from flowguard.training.validation import sound, split_off

    budget = int(args.cache * 1e9 / args.devices)  # of the processes of a machine together
    pairs, faults = pairs_of(
        args.data, task=args.task, scale=scale, crop=args.crop, pairs=args.pairs, budget=budget
    )
    if first_process():
        _name(faults, "left out")
    training, rest = pairs, pairs
    if args.val is None:
        training, rest = split_off(pairs)
    else:
        least = 2 * scale * max(1, 8 // scale)
        own = own_partners(args.val) if args.task == "superres" else None
        partners = args.val_pairs or own
        rest, faults = pairs_of(
            args.val, task=args.task, scale=scale, crop=least, pairs=partners, budget=budget // 4
        )
        if first_process():
            _name(faults, "left out")
    held_out, faults = sound(rest)
    if first_process():
        _name(faults, "left out")
    batches = CropBatches(
        training, size=args.crop, batch=args.batch, seed=args.seed, corrupt=args.corrupt
    )
    return batches, training, held_out


def _name(files: Sequence[Any], what: str) -> None:
    r"""Names files on the standard error."""
    for named in files[:LISTED]:
        print(f"flowguard: {what}: {named}", file=sys.stderr)
    if len(files) > LISTED:
        print(f"flowguard: {what}: {len(files) - LISTED} more", file=sys.stderr)


def _write_config(args: Any, file: Path) -> None:
    import torch
    import yaml

    from flowguard.io.atomic import write_text

    unsaid = MEANT if args.model is None else (*MEANT, *OF_MODEL)
    options = {k: v for k, v in vars(args).items() if k not in unsaid}
    options["threads"] = torch.get_num_threads()
    write_text(file, yaml.safe_dump({"version": VERSION, **options}, sort_keys=False))
