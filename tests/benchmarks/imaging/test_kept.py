"""Which models there are, and what is kept of them."""

import doctest
import json

import pytest
from imaging import kept
from imaging.kept import Kept, find_models, named
from imaging.measure import Options


def model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_examples_hold():
    assert doctest.testmod(kept).failed == 0


@pytest.mark.parametrize(
    "name", ["affine-seed1", "affine_seed-1", "affine/seed1", "affine-seed_1"]
)
def test_a_name_tells_its_seed(name):
    assert named(name)[1:] == ("affine", 1)


def test_of_a_run_the_last_model_is_taken_or_else_the_best(tmp_path):
    for run in ("a", "b"):
        model(tmp_path / run / "best")
        (tmp_path / run / "config.yaml").write_text("")
    last = model(tmp_path / "b" / "model")
    other = model(tmp_path / "more" / "c")
    model(tmp_path / "more" / ".half")
    start = model(tmp_path / "a" / "start")
    assert find_models(tmp_path) == {"a": tmp_path / "a" / "best", "b": last, "more/c": other}
    assert find_models(tmp_path / "b") == {"b": last}
    assert find_models(other) == {"c": other}
    assert find_models(start) == {"start": start}  # as it is asked for
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "mine").symlink_to(other)
    assert find_models(tmp_path / "links") == {"mine": tmp_path / "links" / "mine"}


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there must be a model in .*; got none"):
        find_models(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_models(tmp_path / "none")


def test_rows_are_kept_until_the_model_is_another(tmp_path):
    file, key = tmp_path / "m.json", ("set5", "one", "")
    first = Kept(file, "abc", Options())
    assert key not in first
    first.add(key, {"psnr_y": 30.0, "largest": float("inf")})
    again = Kept(file, "abc", Options())
    assert key in again
    assert again[key]["psnr_y"] == 30.0
    assert float(again[key]["largest"]) == float("inf")
    assert key not in Kept(file, "abd", Options())


def test_rows_of_other_options_are_refused(tmp_path):
    file = tmp_path / "m.json"
    Kept(file, "abc", Options()).add(("set5", "one", ""), {})
    with pytest.raises(ValueError, match=r"measured by the same options.*got .*'crop': 64.*--out"):
        Kept(file, "abc", Options(crop=64))
    file.write_text(json.dumps([]))
    with pytest.raises(ValueError, match="must hold what was measured; remove it"):
        Kept(file, "abc", Options())
