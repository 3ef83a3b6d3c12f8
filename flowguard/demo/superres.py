r"""The demo's first task: photographs enlarged four times."""

__all__ = ["SuperResolutionTask"]

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowguard import data, metrics
from flowguard.demo.task import AS_IS, ELSEWHERE, Question, Task, other_worlds
from flowguard.image.maps import Elementwise
from flowguard.io.folder import PictureFiles
from flowguard.models import SuperResolutionFlow
from flowguard.training.pictures import Pairs, ReducedPairs


class SuperResolutionTask(Task):
    r"""Creates the task of enlarging photographs four times."""

    scale = 4
    name = "superres"
    title = "×4 super-resolution"
    condition = "condition (LR)"
    bounded = "residual |x - bicubic(y)|"
    baseline = "bicubic"
    headline = "gain 5"
    temperature = 0.5  # samples of a good model are closer to the truth than bicubic, up to here
    calibration_crop = 96
    steps = 400
    encoder = "superres-x4"
    columns = {  # noqa: RUF012  # never changed
        "psnr_temperature_0": ("PSNR τ=0", ".2f"),
        "ssim_temperature_0": ("SSIM τ=0", ".3f"),
        "psnr": ("PSNR", ".2f"),
        "ssim": ("SSIM", ".3f"),
    }

    def model(
        self, coupling: str | Elementwise, quick: bool, encoder: nn.Module | None = None
    ) -> SuperResolutionFlow:
        r"""Returns an untrained flow of two levels that enlarges four times."""
        steps, hidden, features = (1, 16, 16) if quick else (4, 64, 64)
        return SuperResolutionFlow(
            scale=self.scale,
            levels=2,
            steps=steps,
            hidden=hidden,
            features=features if encoder is None else None,
            coupling=coupling,
            encoder=encoder,
            margin=None,  # what a coupling does is to be seen
        )

    def pairs(self, files: PictureFiles) -> Pairs:
        r"""Returns pictures in files and their LR images."""
        return ReducedPairs(files, self.scale)

    def crops_of(
        self, parts: Sequence[Tensor], seed: int, size: int, batch: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        r"""Returns an endless stream of batches of aligned HR and LR crops."""
        return data.PairedCrops(parts, scale=self.scale, size=size, batch=batch, seed=seed)

    def contexts_of(self, parts: Sequence[Tensor], seed: int) -> list[Tensor]:
        r"""Returns the LR image of each part as a whole, with shape :math:`(1, 3, H, W)`."""
        return [
            data.downsample(data.crop_to_multiple(part, 8)[None], self.scale) for part in parts
        ]

    def held_out(self, seed: int) -> tuple[Tensor, Tensor]:
        r"""Returns the held-out photograph and its LR image, with a batch of one."""
        photograph = data.photograph(data.HELD_OUT_PHOTOGRAPH)
        hr = data.crop_to_multiple(photograph, self.scale)[None]
        return hr, data.downsample(hr, self.scale)

    def conditions(self, held_out: Tensor, seed: int, quick: bool) -> Iterator[Question]:
        r"""Yields the held-out LR image, reduced pictures from other worlds, and corruptions of
        the held-out one."""
        yield Question("held-out photograph", held_out, meaning=AS_IS)
        for name, image in other_worlds(quick):
            fitting = data.crop_to_multiple(image, self.scale)[None]
            yield Question(name, data.downsample(fitting, self.scale), meaning=ELSEWHERE)
        for corruption in data.corruptions(seed):
            strengths = corruption.strengths[-1:] if quick else corruption.strengths
            for strength in strengths:
                yield Question(
                    f"{corruption.name} {strength:g}",
                    corruption(held_out, strength),
                    strength == corruption.strengths[-1],
                    corruption.said(strength),
                )

    def restored(self, condition: Tensor) -> Tensor:
        r"""Returns the bicubic enlargement of a condition."""
        return torch.nn.functional.interpolate(
            condition, scale_factor=float(self.scale), mode="bicubic"
        )

    def measures(self, image: Tensor, target: Tensor) -> dict[str, float]:
        r"""Returns PSNR and SSIM of an image with shape :math:`(1, 3, H, W)`."""
        return {
            "psnr": float(metrics.psnr(image, target)),
            "ssim": float(metrics.ssim(image, target)),
        }

    def sampler(self, model: Any, condition: Tensor) -> tuple[Any, Tensor]:
        r"""Returns the residual beyond the bicubic enlargement, as far as the model keeps to its
        range, and a part of the condition of 16×16 pixels."""

        def residual(z: list[Tensor], y: Tensor) -> Tensor:
            enlarged: Tensor = model.decode(z, y)
            return enlarged - model.upsample(y)

        return residual, condition[..., 24:40, 40:56]
