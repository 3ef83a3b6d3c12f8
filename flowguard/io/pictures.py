r"""Pictures in files: 8 and 16 bits, grey and colour, with and without alpha, upright."""

__all__ = [
    "GREY",
    "SUFFIXES",
    "Header",
    "ImageError",
    "Picture",
    "at_most",
    "header",
    "levels",
    "note_of",
    "png16",
    "read",
    "read_image",
    "shown",
    "to_uint8",
    "whole_numbers",
    "write",
]

import contextlib
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from flowguard.hosts import install
from flowguard.io.atomic import atomic

Array = np.ndarray[Any, Any]

#: What a file of a picture is called.
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# What these files may be, whatever they are called: of others Pillow starts programs, such as
# Ghostscript for PostScript.
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
#: The weights of red, green and blue in luminance.
GREY = (0.299, 0.587, 0.114)
SHALLOW = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr")
GREYS = ("1", "L", "LA", "La")
MPO = "MPO"  # JPEG with a second view behind the first, as some phones write it
DEEP_PNG = ("RGB;16B", "RGBA;16B", "LA;16B")
ORIENTATION = 0x0112  # the tag of EXIF and TIFF
WIDTH, LENGTH = 0x0100, 0x0101  # the tags of TIFF
TURNED = (5, 6, 7, 8)  # orientations that lie on their side
SOFTWARE = "Software"  # the text of a PNG that says what made it; TIFF has a tag of that name
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how they begin


class ImageError(ValueError):
    r"""Raised when a file holds no picture that can be read.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "ramp.png"
        >>> _ = path.write_text("no picture")
        >>> read(path)
        Traceback (most recent call last):
        ...
        flowguard.io.pictures.ImageError: it is no picture, or of an unknown kind
    """


@dataclass(frozen=True)
class Picture:
    r"""A picture as it is seen: upright, with its values in [0, 1].

    Arguments:
        colour: The colours, with shape :math:`(3, H, W)`; three equal channels if it is grey.
        alpha: The opacity, with shape :math:`(1, H, W)`, if there is one.
        grey: Whether it is a greyscale picture.
        bits: The bits of a channel, 8 or 16.
        icc: The colour profile.

    Example:
        >>> picture = Picture(torch.full((3, 4, 6), 0.5), bits=16)
        >>> picture.colour.shape, picture.alpha
        (torch.Size([3, 4, 6]), None)
    """

    colour: Tensor
    alpha: Tensor | None = None
    grey: bool = False
    bits: int = 8
    icc: bytes | None = None


def read(path: str | os.PathLike[str]) -> Picture:
    r"""Reads a picture and turns it as its EXIF orientation says.

    Arguments:
        path: The file, of any kind that Pillow reads; 16 bits are kept for PNG and TIFF.

    Raises:
        ImageError: If it is truncated, holds no picture or several, is of a kind (float, 32 bits)
            that has no range, or has more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` pixels,
            whatever kind it is: then nothing is decoded.
        ImportError: If Pillow, or for a deep TIFF tifffile, is not installed.

    Returns:
        The picture, with colours of shape :math:`(3, H, W)`.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "ramp.png"
        >>> ramp = torch.linspace(0, 1, 6).expand(3, 4, 6)
        >>> write(path, Picture(ramp, bits=16))
        >>> picture = read(path)
        >>> picture.bits, (picture.colour - ramp).abs().max() < 1 / 65535
        (16, tensor(True))
    """
    return _picture(*_pixels(path))


@dataclass(frozen=True)
class Header:
    r"""What a file says of its picture before anything is decoded.

    Arguments:
        height: The rows, as the picture is seen: upright.
        width: The columns.
        grey: Whether it is a greyscale picture.
        bits: The bits of a channel, 8 or 16.

    Example:
        >>> Header(height=4, width=6, grey=True, bits=16).shape
        (1, 4, 6)
    """

    height: int
    width: int
    grey: bool = False
    bits: int = 8

    @property
    def shape(self) -> tuple[int, int, int]:
        r"""The shape of its :func:`levels`, :math:`(1, H, W)` or :math:`(3, H, W)`."""
        return (1 if self.grey else 3, self.height, self.width)


def header(path: str | os.PathLike[str]) -> Header:
    r"""Returns the size and the kind of a picture, of which nothing is decoded.

    Arguments:
        path: The file, of any kind that :func:`read` takes.

    Raises:
        ImageError: If it is no such picture, as far as its header tells; what follows may be
            broken all the same.
        ImportError: If Pillow, or for a deep TIFF tifffile, is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "ramp.png"
        >>> write(path, Picture(torch.zeros(3, 4, 6)))
        >>> header(path)
        Header(height=4, width=6, grey=False, bits=8)
    """
    path = Path(path)
    with _telling(path):
        if _is_deep_tiff(path):
            height, width, grey, orientation = _deep_tiff_header(path)
            return _upright_header(height, width, grey, 16, orientation)
        with _opened(path) as image:
            _refuse_several(image)
            # Some versions of Pillow give the upright size of a TIFF, others that in the file.
            tags = image.tag_v2 if image.format == "TIFF" else {}
            width, height = tags.get(WIDTH, image.size[0]), tags.get(LENGTH, image.size[1])
            grey, bits = _kind(image)
            return _upright_header(height, width, grey, bits, _orientation(image))


def levels(path: str | os.PathLike[str]) -> Array:
    r"""Reads the whole numbers of a picture's colours, upright: a quarter, or half, of the memory
    that :func:`read` takes.

    Arguments:
        path: The file, of any kind that :func:`read` takes.

    Returns:
        The numbers, ``uint8`` or ``uint16`` with shape :math:`(1, H, W)` if it is grey, else
        :math:`(3, H, W)`; divided by 255 or 65535 they are the colours of :func:`read`.

    Raises:
        ImageError: If :func:`read` raises it.
        ImportError: If Pillow, or for a deep TIFF tifffile, is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "ramp.png"
        >>> ramp = torch.linspace(0, 1, 6).expand(3, 4, 6)
        >>> write(path, Picture(ramp))
        >>> levels(path)[0, 0]
        array([  0,  51, 102, 153, 204, 255], dtype=uint8)
    """
    pixels, grey, _, orientation, _ = _pixels(path)
    colours = np.moveaxis(pixels[..., : 1 if grey else 3], -1, 0)
    return np.ascontiguousarray(_upright(colours, orientation))


def _pixels(path: str | os.PathLike[str]) -> tuple[Array, bool, int, int, bytes | None]:
    r"""The whole numbers of a picture as they lie in the file, with shape (H, W, channels);
    whether it is grey, its bits, its orientation and its colour profile."""
    path = Path(path)
    with _telling(path):
        if _is_deep_tiff(path):
            return _deep_tiff(path)
        with _opened(path) as image:
            _refuse_several(image)
            return _read(image)


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    r"""Makes of all that a broken file can raise an :class:`ImageError`."""
    if path.is_dir():
        raise ImageError("it is a folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, odd EXIF: they are read all the same
            yield
    except (ImageError, ImportError):
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        lines = str(error).splitlines() or [type(error).__name__]
        reason = lines[0].replace(str(path), path.name)
        if "cannot identify" in reason:
            reason = "it is no picture, or of an unknown kind"
        raise ImageError(reason) from error


def _refuse_several(image: Any) -> None:
    if getattr(image, "n_frames", 1) > 1 and image.format != MPO:
        raise ImageError(f"it holds {image.n_frames} pictures, not one")


def _upright_header(height: int, width: int, grey: bool, bits: int, orientation: int) -> Header:
    if orientation in TURNED:
        height, width = width, height
    return Header(height, width, grey, bits)


def read_image(file: str | os.PathLike[str] | IO[bytes]) -> Tensor:
    r"""Reads an image of 8 bits as RGB, upright and without its opacity.

    Arguments:
        file: The path of the file, or an open binary file.

    Returns:
        The image in :math:`[0, 1]`, with shape :math:`(3, H, W)`, float32.

    Raises:
        ImageError: If the image has more than 8 bits per channel, see :func:`read` for these; or
            more pixels than are read.
        ImportError: If Pillow is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "grey.png"
        >>> write(path, Picture(torch.full((3, 4, 6), 0.6)))
        >>> image = read_image(path)
        >>> image.shape, image.dtype, image[0, 0, 0]
        (torch.Size([3, 4, 6]), torch.float32, tensor(0.6000))
    """
    with _opened(file) as image:
        if image.mode not in SHALLOW:
            raise ImageError(
                f"images must have 8 bits per channel; got one of mode {image.mode!r}"
            )
        pixels, grey = _shallow(image)
        return _picture(pixels, grey, 8, _orientation(image), None).colour


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"reading and writing images needs Pillow: {install('cli')}") from error
    return Image


@contextlib.contextmanager
def at_most(pixels: int | None) -> Iterator[None]:
    r"""Sets how many pixels the pictures may have that are read: Pillow's limit, which holds for
    the process.

    Arguments:
        pixels: The number, rounded up to an even one; :py:`None` leaves the limit as it is.

    Raises:
        ImportError: If Pillow is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "ramp.png"
        >>> write(path, Picture(torch.zeros(3, 40, 60)))
        >>> with at_most(1000):
        ...     read(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        flowguard.io.pictures.ImageError: it has 2400 pixels, and at most 1000 are read; ...
    """
    Image = _pillow()
    before = Image.MAX_IMAGE_PIXELS
    try:
        if pixels is not None:
            Image.MAX_IMAGE_PIXELS = -(-pixels // 2)  # twice as many are read
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _opened(file: Any) -> Any:
    r"""A picture that Pillow opened, which decodes nothing yet."""
    Image = _pillow()
    try:
        return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise _too_large(int(count[0]) if count else 0) from None


def _too_large(count: int) -> ImageError:
    return ImageError(
        f"it has {count} pixels, and at most {2 * _pillow().MAX_IMAGE_PIXELS} are read; if you"
        " trust it, raise the limit by --max-pixels, or in Python PIL.Image.MAX_IMAGE_PIXELS,"
        " which is half of it"
    )


def _kind(image: Any) -> tuple[bool, int]:
    r"""Whether a picture is grey, and the bits of its channels, by its header."""
    mode = image.mode
    if image.format == "PNG" and image.tile and image.tile[0][3] in DEEP_PNG:
        return image.tile[0][3] == "LA;16B", 16
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
        return True, 16
    _refuse_odd(mode)
    return mode in GREYS, 8


def _refuse_odd(mode: str) -> None:
    if mode not in SHALLOW:
        raise ImageError(f"pictures must have 8 or 16 bits per channel; got the mode {mode!r}")


def _read(image: Any) -> tuple[Array, bool, int, int, bytes | None]:
    deep = _deep_png(image) if image.format == "PNG" else None
    mode = image.mode
    if deep is None and (mode.startswith("I;16") or (mode == "I" and image.format == "PNG")):
        deep = np.asarray(image).astype(np.uint16)[..., None]
    profile = image.info.get("icc_profile") if mode not in ("CMYK", "YCbCr") else None
    if deep is None:
        pixels, grey = _shallow(image)
        return pixels, grey, 8, _orientation(image), profile
    if "transparency" in image.info and deep.shape[-1] in (1, 3):
        opaque = (deep != np.asarray(image.info["transparency"])).any(-1, keepdims=True)
        deep = np.concatenate((deep, np.where(opaque, 65535, 0).astype(np.uint16)), -1)
    return deep, deep.shape[-1] < 3, 16, _orientation(image), profile


def _picture(pixels: Array, grey: bool, bits: int, orientation: int, icc: bytes | None) -> Picture:
    r"""A picture of whole numbers with shape (H, W, channels)."""
    peak, planes = 2**bits - 1, np.empty((pixels.shape[-1], *pixels.shape[:-1]), np.float32)
    np.divide(np.moveaxis(pixels, -1, 0), peak, out=planes, dtype=np.float32)
    exact = torch.from_numpy(np.ascontiguousarray(_upright(planes, orientation)))
    count = 1 if grey else 3
    alpha = exact[count:] if len(exact) > count else None
    return Picture(exact[:count].expand(3, -1, -1).contiguous(), alpha, grey, bits, icc)


def _shallow(image: Any) -> tuple[Array, bool]:
    r"""The pixels of a picture of 8 bits, and whether it is grey."""
    mode = image.mode
    _refuse_odd(mode)
    grey = mode in GREYS
    alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    wanted = ("LA" if alpha else "L") if grey else ("RGBA" if alpha else "RGB")
    if wanted == "LA" and mode != "LA":  # Pillow goes there by way of RGBA only
        image = image.convert("LA" if mode == "La" else "RGBA")
    pixels = np.asarray(image.convert(wanted))
    return pixels if pixels.ndim == 3 else pixels[..., None], grey


def _deep_png(image: Any) -> Array | None:
    r"""The pixels of a PNG of 16 bits in colour or with alpha, of which Pillow has but the upper
    bytes: the same stream is read once more for the lower ones."""
    kind = image.tile[0][3] if image.tile else None
    if kind not in DEEP_PNG:
        return None
    with _pillow().open(image.filename) as again:
        # Little-endian unpacking takes the second byte. For grey with alpha there is no such
        # unpacking, but its four bytes are those of RGBA.
        low = "RGBA" if kind == "LA;16B" else kind.replace("16B", "16L")
        again.tile = [(*again.tile[0][:3], low)]
        lower = np.asarray(again).astype(np.uint16)
    if kind == "LA;16B":
        image.load()  # checks what the stream ends with
        return lower[..., 0::2] * 256 + lower[..., 1::2]
    return np.asarray(image).astype(np.uint16) * 256 + lower


def _is_tiff(path: str | os.PathLike[str]) -> bool:
    with Path(path).open("rb") as stream:
        return stream.read(4) in TIFFS


def _is_deep_tiff(path: Path) -> bool:
    r"""Whether it is a TIFF of more than 8 bits: Pillow keeps 8 of them, or knows it not at all."""
    if not _is_tiff(path):
        return False
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(f"TIFF needs tifffile: {install('cli')}") from error
    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        return bool(page.bitspersample > 8)


def _deep_tiff_page(file: Any) -> tuple[Any, int]:
    r"""The only page of a TIFF of 16 bits, and its channels but for the opacity.

    All of this is known before anything is decoded."""
    if len(file.pages) > 1:
        raise ImageError(f"it holds {len(file.pages)} pictures, not one")
    page: Any = file.pages[0]
    axes, kind = page.axes, page.photometric.name
    channels = {"MINISWHITE": 1, "MINISBLACK": 1, "RGB": 3}.get(kind, 0)
    if page.dtype != np.uint16:
        raise ImageError(f"pictures must have 8 or 16 bits per channel; got {page.dtype}")
    count = {"YX": 1, "YXS": page.shape[-1], "SYX": page.shape[0]}.get(axes)
    if not channels or count not in (channels, channels + 1):
        raise ImageError(f"a TIFF of 16 bits must be grey or RGB; got {kind} {axes}")
    most = _pillow().MAX_IMAGE_PIXELS
    if most is not None and page.imagewidth * page.imagelength > 2 * most:
        raise _too_large(page.imagewidth * page.imagelength)
    return page, channels


def _deep_tiff_header(path: Path) -> tuple[int, int, bool, int]:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page, channels = _deep_tiff_page(file)
        orientation = int(page.tags.valueof(ORIENTATION, default=1))
        return page.imagelength, page.imagewidth, channels == 1, orientation


def _deep_tiff(path: Path) -> tuple[Array, bool, int, int, bytes | None]:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page, channels = _deep_tiff_page(file)
        axes, kind = page.axes, page.photometric.name
        extra = [int(e) for e in page.extrasamples]
        pixels = page.asarray()
        orientation = int(page.tags.valueof(ORIENTATION, default=1))
        profile = page.iccprofile
    if axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    elif axes == "YX":
        pixels = pixels[..., None]
    if kind == "MINISWHITE":
        pixels = np.concatenate((65535 - pixels[..., :1], pixels[..., 1:]), -1)
    if extra == [1] and pixels.shape[-1] > channels:  # colours were multiplied by the opacity
        opacity = np.maximum(pixels[..., channels:], 1) / 65535
        colours = np.minimum(pixels[..., :channels] / opacity, 65535).round().astype(np.uint16)
        pixels = np.concatenate((colours, pixels[..., channels:]), -1)
    return pixels, channels == 1, 16, orientation, profile


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing
        return 1


def _upright(planes: Array, orientation: int) -> Array:
    r"""A view of pixels with shape (channels, H, W), turned as the orientation says."""
    if orientation in TURNED:
        planes = planes.swapaxes(-1, -2)
    if orientation in (2, 3, 6, 7):
        planes = planes[..., ::-1]
    if orientation in (3, 4, 7, 8):
        planes = planes[..., ::-1, :]
    return planes


def shown(image: Tensor) -> Tensor:
    r"""Returns an image as it can be shown: values beyond [0, 1] are cut, NaN is black.

    Arguments:
        image: The image, of any shape, floating point.

    Example:
        >>> shown(torch.tensor([-0.5, 0.25, torch.inf, torch.nan]))
        tensor([0.0000, 0.2500, 1.0000, 0.0000])
    """
    return torch.nan_to_num(image, nan=0.0).clamp(0, 1)


def whole_numbers(image: Tensor, bits: int = 8) -> Tensor:
    r"""Returns the whole numbers that an image is stored as, in the dtype that it has.

    Arguments:
        image: The image in :math:`[0, 1]`, of any shape, floating point; see :func:`shown` for
            what lies beyond.
        bits: The bits of each number.

    Example:
        >>> whole_numbers(torch.tensor([-0.2, 0.5, 1.2, torch.nan]))
        tensor([  0., 128., 255.,   0.])
    """
    return (shown(image) * (2**bits - 1)).round()


def to_uint8(image: Tensor) -> Array:
    r"""Returns an image as an array of bytes, as Pillow and matplotlib take it.

    Arguments:
        image: The image in :math:`[0, 1]`, with shape :math:`(C, H, W)`; see :func:`shown` for
            what lies beyond.

    Returns:
        The bytes, ``uint8`` with shape :math:`(H, W, C)`.

    Example:
        >>> to_uint8(torch.full((3, 2, 4), 0.5)).shape
        (2, 4, 3)
    """
    levels = whole_numbers(image.detach().float().cpu())
    return levels.to(torch.uint8).movedim(0, -1).numpy()


STRIP = 256  # rows that are made into whole numbers at a time: large pictures fill the memory


def _levels(picture: Picture) -> Array:
    r"""The whole numbers of a picture, with shape (H, W, channels)."""
    height, width = picture.colour.shape[-2:]
    count = (1 if picture.grey else 3) + (picture.alpha is not None)
    kind = np.uint16 if picture.bits == 16 else np.uint8
    whole = np.empty((height, width, count), dtype=kind)
    for top in range(0, height, STRIP):
        rows = slice(top, top + STRIP)
        colour = picture.colour[:, rows].detach().float().cpu()
        if picture.grey:
            colour = (shown(colour) * colour.new_tensor(GREY).reshape(3, 1, 1)).sum(
                0, keepdim=True
            )
        parts = [colour]
        if picture.alpha is not None:
            parts.append(picture.alpha[:, rows].detach().float().cpu())
        levels = whole_numbers(torch.cat(parts), picture.bits)
        whole[rows] = levels.movedim(0, -1).numpy().astype(kind)
    return whole


def write(path: str | os.PathLike[str], picture: Picture, *, note: str = "") -> None:
    r"""Writes a picture, whole or not at all. Values beyond [0, 1] are cut, NaN is black.

    Arguments:
        path: The file, whose name ends in ``.png``, ``.tif`` or ``.tiff``.
        picture: The picture.
        note: A line of ASCII that the file keeps of what made it; see :func:`note_of`.

    Raises:
        ImportError: If Pillow, or for a TIFF tifffile, is not installed.
        ValueError: If the name ends in something else.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "ramp.png"
        >>> write(path, Picture(torch.tensor([-0.5, 0.5, torch.nan]).expand(3, 1, 3)), note="by hand")
        >>> read_image(path)[0]
        tensor([[0.0000, 0.5020, 0.0000]])
        >>> note_of(path)
        'by hand'
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".tif", ".tiff"):
        raise ValueError(f"pictures are written as .png, .tif or .tiff; got {path.name}")
    pixels = _levels(picture)
    with atomic(path) as temporary:
        if suffix != ".png":
            _write_tiff(temporary, pixels, picture, note)
        elif picture.bits == 16:
            temporary.write_bytes(png16(pixels, picture.icc, note))
        else:
            _write_png(temporary, pixels, picture, note)


def note_of(path: str | os.PathLike[str]) -> str:
    r"""Returns the note that :func:`write` left in a picture, or what else it calls its software;
    nothing if there is none, or neither a PNG nor a TIFF.

    Arguments:
        path: The file. Of its pixels nothing is read, so that it may have any number of them.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "ramp.png"
        >>> write(path, Picture(torch.zeros(3, 4, 6)))
        >>> note_of(path)
        ''
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if _is_tiff(path):
                import tifffile

                with tifffile.TiffFile(path) as file:
                    return str(file.pages[0].software)  # type: ignore[union-attr]
            from PIL.PngImagePlugin import PngImageFile

            # Not by `Image.open`: what is made may have more pixels than are read.
            with PngImageFile(os.fspath(path)) as image:
                return str(image.info.get(SOFTWARE, ""))
    except Exception:  # a broken file makes Pillow raise nearly anything
        return ""


def _write_png(path: Path, pixels: Array, picture: Picture, note: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    plain = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    options: dict[str, Any] = {"icc_profile": picture.icc} if picture.icc else {}
    if note:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(SOFTWARE, note)
    _pillow().fromarray(plain).save(path, format="PNG", **options)


def _write_tiff(path: Path, pixels: Array, picture: Picture, note: str) -> None:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(f"writing TIFF needs tifffile: {install('cli')}") from error
    alone = pixels.shape[-1] == 1
    tifffile.imwrite(
        path,
        pixels[..., 0] if alone else pixels,
        photometric="minisblack" if picture.grey else "rgb",
        planarconfig=None if alone else "contig",
        extrasamples=None if picture.alpha is None else ["unassalpha"],
        compression="zlib",
        iccprofile=picture.icc,
        software=note,
        metadata=None,
    )


def png16(pixels: Array, icc: bytes | None = None, note: str = "") -> bytes:
    r"""Returns a PNG of 16 bits, which Pillow cannot write in colour.

    Arguments:
        pixels: The pixels, ``uint16`` with shape :math:`(H, W, C)`, C from 1 to 4.
        icc: The colour profile.
        note: A line of ASCII; see :func:`write`.

    Example:
        >>> import io
        >>> import numpy as np
        >>> from PIL import Image
        >>> data = png16(np.full((4, 6, 1), 1000, dtype=np.uint16))
        >>> int(np.asarray(Image.open(io.BytesIO(data)))[0, 0])
        1000
    """
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    # Filter 2, the difference to the row above: whole arrays, and good for photographs.
    filtered = np.empty((height, 1 + rows.shape[1]), dtype=np.uint8)
    filtered[:, 0] = 2
    filtered[:1, 1:] = rows[:1]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    if icc:
        parts.append(_chunk(b"iCCP", b"icc\0\0" + zlib.compress(icc)))
    if note:
        parts.append(_chunk(b"tEXt", f"{SOFTWARE}\0{note}".encode("ascii")))
    parts += [_chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
