r"""What :mod:`guard_rivals` compares its scores on: features, samples and where these are wrong."""

__all__ = ["ALIGNED", "CROP", "Gathered", "Part", "gather", "load", "save"]

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowguard import data
from flowguard.demo.run import artefact_mask
from flowguard.io.pictures import read_image
from flowguard.models import SuperResolutionFlow

CROP = 32  # rows and columns of a condition
TEMPERATURE = 0.8
SUFFIXES = {".png", ".jpg", ".jpeg"}


class Part(NamedTuple):
    r"""Conditions of one origin, with :math:`n` of them."""

    levels: list[Tensor]  # features of each level at one pixel in 16, (n, C, CROP, CROP)
    picture: Tensor  # which picture each is of, (n)
    mask: Tensor  # where the sample is an artefact, at the same pixels; empty where none was drawn
    returned: Tensor  # how far the reduced sample is from the condition, at the same pixels
    density: Tensor  # log-density of the sample per dimension, (n), in nats

    @property
    def sampled(self) -> bool:
        r"""Whether samples were drawn."""
        return len(self.mask) > 0


class Gathered(NamedTuple):
    r"""All that was gathered with one model."""

    parts: dict[str, Part]  # fit, calibration, photographs; then the other worlds
    sampling: float  # processor seconds that a sample takes, per condition, encoder included
    encoding: float  # those of the encoder


ALIGNED = ("fit", "calibration", "photographs")


def files_of(folder: Path) -> list[Path]:
    r"""Returns the pictures of a folder; of pairs, the large ones."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
    large = [f for f in files if f.stem.endswith("_HR")]
    return large or files


def crops(files: Sequence[Path], each: int, scale: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    r"""Yields reduced crops of pictures with the number of the picture.

    Arguments:
        files: The files.
        each: The number of crops of each picture.
        scale: How much they are reduced.
        seed: The seed of where they are cut.
    """
    generator = torch.Generator().manual_seed(seed)
    side = CROP * scale
    for number, file in enumerate(files):
        with file.open("rb") as stream:
            image = read_image(stream)
        room = [size - side for size in image.shape[-2:]]
        if min(room) < 0:
            continue
        for _ in range(each):
            top, left = (int(torch.randint(r + 1, (), generator=generator)) for r in room)
            part = image[None, :, top : top + side, left : left + side]
            yield number, data.downsample(part, scale)


def kinds(
    folders: dict[str, Path], each: int, few: int, scale: int, seed: int
) -> Iterator[tuple[str, Iterator[tuple[int, Tensor]]]]:
    r"""Yields the origins of conditions by name.

    Arguments:
        folders: Where the pictures of fit, calibration, photographs and others are.
        each: The number of crops of a picture of calibration and photographs.
        few: The number of photographs that are corrupted; ten times as many are fitted to.
        scale: How much pictures are reduced.
        seed: The seed.
    """
    files = {name: files_of(folder) for name, folder in folders.items()}
    fitted = files["fit"]
    step = max(1, len(fitted) // (10 * few))
    yield "fit", crops(fitted[::step], 1, scale, seed)
    yield "calibration", crops(files["calibration"], each, scale, seed + 1)
    yield "photographs", crops(files["photographs"], each, scale, seed + 2)
    for name in [name for name in files if name not in ALIGNED]:
        yield name, crops(files[name], 1, scale, seed + 3)
    chosen = files["photographs"][:: max(1, len(files["photographs"]) // few)][:few]
    clean = list(crops(chosen, 1, scale, seed + 2))
    for corruption in data.corruptions(seed):
        for strength in corruption.strengths:
            spoilt = ((number, corruption(y, strength)) for number, y in clean)
            yield f"{corruption.name} {strength:g}", spoilt


@torch.no_grad()
def look(model: SuperResolutionFlow, pictures: Iterator[tuple[int, Tensor]], draw: bool) -> Part:
    r"""Returns the features of conditions and, if wanted, what a sample of each is like.

    Arguments:
        model: The model.
        pictures: The conditions, each with the number of its picture.
        draw: Whether to draw samples.
    """
    found: dict[str, list[Tensor]] = {"picture": [], "mask": [], "returned": [], "density": []}
    levels: list[list[Tensor]] = []
    encoder, scale = model.conditioner.get_submodule("encoder"), model.scale
    for number, y in pictures:
        maps = encoder(y)
        levels.append([at_pixels(m, scale).half() for m in maps])
        found["picture"].append(torch.tensor([number]))
        if not draw:
            continue
        generator = torch.Generator().manual_seed(number)
        z = [
            TEMPERATURE * torch.randn(1, *shape, generator=generator)
            for shape in model.latent_shapes(y)
        ]
        x, ladj = model.flow.inverse(z, maps)
        x = x + model.upsample(y)
        prior = sum(-(t.square() + math.log(2 * math.pi)).sum() / 2 for t in z)
        found["mask"].append(at_pixels(artefact_mask(x, y)[:, None].float(), scale)[:, 0].bool())
        back = (data.downsample(x, scale) - y).abs().amax(dim=1)
        found["returned"].append(back.nan_to_num(torch.inf))
        found["density"].append(((prior - ladj) / x.numel()).nan_to_num(-torch.inf))
    joined = {name: torch.cat(v) if v else torch.empty(0) for name, v in found.items()}
    return Part([torch.cat(level) for level in zip(*levels, strict=True)], **joined)


def at_pixels(maps: Tensor, scale: int) -> Tensor:
    r"""Returns the values of maps at the pixels that are looked at: one for each of the condition.

    Of an image, that is the one at :math:`(s i + 1, s j + s / 2)`.

    Arguments:
        maps: The maps, with shape :math:`(n, C, H, W)` of any size.
        scale: The scale :math:`s` of an image.
    """
    rows, columns = (scale * torch.arange(CROP) + start for start in (1, scale // 2))
    factor = scale * CROP // maps.shape[-1]
    return maps[..., rows[:, None] // factor, columns[None] // factor]


def clocked(model: SuperResolutionFlow) -> tuple[float, float]:
    r"""Returns the processor seconds of a sample and of the encoder, the least of three turns."""
    y = torch.rand(1, 3, CROP, CROP)
    encoder = model.conditioner.get_submodule("encoder")
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(3):
            for place, call in enumerate((model.sample, encoder)):
                start = time.process_time()
                call(y)
                times[place].append(time.process_time() - start)
    return min(times[0]), min(times[1])


def gather(
    model: SuperResolutionFlow, folders: dict[str, Path], each: int, few: int, seed: int
) -> Gathered:
    r"""Gathers features and samples; see :func:`kinds` for the arguments."""
    model.eval()
    model.conditioner.policy = "report"
    parts = {}
    for name, pictures in kinds(folders, each, few, model.scale, seed):
        draw = name not in ALIGNED[:2]
        parts[name] = look(model, pictures, draw)
        share = f", artefacts {float(parts[name].mask.float().mean()):.3%}" if draw else ""
        print(f"{name}: {len(parts[name].picture)} conditions{share}", flush=True)
    return Gathered(parts, *clocked(model))


def save(file: Path, found: Gathered) -> None:
    r"""Writes what was gathered to a file."""
    tensors = {
        f"{name}|{key}": value.contiguous()
        for name, part in found.parts.items()
        for key, value in (
            *zip(itertools.count(), part.levels, strict=False),
            *part._asdict().items(),
        )
        if isinstance(value, Tensor)
    }
    tensors["times"] = torch.tensor(found[1:])
    tensors["order"] = torch.tensor(bytearray("|".join(found.parts).encode()), dtype=torch.uint8)
    save_file(tensors, str(file))


def load(file: Path) -> Gathered:
    r"""Reads what :func:`save` wrote."""
    tensors = load_file(str(file))
    parts = {}
    for name in bytes(tensors["order"].tolist()).decode().split("|"):
        count = sum(key.startswith(f"{name}|") and key.split("|")[1].isdigit() for key in tensors)
        levels = [tensors[f"{name}|{i}"] for i in range(count)]
        rest = {key: tensors[f"{name}|{key}"] for key in Part._fields[1:]}
        parts[name] = Part(levels, **rest)
    return Gathered(parts, *tensors["times"].tolist())
