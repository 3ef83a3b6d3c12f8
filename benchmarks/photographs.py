r"""Collects the photographs that the models in the package are trained on, with their terms.

They are those of Debian's packages ``lomiri-wallpapers-16.04`` and ``mate-backgrounds`` (install
them first; their drawings are left out) and of scikit-image. The large ones are out of focus
pixel by pixel, so that each is reduced to sizes at which it is sharp.

    python benchmarks/photographs.py OUT --tile 192

writes OUT/train, in tiles without the smooth ones, and OUT/held-out, whole.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

from flowguard.data import downsample
from flowguard.metrics import psnr
from flowguard.training.validation import restored

ROOT = Path("/usr/share/backgrounds")

#: The long sides, in pixels, to which photographs are reduced.
SIZES = (1600, 1130, 800, 560, 400)

#: Files below the folder of backgrounds, by terms; the packages' copyright files say the same.
BACKGROUNDS = {
    "CC BY-SA 4.0": (
        "Bridge_by_Sander_Klootwijk.jpg",
        "Dragonfly_by_Bolly.jpg",
        "free_by_Peter_Nerlich.jpg",
        "greentock_by_Peter_Nerlich.jpg",
    ),
    "CC BY 4.0": (
        "Picture_0B_by_freespace.jpg",
        "Picture_1A_by_freespace.jpg",
        "Wine_by_Jakkub_Mede.jpg",
        "aitzgorri_by_Aitzol_Berasategi.jpg",
        "friends_by_Aitzol_Berasategi.jpg",
        "life_by_Aitzol_Berasategi.jpg",
        "picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "sunset_by_Aitzol_Berasategi.jpg",
    ),
    "CC0 1.0": ("seeding_by_Clements_Engelhardt.jpg",),
    "GPL-2+": (
        "mate/nature/Aqua.jpg",
        "mate/nature/Blinds.jpg",
        "mate/nature/Dune.jpg",
        "mate/nature/FreshFlower.jpg",
        "mate/nature/Garden.jpg",
        "mate/nature/GreenMeadow.jpg",
        "mate/nature/LadyBird.jpg",
        "mate/nature/RainDrops.jpg",
        "mate/nature/Storm.jpg",
        "mate/nature/TwoWings.jpg",
        "mate/nature/Wood.jpg",
        "mate/nature/YellowFlower.jpg",
    ),
}

#: Those of scikit-image, with the terms that its documentation states. The cat is left out: the
#: demo asks about it as a photograph that no model has seen.
SKIMAGE = {
    "public domain": ("astronaut", "rocket"),
    "CC0 1.0": ("brick", "coffee", "grass", "gravel"),
}


#: What no model is trained on: models are chosen by it, and their guards calibrated.
HELD_OUT = ("LadyBird", "coffee", "friends_by", "picosdeeuropa", "seeding", "free_by", "Garden")


def photographs() -> Iterator[tuple[Image.Image, str, str]]:
    r"""Yields the photographs as they are, with where they are from and their terms."""
    for terms, files in BACKGROUNDS.items():
        for file in files:
            yield Image.open(ROOT / file).convert("RGB"), file, terms
    for terms, names in SKIMAGE.items():
        for name in names:
            yield Image.fromarray(getattr(data, name)()).convert("RGB"), name, terms


def reduced(picture: Image.Image, size: int) -> Image.Image:
    r"""Returns a picture whose long side has a number of pixels."""
    factor = size / max(picture.size)
    sides = (round(picture.width * factor), round(picture.height * factor))
    return picture.resize(sides, Image.Resampling.LANCZOS, reducing_gap=3.0)


def tiles(picture: Image.Image, size: int, scale: int, most: float) -> Iterator[Image.Image]:
    r"""Yields the tiles of a picture, which cover it, that bicubic interpolation does not restore well.

    Arguments:
        picture: The picture.
        size: The height and width of a tile.
        scale: The factor by which it is reduced and enlarged.
        most: The greatest PSNR in dB: what is smoother than that teaches little.
    """
    across, down = (np.linspace(0, n - size, -(-n // size)) for n in picture.size)
    for left, top in np.stack(np.meshgrid(across, down), -1).reshape(-1, 2).astype(int).tolist():
        tile = picture.crop((left, top, left + size, top + size))
        hr = torch.from_numpy(np.array(tile)).movedim(-1, 0)[None] / 255
        if float(psnr(restored(downsample(hr, scale), scale).clamp(0, 1), hr).mean()) <= most:
            yield tile


def collect(out: Path, size: int | None, scale: int, most: float) -> None:
    r"""Writes the photographs as PNG files, and ``SOURCES.csv`` with their terms."""
    lines = ["file,source,terms"]
    for picture, source, terms in photographs():
        held = Path(source).stem.startswith(HELD_OUT)
        folder = out / ("held-out" if held else "train")
        folder.mkdir(parents=True, exist_ok=True)
        for side in (s for s in SIZES if s < max(picture.size) or s == SIZES[-1]):
            small = reduced(picture, min(side, max(picture.size)))
            parts = [small] if held or size is None else tiles(small, size, scale, most)
            for number, part in enumerate(parts):
                file = folder / f"{Path(source).stem}-{side}-{number:03d}.png"
                part.save(file)
                lines.append(f"{file.relative_to(out)},{source},{terms}")
    (out / "SOURCES.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - 1} pictures in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tile", type=int, help="cut what is trained on into tiles of this size")
    parser.add_argument("--scale", type=int, default=4, help="of the models (default: 4)")
    parser.add_argument(
        "--most", type=float, default=36.0, help="PSNR of tiles that are left out (default: 36)"
    )
    args = parser.parse_args()
    collect(args.out, args.tile, args.scale, args.most)
