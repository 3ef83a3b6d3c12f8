r"""Memory for decoded pictures that the processes of a loader share."""

__all__ = ["Shelf"]

import contextlib
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import context, reduction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

EMPTY, KEPT, BROKEN = 0, 1, 2  # what is known of a place


class Shelf:
    r"""Creates places for arrays of whole numbers, in memory that this process shares with its
    children.

    Sizes are known beforehand, so that each array has its place from the start: the first ones,
    as many as the budget holds. No page of memory is taken before something is put there. What one
    process puts down all others find, whether they were forked or spawned; a copy that is made
    otherwise (`copy.deepcopy`, `pickle`) starts empty.

    Arguments:
        shapes: The shape of each array.
        dtypes: The dtype of each array.
        budget: The number of bytes that may be taken.

    Raises:
        ValueError: If the budget is negative.

    Example:
        >>> shelf = Shelf([(2, 2), (3, 3)], [np.uint8, np.uint16], budget=10)
        >>> shelf.put(0, np.array([[1, 2], [3, 4]], dtype=np.uint8))
        >>> shelf.get(0)
        array([[1, 2],
               [3, 4]], dtype=uint8)
        >>> shelf.put(1, np.zeros((3, 3), dtype=np.uint16))  # 18 bytes are too many
        >>> shelf.get(1) is None
        True
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any], *, budget: int
    ) -> None:
        if budget < 0:
            raise ValueError(f"budget must not be negative; got {budget}")
        self.shapes, self.budget = list(shapes), budget
        self.dtypes = [np.dtype(d) for d in dtypes]
        self._places, self._size = _places(self.shapes, self.dtypes, budget)
        self._map(_new(self._size))

    def _map(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._memory = np.frombuffer(mmap.mmap(descriptor, self._size), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.shapes)

    @contextlib.contextmanager
    def _alone(self, index: int) -> Iterator[None]:
        r"""Holds others off the state of a place. Who reads it after sees what was put down
        before it was set, on processors too that write in another order."""
        try:
            import fcntl
        except ImportError:  # there is nobody else: see __getstate__
            yield
            return
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, index)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, index)

    def get(self, index: int) -> Array | None:
        r"""Returns an array, if it was put down, as a view that cannot be written to.

        Arguments:
            index: The number of the array.
        """
        with self._alone(index):
            if self._memory[index] != KEPT:
                return None
        view = self._view(index)
        view.setflags(write=False)
        return view

    def _view(self, index: int) -> Array:
        start, shape, dtype = self._places[index], self.shapes[index], self.dtypes[index]
        bytes_ = self._memory[start : start + math.prod(shape) * dtype.itemsize]
        return bytes_.view(dtype).reshape(shape)

    def put(self, index: int, array: Array) -> None:
        r"""Puts an array down, if there is a place for it. To put one down twice is no harm: both
        are the same.

        Arguments:
            index: The number of the array.
            array: The array, of the shape and dtype that were announced.

        Raises:
            ValueError: If it has another shape or dtype.
        """
        if array.shape != self.shapes[index] or array.dtype != self.dtypes[index]:
            raise ValueError(
                f"array {index} must have shape {self.shapes[index]} and dtype"
                f" {self.dtypes[index]}; got {array.shape} and {array.dtype}"
            )
        if self._places[index] < 0:
            return
        self._view(index)[...] = array
        with self._alone(index):
            self._memory[index] = KEPT

    def refuse(self, index: int) -> bool:
        r"""Notes that an array cannot be had, and returns whether this is news.

        Arguments:
            index: The number of the array.
        """
        with self._alone(index):
            news = bool(self._memory[index] != BROKEN)
            self._memory[index] = BROKEN
        return news

    def refused(self, index: int) -> bool:
        r"""Returns whether any process noted that an array cannot be had.

        Arguments:
            index: The number of the array.
        """
        with self._alone(index):
            return bool(self._memory[index] == BROKEN)

    def all_refused(self) -> list[int]:
        r"""Returns the numbers of all arrays that cannot be had."""
        return [int(i) for i in np.flatnonzero(self._memory[: len(self)] == BROKEN)]

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in vars(self).items() if k not in ("_memory", "_descriptor")}
        # Only a process that is being started can be handed a descriptor, and only on POSIX.
        if context.get_spawning_popen() is not None and hasattr(reduction, "DupFd"):
            kept["_handed"] = reduction.DupFd(self._descriptor)
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        handed = state.pop("_handed", None)
        vars(self).update(state)
        self._map(handed.detach() if handed else _new(self._size))


def _places(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any], budget: int
) -> tuple[list[int], int]:
    r"""Where each array begins, -1 if it has no place, and how many bytes there are in all: a
    byte of state for each, then the arrays."""
    places, end = [], len(shapes)
    limit = end + budget
    for shape, dtype in zip(shapes, dtypes, strict=True):
        start = -(-end // dtype.itemsize) * dtype.itemsize
        after = start + math.prod(shape) * dtype.itemsize
        places.append(start if after <= limit else -1)
        end = after if after <= limit else end
    return places, max(end, 1)


def _new(size: int) -> int:
    r"""A descriptor of so many bytes of memory, all zero, of which none is taken yet."""
    if hasattr(os, "memfd_create"):  # not below /dev/shm, which is small in containers
        descriptor = os.memfd_create("flowguard-pictures")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
