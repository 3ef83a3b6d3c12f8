r"""Files that are whole or not there."""

__all__ = ["atomic", "write_text"]

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:20]}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp is private to its user; the file gets the rights of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    r"""Writes a text file, whole or not at all.

    Arguments:
        path: The file to write.
        text: What it shall hold. What UTF-8 cannot, as of names that are no text, is escaped.
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
