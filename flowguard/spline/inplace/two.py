r"""The two-bin spline in eager mode, without gradients recorded: in place, and with fewer passes.

The numbers are those of :mod:`flowguard.spline.two`, which says why the formulas hold, computed as in
:mod:`flowguard.spline.inplace.bin`. Knots are held with their sign changed: so that all that is scaled is
the second term of a sum, which costs nothing.
"""

__all__ = ["LAYOUT", "evaluate", "evaluate_at", "knots", "pull_back"]

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowguard.spline import bin as rq
from flowguard.spline.inplace import bin as plain
from flowguard.spline.inplace.memory import Layout, Pair, Rows
from flowguard.spline.two import knot_scale, lean

LAYOUT = Layout(pairs=6, singles=17)


class Knot(NamedTuple):
    r"""The knot and the slope there."""

    sigmoids: Pair  # of the raw width and height
    minus: Pair  # the knot, with its sign changed
    top: Tensor  # of the mean of the secants
    bottom: Tensor
    u: Tensor  # what the pullback of the slope needs
    d: Tensor


def _knot(
    m: Rows,
    width: Tensor,
    height: Tensor,
    raw: Tensor,
    bound: float,
    slope: float | None,
    least: float,
) -> Knot:
    sigmoids, shares, minus = m.pair(), m.pair(), m.pair()
    torch.sigmoid(width, out=sigmoids[1])
    torch.sigmoid(height, out=sigmoids[2])
    share, scale = rq.mixing(slope), knot_scale(bound, slope, least)
    torch.sub(m.number(scale), sigmoids[0], alpha=2 * scale, out=shares[0])  # 0 for zeros
    torch.add(shares[1], shares[2], alpha=share, out=minus[1])
    torch.add(shares[2], shares[1], alpha=share, out=minus[2])
    m.give_pair(shares)
    top, bottom, u, d = m.take(), m.take(), m.take(), m.take()
    if slope is None:
        plain.published_slope(m, raw, u, d)
    else:
        square = m.number(rq.unit(bound)[0] ** 2)
        torch.addcmul(square, minus[2], minus[2], value=-1, out=top)
        torch.addcmul(square, minus[1], minus[2], value=-1, out=bottom)
        low, up = m.take(), lean(slope)
        plain.tanh_half(m, raw, u)
        torch.addcmul(bottom, bottom, u, value=-up, out=low)
        torch.addcmul(top, top, u, value=up, out=d).div_(low)
        m.give(low)
    return Knot(sigmoids, minus, top, bottom, u, d)


def _distance(m: Rows, v: Tensor, minus: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    r"""The distance from the knot, and the end of the box on that side."""
    fraction, scale = rq.unit(bound)
    z = torch.clamp(v, -bound, bound, out=m.take())
    torch.add(minus, z, alpha=1 / scale, out=z)
    return z, torch.copysign(m.number(fraction), z, out=m.take())


def knots(
    m: Rows,
    outs: Sequence[Tensor],
    width: Tensor,
    height: Tensor,
    raw: Tensor,
    shift: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    shift_bound: float | None,
) -> None:
    r"""Writes the inner knot, with its sign changed, the slope there, and the shift, but for a
    factor: all that the spline needs to know."""
    knot = _knot(m, width, height, raw, bound, slope, least)
    for out, made in zip(outs, (*knot.minus[1:], knot.d), strict=False):
        out.copy_(made)
    plain.squash(m, shift, shift_bound, outs[3])


def evaluate(
    m: Rows,
    outs: Sequence[Tensor],
    v: Tensor,
    width: Tensor,
    height: Tensor,
    raw: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
) -> None:
    r"""Writes the spline or its inverse, and the logarithm of its slope if there are two tensors
    to write to."""
    knot = _knot(m, width, height, raw, bound, slope, least)
    m.give_pair(knot.sigmoids)
    m.give(knot.top, knot.bottom, knot.u)
    evaluate_at(m, outs, v, *knot.minus[1:], knot.d, bound, inverse)


def evaluate_at(
    m: Rows,
    outs: Sequence[Tensor],
    v: Tensor,
    mx: Tensor,
    my: Tensor,
    d: Tensor,
    bound: float,
    inverse: bool,
) -> None:
    r"""The same as :func:`evaluate`, for what :func:`knots` wrote."""
    z, end = _distance(m, v, my if inverse else mx, bound)
    w, h = torch.add(end, mx, out=m.take()), torch.add(end, my, out=m.take())
    steep = len(outs) > 1
    if inverse:
        value, grown = plain.solve(m, z, w, h, d, None, mx, steep, sign=-1)
    else:
        s = torch.div(h, w, out=m.take())
        value, grown = plain.advance(m, z, w, s, d, None, my, steep, sign=-1)
    # Going forward, the end of the box is reached exactly, and so is the slope there.
    factor = -rq.unit(bound)[1]
    plain.finish(m, v, value, grown, bound, outs, factor=factor, even=not inverse)


def pull_back(
    m: Rows,
    outs: Sequence[Tensor],
    x: Tensor,
    width: Tensor,
    height: Tensor,
    raw: Tensor,
    grad_y: Tensor,
    grad_l: Tensor,
    bound: float,
    slope: float | None,
    least: float,
    inverse: bool,
) -> None:
    r"""Writes the gradients to the input and to the parameters; see :func:`flowguard.spline.bin.pull_back`."""
    (_, p, q), minus, top, bottom, u, d = _knot(m, width, height, raw, bound, slope, least)
    (_, mx, my), size = minus, m.pair()
    z, end = _distance(m, x, mx, bound)
    torch.add(minus[0], end, out=size[0])
    m.give(end)
    _, w, h = size
    s = torch.div(h, w, out=m.take())

    # In the units of the box, all gradients but that to x are smaller by the scale.
    scale, masked = rq.unit(bound)[1], torch.ops.aten.hardtanh_backward.grad_input
    gy = masked(grad_y, x, -bound, bound, grad_input=m.take())
    gl = masked(grad_l, x, -bound, bound, grad_input=m.take()).mul_(m.number(1 / scale))
    torch.sub(grad_y, gy, out=outs[0])
    pull = plain.pull_back(m, z, w, h, s, d, None, gy, gl, inverse)
    outs[0].add_(pull.grad)
    log_d = pull.d[1].mul_(d)
    if slope is None:
        plain.published_slope_pullback(m, log_d, raw, u, outs[3])
        outs[3].mul_(m.number(scale))
    else:
        up, rest = lean(slope), d
        torch.addcmul(m.number(1 / (up * scale)), u, u, value=-up / scale, out=rest)
        torch.div(log_d, rest, out=rest)
        torch.ops.aten.tanh_backward.grad_input(rest, u, grad_input=outs[3])

    to_size = m.pair()
    to_kx, to_my = torch.div(pull.log_s, size[0], out=to_size[0]).unbind()
    to_kx.addcmul_(pull.z, pull.r, value=-1)
    to_my.addcmul_(pull.y, pull.rest, value=-1)
    if slope is not None:
        to_bottom = torch.div(log_d, bottom, out=bottom)
        to_kx.addcmul_(to_bottom, my, value=-1)
        to_my.addcmul_(to_bottom, mx)
        to_my.addcmul_(torch.div(log_d, top, out=top), my, value=-2)

    share, scale = rq.mixing(slope), scale * 2 * knot_scale(bound, slope, least)
    torch.sub(to_kx, to_my, alpha=share, out=size[1])
    torch.sub(to_my, to_kx, alpha=share, out=size[2])
    for grad, sigmoid, out, by in zip(size[1:], (p, q), outs[1:], (scale, -scale), strict=False):
        torch.ops.aten.sigmoid_backward.grad_input(grad, sigmoid, grad_input=out)
        out.mul_(m.number(by))
