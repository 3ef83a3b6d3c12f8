r"""Which kernels compute the splines in eager mode: a choice for the process, or for a block of code.

It is read at each call, and kept for the backward of that call, which may run in another thread.
Nothing of a model knows of it: what is copied or saved is the same under each.
"""

__all__ = ["NAMES", "VARIABLE", "kernels"]

import os
import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Self

NAMES = "eager", "compiled", "traced"
VARIABLE = "FLOWGUARD_KERNELS"  # of the environment: what a process begins with


def _checked(which: str, what: str) -> str:
    if which not in NAMES:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, NAMES))}; got {which!r}")
    return which


class kernels:
    r"""Chooses which kernels compute the splines, for all threads and from here on; in a `with`
    statement only for the thread, or the asynchronous task, that runs it and as long as it does.

    All are the same map, but for rounding, and each has gradients of all orders.

    - ``"eager"``, the default, works in place, operation by operation.
    - ``"compiled"`` has the compiler of PyTorch make one loop of each kernel, which is several
      times as fast. That takes seconds for each new number of bins, dtype, layout in memory and
      set of options, but not for another size; what was made is kept on disk, in the compiler's
      own cache, for other processes. Where the compiler cannot work, there is one warning, and the
      splines are computed in place. So they are in processes that were forked, and where they
      always are: under the transforms of `torch.func`, for single elements, for derivatives of the
      gradients and for the splines of other libraries.
    - ``"traced"`` are the formulas as the compiler sees them, which the autograd of PyTorch could
      follow itself: slow, for comparisons.

    A process begins with what the variable ``FLOWGUARD_KERNELS`` of its environment says. Inside of
    `torch.compile` the choice means nothing: everything is compiled there.

    Arguments:
        which: The name of the kernels.

    Raises:
        ValueError: If there are no such kernels.

    Example:
        >>> kernels("eager")
        kernels('eager')
        >>> with kernels("traced"):
        ...     kernels.chosen()
        'traced'
        >>> kernels.chosen()
        'eager'
    """

    def __init__(self, which: str) -> None:
        self.which = _checked(which, "kernels")
        self._in_block = False
        with _state.lock:
            self._before, _state.latest = _state.latest, self

    def __repr__(self) -> str:
        return f"kernels({self.which!r})"

    def __enter__(self) -> Self:
        # What was said to all threads was meant for this block. Other threads may have entered or
        # chosen since: the process keeps the last choice that is not of a block.
        with _state.lock:
            self._in_block = True
            while _state.latest is not None and _state.latest._in_block:
                _state.latest = _state.latest._before
        _blocks.set((self.which, _blocks.get()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        block = _blocks.get()
        assert block is not None
        _blocks.set(block[1])

    @staticmethod
    def chosen() -> str:
        r"""The name of the kernels that compute here and now."""
        block, latest = _blocks.get(), _state.latest
        if block is not None:
            return block[0]
        return _state.first if latest is None else latest.which


class _State:
    r"""What the process has chosen: the last choice, or what it began with."""

    def __init__(self) -> None:
        self.first = _checked(os.environ.get(VARIABLE) or NAMES[0], f"the variable {VARIABLE}")
        self.latest: kernels | None = None
        self.unlock()

    def unlock(self) -> None:
        r"""Makes a new lock: of another thread's nobody would let go in a process that is forked."""
        self.lock = threading.Lock()


Block = tuple[str, "Block | None"]  # what was chosen in it, and in the block around it

_state = _State()
_blocks: ContextVar[Block | None] = ContextVar("kernels", default=None)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _state.unlock())
