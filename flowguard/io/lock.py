r"""Folders that one process works in at a time."""

__all__ = ["alone"]

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: set[int] = set()


def _let_go() -> None:
    r"""A forked child has no part in the lock: it may outlive the process that was killed."""
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def alone(folder: Path | str) -> Iterator[None]:
    r"""Keeps the other processes that ask for it out of a folder, within.

    The lock is one of the system: it ends with the process, however that ends, and leaves no file.
    Where there are no locks, on Windows and on some disks, nobody is kept out.

    Arguments:
        folder: The folder.

    Raises:
        BlockingIOError: If another process has it.

    Example:
        >>> import tempfile
        >>> with alone(tempfile.mkdtemp()):
        ...     pass
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a disk that knows no locks
            pass
        yield
    finally:
        _held.discard(handle)
        os.close(handle)
