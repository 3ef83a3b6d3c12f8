r"""Memory for temporaries that outlives a call.

A chain of element-wise operations in eager mode spends much of its time in fetching fresh memory:
the system hands out pages of zeros for each temporary and takes them back. So every thread keeps
one block for each dtype, and what works in it writes in place.
"""

__all__ = ["LIMIT", "Layout", "Pair", "Rows", "Tensors", "keep", "release", "scratch"]

import math
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Size, Tensor

LIMIT = 2**26  #: bytes that a call should ask for; of each dtype a thread keeps at most twice that
MOST = 64  # shapes and numbers for which it keeps tensors

Number = Callable[[float], Tensor]
Desk = TypeVar("Desk")
#: Several tensors.
Tensors = Sequence[Tensor]
Pair = tuple[Tensor, Tensor, Tensor]  #: with shape :math:`(2, *)`, and its two rows

_kept = threading.local()


class Layout(NamedTuple):
    r"""What a function needs: pairs of rows, single rows, and blocks of several rows."""

    pairs: int
    singles: int
    blocks: tuple[tuple[int, ...], ...] = ()

    @property
    def total(self) -> int:
        r"""The number of rows."""
        return 2 * self.pairs + self.singles + sum(math.prod(b) for b in self.blocks)


class Rows:
    r"""Temporaries of one shape, to be taken and given back.

    What was given back last is taken first, as it is in the cache. Pairs are there for what one
    operation can do at once; :attr:`blocks` are tensors of several rows. `number` makes tensors
    without dimensions of numbers, which must not be written to.
    """

    def __init__(self, memory: Tensor, layout: Layout, shape: Size, number: Number) -> None:
        self.number, self.size = number, shape.numel()
        rows = [(2,)] * layout.pairs + [()] * layout.singles + [*layout.blocks]
        parts = memory[: layout.total * self.size].split([math.prod(r) * self.size for r in rows])
        views = (part.view((*r, *shape)) for part, r in zip(parts, rows, strict=True))
        self._pairs = [(t, *t.unbind()) for t in islice(views, layout.pairs)]
        self._singles = [*islice(views, layout.singles)]
        self.blocks = [*views]
        self._memory = memory
        narrow = memory.dtype == torch.float32 and layout.total * self.size < 2**31
        self._kind = torch.int32 if narrow else torch.int64
        self.at_home = memory.device.type == "cpu"
        self._desks: dict[Callable[[Rows], Any], Any] = {}
        self.restart()

    def restart(self) -> None:
        r"""Takes all back that was handed out."""
        pairs, singles = self._pairs.copy(), self._singles.copy()
        self.pair, self.give_pair = pairs.pop, pairs.append
        self.take, self._give = singles.pop, singles.append

    def give(self, *rows: Tensor) -> None:
        r"""Gives back single rows."""
        for row in rows:
            self._give(row)

    def desk(self, make: Callable[["Rows"], Desk]) -> Desk:
        r"""Returns what is made of these rows once for all calls: views of them, say."""
        desk: Desk | None = self._desks.get(make)
        if desk is None:
            with torch.inference_mode(False):
                desk = self._desks[make] = make(self)
        return desk

    def index(self, numbers: Sequence[int]) -> Tensor:
        r"""Returns these numbers as an index, in new memory, for which another device would have to
        be waited for."""
        return self._memory.new_tensor(numbers, dtype=self._kind)

    def counted(self, first: int, step: int, count: int, *, index: bool = False) -> Tensor:
        r"""Returns as many numbers, each a step from the one before, in new memory."""
        kind = self._kind if index else self._memory.dtype
        end = first + step * count
        return torch.arange(first, end, step, dtype=kind, device=self._memory.device)

    def places(self, number: Tensor) -> Tensor:
        r"""Returns where each element lies in a block, if `number` says in which of its rows."""
        place = self.as_index(self.take()).copy_(number).view(-1)
        return torch.add(self.desk(_elements), place, alpha=len(place), out=place)

    def as_index(self, block: Tensor) -> Tensor:
        r"""Returns the memory of a block as an index into all rows."""
        # It takes as much of it as numbers do, but for single precision with too many of them.
        if self._kind.itemsize == block.dtype.itemsize:
            return block.view(self._kind)
        return torch.empty_like(block, dtype=self._kind)


def _elements(m: Rows) -> Tensor:
    return m.counted(0, 1, m.size, index=True)


def _number(memory: Tensor, value: float) -> Tensor:
    # To make one takes longer than to multiply some thousand elements by it.
    with torch.inference_mode(False):
        return memory.new_full((), value)


class Scratch:
    r"""A block of memory, and the temporaries that it was divided into."""

    def __init__(self, like: Tensor, dtype: torch.dtype, *, kept: bool) -> None:
        self.dtype = dtype
        self.kept = kept
        self._memory = like.new_empty(0, dtype=dtype)
        self._number = lru_cache(MOST)(partial(_number, self._memory))
        self._rows: dict[tuple[Layout, Size], Rows] = {}

    def rows(self, layout: Layout, shape: Size) -> Rows:
        r"""Returns temporaries of a shape. All share the same memory: those of an earlier call
        must not be used any more."""
        rows = self._rows.get((layout, shape))
        if rows is not None:
            rows.restart()
            return rows

        memory, count = self._memory, layout.total * shape.numel()
        with torch.inference_mode(False):  # what is made in that mode cannot be used outside of it
            if count > memory.numel():
                memory = memory.new_empty(count)
            rows = Rows(memory, layout, shape, self._number)
        if memory.nbytes <= 2 * LIMIT:
            if memory is not self._memory or len(self._rows) >= MOST:
                self._rows.clear()
            self._memory = memory
            self._rows[layout, shape] = rows
        return rows


def scratch(like: Tensor, dtype: torch.dtype) -> Scratch:
    r"""Returns this thread's memory, to be given back by :func:`keep`; or fresh one where what is
    computed may outlive the call: in the queue of another device, in a graph that is being
    recorded, in a tensor that is none."""
    if (
        like.device.type != "cpu"
        or type(like) not in (Tensor, torch.nn.Parameter)
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return Scratch(like, dtype, kept=False)

    # What interrupts a call and calls again, a signal's handler say, finds nothing here.
    found: Scratch | None = _kept.__dict__.pop(str(dtype), None)
    if found is None:
        with torch.inference_mode(False):
            found = Scratch(torch.empty(0, device="cpu"), dtype, kept=True)
    return found


def keep(memory: Scratch) -> None:
    r"""Keeps the memory for the next call, when all that was computed in it has been copied."""
    if memory.kept:
        _kept.__dict__[str(memory.dtype)] = memory


def release() -> None:
    r"""Releases the memory that this thread keeps."""
    _kept.__dict__.clear()
