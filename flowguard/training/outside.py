r"""What a model in training does with conditions that are unlike those it learns from."""

__all__ = [
    "Outside",
    "Questions",
    "ask",
    "attacked",
    "bent",
    "middle",
    "questions",
    "raw_condition",
    "residual",
    "strangeness",
]

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import Dataset

from flowguard import data, metrics
from flowguard.bounds import Attack, attack, certify
from flowguard.functional import limited
from flowguard.io.folder import Fault, PictureFiles, find, survey
from flowguard.io.pictures import ImageError
from flowguard.models import LowLightFlow, SuperResolutionFlow
from flowguard.models.encoders.lowlight import BLACK, low_light_input
from flowguard.ood import OODContextWarning, OODReport
from flowguard.ood.conditioner import unguarded
from flowguard.training import guard
from flowguard.training.callbacks import MetricsTable

Model = SuperResolutionFlow | LowLightFlow

#: The largest noise that certificate and attack allow.
NOISE = 4.0
#: How far a limit must move a pixel for it to be counted.
BENT = 0.05
#: How far samples may lie outside the range of [0, 1] and their condition.
BEYOND = 0.5
TEMPERATURE = 0.8
#: The rows and columns of the condition that is attacked, at most.
ATTACKED = 16


@dataclass(frozen=True)
class Questions:
    r"""Conditions that a model is asked about, all of one size.

    Arguments:
        usual: Conditions like those of training, with shape :math:`(B, 3, H, W)`.
        corrupted: The same, spoilt in several ways, by the name of the corruption.
        folder: Conditions of a folder, if there is one.
    """

    usual: Tensor
    corrupted: dict[str, Tensor]
    folder: Tensor | None = None


def raw_condition(y: Tensor) -> Tensor:
    r"""Returns a condition as a picture: of one that was prepared for the low-light encoder, the
    dark photograph.

    Arguments:
        y: The condition, with shape :math:`(*, C, H, W)`.
    """
    return (y[..., :3, :, :].exp() - BLACK).clamp_min(0) if y.shape[-3] == 6 else y


def middle(image: Tensor, size: int) -> Tensor:
    r"""Returns the middle of an image, of at most so many rows and columns.

    Arguments:
        image: The image, with shape :math:`(*, H, W)`.
        size: The rows and columns.
    """
    top, left = (max(0, (n - size) // 2) for n in image.shape[-2:])
    return image[..., top : top + size, left : left + size]


def questions(
    held_out: Dataset[Any],
    *,
    folder: str | Path | None = None,
    size: int = 24,
    most: int = 8,
    seed: int = 0,
) -> tuple[Questions, list[Fault]]:
    r"""Returns what a model is asked, and the files that are left out.

    Arguments:
        held_out: Pairs of a target and its condition that are not trained with.
        folder: A folder of pictures that are taken as conditions as they are.
        size: The rows and columns of a condition: the middle of a picture. Less if the smallest
            held-out condition has less.
        most: The most pictures of each kind.
        seed: The seed of the corruptions' noise.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder holds no picture that can be used.
    """
    count = min(most, len(held_out))  # type: ignore[arg-type]
    pictures = [raw_condition(held_out[i][1]) for i in range(count)]
    size = min(size, *(n for p in pictures for n in p.shape[-2:]))
    usual = torch.stack([middle(p, size) for p in pictures])
    corrupted = {
        f"{corruption.name} {strength:g}": corruption(usual, strength)
        for corruption in data.corruptions(seed)
        for strength in corruption.strengths
    }
    if folder is None:
        return Questions(usual, corrupted), []
    strange, faults = _strangers(folder, size, most)
    return Questions(usual, corrupted, strange), faults


def _strangers(folder: str | Path, size: int, most: int) -> tuple[Tensor, list[Fault]]:
    r"""The middles of the pictures of a folder, taken evenly."""
    found = survey(find(folder), rows=size, columns=size)
    faults = list(found.faults)
    chosen = range(0, len(found.files), max(1, len(found.files) // most))[:most]
    files = PictureFiles([found.files[i] for i in chosen], [found.headers[i] for i in chosen])
    middles = []
    for i, (height, width) in enumerate(files.sizes):
        try:
            whole = files.window(i, 0, 0, height, width)
        except ImageError as error:
            faults.append(Fault(files.files[i], str(error)))
        else:
            middles.append(middle(whole, size))
    if not middles:
        raise ValueError(
            f"there must be a picture of at least {size} rows and columns in {folder}; got"
            f" {len(faults)} other file(s)"
        )
    return torch.stack(middles), faults


def strangeness(report: OODReport) -> Tensor:
    r"""Returns how strange conditions are: the greatest score of a level over its threshold.

    Arguments:
        report: The report of the guard.
    """
    ratios = [level.score / level.threshold for level in report.levels.values()]
    worst = torch.stack(ratios).amax(0)
    return torch.where(report.non_finite, torch.full_like(worst, math.inf), worst)


def _sampled(model: Model, y: Tensor, seed: int) -> tuple[Tensor, Tensor, float, float]:
    r"""Samples of conditions, how strange these are, and the shares of pixels that are artefacts
    and not finite."""
    generator = torch.Generator(device=y.device).manual_seed(seed)
    samples = model.sample(y, 1, TEMPERATURE, generator)[0]
    report = model.conditioner.report
    assert report is not None  # the conditions were scored
    errors = [
        float(metrics.error_rate(x[None], per_pixel=True, low=low, high=high))
        for x, (low, high) in zip(samples, (metrics.span(c, BEYOND) for c in y), strict=True)
    ]
    missing = float(metrics.nan_rate(samples, per_pixel=True))
    return samples, strangeness(report), sum(errors) / len(errors), missing


def residual(model: Model, x: Tensor, y: Tensor) -> Tensor:
    r"""Returns what certificates speak of: the residual over the bicubic enlargement, where a model
    of super-resolution has one, else the image itself.

    Arguments:
        model: The model.
        x: Its image, with shape :math:`(B, C, H, W)`.
        y: The condition of it.

    Example:
        >>> model = flowguard.models.SuperResolutionFlow.from_pretrained("superres-x4").eval()
        >>> y = torch.full((1, 3, 8, 8), 0.5)  # whose enlargement is as grey
        >>> residual(model, torch.full((1, 3, 32, 32), 0.75), y).unique()
        tensor([0.2500])
    """
    base = model.base_of(y) if isinstance(model, SuperResolutionFlow) else None
    return x if base is None else x - base


def attacked(model: Model, y: Tensor, *, radius: float, steps: int, seed: int = 0) -> Attack:
    r"""Returns what a short attack on a condition and on noise reaches, of the :func:`residual`.

    Arguments:
        model: The model, in evaluation mode.
        y: The condition, with a batch of one. That of a low-light model is attacked as its encoder
            sees it: that can be changed smoothly; a histogram cannot.
        radius: How far each number of it may be moved.
        steps: The steps of the attack.
        seed: The seed of the noise that it starts from.

    Example:
        >>> model = flowguard.models.SuperResolutionFlow.from_pretrained("superres-x4").eval()
        >>> found = attacked(model, torch.rand(1, 3, 8, 8), radius=0.1, steps=2)
        >>> found.value <= flowguard.certify(model).bound(4.0)
        True
    """

    def explode(z: list[Tensor], y: Tensor) -> Tensor:
        return residual(model, model.decode(z, y), y)

    if isinstance(model, LowLightFlow):
        y = low_light_input(raw_condition(y))
    with unguarded(model):  # of a function the attack does not know the guards
        return attack(
            explode,
            y,
            radius=radius,
            noise=NOISE,
            steps=steps,
            restarts=1,
            latents=[y.new_zeros(1, *shape) for shape in model.latent_shapes(y)],
            generator=torch.Generator(device=y.device).manual_seed(seed),
        )


@contextmanager
def _silent() -> Iterator[None]:
    r"""Lets the guard say nothing of conditions that are meant to be strange."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OODContextWarning)
        yield


def bent(samples: Tensor, margin: float) -> float:
    r"""Returns the share of pixels that a limit has moved by more than 0.05, which is told by where
    they lie.

    Arguments:
        samples: Images of a model, of any shape.
        margin: Its margin; see :meth:`ImageModel.limit`.

    Example:
        >>> bent(torch.tensor([0.5, 1.1, 1.24, 1.249]), margin=0.25)
        0.5
    """
    free, _ = limited(samples, margin, inverse=True)
    return float(((free - samples).abs() > BENT).double().mean())


def ask(
    model: Model, asked: Questions, *, seed: int = 0, steps: int = 5
) -> tuple[dict[str, float], Tensor]:
    r"""Returns what a model does with conditions unlike those of its training, in numbers, and its
    sample of a condition five times as bright.

    Arguments:
        model: The model, in evaluation mode, its guard fitted and calibrated.
        asked: The conditions.
        seed: The seed of samples and attack.
        steps: The steps of the attack.

    Returns:
        ``artefacts`` and ``non_finite``, the shares of pixels over the corruptions that are not
        finite, or lie more than 0.5 outside the range of [0, 1] and the condition; ``auroc``, how
        well the guard tells the corrupted conditions from the others; the same for the ``folder``;
        for a model with a margin ``bent``, the share of pixels over the corruptions that the limit
        moves by more than 0.05; the ``certificate``, a bound for all conditions and noise up to 4; and what an attack on
        one ``reached``.
    """
    policy, device = model.conditioner.policy, next(model.parameters()).device
    if policy != "shrink":  # which is part of what it does with them
        model.conditioner.policy = "report"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), _silent():
            _, usual, *_ = _sampled(model, asked.usual.to(device), seed)
            found = {
                name: _sampled(model, y.to(device), seed) for name, y in asked.corrupted.items()
            }
            numbers = _means("", usual, list(found.values()))
            if model.margin is not None:
                shares = [bent(samples, model.margin) for samples, *_ in found.values()]
                numbers["bent"] = sum(shares) / len(shares)
            if asked.folder is not None:
                strange = _sampled(model, asked.folder.to(device), seed)
                numbers |= _means("folder_", usual, [strange])
                if model.margin is not None:
                    numbers["folder_bent"] = bent(strange[0], model.margin)
        numbers["certificate"] = certify(model).bound(NOISE)
        with torch.autocast(device.type, enabled=False), _silent():
            # A multiple, so that nothing is padded: the residual is over what was given.
            size = max(model.multiple, ATTACKED // model.multiple * model.multiple)
            one = data.crop_to_multiple(middle(asked.usual[:1].to(device), size), model.multiple)
            numbers["reached"] = attacked(model, one, radius=1.0, steps=steps, seed=seed).value
    finally:
        model.conditioner.policy = policy
    shown = found["gain 5"][0] if "gain 5" in found else next(iter(found.values()))[0]
    return numbers, shown[0].cpu()


def _means(
    prefix: str, usual: Tensor, found: Sequence[tuple[Tensor, Tensor, float, float]]
) -> dict[str, float]:
    strange = torch.cat([scores for _, scores, *_ in found])[:, None]
    return {
        f"{prefix}artefacts": sum(f[2] for f in found) / len(found),
        f"{prefix}non_finite": sum(f[3] for f in found) / len(found),
        # By its definition: how often one is stranger than another, ties counted half.
        f"{prefix}auroc": float(((strange > usual) + 0.5 * (strange == usual)).double().mean()),
    }


@dataclass(eq=False)
class Outside(Callback):
    r"""Asks the averaged model about strange conditions at each validation, and writes a row.

    It must come before :class:`flowguard.training.callbacks.Averaging` in the list of callbacks.

    Arguments:
        file: The file of the rows.
        asked: The conditions.
        conditions: What the guard learns from.
        seed: The seed of all that is random.

    Attributes:
        last: The last row.
        shown: The sample of a condition five times as bright.
    """

    file: Path
    asked: Questions
    conditions: guard.Conditions
    seed: int = 0
    last: dict[str, float] = field(default_factory=dict)
    shown: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Makes the file fit the step that the run begins with."""
        if trainer.is_global_zero and self.file.exists():
            columns = self.file.read_text(encoding="utf-8").partition("\n")[0].split(",")
            MetricsTable(self.file, columns).begin(trainer.global_step)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Asks, and writes a row."""
        # All processes make the guard together; one of them asks.
        model = guard.guarded(
            pl_module.model, self.conditions, trainer.global_rank, trainer.world_size
        )
        if not trainer.is_global_zero:
            return
        assert isinstance(model, SuperResolutionFlow | LowLightFlow)
        numbers, self.shown = ask(model, self.asked, seed=self.seed)
        self.last = {"step": trainer.global_step, **numbers}
        table = MetricsTable(self.file, tuple(self.last))
        table.begin(trainer.global_step - 1)
        table.add(self.last)
