r"""A comparison of couplings: trained alike, asked alike, measured alike."""

__all__ = ["COUPLINGS", "CompareOptions", "Compared", "Comparison", "compare"]

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flowguard import data, metrics
from flowguard.bounds import certify
from flowguard.demo.lowlight import HELD_OUT, LowLightTask
from flowguard.demo.run import TASKS, Sampled, artefact_mask, bits_of, last_bits, split
from flowguard.demo.task import CALIBRATION_CROPS, NOISE, Model, Parts, Question, Task
from flowguard.image.maps import Elementwise, Robust
from flowguard.io.atomic import strict_json
from flowguard.io.folder import Columns, PictureFiles
from flowguard.models import SuperResolutionFlow
from flowguard.training.loop import train

#: The couplings that can be compared.
COUPLINGS: dict[str, str | Elementwise] = {
    "affine": "affine",
    "reparametrized": "reparametrized",
    "robust2": Robust(bins=2),
    "robust8": Robust(bins=8),
    "bspline": "bspline",
}
#: Rows and columns that a picture needs: three quarters of the columns are for training, the rest
#: for calibration.
LEAST = (96, 384)


@dataclass(frozen=True)
class CompareOptions:
    r"""What is compared.

    Arguments:
        couplings: The names of the couplings to train.
        loaded: Models that are compared as they are, by name.
        images: The pictures to learn from, the last of which is held out: tensors with shape
            :math:`(3, H, W)`, or pictures in files, of which no more is in memory than these
            keep; if there are none, the built-in photographs.
        task: ``"superres"`` or ``"lowlight"``.
        steps: The training steps of each.
        samples: The number of samples for each condition.
        seed: The seed of all randomness.
        device: The device.
        quick: Whether the models are tiny and the conditions few.
        progress: Whether to show progress bars.
    """

    couplings: tuple[str, ...] = tuple(COUPLINGS)
    loaded: Mapping[str, Model] = field(default_factory=dict)
    images: Parts = ()
    task: str = "superres"
    steps: int = 400
    samples: int = 5
    seed: int = 0
    device: str = "cpu"
    quick: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        unknown = [c for c in self.couplings if c not in COUPLINGS]
        if unknown:
            raise ValueError(f"couplings are {', '.join(COUPLINGS)}; got {unknown[0]!r}")
        if not self.couplings and not self.loaded:
            raise ValueError("there must be a coupling or a model to compare; got none")
        both = set(self.couplings) & set(self.loaded)
        if both:
            raise ValueError(f"a model must not be called like a coupling; got {both.pop()!r}")
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {self.task!r}")
        if self.steps < 1 or self.samples < 1:
            raise ValueError(
                f"steps and samples must be positive; got {self.steps} and {self.samples}"
            )
        if len(self.images) == 1:
            raise ValueError("there must be two pictures or more: the last one is held out; got 1")
        for size in _sizes(self.images):
            if size[0] < LEAST[0] or size[1] < LEAST[1]:
                raise ValueError(
                    f"pictures must have at least {LEAST[0]} rows and {LEAST[1]} columns; got {size}"
                )


@dataclass(frozen=True)
class Compared:
    r"""A model and what was measured of it."""

    model: Model
    losses: list[float]  # bits per dimension of each step; none if it was loaded
    skipped: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    r"""All that a comparison found out."""

    options: CompareOptions
    models: dict[str, Compared]
    conditions: list[Question]
    sampled: list[dict[str, Sampled]]  # the first sample of each condition, by model
    threads: int = field(default_factory=torch.get_num_threads)  # those that it was made with

    @property
    def task(self) -> Task:
        r"""The task."""
        return TASKS[self.options.task]

    def to_dict(self) -> dict[str, Any]:
        r"""Returns plain numbers, as JSON can hold them."""
        o = self.options
        kept = ("couplings", "task", "steps", "samples", "seed", "device", "quick")
        numbers = {
            "options": {k: getattr(o, k) for k in kept} | {"images": len(o.images)},
            "torch": torch.__version__,
            "threads": self.threads,
            "models": {
                name: {
                    "parameters": sum(p.numel() for p in c.model.parameters()),
                    "skipped_steps": c.skipped,
                    **c.numbers,
                }
                for name, c in self.models.items()
            },
        }
        plain: dict[str, Any] = strict_json(numbers)
        return plain


def _sizes(images: Parts) -> list[tuple[int, int]]:
    if isinstance(images, PictureFiles):
        return images.sizes
    return [(image.shape[-2], image.shape[-1]) for image in images]


def _parts(options: CompareOptions) -> tuple[Parts, Parts]:
    r"""The parts of the pictures to train with, and the parts to calibrate with."""
    if isinstance(options.images, PictureFiles):
        numbers = range(len(options.images) - 1)
        first = Columns(options.images, last=3 / 4, numbers=numbers)
        return first, Columns(options.images, first=3 / 4, numbers=numbers)
    images = list(options.images[:-1]) or [data.photograph(n) for n in data.TRAINING_PHOTOGRAPHS]
    parts = [split(image) for image in images]
    return [part for part, _ in parts], [rest for _, rest in parts]


def _held_out(task: Task, options: CompareOptions) -> tuple[Tensor, Tensor]:
    if not len(options.images):
        return task.held_out(options.seed)
    if isinstance(options.images, PictureFiles):
        last = len(options.images) - 1
        image = options.images.window(last, 0, 0, *options.images.sizes[last])
    else:
        image = options.images[-1]
    if isinstance(task, LowLightTask):
        generator = torch.Generator().manual_seed(options.seed)
        return image[None], data.expose(image[None], HELD_OUT, generator)
    scale: int = task.scale  # type: ignore[attr-defined]
    hr = data.crop_to_multiple(image, scale)[None]
    return hr, data.downsample(hr, scale)


def _guard(task: Task, model: Model, parts: tuple[Parts, Parts], seed: int) -> None:
    r"""Fits and calibrates the guard, unless it is."""
    if model.conditioner.calibrated:
        return
    first, rest = parts
    model.conditioner.fit(task.contexts(first, seed), progress=False)
    model.conditioner.calibrate(
        task.calibration(rest, seed + 1, CALIBRATION_CROPS), progress=False
    )


def _samples(model: Model, y: Tensor, o: CompareOptions, temperature: float) -> Tensor:
    generator = torch.Generator(device=y.device).manual_seed(o.seed)
    return model.sample(y, o.samples, temperature, generator)


def _rates(samples: Tensor, y: Tensor, prefix: str) -> dict[str, float]:
    r"""The share of samples and pixels that err, given the range of the condition."""
    low, high = metrics.span(y, 0.5)
    return {
        f"{prefix}_error_rate": float(metrics.error_rate(samples, low=low, high=high)),
        f"{prefix}_error_pixels": float(
            metrics.error_rate(samples, per_pixel=True, low=low, high=high)
        ),
        f"{prefix}_nan_rate": float(metrics.nan_rate(samples)),
        f"{prefix}_nan_pixels": float(metrics.nan_rate(samples, per_pixel=True)),
    }


def _quality(
    task: Task, model: Model, target: Tensor, y: Tensor, o: CompareOptions
) -> dict[str, float]:
    samples = _samples(model, y, o, task.temperature)
    first = model.sample(y, 1, 0.0)[0]
    flat = samples.flatten(0, 1)
    many = target.expand_as(samples).flatten(0, 1)
    numbers = {
        "psnr": float(metrics.psnr(flat, many).mean()),
        "ssim": float(metrics.ssim(flat, many).mean()),
        "psnr_temperature_0": float(metrics.psnr(first, target).mean()),
        "ssim_temperature_0": float(metrics.ssim(first, target).mean()),
        "bits_per_dim": bits_of(model, target, y, o.seed),
        "diversity": float(metrics.diversity(samples, target)),
        **_rates(samples, y, "in"),
    }
    if isinstance(model, SuperResolutionFlow):
        lr = y.expand(len(flat), -1, -1, -1)
        numbers["lr_psnr"] = float(metrics.lr_psnr(flat, lr, model.scale).mean())
    else:
        numbers["psnr_gt_mean"] = float(metrics.low_light(flat, many)["psnr_gt_mean"].mean())
    seconds, cpu_seconds = [], []
    for _ in range(3):
        start, began = time.perf_counter(), time.process_time()
        model.sample(y, 1, task.temperature)[0].sum().item()  # the device has finished
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - began)
    return numbers | {
        "sample_seconds": median(seconds),
        "sample_cpu_seconds": median(cpu_seconds) if y.device.type == "cpu" else math.nan,
    }


def compare(options: CompareOptions) -> Comparison:
    r"""Trains the couplings under one budget and measures them beside the models loaded.

    All see the same crops in the same order, and are asked for the same samples.

    Arguments:
        options: What is compared.
    """
    o, task = options, TASKS[options.task]
    parts = _parts(o)
    target, y = (t.to(o.device) for t in _held_out(task, o))
    asked = list(task.conditions(y.cpu(), o.seed, o.quick))
    models: dict[str, Compared] = {}
    sampled: list[dict[str, Sampled]] = [{} for _ in asked]
    for name in (*o.couplings, *o.loaded):
        model, training = _model(name, task, parts, o)
        _guard(task, model, parts, o.seed)
        numbers = _quality(task, model, target, y, o)
        numbers |= {"certificate": certify(model).bound(NOISE)}
        outside: list[dict[str, float]] = []
        for condition, by_model in zip(asked, sampled, strict=True):
            c = condition.image.to(o.device)
            samples = _samples(model, c, o, task.temperature)
            report = model.conditioner.report
            assert report is not None  # the samples were scored
            first = samples[0]
            by_model[name] = Sampled(first.cpu(), artefact_mask(first, c).cpu(), report)
            outside.append(_rates(samples, c, "out"))
        # The first condition is the held-out picture itself.
        numbers |= {k: sum(r[k] for r in outside[1:]) / len(outside[1:]) for k in outside[0]}
        numbers |= dict.fromkeys(("train_bits_per_dim", "step_ms", "step_cpu_ms"), math.nan)
        if training is not None:
            numbers["train_bits_per_dim"] = last_bits(training.losses)
            numbers["step_ms"] = 1e3 * training.seconds / len(training.losses)
            if y.device.type == "cpu":
                numbers["step_cpu_ms"] = 1e3 * training.cpu_seconds / len(training.losses)
        models[name] = Compared(
            model,
            training.losses if training else [],
            training.skipped if training else 0,
            numbers,
        )
    return Comparison(o, models, asked, sampled)


def _model(
    name: str, task: Task, parts: tuple[Parts, Parts], o: CompareOptions
) -> tuple[Model, Any]:
    if name in o.loaded:
        return o.loaded[name].to(o.device).eval(), None
    torch.manual_seed(o.seed)
    model = task.build(COUPLINGS[name], o.quick).to(o.device)
    crops = task.crops(parts[0], o.seed)
    width = max(map(len, (*o.couplings, *o.loaded)))
    training = train(model, crops, steps=o.steps, name=f"{name:>{width}}", progress=o.progress)
    return model, training
