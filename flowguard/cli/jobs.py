r"""Which pictures are read, and what is written for each."""

__all__ = ["Job", "Work", "digest", "fingerprint", "jobs", "made_of", "true_path"]

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowguard._version import __version__
from flowguard.cli.parsing import UserError
from flowguard.io.pictures import SUFFIXES, note_of

WRITTEN = (".png", ".tif", ".tiff")
NOTE = re.compile(r"flowguard \S+, made of ([0-9a-f]{32})")


@dataclass(frozen=True)
class Job:
    r"""A picture, and the files that its samples become."""

    source: Path
    targets: tuple[Path, ...]


@dataclass(frozen=True)
class Work:
    r"""What there is to do, and the pictures that are left out as they were written before."""

    jobs: list[Job]
    left_out: list[Path]


def digest(work: Work) -> str:
    r"""Returns what tells the pictures of a command from others: a digest of all names.

    Arguments:
        work: What there is to do.
    """
    names = (os.fsencode(p) for job in work.jobs for p in (job.source, *job.targets))
    return hashlib.blake2b(b"\0".join(names), digest_size=16).hexdigest()


def fingerprint(source: Path) -> str:
    r"""Returns what tells a picture from others: a digest of its name and its bytes.

    The name counts, as the noise of a sample is drawn by it.

    Arguments:
        source: The picture.
    """
    with source.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
    digest.update(os.fsencode(source.name))
    return digest.hexdigest()


def made_of(source: Path) -> str:
    r"""Returns the note of what is made of a picture.

    Arguments:
        source: The picture.
    """
    return f"flowguard {__version__}, made of {fingerprint(source)}"


def origin(path: Path) -> str:
    r"""Returns the fingerprint of what a picture was made of; nothing if that is not known.

    Arguments:
        path: The picture.
    """
    found = NOTE.fullmatch(note_of(path))
    return found[1] if found else ""


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


def true_path(path: Path) -> Path:
    r"""Returns where a path leads to. `Path.resolve` refuses links that lead to themselves.

    Arguments:
        path: The path.
    """
    return Path(os.path.realpath(path))


def _sources(inputs: Sequence[str], output: Path) -> tuple[dict[Path, Path], list[Path]]:
    r"""The pictures by their true paths, and those left out: what was written to OUTPUT before."""
    found: dict[Path, Path] = {}
    for pattern in inputs:
        for path in _found(str(pattern)):
            found.setdefault(true_path(path), path)
    if len(found) == 1:  # whoever names one picture means it
        return found, []
    within = true_path(output)
    own = {p for p in found if within in p.parents and origin(p)}
    if len(own) == len(found):
        raise UserError(
            f"INPUT: all {len(found)} pictures were written to OUTPUT by flowguard itself; name"
            " others, or another folder for what is made of them"
        )
    kept = {true: path for true, path in found.items() if true not in own}
    return kept, [path for true, path in found.items() if true in own]


def jobs(inputs: Sequence[str], output: Path, samples: int, suffix: str) -> Work:
    r"""Returns what there is to do.

    The pictures are written into the folder `output`, under the names that they had; several
    samples are numbered. Two pictures that differ in their suffixes only keep these in their
    names. Pictures below `output` that flowguard itself wrote are left out.

    Arguments:
        inputs: Files, folders (not those within) and globs.
        output: The folder; for one picture and one sample also a file that ends in .png or .tif.
        samples: The number of samples of each.
        suffix: The suffix of what is written.

    Raises:
        UserError: If nothing can be read, or two results would have one name.
    """
    sources, left_out = _sources(inputs, output)
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
    _check_targets(found, sources)
    return Work(found, left_out)


def _check_targets(found: Sequence[Job], sources: dict[Path, Path]) -> None:
    r"""Refuses to write two pictures to one file, or any in the place of one that is read."""
    taken: dict[Path, Path] = {}
    for job in found:
        for target in job.targets:
            true = true_path(target)
            if true in taken:
                raise UserError(
                    f"INPUT: {taken[true]} and {job.source} would both be written as"
                    f" {target.name}; enhance them apart, into two folders"
                )
            if true in sources:
                raise UserError(
                    f"OUTPUT: {target} is a picture of INPUT and would be replaced; name another"
                    " folder"
                )
            taken[true] = job.source
