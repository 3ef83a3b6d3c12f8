r"""Puts a trained model in the package, with its card.

The convolutions of its networks are kept in half precision, all else (splines, normalisations,
mixtures, the guard) as it is. Says what that changes in pictures.

    python benchmarks/ship.py RUN/model superres-x4 --pictures DIR
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from flowguard.io.folder import find
from flowguard.io.pictures import read_image
from flowguard.models import store

ROOT = Path(__file__).parents[1]


def ship(source: Path, name: str) -> Path:
    r"""Writes a model into the package; returns its folder.

    Arguments:
        source: The folder of the trained model.
        name: The name that it gets; its card is ``docs/models/NAME.md``.
    """
    model = store.load(source)
    convolutions = tuple(n for n, m in model.named_modules() if type(m) is nn.Conv2d)
    state = {
        key: value.half() if key.rpartition(".")[0] in convolutions else value
        for key, value in load_file(source / store.WEIGHTS).items()
    }
    folder = store.SHIPPED / name
    store.write(folder, store.read_config(source), state)
    shutil.copyfile(ROOT / "docs" / "models" / f"{name}.md", folder / "README.md")
    return folder


def difference(source: Path, name: str, pictures: list[Path]) -> float:
    r"""Returns the greatest difference of pictures that half precision makes, in grey levels.

    Arguments:
        source: The folder of the trained model.
        name: The name of the one in the package.
        pictures: The pictures that both are given; of each the upper left corner.
    """
    most = 0.0
    for file in pictures:
        y = read_image(file)[None, :, :64, :64]
        with torch.no_grad():
            both = [store.load(m).sample(y, temperature=0.0) for m in (source, name)]
        most = max(most, 255 * float((both[0] - both[1]).abs().max()))
    return most


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the trained model")
    parser.add_argument("name", help="the name that it gets")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of conditions")
    args = parser.parse_args()
    folder = ship(args.source, args.name)
    size = (folder / store.WEIGHTS).stat().st_size / 1e6
    most = difference(args.source, args.name, find(args.pictures))
    print(f"{folder}: {size:.2f} MB; half precision changes pictures by {most:.2f} grey levels")
