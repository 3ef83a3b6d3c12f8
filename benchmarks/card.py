r"""What the card of a model says that it is worth, as Markdown.

    python benchmarks/card.py superres-x4 --data DIR
    python benchmarks/card.py lowlight --data DIR

DIR is that of ``benchmarks/superres.py``, or of ``benchmarks/lowlight.py``. PSNR is of the luminance,
without a border of 4 pixels, or of the colours; of whole pictures as files of 8 bits hold them. An
artefact pixel is not finite, or more than 0.5 outside the range of [0, 1] and the condition; "bent"
are those that the margin moves by more than 0.05.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from imaging.bench import in_one_line
from imaging.measure import Options, Strange, Study, guard_of, sample, shared
from lowlight import LowLightStudy
from pages import table
from superres import SuperResolutionStudy
from torch import Tensor

import flowguard
from flowguard.demo.run import artefact_mask
from flowguard.models import LowLightFlow, SuperResolutionFlow, load
from flowguard.training.outside import attacked, bent, middle, raw_condition, residual

Model = SuperResolutionFlow | LowLightFlow
STUDIES: tuple[type[Study], ...] = SuperResolutionStudy, LowLightStudy
TEMPERATURES = (0.0, 0.5, 0.8)
#: The rows and columns of what is made of real conditions, and of spoilt ones: of their middles.
REAL, SPOILT = 640, 256
#: The attack: on how many pictures, on how many rows and columns of what is made, how far from each
#: condition, and in how many steps.
ATTACKED, MIDDLE, RADIUS, STEPS = 8, 128, 0.1, 200


def quality(study: Study, model: Model, name: str) -> list[str]:
    r"""Returns the row of a set with a truth.

    Arguments:
        study: What is asked.
        model: The model, in evaluation mode.
        name: The name of the set.
    """
    found, flagged = defaultdict(list), 0
    rivals = study.rivals()
    for held in study.pictures(name):
        for rival, made in rivals.items():
            found[rival].append(study.quality(made(held), held)[study.score])
        given = shared(model, held.condition)
        for temperature in TEMPERATURES:
            generator = torch.Generator().manual_seed(study.options.seed)
            image = sample(model, given, 1, temperature, generator)[0]
            told = study.quality(image, held)
            found[f"{temperature:g}"].append(told[study.score])
            if temperature == 0:
                found["beside"].append(told[study.beside])
        report = guard_of(model)
        flagged += report is not None and bool(report.flagged.any())
    numbers = [f"{fmean(found[key]):.3f}" for key in (*rivals, *_ways())]
    beside = format(fmean(found["beside"]), study.measures[study.beside][1])
    return [study.held[name], *numbers, beside, f"{flagged} of {len(found['beside'])}"]


def _ways() -> list[str]:
    return [f"{temperature:g}" for temperature in TEMPERATURES]


class Outcome:
    r"""Counts what a model does with conditions of a kind.

    Arguments:
        model: The model, in evaluation mode.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.pixels = self.artefacts = self.pictures = self.flagged = 0
        self.bent = 0.0
        self.largest = self.residual = 0.0

    def ask(self, y: Tensor) -> None:
        r"""Counts a sample at the greatest temperature.

        Arguments:
            y: The condition.
        """
        generator = torch.Generator().manual_seed(0)
        x = sample(self.model, y, 1, TEMPERATURES[-1], generator)[0]
        report = guard_of(self.model)
        mask = artefact_mask(x, raw_condition(y))
        self.pixels += mask.numel()
        self.artefacts += int(mask.sum())
        if self.model.margin is not None:
            self.bent += bent(x, self.model.margin) * mask.numel()
        self.pictures += 1
        self.flagged += report is not None and bool(report.flagged.any())
        self.largest = max(self.largest, float(x.abs().max()))
        self.residual = max(self.residual, float(residual(self.model, x, y).abs().max()))

    def row(self, name: str) -> list[str]:
        r"""Returns what was counted.

        Arguments:
            name: What the conditions are called.
        """
        share = (100 * n / self.pixels for n in (self.artefacts, self.bent))
        numbers = [f"{s:.2g} %" for s in share] + [f"{self.flagged} of {self.pictures}"]
        return [name, *numbers, f"{self.largest:.3f}", f"{self.residual:.3f}"]


def outside(study: Study, model: Model) -> list[list[str]]:
    r"""Returns the rows of conditions without a truth, by kind.

    Arguments:
        study: What is asked.
        model: The model, in evaluation mode.
    """
    found: defaultdict[str, Outcome] = defaultdict(lambda: Outcome(model))
    for name in study.strange:
        for strange in study.conditions(name):
            size = SPOILT if name == "corruptions" else REAL
            found[strange.kind].ask(_cut(study, model, strange, size))
    return [outcome.row(kind) for kind, outcome in found.items()]


def _cut(study: Study, model: Model, strange: Strange, size: int) -> Tensor:
    y = middle(strange.condition, size // study.scale)
    return flowguard.data.crop_to_multiple(y, model.multiple)


def attacks(study: Study, model: Model) -> list[str]:
    r"""Returns what an attack on conditions and noise reaches, and what samples of the conditions
    that it finds are like.

    Arguments:
        study: What is asked.
        model: The model, in evaluation mode.
    """
    outcome, reached = Outcome(model), 0.0
    for seed, held in zip(range(ATTACKED), study.pictures(study.spoilt), strict=False):
        y = middle(held.condition, MIDDLE // study.scale)
        found = attacked(model, y, radius=RADIUS, steps=STEPS, seed=seed)
        reached = max(reached, found.value)
        outcome.ask(found.context)
    return [*outcome.row(f"{STEPS} steps of the attack within {RADIUS}"), f"{reached:.4f}"]


def main() -> None:
    r"""Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, or the name of a model of the package's")
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with in_one_line(parser):
        _tell(args)


def _tell(args: argparse.Namespace) -> None:
    start = time.process_time()
    model = load(args.model).eval()
    kind = next((kind for kind in STUDIES if isinstance(model, kind.model)), None)
    if kind is None:
        raise ValueError(f"there is no study of models like {type(model).__name__}")
    study = kind(args.data, Options(samples=1))
    if model.scale != study.scale:
        raise ValueError(f"the model must enlarge by {study.scale}; it does by {model.scale}")
    with torch.no_grad():
        rows = [quality(study, model, name) for name in study.held]
        _, *ways = _ways()
        beside = study.measures[study.beside][0]
        head = ["set", *study.rivals(), "temperature 0", *ways, beside, "flagged"]
        print(table(head, rows), flush=True)
        certified = study.bounded.removeprefix("certified ")
        head = ["condition", "artefacts", "bent", "flagged", "largest value", certified]
        print(table(head, outside(study, model)), flush=True)
    print(table([*head, "reached"], [attacks(study, model)]))
    print(f"{study.bounded}: {flowguard.certify(model).bound(4.0):.4g}")
    print(f"{(time.process_time() - start) / 60:.0f} minutes of the processor")


if __name__ == "__main__":
    main()
