r"""The rational-quadratic spline as one operation with closed-form gradients.

:mod:`flowguard.functional` holds the public function, :mod:`flowguard.spline.two` and
:mod:`flowguard.spline.many` the maths, written for plain tensors of one common shape.
"""

__all__ = ["RationalQuadratic", "apply", "apply_at", "knots"]

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd import forward_ad

from flowguard.spline import bin as rq
from flowguard.spline import many, two
from flowguard.spline.inplace import bin as plain
from flowguard.spline.inplace import many as many_plain
from flowguard.spline.inplace import two as two_plain
from flowguard.spline.inplace.memory import LIMIT, Layout, Rows, keep, scratch

MIN_FRACTION = 1e-3  # the least width and height of a bin, as a share of the box (published: 1e-3)
CHUNK = 2**15  # elements per thread worked on at a time in eager mode: temporaries stay in cache
FEW = 7  # rows of parameters that the compiler reads from strided memory; more it copies first
ELSEWHERE = 2**29  # bytes of temporaries on other devices, where pieces only save memory


def least_share(bins: int) -> float:
    r"""The least width and height of a bin, as a share of the box."""
    return min(MIN_FRACTION, 0.5 / bins)


def _rows(*params: Tensor) -> list[many.Rows]:
    r"""The rows of each bin, from left to right."""
    if many.is_strided(params[0]) and len(params[0]) > FEW:
        params = torch.cat(params).chunk(3)
    # Of `unbind` all would be kept for the backward, rather than worked out anew.
    return [[p[k] for k in range(len(p))] for p in params]


def apply(*inputs: Any, steep: bool = True) -> tuple[Tensor, ...]:
    r"""Applies the spline as one operation; in eager mode forward derivatives work too.

    Returns the value and, if it shall be `steep`, the logarithm of the slope.
    """
    # The compiler refuses functions that define `jvp`, and fuses better what is not in place; what
    # is not wanted it leaves out by itself.
    if torch.compiler.is_compiling():
        return RationalQuadratic.apply(*inputs)[: 1 + steep]
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*inputs, steep)
    if _is_recorded(inputs[:5]):
        return _Eager.apply(*inputs, steep)
    return _eager(*inputs, steep)


def _is_recorded(tensors: tuple[Tensor | None, ...]) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def knots(
    raw: Tensor,
    made: Tensor,
    dim: int,
    bound: float,
    slope: float | None,
    shift_bound: float | None,
) -> float:
    r"""Writes what two-bin splines need to know of parameters, which are taken as constants.

    Along a dimension the parameters are width, height, derivative and shift, and what is made of
    them both coordinates of the inner knot with their signs changed, the slope there, and the
    shift, which is still to be multiplied by the number that is returned. It may take their place.
    """
    options = bound, slope, least_share(2), shift_bound
    _in_pieces(two_plain.knots, two_plain.LAYOUT, made.unbind(dim), raw.unbind(dim), options)
    return plain.squash_factor(shift_bound, raw.dtype)


def apply_at(
    v: Tensor, mx: Tensor, my: Tensor, d: Tensor, bound: float, inverse: bool, *, steep: bool
) -> tuple[Tensor, ...]:
    r"""Applies the two-bin spline for what :func:`knots` made, taken as constants."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return two.evaluate_at(v, -mx, -my, d, bound, inverse)[: 1 + steep]
    outs = _new((v,) * (1 + steep), v.dtype)
    _in_pieces(two_plain.evaluate_at, two_plain.LAYOUT, outs, (v, mx, my, d), (bound, inverse))
    return outs


def _evaluate(
    v: Tensor,
    w: Tensor,
    h: Tensor,
    d: Tensor,
    shift: Tensor | None,
    work: torch.dtype,
    bound: float,
    slope: float | None,
    shift_bound: float | None,
    inverse: bool,
) -> tuple[Tensor, ...]:
    v, w, h, d = v.to(work), w.to(work), h.to(work), d.to(work)
    by = None if shift is None else rq.squash(shift.to(work), shift_bound)
    if inverse and by is not None:
        v = v - by
    options = (bound, slope, least_share(len(w) + 1), inverse)
    if len(w) == 1:
        out, steep = two.evaluate(v, w[0], h[0], d[0], *options)
    else:
        rows = _rows(w, h, d)
        out, steep = many.evaluate(v, rows[0], rows[1], rows[2], *options)
    return out if inverse or by is None else out + by, steep


def _pull_back(
    x: Tensor,
    w: Tensor,
    h: Tensor,
    d: Tensor,
    shift: Tensor | None,
    gy: Tensor,
    gl: Tensor,
    work: torch.dtype,
    bound: float,
    slope: float | None,
    shift_bound: float | None,
    inverse: bool,
) -> tuple[Tensor | None, ...]:
    x, w, h, d = x.to(work), w.to(work), h.to(work), d.to(work)
    options = (bound, slope, least_share(len(w) + 1), inverse)
    grads: tuple[Tensor, ...]
    if len(w) == 1:
        to_x, *pulled = two.pull_back(x, w[0], h[0], d[0], gy, gl, *options)
        grads = to_x, *(g.unsqueeze(0) for g in pulled)
    else:
        rows = _rows(w, h, d)
        to_x, *of_rows = many.pull_back(x, rows[0], rows[1], rows[2], gy, gl, *options)
        grads = to_x, *map(torch.stack, of_rows)
    to_by = -to_x if inverse else gy
    return *grads, None if shift is None else rq.squash_pullback(
        shift.to(work), to_by, shift_bound
    )


def _shift(m: Rows, shift: Tensor, bound: float | None) -> tuple[Tensor, float]:
    plain.squash(m, shift, bound, by := m.take())
    return by, plain.squash_factor(bound, by.dtype)


def _plain_evaluate(
    m: Rows,
    outs: Sequence[Tensor],
    v: Tensor,
    w: Tensor,
    h: Tensor,
    d: Tensor,
    shift: Tensor | None,
    bound: float,
    slope: float | None,
    shift_bound: float | None,
    inverse: bool,
) -> None:
    if inverse and shift is not None:
        by, factor = _shift(m, shift, shift_bound)
        v = torch.sub(v, by, alpha=factor, out=m.take())
    options = (bound, slope, least_share(len(w) + 1), inverse)
    if len(w) == 1:
        two_plain.evaluate(m, outs, v, w[0], h[0], d[0], *options)
    else:
        many_plain.evaluate(m, outs, v, w, h, d, *options)
    if not inverse and shift is not None:
        m.restart()
        by, factor = _shift(m, shift, shift_bound)
        outs[0].add_(by, alpha=factor)


def _plain_pull_back(
    m: Rows,
    outs: Sequence[Tensor],
    x: Tensor,
    w: Tensor,
    h: Tensor,
    d: Tensor,
    shift: Tensor | None,
    gy: Tensor,
    gl: Tensor,
    bound: float,
    slope: float | None,
    shift_bound: float | None,
    inverse: bool,
) -> None:
    options = (bound, slope, least_share(len(w) + 1), inverse)
    if len(w) == 1:
        to_x, to_w, to_h, to_d = outs[:4]
        singles = (to_x, to_w[0], to_h[0], to_d[0])
        two_plain.pull_back(m, singles, x, w[0], h[0], d[0], gy, gl, *options)
    else:
        many_plain.pull_back(m, outs[:4], x, w, h, d, gy, gl, *options)
    if shift is not None:
        m.restart()
        to_by = torch.neg(outs[0], out=m.take()) if inverse else gy
        plain.squash_pullback(m, shift, to_by, shift_bound, outs[4])


def _layout(bins: int) -> Layout:
    return two_plain.LAYOUT if bins == 2 else many_plain.layout(bins)


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
    return dim, -(-shape[dim] // round(numel / chunk))


def _new(like: Iterable[Tensor | None], dtype: torch.dtype) -> tuple[Tensor, ...]:
    r"""Makes tensors of these shapes, to be written to."""
    form = torch.contiguous_format
    return tuple(
        torch.empty_like(t, dtype=dtype, memory_format=form) for t in like if t is not None
    )


def _in_pieces(
    function: Callable[..., None],
    layout: Layout,
    outs: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    options: tuple[Any, ...],
) -> None:
    r"""Lets an element-wise function write what it makes of plain tensors, piece by piece where
    that is faster."""
    shape, like = outs[0].shape, outs[0]
    tensors = [t if t is None else t.to(like.dtype) for t in tensors]
    at_home = like.device.type == "cpu"
    chunk = (LIMIT if at_home else ELSEWHERE) // (layout.total * like.element_size())
    if at_home:
        chunk = min(chunk, CHUNK * torch.get_num_threads())
    memory = scratch(like, like.dtype)
    for target, piece in _pieces(outs, tensors, shape, chunk):
        function(memory.rows(layout, target[0].shape), target, *piece, *options)
    keep(memory)


def _pieces(
    outs: Sequence[Tensor], tensors: Sequence[Tensor | None], shape: Size, chunk: int
) -> Iterable[tuple[Sequence[Tensor], Sequence[Tensor | None]]]:
    if 2 * shape.numel() <= 3 * chunk:
        return ((outs, tensors),)
    dim, step = _cut(shape, chunk)
    count = -(-shape[dim] // step)
    dim -= len(shape)  # the parameters have one more dimension, in front
    targets = zip(*(t.split(step, dim) for t in outs), strict=True)
    parts = ([None] * count if t is None else t.split(step, dim) for t in tensors)
    return zip(targets, zip(*parts, strict=True), strict=True)


def _batch_first(
    size: int, dims: Sequence[int | None], tensors: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    r"""Moves a batch dimension to the front of elements, and behind the bins of parameters."""
    x = tensors[0]
    assert x is not None
    rank = x.dim() - (dims[0] is not None)
    out = []
    for t, d in zip(tensors, dims, strict=True):
        if t is not None:
            to = t.dim() - (d is not None) - rank  # 1 for parameters
            t = t.unsqueeze(to) if d is None else t.movedim(d, to)
            t = t.expand(*t.shape[:to], size, *t.shape[to + 1 :])
        out.append(t)
    return tuple(out)


class RationalQuadratic(torch.autograd.Function):
    r"""The spline with a closed-form backward, which keeps no intermediate tensor alive.

    Takes x of shape :math:`(*)`, parameters of shape :math:`(K - 1, *)`, a shift of shape
    :math:`(*)` or None, the dtype to work in, the bound, the least slope, the bound of the shift
    and whether to invert; returns the value and the logarithm of the slope, in that dtype. The
    backward is made of differentiable operations, so that it can be differentiated itself.
    Gradients to half precision are cut at what it can hold.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        v: Tensor,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        shift: Tensor | None,
        work: torch.dtype,
        bound: float,
        slope: float | None,
        shift_bound: float | None,
        inverse: bool,
    ) -> tuple[Tensor, ...]:
        options = work, bound, slope, shift_bound, inverse
        return _evaluate(v, widths, heights, derivatives, shift, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.options, inverse = inputs[:5], inputs[5:10], inputs[9]
        # The inverse saves its output: there the gradients are those of the forward direction.
        ctx.save_for_backward(output[0] if inverse else tensors[0], *tensors[1:])
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _narrowed(ctx, _pull_back(*ctx.saved_tensors, *grads, *ctx.options))


def _eager(*inputs: Any) -> tuple[Tensor, ...]:
    r"""The same in place and piece by piece. There is one more input, `steep`."""
    tensors, work, options, steep = inputs[:5], inputs[5], inputs[6:10], inputs[10]
    outs = _new((tensors[0],) * (1 + steep), work)
    _in_pieces(_plain_evaluate, _layout(len(tensors[1]) + 1), outs, tensors, options)
    return outs


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    RationalQuadratic.setup_context(ctx, inputs, output)
    ctx.steep = inputs[10]
    ctx.save_for_forward(output[0] if ctx.options[-1] else inputs[0], *inputs[1:5])


class _Eager(torch.autograd.Function):
    r"""The same with gradients, and forward derivatives."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outs = _eager(*inputs)
        _save(ctx, inputs, outs)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # To be differentiated, or batched by `is_grads_batched`, which knows no rule for functions.
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if len(grads) == 1:
            grads = (*grads, torch.zeros_like(grads[0]))
        if recorded or any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
            return *RationalQuadratic.backward(ctx, *grads), None
        pull = _PullBack.apply if torch._C._are_functorch_transforms_active() else _pull
        return *_narrowed(ctx, pull(*ctx.saved_tensors, *grads, *ctx.options)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        # Every element has its own derivatives: those of the two outputs, one at a time.
        one = torch.ones_like(ctx.saved_tensors[0], dtype=ctx.options[0])
        zero = torch.zeros_like(one)
        outs = []
        for to_y, to_l in ((one, zero), (zero, one))[: 1 + ctx.steep]:
            inputs = (*ctx.saved_tensors, to_y, to_l, *ctx.options)
            grads = _pull_back(*inputs)
            out = zero
            for grad, tangent in zip(grads, tangents, strict=False):
                if grad is not None and tangent is not None:
                    product = grad * tangent
                    out = out + (product if product.dim() == one.dim() else product.sum(0))
            outs.append(out)
        return tuple(outs)


class _Transformed(_Eager):
    r"""The same for the transforms of `torch.func`, whose way to call functions takes longer."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _eager(*inputs)

    setup_context = staticmethod(_save)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        # Nothing may be written in place under vmap: the batch becomes one more dimension.
        tensors = _batch_first(info.batch_size, in_dims[:5], inputs[:5])
        return _Transformed.apply(*tensors, *inputs[5:]), (0,) * (1 + inputs[10])


def _pull(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, work, options = inputs[:7], inputs[7], inputs[8:]
    outs = _new(tensors[:5], work)
    _in_pieces(_plain_pull_back, _layout(len(tensors[1]) + 1), outs, tensors, options)
    return outs


class _PullBack(torch.autograd.Function):
    r"""The backward of the spline where it is not to be differentiated itself."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _pull(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors = _batch_first(info.batch_size, in_dims[:7], inputs[:7])
        return _PullBack.apply(*tensors, *inputs[7:]), (0, 1, 1, 1, 0)[
            : 4 + (tensors[4] is not None)
        ]


def _narrowed(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    # Without a shift there may be no gradient of one.
    out = [
        None if g is None else _narrow(g, dtype)
        for g, dtype in zip(grads, ctx.dtypes, strict=False)
    ]
    return *out, *[None] * (10 - len(out))
