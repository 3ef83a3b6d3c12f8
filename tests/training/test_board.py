r"""What a training shows while it runs: tables, pictures, TensorBoard."""

import csv
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
Image = pytest.importorskip("PIL.Image")

from flowguard.cli import main as cli  # noqa: E402
from flowguard.io import pictures  # noqa: E402
from flowguard.training.board import Board  # noqa: E402
from flowguard.training.module import StepTold  # noqa: E402

SMALL = ("--encoder-blocks", 1, "--flow-steps", 1, "--hidden", 8, "--features", 8, "--threads", 1)
TINY = (*SMALL, "--levels", 1, "--crop", 16, "--batch", 2, "--accelerator", "cpu")


def put(folder, names, size=(56, 48)):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in names:
        coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


def train(*arguments):
    assert cli.main([str(a) for a in ("train", *arguments)]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was resumed, with a folder of strange pictures."""
    top = tmp_path_factory.mktemp("board")
    data, ood = put(top / "data", ["a.png", "b.png", "c.png"]), put(top / "ood", ["x.png"])
    train("superres", "--data", data, "--ood", ood, "--out", top / "run", *TINY, "--steps", 12,
          "--validate-every", 10, "--accumulate", 2)  # fmt: skip
    train("--resume", top / "run", "--steps", 21)
    return top / "run"


def rows(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_each_validation_has_a_row_in_both_tables(run):
    validation, outside = rows(run / "validation.csv"), rows(run / "outside.csv")
    steps = [row["step"] for row in validation]
    assert steps == ["10", "12", "20", "21"]
    assert [row["step"] for row in outside] == steps
    for row in validation:
        for name in ("bits_per_dim", "psnr", "psnr_y", "ssim", "lr_psnr", "bicubic_psnr_y"):
            assert float(row[name]) > 0
        for name in ("sample_psnr", "sample_psnr_y", "sample_ssim", "sample_lr_psnr"):
            assert float(row[name]) > 0
        assert row["psnr"] != row["sample_psnr"]
    for row in outside:
        for name in ("artefacts", "non_finite", "auroc"):
            assert 0 <= float(row[name]) <= 1
            assert 0 <= float(row[f"folder_{name}"]) <= 1
        assert 0 < float(row["reached"]) < float(row["certificate"])


def test_nothing_is_told_of_before_the_first_step_is_whole(tmp_path):
    board, writer = Board(tmp_path), Mock()
    board.writer = writer
    trainer, module = SimpleNamespace(global_step=0), SimpleNamespace(told=None, skipped=0)
    board.on_train_batch_end(trainer, module)  # the first of the batches that make a step
    assert writer.mock_calls == []
    module.told = StepTold(10, 2.5, 0.1, 1.0, False)
    trainer.global_step = 10
    board.on_train_batch_end(trainer, module)
    assert call.add_scalar("train/loss", 2.5, 10) in writer.mock_calls


def test_pictures_are_shown(run):
    held_out = pictures.read(run / "pictures" / "held-out.png").colour
    assert held_out.shape == (3, 48, 4 * 56)
    assert pictures.read(run / "pictures" / "strange.png").colour.shape == (3, 48, 48)


def test_tensorboard_tells_the_same(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(run / "tensorboard"), {"images": 0, "scalars": 0})
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/lr", "validation/psnr_y", "outside/auroc"} <= {*tags["scalars"]}
    assert {"gallery/held-out", "gallery/strange"} <= {*tags["images"]}
    told = [(str(e.step), e.value) for e in board.Scalars("validation/psnr_y")]
    expected = [(r["step"], float(r["psnr_y"])) for r in rows(run / "validation.csv")]
    assert [s for s, _ in told] == [s for s, _ in expected]
    assert [v for _, v in told] == pytest.approx([v for _, v in expected], rel=1e-6)
    losses = {r["step"]: float(r["loss"]) for r in rows(run / "metrics.csv")}
    for event in board.Scalars("train/loss"):
        assert event.value == pytest.approx(losses[str(event.step)], rel=1e-6)
    assert [e.step for e in board.Scalars("train/loss")] == [10, 20]


def test_without_tensorboard_nothing_is_missing(run, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train("superres", "--data", run.parent / "data", "--out", tmp_path / "run", *TINY,
          "--steps", 1)  # fmt: skip
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_report_holds_curves_numbers_and_pictures(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    for words in ("training, bits/dim", "PSNR Y, dB", "guard: AUROC", "bound and attack"):
        assert f"<b>{words}</b>" in page
    assert page.count("data:image/png;base64,") == 2
    assert "On strange conditions: artefacts, the guard, the bound and an attack" in page
    assert "validate_every: 10" in page


def test_a_strange_folder_that_is_not_there_is_one_line(run, tmp_path, capsys):
    arguments = ["superres", "--data", run.parent / "data", "--out", tmp_path / "run", *TINY]
    arguments += ["--ood", tmp_path / "absent"]
    assert cli.main([str(a) for a in ("train", *arguments)]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
