r"""The rational-quadratic spline as one operation with closed-form gradients.

:mod:`flowguard.functional` holds the public function, :mod:`flowguard._rqs_two` and
:mod:`flowguard._rqs_many` the maths, written for plain tensors of one common shape.
"""

__all__ = ["RationalQuadratic", "apply"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowguard import _rqs_many as many
from flowguard import _rqs_two as two

MIN_FRACTION = 1e-3  # the least width and height of a bin, as a share of the box (published: 1e-3)
CHUNK = 2**15  # elements per thread worked on at a time in eager mode: temporaries stay in cache


def least_share(bins: int) -> float:
    r"""The least width and height of a bin, as a share of the box."""
    return min(MIN_FRACTION, 0.5 / bins)


def _rows(*params: Tensor) -> Sequence[many.Rows]:
    if not torch.compiler.is_compiling():
        return params
    if params[0].stride(-1) != 1:
        # The compiler does not vectorise a loop with many strided loads; this makes it copy first.
        params = torch.cat(params).chunk(3)
    return [p.unbind() for p in params]


def apply(*inputs: Any) -> tuple[Tensor, Tensor]:
    r"""Applies :class:`RationalQuadratic`; in eager mode forward derivatives work too."""
    # The compiler refuses functions that define `jvp`.
    function = RationalQuadratic if torch.compiler.is_compiling() else _WithTangents
    return function.apply(*inputs)


def _evaluate(
    v: Tensor, w: Tensor, h: Tensor, d: Tensor, work: torch.dtype, *options: Any
) -> tuple[Tensor, ...]:
    v, w, h, d = v.to(work), w.to(work), h.to(work), d.to(work)
    if len(w) == 1:
        return two.evaluate(v, w[0], h[0], d[0], *options)
    return many.evaluate(v, *_rows(w, h, d), *options)


def _pull_back(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    d: Tensor,
    gy: Tensor,
    gl: Tensor,
    work: torch.dtype,
    *options: Any,
) -> tuple[Tensor, ...]:
    x, w, h, d = x.to(work), w.to(work), h.to(work), d.to(work)
    if len(w) == 1:
        to_x, *pulled = two.pull_back(x, w[0], h[0], d[0], gy, gl, *options)
        return to_x, *(g.unsqueeze(0) for g in pulled)
    rows = _rows(w, h, d)
    to_x, *pulled = many.pull_back(x, rows[0], rows[1], rows[2], gy, gl, *options)
    return to_x, *(g if isinstance(g, Tensor) else torch.stack(g) for g in pulled)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Rounds to a dtype, where what is too large becomes the largest number."""
    if x.dtype == dtype:
        return x
    info = torch.finfo(dtype)
    return x.clamp(info.min, info.max).to(dtype)


def _in_pieces(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, ...],
    options: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    r"""Applies an element-wise function piece by piece, where that is faster."""
    x = tensors[0]
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return function(*tensors, *options)
    chunk = CHUNK * torch.get_num_threads()
    if x.numel() <= chunk:
        return function(*tensors, *options)

    # The outermost dimension with small enough slices: what is contiguous stays so.
    fits = (i for i, n in enumerate(x.shape) if x.numel() // n <= chunk)
    dim = next(fits, max(range(x.dim()), key=lambda i: x.shape[i]))
    step = max(1, chunk * x.shape[dim] // x.numel())
    dim -= x.dim()  # the parameters have one more dimension, in front
    pieces = zip(*(t.split(step, dim) for t in tensors), strict=True)
    outs = zip(*(function(*piece, *options) for piece in pieces), strict=True)
    return tuple(torch.cat(out, dim) for out in outs)


class RationalQuadratic(torch.autograd.Function):
    r"""The spline with a closed-form backward, which keeps no intermediate tensor alive.

    Takes x of shape :math:`(*)`, parameters of shape :math:`(K - 1, *)`, the dtype to work in,
    the bound, the least slope and whether to invert; returns the value and the logarithm of the
    slope, in that dtype. The backward is made of differentiable operations, so that it can be
    differentiated itself. Gradients to half precision are cut at what it can hold.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        v: Tensor,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        work: torch.dtype,
        bound: float,
        slope: float | None,
        inverse: bool,
    ) -> tuple[Tensor, ...]:
        least = least_share(len(widths) + 1)
        options = (work, bound, slope, least, inverse)
        return _in_pieces(_evaluate, (v, widths, heights, derivatives), options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        v, widths, heights, derivatives, work, bound, slope, inverse = inputs
        least = least_share(len(widths) + 1)
        # The inverse saves its output: there the gradients are those of the forward direction.
        ctx.save_for_backward(output[0] if inverse else v, widths, heights, derivatives)
        ctx.options = (work, bound, slope, least, inverse)
        ctx.dtypes = [t.dtype for t in (v, widths, heights, derivatives)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out = _in_pieces(_pull_back, (*ctx.saved_tensors, *grads), ctx.options)
        out = tuple(_narrow(g, dtype) for g, dtype in zip(out, ctx.dtypes, strict=True))
        return (*out, None, None, None, None)


class _WithTangents(RationalQuadratic):
    r"""The same, with forward derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        RationalQuadratic.setup_context(ctx, inputs, output)
        v, widths, heights, derivatives, *_ = inputs
        ctx.save_for_forward(output[0] if ctx.options[-1] else v, widths, heights, derivatives)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        # Every element has its own derivatives: those of the two outputs, one at a time.
        one = torch.ones_like(ctx.saved_tensors[0], dtype=ctx.options[0])
        zero = torch.zeros_like(one)
        outs = []
        for cotangents in ((one, zero), (zero, one)):
            grads = _in_pieces(_pull_back, (*ctx.saved_tensors, *cotangents), ctx.options)
            out = zero
            for grad, tangent in zip(grads, tangents, strict=False):
                if tangent is not None:
                    product = grad * tangent
                    out = out + (product if product.dim() == one.dim() else product.sum(0))
            outs.append(out)
        return tuple(outs)
