r"""What all layers ask of a context, and how they read the output of a network as a map."""

__all__ = [
    "IMAGE_SHIFT_BOUND",
    "IMAGE_TAIL_BOUND",
    "TAIL_BOUND",
    "Constructor",
    "additive_map",
    "check_sizes",
    "context_like",
    "robust_map",
    "total",
    "unpack",
]

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from flowguard.numerics import cut, repeat_rows, sum_rows
from flowguard.transforms import AdditiveTransform, RobustSpline, Univariate

# Why these, and what the other hosts have: "Boxes and shifts" in docs/guarantees.md.
#: The box of splines over vectors: the default of normflows' own splines, whose place ours take.
TAIL_BOUND = 3.0
#: The box over images: on photographs 0.02 to 0.03 bits/dim and 0.4 dB better than 3.
IMAGE_TAIL_BOUND = 5.0
#: The bound of the shift over images: 1 was enough on photographs, and an image flow has many
#: steps, each of which adds its bound to that of the samples.
IMAGE_SHIFT_BOUND = 1.0

#: From unconstrained parameters to a univariate map.
Constructor = Callable[..., Univariate]
#: The shapes of the parameters of one element.
Shapes = list[tuple[int, ...]]


def robust_map(
    bins: int, bound: float, shift_bound: float | None, slope: float | None
) -> tuple[Constructor, Shapes]:
    r"""Returns the constructor of robust splines, and the shapes of their parameters.

    Arguments:
        bins: The number of bins.
        bound: The bound of the box.
        shift_bound: The bound of the shift.
        slope: The least slope.

    Raises:
        TypeError: If a bound or the slope is no number.
        ValueError: If one is out of range.
    """
    for name, number in (("tail_bound", bound), ("shift_bound", shift_bound), ("slope", slope)):
        if number is not None and not isinstance(number, int | float):
            raise TypeError(f"{name} must be a number; got {number!r}")
    univariate = partial(RobustSpline, bound=bound, shift_bound=shift_bound, slope=slope)
    shapes = RobustSpline.shapes(bins)
    univariate(*(torch.zeros(shape) for shape in shapes))  # refuses what is out of range
    return univariate, shapes


def additive_map(shift_bound: float | None) -> tuple[Constructor, Shapes]:
    r"""Returns the constructor of additive maps, and the shapes of their parameters.

    Arguments:
        shift_bound: The bound of the shift.
    """
    univariate = partial(AdditiveTransform, shift_bound=shift_bound)
    univariate(torch.zeros(()))
    return univariate, [()]


def check_sizes(**sizes: Any) -> None:
    r"""Refuses what is no positive number, or :py:`None`.

    Arguments:
        sizes: The sizes, by name.

    Raises:
        ValueError: If a size is neither a positive integer nor :py:`None`.
    """
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, Integral) or size < 1):
            raise ValueError(f"{name} must be a positive number; got {size!r}")


def unpack(univariate: Constructor, shapes: Sequence[tuple[int, ...]], raw: Tensor) -> Univariate:
    r"""Reads the output of a network as the univariate map of each feature.

    The numbers of one feature stand together, in the order of `shapes`: for a spline with
    :math:`K` bins, :math:`K - 1` widths, :math:`K - 1` heights, :math:`K - 1` derivatives and the
    shift, as :meth:`flowguard.RobustSpline.shapes` says; then those of the next feature.

    Arguments:
        univariate: The constructor of the map.
        shapes: The shapes of the parameters of one element.
        raw: The output of the network, with shape :math:`(B, D P)` for vectors or
            :math:`(B, D P, H, W)` for images, with :math:`P` numbers for each of :math:`D`
            features.
    """
    sizes = [math.prod(shape) for shape in shapes]
    phi = raw.unflatten(1, (raw.shape[1] // sum(sizes), sum(sizes)))
    parts = zip(phi.split(sizes, dim=2), shapes, strict=True)
    return univariate(*(p.movedim(2, -1) if shape else p.squeeze(2) for p, shape in parts))


def total(ladj: Tensor) -> Tensor:
    r"""Returns the log-determinant of each row in the dtype of its elements, as the host does.

    Arguments:
        ladj: That of each element, with shape :math:`(B, *)`.
    """
    return sum_rows(ladj).to(ladj.dtype)


def context_like(z: Tensor, context: Tensor | None, channels: int | None) -> Tensor | None:
    r"""Returns the context with the rows, and if `z` is an image with the size, of `z`.

    Row :math:`i` of `z` belongs to row :math:`i \bmod B` of a context with :math:`B` rows: one row
    is shared by all. Contexts are cut at :math:`\pm 10^{20}`, so that infinite ones give finite
    samples. NaN stays NaN.

    Arguments:
        z: The input of the layer.
        context: The context, with shape :math:`(B, C')`, or for images :math:`(B, C', H, W)`,
            where one position stands for all.
        channels: The number of channels that the layer was made for, :py:`None` for no context.

    Raises:
        TypeError: If the context is no floating point tensor.
        ValueError: If there is a context where the layer takes none, none where it takes one, or
            one of another shape.
    """
    if channels is None:
        if context is not None:
            raise ValueError(
                "the layer was made without a context; got one: give it the number of context"
                " channels, or wrap it in a ContextAdapter to leave the context out"
            )
        return None
    if not isinstance(context, Tensor):
        raise ValueError(
            f"the layer was made for a context of {channels} channels;"
            f" got {'none' if context is None else type(context).__name__}"
        )
    if not context.is_floating_point():
        raise TypeError(
            f"the context must be a floating point tensor; got {context.dtype}."
            " Encode classes first, such as by torch.nn.functional.one_hot(y, classes).float()"
        )
    image = z.dim() == 4
    if context.dim() not in ((2, 4) if image else (2,)) or context.shape[1] != channels:
        raise ValueError(
            f"the context must have shape (B, {channels}{', H, W) or (B, ' if image else ''}"
            f"{channels if image else ''}); got {tuple(context.shape)}"
        )
    if image:
        context = context if context.dim() == 4 else context[:, :, None, None]
        if context.shape[2:] == (1, 1):
            context = context.expand(-1, -1, *z.shape[2:])
        if context.shape[2:] != z.shape[2:]:
            raise ValueError(
                f"the context must have the size {tuple(z.shape[2:])} of the image at this layer,"
                f" or one position for all; got {tuple(context.shape[2:])}"
            )
    return repeat_rows(cut(context), z)
