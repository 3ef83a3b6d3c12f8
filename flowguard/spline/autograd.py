r"""The rational-quadratic spline as one operation with closed-form gradients.

:mod:`flowguard.functional` holds the public functions, :mod:`flowguard.spline.two`,
:mod:`flowguard.spline.many` and :mod:`flowguard.spline.usual` the maths, written for plain tensors
of one common shape, :mod:`flowguard.spline.inplace` the same for eager mode, several times as fast,
and :mod:`flowguard.spline.compiled` what the compiler makes of it, faster yet. Here alone it is
decided which of them computes.
"""

__all__ = ["apply", "prepare"]

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowguard.numerics import watchable
from flowguard.spline import compiled, formulas
from flowguard.spline.bin import Params
from flowguard.spline.choice import kernels
from flowguard.spline.inplace import many as inplace_many
from flowguard.spline.inplace import pieces
from flowguard.spline.inplace import two as inplace_two
from flowguard.spline.inplace import usual as inplace_usual
from flowguard.spline.options import Options


def _kernel(widths: Tensor, o: Options) -> ModuleType:
    r"""What computes splines of as many bins in place."""
    if o.usual is not None:
        return inplace_usual
    return inplace_two if len(widths) == 1 else inplace_many


def _evaluate(which: str, inputs: Sequence[Any], o: Options) -> tuple[Tensor, ...]:
    made = compiled.evaluate(inputs, o) if which == "compiled" else None
    return pieces.evaluate(_kernel(inputs[1], o), inputs, o) if made is None else made


def apply(x: Tensor, params: Params, shift: Tensor | None, o: Options) -> tuple[Tensor, ...]:
    r"""Applies the spline as one operation; in eager mode forward derivatives work too.

    Takes an input and a shift of shape :math:`(*)` and parameters of shape :math:`(K - 1, *)`, of
    which what was prepared is taken as constant. Returns the value and, if it is wanted, the
    logarithm of the slope, in the dtype to work in.
    """
    inputs = x, *params, shift
    compiling = torch.compiler.is_compiling()
    forward_mode = not compiling and forward_ad._current_level >= 0
    if watchable() and not forward_mode and (which := kernels.chosen()) != "traced":
        watched = torch.is_grad_enabled()
        if not (watched and any(t is not None and t.requires_grad for t in inputs)):
            return _evaluate(which, inputs, o)
        if not o.prepared:
            return _Eager.apply(*inputs, o, which)
    if not compiling and torch._C._is_tracing():  # whose graphs hold no operation of ours
        return formulas.evaluate(*inputs, o)[: 1 + o.steep]
    function = RationalQuadratic if compiling else _Forward
    outs = formulas.evaluate(*inputs, o) if o.prepared else function.apply(*inputs, o)
    # What is not wanted the compiler leaves out by itself.
    return outs[: 1 + o.steep]


def prepare(outs: Sequence[Tensor], params: Params, shift: Tensor, o: Options) -> None:
    r"""Writes what there is to know of parameters of two bins and of a shift, taken as constants:
    the knot, the slope there and the shift, which may take the place of the parameters."""
    pieces.prepare(_kernel(params[0], o), outs, (None, *params, shift), o)


class RationalQuadratic(torch.autograd.Function):
    r"""The spline with a closed-form backward, which keeps no intermediate tensor alive.

    The backward is made of operations that can be differentiated themselves. Gradients to half
    precision are cut at what it can hold.
    """

    generate_vmap_rule = True
    forward = staticmethod(formulas.evaluate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options = inputs
        # The inverse saves its output: there the gradients are those of the forward direction.
        saved = output[0] if ctx.options.inverse else tensors[0], *tensors[1:]
        ctx.save_for_backward(*saved)
        if not torch.compiler.is_compiling():
            ctx.save_for_forward(*saved)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _narrowed(ctx, formulas.pull_back(ctx.options, *ctx.saved_tensors, *grads))


class _Forward(RationalQuadratic):
    r"""The same with forward derivatives, which the compiler does not know."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        # Every element has its own derivatives: those of the two outputs, one at a time.
        one = torch.ones_like(ctx.saved_tensors[0], dtype=ctx.options.work)
        zero = torch.zeros_like(one)

        def along(*to_outs: Tensor) -> Tensor:
            grads = formulas.pull_back(ctx.options, *ctx.saved_tensors, *to_outs)
            pairs = zip(grads, tangents, strict=False)
            products = [g * t for g, t in pairs if g is not None and t is not None]
            return sum((p if p.dim() == one.dim() else p.sum(0) for p in products), start=zero)

        return along(one, zero), along(zero, one)


class _Eager(torch.autograd.Function):
    r"""The same in place or compiled; without the logarithm of the slope if it is not wanted.

    What was chosen for the forward computes the backward, which may run in a thread of its own.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, o, ctx.which = inputs
        outs = _evaluate(ctx.which, tensors, o)
        RationalQuadratic.setup_context(ctx, inputs[:-1], outs)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if len(grads) == 1:
            grads = (*grads, torch.zeros_like(grads[0]))
        # To be differentiated, or batched by `is_grads_batched`.
        batched = any(map(torch._C._functorch.is_legacy_batchedtensor, grads))
        if torch.is_grad_enabled() or batched or not watchable():
            return *RationalQuadratic.backward(ctx, *grads), None
        tensors, o = (*ctx.saved_tensors, *grads), ctx.options
        made = compiled.pull_back(tensors, o) if ctx.which == "compiled" else None
        if made is None:
            made = pieces.pull_back(_kernel(tensors[1], o), tensors, o)
        return *_narrowed(ctx, made), None


def _narrowed(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    r"""Rounds gradients to the dtypes of the inputs, where what is too large becomes the largest
    number. There is none of the options, and without a shift there may be none of that."""
    out: list[Tensor | None] = [None] * 6
    for k, (grad, dtype) in enumerate(zip(grads, ctx.dtypes, strict=False)):
        if grad is not None and grad.dtype != dtype:
            info = torch.finfo(dtype)
            grad = grad.clamp(info.min, info.max).to(dtype)
        out[k] = grad
    return tuple(out)
