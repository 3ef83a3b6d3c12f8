r"""The models that are measured, and what is kept of each of them: a file of JSON."""

__all__ = ["Kept", "Key", "Named", "digest", "find_models", "model_name", "named"]

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from flowguard.io.atomic import write_json
from imaging.measure import Options, Row

#: A set, a picture, and the kind of its condition.
Key = tuple[str, str, str]

CONFIG, WEIGHTS, RUN = "config.json", "model.safetensors", "config.yaml"


class Named(NamedTuple):
    r"""A model's name, what kind it is of, and which of several seeds it was trained with."""

    name: str
    kind: str
    seed: int | None


def named(name: str) -> Named:
    r"""Returns what the name of a model tells.

    Arguments:
        name: The name. What it ends in, ``-seed3``, ``_seed3`` or ``/seed3``, is its seed.

    Example:
        >>> named("affine-seed3"), named("trial")
        (Named(name='affine-seed3', kind='affine', seed=3), Named(name='trial', kind='trial', seed=None))
    """
    found = re.fullmatch(r"(.+?)[-_/]seed[-_]?(\d+)", name)
    return Named(name, found[1], int(found[2])) if found else Named(name, name, None)


def model_name(place: Path, top: Path) -> str:
    r"""Returns what a model is called: its path within a folder, of one in a run that of the run.

    Arguments:
        place: The folder of the model.
        top: The folder that it was found in.
    """
    run = place.name in ("best", "model") and (place.parent / RUN).exists()
    place = place.parent if run else place
    return place.relative_to(top).as_posix() if place != top else place.resolve().name


def find_models(top: Path) -> dict[str, Path]:
    r"""Returns the models in a folder and the folders in it, by name.

    Of a run of training the model in the end is taken, or the best one as long as there is no
    such; never the one that it began with. Links to folders are followed.

    Arguments:
        top: The folder, which may be a model itself.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no model in it.
    """
    if not top.is_dir():
        raise FileNotFoundError(f"there is no folder {top}")
    found: dict[str, Path] = {}
    walked = os.walk(top, followlinks=True)
    for place in sorted(Path(name) for name, _, files in walked if {CONFIG, WEIGHTS} <= {*files}):
        hidden = any(part.startswith(".") for part in place.relative_to(top).parts)
        start = place != top and place.name == "start" and (place.parent / RUN).exists()
        if not hidden and not start:
            found[model_name(place, top)] = place  # of a run: best, and then model
    if not found:
        raise ValueError(
            f"there must be a model in {top}, a folder with {CONFIG} and {WEIGHTS}; got none"
        )
    return found


def digest(place: Path) -> str:
    r"""Returns a digest of a model's files.

    Arguments:
        place: Its folder.
    """
    told = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        told.update((place / name).read_bytes())
    return told.hexdigest()


class Kept:
    r"""Creates what is kept of a model: a row for each picture, written as soon as it is measured.

    What is there already is kept, if it is of the same model; of another one that had its name
    before, it is left.

    Arguments:
        file: The file.
        model: The digest of the model.
        options: What changes the numbers.

    Raises:
        ValueError: If the file holds what was measured by other options, or no such rows.
    """

    def __init__(self, file: Path, model: str, options: Options) -> None:
        self.file = file
        self.head = {"model": model, "options": dataclasses.asdict(options)}
        self._rows: dict[Key, Row] = {}
        if not file.exists():
            return
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            before, rows = held["options"], held["rows"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} must hold what was measured; remove it") from None
        if before != self.head["options"]:
            raise ValueError(
                f"what {file} holds must be measured by the same options, {before}; got"
                f" {self.head['options']}: name another folder by --out, or remove it"
            )
        if held["model"] == model:
            self._rows = {(row["set"], row["picture"], row["kind"]): row for row in rows}

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __getitem__(self, key: Key) -> Row:
        return self._rows[key]

    def add(self, key: Key, row: Row) -> None:
        r"""Keeps what was measured of a picture.

        Arguments:
            key: The set, the picture, and the kind of its condition.
            row: The numbers.
        """
        of, picture, kind = key
        self._rows[key] = {"set": of, "picture": picture, "kind": kind, **row}
        write_json(self.file, {**self.head, "rows": [*self._rows.values()]})
