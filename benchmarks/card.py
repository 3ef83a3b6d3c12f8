r"""What the card of a model for ×4 super-resolution says that it is worth, as Markdown.

    python benchmarks/card.py superres-x4 --data DIR

DIR is that of ``benchmarks/superres.py``. PSNR is of the luminance, without a border of 4 pixels, of
whole pictures as files of 8 bits hold them. An artefact pixel is not finite, or more than 0.5 outside
the range of [0, 1] and the condition; "bent" are those that the margin moves by more than 0.05.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from imaging.bench import in_one_line
from imaging.measure import Options, Strange, guard_of, sample, shared
from pages import table
from superres import SuperResolutionStudy
from torch import Tensor

import flowguard
from flowguard.demo.run import artefact_mask
from flowguard.models import SuperResolutionFlow
from flowguard.ood.conditioner import unguarded
from flowguard.training.outside import bent, middle

TEMPERATURES = (0.0, 0.5, 0.8)
#: The rows and columns of the middles of conditions, of real photographs and of spoilt ones.
REAL, SPOILT = 160, 64
#: The attack: on how many pictures of Kodak24, on how many rows and columns of each condition, how
#: far from it, and in how many steps.
ATTACKED, MIDDLE, RADIUS, STEPS = 8, 32, 0.1, 200


def quality(study: SuperResolutionStudy, model: SuperResolutionFlow, name: str) -> list[str]:
    r"""Returns the row of a set with a truth.

    Arguments:
        study: What is asked.
        model: The model, in evaluation mode.
        name: The name of the set.
    """
    found, flagged = defaultdict(list), 0
    bicubic = study.rivals()["bicubic"]
    for held in study.pictures(name):
        given = shared(model, held.condition)
        found["bicubic"].append(study.quality(bicubic(held), held)["psnr_y"])
        for temperature in TEMPERATURES:
            generator = torch.Generator().manual_seed(study.options.seed)
            image = sample(model, given, 1, temperature, generator)[0]
            told = study.quality(image, held)
            found[f"{temperature:g}"].append(told["psnr_y"])
            if temperature == 0:
                found["lr"].append(told["lr_psnr"])
        report = guard_of(model)
        flagged += report is not None and bool(report.flagged.any())
    numbers = [f"{fmean(found[key]):.3f}" for key in ("bicubic", "0", "0.5", "0.8")]
    total = len(found["lr"])
    return [study.held[name], *numbers, f"{fmean(found['lr']):.1f}", f"{flagged} of {total}"]


class Outcome:
    r"""Counts what a model does with conditions of a kind.

    Arguments:
        model: The model, in evaluation mode.
    """

    def __init__(self, model: SuperResolutionFlow) -> None:
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
        report, base = guard_of(self.model), self.model.base_of(y)
        mask = artefact_mask(x, y)
        self.pixels += mask.numel()
        self.artefacts += int(mask.sum())
        if self.model.margin is not None:
            self.bent += bent(x, self.model.margin) * mask.numel()
        self.pictures += 1
        self.flagged += report is not None and bool(report.flagged.any())
        self.largest = max(self.largest, float(x.abs().max()))
        if base is not None:
            self.residual = max(self.residual, float((x - base).abs().max()))

    def row(self, name: str) -> list[str]:
        r"""Returns what was counted.

        Arguments:
            name: What the conditions are called.
        """
        share = (100 * n / self.pixels for n in (self.artefacts, self.bent))
        numbers = [f"{s:.2g} %" for s in share] + [f"{self.flagged} of {self.pictures}"]
        return [name, *numbers, f"{self.largest:.3f}", f"{self.residual:.3f}"]


def outside(study: SuperResolutionStudy, model: SuperResolutionFlow) -> list[list[str]]:
    r"""Returns the rows of conditions without a truth, by kind.

    Arguments:
        study: What is asked.
        model: The model, in evaluation mode.
    """
    found: defaultdict[str, Outcome] = defaultdict(lambda: Outcome(model))
    for name, size in (("realsrset", REAL), ("checkerboards", None), ("corruptions", SPOILT)):
        for strange in study.conditions(name):
            found[strange.kind].ask(_cut(model, strange, size))
    return [outcome.row(kind) for kind, outcome in found.items()]


def _cut(model: SuperResolutionFlow, strange: Strange, size: int | None) -> Tensor:
    y = strange.condition if size is None else middle(strange.condition, size)
    return flowguard.data.crop_to_multiple(y, model.multiple)


def attacked(study: SuperResolutionStudy, model: SuperResolutionFlow) -> list[str]:
    r"""Returns what an attack on conditions and noise reaches, and what samples of the conditions
    that it finds are like.

    Arguments:
        study: What is asked.
        model: The model, in evaluation mode.
    """
    outcome, reached = Outcome(model), 0.0
    for i, held in zip(range(ATTACKED), study.pictures("kodak24"), strict=False):
        y = middle(held.condition, MIDDLE)

        def residual(z: list[Tensor], lr: Tensor) -> Tensor:
            base = model.base_of(lr)
            return model.decode(z, lr) - (0.0 if base is None else base)

        with unguarded(model):  # which goes on to move embeddings, and says nothing
            found = flowguard.attack(
                residual,
                y,
                radius=RADIUS,
                steps=STEPS,
                restarts=1,
                latents=[y.new_zeros(1, *shape) for shape in model.latent_shapes(y)],
                generator=torch.Generator().manual_seed(i),
            )
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
    model = SuperResolutionFlow.from_pretrained(args.model).eval()
    study = SuperResolutionStudy(args.data, Options(samples=1))
    with torch.no_grad():
        rows = [quality(study, model, name) for name in study.held]
        head = ["set", "bicubic", "temperature 0", "0.5", "0.8", "LR-PSNR at 0", "flagged"]
        print(table(head, rows), flush=True)
        head = ["condition", "artefacts", "bent", "flagged", "largest value", "largest residual"]
        print(table(head, outside(study, model)), flush=True)
    print(table([*head, "reached"], [attacked(study, model)]))
    print(f"certified: {flowguard.certify(model).bound(4.0):.4g}")
    print(f"{(time.process_time() - start) / 60:.0f} minutes of the processor")


if __name__ == "__main__":
    main()
