r"""Pictures in files."""

import io
import zlib

import numpy as np
import PIL
import pytest
import torch

from flowguard.io import pictures
from flowguard.io.pictures import ImageError, Picture

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
tifffile = pytest.importorskip("tifffile")
rng = np.random.default_rng(0)


def levels(picture):
    parts = [picture.colour[:1] if picture.grey else picture.colour]
    parts += [picture.alpha] if picture.alpha is not None else []
    peak = 2**picture.bits - 1
    return (torch.cat(parts) * peak).round().movedim(0, -1).int().numpy()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".PNG"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (37, 53)])
def test_what_is_written_is_read(suffix, bits, alpha, grey, size, tmp_path):
    pixels = torch.from_numpy(rng.integers(0, 2**bits, (4, *size)).astype(np.float32))
    pixels = pixels / (2**bits - 1)
    colour = pixels[:1].expand(3, -1, -1) if grey else pixels[:3]
    picture = Picture(colour, pixels[3:] if alpha else None, grey, bits, b"profile")
    pictures.write(tmp_path / f"x{suffix}", picture)
    found = pictures.read(tmp_path / f"x{suffix}")
    assert (found.grey, found.bits, found.icc) == (grey, bits, b"profile")
    assert (levels(found) == levels(picture)).all()
    assert (found.alpha is None) == (not alpha)
    assert [p.name for p in tmp_path.iterdir()] == [f"x{suffix}"]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "deep.png", "deep.tif"])
def test_a_note_comes_back(name, tmp_path):
    picture = Picture(torch.rand(3, 4, 5), bits=16 if "deep" in name else 8)
    pictures.write(tmp_path / name, picture, note="made by a test")
    assert pictures.note_of(tmp_path / name) == "made by a test"
    assert (levels(pictures.read(tmp_path / name)) == levels(picture)).all()
    pictures.write(tmp_path / name, picture)
    assert pictures.note_of(tmp_path / name) == ""


@pytest.mark.parametrize("name", ["x.png", "x.tif", "deep.png", "deep.tif"])
def test_pictures_beyond_the_limit_have_notes(name, tmp_path):
    """What is made of a picture is larger than the picture."""
    picture = Picture(torch.rand(3, 4, 5), bits=16 if "deep" in name else 8)
    pictures.write(tmp_path / name, picture, note="made by a test")
    with pictures.at_most(2):
        assert pictures.note_of(tmp_path / name) == "made by a test"


def test_what_is_no_picture_has_no_note(tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    (tmp_path / "x.tif").write_bytes(b"II*\0")
    assert [pictures.note_of(tmp_path / n) for n in ("x.png", "x.tif", "absent")] == [""] * 3


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_deep_png_is_what_others_read(channels, tmp_path):
    """Pillow keeps the upper byte of each channel."""
    pixels = rng.integers(0, 65536, (5, 8, channels), dtype=np.uint16)
    with Image.open(io.BytesIO(pictures.png16(pixels))) as image:
        found = np.asarray(image).astype(int)
    if channels == 1:
        assert (found == pixels[..., 0]).all()
    else:
        upper = pixels >> 8
        if channels == 2:
            upper = upper[..., [0, 0, 0, 1]]
        assert (found == upper).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_a_deep_png_that_is_filtered_otherwise(channels, tmp_path):
    """Sub instead of Up."""
    pixels = rng.integers(0, 65536, (5, 8, channels), dtype=np.uint16)
    rows = pixels.astype(">u2").reshape(5, -1).view(np.uint8)
    sub = rows.copy()
    sub[:, 2 * channels :] -= rows[:, : -2 * channels]
    data = np.concatenate((np.ones((5, 1), np.uint8), sub), 1).tobytes()
    png = pictures.png16(pixels)
    head = png[: png.index(b"IDAT") - 4]
    parts = [pictures._chunk(b"IDAT", zlib.compress(data)), pictures._chunk(b"IEND", b"")]
    (tmp_path / "x.png").write_bytes(head + b"".join(parts))
    assert (levels(pictures.read(tmp_path / "x.png")) == pixels).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
def test_orientation_is_honoured(orientation, name, tmp_path):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    pixels[8:, 16:] = 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / name, exif=exif, quality=95)
    with Image.open(tmp_path / name) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = levels(pictures.read(tmp_path / name))
    assert found.shape == wanted.shape
    assert (found == wanted).all()
    assert found.shape[:2] == ((24, 16) if orientation > 4 else (16, 24))


def test_orientation_of_a_deep_tiff(tmp_path):
    pixels = rng.integers(0, 65536, (4, 6, 3), dtype=np.uint16)
    tag = (274, "H", 1, 6, True)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb", extratags=[tag])
    assert (levels(pictures.read(tmp_path / "x.tif")) == np.rot90(pixels, -1)).all()


def test_kinds_of_eight_bits(tmp_path):
    base = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    wanted = {
        "L": (True, False),
        "1": (True, False),
        "LA": (True, True),
        "P": (False, False),
        "RGB": (False, False),
        "RGBA": (False, True),
    }
    for mode, (grey, alpha) in wanted.items():
        base.convert("L").convert(mode).save(tmp_path / "x.png") if grey else base.convert(
            mode
        ).save(tmp_path / "x.png")
        found = pictures.read(tmp_path / "x.png")
        assert (found.grey, found.alpha is not None, found.bits) == (grey, alpha, 8), mode
        assert found.colour.shape == (3, 9, 11)
    base.convert("CMYK").save(tmp_path / "x.jpg")
    assert pictures.read(tmp_path / "x.jpg").colour.shape == (3, 9, 11)
    base.convert("P").save(tmp_path / "x.png", transparency=3)
    assert pictures.read(tmp_path / "x.png").alpha is not None
    base.convert("L").save(tmp_path / "x.png", transparency=5)
    grey = pictures.read(tmp_path / "x.png")
    assert grey.grey
    pixels = np.asarray(base.convert("L"))
    assert ((grey.alpha[0].numpy() == 0) == (pixels == 5)).all()
    assert (levels(grey)[..., 0] == pixels).all()


def test_grey_of_sixteen_bits(tmp_path):
    pixels = rng.integers(0, 65536, (4, 6), dtype=np.uint16)
    for name in ("x.png", "x.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        found = pictures.read(tmp_path / name)
        assert (found.bits, found.grey) == (16, True)
        assert (levels(found)[..., 0] == pixels).all()
    tifffile.imwrite(tmp_path / "white.tif", pixels, photometric="miniswhite")
    assert (levels(pictures.read(tmp_path / "white.tif"))[..., 0] == 65535 - pixels).all()


def test_deep_tiffs_of_other_layouts(tmp_path):
    pixels = rng.integers(0, 65536, (4, 6, 3), dtype=np.uint16)
    file = tmp_path / "x.tif"
    tifffile.imwrite(file, np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate")
    assert (levels(pictures.read(file)) == pixels).all()
    alpha = rng.integers(20000, 65536, (4, 6, 1), dtype=np.uint16)
    multiplied = (pixels * (alpha / 65535)).round().astype(np.uint16)
    stored = np.concatenate((multiplied, alpha), -1)
    tifffile.imwrite(file, stored, photometric="rgb", extrasamples=["assocalpha"])
    assert np.abs(levels(pictures.read(file))[..., :3] - pixels).max() <= 3
    tifffile.imwrite(file, pixels.astype(np.float32), photometric="rgb")
    with pytest.raises(ImageError):
        pictures.read(file)


def test_what_cannot_be_read(tmp_path):
    base = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    files = {"text.png": b"no picture", "empty.png": b""}
    for kind, name in (("PNG", "cut.png"), ("JPEG", "cut.jpg"), ("TIFF", "cut.tif")):
        stream = io.BytesIO()
        base.save(stream, format=kind)
        files[name] = stream.getvalue()[: len(stream.getvalue()) // 2]
    deep = pictures.png16(rng.integers(0, 65536, (40, 50, 3), dtype=np.uint16))
    files["deep.png"] = deep[: len(deep) // 2]
    deep = pictures.png16(rng.integers(0, 65536, (40, 50, 2), dtype=np.uint16))
    files["deep-alpha.png"] = deep[: len(deep) // 2]
    stream = io.BytesIO()
    tifffile.imwrite(stream, rng.integers(0, 65536, (40, 50, 3), dtype=np.uint16))
    files["deep.tif"] = stream.getvalue()[: len(stream.getvalue()) // 2]
    stream = io.BytesIO()
    base.save(stream, format="TIFF", save_all=True, append_images=[base])
    files["two.tif"] = stream.getvalue()
    stream = io.BytesIO()
    Image.fromarray(np.zeros((3, 3), np.float32)).save(stream, format="TIFF")
    files["float.tif"] = stream.getvalue()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError) as told:
            pictures.read(tmp_path / name)
        assert "\n" not in str(told.value)
        assert str(told.value), name
    with pytest.raises(ImageError, match="folder"):
        pictures.read(tmp_path)
    with pytest.raises(ImageError):
        pictures.read(tmp_path / "absent.png")


@pytest.mark.parametrize("name", ["x.png", "deep.png", "x.tif", "deep.tif", "grey.tif", "x.bmp"])
def test_pictures_beyond_the_limit_are_not_decoded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # twice as many are read
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)
    pixels = rng.integers(0, 65536, (10, 11, 3), dtype=np.uint16)
    if name == "deep.png":
        (tmp_path / name).write_bytes(pictures.png16(pixels))
    elif name in ("deep.tif", "grey.tif"):
        alone = name == "grey.tif"
        tifffile.imwrite(tmp_path / name, pixels[..., 0] if alone else pixels)
    else:
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
    with pytest.raises(ImageError, match=r"110 .*at most 100 .*MAX_IMAGE_PIXELS") as told:
        pictures.read(tmp_path / name)
    assert "--max-pixels" in str(told.value)
    monkeypatch.undo()
    assert pictures.read(tmp_path / name).colour.shape == (3, 10, 11)


def test_a_tiff_of_many_channels_is_not_decoded(tmp_path, monkeypatch):
    pixels = np.zeros((4, 6, 500), np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)
    with pytest.raises(ImageError, match="must be grey or RGB"):
        pictures.read(tmp_path / "x.tif")


def test_without_a_limit_all_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((4, 6), np.uint16))
    assert pictures.read(tmp_path / "x.tif").colour.shape == (3, 4, 6)


def test_values_beyond_are_cut(tmp_path):
    colour = torch.tensor([-1.0, 0.5, 2.0, torch.nan, torch.inf, -torch.inf]).expand(3, 1, 6)
    pictures.write(tmp_path / "x.png", Picture(colour))
    assert levels(pictures.read(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 128, 255, 0, 255, 0]


def test_an_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.tif or \.tiff; got x\.jpg"):
        pictures.write(tmp_path / "x.jpg", Picture(torch.zeros(3, 2, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_headers_and_levels_are_upright(orientation, suffix, tmp_path):
    pixels = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"x.{suffix}", exif=exif)
    read = pictures.read(tmp_path / f"x.{suffix}")
    header = pictures.header(tmp_path / f"x.{suffix}")
    assert header == pictures.Header(*read.colour.shape[-2:])
    found = pictures.levels(tmp_path / f"x.{suffix}")
    assert found.dtype == np.uint8
    assert found.shape == header.shape
    assert (found == (255 * read.colour).round().numpy()).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_headers_know_what_is_grey(mode, tmp_path):
    file = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    image = Image.fromarray(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8))
    # Pillow 12 cannot read its own YCbCr where nothing is compressed.
    packed = mode == "YCbCr" and int(PIL.__version__.partition(".")[0]) < 13
    image.convert(mode).save(file, compression="tiff_lzw" if packed else None)
    read, header = pictures.read(file), pictures.header(file)
    assert (header.grey, header.bits) == (read.grey, read.bits)
    found = pictures.levels(file)
    assert found.shape == header.shape
    assert (found == (255 * read.colour).round().numpy()[: len(found)]).all()


def test_postscript_is_no_picture_whatever_it_is_called(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    file = tmp_path / "x.png"
    file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for read in (pictures.read, pictures.header, pictures.levels):
        with pytest.raises(ImageError, match="it is no picture, or of an unknown kind"):
            read(file)
    assert started == []


def test_the_header_of_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "x.png").write_text("This is no picture.")
    with pytest.raises(ImageError, match="it is no picture, or of an unknown kind"):
        pictures.header(tmp_path / "x.png")
    with pytest.raises(ImageError, match="it is a folder"):
        pictures.header(tmp_path)
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    with pytest.raises(ImageError, match="8 or 16 bits"):
        pictures.header(tmp_path / "f.tif")
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "two.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="holds 2 pictures"):
        pictures.header(tmp_path / "two.webp")
    with pictures.at_most(10), pytest.raises(ImageError, match="pixels, and at most"):
        pictures.header(tmp_path / "two.webp")
