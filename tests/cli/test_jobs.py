r"""Which pictures are read, what is left out, and what is refused before work starts."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse")
from flowguard.cli.jobs import digest, fingerprint, jobs, made_of
from flowguard.cli.parsing import UserError
from flowguard.io import pictures

pytest.importorskip("PIL.Image")
pytest.importorskip("tifffile")


def picture(file, note=""):
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures.write(file, pictures.Picture(torch.rand(3, 4, 5)), note=note)
    return file


def sources(work):
    return [job.source for job in work.jobs]


def test_pictures_below_the_output_are_done(tmp_path):
    source = picture(tmp_path / "photos" / "a.png")
    work = jobs([str(source.parent)], tmp_path, 1, ".png")
    assert sources(work) == [source]
    assert work.left_out == []


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_was_written_is_left_out_and_said(suffix, tmp_path):
    source = picture(tmp_path / "a.png")
    own = picture(tmp_path / "out" / f"b{suffix}", note=made_of(source))
    given = picture(tmp_path / "out" / f"c{suffix}")
    work = jobs([f"{tmp_path}/**"], tmp_path / "out", 2, suffix)
    assert sources(work) == [source, given]
    assert work.left_out == [own]
    elsewhere = jobs([str(own)], tmp_path / "again", 1, suffix)
    assert sources(elsewhere) == [own]
    assert elsewhere.left_out == []


def test_all_that_there_is_was_written(tmp_path):
    source = picture(tmp_path / "a.png")
    for name in "bc":
        picture(tmp_path / f"{name}.png", note=made_of(source))
    source.unlink()
    with pytest.raises(UserError, match=r"INPUT: all 2 pictures.*written to OUTPUT by"):
        jobs([str(tmp_path)], tmp_path, 2, ".png")


def test_two_pictures_of_one_output_are_both_named(tmp_path):
    first, second = (picture(tmp_path / f / "a.png") for f in ("x", "y"))
    with pytest.raises(UserError) as told:
        jobs([str(first.parent), str(second.parent)], tmp_path / "out", 1, ".png")
    assert all(str(p) in str(told.value) for p in (first, second))


def test_a_picture_that_would_be_replaced_is_named(tmp_path):
    source = picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"OUTPUT: .*a\.png is a picture of INPUT"):
        jobs([str(tmp_path)], tmp_path, 1, ".png")
    assert source.exists()


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    for i in range(5):
        picture(tmp_path / "photos" / f"{i}.png")
    listed = []
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda p: listed.append(p) or iterdir(p))
    assert len(jobs([str(tmp_path / "photos")], tmp_path, 1, ".png").jobs) == 5
    assert listed == [tmp_path / "photos"]


def test_the_fingerprint_is_of_name_and_content(tmp_path):
    source = picture(tmp_path / "a.png")
    copy = tmp_path / "copy" / "a.png"
    copy.parent.mkdir()
    copy.write_bytes(source.read_bytes())
    assert fingerprint(copy) == fingerprint(source)
    renamed = source.rename(tmp_path / "b.png")
    assert fingerprint(renamed) != fingerprint(copy)
    copy.write_bytes(copy.read_bytes() + b"more")
    assert fingerprint(copy) != fingerprint(picture(tmp_path / "a.png"))


def test_processes_can_tell_whether_they_found_the_same_pictures(tmp_path):
    picture(tmp_path / "photos" / "a.png")
    first, second = (jobs([str(tmp_path / "photos")], tmp_path, 1, ".png") for _ in range(2))
    assert digest(first) == digest(second)
    picture(tmp_path / "photos" / "b.png")
    assert digest(jobs([str(tmp_path / "photos")], tmp_path, 1, ".png")) != digest(first)
