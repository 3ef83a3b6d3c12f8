r"""Folders of pictures."""

import multiprocessing

import numpy as np
import pytest
import torch

from flowguard.io import folder, pictures
from flowguard.io.pictures import Header, ImageError

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tifffile")


def noise(*shape, bits=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=generator) / (2**bits - 1)


@pytest.fixture
def mixed(tmp_path):
    """Pictures of all kinds, nested, and files that are none."""
    top = tmp_path / "mixed"
    (top / "a" / "deeper").mkdir(parents=True)
    for name, bits, grey in (
        ("b.png", 8, False),
        ("a/deep.png", 16, False),
        ("a/deeper/grey.tif", 16, True),
        ("a/grey.png", 8, True),
    ):
        colour = noise(3, 20, 30, bits=bits, seed=bits)
        colour = colour[:1].expand(3, -1, -1) if grey else colour
        pictures.write(top / name, pictures.Picture(colour, grey=grey, bits=bits))
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(top / "c.JPEG")
    (top / "notes.txt").write_text("no picture")
    (top / ".hidden.png").write_bytes(b"")
    (top / "text.png").write_text("no picture")
    return top


def names(files, top):
    return [f.relative_to(top).as_posix() for f in files]


def test_pictures_are_found_in_all_folders_in_one_order(mixed):
    found = names(folder.find(mixed), mixed)
    assert found == [
        "a/deep.png",
        "a/deeper/grey.tif",
        "a/grey.png",
        "b.png",
        "c.JPEG",
        "text.png",
    ]


def test_links_are_followed_and_loops_are_not(mixed, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "here").symlink_to(mixed)
    (other / "one.png").symlink_to(mixed / "b.png")
    (mixed / "loop").symlink_to(other)
    found = names(folder.find(other), other)
    assert found == [f"here/{n}" for n in names(folder.find(mixed), mixed) if "loop" not in n] + [
        "one.png"
    ]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        folder.find(tmp_path / "absent")


def test_headers_say_what_is_read(mixed):
    found = folder.survey(folder.find(mixed))
    assert names(found.files, mixed)[:4] == [
        "a/deep.png",
        "a/deeper/grey.tif",
        "a/grey.png",
        "b.png",
    ]
    for file, header in zip(found.files, found.headers, strict=True):
        read = pictures.read(file)
        assert (header.height, header.width) == tuple(read.colour.shape[-2:])
        assert (header.grey, header.bits) == (read.grey, read.bits)
        assert pictures.levels(file).shape == header.shape
    assert [(f.path.name, f.reason) for f in found.faults] == [
        ("text.png", "it is no picture, or of an unknown kind")
    ]


def test_small_ones_are_left_out_and_named(mixed):
    assert len(folder.survey(folder.find(mixed), rows=20, columns=30).files) == 5
    found = folder.survey(folder.find(mixed), rows=21)
    assert found.files == []
    assert str(found.faults[0]).endswith("deep.png: it is smaller than 21 × 1: 20 × 30")


@pytest.mark.parametrize("budget", [0, 2000, 10**6])
def test_windows_are_those_of_what_is_read(mixed, budget):
    found = folder.survey(folder.find(mixed))
    source = folder.PictureFiles(found.files, found.headers, budget=budget)
    assert source.sizes == [(20, 30)] * 5
    assert len(source) == 5
    assert source.bytes == 600 * (6 + 2 + 1 + 3 + 3)
    for _ in range(2):  # from the file, and from memory
        for i, file in enumerate(found.files):
            expected = pictures.read(file).colour[:, 3:13, 5:25]
            assert torch.equal(source.window(i, 3, 5, 10, 20), expected)


def test_what_fits_is_decoded_once(mixed, monkeypatch):
    found = folder.survey(folder.find(mixed))
    read = []
    levels = pictures.levels
    monkeypatch.setattr(pictures, "levels", lambda path: read.append(path) or levels(path))
    source = folder.PictureFiles(found.files, found.headers, budget=600 * 9 + 2)
    for _ in range(3):
        for i in range(5):
            source.whole(i)
    kept = found.files[:3]  # 6, 2 and 1 bytes for each pixel
    assert [read.count(f) for f in found.files] == [1 if f in kept else 3 for f in found.files]


def touch(source):
    with pytest.warns(UserWarning, match=r"left out: .*torn\.png: "), pytest.raises(ImageError):
        source.whole(1)


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_a_corrupt_file_is_named_once_and_known_to_all(method, tmp_path):
    pictures.write(tmp_path / "good.png", pictures.Picture(noise(3, 20, 30)))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    found = folder.survey(folder.find(tmp_path))
    assert found.faults == []  # by its header it is whole
    source = folder.PictureFiles(found.files, found.headers)
    if method is None:
        touch(source)
    elif method in multiprocessing.get_all_start_methods():
        process = multiprocessing.get_context(method).Process(target=touch, args=(source,))
        process.start()
        process.join()
        assert process.exitcode == 0
    else:
        pytest.skip(f"there is no {method} here")
    assert source.broken() == [1]
    with pytest.raises(ImageError, match="could not be read before"):
        source.whole(1)


def test_a_file_that_changed_is_refused(tmp_path):
    pictures.write(tmp_path / "x.png", pictures.Picture(noise(3, 20, 30)))
    source = folder.PictureFiles([tmp_path / "x.png"])
    pictures.write(tmp_path / "x.png", pictures.Picture(noise(3, 20, 31)))
    with pytest.warns(UserWarning, match="not what its header said"), pytest.raises(ImageError):
        source.whole(0)


def test_a_file_that_is_gone_is_not_taken_for_a_broken_one(tmp_path):
    """Its disk may be gone for a while; a run that left it out would make other batches."""
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.mkdir()
    pictures.write(there / "x.png", pictures.Picture(noise(3, 20, 30)))
    source = folder.PictureFiles([there / "x.png"])
    there.rename(gone)
    with pytest.raises(folder.Unreadable, match=r"x\.png: No such file or directory"):
        source.window(0, 0, 0, 4, 4)
    assert source.headers == [Header(20, 30)]
    assert source.broken() == []
    gone.rename(there)
    assert source.window(0, 0, 0, 4, 4).shape == (3, 4, 4)
