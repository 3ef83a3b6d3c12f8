"""Tables that are cut where a run goes on, checkpoints that are whole or not there."""

import errno
import os

import pytest
import torch

pytest.importorskip("lightning")

from flowguard.training.callbacks import (
    AtomicCheckpoints,
    MetricsTable,
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
