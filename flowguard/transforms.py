r"""Univariate transforms, for use as ``univariate=`` in zuko and as ordinary torch transforms."""

__all__ = [
    "AdditiveTransform",
    "AffineTransform",
    "CubicBSpline",
    "CubicBSplineTransform",
    "PreparedSpline",
    "ReparametrizedAffineTransform",
    "RobustSpline",
    "Univariate",
]

import copy
import math
import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from flowguard import functional as F
from flowguard.spline.cubic import cubic_b_spline

SHIFT_BOUND = 5.0


class Univariate(Transform):
    r"""The abstract monotone map of the real line, :math:`y = f(x)`, element by element.

    A subclass holds its parameters as tensors and defines `_forward` and `_backward`,
    which return the value and the logarithm of the slope of the direction taken.

    Example:
        >>> class Shifted(flowguard.transforms.Univariate):
        ...     def __init__(self, shift):
        ...         super().__init__()
        ...         self.shift = shift
        ...
        ...     def _forward(self, x):
        ...         return x + self.shift, torch.zeros_like(x)
        ...
        ...     def _backward(self, y):
        ...         return y - self.shift, torch.zeros_like(y)
        >>> f = Shifted(torch.tensor([1.0, 2.0]))
        >>> f.inv(f(torch.zeros(2)))
        tensor([0., 0.])
        >>> torch.distributions.TransformedDistribution(
        ...     torch.distributions.Normal(torch.zeros(2), 1.0), [f]
        ... ).log_prob(torch.tensor([1.0, 2.0]))
        tensor([-0.9189, -0.9189])
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    # Two objects that held each other would wait for the garbage collector, with their tensors.
    _mirror: weakref.ref[Transform] | None = None

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        return self._forward(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._backward(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Returns the logarithm of the slope at `x`, with the shape of `x`."""
        return self._forward(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the value and the logarithm of the slope at `x`, in one pass, both with the shape
        of `x`."""
        return self._forward(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`x = f^{-1}(y)` and the logarithm of the slope of :math:`f^{-1}` at `y`,
        in one pass.

        Arguments:
            y: The value, with shape :math:`(*)`.

        Returns:
            Both with shape :math:`(*)`, the logarithm in nats.
        """
        return self._backward(y)

    def inverse_bound(self, radius: float) -> float:
        r"""Returns a number that :math:`|f^{-1}(y)|` cannot exceed for any :math:`|y|` up to
        `radius`, whatever the parameters are: :math:`\infty` where there is none.

        Arguments:
            radius: The largest :math:`|y|`, not negative.

        Example:
            >>> spline = RobustSpline(*torch.randn(3, 7), torch.randn(()), bound=5.0, shift_bound=2.0)
            >>> spline.inverse_bound(1.0), spline.inverse_bound(9.0)
            (5.0, 11.0)
        """
        _check_radius(radius)
        return math.inf

    @property
    def inv(self) -> Transform:
        r"""The inverse transform."""
        inverse = None if self._mirror is None else self._mirror()
        if inverse is None:
            inverse = InverseTransform(self)
            self._mirror = weakref.ref(inverse)
        return inverse

    def with_cache(self, cache_size: int = 1) -> Self:
        r"""Returns the same transform with another cache: of the last value if 1, none if 0.

        Arguments:
            cache_size: The size of the cache.

        Raises:
            ValueError: If it is neither 0 nor 1.
        """
        if cache_size not in (0, 1):
            raise ValueError(f"cache_size must be 0 or 1; got {cache_size}")
        if cache_size == self._cache_size:
            return self
        other = copy.copy(self)
        other._cache_size = cache_size
        other._cached_x_y = None, None
        return other

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_mirror", None)  # a copy has an inverse of its own
        return state


class InverseTransform(torch.distributions.transforms._InverseTransform):
    r"""The inverse of a univariate transform, which knows its slope without a second pass."""

    def __init__(self, transform: Univariate) -> None:
        super().__init__(transform)
        self._transform = transform

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform._backward(y)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._transform._mirror = weakref.ref(self)


def _check_radius(radius: float) -> None:
    if not radius >= 0:
        raise ValueError(f"radius must not be negative; got {radius}")


class _Spline(Univariate):
    r"""A map of which value and slope are one operation, half of which is for the slope."""

    def _spline(self, x: Tensor, inverse: bool, steep: bool) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._spline(x, inverse=False, steep=True)
        return y, ladj

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._spline(y, inverse=True, steep=True)
        return x, ladj

    def _call(self, x: Tensor) -> Tensor:
        return self._spline(x, inverse=False, steep=False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._spline(y, inverse=True, steep=False)[0]


class RobustSpline(_Spline):
    r"""Creates a robust rational-quadratic spline, to be used in place of an affine map.

    .. math:: f(x) = \mathrm{RQS}(x) + t

    On :math:`[-B, B]` the spline maps onto :math:`[-B, B]`, outside it is the identity, whatever
    the parameters are; then the shift :math:`t` is added. As the slope in the tails is one for
    every condition, the inverse cannot explode: with :math:`|t| \leq \beta`,

    .. math:: |f^{-1}(y)| \leq \max(B, |y| + \beta)

    All-zero parameters give the identity. Two bins are another map than three and more: the slope
    at the knot of two bins is a multiple of the harmonic mean of the slopes of both, with three and
    more bins zero derivatives give the geometric mean.

    References:
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032

    Arguments:
        widths: The unconstrained bin widths, with shape :math:`(*, K - 1)`.
        heights: The unconstrained bin heights, with shape :math:`(*, K - 1)`.
        derivatives: The unconstrained slopes at the inner knots, with shape :math:`(*, K - 1)`.
        shift: The unconstrained shift, with shape :math:`(*)`. If :py:`None`, there is no shift.
        bound: The bound :math:`B` of the box.
        shift_bound: The bound :math:`\beta` of the shift. If :py:`None`, the shift is free, as
            published, and the inverse is not bounded.
        slope: The least slope of the spline (its inverse is the greatest). The way back loses digits
            by one over it, for each layer: at the default, flows of three layers come back in
            float32, at :py:`1e-3` they lose twenty times as much. Images, and data on ridges as thin
            as some thousandths, want :py:`1e-3`. If :py:`None`, use the published
            parameterisation; see :func:`flowguard.functional.rational_quadratic_spline`.

    Example:
        >>> f = RobustSpline(torch.zeros(3, 7), torch.zeros(3, 7), torch.zeros(3, 7), torch.ones(3))
        >>> f
        RobustSpline(bins=8)
        >>> x = torch.tensor([-9.0, 0.5, 9.0])
        >>> torch.allclose(f.inv(f(x)), x)
        True
        >>> f.inverse_bound(3.0)
        8.0
    """

    def __init__(
        self,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        shift: Tensor | None = None,
        bound: float = 5.0,
        shift_bound: float | None = SHIFT_BOUND,
        slope: float | None = F.SLOPE,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size=cache_size)
        F.check_spline(widths, heights, derivatives, bound, slope)
        self.widths = widths
        self.heights = heights
        self.derivatives = derivatives
        F.check_shift_bound(shift_bound)
        self.bound = bound
        self.shift_bound = shift_bound
        self.slope = slope
        self._shift = shift

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}(bins={self.bins})"

    @staticmethod
    def shapes(bins: int) -> list[tuple[int, ...]]:
        r"""Returns the shapes of the parameters of one element, for zuko's ``shapes=``.

        Arguments:
            bins: The number of bins :math:`K`, at least 2.

        Raises:
            ValueError: If there are fewer than two bins.

        Example:
            >>> RobustSpline.shapes(8)
            [(7,), (7,), (7,), ()]
        """
        if bins < 2:
            raise ValueError(f"a spline needs at least 2 bins; got {bins}")
        return [(bins - 1,), (bins - 1,), (bins - 1,), ()]

    @property
    def bins(self) -> int:
        r"""The number of bins :math:`K`."""
        return self.widths.shape[-1] + 1

    @property
    def shift(self) -> Tensor | None:
        r"""The bounded shift, with shape :math:`(*)`, or None."""
        return None if self._shift is None else F.bounded(self._shift, self.shift_bound)

    def _spline(self, x: Tensor, inverse: bool, steep: bool) -> tuple[Tensor, ...]:
        return F.shifted_spline(
            x,
            self.widths,
            self.heights,
            self.derivatives,
            self._shift,
            bound=self.bound,
            slope=self.slope,
            shift_bound=self.shift_bound,
            inverse=inverse,
            steep=steep,
        )

    def inverse_bound(self, radius: float) -> float:
        _check_radius(radius)
        shift = 0.0 if self._shift is None else self.shift_bound
        return math.inf if shift is None else max(self.bound, radius + shift)


class PreparedSpline(_Spline):
    r"""Creates the robust spline of what :func:`flowguard.functional.prepare` made.

    Arguments:
        prepared: What was made, taken as constant.

    Example:
        >>> parameters, out = torch.randn(4, 3), torch.empty(4, 3)
        >>> f = PreparedSpline(
        ...     F.prepare(*parameters, bound=5.0, slope=0.01, shift_bound=1.0, out=list(out))
        ... )
        >>> x = torch.tensor([-9.0, 1.0, 9.0])
        >>> torch.equal(f(x), RobustSpline(*parameters[:3, :, None], parameters[3], shift_bound=1.0)(x))
        True
    """

    def __init__(self, prepared: F.Prepared) -> None:
        super().__init__()
        self.prepared = prepared

    def _spline(self, x: Tensor, inverse: bool, steep: bool) -> tuple[Tensor, ...]:
        return F.prepared_spline(x, self.prepared, inverse=inverse, steep=steep)


class AffineTransform(Univariate):
    r"""Creates the conditional affine map of SRFlow, the baseline whose inverse may explode.

    See :func:`flowguard.functional.affine`.

    Arguments:
        shift: The shift, added before scaling, with shape :math:`(*)`.
        scale: The unconstrained scale, with shape :math:`(*)`.
        eps: The least scale.

    Example:
        >>> f = AffineTransform(torch.ones(2), torch.full((2,), -30.0))
        >>> f.inv(torch.ones(2))
        tensor([9999., 9999.])
    """

    _map = staticmethod(F.affine)

    def __init__(
        self, shift: Tensor, scale: Tensor, eps: float = 1e-4, cache_size: int = 0
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.shift = shift
        self.scale = scale
        self.eps = eps

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(x, self.shift, self.scale, eps=self.eps)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(y, self.shift, self.scale, eps=self.eps, inverse=True)

    def _inverse(self, y: Tensor) -> Tensor:  # without the logarithm
        return y / self._gain() - self.shift

    def _gain(self) -> Tensor:
        return torch.sigmoid(self.scale + 2) + self.eps


class ReparametrizedAffineTransform(AffineTransform):
    r"""Creates the reparametrised conditional affine map, whose inverse hardly expands.

    See :func:`flowguard.functional.reparametrized_affine`.

    Arguments:
        shift: The shift, added before scaling, with shape :math:`(*)`.
        scale: The unconstrained inverse scale, with shape :math:`(*)`.
        eps: The least inverse scale.

    Example:
        >>> f = ReparametrizedAffineTransform(torch.ones(2), torch.full((2,), -30.0))
        >>> f.inv(torch.ones(2))
        tensor([-0.9999, -0.9999])
    """

    _map = staticmethod(F.reparametrized_affine)

    def _inverse(self, y: Tensor) -> Tensor:
        return y * self._gain() - self.shift


class AdditiveTransform(Univariate):
    r"""Creates the additive map :math:`f(x) = x + t`.

    Arguments:
        shift: The shift, with shape :math:`(*)`.
        shift_bound: The bound of the shift. If :py:`None`, the shift is free.

    Example:
        >>> AdditiveTransform(torch.ones(2))(torch.zeros(2))
        tensor([1., 1.])
    """

    def __init__(
        self, shift: Tensor, shift_bound: float | None = None, cache_size: int = 0
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.shift = F.bounded(shift, shift_bound)
        self.shift_bound = shift_bound

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.additive(x, self.shift)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.additive(y, self.shift, inverse=True)

    def inverse_bound(self, radius: float) -> float:
        _check_radius(radius)
        return math.inf if self.shift_bound is None else radius + self.shift_bound


class CubicBSplineTransform(Univariate):
    r"""Creates the cubic B-spline map, the other remedy of the paper.

    The map is a monotone cubic B-spline on the box, the identity outside, then a shift. Zero
    parameters are *not* the identity.

    References:
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        gaps: The unconstrained gaps between knots, with shape :math:`(*, 4)`.
        controls: The unconstrained gaps between control points, with shape :math:`(*, 6)`.
        shift: The unconstrained shift, with shape :math:`(*)`. If :py:`None`, there is no shift.
        bound: The bound :math:`B` of the box.
        shift_bound: The bound of the shift. If :py:`None`, the shift is free, as published.

    Example:
        >>> f = CubicBSplineTransform(torch.zeros(2, 4), torch.zeros(2, 6))
        >>> f(torch.tensor([-3.0, 3.0]))
        tensor([-3.,  3.])
    """

    def __init__(
        self,
        gaps: Tensor,
        controls: Tensor,
        shift: Tensor | None = None,
        bound: float = 0.5,
        shift_bound: float | None = None,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.gaps = gaps
        self.controls = controls
        self.shift = None if shift is None else F.bounded(shift, shift_bound)
        self.bound = bound
        self.shift_bound = shift_bound

    @staticmethod
    def shapes() -> list[tuple[int, ...]]:
        r"""Returns the shapes of the parameters of one element, for zuko's ``shapes=``."""
        return [(4,), (6,), ()]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = cubic_b_spline(x, self.gaps, self.controls, bound=self.bound)
        return y if self.shift is None else y + self.shift, ladj

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y if self.shift is None else y - self.shift
        return cubic_b_spline(y, self.gaps, self.controls, bound=self.bound, inverse=True)

    def inverse_bound(self, radius: float) -> float:
        _check_radius(radius)
        shift = 0.0 if self.shift is None else self.shift_bound
        return math.inf if shift is None else max(self.bound, radius + shift)


#: As :class:`CubicBSplineTransform` was called.
CubicBSpline = CubicBSplineTransform
