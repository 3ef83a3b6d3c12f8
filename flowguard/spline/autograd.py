r"""The rational-quadratic spline as one operation with closed-form gradients.

:mod:`flowguard.functional` holds the public function, :mod:`flowguard.spline.two` and
:mod:`flowguard.spline.many` the maths, written for plain tensors of one common shape, and
:mod:`flowguard.spline.inplace` the same for eager mode, several times as fast. Here alone it is
decided which of them computes.
"""

__all__ = ["INPLACE", "apply", "evaluate", "prepare"]

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowguard.spline import bin as rq
from flowguard.spline import many, two
from flowguard.spline.bin import Params
from flowguard.spline.inplace import many as inplace_many
from flowguard.spline.inplace import pieces
from flowguard.spline.inplace import two as inplace_two
from flowguard.spline.options import Options

#: Whether eager mode computes in place; benchmarks turn it off.
INPLACE = True


def _kernels(widths: Tensor) -> tuple[ModuleType, ModuleType]:
    r"""What computes splines of as many bins: traced, and in place."""
    return (two, inplace_two) if len(widths) == 1 else (many, inplace_many)


def _in_place() -> bool:
    r"""Whether to compute in place. The compiler fuses better what is not; it also refuses
    functions that define `jvp`."""
    return INPLACE and not torch.compiler.is_compiling()


def apply(x: Tensor, params: Params, shift: Tensor | None, o: Options) -> tuple[Tensor, ...]:
    r"""Applies the spline as one operation; in eager mode forward derivatives work too.

    Arguments:
        x: The input, with shape :math:`(*)`.
        params: The parameters, with shape :math:`(K - 1, *)`.
        shift: The shift, with shape :math:`(*)`, or :py:`None`.
        o: The options. What was prepared is taken as constant.

    Returns:
        The value and, if it is wanted, the logarithm of the slope, in the dtype to work in.
    """
    inputs = x, *params, shift
    if not _in_place():
        # What is not wanted the compiler leaves out by itself.
        outs = evaluate(*inputs, o) if o.prepared else RationalQuadratic.apply(*inputs, o)
        return outs[: 1 + o.steep]
    if o.prepared and _is_recorded(inputs):
        return evaluate(*inputs, o)[: 1 + o.steep]
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*inputs, o)
    if _is_recorded(inputs):
        return _Eager.apply(*inputs, o)
    return _evaluate_in_place(*inputs, o)


def prepare(outs: Sequence[Tensor], params: Params, shift: Tensor, o: Options) -> None:
    r"""Writes what two-bin splines need to know of parameters and a shift, taken as constants: the
    knot, the slope there and the shift, of which the parameters' place may be taken."""
    pieces.prepare(_kernels(params[0])[1], outs, (None, *params, shift), o)


def _is_recorded(tensors: tuple[Tensor | None, ...]) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def evaluate(
    v: Tensor, w: Tensor, h: Tensor, d: Tensor, shift: Tensor | None, o: Options
) -> tuple[Tensor, ...]:
    r"""The same as formulas that the compiler sees and that can be differentiated."""
    v, w, h, d = (t.to(o.work) for t in (v, w, h, d))
    by = None
    if shift is not None:
        squash = rq.from_arc if o.prepared else rq.squash
        by = squash(shift.to(o.work), o.shift_bound)
    if o.inverse and by is not None:
        v = v - by
    out, steep = _kernels(w)[0].evaluate(v, (w, h, d), o)
    return out if o.inverse or by is None else out + by, steep


def _pull_back(
    x: Tensor, w: Tensor, h: Tensor, d: Tensor, shift: Tensor | None, *grads_o: Any
) -> tuple[Tensor | None, ...]:
    *grads, o = grads_o
    x, w, h, d = (t.to(o.work) for t in (x, w, h, d))
    to_x, *to_params = _kernels(w)[0].pull_back(x, (w, h, d), grads, o)
    to_by = -to_x if o.inverse else grads[0]
    return (
        to_x,
        *to_params,
        None if shift is None else rq.squash_pullback(shift.to(o.work), to_by, o.shift_bound),
    )


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Rounds to a dtype, where what is too large becomes the largest number."""
    if x.dtype == dtype:
        return x
    info = torch.finfo(dtype)
    return x.clamp(info.min, info.max).to(dtype)


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

    Takes x of shape :math:`(*)`, three parameters of shape :math:`(K - 1, *)`, a shift of shape
    :math:`(*)` or None, and options; returns the value and the logarithm of the slope, in the dtype
    to work in. The backward is made of differentiable operations, so that it can be differentiated
    itself. Gradients to half precision are cut at what it can hold.
    """

    generate_vmap_rule = True
    forward = staticmethod(evaluate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options = inputs
        # The inverse saves its output: there the gradients are those of the forward direction.
        ctx.save_for_backward(output[0] if ctx.options.inverse else tensors[0], *tensors[1:])
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _narrowed(ctx, _pull_back(*ctx.saved_tensors, *grads, ctx.options))


def _evaluate_in_place(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, o = inputs
    return pieces.evaluate(_kernels(tensors[1])[1], tensors, o)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    RationalQuadratic.setup_context(ctx, inputs, output)
    ctx.save_for_forward(output[0] if ctx.options.inverse else inputs[0], *inputs[1:5])


class _Eager(torch.autograd.Function):
    r"""The same in place, with forward derivatives; without the slope if it is not wanted."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outs = _evaluate_in_place(*inputs)
        _save(ctx, inputs, outs)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # To be differentiated, or batched by `is_grads_batched`, which knows no rule for functions.
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if len(grads) == 1:
            grads = (*grads, torch.zeros_like(grads[0]))
        if recorded or any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
            return RationalQuadratic.backward(ctx, *grads)
        pull = _PullBack.apply if torch._C._are_functorch_transforms_active() else _pull
        return _narrowed(ctx, pull(*ctx.saved_tensors, *grads, ctx.options))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        # Every element has its own derivatives: those of the two outputs, one at a time.
        one = torch.ones_like(ctx.saved_tensors[0], dtype=ctx.options.work)
        zero = torch.zeros_like(one)
        outs = []
        for to_outs in ((one, zero), (zero, one))[: 1 + ctx.options.steep]:
            out = zero
            grads = _pull_back(*ctx.saved_tensors, *to_outs, ctx.options)
            for grad, tangent in zip(grads, tangents, strict=False):
                if grad is not None and tangent is not None:
                    product = grad * tangent
                    out = out + (product if product.dim() == one.dim() else product.sum(0))
            outs.append(out)
        return tuple(outs)


class _Transformed(_Eager):
    r"""The same for the transforms of `torch.func`, whose way to call functions takes longer."""

    forward = staticmethod(_evaluate_in_place)
    setup_context = staticmethod(_save)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        # Nothing may be written in place under vmap: the batch becomes one more dimension.
        tensors = _batch_first(info.batch_size, in_dims[:5], inputs[:5])
        return _Transformed.apply(*tensors, inputs[5]), (0,) * (1 + inputs[5].steep)


def _pull(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, o = inputs
    return pieces.pull_back(_kernels(tensors[1])[1], tensors, o)


class _PullBack(torch.autograd.Function):
    r"""The backward of the spline where it is not to be differentiated itself."""

    forward = staticmethod(_pull)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        tensors = _batch_first(info.batch_size, in_dims[:7], inputs[:7])
        dims = (0, 1, 1, 1, 0)[: 4 + (tensors[4] is not None)]
        return _PullBack.apply(*tensors, inputs[7]), dims


def _narrowed(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    # Without a shift there may be no gradient of one; there is none of the options.
    out = [
        None if g is None else _narrow(g, dtype)
        for g, dtype in zip(grads, ctx.dtypes, strict=False)
    ]
    return *out, *[None] * (6 - len(out))
