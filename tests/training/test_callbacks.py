"""Tables that are cut where a run goes on, checkpoints that are whole or not there."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")

from flowguard.training.callbacks import (
    AtomicCheckpoints,
    MetricsTable,
    Validation,
    average_decay,
)


def test_a_table_is_cut_at_the_step_and_at_what_was_half_written(tmp_path):
    table = MetricsTable(tmp_path / "table.csv", ("step", "loss"))
    table.begin(0)
    for step in range(1, 5):
        table.add({"step": step, "loss": step / 10, "other": 1})
    with table.file.open("a") as file:
        file.write("5,0.")
    assert [row["step"] for row in table.rows()] == ["1", "2", "3", "4"]
    table.begin(2)
    table.add({"step": 3})
    assert table.file.read_text() == "step,loss\n1,0.1\n2,0.2\n3,\n"


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    plugin, file = AtomicCheckpoints(), tmp_path / "inner" / "last.ckpt"
    plugin.save_checkpoint({"step": 1}, file)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        plugin.save_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [p.name for p in file.parent.iterdir()] == ["last.ckpt"]


def test_an_average_that_knows_little_follows_closely():
    decays = [average_decay(0.99, n) for n in range(0, 2000, 10)]
    assert decays[0] == 0.1
    assert decays == sorted(decays)
    assert decays[-1] == 0.99


def validate(validation, step, bits, until="on_validation_end"):
    """What Lightning calls for a validation of one picture, up to a hook."""
    trainer = SimpleNamespace(global_step=step, world_size=1, is_global_zero=True)
    module = SimpleNamespace(model=step)
    validation.on_validation_epoch_start(trainer, module)
    validation.on_validation_batch_end(trainer, module, {"bits_per_dim": bits}, None, 0)
    for hook in ("on_validation_epoch_end", "on_validation_end"):
        getattr(validation, hook)(trainer, module)
        if hook == until:
            break


def test_the_best_model_stays_though_no_checkpoint_knows_of_it(tmp_path):
    """A run that is killed after a validation goes on from a checkpoint that is older."""
    saved = []
    validate(Validation(tmp_path / "validation.csv", saved.append), 5, 3.0)
    going_on = Validation(tmp_path / "validation.csv", saved.append)
    validate(going_on, 10, 3.5)
    validate(going_on, 15, 2.5)
    validate(going_on, 20, float("nan"))
    assert saved == [5, 15]


def test_a_validation_that_is_made_once_more_is_compared_with_those_before(tmp_path):
    saved = []
    validation = Validation(tmp_path / "validation.csv", saved.append)
    for step in (5, 10, 10):
        validate(validation, step, 4.0 - step / 10)
    assert saved == [5, 10, 10]
    assert [row["step"] for row in MetricsTable(validation.file, ("step",)).rows()] == ["5", "10"]


def test_a_validation_has_its_row_when_all_that_it_leaves_is_written(tmp_path):
    """A run goes by the rows: one that was killed before makes the validation once more."""
    validation = Validation(tmp_path / "validation.csv", lambda _: None)
    validate(validation, 5, 3.0, until="on_validation_epoch_end")  # others write pictures then
    assert not validation.file.exists()
    validate(validation, 5, 3.0)
    assert validation.file.read_text() == "step,bits_per_dim\n5,3.0\n"
