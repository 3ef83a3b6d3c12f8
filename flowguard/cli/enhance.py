r"""What ``superres`` and ``lowlight`` share: pictures in, pictures out, and an account of it."""

__all__ = ["add_arguments", "enhance"]

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flowguard.cli.jobs import Job, Work, digest, fingerprint, jobs, made_of, origin, true_path
from flowguard.cli.machine import add_machine, own_share, threads
from flowguard.cli.outcomes import Outcome, packed, tell, unpacked
from flowguard.cli.parsing import (
    Parser,
    UserError,
    add_limit,
    file,
    folder,
    need,
    number,
    whole,
    writable,
)
from flowguard.cli.shares import Account, Ledger
from flowguard.cli.signals import Terminated
from flowguard.io.atomic import sweep

LEFT = 600  # seconds after which a temporary file is that of a process that was killed


def read_tile(text: Any) -> int | str:
    r"""Reads the size of a tile: auto, none, or a whole number."""
    return str(text) if text in ("auto", "none") else whole(8, 10**6)(text)


def add_arguments(parser: Parser, *, model: str, temperature: float) -> None:
    r"""Adds the arguments that both commands have.

    Arguments:
        parser: The parser of the command.
        model: The model by default.
        temperature: The default of the temperature.
    """
    parser.add_argument(
        "input",
        nargs="+",
        type=file,
        metavar="INPUT",
        help=(
            "pictures: files, folders (without the folders within), globs; PNG, JPEG, TIFF, WebP"
            " or BMP"
        ),
    )
    parser.add_argument(
        "output",
        type=folder,
        metavar="OUTPUT",
        help=(
            "folder to write, under the names of the pictures; several samples are numbered. For"
            " one picture and one sample it may be a file that ends in .png or .tif"
        ),
    )
    parser.add_argument(
        "--model",
        type=folder,
        default=model,
        metavar="DIR",
        help=(
            "folder of the model, as save_pretrained, `flowguard train` or `flowguard convert`"
            f" wrote it (default: {model}, which the package brings)"
        ),
    )
    parser.add_argument(
        "--samples",
        type=whole(1, 1000),
        default=1,
        metavar="N",
        help="samples of each picture (default: 1)",
    )
    parser.add_argument(
        "--temperature",
        type=number(0, 100),
        default=temperature,
        metavar="T",
        help=f"standard deviation of the noise (default: {temperature:g})",
    )
    parser.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the noise (default: 0); each picture's is made of it and of its name",
    )
    parser.add_argument(
        "--tile",
        type=read_tile,
        default="auto",
        metavar="SIZE",
        help=(
            "rows and columns of the tiles that a large picture is made in, in pixels of the"
            " result, 8 or more; auto (default) cuts where the result is larger than about 640 ×"
            " 640; none never cuts"
        ),
    )
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("auto", "bf16", "float16", "float32"),
        help=(
            "what the networks compute in (default: float32); bf16 is quicker where the processor"
            " has units for it and slower where not: auto tries both on a tile, and says which it"
            " took"
        ),
    )
    parser.add_argument(
        "--format",
        default="png",
        choices=("png", "tiff"),
        help="what is written (default: png); pictures of 16 bits stay so",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=(
            "write pictures again; by default those that were made before are skipped, and no"
            " other file is replaced"
        ),
    )
    parser.add_argument(
        "--report",
        type=file,
        metavar="FILE",
        help="write an account of all pictures, as a page, whose name ends in .html",
    )
    parser.add_argument(
        "--patience",
        type=number(2, 10**6),
        default=120.0,
        metavar="SECONDS",
        help=(
            "where torchrun or srun started several processes, which share the pictures: how long"
            " a process may give no sign of life until it is given up (default: 120)"
        ),
    )
    add_limit(parser)
    add_machine(parser)
    parser.add_config()


def load_model(path: Path, kind: str | Sequence[str], device: str, option: str = "--model") -> Any:
    r"""Returns the model of a folder.

    Arguments:
        path: The folder.
        kind: The name of the class that it must have, or several.
        device: The device.
        option: The option that named it, for the error.

    Raises:
        UserError: If the folder holds no model, or one of another class.
    """
    from flowguard.models import store

    kinds = [kind] if isinstance(kind, str) else list(kind)
    try:
        model = store.load(path, device)
    except store.PretrainedError as error:
        raise UserError(f"{option}: {error}") from None
    if type(model).__name__ not in kinds:
        raise UserError(
            f"{option}: {path} holds a {type(model).__name__}; this needs a {' or a '.join(kinds)}"
        )
    return model


def enhance(
    args: Any, model: Any, finish: Callable[[Any], Any], grow: Callable[[Any], Any]
) -> int:
    r"""Enhances all pictures and tells of them; returns the exit code.

    Where torchrun or srun started several processes, each enhances its share.

    Arguments:
        args: The arguments.
        model: The model.
        finish: What is done to each sample.
        grow: What is done to the opacity.
    """
    need(("PIL", "Pillow"))
    from flowguard.io.pictures import at_most

    work, share = prepared(args), own_share()
    alone = share.world == 1
    folder = work.jobs[0].targets[0].parent
    with contextlib.nullcontext() if alone else Ledger(folder, share, args.patience) as ledger:
        with threads(args.threads, share.local_world), at_most(args.max_pixels):
            precision = chosen(args.precision, model)
            bar = _bar(share.of(work.jobs), hidden=share.rank > 0)
            outcomes = [_one(job, args, model, precision, finish, grow) for job in bar]
        if ledger is None:
            return _account_of(outcomes, args, work)
        return _together(ledger, outcomes, args, work)


def chosen(precision: str, model: Any) -> str | None:
    r"""Returns what the networks of a model are to compute in, and says so where it was tried.

    Arguments:
        precision: The precision that is asked for.
        model: The model.

    Returns:
        The name of the precision; :py:`None` for that of a model that is in float32 as it is, or
        that is in another, as saved.

    Raises:
        UserError: If another precision is asked of a model that is not in float32.
    """
    from flowguard.models.precision import fastest, wanted

    if precision == "float32":
        return None
    try:
        wanted(model, precision)
    except TypeError as error:
        raise UserError(f"--precision: {error}") from None
    if precision != "auto":
        return precision
    tried = fastest(model)
    print(f"flowguard: {tried}; --precision chooses another", file=sys.stderr)
    return tried.precision


def _account_of(outcomes: list[Outcome], args: Any, work: Work, by: str = "") -> int:
    sweep((t for job in work.jobs for t in job.targets), age=LEFT)
    if args.report is not None:
        from flowguard.cli.page import write_page

        try:
            write_page(args.report, outcomes, args)
        except OSError as error:
            raise UserError(f"--report: cannot write {args.report}: {error.strerror}") from None
    return tell(outcomes, args, work.left_out, by)


def _together(ledger: Ledger, outcomes: list[Outcome], args: Any, work: Work) -> int:
    r"""Tells of the shares of all processes, if this is rank 0, and else tells that of its own."""
    rank, world = ledger.share.rank, ledger.share.world
    account = Account(rank, digest(work), [packed(o) for o in outcomes])
    if rank == 0:
        accounts, lost = ledger.gather(account)
        places = {job.source: i for i, job in enumerate(work.jobs)}
        found = [unpacked(told) for a in accounts for told in a.told]
        found.sort(key=lambda o: places.get(o.source, len(places)))
        code = _account_of(found, args, work, f" by {world - len(lost)} processes")
        others = [a.rank for a in accounts if a.work != account.work]
        return max(code, _warn_of_others(lost, others, args.patience, work, world))
    if not ledger.hand_in(account):
        print(
            f"flowguard: rank {rank}: rank 0 gave no sign of life in {args.patience:g} s; what"
            " follows is of this share alone",
            file=sys.stderr,
        )
        args.report = None  # that of all is not to be replaced by that of some
        return tell(outcomes, args, work.left_out, f" of rank {rank}")
    if all(o.status != "failed" for o in outcomes):
        return 0
    with contextlib.suppress(Terminated):  # as torchrun ends all, once rank 0 has told of it
        ledger.await_end()
    return 1


def _warn_of_others(
    lost: list[int], others: list[int], patience: float, work: Work, world: int
) -> int:
    for rank in lost:
        share = work.jobs[rank::world]
        lacking = sum(not all(t.exists() for t in job.targets) for job in share)
        print(
            f"flowguard: rank {rank} gave no sign of life in {patience:g} s: {lacking} of its"
            f" {len(share)} picture(s) have no result; the same command makes them",
            file=sys.stderr,
        )
    for rank in others:
        print(
            f"flowguard: rank {rank} found other pictures in INPUT than rank 0, so that some may"
            " be left; the same command makes them",
            file=sys.stderr,
        )
    return 1 if lost or others else 0


def prepared(args: Any) -> Work:
    r"""Returns the work, once all arguments are known to be usable.

    Arguments:
        args: The arguments.

    Raises:
        UserError: If one of them is not.
    """
    suffix = ".png" if args.format == "png" else ".tif"
    work = jobs(args.input, args.output, args.samples, suffix)
    if args.format == "tiff":
        need(("tifffile", "tifffile"))
    writable(work.jobs[0].targets[0].parent, "OUTPUT")
    if args.report is not None:
        if args.report.is_dir():
            raise UserError(f"--report must name a file; {args.report} is a folder")
        own = true_path(args.report) in {true_path(job.source) for job in work.jobs}
        if own or args.report.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--report must name a page of its own, .html; got {args.report}")
        writable(true_path(args.report).parent, "the folder of --report")
    return work


def _bar(work: Sequence[Job], hidden: bool) -> Iterator[Job]:
    from tqdm.auto import tqdm

    with tqdm(work, unit="picture", disable=hidden) as bar:
        for job in bar:
            bar.set_postfix_str(job.source.name[:40], refresh=True)
            yield job


def _one(
    job: Job,
    args: Any,
    model: Any,
    precision: str | None,
    finish: Callable[[Any], Any],
    grow: Callable[[Any], Any],
) -> Outcome:
    outcome = Outcome(job.source, job.targets)
    start = time.perf_counter()
    try:
        missing = _missing(job, args.overwrite)
        if not missing:
            outcome.status, outcome.reason = "skipped", "it was made before"
            return outcome
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a guard's warning is told of at the end
            _write(outcome, missing, args, model, precision, finish, grow)
    except Exception as error:  # one picture must not end the others
        outcome.status = "failed"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        outcome.reason = lines[0] if lines else type(error).__name__
    outcome.seconds = time.perf_counter() - start
    return outcome


def _missing(job: Job, overwrite: bool) -> list[int]:
    r"""The numbers of the samples that are still to be made."""
    exist = [t for t in job.targets if t.exists()]
    if exist and not overwrite:
        made = fingerprint(job.source)
        foreign = [t for t in exist if origin(t) != made]
        if foreign:
            raise UserError(
                f"{foreign[0]} exists, and is not known to be made of this picture as it is;"
                " --overwrite replaces it"
            )
    return [i for i, t in enumerate(job.targets) if overwrite or t not in exist]


def _write(
    outcome: Outcome,
    missing: list[int],
    args: Any,
    model: Any,
    precision: str | None,
    finish: Callable[[Any], Any],
    grow: Callable[[Any], Any],
) -> None:
    from flowguard import metrics
    from flowguard.cli.page import Shown, calibration, drawn
    from flowguard.cli.sampling import latents_for, sample, seed_of
    from flowguard.io import pictures
    from flowguard.ood.report import excess

    picture = pictures.read(outcome.source)
    parameter = next(model.parameters())
    y = picture.colour[None].to(parameter.device, parameter.dtype)
    alpha = None if picture.alpha is None else grow(picture.alpha[None])[0].clamp(0, 1)
    tile = None if args.tile == "none" else args.tile
    note = made_of(outcome.source)
    for i in missing:
        seed = seed_of(args.seed, outcome.source.name, i)
        latents = latents_for(model, y, args.temperature, seed)
        x, reports = sample(model, y, latents, tile, precision)
        if reports:
            outcome.p_value = min(float(r.p_value.min()) for r in reports)
            outcome.flagged = any(bool(r.flagged.any()) for r in reports)
            outcome.excess = max(excess(level) for r in reports for level in r.levels.values())
            outcome.calibration = calibration(reports)
        outcome.artefacts = max(outcome.artefacts, float(metrics.error_rate(x, per_pixel=True)))
        raw = x[0].float().cpu()
        x = finish(x)[0].float().cpu()
        outcome.size = (x.shape[-2], x.shape[-1])
        made = pictures.Picture(x, alpha, picture.grey, picture.bits, picture.icc)
        pictures.write(outcome.targets[i], made, note=note)
        if args.report is not None and not outcome.pictures:
            shown = Shown(picture.colour, raw, x, tuple(reports), outcome.targets[i].name)
            outcome.pictures = drawn(shown, grow)
