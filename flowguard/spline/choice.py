r"""Which kernels compute the splines in eager mode: a choice for the process, or for a block of code.

It is read at each call, and kept for the backward of that call, which may run in another thread.
Nothing of a model knows of it: what is copied or saved is the same under each.
"""

__all__ = ["NAMES", "VARIABLE", "kernels"]

import os
import threading
import weakref
from contextvars import ContextVar
from itertools import takewhile
from types import TracebackType
from typing import Self

#: The kinds of kernels.
NAMES = "eager", "compiled", "traced"
VARIABLE = "FLOWGUARD_KERNELS"  #: of the environment: what a process begins with


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
        _state.append(self)

    def __repr__(self) -> str:
        return f"kernels({self.which!r})"

    def __enter__(self) -> Self:
        # What was said to all threads was meant for this block.
        _state.remove(self)
        _blocks.set((*_blocks.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Blocks of generators may end in another order than they began.
        blocks = _blocks.get()
        k = max((k for k, block in enumerate(blocks) if block is self), default=None)
        if k is None:
            raise RuntimeError(
                "a block ends in the thread, or the asynchronous task, that began it; got the end"
                f" of {self!r}, which did not begin here: use it in a `with` statement"
            )
        _blocks.set(blocks[:k] + blocks[k + 1 :])

    @staticmethod
    def chosen() -> str:
        r"""The name of the kernels that compute here and now."""
        blocks = _blocks.get()
        return blocks[-1].which if blocks else _state.which


class _State:
    r"""What the process has chosen: what it began with, and each choice that may still count."""

    def __init__(self) -> None:
        self.which = self.first = _checked(
            os.environ.get(VARIABLE) or NAMES[0], f"the variable {VARIABLE}"
        )
        self._choices: list[tuple[str, weakref.ref[kernels]]] = []
        self.unlock()

    def append(self, choice: kernels) -> None:
        r"""Makes this the last choice."""
        with self._lock:
            # Of a choice that nobody holds no block will be made: those before it never count again.
            held = list(takewhile(lambda c: c[1]() is not None, reversed(self._choices)))
            kept = len(held) + (len(held) < len(self._choices))
            self._choices = [
                *self._choices[len(self._choices) - kept :],
                (choice.which, weakref.ref(choice)),
            ]
            self.which = choice.which

    def remove(self, choice: kernels) -> None:
        r"""Takes back a choice, of which a block was made. Other threads may have chosen since."""
        with self._lock:
            self._choices = [c for c in self._choices if c[1]() is not choice]
            self.which = self._choices[-1][0] if self._choices else self.first

    def unlock(self) -> None:
        r"""Makes a new lock: of another thread's nobody would let go in a process that is forked."""
        self._lock = threading.Lock()


_state = _State()
_blocks: ContextVar[tuple[kernels, ...]] = ContextVar("kernels", default=())  # innermost last
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _state.unlock())
