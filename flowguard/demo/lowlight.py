r"""The demo's second task: photographs taken in the dark."""

__all__ = ["HELD_OUT", "LowLightTask"]

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowguard import data, metrics
from flowguard.demo.task import AS_IS, ELSEWHERE, Question, Task, other_worlds
from flowguard.image.maps import Elementwise
from flowguard.io.folder import PictureFiles
from flowguard.models import LowLightEncoder, LowLightFlow
from flowguard.models.encoders.lowlight import low_light_input
from flowguard.training.pictures import BRIGHTEST, DARKEST, DarkenedPairs, Pairs

#: The share of the photographs that is held out.
HELD_OUT = 1 / 17
SHOTS = 3  # how often each photograph is taken in the dark


def spotlight(height: int, width: int) -> Tensor:
    r"""Returns the light of a lamp near the middle, 1 at its centre.

    Arguments:
        height: The rows :math:`H`.
        width: The columns :math:`W`.
    """
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)
    return torch.exp(-((x - 0.2) ** 2 + (y + 0.2) ** 2) / (2 * 0.15**2))


class LowLightTask(Task):
    r"""Creates the task of brightening photographs that were taken in the dark.

    The dark photographs are made of the bright ones by a model of a camera; see
    :func:`flowguard.data.expose`.
    """

    name = "lowlight"
    title = "low-light enhancement"
    condition = "condition"
    bounded = "sample |x|"
    baseline = "exact gain"
    headline = "lamp 5"
    temperature = 0.5
    calibration_crop = 64
    steps = 400
    columns = {  # noqa: RUF012  # never changed
        "psnr": ("PSNR", ".2f"),
        "psnr_gt_mean": ("with GT mean", ".2f"),
        "ssim": ("SSIM", ".3f"),
        "psnr_temperature_0": ("PSNR τ=0", ".2f"),
        "psnr_gt_mean_temperature_0": ("with GT mean", ".2f"),
        "ssim_temperature_0": ("SSIM τ=0", ".3f"),
    }

    def model(
        self, coupling: str | Elementwise, quick: bool, encoder: nn.Module | None = None
    ) -> LowLightFlow:
        r"""Returns an untrained low-light flow of two levels."""
        features, blocks, steps, hidden = (8, 1, 1, 16) if quick else (16, 2, 4, 48)
        if not isinstance(encoder, LowLightEncoder):
            encoder = LowLightEncoder(
                features, growth=8, blocks=blocks, stacked=tuple(range(blocks)), levels=2
            )
        return LowLightFlow(
            levels=2,
            steps=steps,
            hidden=hidden,
            coupling=coupling,
            encoder=encoder,
            margin=None,  # what a coupling does is to be seen
        )

    def _shots(self, parts: Sequence[Tensor], seed: int) -> list[tuple[Tensor, Tensor]]:
        r"""Each photograph, taken in the dark several times and prepared as a whole."""
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        pairs = []
        for part in parts:
            for _ in range(SHOTS):
                exposure = DARKEST * (BRIGHTEST / DARKEST) ** rng.random()
                dark = data.expose(part, exposure, generator)
                pairs.append((part, low_light_input(dark[None])[0]))
        return pairs

    def pairs(self, files: PictureFiles) -> Pairs:
        r"""Returns pictures in files and dark shots of them, prepared."""
        return DarkenedPairs(files, darkest=DARKEST, brightest=BRIGHTEST)

    def crops_of(
        self, parts: Sequence[Tensor], seed: int, size: int, batch: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        r"""Returns an endless stream of batches of aligned crops of bright photographs and
        prepared dark ones."""
        return data.AlignedCrops(self._shots(parts, seed), size=size, batch=batch, seed=seed)

    def contexts_of(self, parts: Sequence[Tensor], seed: int) -> list[Tensor]:
        r"""Returns dark shots of each part, prepared, with shape :math:`(1, C, H, W)`."""
        return [dark[None] for _, dark in self._shots(parts, seed)]

    def held_out(self, seed: int) -> tuple[Tensor, Tensor]:
        r"""Returns the held-out photograph and a dark shot of it, with a batch of one."""
        high = data.photograph(data.HELD_OUT_PHOTOGRAPH)[None]
        return high, data.expose(high, HELD_OUT, torch.Generator().manual_seed(seed))

    def conditions(self, held_out: Tensor, seed: int, quick: bool) -> Iterator[Question]:
        r"""Yields the held-out dark photograph, pictures from other worlds, dark and lit, and
        other lights, exposures and noise."""
        high = data.photograph(data.HELD_OUT_PHOTOGRAPH)[None]
        generator = torch.Generator()

        def shot(image: Tensor, exposure: Tensor | float) -> Tensor:
            return data.expose(image, exposure, generator.manual_seed(seed))

        yield Question("held-out photograph", held_out, meaning=AS_IS)
        for name, image in other_worlds(quick):
            yield Question(f"{name}, dark", shot(image[None], HELD_OUT), meaning=ELSEWHERE)
            if not quick:
                yield Question(f"{name}, lit", image[None], meaning=ELSEWHERE)
        lamp = spotlight(*high.shape[-2:])
        warm, cold = torch.tensor([1.0, 0.3, 0.05]), torch.tensor([0.05, 0.3, 1.0])

        def lit(gain: Tensor, s: float) -> Tensor:
            return shot(high, HELD_OUT * s * gain[:, None, None])

        def blocks(image: Tensor, quality: int) -> Tensor:
            return data.jpeg(image[0], quality)[None]

        for name, meaning, strengths, made in (
            (
                "exposure 1/",
                "taken with 1/{} of the light",
                (100, 1000),
                lambda s: shot(high, 1 / s),
            ),
            (
                "exposure ",
                "taken with {} times the light",
                (0.3, 1.0, 3.0),
                lambda s: shot(high, s),
            ),
            (
                "lamp ",
                "by a lamp that shines on its middle, {} times as bright as daylight",
                (1.0, 5.0),
                lambda s: shot(high, HELD_OUT + s * lamp),
            ),
            ("warm cast ", "in red light, {} times as much", (1.0, 5.0), lambda s: lit(warm, s)),
            ("cold cast ", "in blue light, {} times as much", (1.0, 5.0), lambda s: lit(cold, s)),
            (
                "dark JPEG q",
                "stored as JPEG of quality {}",
                (20, 5),
                lambda s: blocks(held_out, s),
            ),
            (
                "lit JPEG q",
                "lit, stored as JPEG of quality {}",
                (20, 5),
                lambda s: blocks(high, s),
            ),
        ):
            for s in strengths[-1:] if quick else strengths:
                told = f"the held-out photograph {meaning.format(f'{s:g}')}"
                yield Question(f"{name}{s:g}", made(s), s == strengths[-1], told)
        for corruption in data.corruptions(seed):
            if corruption.name in ("noise σ", "clamped noise σ", "gain"):
                strength = corruption.strengths[-1]
                yield Question(
                    f"{corruption.name} {strength:g}",
                    corruption(held_out, strength),
                    meaning=corruption.said(strength),
                )

    def restored(self, condition: Tensor) -> Tensor:
        r"""Returns the condition brightened by the exact inverse of its exposure."""
        light = data.linearize(condition.clamp(0, 1)) / HELD_OUT
        return data.delinearize(light.clamp(0, 1))

    def measures(self, image: Tensor, target: Tensor) -> dict[str, float]:
        r"""Returns PSNR, PSNR after the mean was set to that of the truth, and SSIM, of an image
        with shape :math:`(1, 3, H, W)`."""
        found = metrics.low_light(image, target)
        return {name: float(found[name]) for name in ("psnr", "psnr_gt_mean", "ssim")}

    def sampler(self, model: Any, condition: Tensor) -> tuple[Any, Tensor]:
        r"""Returns the decoder, and a part of the prepared condition of 32×32 pixels."""
        # What is prepared can be changed smoothly; a histogram cannot.
        return model.decode, low_light_input(condition)[..., 96:128, 160:192]
