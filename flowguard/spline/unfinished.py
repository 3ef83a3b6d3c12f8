r"""What a process that was killed while it compiled left in the compiler's cache.

The compiler takes a library that is on disk for a finished one. To load half of it fails in each
process from then on, or ends it.
"""

__all__ = ["cache_folder", "remove_unfinished"]

import contextlib
import os
import struct
import sys
from pathlib import Path

ELF = b"\x7fELF"
USUAL = b"\x02\x01"  # of 64 bits, the least significant byte first
HEADER = 64  # bytes of it


def cache_folder() -> Path:
    r"""Returns where the compiler keeps what it made, if it can.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    # Not before it is used: the compiler takes seconds to be imported.
    from torch._inductor.runtime.runtime_utils import (  # type: ignore[attr-defined]
        default_cache_dir,
    )

    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute()


def remove_unfinished(folder: Path) -> list[Path]:
    r"""Removes libraries and modules that were not written to their end, unless a process is at it;
    returns which.

    Arguments:
        folder: The compiler's cache.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     library = Path(folder, "ab", "abc.main.so")
        ...     library.parent.mkdir()
        ...     library.touch()
        ...     remove_unfinished(Path(folder)) == [library], library.exists()
        (True, False)
    """
    from filelock import FileLock, Timeout  # which the compiler needs, too

    removed = []
    for path in sorted((*folder.glob("??/*.so"), *folder.glob("??/*.py"))):
        with contextlib.suppress(OSError, Timeout):
            if _is_finished(path):
                continue
            locks = folder / "locks"
            locks.mkdir(exist_ok=True)
            # The compiler holds this one as long as it writes.
            with FileLock(locks / f"{path.name.partition('.')[0]}.lock", timeout=0):
                if not _is_finished(path):
                    path.unlink()
                    removed.append(path)
    return removed


def _is_finished(path: Path) -> bool:
    r"""Whether a file is as long as it says; of other formats than that of Linux' libraries, whether
    it is not empty."""
    size = path.stat().st_size
    if path.suffix != ".so" or sys.platform != "linux":
        return size > 0
    with path.open("rb") as file:
        header = file.read(HEADER)
    if len(header) < HEADER or not header.startswith(ELF):
        return False
    if header[4:6] != USUAL:
        return True  # as far as can be told
    # The table of its sections comes last.
    (start,) = struct.unpack_from("<Q", header, 0x28)
    each, count = struct.unpack_from("<2H", header, 0x3A)
    return bool(start) and start + each * count <= size
