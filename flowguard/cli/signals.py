r"""What ends the work before its end."""

__all__ = ["Terminated", "termination"]

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn


class Terminated(BaseException):
    r"""Raised by SIGTERM, so that files are cleared away as after Ctrl-C."""


def _terminate(*_: Any) -> NoReturn:
    raise Terminated


@contextlib.contextmanager
def termination() -> Iterator[None]:
    r"""Raises :class:`Terminated` at a SIGTERM, within."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
