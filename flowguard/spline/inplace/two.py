r"""The two-bin spline in eager mode, without gradients recorded: in place, and with fewer passes.

The numbers are those of :mod:`flowguard.spline.two`, which says why the formulas hold, computed as in
:mod:`flowguard.spline.inplace.bin`. All that is scaled is the second term of a sum, which costs
nothing: for that, distances from the knot and sizes are taken with their sign changed, or, where
gradients are made of them, the knot is.
"""

__all__ = ["evaluate", "layout", "prepare", "pull_back"]

import torch
from torch import Tensor

from flowguard.spline.bin import Cell, Params
from flowguard.spline.inplace import bin as rq
from flowguard.spline.inplace.memory import Layout, Pair, Rows, Tensors
from flowguard.spline.options import Options


def layout(rows: int) -> Layout:
    r"""The memory that the functions need."""
    return Layout(pairs=6, singles=17)


def _knot(
    m: Rows, params: Params, o: Options, sign: int = 1
) -> tuple[Pair, Pair, Tensor, Tensor, Tensor, Tensor]:
    r"""The sigmoids of raw width and height; the knot, times a sign; numerator and denominator of
    the mean of the secants; what the pullback of the slope at the knot needs, and that slope."""
    (width, height, raw), reach = (p[0] for p in params), sign * o.reach()
    sigmoids, shares, at = m.pair(), m.pair(), m.pair()
    torch.sigmoid(width, out=sigmoids[1])
    torch.sigmoid(height, out=sigmoids[2])
    torch.add(m.number(-reach), sigmoids[0], alpha=2 * reach, out=shares[0])  # 0 for zeros
    torch.add(shares[1], shares[2], alpha=o.share(), out=at[1])
    torch.add(shares[2], shares[1], alpha=o.share(), out=at[2])
    m.give_pair(shares)
    top, bottom, u, d = m.take(), m.take(), m.take(), m.take()
    if o.slope is None:
        rq.published_slope(m, raw, u, d)
    else:
        square = m.number(o.unit()[0] ** 2)
        torch.addcmul(square, at[2], at[2], value=-1, out=top)
        torch.addcmul(square, at[1], at[2], value=-1, out=bottom)
        low, up = m.take(), o.lean()
        torch.add(m.number(-1.0), torch.sigmoid(raw, out=u), alpha=2, out=u)
        torch.addcmul(bottom, bottom, u, value=-up, out=low)
        torch.addcmul(top, top, u, value=up, out=d).div_(low)
        m.give(low)
    return sigmoids, at, top, bottom, u, d


def prepare(m: Rows, outs: Tensors, params: Params, o: Options) -> None:
    r"""Writes the inner knot and the slope there: all that the spline needs to know."""
    _, (_, kx, ky), *_, d = _knot(m, params, o)
    for out, made in zip(outs, (kx, ky, d), strict=False):
        out.copy_(made)


def evaluate(m: Rows, outs: Tensors, v: Tensor, params: Params, o: Options) -> None:
    r"""Writes the spline or its inverse, and the logarithm of its slope if that is wanted."""
    if o.prepared:
        kx, ky, d = (p[0] for p in params)
    else:
        sigmoids, (_, kx, ky), *unused, d = _knot(m, params, o)
        m.give_pair(sigmoids)
        m.give(*unused)
    (fraction, scale), steep = o.unit(), o.steep
    # The distance from `v` to the knot, and the end of the box on that side, its sign changed.
    z = torch.clamp(v, -o.bound, o.bound, out=m.take())
    torch.sub(ky if o.inverse else kx, z, alpha=1 / scale, out=z)
    end = torch.copysign(m.number(fraction), z, out=m.take())
    w, h = torch.add(end, kx, out=m.take()), torch.add(end, ky, out=m.take())
    cell = Cell(kx, ky, w, h, d, 1.0)
    if o.inverse:
        made = rq.solve(m, z, cell, steep, sign=-1)
    else:
        made = rq.advance(m, z, torch.div(h, w, out=m.take()), cell, steep, sign=-1)
    # Going forward, the end of the box is reached exactly, and so is the slope there.
    rq.finish(m, outs, v, made, o.bound, factor=scale, even=not o.inverse)


def pull_back(
    m: Rows, outs: Tensors, x: Tensor, params: Params, grads: Tensors, o: Options
) -> None:
    r"""Writes the gradients to the input and to the parameters; see :func:`flowguard.spline.bin.pull_back`."""
    (_, p, q), minus, top, bottom, u, d = _knot(m, params, o, sign=-1)
    (_, mx, my), size, (fraction, scale) = minus, m.pair(), o.unit()
    z = torch.clamp(x, -o.bound, o.bound, out=m.take())
    torch.add(mx, z, alpha=1 / scale, out=z)
    end = torch.copysign(m.number(fraction), z, out=m.take())
    torch.add(minus[0], end, out=size[0])
    m.give(end)
    cell = Cell(mx, my, size[1], size[2], d, 1.0)

    # In the units of the box, all gradients but that to x are smaller by the scale.
    gy, gl = rq.masked(m, outs, x, grads, o.bound)
    gl.mul_(m.number(1 / scale))
    s = torch.div(cell.h, cell.w, out=m.take())
    pull = rq.pull_back(m, z, s, cell, (gy, gl), o.inverse)
    outs[0].add_(pull.grad)
    to_width, to_height, to_raw = (out[0] for out in outs[1:4])
    log_d = pull.d[1].mul_(d)
    if o.slope is None:
        rq.published_pullback(m, log_d, params[2][0], u, to_raw)
        to_raw.mul_(m.number(scale))
    else:
        up, rest = o.lean(), d
        torch.addcmul(m.number(1 / (up * scale)), u, u, value=-up / scale, out=rest)
        torch.div(log_d, rest, out=rest)
        torch.ops.aten.tanh_backward.grad_input(rest, u, grad_input=to_raw)

    to_size = m.pair()
    to_kx, to_my = torch.div(pull.log_s, size[0], out=to_size[0]).unbind()
    to_kx.addcmul_(pull.z, pull.r, value=-1)
    to_my.addcmul_(pull.y, pull.rest, value=-1)
    if o.slope is not None:
        to_bottom = torch.div(log_d, bottom, out=bottom)
        to_kx.addcmul_(to_bottom, my, value=-1)
        to_my.addcmul_(to_bottom, mx)
        to_my.addcmul_(torch.div(log_d, top, out=top), my, value=-2)

    by = scale * 2 * o.reach()
    torch.sub(to_kx, to_my, alpha=o.share(), out=size[1])
    torch.sub(to_my, to_kx, alpha=o.share(), out=size[2])
    for grad, sigmoid, out in ((size[1], p, to_width), (size[2], q, to_height)):
        torch.ops.aten.sigmoid_backward.grad_input(grad, sigmoid, grad_input=out)
    to_width.mul_(m.number(by))
    to_height.mul_(m.number(-by))
