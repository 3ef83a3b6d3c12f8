r"""Which pictures are read, and what is written for each."""

__all__ = ["Job", "jobs"]

import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowguard.cli.parsing import UserError
from flowguard.io.pictures import SUFFIXES

WRITTEN = (".png", ".tif", ".tiff")


@dataclass(frozen=True)
class Job:
    r"""A picture, and the files that its samples become."""

    source: Path
    targets: tuple[Path, ...]


def _found(pattern: str) -> list[Path]:
    r"""The pictures of a folder, a file, or a glob."""
    path = Path(pattern)
    if path.is_dir():
        # A link to nothing is told of like a file that cannot be read.
        inside = sorted(
            p
            for p in path.iterdir()
            if p.suffix.lower() in SUFFIXES and (p.is_file() or not p.exists())
        )
        if not inside:
            raise UserError(f"INPUT: there is no picture ({', '.join(SUFFIXES)}) in {path}")
        return inside
    if path.is_file():
        return [path]
    if not glob.has_magic(pattern):
        raise UserError(f"INPUT: there is no file or folder {pattern}")
    found = map(Path, glob.glob(pattern, recursive=True))
    inside = sorted(p for p in found if p.suffix.lower() in SUFFIXES and p.is_file())
    if not inside:
        raise UserError(f"INPUT: no picture ({', '.join(SUFFIXES)}) matches {pattern}")
    return inside


def jobs(inputs: Sequence[str], output: Path, samples: int, suffix: str) -> list[Job]:
    r"""Returns what there is to do.

    The pictures are written into the folder `output`, under the names that they had; several
    samples are numbered. Two pictures that differ in their suffixes only keep these in their
    names.

    Arguments:
        inputs: Files, folders (not those within) and globs.
        output: The folder; for one picture and one sample also a file that ends in .png or .tif.
        samples: The number of samples of each.
        suffix: The suffix of what is written.
    """
    within = output.resolve()
    sources: dict[Path, Path] = {}
    for pattern in inputs:
        for path in _found(str(pattern)):
            if within not in path.resolve().parents or len(inputs) == 1 == len(_found(pattern)):
                sources.setdefault(path.resolve(), path)
    if not sources:
        raise UserError("INPUT: all pictures lie in OUTPUT; name another folder")
    suffix_given = "" if output.is_dir() else output.suffix.lower()
    if suffix_given in SUFFIXES and suffix_given not in WRITTEN:
        raise UserError(f"OUTPUT: pictures are written as .png or .tif; got {output}")
    if suffix_given in WRITTEN:
        if len(sources) > 1 or samples > 1:
            raise UserError(
                f"OUTPUT must be a folder for {len(sources)} picture(s) of {samples} sample(s);"
                f" got {output}"
            )
        found = [Job(next(iter(sources.values())), (output,))]
    else:
        stems = Counter(p.stem.lower() for p in sources.values())
        found = []
        for path in sources.values():
            name = path.stem if stems[path.stem.lower()] == 1 else path.name
            names = [name] if samples == 1 else [f"{name}-{i + 1}" for i in range(samples)]
            found.append(Job(path, tuple(output / (n + suffix) for n in names)))
    targets = Counter(t.resolve() for job in found for t in job.targets)
    clash = next((t for t, count in targets.items() if count > 1), None)
    if clash is not None:
        raise UserError(f"two pictures would be written as {clash.name}; enhance them apart")
    own = next((t for t in targets if t in sources), None)
    if own is not None:
        raise UserError(f"OUTPUT: {own.name} would replace its own picture; name another folder")
    return found
