r"""Folders of pictures: what is in them, and crops of it, in little memory."""

__all__ = [
    "BUDGET",
    "Columns",
    "Fault",
    "PictureFiles",
    "Survey",
    "Unreadable",
    "find",
    "survey",
]

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowguard.io import pictures
from flowguard.io.pictures import Header, ImageError
from flowguard.io.shelf import Shelf

Array = np.ndarray[Any, Any]

#: The bytes of decoded pictures that are kept if nothing else is said.
BUDGET = 2 * 2**30


class Unreadable(OSError):
    r"""Raised when the system cannot read a picture that was there: its disk is gone, say.

    It is no fault of the picture, which may come back: whoever left it out would do other work.

    Example:
        Files that are gone after they were found are no smaller a folder: whoever asks is told.

        >>> import tempfile
        >>> from flowguard.io.pictures import Picture, write
        >>> folder = tempfile.TemporaryDirectory()
        >>> write(Path(folder.name) / "a.png", Picture(torch.full((3, 8, 12), 0.6)))
        >>> _ = (Path(folder.name) / "b.png").write_text("no picture")
        >>> files = PictureFiles([Path(folder.name) / "a.png"])
        >>> (Path(folder.name) / "a.png").unlink()
        >>> files.whole(0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        flowguard.io.folder.Unreadable: ...a.png: No such file or directory
    """


@dataclass(frozen=True)
class Fault:
    r"""A file that is left out, and why.

    Arguments:
        path: The file.
        reason: Why, in words.

    Example:
        >>> print(Fault(Path("b.png"), "it is a folder"))
        b.png: it is a folder
    """

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Survey:
    r"""The pictures that are of use, what their headers say, and the files that are not.

    Arguments:
        files: The pictures.
        headers: What the header of each says.
        faults: The files that are left out.

    Example:
        >>> import tempfile
        >>> from flowguard.io.pictures import Picture, write
        >>> folder = tempfile.TemporaryDirectory()
        >>> write(Path(folder.name) / "a.png", Picture(torch.full((3, 8, 12), 0.6)))
        >>> _ = (Path(folder.name) / "b.png").write_text("no picture")
        >>> found = survey(find(folder.name))
        >>> len(found.files), len(found.headers), len(found.faults)
        (1, 1, 1)
    """

    files: list[Path]
    headers: list[Header]
    faults: list[Fault]


def find(folder: str | os.PathLike[str]) -> list[Path]:
    r"""Returns the files of a folder, and of the folders in it, that are called like pictures.

    They are sorted by their path, so that the order is the same everywhere. Links are followed,
    each folder is entered once; what begins with a dot is left out.

    Arguments:
        folder: The folder.

    Raises:
        FileNotFoundError: If there is no such folder.

    Example:
        >>> import tempfile
        >>> from flowguard.io.pictures import Picture, write
        >>> folder = tempfile.TemporaryDirectory()
        >>> write(Path(folder.name) / "a.png", Picture(torch.full((3, 8, 12), 0.6)))
        >>> _ = (Path(folder.name) / "b.png").write_text("no picture")
        >>> [path.name for path in find(folder.name)]  # by their names: nothing is opened
        ['a.png', 'b.png']
    """
    top = Path(folder)
    if not top.is_dir():
        raise FileNotFoundError(f"there is no folder {top}")
    found: list[str] = []
    seen: set[str] = set()
    for here, inner, files in os.walk(top, followlinks=True):
        real = os.path.realpath(here)
        inner[:] = [] if real in seen else sorted(d for d in inner if not d.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        found += [
            os.path.join(here, name)
            for name in files
            if name.lower().endswith(pictures.SUFFIXES) and not name.startswith(".")
        ]
    return sorted(Path(f) for f in found)


def survey(files: Iterable[Path], *, rows: int = 1, columns: int = 1) -> Survey:
    r"""Reads the headers of pictures, of which nothing is decoded.

    Arguments:
        files: The files.
        rows: The rows that a picture must have.
        columns: The columns that a picture must have.

    Returns:
        The pictures that can be used, and those that cannot, each with the reason.

    Example:
        >>> import tempfile
        >>> from flowguard.io.pictures import Picture, write
        >>> folder = tempfile.TemporaryDirectory()
        >>> write(Path(folder.name) / "a.png", Picture(torch.full((3, 8, 12), 0.6)))
        >>> _ = (Path(folder.name) / "b.png").write_text("no picture")
        >>> found = survey(find(folder.name))
        >>> [path.name for path in found.files], found.headers[0].shape
        (['a.png'], (3, 8, 12))
        >>> found.faults[0].reason
        'it is no picture, or of an unknown kind'
        >>> survey(found.files, rows=16).faults[0].reason
        'it is smaller than 16 × 1: 8 × 12'
    """
    good: list[Path] = []
    headers: list[Header] = []
    faults = []
    for file in files:
        try:
            header = pictures.header(file)
        except ImageError as error:
            faults.append(Fault(file, str(error)))
            continue
        if header.height < rows or header.width < columns:
            size = f"{header.height} × {header.width}"
            reason = f"it is smaller than {rows} × {columns}: {size}"
            faults.append(Fault(file, reason))
            continue
        good.append(file)
        headers.append(header)
    return Survey(good, headers, faults)


class PictureFiles:
    r"""Creates a source of crops of pictures in files.

    A picture is decoded when it is first asked for, and kept as whole numbers of 8 or 16 bits as
    long as there is room; others are read again each time. The memory is shared with the processes
    of a loader, see :class:`flowguard.io.shelf.Shelf`.

    Arguments:
        files: The files.
        headers: What their headers say; read if they are not given.
        budget: The bytes of decoded pictures that are kept.

    Attributes:
        sizes: The rows and columns of each picture.

    Raises:
        ImageError: If the header of a file cannot be read.
        ValueError: If the budget is negative.

    Example:
        >>> import tempfile
        >>> from flowguard.io.pictures import Picture, write
        >>> folder = tempfile.TemporaryDirectory()
        >>> write(Path(folder.name) / "a.png", Picture(torch.full((3, 8, 12), 0.6)))
        >>> _ = (Path(folder.name) / "b.png").write_text("no picture")
        >>> files = PictureFiles(survey(find(folder.name)).files)
        >>> files.sizes, files.bytes
        ([(8, 12)], 288)
        >>> files.window(0, top=2, left=4, height=4, width=4).shape
        torch.Size([3, 4, 4])
    """

    def __init__(
        self,
        files: Sequence[Path],
        headers: Sequence[Header] | None = None,
        *,
        budget: int = BUDGET,
    ) -> None:
        self.files = list(files)
        self.headers = [pictures.header(f) for f in files] if headers is None else list(headers)
        kinds = [np.uint16 if h.bits == 16 else np.uint8 for h in self.headers]
        self.sizes = [(h.height, h.width) for h in self.headers]
        self._shelf = Shelf([h.shape for h in self.headers], kinds, budget=budget)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def bytes(self) -> int:
        r"""How many bytes all pictures take, decoded."""
        return sum(int(np.prod(h.shape)) * h.bits // 8 for h in self.headers)

    def whole(self, index: int) -> Array:
        r"""Returns the whole numbers of a picture.

        Arguments:
            index: The number of the picture.

        Returns:
            The numbers, ``uint8`` or ``uint16`` with shape :math:`(C, H, W)`, one channel for a
            grey picture and three for another, which must not be written to.

        Raises:
            ImageError: If the file cannot be decoded, or is not what its header said. A warning
                names it the first time; then it is among :meth:`broken`.
            Unreadable: If the system cannot read the file. It is asked again the next time.
        """
        found = self._shelf.get(index)
        if found is not None:
            return found
        if self._shelf.refused(index):
            raise ImageError("it could not be read before")
        try:
            levels = pictures.levels(self.files[index])
            try:
                self._shelf.put(index, levels)
            except ValueError as error:
                raise ImageError(f"it is not what its header said: {error}") from None
        except ImageError as error:
            cause = error.__cause__
            # Pillow's own errors of broken files have no number.
            if isinstance(cause, OSError) and cause.errno is not None:
                told = f"{self.files[index]}: {os.strerror(cause.errno)}"
                raise Unreadable(told) from cause
            if self._shelf.refuse(index):
                warnings.warn(f"left out: {self.files[index]}: {error}", stacklevel=2)
            raise
        return levels

    def window(self, index: int, top: int, left: int, height: int, width: int) -> Tensor:
        r"""Returns a part of a picture.

        Arguments:
            index: The number of the picture.
            top: The first row.
            left: The first column.
            height: The rows.
            width: The columns.

        Returns:
            The colours in :math:`[0, 1]`, float32 with shape :math:`(3, H, W)`.

        Raises:
            ImageError: If the file cannot be decoded; see :meth:`whole`.
            Unreadable: If the system cannot read the file.
        """
        levels = self.whole(index)[:, top : top + height, left : left + width]
        peak = 2 ** self.headers[index].bits - 1
        exact = torch.from_numpy(np.divide(levels, peak, dtype=np.float32))
        return exact.expand(3, -1, -1)

    def broken(self) -> list[int]:
        r"""Returns the numbers of the pictures that this process or its children could not
        decode."""
        return self._shelf.all_refused()


class Columns(PictureFiles):
    r"""Creates a source of the same columns of all pictures of another, whose memory it shares.

    Arguments:
        source: The other source.
        first: The share of the columns before the first one.
        last: The share of the columns up to the last one.
        numbers: The numbers of the pictures that are taken; all if there are none.

    Example:
        The last quarter of each picture, to look at what was not learned from:

        >>> import tempfile
        >>> from flowguard.io.pictures import Picture, write
        >>> folder = tempfile.TemporaryDirectory()
        >>> write(Path(folder.name) / "a.png", Picture(torch.full((3, 8, 12), 0.6)))
        >>> _ = (Path(folder.name) / "b.png").write_text("no picture")
        >>> rest = Columns(PictureFiles(survey(find(folder.name)).files), first=0.75)
        >>> rest.sizes, rest.whole(0).shape
        ([(8, 3)], (3, 8, 3))
    """

    def __init__(
        self,
        source: PictureFiles,
        first: float = 0.0,
        last: float = 1.0,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.source = source
        self.numbers = list(range(len(source)) if numbers is None else numbers)
        self.files = [source.files[i] for i in self.numbers]
        whole = [source.headers[i] for i in self.numbers]
        self._spans = [(int(first * h.width), int(last * h.width)) for h in whole]
        self.headers = [
            replace(h, width=b - a) for h, (a, b) in zip(whole, self._spans, strict=True)
        ]
        self.sizes = [(h.height, h.width) for h in self.headers]

    def whole(self, index: int) -> Array:
        r"""Returns the whole numbers of the columns of a picture.

        Arguments:
            index: The number of the picture.
        """
        return self.source.whole(self.numbers[index])[:, :, slice(*self._spans[index])]

    def broken(self) -> list[int]:
        r"""Returns the numbers of the pictures that could not be decoded."""
        lost = set(self.source.broken())
        return [i for i, number in enumerate(self.numbers) if number in lost]
