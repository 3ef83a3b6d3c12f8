r"""The demo: two flows on real photographs, within their world and without."""

__all__ = [
    "TASKS",
    "DemoOptions",
    "Judged",
    "Result",
    "Sampled",
    "Trained",
    "artefact_mask",
    "bits_of",
    "last_bits",
    "run_demo",
    "split",
]

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowguard import data, metrics
from flowguard.bounds import certify
from flowguard.demo.lowlight import LowLightTask
from flowguard.demo.superres import SuperResolutionTask
from flowguard.demo.task import CALIBRATION_CROPS, NOISE, Model, Question, Task
from flowguard.io.atomic import strict_json
from flowguard.models.base import Given
from flowguard.ood import OODReport
from flowguard.training.loop import TrainingResult, train

#: The tasks, by name.
TASKS: dict[str, Task] = {"superres": SuperResolutionTask(), "lowlight": LowLightTask()}


@dataclass(frozen=True)
class DemoOptions:
    r"""What the demo is asked for."""

    out: Path
    steps: int = SuperResolutionTask.steps
    seed: int = 0
    device: str = "cpu"
    coupling: str = "robust"
    quick: bool = False
    progress: bool = True
    task: str = "superres"
    encoder: Path | None = None  # whose encoder both flows are built on, as it is

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {self.task!r}")


@dataclass(frozen=True)
class Judged:
    r"""A sample, and which of its pixels are artefacts."""

    sample: Tensor
    mask: Tensor  # artefact pixels

    @property
    def share(self) -> float:
        r"""The share of pixels that are artefacts, in [0, 1]."""
        return float(self.mask.float().mean())

    @property
    def largest(self) -> float:
        r"""The largest absolute value of the sample; infinite if any is not finite."""
        finite = self.sample[torch.isfinite(self.sample)]
        return float(finite.abs().max()) if finite.numel() == self.sample.numel() else math.inf

    @property
    def non_finite(self) -> int:
        r"""The number of values that are not finite."""
        return int((~torch.isfinite(self.sample)).sum())


@dataclass(frozen=True)
class Sampled(Judged):
    r"""What a model made of a condition."""

    report: OODReport


@dataclass(frozen=True)
class Trained:
    r"""A model, its training and its quality on the held-out photograph."""

    model: Model
    training: TrainingResult
    held_out: dict[str, float]
    certified: float  # no sample (or residual) exceeds this for noise up to NOISE; infinite if not certified
    attacked: float  # the largest one that an attack reached
    sampling_seconds: float
    sampling_cpu_seconds: float


@dataclass(frozen=True)
class Result:
    r"""All that the demo found out."""

    options: DemoOptions
    baseline: dict[str, float]  # the quality of the restoration without a model
    models: dict[str, Trained]
    conditions: list[Question]
    sampled: list[dict[str, Sampled]]  # for each condition, by model
    threads: int = field(default_factory=torch.get_num_threads)  # those that it was made with

    @property
    def task(self) -> Task:
        r"""The task that was asked for."""
        return TASKS[self.options.task]

    def to_dict(self) -> dict[str, Any]:
        r"""Returns plain numbers. All but those under ``"timing"`` repeat with the seed and the
        number of threads."""
        guarded = list(self.models)[-1]
        numbers = {
            "options": {
                k: v
                for k, v in dataclasses.asdict(self.options).items()
                if k not in ("out", "progress", "encoder")
            }
            | {"encoder": self.options.encoder and self.options.encoder.name},
            "torch": torch.__version__,
            "threads": self.threads,
            "temperature": self.task.temperature,
            "ood_model": guarded,
            **{f"{self.task.baseline.replace(' ', '_')}_{k}": v for k, v in self.baseline.items()},
            "models": {
                name: {
                    "parameters": sum(p.numel() for p in t.model.flow.parameters())
                    + sum(p.numel() for p in t.model.conditioner.parameters()),
                    "final_train_bits_per_dim": last_bits(t.training.losses),
                    "skipped_steps": t.training.skipped,
                    "certified_residual": t.certified,
                    "attacked_residual": t.attacked,
                    **t.held_out,
                }
                for name, t in self.models.items()
            },
            "conditions": [
                {
                    "name": condition.name,
                    "strongest": condition.strongest,
                    "range": [float(condition.image.min()), float(condition.image.max())],
                    "models": {
                        name: {
                            "artefact_share": s.share,
                            "max_abs": s.largest,
                            "non_finite": s.non_finite,
                            "ood": {
                                level: {
                                    "score": float(r.score[0]),
                                    "threshold": r.threshold,
                                    "p_value": float(r.p_value[0]),
                                }
                                for level, r in s.report.levels.items()
                            },
                        }
                        for name, s in by_model.items()
                    },
                }
                for condition, by_model in zip(self.conditions, self.sampled, strict=True)
            ],
            "timing": {
                name: {
                    "training_seconds": t.training.seconds,
                    "training_cpu_seconds": t.training.cpu_seconds,
                    "step_ms": 1e3 * t.training.seconds / max(1, len(t.training.losses)),
                    "sampling_seconds": t.sampling_seconds,
                    "sampling_cpu_seconds": t.sampling_cpu_seconds,
                }
                for name, t in self.models.items()
            },
        }
        plain: dict[str, Any] = strict_json(numbers)
        return plain


def last_bits(losses: list[float]) -> float:
    r"""Returns the mean of the last fifty finite losses of a training; NaN if there are none.

    Arguments:
        losses: The bits per dimension of each step.
    """
    tail = [loss for loss in losses if math.isfinite(loss)][-50:]
    return sum(tail) / len(tail) if tail else math.nan


def artefact_mask(sample: Tensor, condition: Tensor) -> Tensor:
    r"""Returns which pixels are artefacts, with shape :math:`(B, H, W)`.

    A pixel is an artefact if one of its channels is not finite, or lies more than 0.5 outside the
    range spanned by [0, 1] and the condition.

    Arguments:
        sample: The sample before any clamping, with shape :math:`(B, C, H, W)`.
        condition: The condition that it was drawn for.

    Example:
        >>> x = torch.tensor([0.5, 1.6, -0.4, torch.nan]).reshape(1, 1, 2, 2)
        >>> artefact_mask(x, torch.zeros(1, 1, 1, 1))
        tensor([[[False,  True],
                 [False,  True]]])
    """
    low, high = metrics.span(condition, 0.5)
    return ~((sample >= low) & (sample <= high)).all(dim=1)


def split(image: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the part of a photograph to train with and the part to calibrate with: the left
    three quarters and the rest.

    Arguments:
        image: The photograph, with shape :math:`(*, H, W)`.
    """
    cut = image.shape[-1] * 3 // 4
    return image[..., :cut], image[..., cut:]


def bits_of(model: Model, target: Tensor, y: Given, seed: int, draws: int = 4) -> float:
    r"""Returns an upper bound of the bits per dimension that a picture takes, over some draws of
    the dequantisation noise.

    Arguments:
        model: The model.
        target: The picture, with shape :math:`(1, 3, H, W)`.
        y: Its condition, or what :meth:`ImageModel.condition` made of it.
        seed: The seed of the noise.
        draws: How many there are; of a large picture one will do.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        return sum(float(model.nll(target, y).mean()) for _ in range(draws)) / draws


def _quality(task: Task, model: Model, target: Tensor, y: Tensor, seed: int) -> dict[str, float]:
    generator = torch.Generator(device=target.device).manual_seed(seed)
    sample = model.sample(y, 1, task.temperature, generator)[0]
    mean = model.sample(y, 1, 0.0)[0]
    return {
        "bits_per_dim": bits_of(model, target, y, seed),
        **task.measures(sample, target),
        **{f"{k}_temperature_0": v for k, v in task.measures(mean, target).items()},
    }


def _train(
    name: str, coupling: str, parts: list[tuple[Tensor, Tensor]], o: DemoOptions
) -> Trained:
    task = TASKS[o.task]
    torch.manual_seed(o.seed)
    model = task.build(coupling, o.quick, o.encoder).to(o.device)
    training_parts, rest = ([part[i] for part in parts] for i in (0, 1))
    crops = task.crops(training_parts, o.seed)
    training = train(model, crops, steps=o.steps, name=f"{name:>8}", progress=o.progress)

    model.conditioner.fit(task.contexts(training_parts, o.seed), progress=False)
    model.conditioner.calibrate(
        task.calibration(rest, o.seed + 1, CALIBRATION_CROPS), progress=False
    )
    target, y = (t.to(o.device) for t in task.held_out(o.seed))
    quality = _quality(task, model, target, y, o.seed)
    start, began = time.perf_counter(), time.process_time()
    model.sample(y, 1, task.temperature)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - began
    certified = certify(model).tighten().bound(NOISE)
    reached = task.attack(model, y, o.seed, steps=5 if o.quick else 25)
    return Trained(model, training, quality, certified, reached, seconds, cpu_seconds)


def run_demo(options: DemoOptions) -> Result:
    r"""Trains both models and asks them for conditions within and without their world.

    Nothing is written; see :func:`flowguard.demo.report.write`.

    Arguments:
        options: What is asked for.
    """
    task = TASKS[options.task]
    parts = [split(data.photograph(name)) for name in data.TRAINING_PHOTOGRAPHS]
    names = {"affine": "affine", options.coupling: options.coupling}
    models = {name: _train(name, coupling, parts, options) for name, coupling in names.items()}

    target, held_out = task.held_out(options.seed)
    asked = list(task.conditions(held_out, options.seed, options.quick))
    sampled = []
    for condition in asked:
        y = condition.image.to(options.device)
        by_model = {}
        for name, trained in models.items():
            generator = torch.Generator(device=y.device).manual_seed(options.seed)
            x = trained.model.sample(y, 1, task.temperature, generator)[0]
            report = trained.model.conditioner.report
            assert report is not None  # the sample was scored
            by_model[name] = Sampled(x.cpu(), artefact_mask(x, y).cpu(), report)
        sampled.append(by_model)
    baseline = task.measures(task.restored(held_out), target)
    return Result(options, baseline, models, asked, sampled)
