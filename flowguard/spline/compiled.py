r"""The spline compiled for eager mode: what the compiler of PyTorch makes of the formulas.

A kernel is compiled once for all sizes, for elements that lie in one row, the same way apart: of
almost all tensors that is a view, of others a copy. What it depends on is its key, and each has
code of its own, as the compiler stops after some kernels that it has made of the same. It is made
with tensors of zeros: what it looks like, and its place on disk, do not depend on the first batch.
"""

__all__ = ["evaluate", "pull_back"]

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Size, Tensor

from flowguard.spline import formulas
from flowguard.spline.options import Options
from flowguard.spline.unfinished import cache_folder, remove_unfinished

BACKEND = "inductor"
SIZE = 2**16 + 1  # elements to compile for: many, for loops to be shared among threads
FAR = 256  # how far apart in memory elements may lie; what is farther may depend on the size

Tensors = Sequence[Tensor | None]
Made = tuple[Tensor, ...]


def evaluate(tensors: Tensors, o: Options) -> Made | None:
    r"""The value and, if wanted, the logarithm of the slope for input, parameters and shift; or None
    where nothing is compiled."""
    return _run(formulas.evaluate, tensors, o)


def pull_back(tensors: Tensors, o: Options) -> Made | None:
    r"""The gradients to input, parameters and shift, which those to both outputs follow; or None
    where nothing is compiled."""
    return _run(formulas.pull_back, tensors, o)


def _run(formula: Callable[..., Any], tensors: Tensors, o: Options) -> Made | None:
    x = tensors[0]
    assert x is not None
    given = [t for t in tensors if t is not None]
    if o.usual is not None or x.numel() < 2 or not _cache.works(x.device) or not _plain(given):
        return None
    with torch.no_grad(), _full_precision(x.device):
        # Parameters and shift are mostly parts of what a network returned. Of the others, kernels
        # are few.
        inputs = [
            None if t is None else _in_a_row(t, x.shape, 1 <= k <= 4)
            for k, t in enumerate(tensors)
        ]
        try:
            outs = _cache.kernel(formula, inputs, o)(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever ails the compiler
            _cache.give_up(x.device, error)
            return None
        # Of parameters there are rows, as many as there were. No views: users may write into them.
        return tuple(t.reshape(*t.shape[:-1], *x.shape).data for t in outs if t is not None)


def _plain(tensors: Sequence[Tensor]) -> bool:
    r"""Whether these are tensors that a kernel can work on, and nothing listens to operations."""
    kinds = (Tensor, torch.nn.Parameter)
    plain = all(type(t) in kinds and t.layout == torch.strided for t in tensors)
    together = len({t.device for t in tensors}) == 1
    return plain and together and not torch._C._len_torch_dispatch_stack()


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # The kernels choose their precision themselves, and the compiler looks at that of the caller.
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _step(shape: Size, strides: Sequence[int]) -> int | None:
    r"""How far apart in memory neighbours lie, if all of them lie as far."""
    step = following = None
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != following:
            return None
        following = stride * size
    return step


def _in_a_row(t: Tensor, shape: Size, apart: bool) -> Tensor:
    r"""Lays out all elements along the last dimension, one after the other or, if they may lie
    `apart`, as far from each other as they do. What is a single row has no other dimension."""
    size, rows = shape.numel(), t.dim() - len(shape)
    step = _step(t.shape[rows:], t.stride()[rows:])
    count, across = (t.shape[0], t.stride(0)) if rows else (1, size)
    fits = step is not None and (step <= FAR if apart else step == 1)
    if count > 1:  # the rows of an element side by side, or those of all one after the other
        fits = fits and (across == 1 or (step == 1 and across == size))
    if step is None or not fits:
        t, step, across = t.contiguous(), 1, size
    if count == 1:
        t = t.as_strided((size,), (step,))
    else:
        t = t.as_strided((count, size), (across, step))
    return t.detach()  # of views the compiler also looks at what they are of


def _key(t: Tensor | None) -> tuple[Any, ...] | None:
    r"""All that a kernel has to know of a tensor."""
    if t is None:
        return None
    rows = t.shape[:-1]
    return t.dtype, *rows, bool(rows) and t.stride(0) == 1, t.stride(-1), t.is_inference()


def _like(t: Tensor | None) -> Tensor | None:
    r"""Zeros that lie as the elements of a tensor do, of which there may be any number."""
    if t is None:
        return None
    step, rows = t.stride(-1), t.shape[:-1]
    across = [1 if stride == 1 else SIZE for stride in t.stride()[:-1]]
    with torch.inference_mode(t.is_inference()):  # tensors of that mode are others
        zeros = t.new_zeros(
            step * SIZE + sum(a * n for a, n in zip(across, rows, strict=True)) + 1
        )
        zeros = zeros.as_strided((*rows, SIZE), (*across, step)).detach()
    torch._dynamo.mark_dynamic(zeros, zeros.dim() - 1)
    return zeros


def _close(params: Sequence[Tensor | None]) -> list[Tensor | None]:
    r"""Rows of parameters one after the other in memory. Of a loop that reads from all over it the
    compiler makes no vectors, while it copies in tiles."""
    rows = [p if p.dim() > 1 else p.unsqueeze(0) for p in params if p is not None]
    if any(p.stride(-1) != 1 for p in rows):
        rows = [*torch.cat(rows).split([len(p) for p in rows])]
    widths, heights, derivatives, *shift = rows
    return [widths, heights, derivatives, shift[0][0] if shift else None]


def _function(formula: Callable[..., Any], o: Options) -> Callable[..., Made]:
    r"""What to compile: a function with code of its own."""

    # Without annotations, which are worked out in each call while a compiler looks on.
    def function(x, w, h, d, shift, *grads):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
        if not torch.compiler.is_compiling():
            raise RuntimeError("the compiler of PyTorch is turned off")
        params = _close((w, h, d, shift))
        if grads:
            return formula(o, x, *params, *grads)
        return formula(x, *params, o)[: 1 + o.steep]  # what is not returned is left out

    code = function.__code__.replace()
    return FunctionType(code, globals(), formula.__name__, None, function.__closure__)


class _Cache:
    r"""The kernels that this process has made."""

    def __init__(self) -> None:
        self._kernels: dict[Any, Callable[..., Made]] = {}
        self._failed: set[str] = set()  # kinds of devices
        self._is_tidy = False
        self._forked = False
        self._lock = threading.RLock()

    def works(self, device: torch.device) -> bool:
        fit = device.type in ("cpu", "cuda") and device.type not in self._failed
        return fit and not self._forked

    def kernel(
        self, formula: Callable[..., Any], inputs: Tensors, o: Options
    ) -> Callable[..., Made]:
        like = inputs[0]
        assert like is not None
        # The compiler writes into a loop how many threads share it.
        key = formula, o, like.device, torch.get_num_threads(), *map(_key, inputs)
        kernel = self._kernels.get(key)
        if kernel is None:
            with self._lock:
                kernel = self._kernels.get(key)
                if kernel is None:
                    if not self._is_tidy:
                        remove_unfinished(cache_folder())
                        self._is_tidy = True
                    kernel = torch.compile(_function(formula, o), fullgraph=True, backend=BACKEND)
                    kernel(*map(_like, inputs))
                    self._kernels[key] = kernel
        return kernel

    def give_up(self, device: torch.device, error: Exception) -> None:
        r"""Computes in place from here on, and says so once."""
        with self._lock:
            known = device.type in self._failed
            self._failed.add(device.type)
        if not known:
            # The first line may say no more than which part of the compiler it was.
            told = f"{type(error).__name__}: {error}".splitlines()
            reason = " ".join([line.strip() for line in told if line.strip()][:2]).rstrip(".")
            warnings.warn(
                f"compiled kernels need a compiler that works on this {device.type}; got {reason}."
                " Splines are computed in place instead. Install one (for a CPU g++ or clang; for"
                " a GPU what PyTorch's own `torch.compile` needs), or choose kernels('eager'). If"
                f" one is there, what it keeps may be broken: delete {cache_folder()}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def forked(self) -> None:
        r"""Computes in place from here on: loops that are shared among threads never end in a
        process that has inherited none of these."""
        self._lock = threading.RLock()  # of another thread's nobody would let go
        self._forked = True


_cache = _Cache()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _cache.forked())
