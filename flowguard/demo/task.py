r"""What a task of the demo is, and the first one: super-resolution."""

__all__ = ["Condition", "SuperResolutionTask", "Task", "psnr", "ssim"]

import abc
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowguard import data
from flowguard.bounds import attack
from flowguard.image.maps import Elementwise
from flowguard.models import LowLightFlow, SuperResolutionFlow

CROP = 32  # rows and columns of a target in training
BATCH = 16
CALIBRATION_CROPS = 400
CALIBRATION_BATCH = 8
NOISE = 4.0  # the largest noise that certificate and attack allow
QUANTILE = 0.99  # the calibrated quantile that flags a condition, at each level

Model = SuperResolutionFlow | LowLightFlow


@dataclass(frozen=True)
class Condition:
    r"""An image that the models are asked to restore."""

    name: str
    image: Tensor
    strongest: bool = True  # whether its corruption, if any, is at its highest strength


class Task(abc.ABC):
    r"""A task of the demo: its data, its models, and what is measured and said of them."""

    title: str  # what the models do
    condition: str  # what a condition is called
    bounded: str  # what certificate and attack are about
    baseline: str  # the name of the restoration without a model
    headline: str  # the condition of the report's first picture
    temperature: float
    steps: int  # of training, such that the demo takes less than five minutes on two cores
    columns: dict[str, tuple[str, str]]  # for each measure its heading and its format

    def build(self, coupling: str | Elementwise, quick: bool = False) -> Model:
        r"""Returns the untrained model, into which its weights load.

        Arguments:
            coupling: The name of the coupling, or its map.
            quick: Whether the model is that of ``--quick``.
        """
        model = self.model(coupling, quick)
        model.conditioner.alpha = (1 - QUANTILE) * model.flow.levels  # shared among the levels
        model.conditioner.boundary = QUANTILE
        return model

    @abc.abstractmethod
    def model(self, coupling: str | Elementwise, quick: bool) -> Model:
        r"""Returns the untrained model."""

    @abc.abstractmethod
    def crops(self, parts: list[Tensor], seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        r"""Returns an endless stream of batches of targets and conditions to train with."""

    @abc.abstractmethod
    def contexts(self, parts: list[Tensor], seed: int) -> list[Tensor]:
        r"""Returns the conditions that the conditioner is fitted to."""

    @abc.abstractmethod
    def calibration(self, parts: list[Tensor], seed: int, count: int) -> Iterator[Tensor]:
        r"""Yields batches of conditions that the conditioner is calibrated with."""

    @abc.abstractmethod
    def held_out(self, seed: int) -> tuple[Tensor, Tensor]:
        r"""Returns target and condition of the held-out photograph."""

    @abc.abstractmethod
    def conditions(self, held_out: Tensor, seed: int, quick: bool) -> Iterator[Condition]:
        r"""Yields the held-out condition, other worlds, and corruptions of the held-out one."""

    @abc.abstractmethod
    def restored(self, condition: Tensor) -> Tensor:
        r"""Returns the restoration without a model."""

    @abc.abstractmethod
    def measures(self, image: Tensor, target: Tensor) -> dict[str, float]:
        r"""Returns the quality of an image with shape :math:`(1, 3, H, W)`."""

    @abc.abstractmethod
    def sampler(self, model: Any, condition: Tensor) -> tuple[Any, Tensor]:
        r"""Returns what an attack is to enlarge, a function of latents and condition, and the part
        of the condition that it may change."""

    def attack(self, model: Model, condition: Tensor, seed: int, steps: int) -> float:
        r"""Returns the largest value reached by any condition within 1 of a part of this one.

        Arguments:
            model: The model.
            condition: The condition.
            seed: The seed of the restarts.
            steps: The number of steps.
        """
        function, y = self.sampler(model, condition)
        generator = torch.Generator(device=y.device).manual_seed(seed)
        return attack(
            function,
            y,
            radius=1.0,
            noise=NOISE,
            steps=steps,
            restarts=2,
            latents=[y.new_zeros(1, *shape) for shape in model.latent_shapes(y)],
            generator=generator,
        ).value


def psnr(image: Tensor, target: Tensor) -> float:
    r"""Returns the peak signal-to-noise ratio in dB of an image cut to :math:`[0, 1]`."""
    error = (image.nan_to_num().clamp(0, 1) - target).square().mean()
    return float(-10 * torch.log10(error))


def ssim(image: Tensor, target: Tensor) -> float:
    r"""Returns the structural similarity of an image with shape :math:`(1, 3, H, W)`."""
    from skimage.metrics import structural_similarity

    arrays = [data.to_uint8(t[0]) for t in (target, image)]
    return float(structural_similarity(*arrays, channel_axis=2))


def other_worlds(quick: bool) -> Iterator[tuple[str, Tensor]]:
    r"""Yields names and middles of pictures from other worlds, with shape :math:`(3, H, W)`."""
    size = 128 if quick else 384
    for name, file in data.OTHER_WORLDS.items():
        image = data.photograph(file)
        top, left = (max(0, (n - size) // 2) for n in image.shape[-2:])
        yield name, image[:, top : top + size, left : left + size]


class SuperResolutionTask(Task):
    r"""Creates the task of enlarging photographs four times."""

    scale = 4
    title = "×4 super-resolution"
    condition = "condition (LR)"
    bounded = "residual |x - bicubic(y)|"
    baseline = "bicubic"
    headline = "gain 5"
    temperature = 0.8
    steps = 400
    columns = {  # noqa: RUF012  # never changed
        "psnr": ("PSNR", ".2f"),
        "ssim": ("SSIM", ".3f"),
        "psnr_temperature_0": ("PSNR τ=0", ".2f"),
        "ssim_temperature_0": ("SSIM τ=0", ".3f"),
    }

    def model(self, coupling: str | Elementwise, quick: bool) -> SuperResolutionFlow:
        steps, hidden, features = (1, 16, 16) if quick else (4, 64, 64)
        return SuperResolutionFlow(
            scale=self.scale,
            levels=2,
            steps=steps,
            hidden=hidden,
            features=features,
            coupling=coupling,
        )

    def crops(self, parts: list[Tensor], seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        return data.PairedCrops(parts, scale=self.scale, size=CROP, batch=BATCH, seed=seed)

    def contexts(self, parts: list[Tensor], seed: int) -> list[Tensor]:
        return [
            data.downsample(data.crop_to_multiple(part, 8)[None], self.scale) for part in parts
        ]

    def calibration(self, parts: list[Tensor], seed: int, count: int) -> Iterator[Tensor]:
        crops = data.PairedCrops(
            parts, scale=self.scale, size=96, batch=CALIBRATION_BATCH, seed=seed
        )
        for _, lr in itertools.islice(crops, count // CALIBRATION_BATCH):
            yield lr

    def held_out(self, seed: int) -> tuple[Tensor, Tensor]:
        photograph = data.photograph(data.HELD_OUT_PHOTOGRAPH)
        hr = data.crop_to_multiple(photograph, self.scale)[None]
        return hr, data.downsample(hr, self.scale)

    def conditions(self, held_out: Tensor, seed: int, quick: bool) -> Iterator[Condition]:
        yield Condition("held-out photograph", held_out)
        for name, image in other_worlds(quick):
            fitting = data.crop_to_multiple(image, self.scale)[None]
            yield Condition(name, data.downsample(fitting, self.scale))
        for corruption in data.corruptions(seed):
            strengths = corruption.strengths[-1:] if quick else corruption.strengths
            for strength in strengths:
                yield Condition(
                    f"{corruption.name} {strength:g}",
                    corruption(held_out, strength),
                    strength == corruption.strengths[-1],
                )

    def restored(self, condition: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(
            condition, scale_factor=float(self.scale), mode="bicubic"
        )

    def measures(self, image: Tensor, target: Tensor) -> dict[str, float]:
        return {"psnr": psnr(image, target), "ssim": ssim(image, target)}

    def sampler(self, model: Any, condition: Tensor) -> tuple[Any, Tensor]:
        def residual(z: list[Tensor], y: Tensor) -> Tensor:
            enlarged: Tensor = model.decode(z, y)
            return enlarged - self.restored(y)

        return residual, condition[..., 24:40, 40:56]
