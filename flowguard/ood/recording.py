r"""Who listens to scores in this thread. Monitors enter here, conditioners report here."""

__all__ = ["PerThread", "Recorder", "active", "enter", "leave", "listening"]

import threading
from contextvars import ContextVar
from typing import Any, Protocol

from torch import nn

from flowguard.ood.report import OODReport


class Recorder(Protocol):
    r"""What wants to hear of reports."""

    def record(self, module: nn.Module, report: OODReport) -> None:
        r"""Hears of a report that a module made."""


# A context variable: a thread starts without the monitors of the thread that started it.
_active: ContextVar[tuple[Recorder, ...]] = ContextVar("flowguard_monitors", default=())
_lock = threading.Lock()
_entered = 0


def active() -> tuple[Recorder, ...]:
    r"""Returns the recorders entered in this thread."""
    return _active.get()


def listening() -> bool:
    r"""Whether any thread has a recorder; a plain integer that compiled code can guard on."""
    return _entered > 0


def enter(recorder: Recorder) -> None:
    r"""Starts telling a recorder.

    Arguments:
        recorder: The recorder.

    Raises:
        RuntimeError: If it is told already in this thread.
    """
    global _entered
    if recorder in _active.get():
        raise RuntimeError("this monitor is entered already; make another one to nest them")
    _active.set((*_active.get(), recorder))
    with _lock:
        _entered += 1


def leave(recorder: Recorder) -> None:
    r"""Stops telling a recorder.

    Arguments:
        recorder: The recorder.
    """
    global _entered
    _active.set(tuple(r for r in _active.get() if r is not recorder))
    with _lock:
        _entered -= 1


class PerThread(threading.local):
    r"""Creates a holder of one value per thread; copies and pickles start empty."""

    value: Any = None

    def __reduce__(self) -> tuple[type["PerThread"], tuple[()]]:
        return PerThread, ()
