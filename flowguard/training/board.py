r"""What a training shows: pictures at each validation, and TensorBoard."""

__all__ = ["Board", "Gallery", "side_by_side"]

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import Dataset

from flowguard.io.pictures import Picture, shown, write
from flowguard.training.outside import Outside, middle, raw_condition
from flowguard.training.validation import TEMPERATURE

#: The rows and columns of a target that are shown, at most.
SHOWN = 256
#: The steps between two points of the curves of training.
EVERY = 10


def side_by_side(images: list[Tensor]) -> Tensor:
    r"""Returns images of one size beside each other, as they can be shown.

    Arguments:
        images: The images, with shape :math:`(3, H, W)`.

    Example:
        >>> side_by_side([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]).shape
        torch.Size([3, 4, 8])
    """
    return torch.cat([shown(image.float().cpu()) for image in images], -1)


class Gallery(Callback):
    r"""Writes pictures at each validation: of the middle of a held-out picture, the condition,
    samples at temperature 0 and 0.8, and the truth; and a sample of a condition that is strange.

    It must come before :class:`flowguard.training.callbacks.Averaging` in the list of callbacks,
    and after :class:`flowguard.training.outside.Outside`.

    Arguments:
        folder: The folder of the pictures.
        held_out: Pairs of a target and its condition that are not trained with.
        seed: The seed of the sample.

    Attributes:
        last: The last pictures, by name.
    """

    def __init__(self, folder: Path, held_out: Dataset[Any], seed: int = 0) -> None:
        self.folder, self.held_out, self.seed = folder, held_out, seed
        self.last: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Makes the pictures, and writes them."""
        if not trainer.is_global_zero:
            return
        model, device = pl_module.model, pl_module.device
        weight = next(model.parameters())
        x, y = self.held_out[0]
        y = middle(raw_condition(y), SHOWN // model.scale)[None].to(weight)
        x = middle(x, SHOWN // model.scale * model.scale)
        generator = torch.Generator(device=device).manual_seed(self.seed)
        with torch.autocast(device.type, enabled=False):
            images = [model.sample(y, 1, 0.0)[0, 0]]
            images.append(model.sample(y, 1, TEMPERATURE, generator)[0, 0])
        given = F.interpolate(y, images[0].shape[-2:], mode="nearest-exact")[0]
        self.last = {"held-out": side_by_side([given, *images, x])}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Outside) and callback.shown is not None:
                self.last["strange"] = side_by_side([callback.shown])
        self.folder.mkdir(exist_ok=True)
        for name, image in self.last.items():
            write(self.folder / f"{name}.png", Picture(image))


class Board(Callback):
    r"""Tells TensorBoard what the tables and the gallery tell, if it is installed.

    It must come after the callbacks that measure at validations.

    Arguments:
        folder: The folder of its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None
        self._installed = True
        self._step = -1

    def _open(self, step: int) -> None:
        if self.writer is None and self._installed:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._installed = False
            else:
                self.writer = SummaryWriter(self.folder, purge_step=step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Opens the file: what an earlier one tells of steps that are made once more is hidden."""
        if trainer.is_global_zero:
            self._open(trainer.global_step + 1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        r"""Tells of a step in ten."""
        step = trainer.global_step
        told = pl_module.told
        # Before the first step is whole, as some batches may make it, there is nothing to tell.
        if self.writer is None or told is None or step == self._step or step % EVERY:
            return
        self._step = step
        for name in ("loss", "lr", "norm"):
            self.writer.add_scalar(f"train/{name}", getattr(told, name), step)
        self.writer.add_scalar("train/skipped", pl_module.skipped, step)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Tells what was measured, and shows the pictures."""
        step = trainer.global_step
        if trainer.is_global_zero:
            self._open(step)
        if self.writer is None:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            group = type(callback).__name__.lower()
            for name, value in getattr(callback, "last", {}).items():
                if isinstance(value, Tensor):
                    self.writer.add_image(f"{group}/{name}", value, step)
                elif name != "step":
                    self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        r"""Closes the file."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
