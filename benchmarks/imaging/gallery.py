r"""A picture of what each kind of model makes of a few conditions."""

__all__ = ["gallery"]

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowguard import data
from flowguard.demo.run import artefact_mask
from flowguard.io.pictures import to_uint8
from flowguard.models import load
from flowguard.training.outside import middle, raw_condition
from flowguard.training.validation import TEMPERATURE
from imaging.kept import named
from imaging.measure import Study

SIDE = 192  # rows and columns of a sample that is shown


def chosen(study: Study, sets: Sequence[str]) -> dict[str, Tensor]:
    r"""Returns the first picture with a truth, and of each set without one some conditions.

    Arguments:
        study: What is asked.
        sets: The names of the sets.
    """
    shown: dict[str, Tensor] = {}
    side = SIDE // study.scale
    held = [name for name in sets if name in study.held]
    for name in held[:1]:
        first = next(study.pictures(name))
        shown[study.held[name]] = middle(raw_condition(first.condition), side)
    for name in (n for n in sets if n in study.strange):
        kinds: dict[str, Tensor] = {}
        for strange in study.asked(name):
            if strange.kind in kinds:  # the next picture
                break
            kinds[strange.kind] = middle(strange.condition, side)
        shown |= {k: v for k, v in kinds.items() if k in FEW or len(kinds) == 1}
    return shown


#: Of the kinds of conditions those that are shown.
FEW = ("clamped noise σ 1", "gain 5", "saturation 20", "checkerboard 1", "checkerboard 4")


def gallery(
    study: Study,
    places: Mapping[str, Path],
    file: Path,
    sets: Sequence[str],
    device: str = "cpu",
) -> None:
    r"""Draws samples of the first model of each kind; artefact pixels are magenta.

    Arguments:
        study: What is asked.
        places: The folders of the models, by name.
        file: The file to write.
        sets: The names of the sets that conditions are taken of.
        device: The device.
    """
    from matplotlib.figure import Figure

    conditions = chosen(study, sets)
    firsts: dict[str, Path] = {}
    for name in sorted(places, key=lambda n: (named(n).kind, named(n).seed or 0)):
        firsts.setdefault(named(name).kind, places[name])
    rows: list[tuple[str, list[Tensor]]] = [("condition", [y[0] for y in conditions.values()])]
    for kind, place in firsts.items():
        model = load(place)
        if not isinstance(model, study.model):
            continue
        model = model.to(device).eval()
        if model.conditioner.policy != "shrink":
            model.conditioner.policy = "report"
        rows.append((kind, [_shown(study, model, y.to(device)) for y in conditions.values()]))
    if not conditions:
        return
    figure = Figure(figsize=(1.7 * len(conditions) + 0.6, 1.75 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(conditions), squeeze=False)
    for (name, images), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for image, axis in zip(images, line, strict=True):
            axis.imshow(to_uint8(image.cpu()), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    for title, axis in zip(conditions, axes[0], strict=True):
        axis.set_title(title, fontsize=8)
    figure.savefig(file, dpi=100)


def _shown(study: Study, model: object, y: Tensor) -> Tensor:
    y = data.crop_to_multiple(y, model.multiple)
    generator = torch.Generator(device=y.device).manual_seed(study.options.seed)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        x = model.sample(y, 1, TEMPERATURE, generator)[0]
    magenta = torch.tensor([1.0, 0.0, 1.0], device=x.device)[:, None, None]
    return torch.where(artefact_mask(x, y)[0], magenta, x[0])
