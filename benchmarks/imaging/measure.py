r"""What is measured of an image model: on pictures with a truth, and on conditions without one."""

__all__ = [
    "BINS",
    "MODEL",
    "Held",
    "Options",
    "Row",
    "Strange",
    "Study",
    "artefact_auroc",
    "artefact_spearman",
    "guard_of",
    "held_row",
    "model_row",
    "sample",
    "shared",
    "some",
    "strange_row",
]

import abc
import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowguard import data, metrics
from flowguard.bounds import certify
from flowguard.demo.run import Sampled, artefact_mask, bits_of
from flowguard.demo.task import NOISE
from flowguard.io.folder import PictureFiles, find, survey
from flowguard.models.base import Given, ImageCondition
from flowguard.ood import OODReport
from flowguard.ood.metrics import decile_curve, level_maps
from flowguard.training.outside import middle, raw_condition, strangeness
from flowguard.training.pictures import Pairs
from flowguard.training.validation import TEMPERATURE, Part, Wholes

#: What was measured of one picture, as JSON holds it.
Row = dict[str, Any]

#: What stands for a set in rows of what is true of a model whatever it is asked.
MODEL = "model"
#: Images of more pixels are made in tiles, so that any picture fits into memory.
LARGE = 2**20
#: The edges of the scores that are counted: quantiles of the calibration, then what is beyond all
#: of it, in units of the boundary; see :func:`flowguard.ood.metrics.level_maps`.
EDGES = torch.cat(
    (
        torch.linspace(0, 1, 257, dtype=torch.float64)[1:],
        1 + torch.logspace(0, 6, 513, dtype=torch.float64),
    )
)
BINS = len(EDGES) + 1


@dataclass(frozen=True)
class Options:
    r"""What changes the numbers of a picture; results of other options are not mixed with these.

    Arguments:
        crop: The rows and columns of the middle of a target that is taken; if :py:`None`, all.
        outside_crop: The same for conditions without a truth, in pixels of what is made of them;
            if :py:`None`, that of `crop`.
        samples: The samples that the diversity is measured of.
        seed: The seed of all randomness.
    """

    crop: int | None = None
    outside_crop: int | None = None
    samples: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be positive; got {self.samples}")


class Held(NamedTuple):
    r"""A picture with its truth: target and condition have a batch of one."""

    picture: str
    target: Tensor
    condition: Tensor


class Strange(NamedTuple):
    r"""A condition without a truth, with a batch of one, and what the table calls its kind."""

    picture: str
    kind: str
    condition: Tensor


class Study(abc.ABC):
    r"""What a benchmark asks of the models of a task.

    Arguments:
        folder: The folder of the sets.
        options: What changes the numbers.
        most: The most pictures of each set, taken evenly; :py:`None` for all.
    """

    model: type[Any]  # the class of the models
    held: Mapping[str, str]  # the sets with a truth, by the name of the option: what tables say
    strange: Mapping[str, str]  # those without
    spoilt: str  # the one of the former that corruptions are made of
    usual: Sequence[str]  # the sets that the guard is to find usual
    measures: Mapping[str, tuple[str, str]]  # for each number its heading and its format
    score: str  # the measure that figures show
    beside: str  # the measure that says what this one does not
    bounded: str  # what the certificate is about

    def __init__(self, folder: Path, options: Options, most: int | None = None) -> None:
        self.folder, self.options, self.most = folder, options, most

    @abc.abstractmethod
    def pairs(self, name: str) -> Pairs:
        r"""Returns the pictures of a set with a truth.

        Arguments:
            name: The name of the set.
        """

    @abc.abstractmethod
    def conditions(self, name: str) -> Iterator[Strange]:
        r"""Yields the conditions of a set without a truth, as they were taken.

        Arguments:
            name: The name of the set.
        """

    @abc.abstractmethod
    def quality(self, image: Tensor, held: Held) -> dict[str, float]:
        r"""Returns what an image is worth, before any clamping.

        Arguments:
            image: The image, with shape :math:`(1, 3, H, W)`.
            held: The picture that it is to be.
        """

    @abc.abstractmethod
    def rivals(self) -> dict[str, Callable[[Held], Tensor]]:
        r"""Returns what needs no model, by name."""

    @property
    def scale(self) -> int:
        r"""How many times larger a target is than its condition."""
        return 1

    def pictures(self, name: str) -> Iterator[Held]:
        r"""Yields the pictures of a set, or their middles.

        Arguments:
            name: The name of the set.
        """
        pairs = self.pairs(name)
        chosen = Part(pairs, some(range(len(pairs.sizes)), self.most))
        wholes = Wholes(pairs, self.options.seed)
        crop = self.options.crop
        for i, number in enumerate(chosen.numbers):
            target, condition = wholes[number]
            if crop is not None:
                # The middle of the condition, and what belongs to it.
                s = self.scale
                size = [min(crop // s, n) for n in condition.shape[-2:]]
                top, left = ((n - m) // 2 for n, m in zip(condition.shape[-2:], size, strict=True))
                condition = middle(condition, crop // s)
                target = target[:, s * top : s * (top + size[0]), s * left : s * (left + size[1])]
            yield Held(chosen.file(i).stem, target[None], condition[None])

    def asked(self, name: str) -> Iterator[Strange]:
        r"""Yields the conditions of a set without a truth, or their middles.

        Arguments:
            name: The name of the set.
        """
        crop = self.options.outside_crop or self.options.crop
        for strange in self.conditions(name):
            y = strange.condition
            yield (
                strange
                if crop is None
                else strange._replace(condition=middle(y, crop // self.scale))
            )

    def files(self, name: str) -> PictureFiles:
        r"""Returns some pictures of a folder of the data.

        Arguments:
            name: The name of the folder.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If there is no picture in it.
        """
        found = survey(find(self.folder / name))
        if not found.files:
            raise ValueError(f"there must be a picture in {self.folder / name}; got none")
        numbers = some(range(len(found.files)), self.most)
        return PictureFiles(
            [found.files[i] for i in numbers], [found.headers[i] for i in numbers], budget=0
        )

    def corrupted(self, name: str) -> Iterator[Strange]:
        r"""Yields the conditions of a set with a truth, spoilt in several ways at three strengths.

        Arguments:
            name: The name of the set.
        """
        for held in self.pictures(name):
            y = raw_condition(held.condition)
            for corruption in data.corruptions(self.options.seed):
                for strength in three(corruption.strengths):
                    kind = f"{corruption.name} {strength:g}"
                    yield Strange(held.picture, kind, corruption(y, strength))


def some(numbers: Sequence[int], most: int | None) -> Sequence[int]:
    r"""Returns at most so many numbers, taken evenly.

    Arguments:
        numbers: The numbers.
        most: How many; :py:`None` for all.

    Example:
        >>> list(some(range(10), 3))
        [0, 3, 6]
    """
    if most is None or most >= len(numbers):
        return numbers
    return [numbers[i * len(numbers) // most] for i in range(most)]


def three(strengths: Sequence[float]) -> tuple[float, ...]:
    r"""Returns three strengths: where there are two, their geometric mean is between them.

    Arguments:
        strengths: The strengths of a corruption, two or three.

    Example:
        >>> three((1.0, 3.0))
        (1.0, 1.7, 3.0)
    """
    if len(strengths) != 2:
        return tuple(strengths)
    weak, strong = strengths
    return weak, float(f"{(weak * strong) ** 0.5:.2g}"), strong


def _tile(model: Any, y: Tensor) -> Any:
    rows, columns = y.shape[-2:]
    return "auto" if rows * columns * model.scale**2 > LARGE else None


def sample(model: Any, y: Given, count: int, temperature: float, generator: Any) -> Tensor:
    r"""Returns samples, without a word of the guard: what is strange here is meant, and told in the
    tables.

    Arguments:
        model: The model, in evaluation mode.
        y: The condition, or what :func:`shared` made of it.
        count: How many.
        temperature: Their temperature.
        generator: A source of randomness, or :py:`None`.
    """
    tile = None if isinstance(y, ImageCondition) else _tile(model, y)
    with _silent():
        made: Tensor = model.sample(y, count, temperature, generator, tile=tile)
    return made


def shared(model: Any, y: Tensor) -> Given:
    r"""Returns what all that is asked about a condition can share; of a large one, which takes tiles,
    the condition itself.

    Arguments:
        model: The model, in evaluation mode.
        y: The condition.
    """
    if _tile(model, y) is not None:
        return y
    with torch.no_grad(), _silent():
        made: ImageCondition = model.condition(y)
    return made


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def guard_of(model: Any) -> OODReport | None:
    r"""Returns what the guard said of the last condition, if there is a calibrated one.

    Arguments:
        model: The model.
    """
    report: OODReport | None = model.conditioner.report
    return report


def model_row(model: Any) -> Row:
    r"""Returns what is true of a model whatever it is asked.

    Arguments:
        model: The model, in evaluation mode.

    Returns:
        The number of its ``parameters``, and the ``certificate``: what no sample (or residual)
        exceeds for any condition and noise up to 4; infinite if there is no such bound.
    """
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, "certificate": certify(model).bound(NOISE)}


def held_row(study: Study, model: Any, held: Held) -> Row:
    r"""Returns what is measured of a model on a picture with a truth.

    Arguments:
        study: What is asked.
        model: The model, in evaluation mode.
        held: The picture.

    Returns:
        The measures of the sample at temperature 0, those of one at 0.8 as ``sample_…``,
        ``bits_per_dim``, ``diversity``, the processor ``seconds`` that the latter took, and the
        ``score`` of the guard, if there is one.
    """
    o, (_, x, y) = study.options, held
    generator = torch.Generator(device=y.device).manual_seed(o.seed)
    start = time.process_time()
    given = shared(model, y)
    first = sample(model, given, 1, TEMPERATURE, generator)
    seconds = time.process_time() - start
    report = guard_of(model)
    mean = sample(model, given, 1, 0.0, None)[0]
    row: Row = dict(study.quality(mean, held))
    row |= {f"sample_{name}": value for name, value in study.quality(first[0], held).items()}
    with _silent():
        row |= {"bits_per_dim": bits_of(model, x, given, o.seed, draws=1), "seconds": seconds}
    if o.samples > 1:
        more = sample(model, given, o.samples - 1, TEMPERATURE, generator)
        row["diversity"] = float(metrics.diversity(torch.cat((first, more)), x))
    if report is not None:
        row["score"] = float(strangeness(report)[0])
    return row


def strange_row(study: Study, model: Any, strange: Strange) -> Row:
    r"""Returns what a model does with a condition without a truth, at temperature 0.8.

    Arguments:
        study: What is asked.
        model: The model, in evaluation mode.
        strange: The condition.

    Returns:
        The numbers of ``pixels``, ``artefacts`` (more than 0.5 outside the range of [0, 1] and the
        condition, or not finite) and ``non_finite`` pixels, the ``largest`` value, the ``score``
        of the guard, and how many pixels of which score are artefacts or not: ``counts``.
    """
    # What is padded would be scored too, and shift the map against the picture.
    y = data.crop_to_multiple(strange.condition, model.multiple)
    generator = torch.Generator(device=y.device).manual_seed(study.options.seed)
    x = sample(model, y, 1, TEMPERATURE, generator)[0]
    report = guard_of(model)
    mask = artefact_mask(x, y)
    row: Row = {
        "pixels": mask.numel(),
        "artefacts": int(mask.sum()),
        "non_finite": int((~torch.isfinite(x)).any(1).sum()),
    }
    row["largest"] = Sampled(x, mask, report).largest
    if report is None:
        return row
    return row | {"score": float(strangeness(report)[0]), "counts": _counted(report, mask)}


def _counted(report: OODReport, mask: Tensor) -> str:
    r"""For each bin of scores that occurs its number, the pixels that are artefacts, the others; as
    a text, for there are many."""
    maps = level_maps(report, (mask.shape[-2], mask.shape[-1]))
    scores = list(maps.values())[-1]  # of all levels together, if there are several
    bins = torch.bucketize(scores.double(), EDGES)
    wrong, right = (torch.bincount(bins[m], minlength=BINS) for m in (mask, ~mask))
    there = (wrong + right).nonzero().flatten()
    counts = torch.stack((there, wrong[there], right[there]), 1).tolist()
    return " ".join(":".join(map(str, part)) for part in counts)


def _histograms(counts: Sequence[str]) -> tuple[Tensor, Tensor]:
    r"""Of each bin of scores how many pixels are artefacts, and how many are not."""
    wrong, right = torch.zeros(2, BINS, dtype=torch.int64)
    for picture in counts:
        for number, first, second in (map(int, part.split(":")) for part in picture.split()):
            wrong[number] += first
            right[number] += second
    return wrong, right


def artefact_auroc(counts: Sequence[str]) -> float | None:
    r"""Returns how well the guard's score of a pixel tells whether it is an artefact; :py:`None`
    where all are, or none is.

    Arguments:
        counts: What :func:`strange_row` counted, of each condition.

    Raises:
        ImportError: If scikit-learn is not installed.

    Example:
        >>> artefact_auroc(["3:0:10", "7:5:0"])
        1.0
    """
    from sklearn.metrics import roc_auc_score

    wrong, right = _histograms(counts)
    if not (wrong.any() and right.any()):
        return None
    labels = torch.arange(2).repeat_interleave(BINS)
    scores, weights = torch.arange(BINS).repeat(2), torch.cat((right, wrong))
    return float(roc_auc_score(labels, scores, sample_weight=weights))


def artefact_spearman(counts: Sequence[str]) -> float | None:
    r"""Returns how the share of artefacts rises with the score: the rank correlation of share and
    decile of the pixels, sorted by score; :py:`None` where all deciles have the same share.

    Arguments:
        counts: What :func:`strange_row` counted, of each condition.

    Raises:
        ImportError: If scipy is not installed.

    Example:
        >>> round(artefact_spearman([f"{n}:{n}:{20 - n}" for n in range(10)]), 3)
        1.0
    """
    wrong, right = _histograms(counts)
    pixels = wrong + right
    if not wrong.any():
        return None
    # Pixels of one bin cannot be sorted: each counts as the share of the bin.
    shares = (wrong / pixels.clamp_min(1)).repeat_interleave(pixels)
    rho = decile_curve(torch.arange(BINS).repeat_interleave(pixels), shares).spearman
    return None if math.isnan(rho) else rho
