r"""An experiment with image models: it trains, measures, and writes its part of a page."""

__all__ = ["experiment"]

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from pages import between, write_part

from flowguard.io.atomic import write_text
from imaging import runs, tables
from imaging.bench import add_options, asked_of, in_one_line, measure_models, write
from imaging.gallery import gallery
from imaging.measure import Study


def parser(study: type[Study], told: str, page: Path, part: str) -> argparse.ArgumentParser:
    r"""Returns the parser of an experiment.

    Arguments:
        study: What is asked of the models.
        told: What the experiment is.
        page: The page that it writes a part of.
        part: The name of the part.
    """
    made = argparse.ArgumentParser(
        description=told.splitlines()[0],
        epilog="What follows -- are further options of flowguard train, the same for all runs.",
    )
    made.add_argument("--out", type=Path, required=True, help="folder of runs and rows")
    every = list(runs.COUPLINGS)
    made.add_argument("--couplings", nargs="+", choices=every, default=every)
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--steps", type=int, default=20000)
    made.add_argument("--crop-size", type=int, default=48, help="of training")
    made.add_argument("--train-on", default="bsds400", help="folder of --data (default: bsds400)")
    made.add_argument("--page", type=Path, default=page, help=f"default: {page}")
    made.add_argument("--part", default=part, help=f"markers in the page (default: {part})")
    add_options(made, study)
    made.add_argument("train", nargs="*", metavar="-- OPTIONS", help="of flowguard train")
    return made


def experiment(
    task: str,
    study: type[Study],
    told: str,
    page: Path,
    part: str,
    options: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    r"""Trains what is not trained yet, measures what is not measured, and writes a page's part.

    Arguments:
        task: The task of ``flowguard train``.
        study: What is asked of the models.
        told: What the experiment is.
        page: The page.
        part: The name of the part between whose markers tables and figures come.
        options: Options of ``flowguard train`` that all runs have.
        argv: The arguments; those of the process by default.
    """
    made = parser(study, told, page, part)
    args = made.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with in_one_line(made):
        _run(task, study, args, options)


def _run(task: str, study: type[Study], args: argparse.Namespace, options: Sequence[str]) -> None:
    between(args.page.read_text(encoding="utf-8"), args.part, "")  # told before the work
    if not args.data.is_dir():
        raise FileNotFoundError(f"--data must name a folder; there is no {args.data}")
    data = args.data / args.train_on
    common = ["--data", str(data), "--crop", str(args.crop_size), *options, *args.train]
    common = [word.replace("{data}", str(args.data)) for word in common]
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.out / "runs"
    trained = runs.train_all(task, folder, args.couplings, args.seeds, args.steps, common)
    places = {name: run.model for name, run in trained.items()}
    for name, run in trained.items():
        derived = args.out / "derived"
        places |= runs.derive(task, name, run, str(data), args.crop_size, derived)
    asked = asked_of(study, args)
    found, rivals = measure_models(asked, places, args.out, args.sets, args.device)
    write(asked, found, rivals, args.out)
    text = report(asked, args, common, found, rivals, trained)
    write_text(args.out / "part.md", text)
    images = args.page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    (images / f"{args.part}-figure.png").write_bytes((args.out / "figure.png").read_bytes())
    gallery(asked, places, images / f"{args.part}-gallery.jpg", args.sets, args.device)
    write_part(args.page, args.part, text)
    print(f"{args.page}: {args.part}")


def report(
    asked: Study,
    args: argparse.Namespace,
    common: Sequence[str],
    found: dict[str, list[tables.Row]],
    rivals: dict[str, list[tables.Row]],
    trained: dict[str, runs.Run],
) -> str:
    r"""Returns a page's part: how it was trained, the tables, the figures, what follows.

    Arguments:
        asked: What was asked of the models.
        args: The options.
        common: The options of training that all runs had.
        found: The rows of each model.
        rivals: The rows of what needs no model.
        trained: The runs.
    """
    kinds = tables.by_kind(asked, found)
    seconds = {
        coupling: fmean(
            runs.seconds_of_a_step(run)
            for name, run in trained.items()
            if name.rpartition("-")[0] == coupling
        )
        for coupling in args.couplings
    }
    times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    seeds = ", ".join(map(str, args.seeds))
    named = [Path(word).name if "/" in word else word for word in common]
    lines = [
        f"Each coupling was trained for {args.steps} steps with the seed{'s'[: len(args.seeds) > 1]}"
        f" {seeds}, by the options `{' '.join(named)}`. A step took {times} (median, by the clock).",
        "",
        tables.markdown(asked, kinds, tables.by_kind(asked, rivals)),
    ]
    if said := tables.verdicts(asked, kinds):
        lines += ["What this says of the claim:", "", *said, ""]
    taken = _taken(args)
    if taken:
        lines += [f"Measured on {taken}.", ""]
    lines += [
        f"![Quality and artefacts of each coupling](images/{args.part}-figure.png)",
        "",
        f"![Samples at temperature 0.8; artefact pixels are magenta](images/{args.part}-gallery.jpg)",
        "",
        f"*Crops of the first pictures: {_shown(asked, args.sets)}.*",
    ]
    return "\n".join(lines)


def _shown(asked: Study, sets: Sequence[str]) -> str:
    r"""Where the pictures of the gallery are from."""
    held = [name for name in sets if name in asked.held][:1]
    return ", ".join(
        {**asked.held, **asked.strange}[name]
        for name in sets
        if name in held or name in asked.strange
    )


def _taken(args: argparse.Namespace) -> str:
    r"""Which part of the sets was measured, if not all of it."""
    parts = []
    if args.pictures:
        parts.append(f"{args.pictures} picture(s) of each set")
    if args.crop:
        parts.append(f"the middle {args.crop}² of each")
    if args.outside_crop:
        parts.append(
            f"the middle {args.outside_crop}² of what is made of conditions without a truth"
        )
    return ", ".join(parts)
