r"""A run of training, and the folder that it leaves."""

__all__ = [
    "Batches",
    "Loading",
    "Run",
    "WrongMachine",
    "fit",
    "interruptible",
    "quiet",
    "steps_done",
]

import itertools
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flowguard.io.atomic import sweep
from flowguard.models import store
from flowguard.training import guard
from flowguard.training.callbacks import (
    LAST,
    AtomicCheckpoints,
    Averaging,
    Checkpoints,
    Progress,
    Signals,
    StepLog,
    Validation,
)
from flowguard.training.module import FlowModule

MODEL_FILES = ("config.json", "model.safetensors", "README.md")
#: The files that a run writes.
WRITTEN = (
    *("config.yaml", "metrics.csv", "validation.csv", "outside.csv", "report.html"),
    *("encoder.safetensors", f"checkpoints/{LAST}"),
    *("pictures/held-out.png", "pictures/strange.png"),
    *(f"{model}/{name}" for model in ("start", "best", "model") for name in MODEL_FILES),
)


class Batches(Protocol):
    r"""Batches by their number: the same number gives the same batch, always."""

    rows: Sequence[int]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        r"""Returns a batch: its rows `rows`, of targets and conditions."""


@dataclass(frozen=True)
class Run:
    r"""The folder of a run.

    Arguments:
        folder: The folder. It holds ``config.yaml``, the options; ``metrics.csv``, a row for each
            step; ``validation.csv``, a row for each validation; ``checkpoints``, from which the
            run can go on, and ``encoder.safetensors`` or ``start``, if the encoder or the model
            was read from elsewhere; ``best`` and ``model``, the model at the best validation and in
            the end, which other commands take.
    """

    folder: Path

    @property
    def config(self) -> Path:
        r"""The options."""
        return self.folder / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        r"""The checkpoint."""
        return self.folder / "checkpoints" / LAST

    @property
    def encoder(self) -> Path:
        r"""The encoder as the run began with it, if it was read from elsewhere."""
        return self.folder / "encoder.safetensors"

    @property
    def start(self) -> Path:
        r"""The model that the run began with, without its guard, if it was read from elsewhere."""
        return self.folder / "start"

    @property
    def began(self) -> bool:
        r"""Whether that model is there, and whole."""
        return (self.start / store.CONFIG).exists()  # which is written last

    @property
    def best(self) -> Path:
        r"""The model at the best validation."""
        return self.folder / "best"

    @property
    def model(self) -> Path:
        r"""The model in the end."""
        return self.folder / "model"

    def sweep(self) -> None:
        r"""Removes what was half written when the run was killed. Nobody else may be at it."""
        sweep((self.folder / name for name in WRITTEN), age=0.0)


class Numbers(Sampler[int]):
    r"""Creates all numbers from one on, whenever they are asked for.

    Arguments:
        first: The first of them.
    """

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


class Loading(pl.LightningDataModule):
    r"""Creates what feeds a run.

    Arguments:
        batches: The batches, by number.
        held_out: Pairs to validate with.
        workers: How many processes make batches; if 0, this one does.
    """

    def __init__(
        self, batches: Batches, held_out: Dataset[Any] | None = None, workers: int = 0
    ) -> None:
        super().__init__()
        self.batches, self.held_out, self.workers = batches, held_out, workers
        self.rows = batches.rows

    def train_dataloader(self) -> Any:
        r"""Returns the batches from the step on that is next, without an end.

        Raises:
            ValueError: If the rows of a batch cannot be shared out among the processes.
        """
        trainer = self.trainer
        assert trainer is not None
        rank, world = trainer.global_rank, trainer.world_size
        if len(self.rows) % world:
            raise ValueError(
                f"the batch must be a multiple of the {world} processes; got {len(self.rows)}"
            )
        share = len(self.rows) // world
        self.batches.rows = self.rows[rank * share : (rank + 1) * share]
        first = trainer.global_step * trainer.accumulate_grad_batches
        return DataLoader(
            self.batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=Numbers(first),
            num_workers=self.workers,
            worker_init_fn=patient,
        )

    def state_dict(self) -> dict[str, Any]:
        r"""Returns what tells the pictures from others, if the batches tell it."""
        fingerprint = getattr(self.batches, "fingerprint", None)
        return {} if fingerprint is None else {"pictures": fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        r"""Warns if the pictures are others than those that the run began with."""
        held = state_dict.get("pictures")
        if held is not None and held != self.state_dict().get("pictures"):
            warnings.warn(
                "the pictures are not those that the run was at before: from here on its steps are"
                " others than they would have been",
                stacklevel=2,
            )

    def val_dataloader(self) -> Any:
        r"""Returns the validation pairs, one by one: the share of this process."""
        trainer = self.trainer
        assert trainer is not None
        if self.held_out is None:
            return []
        every = range(len(self.held_out))  # type: ignore[arg-type]
        # None may be without a picture: all must meet where the measures are gathered.
        numbers = every[trainer.global_rank :: trainer.world_size] or every[:1]
        return DataLoader(self.held_out, batch_size=1, sampler=numbers)


def steps_done(run: Run) -> int:
    r"""Returns the steps that the checkpoint of a run has behind it; 0 if there is none.

    Arguments:
        run: The folder.

    Raises:
        ValueError: If the checkpoint cannot be read.
    """
    if not run.checkpoint.exists():
        return 0
    try:
        held = torch.load(run.checkpoint, map_location="cpu", mmap=True, weights_only=True)
        return int(held["global_step"])
    except OSError:
        raise
    except Exception as error:  # torch and pickle each have errors of their own
        raise ValueError(
            f"{run.checkpoint} must be a checkpoint, and cannot be read: put a copy of it there, or"
            " remove it to begin the run anew"
        ) from error


def patient(_: int) -> None:
    r"""Lets a worker go on after Ctrl-C: the run that it works for ends it.

    Arguments:
        _: The number of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class WrongMachine(ValueError):
    r"""Raised when Lightning cannot do with a machine what it is asked for."""


def made(**options: Any) -> pl.Trainer:
    r"""Returns a trainer.

    Arguments:
        options: Those of :class:`lightning.pytorch.Trainer`.

    Raises:
        WrongMachine: If it refuses them.
    """
    try:
        return pl.Trainer(**options)
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise WrongMachine(" ".join(str(error).split())) from error


def fit(
    module: FlowModule,
    loading: Loading,
    run: Run,
    conditions: guard.Conditions,
    *,
    validate_every: int = 1000,
    minutes: float = 10.0,
    decay: float = 0.999,
    accumulate: int = 1,
    precision: Any = "32-true",
    devices: Any = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    accelerator: str = "cpu",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    begin: Callable[[], None] | None = None,
) -> dict[str, float]:
    r"""Trains a model, or goes on with it where the folder of the run has a checkpoint.

    Arguments:
        module: The training.
        loading: What feeds it.
        run: The folder.
        conditions: What the guard learns from.
        validate_every: The steps between two validations.
        minutes: The minutes between two checkpoints.
        decay: See :class:`Averaging`.
        accumulate: How many batches make a step.
        precision: As Lightning's, as all that follow.
        devices: How many devices, on each machine.
        num_nodes: How many machines.
        strategy: How several work together.
        accelerator: What kind of devices.
        progress: Whether to show a bar.
        callbacks: Further callbacks.
        begin: Called when the machine is known to be fit, and nothing is written yet.

    Returns:
        What the last validation measured.

    Raises:
        Interrupted: If it was asked to end; what was done is saved.
        Diverged: If too many steps were not finite.
        WrongMachine: If the machine has not what is asked for.
    """

    def save(to: Path) -> None:
        trainer = module.trainer
        guard.save(to, module.model, conditions, trainer.global_rank, trainer.world_size)

    validation = Validation(run.folder / "validation.csv", lambda _: save(run.best))
    log = StepLog(run.folder / "metrics.csv")
    bars: list[Callback] = [Progress()] if progress else []
    averaging, signals = Averaging(decay), Signals()
    checkpoints = Checkpoints(run.checkpoint.parent, minutes, signals)
    quiet()
    trainer = made(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        max_steps=module.optimization.steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=validate_every * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.folder,
        plugins=[AtomicCheckpoints()],
        callbacks=[signals, log, *bars, validation, *callbacks, averaging, checkpoints],
    )
    if begin is not None:
        begin()
    going_on = run.checkpoint if run.checkpoint.exists() else None
    with warnings.catch_warnings(), interruptible():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, datamodule=loading, ckpt_path=going_on, weights_only=True)
        averaging.put(module)  # if the run was already complete, nothing else did
        if validation.last.get("step") != trainer.global_step:
            trainer.validate(module, datamodule=loading, verbose=False)
        module.eval()
        save(run.model)
    return validation.last


@contextmanager
def interruptible() -> Iterator[None]:
    r"""Hands Ctrl-C on as the exception that it is. Lightning makes it an exit, and lets the process
    ignore it from then on."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
        raise KeyboardInterrupt from None


def quiet() -> None:
    r"""Lets Lightning tell of errors alone."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
