r"""What a task of the demo is."""

__all__ = [
    "AS_IS",
    "BATCH",
    "CALIBRATION_BATCH",
    "CALIBRATION_CROPS",
    "CROP",
    "ELSEWHERE",
    "NOISE",
    "QUANTILE",
    "Model",
    "Parts",
    "Question",
    "Task",
    "other_worlds",
]

import abc
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowguard import data
from flowguard.bounds import attack
from flowguard.image.maps import Elementwise
from flowguard.io.folder import PictureFiles
from flowguard.io.pictures import ImageError
from flowguard.models import LowLightFlow, SuperResolutionFlow
from flowguard.training.encoders import encoder_for
from flowguard.training.pictures import CropBatches, Pairs
from flowguard.training.validation import Wholes

CROP = 32  #: rows and columns of a target in training
#: The pairs of a batch in training.
BATCH = 16
#: The conditions that a guard is calibrated on.
CALIBRATION_CROPS = 400
#: The conditions of a batch in calibration.
CALIBRATION_BATCH = 8
NOISE = 4.0  #: the largest noise that certificate and attack allow
QUANTILE = 0.99  #: the calibrated quantile that flags a condition, at each level

#: What the condition is that is not spoilt.
AS_IS = "the held-out photograph as it is"
#: What pictures are that are no such photographs.
ELSEWHERE = "from another world than that of the photographs"

FITTED = 64  # pictures in files that the conditioner is fitted to, at most

#: The models that a task can train.
Model = SuperResolutionFlow | LowLightFlow
#: The parts of photographs to learn from: tensors of shape (3, H, W), or those in files.
Parts = Sequence[Tensor] | PictureFiles


@dataclass(frozen=True)
class Question:
    r"""A condition that the models are asked to restore, under the name that reports give it."""

    name: str
    image: Tensor
    strongest: bool = True  # whether its corruption, if any, is at its highest strength
    meaning: str = ""  # what it is, where its name does not say so


class Task(abc.ABC):
    r"""A task of the demo: its data, its models, and what is measured and said of them."""

    name: str  # what commands call it
    title: str  # what the models do
    condition: str  # what a condition is called
    bounded: str  # what certificate and attack are about
    baseline: str  # the name of the restoration without a model
    headline: str  # the condition of the report's first picture
    temperature: float
    calibration_crop: int  # rows and columns of a target in calibration
    steps: int  # of training, such that the demo takes less than five minutes on two cores
    columns: dict[str, tuple[str, str]]  # for each measure its heading and its format
    encoder: str | None = None  # the model in the package whose encoder the flows are built on

    def build(
        self, coupling: str | Elementwise, quick: bool = False, weights: Path | None = None
    ) -> Model:
        r"""Returns the untrained model, into which its weights load.

        Arguments:
            coupling: The name of the coupling, or its map.
            quick: Whether the model is that of ``--quick``.
            weights: Where the encoder gets its weights from, which then stay as they are; see
                :func:`flowguard.training.encoders.encoder_for`. If :py:`None`, it is a small one
                that is trained with the flow.

        Raises:
            ValueError: If the weights are of another encoder than the task takes.
            OSError: If the weights cannot be read.
        """
        encoder = None if weights is None else encoder_for(self.name, weights=weights)
        model = self.model(coupling, quick, encoder)
        if encoder is not None:
            model.freeze_encoder()
        model.conditioner.alpha = (1 - QUANTILE) * model.flow.levels  # shared among the levels
        model.conditioner.boundary = QUANTILE
        model.conditioner.policy = "report"  # tables and figures tell what is flagged
        return model

    @abc.abstractmethod
    def model(
        self, coupling: str | Elementwise, quick: bool, encoder: nn.Module | None = None
    ) -> Model:
        r"""Returns the untrained model.

        Arguments:
            coupling: The name of the coupling, or its map.
            quick: Whether it is for ``--quick``.
            encoder: Its encoder; if :py:`None`, a small one.
        """

    @abc.abstractmethod
    def pairs(self, files: PictureFiles) -> Pairs:
        r"""Returns the pairs of targets and conditions that are made of pictures in files.

        Arguments:
            files: The pictures.
        """

    def crops(self, parts: Parts, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        r"""Returns an endless stream of batches of targets and conditions to train with.

        Arguments:
            parts: The parts of photographs to take them from.
            seed: The seed.
        """
        if isinstance(parts, PictureFiles):
            return self._stream(parts, CROP, BATCH, seed)
        return self.crops_of(parts, seed, CROP, BATCH)

    def contexts(self, parts: Parts, seed: int) -> Iterable[Tensor]:
        r"""Returns the conditions that the conditioner is fitted to, with a batch of one each. Of
        pictures in files they are taken evenly.

        Arguments:
            parts: The parts of photographs to take them from.
            seed: The seed.
        """
        if not isinstance(parts, PictureFiles):
            return self.contexts_of(parts, seed)
        return self._wholes(parts, seed)

    def _wholes(self, files: PictureFiles, seed: int) -> Iterator[Tensor]:
        wholes = Wholes(self.pairs(files), seed)
        count = min(len(wholes), FITTED)
        for i in range(count):
            with contextlib.suppress(ImageError):  # corrupt: it was not trained with either
                yield wholes[i * len(wholes) // count][1][None]

    def calibration(self, parts: Parts, seed: int, count: int) -> Iterator[Tensor]:
        r"""Yields batches of conditions that the conditioner is calibrated with.

        Arguments:
            parts: The parts of photographs to take them from.
            seed: The seed.
            count: The number of crops.
        """
        size, batch = self.calibration_crop, CALIBRATION_BATCH
        stream: Iterable[tuple[Tensor, Tensor]]
        if isinstance(parts, PictureFiles):
            stream = self._stream(parts, size, batch, seed)
        else:
            stream = self.crops_of(parts, seed, size, batch)
        for _, condition in itertools.islice(stream, count // batch):
            yield condition

    def _stream(
        self, files: PictureFiles, size: int, batch: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        batches = CropBatches(self.pairs(files), size=size, batch=batch, seed=seed)
        return (batches[number] for number in itertools.count())

    @abc.abstractmethod
    def crops_of(
        self, parts: Sequence[Tensor], seed: int, size: int, batch: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        r"""Returns an endless stream of batches of crops of photographs and their conditions.

        Arguments:
            parts: The parts of photographs, with shape :math:`(3, H, W)` each.
            seed: The seed.
            size: The rows and columns of a target's crop.
            batch: The number of crops in a batch.
        """

    @abc.abstractmethod
    def contexts_of(self, parts: Sequence[Tensor], seed: int) -> list[Tensor]:
        r"""Returns the conditions of photographs as wholes, with a batch of one each.

        Arguments:
            parts: The parts of photographs, with shape :math:`(3, H, W)` each.
            seed: The seed.
        """

    @abc.abstractmethod
    def held_out(self, seed: int) -> tuple[Tensor, Tensor]:
        r"""Returns target and condition of the held-out photograph.

        Arguments:
            seed: The seed of the noise, if there is any.
        """

    @abc.abstractmethod
    def conditions(self, held_out: Tensor, seed: int, quick: bool) -> Iterator[Question]:
        r"""Yields the held-out condition, other worlds, and corruptions of the held-out one.

        Arguments:
            held_out: The held-out condition, with shape :math:`(1, 3, H, W)`.
            seed: The seed of the noise.
            quick: Whether to use fewer and smaller ones.
        """

    @abc.abstractmethod
    def restored(self, condition: Tensor) -> Tensor:
        r"""Returns the restoration without a model.

        Arguments:
            condition: The condition, with shape :math:`(1, 3, H, W)`.
        """

    @abc.abstractmethod
    def measures(self, image: Tensor, target: Tensor) -> dict[str, float]:
        r"""Returns the quality of an image with shape :math:`(1, 3, H, W)`.

        Arguments:
            image: The image, before any clamping.
            target: The truth, with the same shape.
        """

    @abc.abstractmethod
    def sampler(self, model: Any, condition: Tensor) -> tuple[Any, Tensor]:
        r"""Returns what an attack is to enlarge, a function of latents and condition, and the part
        of the condition that it may change.

        Arguments:
            model: The model.
            condition: The condition, with shape :math:`(1, 3, H, W)`.
        """

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


def other_worlds(quick: bool) -> Iterator[tuple[str, Tensor]]:
    r"""Yields names and middles of pictures from other worlds, with shape :math:`(3, H, W)`.

    Arguments:
        quick: Whether the middles are small.
    """
    size = 128 if quick else 384
    for name, file in data.OTHER_WORLDS.items():
        image = data.photograph(file)
        top, left = (max(0, (n - size) // 2) for n in image.shape[-2:])
        yield name, image[:, top : top + size, left : left + size]
