r"""Photographs as they are dropped, and what sliders make of them."""

import numpy as np
import pytest
import torch

from flowguard.app import conditions
from flowguard.app.conditions import LARGEST, MODES, Changes, Photograph, changed
from flowguard.io.pictures import ImageError

Image = pytest.importorskip("PIL.Image")


def file(tmp_path, width, height, name="a.png"):
    path = tmp_path / name
    Image.fromarray(np.full((height, width, 3), 90, dtype=np.uint8)).save(path)
    return path


def test_twelve_megapixels_are_reduced_and_it_is_said(tmp_path):
    found = conditions.opened(file(tmp_path, 4000, 3000, "large.jpg"))
    assert found.colour[0].numel() <= LARGEST
    assert found.colour.shape == (3, 543, 724)
    assert found.told == "4000 × 3000 pixels, reduced to 724 × 543 for an answer in seconds"


def test_a_photograph_that_fits_stays_as_it_is(tmp_path):
    found = conditions.opened(file(tmp_path, 768, 512))
    assert found.colour.shape == (3, 512, 768)
    assert found.told == "768 × 512 pixels"


def test_a_long_strip_is_cut_to_its_middle(tmp_path):
    found = conditions.opened(file(tmp_path, 4000, 20))
    assert found.colour.shape == (3, 20, 160)
    assert "cut to its middle 160 × 20" in found.told


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (1, 1, "at least 16 rows and columns; got 1 × 1"),
        (900, 15, "at least 16 rows and columns; got 900 × 15"),
        (10_001, 5_000, "at most 50 million pixels here; got 10001 × 5000"),
    ],
)
def test_what_is_too_small_or_too_large_is_refused(width, height, words, tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (width, height)).save(path)
    with pytest.raises(ImageError, match=words):
        conditions.opened(path)


def test_a_condition_has_no_more_pixels_than_an_answer_in_seconds_allows():
    whole = Photograph(torch.rand(3, 512, 768), "768 × 512 pixels")
    for mode in MODES:
        small = conditions.enlarged_from(whole, 4, mode)
        assert 16 * small.colour[0].numel() <= LARGEST
        assert "reduced" in small.told
    little = Photograph(torch.rand(3, 40, 60))
    assert conditions.enlarged_from(little, 4, MODES[1]) is little
    with pytest.raises(ValueError, match="a mode must be one of"):
        conditions.enlarged_from(little, 4, "sideways")


def test_all_examples_can_be_had():
    pytest.importorskip("skimage")
    for name in conditions.EXAMPLES:
        assert conditions.example(name).colour[0].numel() <= LARGEST
    with pytest.raises(ValueError, match=r"must be one of cat, .*; got 'dog'"):
        conditions.example("dog")


def test_no_change_changes_nothing():
    y = torch.rand(3, 20, 24)
    assert torch.equal(changed(y, Changes()), y)


@pytest.mark.parametrize(
    "changes",
    [
        Changes(gain=2),
        Changes(noise=0.1),
        Changes(blur=1),
        Changes(quality=9),
        Changes(inversion=1),
    ],
)
def test_each_change_changes_and_the_same_way_each_time(changes):
    y = torch.rand(3, 20, 24)
    made = changed(y, changes)
    assert not torch.allclose(made, y, atol=1e-3)
    assert torch.equal(changed(y, changes), made)


def test_jpeg_cuts_and_all_else_may_leave_the_range():
    y = torch.rand(3, 20, 24)
    assert float(changed(y, Changes(gain=5)).max()) > 4
    assert float(changed(y, Changes(gain=5, quality=50)).max()) <= 1


def test_a_change_without_a_number_is_refused():
    with pytest.raises(ValueError, match="gain must be a finite number; got nan"):
        changed(torch.rand(3, 16, 16), Changes(gain=float("nan")))


def test_light_of_one_leaves_a_photograph_as_it_is():
    whole = Photograph(torch.rand(3, 20, 24))
    assert conditions.darkened(whole, 1) is whole
    assert float(conditions.darkened(whole, 0.05).colour.mean()) < 0.2
