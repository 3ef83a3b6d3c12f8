r"""The univariate maps of a coupling, with their parameters laid out as channels of an image."""

__all__ = [
    "Affine",
    "Coupling",
    "CubicBSpline",
    "Elementwise",
    "Inscribed",
    "ReparametrizedAffine",
    "Robust",
    "apply",
    "elementwise",
    "work_out",
]

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from flowguard import transforms
from flowguard.functional import FINE_SLOPE, Prepared, prepare
from flowguard.numerics import sum_rows


class Elementwise(Protocol):
    r"""A univariate map with `parameters` numbers for each transformed channel.

    `transform` takes them with shape :math:`(B, C, n, H, W)` and returns the transform of tensors
    with shape :math:`(B, C, H, W)`. All-zero parameters give the map at the start of training.

    Example:
        A family of one's own, which shifts by at most one:

        >>> class Shifts:
        ...     parameters = 1
        ...
        ...     def transform(self, phi):
        ...         return transforms.AdditiveTransform(phi.squeeze(2), shift_bound=1.0)
        >>> coupling = flowguard.image.ConditionalCoupling(12, 8, hidden=16, coupling=Shifts())
        >>> coupling(torch.randn(1, 12, 4, 4), torch.randn(1, 8, 4, 4))[0].shape
        torch.Size([1, 12, 4, 4])
    """

    @property
    def parameters(self) -> int:
        r"""The number :math:`n` of parameters of each transformed channel."""

    def transform(self, phi: Tensor) -> transforms.Univariate:
        r"""Returns the map, given parameters with shape :math:`(B, C, n, H, W)`."""


@dataclass(frozen=True)
class Robust:
    r"""Creates the robust rational-quadratic spline; see :class:`flowguard.RobustSpline`.

    Arguments:
        bins: The number of bins :math:`K`.
        bound: The bound :math:`B` of the box.
        shift_bound: The bound of the shift.
        slope: The least slope.

    Example:
        >>> family = Robust()
        >>> f = family.transform(torch.randn(1, 6, family.parameters, 4, 4))
        >>> f(torch.randn(1, 6, 4, 4)).shape
        torch.Size([1, 6, 4, 4])
    """

    bins: int = 2
    bound: float = 5.0
    shift_bound: float | None = 1.0
    slope: float | None = FINE_SLOPE

    @property
    def parameters(self) -> int:
        r"""The parameters of each transformed channel: :math:`K - 1` widths, heights and slopes,
        and the shift."""
        return 3 * (self.bins - 1) + 1

    def transform(self, phi: Tensor) -> transforms.Univariate:
        r"""Returns the splines, given parameters with shape :math:`(B, C, 3 (K - 1) + 1, H, W)`."""
        # Published order of the channels: widths, heights, derivatives, shift.
        n = self.bins - 1
        *knots, shift = phi.split((n, n, n, 1), dim=2)
        widths, heights, derivatives = (p.movedim(2, -1) for p in knots)
        return transforms.RobustSpline(
            widths,
            heights,
            derivatives,
            shift.squeeze(2),
            bound=self.bound,
            shift_bound=self.shift_bound,
            slope=self.slope,
        )


@dataclass(frozen=True)
class Affine:
    r"""Creates the conditional affine map of SRFlow; see :func:`flowguard.functional.affine`.

    Arguments:
        eps: The least scale.

    Example:
        >>> family = Affine()
        >>> f = family.transform(torch.randn(1, 6, family.parameters, 4, 4))
        >>> f(torch.randn(1, 6, 4, 4)).shape
        torch.Size([1, 6, 4, 4])
    """

    eps: float = 1e-4

    @property
    def parameters(self) -> int:
        r"""The parameters of each transformed channel: shift and scale."""
        return 2

    def transform(self, phi: Tensor) -> transforms.Univariate:
        r"""Returns the affine map, given parameters with shape :math:`(B, C, 2, H, W)`."""
        shift, scale = phi.unbind(2)
        return transforms.AffineTransform(shift, scale, eps=self.eps)

    def line(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns slope and value at zero of the maps with these parameters.

        Arguments:
            phi: The parameters, with shape :math:`(B, C, 2, H, W)`.

        Returns:
            Both with shape :math:`(B, C, H, W)`.
        """
        shift, scale = phi.unbind(2)
        slope = torch.sigmoid(scale + 2) + self.eps
        return slope, slope * shift


@dataclass(frozen=True)
class ReparametrizedAffine:
    r"""Creates the affine map whose inverse hardly expands; see
    :func:`flowguard.functional.reparametrized_affine`.

    Arguments:
        eps: The least inverse scale.

    Example:
        >>> family = ReparametrizedAffine()
        >>> f = family.transform(torch.randn(1, 6, family.parameters, 4, 4))
        >>> f(torch.randn(1, 6, 4, 4)).shape
        torch.Size([1, 6, 4, 4])
    """

    eps: float = 1e-4

    @property
    def parameters(self) -> int:
        r"""The parameters of each transformed channel: shift and scale."""
        return 2

    def transform(self, phi: Tensor) -> transforms.Univariate:
        r"""Returns the reparametrised affine map, given parameters with shape :math:`(B, C, 2, H,
        W)`."""
        shift, scale = phi.unbind(2)
        return transforms.ReparametrizedAffineTransform(shift, scale, eps=self.eps)

    def line(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns slope and value at zero of the maps with these parameters.

        Arguments:
            phi: The parameters, with shape :math:`(B, C, 2, H, W)`.

        Returns:
            Both with shape :math:`(B, C, H, W)`.
        """
        shift, scale = phi.unbind(2)
        slope = (torch.sigmoid(scale + 2) + self.eps).reciprocal()
        return slope, slope * shift


@dataclass(frozen=True)
class CubicBSpline:
    r"""Creates the cubic B-spline of the paper; see :class:`flowguard.transforms.CubicBSplineTransform`.

    Arguments:
        bound: The bound :math:`B` of the box.
        shift_bound: The bound of the shift.

    Example:
        >>> family = CubicBSpline()
        >>> f = family.transform(torch.randn(1, 6, family.parameters, 4, 4))
        >>> f(torch.randn(1, 6, 4, 4)).shape
        torch.Size([1, 6, 4, 4])
    """

    bound: float = 3.0
    shift_bound: float | None = 1.0

    @property
    def parameters(self) -> int:
        r"""The parameters of each transformed channel: 4 gaps, 6 controls and the shift."""
        return 11

    def transform(self, phi: Tensor) -> transforms.Univariate:
        r"""Returns the B-splines, given parameters with shape :math:`(B, C, 11, H, W)`."""
        gaps, controls, shift = phi.split((4, 6, 1), dim=2)
        return transforms.CubicBSplineTransform(
            gaps.movedim(2, -1),
            controls.movedim(2, -1),
            shift.squeeze(2),
            bound=self.bound,
            shift_bound=self.shift_bound,
        )


@dataclass(frozen=True)
class Inscribed:
    r"""Creates the map of robust splines that follow affine maps; :func:`flowguard.migrate` does.

    Arguments:
        family: The affine maps.
        units: What makes a spline of slope and value at zero, in the units of each channel.
    """

    family: Affine | ReparametrizedAffine
    units: Callable[[Tensor, Tensor], transforms.Univariate]

    @property
    def parameters(self) -> int:
        r"""The number of parameters of the family that is inscribed."""
        return self.family.parameters

    def transform(self, phi: Tensor) -> transforms.Univariate:
        r"""Returns the inscribed splines, given the parameters of the old map."""
        return self.units(*self.family.line(phi))


@dataclass(frozen=True)
class Ahead:
    r"""Creates the two-bin splines whose parameters :func:`work_out` prepared.

    Arguments:
        bound: The bound :math:`B` of the box.
        shift_bound: The bound of the shift.
        dtype: The dtype that they were prepared in.
    """

    bound: float
    shift_bound: float | None
    dtype: torch.dtype
    parameters: ClassVar[int] = 4

    def transform(self, phi: Tensor) -> transforms.Univariate:
        prepared = Prepared(phi.unbind(2), self.bound, self.shift_bound, self.dtype)
        return transforms.PreparedSpline(prepared)


def work_out(
    family: Elementwise, raw: Tensor, channels: int, *, overwrite: bool = False
) -> tuple[Elementwise, Tensor]:
    r"""Returns what `family` makes of constant parameters, to be applied to many images: a map and
    its parameters, laid out in the same way.

    Arguments:
        family: The elementwise map.
        raw: The raw parameters, with shape :math:`(B, C n, H, W)`.
        channels: The number of channels :math:`C`.
        overwrite: Whether what is made may take the place of the raw parameters in memory.
    """
    if (
        not isinstance(family, Robust)
        or family.bins != 2
        or raw.dtype not in (torch.float32, torch.float64)
    ):
        return family, raw
    made = raw if overwrite else torch.empty_like(raw)
    params, out = (t.unflatten(1, (channels, 4)).unbind(2) for t in (raw, made))
    bounds = family.bound, family.shift_bound
    prepare(*params, bound=bounds[0], slope=family.slope, shift_bound=bounds[1], out=out)
    return Ahead(*bounds, raw.dtype), made


NAMED: dict[str, Callable[[], Elementwise]] = {
    "affine": Affine,
    "bspline": CubicBSpline,
    "reparametrized": ReparametrizedAffine,
    "robust": Robust,
}


#: What stands for an elementwise map; see :func:`elementwise`.
Coupling = str | Elementwise | Callable[[], Elementwise]


def elementwise(coupling: Coupling) -> Elementwise:
    r"""Returns the map of that name, the given one, or the one that a callable makes.

    Arguments:
        coupling: ``"affine"``, ``"bspline"``, ``"reparametrized"``, ``"robust"`` (with their
            defaults for images), an object such as ``Robust(bins=8)``, or a callable without
            arguments that returns one, such as ``Robust`` or ``partial(Robust, bins=8)``.

    Raises:
        ValueError: If there is no map of that name.
        TypeError: If it is no elementwise map.

    Example:
        >>> elementwise("robust")
        Robust(bins=2, bound=5.0, shift_bound=1.0, slope=0.001)
    """
    if isinstance(coupling, str):
        if coupling not in NAMED:
            raise ValueError(f"coupling must be one of {', '.join(NAMED)}; got {coupling!r}")
        return NAMED[coupling]()
    if isinstance(coupling, type) or (callable(coupling) and not hasattr(coupling, "transform")):
        coupling = coupling()
    if not (hasattr(coupling, "parameters") and hasattr(coupling, "transform")):
        raise TypeError(
            "coupling must be a name, an object with `parameters` and `transform`, or a callable"
            f" that makes one; got {type(coupling).__name__}"
        )
    return cast(Elementwise, coupling)


def apply(
    family: Elementwise, x: Tensor, raw: Tensor, *, inverse: bool, ladj: bool = True
) -> tuple[Tensor, Tensor]:
    r"""Transforms `x`, with shape :math:`(B, C, H, W)`, by raw network outputs with shape
    :math:`(B, C n, H, W)`; returns the output and the log-determinant with shape :math:`(B)`, or
    NaN in its place if it is not wanted."""
    # Under autocast the networks compute in half precision, the maps do not; and what keeps the
    # channels of a pixel together is laid out for the networks alone.
    dtype = torch.promote_types(raw.dtype, x.dtype)
    raw = raw.to(dtype, memory_format=torch.contiguous_format).contiguous()
    f = family.transform(raw.unflatten(1, (x.shape[1], family.parameters)))
    if not ladj:
        y = f.inv(x) if inverse else f(x)
        return y.to(x.dtype), x.new_full(
            (), math.nan
        )  # some maps compute half precision in single
    y, each = f.inverse_and_ladj(x) if inverse else f.call_and_ladj(x)
    return y.to(x.dtype), sum_rows(each)
