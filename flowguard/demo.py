r"""The demo: two super-resolution flows on real photographs, within their world and without."""

__all__ = ["DemoOptions", "Result", "artefact_mask", "build", "conditions", "run"]

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowguard import data
from flowguard.adversary import attack
from flowguard.certificate import certify
from flowguard.models import SuperResolutionFlow
from flowguard.ood import OODReport
from flowguard.training import TrainingResult, train

SCALE = 4
CROP = 32  # HR rows and columns of a training crop
BATCH = 16
TEMPERATURE = 0.8
CALIBRATION_CROPS = 400
NOISE = 4.0  # the largest noise that certificate and attack allow
QUANTILE = 0.99  # the calibrated quantile that flags a condition, at each level


@dataclass(frozen=True)
class DemoOptions:
    r"""What the demo is asked for."""

    out: Path
    steps: int = 400
    seed: int = 0
    device: str = "cpu"
    coupling: str = "robust"
    quick: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Condition:
    r"""An LR image that the models are asked to enlarge."""

    name: str
    image: Tensor
    strongest: bool = True  # whether its corruption, if any, is at its highest strength


@dataclass(frozen=True)
class Sampled:
    r"""What a model made of a condition."""

    sample: Tensor
    mask: Tensor  # artefact pixels
    report: OODReport

    @property
    def share(self) -> float:
        return float(self.mask.float().mean())

    @property
    def largest(self) -> float:
        finite = self.sample[torch.isfinite(self.sample)]
        return float(finite.abs().max()) if finite.numel() == self.sample.numel() else math.inf

    @property
    def non_finite(self) -> int:
        return int((~torch.isfinite(self.sample)).sum())


@dataclass(frozen=True)
class Trained:
    r"""A model, its training and its quality on the held-out photograph."""

    model: SuperResolutionFlow
    training: TrainingResult
    held_out: dict[str, float]
    certified: float  # no residual exceeds this for noise up to NOISE; infinite if not certified
    attacked: float  # the largest residual that an attack reached
    sampling_seconds: float


@dataclass(frozen=True)
class Result:
    r"""All that the demo found out."""

    options: DemoOptions
    bicubic_psnr: float
    models: dict[str, Trained]
    conditions: list[Condition]
    sampled: list[dict[str, Sampled]]  # for each condition, by model

    def to_dict(self) -> dict[str, Any]:
        r"""Returns plain numbers. All but those under ``"timing"`` repeat with the seed."""
        guarded = list(self.models)[-1]
        numbers = {
            "options": {
                k: v
                for k, v in dataclasses.asdict(self.options).items()
                if k not in ("out", "progress")
            },
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "temperature": TEMPERATURE,
            "ood_model": guarded,
            "bicubic_psnr": self.bicubic_psnr,
            "models": {
                name: {
                    "parameters": sum(p.numel() for p in t.model.flow.parameters())
                    + sum(p.numel() for p in t.model.conditioner.parameters()),
                    "final_train_bits_per_dim": _tail(t.training.losses),
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
                    "step_ms": 1e3 * t.training.seconds / max(1, len(t.training.losses)),
                    "sampling_seconds": t.sampling_seconds,
                }
                for name, t in self.models.items()
            },
        }
        plain: dict[str, Any] = _strict(numbers)
        return plain


def _strict(value: Any) -> Any:
    """JSON has neither infinity nor NaN: they become the words."""
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _tail(losses: list[float]) -> float:
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
    low = min(0.0, float(condition.min())) - 0.5
    high = max(1.0, float(condition.max())) + 0.5
    return ~((sample >= low) & (sample <= high)).all(dim=1)


def conditions(lr: Tensor, seed: int, quick: bool) -> Iterator[Condition]:
    r"""Yields the held-out condition, other worlds, and corruptions of the held-out one.

    Arguments:
        lr: The held-out LR image, with shape :math:`(1, 3, H, W)`.
        seed: The seed of the noise.
        quick: Whether to use fewer and smaller ones.
    """
    yield Condition("held-out photograph", lr)
    size = 128 if quick else 384
    for name, file in data.OTHER_WORLDS.items():
        image = data.photograph(file)
        top, left = (max(0, (n - size) // 2) for n in image.shape[-2:])
        image = data.crop_to_multiple(image[:, top : top + size, left : left + size], SCALE)
        yield Condition(name, data.downsample(image[None], SCALE))
    for corruption in data.corruptions(seed):
        strengths = corruption.strengths[-1:] if quick else corruption.strengths
        for strength in strengths:
            yield Condition(
                f"{corruption.name} {strength:g}",
                corruption(lr, strength),
                strength == corruption.strengths[-1],
            )


def _split(image: Tensor) -> tuple[Tensor, Tensor]:
    """The left three quarters are for training, the rest for calibration."""
    cut = image.shape[-1] * 3 // 4
    return image[..., :cut], image[..., cut:]


def _quality(model: SuperResolutionFlow, hr: Tensor, lr: Tensor, seed: int) -> dict[str, float]:
    from skimage.metrics import structural_similarity

    generator = torch.Generator(device=hr.device).manual_seed(seed)
    sample = model.sample(lr, 1, TEMPERATURE, generator)[0]
    mean = model.sample(lr, 1, 0.0)[0]
    torch.manual_seed(seed)  # the dequantisation noise
    with torch.no_grad():
        bits = sum(float(model.nll(hr, lr).mean()) for _ in range(4)) / 4
    arrays = [data.to_uint8(t[0]) for t in (hr, sample, mean)]
    ssim = [structural_similarity(arrays[0], a, channel_axis=2) for a in arrays[1:]]
    return {
        "bits_per_dim": bits,
        "psnr": psnr(sample, hr),
        "ssim": float(ssim[0]),
        "psnr_temperature_0": psnr(mean, hr),
        "ssim_temperature_0": float(ssim[1]),
    }


def psnr(image: Tensor, target: Tensor) -> float:
    r"""Returns the peak signal-to-noise ratio in dB of an image cut to :math:`[0, 1]`."""
    error = (image.nan_to_num().clamp(0, 1) - target).square().mean()
    return float(-10 * torch.log10(error))


def build(coupling: str, quick: bool = False) -> SuperResolutionFlow:
    r"""Returns the untrained model of the demo, into which its weights load.

    Arguments:
        coupling: The name of the coupling.
        quick: Whether the model is that of ``--quick``.
    """
    steps, hidden, features = (1, 16, 16) if quick else (4, 64, 64)
    model = SuperResolutionFlow(
        scale=SCALE, levels=2, steps=steps, hidden=hidden, features=features, coupling=coupling
    )
    model.conditioner.alpha = (1 - QUANTILE) * model.flow.levels  # shared among the levels
    model.conditioner.boundary = QUANTILE
    return model


def _train(name: str, coupling: str, photographs: list[Tensor], o: DemoOptions) -> Trained:
    torch.manual_seed(o.seed)
    model = build(coupling, o.quick).to(o.device)
    parts = [_split(image) for image in photographs]
    crops = data.PairedCrops(
        [part for part, _ in parts], scale=SCALE, size=CROP, batch=BATCH, seed=o.seed
    )
    training = train(model, crops, steps=o.steps, name=f"{name:>8}", progress=o.progress)

    model.conditioner.fit(
        [data.downsample(data.crop_to_multiple(part, 8)[None], SCALE) for part, _ in parts],
        progress=False,
    )
    held = data.PairedCrops(
        [rest for _, rest in parts], scale=SCALE, size=96, batch=8, seed=o.seed + 1
    )
    count = CALIBRATION_CROPS // 8
    model.conditioner.calibrate(
        (lr for _, (_, lr) in zip(range(count), held, strict=False)), progress=False
    )
    hr = data.crop_to_multiple(data.photograph(data.HELD_OUT_PHOTOGRAPH), SCALE)[None]
    hr = hr.to(o.device)
    lr = data.downsample(hr, SCALE)
    quality = _quality(model, hr, lr, o.seed)
    start = time.perf_counter()
    model.sample(lr, 1, TEMPERATURE)
    seconds = time.perf_counter() - start
    certified = certify(model).bound(NOISE)
    reached = _attack(model, lr, o.seed, steps=5 if o.quick else 25)
    return Trained(model, training, quality, certified, reached, seconds)


def _attack(model: SuperResolutionFlow, lr: Tensor, seed: int, steps: int) -> float:
    """The largest residual for any condition within 1 of a crop of the held-out photograph."""
    y = lr[..., 24:40, 40:56]
    latents = [y.new_zeros(1, *shape) for shape in model.latent_shapes(y)]

    def residual(z: list[Tensor], y: Tensor) -> Tensor:
        return model.decode(z, y) - model.upsample(y)

    generator = torch.Generator(device=y.device).manual_seed(seed)
    return attack(
        residual,
        y,
        radius=1.0,
        noise=NOISE,
        steps=steps,
        restarts=2,
        latents=latents,
        generator=generator,
    ).value


def run(options: DemoOptions) -> Result:
    r"""Trains both models and asks them for conditions within and without their world.

    Nothing is written; see :func:`flowguard.demo_report.write`.

    Arguments:
        options: What is asked for.
    """
    photographs = [data.photograph(name) for name in data.TRAINING_PHOTOGRAPHS]
    names = {"affine": "affine", options.coupling: options.coupling}
    models = {
        name: _train(name, coupling, photographs, options) for name, coupling in names.items()
    }

    hr = data.crop_to_multiple(data.photograph(data.HELD_OUT_PHOTOGRAPH), SCALE)[None]
    lr = data.downsample(hr, SCALE)
    bicubic = next(iter(models.values())).model.upsample(lr.to(options.device)).cpu()
    asked = list(conditions(lr, options.seed, options.quick))
    sampled = []
    for condition in asked:
        y = condition.image.to(options.device)
        by_model = {}
        for name, trained in models.items():
            generator = torch.Generator(device=y.device).manual_seed(options.seed)
            x = trained.model.sample(y, 1, TEMPERATURE, generator)[0]
            report = trained.model.conditioner.report
            assert report is not None  # the sample was scored
            by_model[name] = Sampled(x.cpu(), artefact_mask(x, y).cpu(), report)
        sampled.append(by_model)
    return Result(options, psnr(bicubic, hr), models, asked, sampled)
