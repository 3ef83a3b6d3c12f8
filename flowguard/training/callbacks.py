r"""What happens around the steps of a training: averages, checkpoints, logs, models on disk."""

__all__ = [
    "AtomicCheckpoints",
    "Averaging",
    "Checkpoints",
    "Interrupted",
    "Progress",
    "Signals",
    "StepLog",
    "Validation",
    "average_decay",
]

import csv
import io
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from torch import Tensor
from tqdm.auto import tqdm

from flowguard.io.atomic import atomic, write_text
from flowguard.models.base import ImageModel

LAST = "last.ckpt"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    r"""Raised when a training ends as it was asked to.

    Arguments:
        number: The signal that asked.
        saved: Whether all that was done is saved.
    """

    def __init__(self, number: int, saved: bool = True) -> None:
        super().__init__(f"interrupted by signal {number}")
        self.number, self.saved = number, saved


def at_step(trainer: pl.Trainer) -> bool:
    r"""Whether the batch that just ended was the last one of a step.

    Arguments:
        trainer: The trainer.
    """
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready % trainer.accumulate_grad_batches == 0


def validates_after(trainer: pl.Trainer) -> bool:
    r"""Whether there is a validation after the step that just ended.

    Arguments:
        trainer: The trainer.
    """
    every = trainer.val_check_batch
    if not trainer.enable_validation or not isinstance(every, int):
        return False
    return trainer.global_step * trainer.accumulate_grad_batches % every == 0


def average_decay(decay: float, count: int) -> float:
    r"""Returns the share that an average keeps of itself: less while it knows little.

    Arguments:
        decay: The share in the long run.
        count: The number of steps that it knows.

    Example:
        >>> average_decay(0.999, 0), average_decay(0.999, 10**6)
        (0.1, 0.999)
    """
    return min(decay, (1 + count) / (10 + count))


class Averaging(WeightAveraging):
    r"""Keeps an exponential moving average of the weights, by which the model is judged and saved.

    Arguments:
        decay: The share of itself that the average keeps in a step, in the long run.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=self._move)
        self.decay = decay
        self.skipped_step = -1

    @torch.no_grad()
    def _move(
        self, averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int
    ) -> None:
        share = 1 - average_decay(self.decay, int(count))
        torch._foreach_lerp_(list(averages), list(weights), share)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        r"""Whether the step moved the weights."""
        return step_idx is not None and step_idx != self.skipped_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        r"""Moves the average after a step that moved the weights."""
        told = pl_module.told
        if told is not None and told.skipped:
            self.skipped_step = told.step - 1
        super().on_train_batch_end(trainer, pl_module, *rest)

    def put(self, pl_module: Any) -> None:
        r"""Puts the averages in the place of the weights.

        Arguments:
            pl_module: The training.
        """
        if self._average_model is not None:
            self._copy_average_to_current(pl_module)


class AtomicCheckpoints(TorchCheckpointIO):
    r"""Writes checkpoints whole or not at all: into a file beside, which then takes the place."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        r"""Writes a checkpoint.

        Arguments:
            checkpoint: What it holds.
            path: The file.
            storage_options: Not taken.
        """
        # Not straight into the file: torch does not say that a disk is full.
        held = io.BytesIO()
        torch.save(checkpoint, held)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary, temporary.open("wb") as file:
            file.write(held.getbuffer())
            file.flush()
            os.fsync(file.fileno())


class Signals(Callback):
    r"""Listens to the signals that end a run, Ctrl-C and SIGTERM.

    It must come first in the list of callbacks: one that comes later may begin with a validation.

    Attributes:
        heard: The signal that was heard, or 0.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Listens. Not before, as Lightning brings back in the end what listened when it began."""
        pl_module.ask = lambda: self.heard != 0
        if threading.current_thread() is threading.main_thread():  # which alone gets signals
            self._before = {s: signal.signal(s, self._hear) for s in SIGNALS}

    def _hear(self, number: int, _: Any) -> None:
        if self.heard:  # whoever asks twice does not want to wait
            self._deaf()
            raise Interrupted(number, saved=False)
        self.heard = number

    def _deaf(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        r"""Listens no longer: nothing is torn down after an exception."""
        self._deaf()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        r"""Listens no longer."""
        self._deaf()


class Checkpoints(ModelCheckpoint):
    r"""Saves a run by time, at its end, and when it is asked to end by Ctrl-C or SIGTERM.

    Only whole steps are saved. Of several processes, all end when one is asked to.

    Arguments:
        folder: The folder of the checkpoint.
        minutes: The minutes between two checkpoints.
        signals: What listens to those that end the run.
    """

    def __init__(self, folder: Path, minutes: float, signals: Signals) -> None:
        super().__init__(
            dirpath=folder,
            filename=Path(LAST).stem,
            train_time_interval=timedelta(minutes=minutes),
            save_top_k=1,
            monitor=None,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.file, self.signals = Path(folder) / LAST, signals

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        r"""Saves what is due after a step: what validation may keep from being saved, too."""
        if not at_step(trainer):
            return
        step = trainer.global_step
        if pl_module.asked or step >= trainer.max_steps or validates_after(trainer):
            trainer.save_checkpoint(self.file)
        else:
            super().on_train_batch_end(trainer, pl_module, *rest)
        if pl_module.asked:
            raise Interrupted(self.signals.heard or signal.SIGTERM)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        r"""Ends a run that is asked to while it validates: it was saved before that."""
        if self.signals.heard and trainer.world_size == 1:
            raise Interrupted(self.signals.heard)


class MetricsTable:
    r"""Creates a table in a file of comma-separated values, whose first column is the step.

    Arguments:
        file: The file.
        columns: The names of the columns.
    """

    def __init__(self, file: Path, columns: Sequence[str]) -> None:
        self.file, self.columns = file, tuple(columns)

    def rows(self) -> list[dict[str, str]]:
        r"""Returns the rows that are in the file, but for one that was not written to its end."""
        if not self.file.exists():
            return []
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        return list(csv.DictReader(whole))

    def begin(self, step: int) -> None:
        r"""Makes the file, or drops what it tells of steps that will be made once more.

        Arguments:
            step: The steps that are done.
        """
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(
            text, self.columns, lineterminator="\n", restval="", extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(kept)
        write_text(self.file, text.getvalue())

    def add(self, row: Mapping[str, Any]) -> None:
        r"""Adds a row.

        Arguments:
            row: Its values, by column.
        """
        line = ",".join(str(row.get(column, "")) for column in self.columns)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class StepLog(Callback):
    r"""Writes a row for each step: loss, learning rate, norm of the gradient, seconds, and how
    many steps were not finite so far.

    Arguments:
        file: The file; if :py:`None`, the rows are only kept in `losses`.
    """

    COLUMNS = ("step", "loss", "lr", "norm", "seconds", "skipped")

    def __init__(self, file: Path | None) -> None:
        self.table = None if file is None else MetricsTable(file, self.COLUMNS)
        self.losses: list[float] = []
        self.seconds = 0.0  # of the whole run, but for validation and what was made twice
        self._since = 0.0
        self._step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Makes the file fit the step that the run begins with."""
        self._step = trainer.global_step
        self._since = time.perf_counter()
        if self.table is not None and trainer.is_global_zero:
            self.table.begin(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        r"""Writes the row of a step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        told = pl_module.told
        if self.table is None:
            self.losses.append(told.loss)
        elif trainer.is_global_zero:
            row = told._asdict() | {
                "seconds": f"{self.seconds:.3f}",
                "skipped": pl_module.skipped,
            }
            self.table.add(row)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Leaves validation out of the seconds."""
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        r"""Returns the seconds."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        r"""Takes up the seconds."""
        self.seconds = state_dict["seconds"]


class Progress(Callback):
    r"""Shows a bar with the loss in bits per dimension, and the time left.

    Arguments:
        name: What it is called.
    """

    def __init__(self, name: str = "training") -> None:
        self.name = name
        self.bar: Any = None
        self.recent: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Shows the bar."""
        if trainer.is_global_zero:
            done, total = trainer.global_step, trainer.max_steps
            self.bar = tqdm(desc=self.name, unit="step", total=total, initial=done)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        r"""Moves the bar after a step."""
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        self.recent = [*self.recent[-19:], pl_module.told.loss]
        mean = sum(self.recent) / len(self.recent)
        self.bar.set_postfix_str(f"{mean:.3f} bits/dim", refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        r"""Ends the line of the bar, before the exception is told of."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        r"""Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Validation(Callback):
    r"""Gathers what is measured of each validation picture, keeps the best model, and writes a row.

    It must come before :class:`Averaging` in the list of callbacks, to find the averaged weights.
    The row is written when all callbacks are done: a validation without one is made once more by
    a run that goes on. The best is that of the rows, as a checkpoint may be older than it.

    Arguments:
        file: The file of the rows.
        save: Called with the model whenever it is the best so far, on every process.
        monitor: The measure that is to become small.
    """

    def __init__(
        self, file: Path, save: Callable[[ImageModel], None], monitor: str = "bits_per_dim"
    ) -> None:
        self.file, self.save, self.monitor = file, save, monitor
        self.last: dict[str, float] = {}
        self.done = 0  # the step of the last row
        self._found: list[dict[str, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Makes the file fit the step that the run begins with, and makes up for a validation
        that was interrupted."""
        step = trainer.global_step
        if trainer.is_global_zero and self.file.exists():
            columns = self.file.read_text(encoding="utf-8").partition("\n")[0].split(",")
            table = MetricsTable(self.file, columns)
            table.begin(step)
            self.done = max((int(row["step"]) for row in table.rows()), default=0)
        if trainer.world_size > 1:
            self.done = trainer.strategy.broadcast(self.done)
        if 0 < step != self.done and validates_after(trainer):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Begins anew."""
        self._found = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any
    ) -> None:
        r"""Takes what was measured of a picture."""
        self._found.append(dict(outputs))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Takes the means over all pictures, and saves the model if it is the best."""
        found = self._found
        if trainer.world_size > 1:
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, found)
            # The pictures were dealt out by turns; whoever had none measured one once more.
            longest = max(map(len, everyone))
            found = [part[i] for i in range(longest) for part in everyone if i < len(part)]
            found = found[: len(trainer.datamodule.held_out)]  # type: ignore[attr-defined]
        if not found:
            return
        means = {name: sum(f[name] for f in found) / len(found) for name in found[0]}
        self.last = {"step": trainer.global_step, **means}
        better = trainer.is_global_zero and means[self.monitor] < self._best(trainer.global_step)
        if trainer.world_size > 1:  # all save together, and one of them has the rows
            better = trainer.strategy.broadcast(better)
        if better:
            self.save(pl_module.model)

    def _best(self, step: int) -> float:
        r"""The best measure of the validations before a step."""
        rows = MetricsTable(self.file, (self.monitor,)).rows()
        found = [float(row[self.monitor]) for row in rows if int(row["step"]) < step]
        return min((measure for measure in found if math.isfinite(measure)), default=math.inf)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        r"""Writes the row."""
        if trainer.is_global_zero and self._found:
            table = MetricsTable(self.file, tuple(self.last))
            table.begin(trainer.global_step - 1)
            table.add(self.last)
