r"""Files that are whole or not there."""

__all__ = ["atomic", "save_tensors", "strict_json", "sweep", "write_json", "write_text"]

import contextlib
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

#: The mask of a process can only be read by setting it, and threads share it.
MASK = threading.Lock()


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    r"""Gives a temporary path beside `path`, which takes its place when all went well.

    If anything is raised, an interrupt included, the temporary file is removed and an earlier
    file of that name is untouched.

    Arguments:
        path: The file to write.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with atomic(folder / "note.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [p.name for p in folder.iterdir()]
        ['note.txt']
    """
    path = Path(path)
    # Not its whole name: that may be as long as names can be.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp is private to its user; the file gets the rights of any other new file.
        with MASK:
            mask = os.umask(0)
            os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name[:20]}."


def sweep(paths: Iterable[Path], age: float) -> list[Path]:
    r"""Removes what :func:`atomic` left of files when its process was killed; returns that.

    Arguments:
        paths: The files that were to be written.
        age: How many seconds nobody must have written to a temporary file, by the clock of its
            disk, so that none is removed that another process is about to finish.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "note.txt"
        >>> _ = (path.parent / ".note.txt.12345678.tmp").write_text("half")
        >>> [left.name for left in sweep([path], age=3600.0)]  # somebody may be writing it
        []
        >>> [left.name for left in sweep([path], age=-3600.0)]
        ['.note.txt.12345678.tmp']
    """
    folders: dict[Path, set[str]] = {}
    for path in paths:
        folders.setdefault(path.parent, set()).add(_prefix(path))
    removed = []
    for folder, prefixes in folders.items():
        with contextlib.suppress(OSError):  # it is gone, or nothing can be written there any more
            with tempfile.NamedTemporaryFile(dir=folder) as probe:
                now = os.stat(probe.name).st_mtime
            for file in sorted(folder.glob(".*.tmp")):
                prefix = file.name[: -len("12345678.tmp")]
                if prefix in prefixes and now - file.stat().st_mtime > age:
                    file.unlink(missing_ok=True)
                    removed.append(file)
    return removed


def write_text(path: Path | str, text: str) -> None:
    r"""Writes a text file, whole or not at all.

    Arguments:
        path: The file to write.
        text: What it shall hold. What UTF-8 cannot, as of names that are no text, is escaped.

    Raises:
        OSError: If the file cannot be written; an earlier one of that name is then as it was.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> write_text(Path(folder.name) / "note.txt", "whole")
        >>> [path.name for path in Path(folder.name).iterdir()]
        ['note.txt']
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def strict_json(value: Any) -> Any:
    r"""Returns numbers as JSON can hold them: infinity and NaN, which it lacks, become words.

    Arguments:
        value: A value, with dictionaries, lists and tuples of values.

    Example:
        >>> strict_json({"best": (1.5, float("inf"))})
        {'best': [1.5, 'inf']}
    """
    if isinstance(value, dict):
        return {k: strict_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path | str, value: Any) -> None:
    r"""Writes a file of JSON, whole or not at all.

    Arguments:
        path: The file to write.
        value: What it shall hold; see :func:`strict_json`.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> write_json(Path(folder.name) / "best.json", {"loss": float("nan")})
        >>> json.loads((Path(folder.name) / "best.json").read_text())
        {'loss': 'nan'}
    """
    write_text(path, json.dumps(strict_json(value), indent=2, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    r"""Writes tensors in a safetensors file, for which :func:`atomic` gave the path.

    Arguments:
        path: The file to write.
        tensors: The tensors, of any shape, none of which shares its memory with another.
        metadata: What the file says of them.

    Raises:
        OSError: If the system cannot write it, because the disk is full, say.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name) / "weights.safetensors"
        >>> with atomic(file) as temporary:
        ...     save_tensors(temporary, {"weight": torch.ones(2)}, {"format": "mine"})
        >>> load_file(file)
        {'weight': tensor([1., 1.])}
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:  # an error of the system is in its text only
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
