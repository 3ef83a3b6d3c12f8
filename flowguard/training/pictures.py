r"""Batches of crops of pictures in folders: each is a function of the seed and its number."""

__all__ = [
    "BRIGHTEST",
    "DARKEST",
    "CropBatches",
    "DarkPairs",
    "DarkenedPairs",
    "FilePairs",
    "Matched",
    "Pair",
    "Pairs",
    "ReducedPairs",
    "Undecodable",
    "match",
    "own_partners",
    "pairs_of",
]

import abc
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowguard import data, metrics
from flowguard.io.folder import BUDGET, Fault, PictureFiles, find, survey
from flowguard.io.pictures import ImageError
from flowguard.models.encoders.lowlight import equalization, low_light_input
from flowguard.training.corrupt import corrupted

Array = np.ndarray[Any, Any]
#: A target and its condition, each with shape :math:`(3, H, W)`.
Pair = tuple[Tensor, Tensor]

#: The pixels of the condition that its reduction looks at beyond a crop: the cubic kernel reaches
#: two of them to each side of a centre.
MARGIN = 2
#: The exposures of dark photographs, as shares of that of the bright one: of light, not of sRGB.
DARKEST, BRIGHTEST = 1 / 24, 1 / 12
#: The pixels of a picture, about, that tell the histogram of its dark shot.
SHEET = 2**14
#: What ends the names of the two pictures of a pair, which are the same but for it.
MARKS = re.compile(r"(?<=.)(?:[_-]?(?:HR|LR))?(?:[_-]?x\d+)?$", re.IGNORECASE)


class Undecodable(ValueError):
    r"""Raised when no picture is left that can be decoded."""


class Pairs(abc.ABC):
    r"""A source of aligned crops of targets and conditions.

    A crop is made in two parts, so that those of a batch can be finished together: :meth:`fetch`
    and :meth:`finish`.

    Attributes:
        scale: How many times larger a target is than its condition.
        prepares: Whether :meth:`fetch` gives target and condition as pictures, and :meth:`finish`
            prepares the latter for an encoder; else :meth:`finish` gives both as pictures.
        sizes: The rows and columns of each condition.
        sources: The files that the pairs are made of.
    """

    scale: int
    prepares: bool = False
    sizes: list[tuple[int, int]]
    sources: list[PictureFiles]

    @abc.abstractmethod
    def fetch(
        self, index: int, top: int, left: int, size: int, rng: np.random.Generator
    ) -> tuple[Any, ...]:
        r"""Returns what a crop is made of.

        Arguments:
            index: The number of the pair.
            top: The first row of the condition's crop.
            left: Its first column.
            size: Its rows and columns.
            rng: The source of all that is random.

        Raises:
            ImageError: If the pictures cannot be read.
        """

    @abc.abstractmethod
    def finish(self, fetched: Sequence[tuple[Any, ...]]) -> list[Pair]:
        r"""Returns the crops, with shapes :math:`(3, sH, sW)` and :math:`(C, H, W)`.

        Arguments:
            fetched: What :meth:`fetch` returned for each.
        """

    @abc.abstractmethod
    def whole(self, index: int, rng: np.random.Generator) -> Pair:
        r"""Returns a whole pair, with shapes :math:`(3, sH, sW)` and :math:`(C, H, W)`.

        Arguments:
            index: The number of the pair.
            rng: The source of all that is random.

        Raises:
            ImageError: If the pictures cannot be read.
        """

    def broken(self) -> list[Path]:
        r"""Returns the files that were found to be corrupt, by this process or its workers."""
        return [source.files[i] for source in self.sources for i in source.broken()]

    def usable(self) -> bool:
        r"""Returns whether there is a pair of which no file is known to be corrupt."""
        return len(self.lost()) < len(self.sizes)

    def lost(self) -> set[int]:
        r"""Returns the numbers of the pairs of which a file is known to be corrupt."""
        return {i for source in self.sources for i in source.broken()}


def _float(levels: Array) -> Tensor:
    r"""Colours in [0, 1], with shape (3, H, W), of whole numbers."""
    peak = np.iinfo(levels.dtype).max
    return torch.from_numpy(np.divide(levels, peak, dtype=np.float32)).expand(3, -1, -1)


def _reduced(levels: Array, scale: int) -> Tensor:
    r"""Pictures of shape (*, C, sH, sW) made smaller as MATLAB makes them: in 8 bits, those of
    8 bits are rounded as a file would hold them."""
    if levels.dtype == np.uint8:
        small = metrics.imresize(torch.from_numpy(levels), 1 / scale)
        return small.float() / 255
    wide = torch.from_numpy(levels.astype(np.float64) / np.iinfo(levels.dtype).max)
    return metrics.imresize(wide, 1 / scale).clamp(0, 1).float()


class ReducedPairs(Pairs):
    r"""Creates pairs of pictures and their reduced versions, which are made as they are asked for,
    by the bicubic interpolation of MATLAB.

    A crop's condition is what a crop of the whole picture's condition is, border and all.

    Arguments:
        files: The pictures. Rows and columns beyond a multiple of the scale are left out.
        scale: The factor.
    """

    def __init__(self, files: PictureFiles, scale: int) -> None:
        self.files, self.scale, self.sources = files, scale, [files]
        self.sizes = [(h // scale, w // scale) for h, w in files.sizes]

    def fetch(
        self, index: int, top: int, left: int, size: int, rng: np.random.Generator
    ) -> tuple[Array, int, int, int]:
        s, (height, width) = self.scale, self.sizes[index]
        first = max(0, top - MARGIN), max(0, left - MARGIN)
        last = min(height, top + size + MARGIN), min(width, left + size + MARGIN)
        levels = self.files.whole(index)
        window = levels[:, s * first[0] : s * last[0], s * first[1] : s * last[1]]
        return window.copy(), top - first[0], left - first[1], size

    def finish(self, fetched: Sequence[tuple[Array, int, int, int]]) -> list[Pair]:
        # Most windows have the same shape, and are reduced at once.
        alike = defaultdict(list)
        for i, (window, *_) in enumerate(fetched):
            alike[window.shape, window.dtype].append(i)
        small: dict[int, Tensor] = {}
        for rows in alike.values():
            made = _reduced(np.stack([fetched[i][0] for i in rows]), self.scale)
            small |= dict(zip(rows, made, strict=True))
        return [self._cut(*what, small[i]) for i, what in enumerate(fetched)]

    def _cut(self, window: Array, top: int, left: int, size: int, small: Tensor) -> Pair:
        s = self.scale
        target = window[:, s * top : s * (top + size), s * left : s * (left + size)]
        condition = small[:, top : top + size, left : left + size]
        return _float(target), condition.expand(3, -1, -1)

    def whole(self, index: int, rng: np.random.Generator) -> Pair:
        h, w = (n * self.scale for n in self.sizes[index])
        levels = self.files.whole(index)[:, :h, :w].copy()
        return _float(levels), _reduced(levels, self.scale).expand(3, -1, -1)


class FilePairs(Pairs):
    r"""Creates pairs of pictures of two folders.

    Arguments:
        targets: The targets.
        conditions: Their conditions, in the same order. Where a target is larger than `scale`
            times its condition, by less than the scale, the rest is left out.
        scale: The factor.

    Raises:
        ValueError: If there are not as many of both.
    """

    def __init__(self, targets: PictureFiles, conditions: PictureFiles, scale: int = 1) -> None:
        if len(targets) != len(conditions):
            raise ValueError(
                "there must be as many conditions as targets;"
                f" got {len(conditions)} and {len(targets)}"
            )
        self.targets, self.conditions, self.scale = targets, conditions, scale
        self.sources = [targets, conditions]
        both = zip(targets.sizes, conditions.sizes, strict=True)
        self.sizes = [(min(x[0] // scale, y[0]), min(x[1] // scale, y[1])) for x, y in both]

    def fetch(
        self, index: int, top: int, left: int, size: int, rng: np.random.Generator
    ) -> tuple[Any, ...]:
        s = self.scale
        target = self.targets.window(index, s * top, s * left, s * size, s * size)
        return target, self.conditions.window(index, top, left, size, size)

    def finish(self, fetched: Sequence[tuple[Any, ...]]) -> list[Pair]:
        return [(target, condition) for target, condition in fetched]

    def whole(self, index: int, rng: np.random.Generator) -> Pair:
        height, width = self.sizes[index]
        s = self.scale
        target = self.targets.window(index, 0, 0, s * height, s * width)
        return target, self.conditions.window(index, 0, 0, height, width)


class _Equalised(Pairs):
    r"""Pairs whose conditions are fetched dark, each with the table that it is equalised by."""

    prepares = True

    def finish(self, fetched: Sequence[tuple[Any, ...]]) -> list[Pair]:
        targets, dark, tables = zip(*fetched, strict=True)
        return list(
            zip(targets, low_light_input(torch.stack(dark), torch.stack(tables)), strict=True)
        )


class DarkPairs(_Equalised, FilePairs):
    r"""Creates pairs of bright photographs and dark ones, prepared as the low-light encoder is fed;
    see :func:`flowguard.models.encoders.lowlight.low_light_input`.

    Each crop is equalised by the histogram of its whole photograph.

    Arguments:
        targets: The bright photographs.
        conditions: The dark ones, in the same order.
    """

    def __init__(self, targets: PictureFiles, conditions: PictureFiles) -> None:
        super().__init__(targets, conditions)
        self._tables: dict[int, Array] = {}  # as bytes: 768 of them for each photograph

    def _table(self, index: int) -> Tensor:
        if index not in self._tables:
            height, width = self.sizes[index]
            levels = self.conditions.whole(index)[:, :height, :width]
            if levels.dtype != np.uint8:
                levels = np.rint(levels * (255 / np.iinfo(levels.dtype).max))
            table = equalization(torch.from_numpy(levels.astype(np.int64)).flatten(1))
            self._tables[index] = table.expand(3, -1).to(torch.uint8).numpy()
        return torch.from_numpy(self._tables[index]).float()

    def fetch(
        self, index: int, top: int, left: int, size: int, rng: np.random.Generator
    ) -> tuple[Any, ...]:
        target, dark = super().fetch(index, top, left, size, rng)
        return target, dark, self._table(index)

    def whole(self, index: int, rng: np.random.Generator) -> Pair:
        target, dark = super().whole(index, rng)
        return target, low_light_input(dark[None])[0]


class DarkenedPairs(_Equalised):
    r"""Creates pairs of photographs and dark shots of them, which a model of a camera takes as they
    are asked for, prepared as the low-light encoder is fed; see :func:`flowguard.data.expose`.

    Each shot has an exposure and a noise of its own. A crop is equalised by the histogram of a
    dark shot of pixels all over the picture.

    Arguments:
        files: The bright photographs.
        darkest: The least exposure, as a share of that of the photograph.
        brightest: The greatest.
    """

    scale = 1

    def __init__(
        self, files: PictureFiles, *, darkest: float = DARKEST, brightest: float = BRIGHTEST
    ) -> None:
        self.files, self.darkest, self.brightest = files, darkest, brightest
        self.sizes, self.sources = files.sizes, [files]

    def _camera(self, rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
        exposure = self.darkest * (self.brightest / self.darkest) ** float(rng.random())
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return lambda image: data.expose(image, exposure, generator)

    def fetch(
        self, index: int, top: int, left: int, size: int, rng: np.random.Generator
    ) -> tuple[Any, ...]:
        target = self.files.window(index, top, left, size, size)
        levels = self.files.whole(index)
        every = max(1, int((levels[0].size / SHEET) ** 0.5))
        shot = self._camera(rng)
        sheet = (255 * shot(_float(levels[:, ::every, ::every]))).round().long()
        return target, shot(target), equalization(sheet.flatten(1))

    def whole(self, index: int, rng: np.random.Generator) -> Pair:
        target = _float(self.files.whole(index))
        return target, low_light_input(self._camera(rng)(target)[None])[0]


@dataclass(frozen=True)
class Matched:
    r"""Pictures of two folders that belong together, and those that have no partner."""

    pairs: list[tuple[Path, Path]]
    faults: list[Fault]


def match(targets: str | Path, conditions: str | Path) -> Matched:
    r"""Matches the pictures of two folders by their names.

    Names are paths within the folder, without their suffix; those that have no partner are
    compared without ``HR``, ``LR``, ``x4`` and the like at their ends too: ``a/0001.png`` goes
    with ``a/0001.jpg``, ``a/0001x4.png`` or ``a/0001_LRx4.png``. If one folder holds both, as
    ``NAME_HR`` and ``NAME_LRx4``, give it twice.

    Arguments:
        targets: The folder of targets.
        conditions: The folder of conditions.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    here, there = Path(targets), Path(conditions)
    wanted, given = find(here), find(there)
    if here.resolve() == there.resolve():
        given = [f for f in wanted if re.search(r"[_-]LR(?:[_-]?x\d+)?$", f.stem, re.IGNORECASE)]
        wanted = [f for f in wanted if f not in set(given)]
    lonely, free = _named(wanted, here, str), _named(given, there, str)
    pairs = _take(lonely, free)
    plain = lambda name: MARKS.sub("", name)  # noqa: E731
    rest = _named([f for fs in lonely.values() for f in fs], here, plain)
    others = _named([f for fs in free.values() for f in fs], there, plain)
    pairs += _take(rest, others)
    faults = []
    for left, partners, folder in ((rest, others, there), (others, rest, here)):
        for name, files in left.items():
            reason = f"there is no picture of that name in {folder}"
            if len(files) > 1 or len(partners.get(name, ())) > 1:
                reason = f"several pictures are called {name}"
            faults += [Fault(file, reason) for file in files]
    return Matched(sorted(pairs), sorted(faults, key=lambda fault: fault.path))


def own_partners(folder: str | Path) -> str | Path | None:
    r"""Returns the folder itself where it holds both pictures of its pairs, as ``NAME_HR`` and
    ``NAME_LRx4``, and :py:`None` otherwise.

    Arguments:
        folder: The folder.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    return folder if any(file.stem.endswith("_HR") for file in find(folder)) else None


def _named(
    files: Sequence[Path], folder: Path, name: Callable[[str], str]
) -> dict[str, list[Path]]:
    found = defaultdict(list)
    for file in files:
        found[name(file.relative_to(folder).with_suffix("").as_posix())].append(file)
    return dict(found)


def _take(first: dict[str, list[Path]], second: dict[str, list[Path]]) -> list[tuple[Path, Path]]:
    r"""Takes out the pairs of one file each."""
    names = [n for n, files in first.items() if len(files) == len(second.get(n, ())) == 1]
    return [(first.pop(name)[0], second.pop(name)[0]) for name in names]


def pairs_of(
    folder: str | Path,
    *,
    task: str = "superres",
    scale: int = 1,
    crop: int,
    pairs: str | Path | None = None,
    budget: int = BUDGET,
) -> tuple[Pairs, list[Fault]]:
    r"""Returns the pairs that a model is trained on, and the files that are left out.

    Nothing is decoded yet: files whose body is corrupt are found, named and skipped in training.

    Arguments:
        folder: The folder of targets.
        task: ``"superres"``, whose conditions are reduced targets, or ``"lowlight"``, whose
            conditions are dark shots of them.
        scale: The factor of super-resolution.
        crop: The rows and columns of a target's crop: smaller pictures are left out.
        pairs: The folder of conditions, see :func:`match`; they are made of the targets if there
            is none.
        budget: The bytes of decoded pictures that are kept in memory.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If no picture can be used, or the crop is no multiple of the scale.
    """
    if task not in ("superres", "lowlight"):
        raise ValueError(f"task must be superres or lowlight; got {task!r}")
    if crop < 1 or crop % scale:
        raise ValueError(f"crop must be a multiple of the scale {scale}; got {crop}")
    if pairs is not None:
        return _pairs_of_two(Path(folder), Path(pairs), task, scale, crop, budget)
    found = survey(find(folder), rows=crop, columns=crop)
    _need(len(found.files), found.faults, f"a picture of at least {crop} rows and columns", folder)
    files = PictureFiles(found.files, found.headers, budget=budget)
    if task == "lowlight":
        return DarkenedPairs(files), found.faults
    return ReducedPairs(files, scale), found.faults


def _pairs_of_two(
    folder: Path, pairs: Path, task: str, scale: int, crop: int, budget: int
) -> tuple[Pairs, list[Fault]]:
    matched = match(folder, pairs)
    targets = survey([x for x, _ in matched.pairs], rows=crop, columns=crop)
    conditions = survey([y for _, y in matched.pairs])
    faults = [*matched.faults, *targets.faults, *conditions.faults]
    large = dict(zip(targets.files, targets.headers, strict=True))
    small = dict(zip(conditions.files, conditions.headers, strict=True))
    kept = []
    for x, y in matched.pairs:
        if x not in large or y not in small:
            continue
        size, part = ((h.height, h.width) for h in (large[x], small[y]))
        if any(abs(a - scale * b) >= max(scale, 1) for a, b in zip(size, part, strict=True)):
            times = f"{scale} times as large as" if scale > 1 else "as large as"
            faults.append(Fault(x, f"it must be {times} {y.name}; got {size} and {part}"))
        elif min(size) // scale < crop // scale or min(part) < crop // scale:
            faults.append(Fault(y, f"it is smaller than a crop of {crop // scale}; got {part}"))
        else:
            kept.append((x, y))
    _need(len(kept), faults, f"pairs of pictures, of at least {crop} rows and columns", folder)
    share = _shares([large[x] for x, _ in kept], [small[y] for _, y in kept], budget)
    first, second = (
        PictureFiles(
            [pair[i] for pair in kept], [headers[pair[i]] for pair in kept], budget=share[i]
        )
        for i, headers in enumerate((large, small))
    )
    made = DarkPairs(first, second) if task == "lowlight" else FilePairs(first, second, scale)
    return made, faults


def _shares(first: Sequence[Any], second: Sequence[Any], budget: int) -> tuple[int, int]:
    r"""The budget, parted as the two take memory."""
    a, b = (sum(int(np.prod(h.shape)) * h.bits for h in hs) for hs in (first, second))
    return budget * a // (a + b), budget - budget * a // (a + b)


def _need(count: int, faults: Sequence[Fault], what: str, folder: str | Path) -> None:
    if not count:
        others = f"; the first of them: {faults[0]}" if faults else ""
        raise ValueError(
            f"there must be {what} in {folder}; got {len(faults)} other file(s){others}"
        )


class CropBatches(Dataset[Pair]):
    r"""Creates batches of aligned random crops of pairs of pictures.

    A crop is drawn from all places of all pictures alike, mirrored and turned by quarters at
    random. Batch number :math:`n` depends on the seed and :math:`n` alone, and each row of it on
    its own number too: whoever makes it, on however many processes, and whatever was made before.
    A picture that turns out to be corrupt is named once, and another is drawn in its place.

    Arguments:
        pairs: The pairs.
        size: The rows and columns of a target's crop, a multiple of the scale.
        batch: The number of crops in a batch.
        seed: The seed.
        corrupt: The share of the pairs that are corrupted a little; see
            :func:`flowguard.training.corrupt.corrupted`. The others are what they are without.

    Attributes:
        rows: The rows of the batch that are made: those of one of several processes.

    Raises:
        ValueError: If the sizes do not fit.

    Example:
        >>> import tempfile, pathlib
        >>> from flowguard.io.pictures import Picture, write
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> write(folder / "one.png", Picture(torch.rand(3, 64, 80)))
        >>> pairs, left_out = pairs_of(folder, scale=4, crop=32)
        >>> batches = CropBatches(pairs, size=32, batch=8, seed=0)
        >>> [tuple(part.shape) for part in batches[100]]
        [(8, 3, 32, 32), (8, 3, 8, 8)]
    """

    def __init__(
        self, pairs: Pairs, *, size: int, batch: int, seed: int, corrupt: float = 0.0
    ) -> None:
        if size < 1 or size % pairs.scale:
            raise ValueError(f"size must be a multiple of the scale {pairs.scale}; got {size}")
        if batch < 1 or seed < 0:
            raise ValueError(
                f"batch must be positive and seed not negative; got {batch} and {seed}"
            )
        if not 0 <= corrupt <= 1:
            raise ValueError(f"corrupt must be a share, from 0 to 1; got {corrupt}")
        self.pairs, self.size, self.seed, self.corrupt = pairs, size, seed, corrupt
        self.rows: Sequence[int] = range(batch)
        n = size // pairs.scale
        places = [max(0, h - n + 1) * max(0, w - n + 1) for h, w in pairs.sizes]
        self._ends = np.cumsum(places)
        if not places or not min(places):
            raise ValueError(f"all targets must have at least {size} rows and columns")

    def fingerprint(self) -> str:
        r"""Returns what the batches hang on beside the options: names and sizes of the pictures."""
        names = [file.name for source in self.pairs.sources for file in source.files]
        return hashlib.sha256(repr((names, self.pairs.sizes)).encode()).hexdigest()

    def _draw(self, number: int, row: int) -> tuple[tuple[Any, ...], bool, int]:
        r"""What a crop is made of, and how it is mirrored and turned."""
        rng = np.random.default_rng((self.seed, number, row))
        n = self.size // self.pairs.scale
        while True:
            place = int(rng.integers(self._ends[-1]))
            index = int(np.searchsorted(self._ends, place, side="right"))
            place -= int(self._ends[index - 1]) if index else 0
            top, left = divmod(place, self.pairs.sizes[index][1] - n + 1)
            mirrored, turns = bool(rng.integers(2)), int(rng.integers(4))
            try:
                return self.pairs.fetch(index, top, left, n, rng), mirrored, turns
            except ImageError:
                if not self.pairs.usable():
                    raise Undecodable(
                        f"there must be a picture that can be decoded; got {len(self.pairs.sizes)}"
                        " that cannot"
                    ) from None

    def __getitem__(self, number: int) -> Pair:
        r"""Returns batch `number`, with shapes :math:`(B, 3, sH, sW)` and :math:`(B, C, H, W)`.

        Raises:
            Undecodable: If all pictures turned out to be corrupt.
            Unreadable: If the system cannot read a picture that was there.
        """
        fetched, mirrored, turns = zip(*(self._draw(number, r) for r in self.rows), strict=True)
        if self.pairs.prepares:
            fetched = tuple(self._spoilt(number, fetched))
        pairs = self.pairs.finish(fetched)
        if not self.pairs.prepares:
            pairs = list(self._spoilt(number, pairs))
        crops = [
            tuple(_turned(part, m, t) for part in pair)
            for pair, m, t in zip(pairs, mirrored, turns, strict=True)
        ]
        target, condition = (torch.stack(parts) for parts in zip(*crops, strict=True))
        return target, condition

    def _spoilt(self, number: int, pairs: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        r"""The pairs, some of them corrupted, with what else they have."""
        for row, (target, condition, *rest) in zip(self.rows, pairs, strict=True):
            # Numbers of its own, so that nothing else is drawn in another way.
            rng = np.random.default_rng((self.seed, number, row, 1))
            if rng.random() < self.corrupt:
                shown = not self.pairs.prepares
                target, condition = corrupted(
                    target, condition, self.pairs.scale, rng, patterns=shown
                )
            yield (target, condition, *rest)


def _turned(image: Tensor, mirrored: bool, turns: int) -> Tensor:
    return torch.rot90(image.flip(-1) if mirrored else image, turns, (-2, -1))
