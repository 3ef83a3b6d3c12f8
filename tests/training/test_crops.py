"""Batches of crops: pure functions of seed and number."""

import numpy as np
import pytest
import torch

from flowguard.metrics import imresize
from flowguard.training.crops import FolderCrops

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "below").mkdir()
    for name, size in (("a.png", (40, 50)), ("below/b.png", (37, 61)), ("tiny.png", (20, 90))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_text("no picture")
    return tmp_path


def crops(folder, **options):
    return FolderCrops(folder, **{"scale": 4, "size": 24, "batch": 6, "seed": 3} | options)


def test_a_batch_is_a_function_of_seed_and_number(folder):
    source, again = crops(folder), crops(folder)
    later = source[7]
    source[2]
    for first, second in zip(later, again[7], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(source[7][0], source[8][0])
    assert not torch.equal(source[7][0], crops(folder, seed=4)[7][0])


def test_rows_are_those_of_the_whole_batch(folder):
    whole, part = crops(folder), crops(folder)
    part.rows = range(2, 5)
    for first, second in zip(whole[1], part[1], strict=True):
        assert torch.equal(first[2:5], second)


def test_the_lr_image_is_that_of_the_whole_picture(folder):
    source = crops(folder)
    assert [tuple(hr.shape) for hr, _ in source.pairs] == [(3, 40, 48), (3, 36, 60)]
    for hr, lr in source.pairs:
        assert hr.dtype == lr.dtype == torch.uint8
        assert torch.equal(lr, imresize(hr, 1 / 4))
    hr, lr = source[0]
    assert hr.shape == (6, 3, 24, 24)
    assert lr.shape == (6, 3, 6, 6)


def test_files_that_are_no_use_are_named(folder):
    left_out = {path.name: why for path, why in crops(folder).left_out.items()}
    assert left_out.keys() == {"tiny.png", "broken.png"}
    assert "24 rows or columns" in left_out["tiny.png"]
    with pytest.raises(ValueError, match="at least 64 rows and columns"):
        crops(folder, size=64)
