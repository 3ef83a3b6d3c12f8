"""The photographs that the models of the package are trained on."""

import numpy as np
import photographs
import pytest
from PIL import Image


def noise(height, width, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_tiles_cover_a_picture_and_leave_out_what_is_smooth():
    picture = noise(40, 50)
    picture.paste((90, 90, 90), (0, 0, 20, 20))
    found = list(photographs.tiles(picture, 20, 4, most=36.0))
    assert len(found) == 5  # of two by three, without the grey one
    assert {tile.size for tile in found} == {(20, 20)}
    corner = np.array(picture)[20:, 30:]
    assert any((np.array(tile) == corner).all() for tile in found)
    assert len(list(photographs.tiles(picture, 20, 4, most=np.inf))) == 6


@pytest.mark.parametrize("name", photographs.HELD_OUT)
def test_what_is_held_out_is_among_the_photographs(name):
    files = [f for names in photographs.BACKGROUNDS.values() for f in names]
    names = [file.rpartition("/")[2] for file in files] + [
        n for names in photographs.SKIMAGE.values() for n in names
    ]
    assert sum(n.startswith(name) for n in names) == 1


def test_what_is_held_out_is_written_whole_and_the_rest_in_tiles(tmp_path, monkeypatch):
    made = [(noise(60, 80, 1), "a/train.jpg", "CC0"), (noise(60, 80, 2), "coffee", "CC BY")]
    monkeypatch.setattr(photographs, "photographs", lambda: iter(made))
    monkeypatch.setattr(photographs, "SIZES", (100, 40))
    photographs.collect(tmp_path, 20, 4, 36.0)
    held = sorted(file.name for file in (tmp_path / "held-out").iterdir())
    assert held == ["coffee-40-000.png"]  # it is no larger than 80
    assert Image.open(tmp_path / "held-out" / held[0]).size == (40, 30)
    tiles = sorted(file.name for file in (tmp_path / "train").iterdir())
    assert tiles == [f"train-40-{n:03d}.png" for n in range(4)]
    rows = (tmp_path / "SOURCES.csv").read_text().splitlines()
    assert rows[0] == "file,source,terms"
    assert rows[-1] == "held-out/coffee-40-000.png,coffee,CC BY"
    assert len(rows) == 6
