r"""The rational-quadratic spline as one operation with closed-form gradients.

:mod:`flowguard.functional` holds the public function, :mod:`flowguard._rqs_two` and
:mod:`flowguard._rqs_many` the maths, written for plain tensors of one common shape.
"""

__all__ = ["RationalQuadratic", "apply", "apply_at", "knots"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from flowguard import _rqs_many as many
from flowguard import _rqs_many_plain as many_plain
from flowguard import _rqs_two as two
from flowguard import _rqs_two_plain as two_plain

MIN_FRACTION = 1e-3  # the least width and height of a bin, as a share of the box (published: 1e-3)
CHUNK = 2**15  # elements per thread worked on at a time in eager mode: temporaries stay in cache
CHUNK_MANY = 3 * 2**13  # the same for three bins and more


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


def apply(*inputs: Any, steep: bool = True) -> tuple[Tensor, ...]:
    r"""Applies the spline as one operation; in eager mode forward derivatives work too.

    Returns the value and, if it shall be `steep`, the logarithm of the slope.
    """
    # The compiler refuses functions that define `jvp`, and fuses better what is not in place; what
    # is not wanted it leaves out by itself.
    if torch.compiler.is_compiling():
        return RationalQuadratic.apply(*inputs)[: 1 + steep]
    return _Eager.apply(*inputs, steep)


def knots(
    width: Tensor, height: Tensor, raw: Tensor, bound: float, slope: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The inner knot of two-bin splines and the slope there, as constants."""
    return two_plain.knots(width, height, raw, bound, slope, least_share(2))


def apply_at(
    v: Tensor, kx: Tensor, ky: Tensor, d: Tensor, bound: float, inverse: bool, *, steep: bool
) -> tuple[Tensor, ...]:
    r"""Applies the two-bin spline for known knots, which are taken as constants."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return two.evaluate_at(v, kx, ky, d, bound, inverse)[: 1 + steep]
    tensors = (v, *(t.unsqueeze(0) for t in (kx, ky, d)))
    return _in_pieces(_plain_at, tensors, (v,) * (1 + steep), (v.dtype, bound, inverse, steep))


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


def _plain_evaluate(
    memory: many_plain.Rows | None,
    v: Tensor,
    w: Tensor,
    h: Tensor,
    d: Tensor,
    work: torch.dtype,
    *options: Any,
) -> tuple[Tensor, ...]:
    v, w, h, d = v.to(work), w.to(work), h.to(work), d.to(work)
    if memory is None:
        return two_plain.evaluate(v, w[0], h[0], d[0], *options)
    return many_plain.evaluate(memory, v, w, h, d, *options)


def _plain_pull_back(
    memory: many_plain.Rows | None,
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
    if memory is None:
        to_x, *pulled = two_plain.pull_back(x, w[0], h[0], d[0], gy, gl, *options)
        return to_x, *(g.unsqueeze(0) for g in pulled)
    return many_plain.pull_back(memory, x, w, h, d, gy, gl, *options)


def _plain_at(
    memory: None,
    v: Tensor,
    kx: Tensor,
    ky: Tensor,
    d: Tensor,
    work: torch.dtype,
    *options: Any,
) -> tuple[Tensor, ...]:
    return two_plain.evaluate_at(v, kx[0], ky[0], d[0], *options)


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Rounds to a dtype, where what is too large becomes the largest number."""
    if x.dtype == dtype:
        return x
    info = torch.finfo(dtype)
    return x.clamp(info.min, info.max).to(dtype)


def _cut(shape: Size, chunk: int) -> tuple[int, int]:
    r"""The dimension to split, and how much of it makes about `chunk` elements."""
    # The outermost dimension with small enough slices: what is contiguous stays so.
    numel = shape.numel()
    fits = (i for i, n in enumerate(shape) if numel // n <= chunk)
    dim = next(fits, max(range(len(shape)), key=lambda i: shape[i]))
    return dim, max(1, chunk * shape[dim] // numel)


def _in_pieces(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, ...],
    like: tuple[Tensor, ...],
    options: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    r"""Applies an element-wise function to plain tensors, piece by piece where that is faster.

    `like` holds a tensor of the shape of each output.
    """
    x, bins, work = tensors[0], len(tensors[1]) + 1, options[0]
    chunk = torch.get_num_threads() * (CHUNK if bins == 2 else CHUNK_MANY)
    whole = x.device.type != "cpu" or x.numel() <= chunk
    dim, step = (0, x.numel()) if whole else _cut(x.shape, chunk)
    size = step if whole else x.numel() // x.shape[dim] * step
    memory = None if bins == 2 else many_plain.Rows(x, bins, size, work)
    if whole:
        return function(memory, *tensors, *options)

    dim -= x.dim()  # the parameters have one more dimension, in front
    outs = tuple(
        torch.empty_like(t, dtype=work, memory_format=torch.contiguous_format) for t in like
    )
    targets = zip(*(t.split(step, dim) for t in outs), strict=True)
    pieces = zip(*(t.split(step, dim) for t in tensors), strict=True)
    for target, piece in zip(targets, pieces, strict=True):
        for out, part in zip(target, function(memory, *piece, *options), strict=True):
            out.copy_(part)
    return outs


def _batch_first(
    size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    r"""Moves a batch dimension to the front of elements, and behind the bins of parameters."""
    rank = max(t.dim() - (d is not None) for t, d in zip(tensors[:1], dims[:1], strict=True))
    out = []
    for t, d in zip(tensors, dims, strict=True):
        to = t.dim() - (d is not None) - rank  # 1 for parameters
        t = t.unsqueeze(to) if d is None else t.movedim(d, to)
        out.append(t.expand(*t.shape[:to], size, *t.shape[to + 1 :]))
    return tuple(out)


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
        return _evaluate(v, widths, heights, derivatives, work, bound, slope, least, inverse)

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
        return _narrowed(ctx, _pull_back(*ctx.saved_tensors, *grads, *ctx.options))


class _Eager(RationalQuadratic):
    r"""The same in place and piece by piece, with forward derivatives."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *tensors, work, bound, slope, inverse, steep = inputs
        options = (work, bound, slope, least_share(len(tensors[1]) + 1), inverse, steep)
        return _in_pieces(_plain_evaluate, tuple(tensors), (tensors[0],) * (1 + steep), options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        RationalQuadratic.setup_context(ctx, inputs[:-1], output)
        v, widths, heights, derivatives, *_ = inputs
        ctx.steep = inputs[-1]
        ctx.save_for_forward(output[0] if ctx.options[-1] else v, widths, heights, derivatives)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # To be differentiated, or batched by `is_grads_batched`, which knows no rule for functions.
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if len(grads) == 1:
            grads = (*grads, torch.zeros_like(grads[0]))
        if recorded or any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
            return *RationalQuadratic.backward(ctx, *grads), None
        return *_narrowed(ctx, _PullBack.apply(*ctx.saved_tensors, *grads, *ctx.options)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        # Every element has its own derivatives: those of the two outputs, one at a time.
        one = torch.ones_like(ctx.saved_tensors[0], dtype=ctx.options[0])
        zero = torch.zeros_like(one)
        outs = []
        for cotangents in ((one, zero), (zero, one))[: 1 + ctx.steep]:
            grads = _pull_back(*ctx.saved_tensors, *cotangents, *ctx.options)
            out = zero
            for grad, tangent in zip(grads, tangents, strict=False):
                if tangent is not None:
                    product = grad * tangent
                    out = out + (product if product.dim() == one.dim() else product.sum(0))
            outs.append(out)
        return tuple(outs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        # Nothing may be written in place under vmap: the batch becomes one more dimension.
        tensors = _batch_first(info.batch_size, in_dims[:4], inputs[:4])
        return _Eager.apply(*tensors, *inputs[4:]), (0,) * (1 + inputs[-1])


class _PullBack(torch.autograd.Function):
    r"""The backward of the spline where it is not to be differentiated itself."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        tensors = inputs[:6]
        return _in_pieces(_plain_pull_back, tensors, tensors[:4], inputs[6:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors = _batch_first(info.batch_size, in_dims[:6], inputs[:6])
        return _PullBack.apply(*tensors, *inputs[6:]), (0, 1, 1, 1)


def _narrowed(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    out = (_narrow(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
    return (*out, None, None, None, None)
