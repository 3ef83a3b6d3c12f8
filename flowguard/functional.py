r"""Pure functions: (x, parameters) -> (y, ladj).

Each is a monotone map of the real line, applied element by element. `ladj` is the logarithm of
the absolute derivative of the direction taken, element by element: nothing is summed here.
"""

__all__ = [
    "FAITHFUL",
    "FINE_SLOPE",
    "KEPT",
    "SLOPE",
    "Prepared",
    "additive",
    "affine",
    "bounded",
    "check_margin",
    "kernels",
    "limited",
    "prepare",
    "prepared_spline",
    "rational_quadratic_spline",
    "reparametrized_affine",
    "saturate",
    "shifted_spline",
    "softmax_spline",
    "straight_rational_quadratic_spline",
    "unconstrained_rational_quadratic_spline",
]

import math
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import NamedTuple

import torch
from torch import Size, Tensor

from flowguard.spline import autograd
from flowguard.spline import bin as rq
from flowguard.spline.choice import kernels
from flowguard.spline.options import Options, Usual

FAITHFUL = 0.8  #: the share of a bound up to which :func:`saturate` is the identity
NEAR = 1 - 1e-3  # the share that it may reach, for which :func:`bounded` has a finite argument
KEPT = 0.5  #: the share of a margin up to which :func:`limited` is the identity
BRIM = 1 - 2**-20  # the share of the rest up to which its inverse tells numbers apart
BOUNDS = 1e-10, 1e10  # of the box, for all to stay finite in single precision
GAINS = 1e-6, 1e6  # that slopes may be multiplied by, for the same reason

# Why these: "Least slopes" in docs/guarantees.md.
#: The least slope of splines over vectors: a flow of a few layers comes back in float32.
SLOPE = 1e-2
#: Over images, where less is better and few digits are lost, and of splines that have to follow
#: maps that are trained already.
FINE_SLOPE = 1e-3

#: What other libraries take for the least width, height and slope of their splines.
LEAST = 1e-3


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float,
    slope: float | None = SLOPE,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Applies a monotone rational-quadratic spline with bounded slope.

    On :math:`[-B, B]` the map is a spline with :math:`K` bins onto :math:`[-B, B]`, outside it is
    the identity, and both meet with slope one. All-zero parameters give the identity. Whatever the
    parameters are, infinite ones included, the slope of the spline lies in
    :math:`[\epsilon, 1/\epsilon]` on the whole line, and value, slope and all gradients are finite
    for finite `x`. A NaN in `x` or in the parameters makes that element NaN, and no other.

    Two bins are another map than three and more: zero derivatives make the slope at their knot the
    harmonic mean of the slopes of the adjacent bins, with three and more bins the geometric mean.

    References:
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        x: The input, with shape :math:`(*)`.
        widths: The unconstrained widths of all bins but the last, with shape :math:`(*, K - 1)`.
            The logit of the last bin is zero. With three and more bins, logits are cut at 60,
            where the exponential is still finite.
        heights: The unconstrained heights of all bins but the last, with shape :math:`(*, K - 1)`.
        derivatives: The unconstrained slopes at the inner knots, with shape :math:`(*, K - 1)`.
            Zero is a mean of the slopes of the two adjacent bins.
        bound: The bound :math:`B` of the box.
        slope: The least slope :math:`\epsilon`, in :math:`(0, 0.49]`. If :py:`None`, use the
            published parameterisation, in which the slope has no bound: bins of at least a
            thousandth of the box, inner slopes :math:`0.999 \exp(d) + 0.001` (with `d` cut at 30,
            in float64 at 300, to keep them finite).
        inverse: Whether to apply the inverse map.

    The shapes :math:`(*)` of `x` and of the parameters (without their last dimension) are
    broadcast against each other: `x` of shape `(64, 3)` goes with `widths` of shape `(64, 3, 7)`,
    `(3, 7)`, `(1, 1, 7)` or `(7,)`. Half-precision tensors are computed in float32.

    Returns:
        The output and the logarithm of the slope, both with the broadcast shape :math:`(*)` and
        the promoted dtype of all inputs.

    Raises:
        TypeError: If an input is not a floating point tensor.
        ValueError: If the numbers of bins do not agree, if the shapes cannot be broadcast, or if
            `bound` or `slope` is out of range.

    Example:
        >>> x = torch.tensor([-9.0, 0.5, 9.0])
        >>> widths, heights, derivatives = torch.randn(3, 3, 7).unbind(0)
        >>> y, ladj = rational_quadratic_spline(x, widths, heights, derivatives, bound=5.0)
        >>> ladj[[0, 2]]
        tensor([0., 0.])
        >>> rational_quadratic_spline(
        ...     y, widths, heights, derivatives, bound=5.0, inverse=True
        ... )[0]
        tensor([-9.0000,  0.5000,  9.0000])
    """
    check_spline(widths, heights, derivatives, bound, slope)
    y, ladj = shifted_spline(
        x, widths, heights, derivatives, None, bound=bound, slope=slope, inverse=inverse
    )
    return y, ladj


def shifted_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    shift: Tensor | None,
    *,
    bound: float,
    slope: float | None,
    shift_bound: float | None = None,
    inverse: bool = False,
    steep: bool = True,
) -> tuple[Tensor, ...]:
    r"""The spline plus a :func:`bounded` shift, if there is one, as one operation. Returns the
    value and, if it shall be `steep`, the logarithm of the slope.

    Arguments:
        x: The input, with shape :math:`(*)`.
        widths: The unconstrained widths of all bins but the last, with shape :math:`(*, K - 1)`.
        heights: The unconstrained heights of all bins but the last, with shape :math:`(*, K - 1)`.
        derivatives: The unconstrained slopes at the inner knots, with shape :math:`(*, K - 1)`.
        shift: The unconstrained shift, with shape :math:`(*)`, or :py:`None`.
        bound: The bound :math:`B` of the box.
        slope: The least slope; see :func:`rational_quadratic_spline`.
        shift_bound: The bound of the shift. If :py:`None`, the shift is free.
        inverse: Whether to apply the inverse map.
        steep: Whether to return the logarithm of the slope too.

    Raises:
        TypeError: If an input is not a floating point tensor.
        ValueError: If the shapes cannot be broadcast. Numbers of bins and bounds are taken as they
            are: :class:`flowguard.RobustSpline` checks them, once for all calls.

    Example:
        >>> widths, heights, derivatives = torch.zeros(3, 2, 7)  # the identity
        >>> x, shift = torch.tensor([-1.0, 4.0]), torch.tensor([0.0, torch.inf])
        >>> y, ladj = shifted_spline(
        ...     x, widths, heights, derivatives, shift, bound=5.0, slope=0.01, shift_bound=2.0
        ... )
        >>> y
        tensor([-1.,  6.])
    """
    bins = widths.shape[-1] + 1
    shifts = () if shift is None else (shift,)
    dtype = _result_dtype(x, widths, heights, derivatives, *shifts)
    shape = broadcast_shape(x, widths, heights, derivatives, shift=shift)
    # Half precision has too few digits for knots; autocast must not touch the maths either.
    work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    full = (*shape, bins - 1)
    w, h, d = (_expand(p, full).movedim(-1, 0) for p in (widths, heights, derivatives))
    by = None if shift is None else _expand(shift, shape)
    options = Options(work, bound, slope, shift_bound, inverse, steep)
    outs = autograd.apply(_expand(x, shape), (w, h, d), by, options)
    return outs if dtype == work else tuple(t.to(dtype) for t in outs)


class Prepared(NamedTuple):
    r"""What there is to know of a two-bin spline with a shift, as :func:`prepare` works it out.

    Arguments:
        values: Both coordinates of the knot, the slope there and the shift, in the units that the
            kernel works in, each with shape :math:`(*)`.
        bound: The bound :math:`B` of the box.
        shift_bound: The bound of the shift.
        work: The dtype that it was prepared in.

    Example:
        >>> prepared = prepare(
        ...     *torch.zeros(4, 3), bound=5.0, slope=0.01, shift_bound=1.0, out=list(torch.empty(4, 3))
        ... )
        >>> prepared.bound, prepared.work
        (5.0, torch.float32)
    """

    values: Sequence[Tensor]
    bound: float
    shift_bound: float | None
    work: torch.dtype


def prepare(
    width: Tensor,
    height: Tensor,
    derivative: Tensor,
    shift: Tensor,
    *,
    bound: float,
    slope: float | None,
    shift_bound: float | None,
    out: Sequence[Tensor],
) -> Prepared:
    r"""Works out what the parameters of a two-bin spline with a shift say, taken as constants, for
    :func:`prepared_spline` to apply it many times.

    Arguments:
        width: The unconstrained width, in single or double precision, with shape :math:`(*)`.
        height: The unconstrained height, with shape :math:`(*)`.
        derivative: The unconstrained slope at the knot, with shape :math:`(*)`.
        shift: The unconstrained shift, with shape :math:`(*)`.
        bound: The bound :math:`B` of the box.
        slope: The least slope.
        shift_bound: The bound of the shift. If :py:`None`, the shift is free.
        out: Four tensors to hold what is worked out, which may be the parameters themselves.

    Raises:
        TypeError: If the parameters are in neither single nor double precision.
        ValueError: If one of the bounds or the slope is out of range.

    Example:
        >>> width, height, derivative, shift = torch.zeros(4, 3)  # the identity
        >>> prepared = prepare(
        ...     width, height, derivative, shift, bound=5.0, slope=0.01, shift_bound=1.0,
        ...     out=[torch.empty(3) for _ in range(4)],
        ... )
        >>> prepared_spline(torch.tensor([-9.0, 1.0, 9.0]), prepared)[0]
        tensor([-9.,  1.,  9.])
    """
    work = shift.dtype
    if work not in (torch.float32, torch.float64):
        raise TypeError(f"what is prepared must be float32 or float64; got {work}")
    check_bound(bound)
    check_slope(slope)
    check_shift_bound(shift_bound)
    w, h, d = (p.unsqueeze(0) for p in (width, height, derivative))
    with torch.no_grad():
        autograd.prepare(out, (w, h, d), shift, Options(work, bound, slope, shift_bound))
    return Prepared(out, bound, shift_bound, work)


def prepared_spline(
    x: Tensor, prepared: Prepared, *, inverse: bool = False, steep: bool = True
) -> tuple[Tensor, ...]:
    r"""Applies the spline with its shift, as :func:`shifted_spline` does. What was prepared is taken
    as constant.

    Arguments:
        x: The input, with shape :math:`(*)`.
        prepared: What :func:`prepare` worked out, of tensors whose shapes broadcast with that of `x`.
        inverse: Whether to apply the inverse map.
        steep: Whether to return the logarithm of the slope too.

    Returns:
        The output and, if it shall be `steep`, the logarithm of the slope, with shape :math:`(*)`.

    Example:
        >>> parameters, out = torch.randn(4, 3), torch.empty(4, 3)
        >>> prepared = prepare(*parameters, bound=5.0, slope=0.01, shift_bound=1.0, out=list(out))
        >>> x = torch.tensor([-9.0, 1.0, 9.0])
        >>> y, ladj = prepared_spline(x, prepared)
        >>> torch.allclose(prepared_spline(y, prepared, inverse=True)[0], x, atol=1e-5)
        True
    """
    values, bound, shift_bound, work = prepared
    dtype, shape = _result_dtype(x, values[0]), broadcast_shape(x, shift=values[3])
    *knot, shift = (_expand(p, shape) for p in values)
    kx, ky, d = (p.unsqueeze(0) for p in knot)
    options = Options(work, bound, None, shift_bound, inverse, steep, prepared=True)
    outs = autograd.apply(_expand(x, shape), (kx, ky, d), shift, options)
    return outs if dtype == work else tuple(t.to(dtype) for t in outs)


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str | Sequence[str] = "linear",
    tail_bound: float | Tensor = 1.0,
    min_bin_width: float = LEAST,
    min_bin_height: float = LEAST,
    min_derivative: float = LEAST,
) -> tuple[Tensor, Tensor]:
    r"""Applies the spline of other libraries: the same map of the same parameters, to be called in
    the place of their function of this name.

    It is not :func:`rational_quadratic_spline`, whose slope is bounded. But other than theirs it
    never ends in an assertion: within a bin nothing is subtracted that could make a root of a
    negative number. It indexes by no mask, so that `torch.compile` makes one graph of it.

    For all finite numbers value, logarithm and gradients are finite, for infinite parameters too:
    logits are cut where the softmax is constant anyway, raw derivatives at a million. A NaN in an
    input or in the parameters makes that element NaN, and no other.

    References:
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032

    Arguments:
        inputs: The input, with shape :math:`(*)`. The results have its dtype; half precision is
            computed in float32.
        unnormalized_widths: The logits of the widths of all bins, with shape :math:`(*, K)`.
        unnormalized_heights: The logits of the heights, with shape :math:`(*, K)`.
        unnormalized_derivatives: The slopes at the knots before the softplus, with shape
            :math:`(*, K - 1)` for linear tails, :math:`(*, K)` for circular ones and
            :math:`(*, K + 1)` for a list of both, where the first and the last of a feature with
            linear tails, and the last of one with circular tails, are not looked at.
        inverse: Whether to apply the inverse map.
        tails: ``"linear"`` for slopes of one at both ends of the box, ``"circular"`` for slopes that
            are the same at both, or one of these for each entry of the inputs' last dimension.
            Outside of the box all are the identity.
        tail_bound: The bound :math:`B` of the box, or a tensor of bounds, which is broadcast to the
            inputs' shape. The numbers of a tensor are not read: where one is not positive, the map
            is the identity, and where one is infinite or NaN, so is NaN what is returned.
        min_bin_width: The least width of a bin, as a share of the box.
        min_bin_height: The least height of a bin, as a share of the box.
        min_derivative: The least slope at a knot.

    Raises:
        TypeError: If an input is not a floating point tensor.
        ValueError: If the numbers of bins do not agree, if the shapes cannot be broadcast, if there
            are no such tails, or if a bound or a minimum is out of range.

    Example:
        >>> x = torch.tensor([-9.0, 0.5, 9.0])
        >>> widths, heights, derivatives = torch.randn(3, 23).split([8, 8, 7], dim=-1)
        >>> spline = partial(unconstrained_rational_quadratic_spline, tail_bound=5.0)
        >>> y, ladj = spline(x, widths, heights, derivatives)
        >>> ladj[[0, 2]]
        tensor([0., 0.])
        >>> spline(y, widths, heights, derivatives, inverse=True)[0]
        tensor([-9.0000,  0.5000,  9.0000])
    """
    least = min_bin_width, min_bin_height, min_derivative
    dtype = _result_dtype(inputs)
    _check_tensors(unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
    derivatives = _with_tails(
        inputs, unnormalized_widths, unnormalized_derivatives, tails, least[2]
    )
    spline = partial(
        softmax_spline,
        widths=unnormalized_widths,
        heights=unnormalized_heights,
        derivatives=derivatives,
        least=least,
        inverse=inverse,
    )
    if not isinstance(tail_bound, Tensor):
        return spline(inputs, bound=tail_bound)
    # In units of the bound, which leaves slopes as they are.
    x = inputs.to(torch.promote_types(dtype, torch.float32))
    bound = tail_bound.to(x.dtype)
    bound = bound + (bound - bound)  # NaN for an infinite one
    empty = bound <= 0
    outside = (x.abs() > bound) | empty
    bound = torch.where(empty, 1.0, bound)
    y, ladj = spline(torch.where(outside, 0.0, x) / bound, bound=1.0)
    y, ladj = torch.where(outside, x, y * bound), torch.where(outside, 0.0, ladj)
    return y.to(dtype), ladj.to(dtype)


def _with_tails(
    x: Tensor, widths: Tensor, derivatives: Tensor, tails: str | Sequence[str], least: float
) -> Tensor:
    r"""The raw slopes at all knots that have one of their own."""
    alike = isinstance(tails, str)
    kinds = [tails] if alike else list(tails) if isinstance(tails, Sequence) else []
    if not kinds or not all(kind in ("linear", "circular") for kind in kinds):
        raise ValueError(
            "tails must be 'linear' or 'circular', or a list of these with one for each feature;"
            f" got {tails!r}"
        )
    if not alike and len(kinds) not in (1, x.shape[-1] if x.dim() else 1):
        raise ValueError(
            "tails must name one kind for each entry of the inputs' last dimension; got"
            f" {len(kinds)} for inputs of shape {tuple(x.shape)}"
        )
    more = 1 if not alike else -1 if tails == "linear" else 0
    _check_slopes(widths, derivatives, more, f"{tails!r} tails")
    if tails == "linear":
        return derivatives
    if tails == "circular":
        return torch.cat((derivatives, derivatives[..., :1]), dim=-1)
    check_least_slope(least)
    derivatives = _expand(derivatives, (*broadcast_shape(x, derivatives), derivatives.shape[-1]))
    linear = torch.tensor([kind == "linear" for kind in kinds], device=derivatives.device)
    linear = linear[0] if len(kinds) == 1 else linear
    end = math.log(math.expm1(1 - least))
    first = last = derivatives[..., 0]
    first, last = (torch.where(linear, end, d).unsqueeze(-1) for d in (first, last))
    return torch.cat((first, derivatives[..., 1:-1], last), dim=-1)


def straight_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = LEAST,
    min_bin_height: float = LEAST,
    min_derivative: float = LEAST,
) -> tuple[Tensor, Tensor]:
    r"""Applies the spline of other libraries on a box, in the place of their
    ``rational_quadratic_spline``. Outside of the box, where theirs has no values, it is the
    straight line through two of its corners.

    Arguments:
        inputs: The input, with shape :math:`(*)`.
        unnormalized_widths: The logits of the widths of all bins, with shape :math:`(*, K)`.
        unnormalized_heights: The logits of the heights, with shape :math:`(*, K)`.
        unnormalized_derivatives: The slopes at all knots before the softplus, with shape
            :math:`(*, K + 1)`.
        inverse: Whether to apply the inverse map.
        left: Where the box begins.
        right: Where it ends.
        bottom: The value at its left end.
        top: The value at its right end.
        min_bin_width: The least width of a bin, as a share of the box.
        min_bin_height: The least height of a bin, as a share of the box.
        min_derivative: The least slope at a knot.

    Raises:
        TypeError: If an input is not a floating point tensor.
        ValueError: If the box is empty, or too small, large, flat or steep to compute with; and what :func:`unconstrained_rational_quadratic_spline`
            refuses.

    Example:
        >>> x = torch.rand(3)
        >>> widths, heights, derivatives = torch.randn(3, 25).split([8, 8, 9], dim=-1)
        >>> y, ladj = straight_rational_quadratic_spline(x, widths, heights, derivatives)
        >>> bool(((y > 0) & (y < 1)).all())
        True
    """
    width, height = right - left, top - bottom
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(
            "the box must have a positive, finite width and height; got"
            f" [{left}, {right}] x [{bottom}, {top}]"
        )
    least, most = BOUNDS
    if not (least <= width <= most and least <= height <= most):
        raise ValueError(
            f"the size of the box must lie in [{least:g}, {most:g}], for all gradients to be finite"
            f" in single precision; got [{left}, {right}] x [{bottom}, {top}]. Rescale x instead."
        )
    steep = height / width
    least, most = GAINS
    if not least <= steep <= most:
        raise ValueError(
            f"the box must be {least:g} to {most:g} times as high as wide; got {steep:g}, for"
            f" [{left}, {right}] x [{bottom}, {top}]"
        )
    start, size, to, grown = (
        (bottom, height, left, width) if inverse else (left, width, bottom, height)
    )
    dtype = _result_dtype(inputs)
    _check_tensors(unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
    _check_slopes(unnormalized_widths, unnormalized_derivatives, 1, "a spline on a box")
    x = inputs.to(torch.promote_types(dtype, torch.float32))
    y, ladj = softmax_spline(
        (x - start) * (2 / size) - 1,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        bound=1.0,
        least=(min_bin_width, min_bin_height, min_derivative),
        gain=1 / steep,
        inverse=inverse,
    )
    y = to + (y + 1) * (grown / 2)
    return y.to(dtype), (ladj + math.log(grown / size)).to(dtype)


def softmax_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float,
    least: tuple[float, float, float] = (LEAST, LEAST, LEAST),
    gain: float = 1.0,
    clip: float | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The spline on :math:`[-B, B]` whose sizes of bins come from a softmax over all of them, and
    the identity outside. Slopes come from a softplus or, clipped, from an exponential.

    Arguments:
        x: The input, with shape :math:`(*)`, whose dtype the results have.
        widths: The logits of the widths, with shape :math:`(*, K)`.
        heights: The logits of the heights, with shape :math:`(*, K)`.
        derivatives: The raw slopes at the inner knots, with shape :math:`(*, K - 1)`, with ones at
            the ends of the box; or those at all knots, with shape :math:`(*, K + 1)`.
        bound: The bound :math:`B` of the box.
        least: The least width and height, as shares of the box, and the least slope at a knot.
        gain: What the slopes are multiplied by, the least one too.
        clip: If not None, :math:`c` in the slopes :math:`\exp(d / (1 + |d / c|))` and the logits
            :math:`w / (1 + |2 w / c|)`, instead of softplus and logits as they are.
        inverse: Whether to apply the inverse map.

    Raises:
        TypeError: If an input is not a floating point tensor.
        ValueError: If the numbers of bins do not agree, if the shapes cannot be broadcast, or if
            `bound`, `least`, `gain` or `clip` is out of range.

    Example:
        >>> x, w, h, d = torch.randn(5), *torch.randn(2, 5, 8), torch.randn(5, 7)
        >>> y, ladj = softmax_spline(x, w, h, d, bound=3.0)
        >>> torch.allclose(softmax_spline(y, w, h, d, bound=3.0, inverse=True)[0], x, atol=1e-4)
        True
    """
    check_bound(bound)
    _check_usual(widths, heights, derivatives, least, gain, clip)
    dtype = _result_dtype(x)
    _result_dtype(widths, heights, derivatives)
    shape = broadcast_shape(x, widths, heights, derivatives)
    work = torch.promote_types(_result_dtype(x, widths, heights, derivatives), torch.float32)
    # A bin without a size has no slope; of a share that is this small no digit of the box is seen.
    tiny = torch.finfo(work).eps
    w, h, d = (max(number, tiny) for number in least)
    usual = Usual(w, h, d * gain, gain, clip)
    params = [
        _expand(p, (*shape, p.shape[-1])).movedim(-1, 0) for p in (widths, heights, derivatives)
    ]
    options = Options(work, bound, None, inverse=inverse, usual=usual)
    y, ladj = autograd.apply(_expand(x, shape), (params[0], params[1], params[2]), None, options)
    return y.to(dtype), ladj.to(dtype)


def affine(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-4, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Applies the conditional affine map of SRFlow, whose inverse may explode.

    .. math:: f(x) = (x + t) \, (\sigma(s + 2) + \epsilon)

    The slope is below :math:`1 + \epsilon` and may fall to :math:`\epsilon`, so the inverse may
    multiply by :math:`1 / \epsilon`: the *exploding inverse*. This is the baseline, not a remedy.

    References:
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200

    Arguments:
        x: The input, with shape :math:`(*)`.
        shift: The shift :math:`t`, added before scaling, with shape :math:`(*)`.
        scale: The unconstrained scale :math:`s`, with shape :math:`(*)`.
        eps: The least scale :math:`\epsilon`.
        inverse: Whether to apply the inverse map.

    Returns:
        The output and the logarithm of the slope, with the broadcast shape :math:`(*)`.

    Example:
        >>> x, shift, scale = torch.randn(3, 4).unbind(0)
        >>> y, ladj = affine(x, shift, scale)
        >>> torch.allclose(affine(y, shift, scale, inverse=True)[0], x)
        True
    """
    slope = torch.sigmoid(scale + 2) + eps
    y = x / slope - shift if inverse else (x + shift) * slope
    ladj = torch.log(slope).expand(y.shape)
    return y, -ladj if inverse else ladj


def reparametrized_affine(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-4, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Applies the reparametrised conditional affine map, whose inverse hardly expands.

    .. math:: f(x) = (x + t) / (\sigma(s + 2) + \epsilon)

    The inverse is bounded by :math:`1 + \epsilon` per layer, but the forward map may multiply by
    :math:`1 / \epsilon`, and the shift stays free.

    References:
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        x: The input, with shape :math:`(*)`.
        shift: The shift :math:`t`, added before scaling, with shape :math:`(*)`.
        scale: The unconstrained inverse scale :math:`s`, with shape :math:`(*)`.
        eps: The least inverse scale :math:`\epsilon`.
        inverse: Whether to apply the inverse map.

    Returns:
        The output and the logarithm of the slope, with the broadcast shape :math:`(*)`.

    Example:
        >>> x, shift, scale = torch.randn(3, 4).unbind(0)
        >>> y, ladj = reparametrized_affine(x, shift, scale)
        >>> torch.allclose(reparametrized_affine(y, shift, scale, inverse=True)[0], x)
        True
    """
    gain = torch.sigmoid(scale + 2) + eps
    y = x * gain - shift if inverse else (x + shift) / gain
    ladj = torch.log(gain).expand(y.shape)
    return y, ladj if inverse else -ladj


def additive(x: Tensor, shift: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Applies the additive map of NICE, :math:`f(x) = x + t`.

    References:
        | NICE: Non-linear Independent Components Estimation (Dinh et al., 2014)
        | https://arxiv.org/abs/1410.8516

    Arguments:
        x: The input, with shape :math:`(*)`.
        shift: The shift :math:`t`, with shape :math:`(*)`.
        inverse: Whether to apply the inverse map.

    Returns:
        The output and a zero for each of its elements.

    Example:
        >>> additive(torch.ones(2), torch.ones(2))
        (tensor([2., 2.]), tensor([0., 0.]))
    """
    y = x - shift if inverse else x + shift
    return y, torch.zeros_like(y)


def bounded(x: Tensor, bound: float | None) -> Tensor:
    r"""Squashes onto :math:`[-\beta, \beta]`, with slope one at zero and a gradient that lives on.

    .. math:: \frac{2 \beta}{\pi} \arctan \frac{\pi x}{2 \beta}

    The slope falls with the square of :math:`x`, not exponentially as that of a hyperbolic
    tangent, so that a parameter far out still learns. Infinities are mapped to the bounds.

    Arguments:
        x: The unconstrained number, with shape :math:`(*)`.
        bound: The bound :math:`\beta`. If :py:`None`, `x` is returned as it is.

    Example:
        >>> bounded(torch.tensor([-torch.inf, 0.0, 1e30]), 2.0)
        tensor([-2.,  0.,  2.])
    """
    check_shift_bound(bound)
    return rq.squash(x, bound)


def saturate(x: Tensor, bound: float) -> Tensor:
    r"""Squashes smoothly into :math:`(-\beta, \beta)`; in the inner 80 % it is the identity.

    What comes out is the value of :func:`bounded` for a finite argument.

    Arguments:
        x: The number, with shape :math:`(*)`.
        bound: The bound :math:`\beta`.

    Example:
        >>> saturate(torch.tensor([-torch.inf, 0.5, 1.6]), 2.0)
        tensor([-1.9980,  0.5000,  1.6000])
    """
    inner = FAITHFUL * bound
    room = NEAR * bound - inner
    beyond = (x.abs() - inner).clamp_min(0.0)
    return x.clamp(-inner, inner) + x.sign() * room * torch.tanh(beyond / room)


def limited(
    x: Tensor, margin: float, *, low: float = 0.0, high: float = 1.0, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Takes the real line onto an interval and a margin around it, and leaves what lies in the
    interval and the inner half of the margin as it is, bit for bit.

    With the edge :math:`e = h + m / 2` and the room :math:`w = m / 2`, what lies above becomes

    .. math:: e + \frac{2 w}{\pi} \arctan \frac{\pi (x - e)}{2 w}

    and what lies below its mirror image: a smooth bijection, whose slope is one at the edge and
    never more. Infinities become the ends, NaN stays NaN. The inverse takes numbers beyond the
    ends for the ends, where the logarithm of the slope is :math:`-\infty`: a density has nothing
    there. Half-precision tensors are computed in float32.

    Arguments:
        x: The numbers, with shape :math:`(*)`.
        margin: The margin :math:`m`.
        low: The lower end of the interval.
        high: The upper end :math:`h`.
        inverse: Whether to apply the inverse map.

    Returns:
        The output and the logarithm of the slope, with shape :math:`(*)` and the dtype of `x`.

    Raises:
        TypeError: If `x` is no floating point tensor, or margin or ends no numbers.
        ValueError: If single precision cannot compute with the margin or the ends, or the interval
            is empty.

    Example:
        >>> y, ladj = limited(torch.tensor([0.25, 1.125, 2.0, torch.inf]), 0.25)
        >>> y
        tensor([0.2500, 1.1250, 1.2428, 1.2500])
        >>> limited(y, 0.25, inverse=True)[0][:3]
        tensor([0.2500, 1.1250, 2.0000])
    """
    check_margin(margin)
    _check_interval(low, high)
    dtype = _result_dtype(x)
    u = x.to(dtype if dtype in (torch.float32, torch.float64) else torch.float32)
    room = (1 - KEPT) * margin
    upper, lower = high + KEPT * margin, low - KEPT * margin
    over = torch.maximum(u - upper, lower - u)
    beyond = over.clamp_min(0.0)
    if inverse:
        share = beyond / room
        t = torch.tan(math.pi / 2 * share.clamp_max(BRIM))
        moved = 2 * room / math.pi * t
        ladj = torch.where(share > 2 - BRIM, -math.inf, torch.log1p(t * t))
    else:
        t = math.pi / (2 * room) * beyond
        moved = 2 * room / math.pi * torch.atan(t)
        ladj = -torch.log1p(t.clamp_max(1e18).square())  # whose square is finite
    y = torch.where(u > high, upper + moved, lower - moved)
    if not inverse:  # rounding may land an ulp outside, and certificates rely on the ends
        y = y.clamp(low - margin, high + margin)
    y = torch.where(over <= 0, u, y)
    return y.to(dtype), torch.where(over <= 0, 0.0, ladj).to(dtype)


def check_margin(margin: float) -> None:
    r"""Refuses a margin that is no number, or that single precision cannot compute with.

    Arguments:
        margin: The margin.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not positive, or beyond what single precision has room for.

    Example:
        >>> check_margin(0.5)
        >>> check_margin(-1.0)
        Traceback (most recent call last):
        ...
        ValueError: the margin must be positive and finite; got -1.0
    """
    if isinstance(margin, bool) or not isinstance(margin, Real):
        raise TypeError(f"the margin must be a number; got {type(margin).__name__}")
    check_bound(margin, "the margin")


def _check_interval(low: float, high: float) -> None:
    if any(isinstance(end, bool) or not isinstance(end, Real) for end in (low, high)):
        given = f"{type(low).__name__} and {type(high).__name__}"
        raise TypeError(f"low and high must be numbers; got {given}")
    if not low < high:
        raise ValueError(f"low must be less than high; got {low} and {high}")
    most = BOUNDS[1]
    if not -most <= low < high <= most:
        raise ValueError(
            f"low and high must be numbers of at most {most:g}, for which single precision has"
            f" room; got {low} and {high}. Rescale x instead."
        )


def check_shift_bound(bound: float | None) -> None:
    r"""Refuses a bound of a shift that is neither None nor a positive number."""
    if bound is None:
        return
    if isinstance(bound, bool) or not isinstance(bound, Real):
        raise TypeError(
            f"the bound must be a number, or None for no bound; got {type(bound).__name__}"
        )
    if not 0 < bound < math.inf:
        raise ValueError(
            f"the bound must be positive and finite, or None for no bound; got {bound}"
        )


def broadcast_shape(x: Tensor, *params: Tensor, shift: Tensor | None = None) -> Size:
    r"""The common shape of `x`, of parameters with one more dimension, and of a shift."""
    shapes = [x.shape, *(p.shape[:-1] for p in params)]
    if shift is not None:
        shapes.append(shift.shape)
    # Shapes that depend on data cannot be compared.
    if not torch.compiler.is_compiling() and all(shape == x.shape for shape in shapes):
        return x.shape
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        given = ", ".join(str(tuple(p.shape)) for p in params)
        also = "" if shift is None else f", and a shift of shape {tuple(shift.shape)}"
        raise ValueError(
            "the shape of x must broadcast with the parameters' without their last dimension;"
            f" got x of shape {tuple(x.shape)} and parameters of shapes {given}{also}"
        ) from None


def _expand(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    # A node less to record in eager mode; shapes that depend on data cannot be compared.
    return x if not torch.compiler.is_compiling() and x.shape == shape else x.expand(shape)


def check_bound(bound: float, name: str = "bound") -> None:
    r"""Refuses a bound that is no number, or that single precision cannot compute with."""
    # A tensor is refused: it would have to be read back from its device.
    if isinstance(bound, bool) or not isinstance(bound, Real):
        raise TypeError(f"{name} must be a number, such as 5.0; got {type(bound).__name__}")
    if not 0 < bound < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {bound}")
    least, most = BOUNDS
    if not least <= bound <= most:
        raise ValueError(
            f"{name} must lie in [{least:g}, {most:g}], for all gradients to be finite in single"
            f" precision; got {bound}. Rescale x instead."
        )


def check_slope(slope: float | None) -> None:
    r"""Refuses a least slope that is out of range."""
    if slope is not None and not (0 < slope <= 0.49):
        raise ValueError(
            f"slope must lie in (0, 0.49], or be None for the published spline; got {slope}"
        )


def check_spline(
    widths: Tensor, heights: Tensor, derivatives: Tensor, bound: float, slope: float | None
) -> None:
    r"""Refuses what is no spline: numbers of bins that disagree, and bounds that are out of range."""
    check_bound(bound)
    check_slope(slope)
    params = widths, heights, derivatives
    _check_tensors(*params)
    sizes = tuple(p.shape[-1] if p.dim() else 0 for p in params)
    if not sizes[0] == sizes[1] == sizes[2] >= 1:
        raise ValueError(
            "widths, heights and derivatives must hold K - 1 numbers each in their last dimension,"
            f" for K >= 2 bins; got {sizes[0]}, {sizes[1]} and {sizes[2]}"
        )


def _check_tensors(*params: Tensor) -> None:
    if not all(isinstance(p, Tensor) for p in params):
        kinds = ", ".join(type(p).__name__ for p in params)
        raise TypeError(
            f"widths, heights and derivatives must be tensors; got {kinds}: torch.as_tensor makes one"
            " of an array"
        )


def _check_slopes(widths: Tensor, derivatives: Tensor, more: int, what: str) -> None:
    r"""Refuses another number of slopes than that of the bins and some more."""
    bins, slopes = (p.shape[-1] if p.dim() else 0 for p in (widths, derivatives))
    if slopes != bins + more:
        raise ValueError(
            f"for K = {bins} bins and {what} the derivatives must hold {bins + more} slopes in their"
            f" last dimension (K - 1 for linear tails, K for circular ones, K + 1 for a list of both"
            f" or a spline on a box); got {slopes}"
        )


def _check_usual(
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    least: Sequence[float],
    gain: float,
    clip: float | None,
) -> None:
    r"""Refuses numbers of bins that disagree, and options that are out of range."""
    params = widths, heights, derivatives
    _check_tensors(*params)
    bins, other, slopes = (p.shape[-1] if p.dim() else 0 for p in params)
    if bins < 1 or other != bins or slopes not in (bins - 1, bins + 1):
        raise ValueError(
            "widths and heights must hold K >= 1 numbers each in their last dimension, and"
            " derivatives as many as there are knots with a slope of their own: K - 1 for linear"
            " tails, K for circular ones, K + 1 for a list of both or a spline on a box;"
            f" got {bins} and {other}, and slopes at {slopes} knots"
        )
    width, height, slope = least
    for name, share in (("width", width), ("height", height)):
        if not 0 <= share * bins <= 1:
            raise ValueError(
                f"the least {name} of a bin must be a share of the box in [0, 1 / K]; got {share}"
                f" for K = {bins} bins"
            )
    low, high = GAINS
    # Rounded, as the inverse of a number that is in range may be.
    if not low * (1 - 1e-9) <= gain <= high * (1 + 1e-9):
        raise ValueError(f"the gain must lie in [{low:g}, {high:g}]; got {gain}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None; got {clip}")
    if slopes < bins:
        check_least_slope(slope * gain)
    elif not 0 <= slope < math.inf:
        raise ValueError(f"the least slope must be finite and not negative; got {slope}")


def check_least_slope(slope: float) -> None:
    r"""Refuses a least slope that leaves no room for the one at the ends of the box."""
    if not 0 <= slope < 1:
        raise ValueError(
            f"the least slope must lie in [0, 1), as it is one at the ends of the box; got {slope}"
        )


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    for t in tensors:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            told = isinstance(t, Tensor)
            given = (
                f"{t.dtype}: call .float()" if told else f"{type(t).__name__}: torch.as_tensor(…)"
            )
            raise TypeError(
                f"the spline needs floating point tensors; got {given} makes one of it"
            )
    dtype, device = tensors[0].dtype, tensors[0].device
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
        if t.device != device and t.dim() and tensors[0].dim():  # a lone number may be anywhere
            raise ValueError(
                "x and the parameters of the spline must be on one device;"
                f" got {device} and {t.device}: move one of them with .to(…)"
            )
    return dtype
