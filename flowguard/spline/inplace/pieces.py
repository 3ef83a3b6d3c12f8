r"""The spline with its shift in place, in pieces whose temporaries stay in the cache.

A `kernel` is the module that works on one piece.
"""

__all__ = ["evaluate", "prepare", "pull_back"]

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Size, Tensor

from flowguard.spline.inplace import bin as rq
from flowguard.spline.inplace.memory import LIMIT, Rows, keep, scratch
from flowguard.spline.options import Options

CHUNK = 2**15  # elements per thread worked on at a time, at most
CACHED = 3 * 2**20  # numbers of temporaries per thread that these may take
ELSEWHERE = 2**29  # bytes of temporaries on other devices, where pieces only save memory

Tensors = Sequence[Tensor | None]


def evaluate(kernel: ModuleType, tensors: Tensors, o: Options) -> tuple[Tensor, ...]:
    r"""The value and, if wanted, the logarithm of the slope for input, parameters and shift."""

    def write(m: Rows, outs: Sequence[Tensor], v: Tensor, *rest: Any) -> None:
        *params, shift = rest
        if o.inverse and shift is not None:
            by, factor = _shift(m, shift, o)
            v = torch.sub(v, by, alpha=factor, out=m.take())
        kernel.evaluate(m, outs, v, params, o)
        if not o.inverse and shift is not None:
            m.restart()
            by, factor = _shift(m, shift, o)
            outs[0].add_(by, alpha=factor)

    return _in_pieces(write, kernel, _new((tensors[0],) * (1 + o.steep), o), tensors)


def _shift(m: Rows, shift: Tensor, o: Options) -> tuple[Tensor, float]:
    r"""The shift, but for a factor, which is free beside a sum."""
    by = shift if o.prepared else rq.squash(m, shift, o.shift_bound, m.take())
    return by, rq.squash_factor(o.shift_bound, by.dtype == torch.float64)


def pull_back(kernel: ModuleType, tensors: Tensors, o: Options) -> tuple[Tensor, ...]:
    r"""The gradients to input, parameters and shift, which those to both outputs follow."""

    def write(m: Rows, outs: Sequence[Tensor], x: Tensor, *rest: Any) -> None:
        *params, shift, gy, gl = rest
        kernel.pull_back(m, outs, x, params, (gy, gl), o)
        if shift is not None:
            m.restart()
            to_by = torch.neg(outs[0], out=m.take()) if o.inverse else gy
            rq.squash_pullback(m, shift, to_by, o.shift_bound, outs[4])

    return _in_pieces(write, kernel, _new(tensors[:5], o), tensors)


def prepare(kernel: ModuleType, outs: Sequence[Tensor], tensors: Tensors, o: Options) -> None:
    r"""Writes what there is to know of parameters and shift."""

    def write(m: Rows, outs: Sequence[Tensor], _: None, *rest: Any) -> None:
        *params, shift = rest
        kernel.prepare(m, outs, params, o)
        rq.squash(m, shift, o.shift_bound, outs[3])

    _in_pieces(write, kernel, outs, tensors)


def _new(like: Tensors, o: Options) -> Sequence[Tensor]:
    r"""Makes tensors of these shapes, to be written to."""
    form = torch.contiguous_format
    return [torch.empty_like(t, dtype=o.work, memory_format=form) for t in like if t is not None]


def _in_pieces(
    write: Callable[..., None], kernel: ModuleType, outs: Sequence[Tensor], tensors: Tensors
) -> tuple[Tensor, ...]:
    r"""Lets an element-wise function write what it makes of plain tensors, piece by piece where
    that is faster."""
    like, widths = outs[0], tensors[1]
    assert widths is not None
    layout = kernel.layout(len(widths))
    tensors = [t if t is None or t.dtype == like.dtype else t.to(like.dtype) for t in tensors]
    at_home, total = like.device.type == "cpu", layout.total
    chunk = (LIMIT if at_home else ELSEWHERE) // (total * like.element_size())
    if at_home:
        chunk = min(chunk, min(CHUNK, CACHED // total) * torch.get_num_threads())
    memory = scratch(like, like.dtype)
    for target, piece in _pieces(outs, tensors, like.shape, chunk):
        write(memory.rows(layout, target[0].shape), target, *piece)
    keep(memory)
    return tuple(outs)


def _pieces(
    outs: Sequence[Tensor], tensors: Tensors, shape: Size, chunk: int
) -> Iterable[tuple[Sequence[Tensor], Tensors]]:
    numel = shape.numel()
    if 2 * numel <= 3 * chunk:
        return ((outs, tensors),)
    # Splits the outermost dimension with small enough slices: what is contiguous stays so.
    fits = (i for i, n in enumerate(shape) if numel // n <= chunk)
    dim = next(fits, max(range(len(shape)), key=lambda i: shape[i]))
    step = -(-shape[dim] // round(numel / chunk))
    count = -(-shape[dim] // step)
    dim -= len(shape)  # the parameters have one more dimension, in front
    targets = zip(*(t.split(step, dim) for t in outs), strict=True)
    parts = ([None] * count if t is None else t.split(step, dim) for t in tensors)
    return zip(targets, zip(*parts, strict=True), strict=True)
