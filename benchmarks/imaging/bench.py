r"""Measures the models of a folder, one picture after another, and writes what was found."""

__all__ = ["add_options", "asked_of", "in_one_line", "measure_models", "parser", "run", "write"]

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowguard.io.atomic import write_json, write_text
from flowguard.models import load
from imaging import tables
from imaging.gallery import gallery
from imaging.kept import Kept, Key, digest, find_models
from imaging.measure import (
    MODEL,
    Options,
    Row,
    Study,
    held_row,
    model_row,
    sample,
    strange_row,
)

Rows = dict[str, list[Row]]


def add_options(made: argparse.ArgumentParser, study: type[Study]) -> None:
    r"""Adds the options of what is measured.

    Arguments:
        made: The parser.
        study: What is asked.
    """
    every = [*study.held, *study.strange]
    made.add_argument("--data", type=Path, required=True, help="folder of the sets")
    made.add_argument("--sets", nargs="+", choices=every, default=every, help="default: all")
    made.add_argument("--pictures", type=_positive, help="at most so many of each set")
    made.add_argument("--crop", type=_positive, help="the middle of each target, in pixels")
    made.add_argument(
        "--outside-crop",
        type=_positive,
        help="the middle of what is made of conditions without a truth (default: --crop)",
    )
    made.add_argument("--samples", type=_positive, default=5, help="for the diversity")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=_positive)


def parser(study: type[Study], told: str) -> argparse.ArgumentParser:
    r"""Returns the parser of a benchmark.

    Arguments:
        study: What is asked.
        told: What it does.
    """
    made = argparse.ArgumentParser(description=told.splitlines()[0])
    made.add_argument("models", type=Path, help="folder of models, or of runs of training")
    made.add_argument("--out", type=Path, required=True, help="folder to write")
    add_options(made, study)
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive; got {value}")
    return value


def asked_of(study: type[Study], args: Any) -> Study:
    r"""Returns what is asked, by the options of the command line.

    Arguments:
        study: The class of it.
        args: The options.
    """
    options = Options(args.crop, args.outside_crop, args.samples, args.seed)
    return study(args.data, options, args.pictures)


def measure_models(
    study: Study,
    places: dict[str, Path],
    out: Path,
    sets: Sequence[str],
    device: str = "cpu",
) -> tuple[Rows, Rows]:
    r"""Returns the rows of each model, and of what needs no model.

    Arguments:
        study: What is asked.
        places: The folders of the models, by name.
        out: The folder where the rows are kept.
        sets: The names of the sets.
        device: The device.
    """
    folder = out / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    held = [name for name in sets if name in study.held]
    strange = [name for name in sets if name in study.strange]
    rivals: Rows = {}
    for name, restored in study.rivals().items():
        kept = Kept(folder / f"rival-{name.replace(' ', '-')}.json", "", study.options)
        rows = rivals[name] = []
        for of in held:
            rows += _each(
                kept,
                f"{name}: {study.held[of]}",
                (((of, h.picture, ""), h) for h in study.pictures(of)),
                lambda h, restored=restored: study.quality(restored(h), h),
            )
    found: Rows = {}
    for name, place in places.items():
        model = load(place)
        if not isinstance(model, study.model):
            print(f"left out: {place} is a {type(model).__name__}", file=sys.stderr)
            continue
        if model.scale != study.scale:
            print(f"left out: {place} enlarges by {model.scale}", file=sys.stderr)
            continue
        model = model.to(device).eval()
        if model.conditioner.policy != "shrink":  # which changes what is made
            model.conditioner.policy = "report"
        # What is compiled at the first use is no part of what a sample costs.
        sample(model, torch.zeros(1, 3, 16, 16, device=device), 1, 1.0, None)
        kept = Kept(folder / f"{name.replace('/', '--')}.json", digest(place), study.options)
        if (MODEL, "", "") not in kept:
            kept.add((MODEL, "", ""), model_row(model))
        rows = found[name] = [kept[MODEL, "", ""]]
        for of in held:
            rows += _each(
                kept,
                f"{name}: {study.held[of]}",
                (((of, h.picture, ""), h) for h in study.pictures(of)),
                lambda h, model=model: held_row(study, model, _to(h, device)),
            )
        for of in strange:
            rows += _each(
                kept,
                f"{name}: {study.strange[of]}",
                (((of, s.picture, s.kind), s) for s in study.asked(of)),
                lambda s, model=model: strange_row(study, model, _to(s, device)),
            )
    return found, rivals


def _to(row: Any, device: str) -> Any:
    return row._make(v.to(device) if isinstance(v, torch.Tensor) else v for v in row)


def _each(
    kept: Kept,
    told: str,
    pictures: Iterable[tuple[Key, Any]],
    measured: Callable[[Any], Row],
) -> list[Row]:
    r"""The rows of these pictures, of which those that are not kept yet are measured."""
    rows = []
    with torch.no_grad(), tqdm(desc=told, unit="picture", disable=None) as bar:
        for key, picture in pictures:
            if key not in kept:
                kept.add(key, measured(picture))
            rows.append(kept[key])
            bar.update()
    return rows


def write(study: Study, found: Rows, rivals: Rows, out: Path) -> str:
    r"""Writes tables, numbers and the figure; returns the tables.

    Arguments:
        study: What is asked.
        found: The rows of each model.
        rivals: The rows of what needs no model.
        out: The folder.
    """
    kinds = tables.by_kind(study, found)
    text = tables.markdown(study, kinds, tables.by_kind(study, rivals))
    write_text(out / "table.md", text)
    write_json(out / "numbers.json", {"kinds": kinds, "rivals": tables.by_kind(study, rivals)})
    tables.draw(study, kinds, tables.by_kind(study, rivals), out / "figure.png")
    return text


@contextlib.contextmanager
def in_one_line(made: argparse.ArgumentParser) -> Iterator[None]:
    r"""Tells mistakes in one line, and how to go on after Ctrl-C.

    Arguments:
        made: The parser of the command.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        made.error(str(error))
    except KeyboardInterrupt:
        print("\nstopped; what was measured is kept: the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


def run(study: type[Study], told: str, argv: Sequence[str] | None = None) -> None:
    r"""Runs a benchmark from the command line.

    Arguments:
        study: What is asked.
        told: What it does.
        argv: The arguments; those of the process by default.
    """
    made = parser(study, told)
    args = made.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with in_one_line(made):
        places = find_models(args.models)
        asked = asked_of(study, args)
        args.out.mkdir(parents=True, exist_ok=True)
        found, rivals = measure_models(asked, places, args.out, args.sets, args.device)
        if not found:
            raise ValueError(f"there must be a {study.model.__name__} in {args.models}; got none")
        print(write(asked, found, rivals, args.out))
        gallery(asked, places, args.out / "gallery.png", args.sets, args.device)
    print(f"\n{args.out / 'table.md'}, figure.png and gallery.png beside it")
