r"""Puts a trained model in the package, with its card.

The convolutions of its networks are kept in half precision, which its folder says. What that leaves
of them is what the guard is then fitted on, with pictures that were trained with, and calibrated
with others; all but the convolutions (splines, normalisations, mixtures, the guard) is kept as it
is.

    python benchmarks/ship.py RUN/model superres-x4 --train DIR --held-out DIR
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from flowguard.models import SuperResolutionFlow, store
from flowguard.training.guard import Conditions, guarded
from flowguard.training.pictures import pairs_of
from flowguard.training.validation import Wholes

ROOT = Path(__file__).parents[1]
CROPS = 2048  # of held-out conditions: the least p-value is that of 0.0005
CROP = 24  # their rows and columns


def convolutions(model: nn.Module) -> dict[str, nn.Parameter]:
    r"""Returns the kernels and biases of the convolutions of a model's networks, by name.

    Arguments:
        model: The model.
    """
    return {
        f"{name}.{own}": parameter
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d)
        for own, parameter in part.named_parameters(recurse=False)
    }


def rounded(model: nn.Module) -> nn.Module:
    r"""Rounds the convolutions of a model to half precision, in which they will be kept.

    Arguments:
        model: The model, which is changed.
    """
    for parameter in convolutions(model).values():
        parameter.data = parameter.data.half().float()
    return model


def ship(
    source: Path,
    name: str,
    train: Path,
    held_out: Path,
    boundary: float | None = None,
    crops: int = CROPS,
) -> Path:
    r"""Writes a model into the package; returns its folder.

    Arguments:
        source: The folder of the trained model.
        name: The name that it gets; its card is ``docs/models/NAME.md``.
        train: A folder of pictures that it was trained with.
        held_out: A folder of pictures that it was not trained with.
        boundary: The quantile of held-out pixels beyond which the guard acts; by default that of
            the trained model.
        crops: The number of crops that the guard is calibrated with.

    Raises:
        FileNotFoundError: If the model has no card.
        ValueError: If a convolution is too large for half precision.
    """
    card = (ROOT / "docs" / "models" / f"{name}.md").read_bytes()
    model = rounded(store.load(source))
    if not all(parameter.isfinite().all() for parameter in convolutions(model).values()):
        raise ValueError("convolutions must be finite in half precision; got some beyond 65504")
    superres = isinstance(model, SuperResolutionFlow)
    task, scale = ("superres", model.scale) if superres else ("lowlight", 1)
    size = CROP if superres else 4 * CROP
    made = [
        Wholes(pairs_of(folder, task=task, scale=scale, crop=scale * size)[0], 0)
        for folder in (train, held_out)
    ]
    policy = model.conditioner.policy
    boundary = model.conditioner.boundary if boundary is None else boundary
    most = len(made[0])
    conditions = Conditions(*made, most, crops, size, policy=policy, boundary=boundary)
    fitted = guarded(model, conditions)
    folder = store.SHIPPED / name
    fitted.save_pretrained(folder)
    weights = load_file(folder / store.WEIGHTS)
    store.write(folder, *store.halved(store.read_config(folder), weights, convolutions(fitted)))
    (folder / "README.md").write_bytes(card)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the trained model")
    parser.add_argument("name", help="the name that it gets")
    parser.add_argument("--train", type=Path, required=True, help="pictures that it knows")
    parser.add_argument("--held-out", type=Path, required=True, help="pictures that it does not")
    parser.add_argument(
        "--boundary", type=float, help="share of held-out pixels that the guard leaves as they are"
    )
    args = parser.parse_args()
    with torch.no_grad():
        folder = ship(args.source, args.name, args.train, args.held_out, args.boundary)
    print(f"{folder}: {(folder / store.WEIGHTS).stat().st_size / 1e6:.2f} MB")
