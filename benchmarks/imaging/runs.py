r"""Runs of training for an experiment: each coupling with each seed, under the same budget."""

__all__ = ["COUPLINGS", "derive", "seconds_of_a_step", "train", "train_all"]

import csv
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import flowguard
from flowguard.cli.main import main
from flowguard.cli.train import UNBOUNDED
from flowguard.io.atomic import write_text
from flowguard.models import load
from flowguard.models.base import MARGIN
from flowguard.training.pictures import CropBatches, pairs_of
from flowguard.training.run import Run, steps_done
from imaging.kept import digest

#: The options of ``flowguard train`` that make each coupling.
COUPLINGS = {
    "affine": ("--coupling", "affine"),
    "reparametrized": ("--coupling", "reparametrized"),
    "bspline": ("--coupling", "bspline"),
    "robust2": ("--coupling", "robust"),
    "robust8": ("--coupling", "robust", "--bins", "8"),
}
#: What is made of a trained model without training: of the affine one what mends it; of bounded ones
#: the couplings alone, without a margin of the images and with a guard that only looks on, or, where
#: they were trained so, the same within a margin and with a guard that shrinks.
SHRINK, MIGRATED, BARE, LIMITED = "+shrink", "+migrated", "+bare", "+limited"
#: The crops that a migration is calibrated with.
CALIBRATION = 512


def train(task: str, run: Run, steps: int, options: Sequence[str]) -> None:
    r"""Trains a model, goes on with it, or leaves it if it is finished.

    Arguments:
        task: ``"superres"`` or ``"lowlight"``.
        run: The folder.
        steps: The steps.
        options: Further options of ``flowguard train``.

    Raises:
        SystemExit: If the training was ended, or failed.
        ValueError: If it has more steps already, or was begun with other options.
    """
    note, asked = run.folder.with_name(f"{run.folder.name}.options"), " ".join(options)
    known = run.folder.exists() and note.exists()  # not of a training that was refused
    if known and (begun := note.read_text(encoding="utf-8")) != asked:
        raise ValueError(
            f"{run.folder} must be asked for with the options that it was begun with, {begun}; got"
            f" {asked}: name another folder by --out, or remove it"
        )
    done = steps_done(run) if run.model.exists() else 0
    if done > steps:
        raise ValueError(f"steps must not be fewer than {run.folder} has, {done}; got {steps}")
    if done == steps:
        return
    place = ["--resume" if run.config.exists() else "--out", str(run.folder)]
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(note, asked)
    code = main(["train", task, *place, "--steps", str(steps), *options])
    if code:
        raise SystemExit(code)


def train_all(
    task: str,
    folder: Path,
    couplings: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    options: Sequence[str],
) -> dict[str, Run]:
    r"""Trains each coupling with each seed: first all of one seed, so that there is soon a table.

    Arguments:
        task: The task.
        folder: The folder of the runs.
        couplings: The names of the couplings.
        seeds: The seeds.
        steps: The steps of each.
        options: Further options of ``flowguard train``.

    Returns:
        The runs, by the names of their models.
    """
    runs = {}
    for seed in seeds:
        for coupling in couplings:
            name = f"{coupling}-seed{seed}"
            print(f"{name}:", flush=True)
            run = runs[name] = Run(folder / name)
            train(task, run, steps, [*COUPLINGS[coupling], "--seed", str(seed), *options])
    return runs


def derive(task: str, name: str, run: Run, data: str, crop: int, folder: Path) -> dict[str, Path]:
    r"""Makes of a trained affine model one whose guard shrinks, and one that is migrated; of bounded
    couplings that were trained within a margin the couplings alone, and of others the same within
    a margin.

    What was made of the same weights before, and migrated with the same crops, is left as it is.

    Arguments:
        task: The task.
        name: The name of the model, ``affine-seed0``.
        run: Its run.
        data: The folder of pictures that it was trained with.
        crop: The rows and columns of a crop that the migration is calibrated with.
        folder: The folder to write to.

    Returns:
        The folders of the models, by name.
    """
    made, weights = {}, digest(run.model)
    coupling, dash, seed = name.rpartition("-")
    kinds: tuple[str, ...] = (SHRINK, MIGRATED) if coupling == "affine" else ()
    if coupling not in UNBOUNDED:
        trained: Any = load(run.model)
        kinds = (LIMITED,) if trained.margin is None else (BARE,)
    for kind in kinds:
        new = folder / f"{coupling}{kind}{dash}{seed}"
        made[new.name] = new
        source = f"{weights} {data} {crop}" if kind == MIGRATED else weights
        note = folder / f"{new.name}.source"  # what it was made of
        if new.exists() and note.exists() and note.read_text(encoding="utf-8") == source:
            continue
        model: Any = load(run.model).eval()
        if kind == MIGRATED:
            model = _migrated(task, model, data, crop)
        else:
            model.conditioner.policy = "report" if kind == BARE else "shrink"
        if kind in (BARE, LIMITED):
            model.limit(None if kind == BARE else MARGIN)
        model.save_pretrained(new)
        write_text(note, source)
    return made


def _migrated(task: str, model: Any, data: str, crop: int) -> Any:
    pairs, _ = pairs_of(data, task=task, scale=model.scale, crop=crop)
    x, y = CropBatches(pairs, size=crop, batch=CALIBRATION, seed=0)[0]
    generator = torch.Generator().manual_seed(0)
    levels = model.quant - 1
    x = x + (torch.rand(x.shape, generator=generator) - 0.5) / levels  # as in training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        robust, report = flowguard.migrate(model, x, y)
    print(report)
    return robust.eval()


def seconds_of_a_step(run: Run) -> float:
    r"""Returns the median of the seconds between two steps of a run.

    Arguments:
        run: The run.
    """
    with (run.folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        ends = [float(row["seconds"]) for row in csv.DictReader(file)]
    # A run that was gone on with may count anew.
    return median(b - a for a, b in itertools.pairwise(ends) if b > a)
