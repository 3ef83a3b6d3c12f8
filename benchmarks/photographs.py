r"""Collects the photographs that the models in the package are trained on, with their terms.

They are those of Debian's packages ``lomiri-wallpapers-16.04`` and ``mate-backgrounds`` (install
them first; their drawings are left out) and of scikit-image. The large ones are out of focus
pixel by pixel, so that each is reduced to two sizes at which it is sharp.

    python benchmarks/photographs.py OUT
"""

import argparse
from pathlib import Path

from PIL import Image
from skimage import data

ROOT = Path("/usr/share/backgrounds")

#: The long sides, in pixels, to which photographs are reduced.
SIZES = (1600, 900)

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


def collect(out: Path) -> None:
    r"""Writes the photographs as PNG files, and ``SOURCES.csv`` with their terms."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ["file,source,terms"]

    def keep(picture: Image.Image, name: str, source: str, terms: str) -> None:
        picture.save(out / name)
        lines.append(f"{name},{source},{terms}")

    for terms, files in BACKGROUNDS.items():
        for file in files:
            picture = Image.open(ROOT / file).convert("RGB")
            for size in SIZES:
                factor = size / max(picture.size)
                if factor < 1:
                    sides = tuple(round(side * factor) for side in picture.size)
                    reduced = picture.resize(sides, Image.Resampling.LANCZOS, reducing_gap=3.0)
                else:
                    reduced = picture
                keep(reduced, f"{Path(file).stem}-{size}.png", file, terms)
    for terms, names in SKIMAGE.items():
        for name in names:
            picture = Image.fromarray(getattr(data, name)()).convert("RGB")
            keep(picture, f"{name}.png", "scikit-image", terms)
    (out / "SOURCES.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - 1} pictures in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    collect(parser.parse_args().out)
