r"""What the parts of a layer do on the way from noise to data, and what holds after each."""

__all__ = [
    "Flatten",
    "Join",
    "Limit",
    "Linear",
    "Noise",
    "Permute",
    "Pointwise",
    "Refused",
    "Remark",
    "Scale",
    "Step",
    "Unsqueeze",
    "constant",
]

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flowguard.bounds.regions import Envelope, Region, gamma
from flowguard.bounds.relaxation import Course, Joined, Link, Product, Rearranged, Unfolded


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    r"""What one part of a layer does on the way from noise to data. It equals itself alone: tensors
    have no equality that is a single truth.

    Arguments:
        name: The name of the layer within the model.
        kind: The class of the layer.
        depends: How the step depends on the condition, in words.

    Example:
        A step of one's own says where it leads; of the rest, what holds for any step is assumed.

        >>> from flowguard.bounds.regions import Region
        >>> class Halved(flowguard.bounds.Step):
        ...     def through(self, region, radius, roundoff):
        ...         return region.scale(torch.tensor([0.5]), torch.zeros(1), roundoff)
        >>> Halved().through(Region.cube(torch.full((1, 1), 4.0)), 4.0, 0.0).largest
        2.0
        >>> Halved().features is None, Halved().depends
        (True, 'not at all')
    """

    name: str = ""
    kind: str = ""
    depends: str = "not at all"

    @property
    def features(self) -> int | None:
        r"""The number of features that the step takes, if it tells."""
        return None

    @property
    def operations(self) -> int:
        r"""How many operations after one another the rounding error of the step is that of."""
        return 0

    @property
    def peak(self) -> float:
        r"""The largest number that the step multiplies with: where the model cannot hold it, even
        a product with zero is lost."""
        return 0.0

    @property
    def finite(self) -> bool:
        r"""Whether all numbers of the step are finite, without which it bounds nothing."""
        return all(_is_finite(getattr(self, f.name)) for f in fields(self))

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns a region that holds all outputs.

        Arguments:
            region: The region that holds all inputs.
            radius: The largest absolute value of the noise.
            roundoff: The relative error of one operation.

        Raises:
            NotImplementedError: If the class does not say; all steps of flowguard do.
        """
        raise NotImplementedError

    def link(self, region: Region, radius: float, roundoff: float) -> Link | None:
        r"""Returns the step as :meth:`Certificate.tighten` reads it, backwards; :py:`None` if it
        tells no more than :meth:`through` does.

        Arguments:
            region: The region that holds all inputs.
            radius: The largest absolute value of the noise.
            roundoff: The relative error of one operation.
        """
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Whoever says anew what a step does has not said yet what it does backwards.
        if "through" in vars(cls) and "link" not in vars(cls):
            cls.link = Step.link  # type: ignore[method-assign]


class _Still(Step):
    r"""A step that changes nothing."""

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns the region as it is."""
        return region

    def link(self, region: Region, radius: float, roundoff: float) -> Link:
        r"""Returns what leaves all as it is."""
        return Rearranged(torch.arange(region.box.shape[1]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise(_Still):
    r"""The noise that a flow starts from, at each of its positions.

    Arguments:
        size: The number of features of a position.
        event: The number of elements of all the noise, or :py:`None` if it varies.
        normal: Whether the noise is standard normal.

    Example:
        Which noise it is tells how large it gets: of twelve elements, all lie within 2.86 in 95 of
        100 draws.

        >>> noise = flowguard.bounds.Noise(size=3, event=12)
        >>> round(flowguard.bounds.Certificate("a flow", (noise,), 0.0).bound(confidence=0.95), 2)
        2.86
    """

    size: int
    event: int | None = None
    normal: bool = True

    @property
    def features(self) -> int:
        r"""The number of features of a position."""
        return self.size


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear(Step):
    r"""A constant linear map :math:`x \mapsto W x` of the features of a position.

    Arguments:
        matrix: The matrix :math:`W`, with shape :math:`(C, C)`.
        error: A matrix :math:`E \geq 0` such that the rounding error of the layer is at most
            :math:`C u E |x|`, with `u` that of one operation. If :py:`None`, use :math:`|W|`, which
            holds for products.
        convolution: Whether the layer computes it as a convolution, not as a matrix product.
        factors: The relative error to which the factors of the product are rounded before, where
            the matrix units of the machine work with fewer digits than the numbers have;
            :func:`flowguard.certify` fills it in.

    Example:
        A rotation by 45 degrees reaches √2 times as far along an axis, and back again no farther: the
        region remembers.

        >>> from flowguard.bounds.regions import Region
        >>> turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / 2**0.5
        >>> region = Region.cube(torch.ones(1, 2, dtype=torch.float64))
        >>> there = flowguard.bounds.Linear(matrix=turn).through(region, 1.0, 0.0)
        >>> there.box
        tensor([[1.4142, 1.4142]], dtype=torch.float64)
        >>> back = flowguard.bounds.Linear(matrix=turn.mT).through(there, 1.0, 0.0)
        >>> round(back.largest, 6)
        1.0
    """

    matrix: Tensor
    error: Tensor | None = None
    convolution: bool = False
    factors: float = 0.0

    @property
    def features(self) -> int:
        r"""The number of columns of the matrix."""
        return self.matrix.shape[1]

    @property
    def operations(self) -> int:
        r"""Those of a product, and three more."""
        return self.matrix.shape[1] + 3

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns the region of :math:`W x`, with the rounding error of the product."""
        matrix, error = self._constants()
        return region.linear(matrix, error, roundoff, self.factors)

    def link(self, region: Region, radius: float, roundoff: float) -> Link | None:
        r"""Returns the product, with its rounding error."""
        matrix, error = self._constants()
        return Product(matrix, region.product_slack(error, roundoff, self.factors))

    def _constants(self) -> tuple[Tensor, Tensor]:
        matrix = constant(self.matrix)
        return matrix, matrix.abs() if self.error is None else constant(self.error)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Step):
    r"""A constant elementwise map :math:`x_i \mapsto s_i x_i + b_i`.

    Arguments:
        factor: The factors :math:`s`, with shape :math:`(C)`, or one for all features.
        offset: The offsets :math:`b`, with shape :math:`(C)`, or one for all features.

    Example:
        >>> from flowguard.bounds.regions import Region
        >>> step = flowguard.bounds.Scale(factor=torch.tensor([3.0, -1.0]), offset=torch.tensor(0.5))
        >>> step.through(Region.cube(torch.ones(1, 2, dtype=torch.float64)), 1.0, 0.0).box
        tensor([[3.5000, 1.5000]], dtype=torch.float64)
    """

    factor: Tensor
    offset: Tensor

    @property
    def features(self) -> int | None:
        r"""The number of elements of factor or offset; :py:`None` if one stands for all."""
        n = max(self.factor.numel(), self.offset.numel())
        return n if n > 1 else None

    @property
    def peak(self) -> float:
        r"""The largest factor."""
        return self.factor.abs().max().item() if self.factor.numel() else 0.0

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns the region of :math:`s_i x_i + b_i`, with the rounding error."""
        return region.scale(*self._constants(region), roundoff)

    def link(self, region: Region, radius: float, roundoff: float) -> Link:
        r"""Returns the line, with the rounding error."""
        factor, offset = self._constants(region)
        return Course.line(factor, offset, region.scale_slack(factor, offset, roundoff))

    def _constants(self, region: Region) -> tuple[Tensor, Tensor]:
        shape = region.box.shape[1]
        factor, offset = (constant(t).flatten().expand(shape) for t in (self.factor, self.offset))
        return factor, offset


@dataclass(frozen=True, kw_only=True, eq=False)
class Permute(Step):
    r"""A permutation: feature `i` of the output is feature `order[i]` of the input.

    Arguments:
        order: The order, with shape :math:`(C)`.

    Example:
        >>> from flowguard.bounds.regions import Region
        >>> region = Region.cube(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
        >>> flowguard.bounds.Permute(order=torch.tensor([2, 0, 1])).through(region, 3.0, 0.0).box
        tensor([[3., 1., 2.]], dtype=torch.float64)
    """

    order: Tensor

    @property
    def features(self) -> int:
        r"""The length of the order."""
        return self.order.numel()

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns the region with its features rearranged, without any error."""
        return region.permute(self.order.detach().cpu())

    def link(self, region: Region, radius: float, roundoff: float) -> Link:
        r"""Returns the permutation."""
        return Rearranged(self.order.detach().cpu())


@dataclass(frozen=True, kw_only=True, eq=False)
class Pointwise(Step):
    r"""A univariate map of some features, with parameters that depend on anything.

    Arguments:
        envelope: What holds for the map whatever its parameters are.
        mask: Which features are transformed, with shape :math:`(C)`. :py:`None` means all.

    Example:
        A spline within a box of 5 and a shift of 1 takes the second feature, and may add 1 to it; where
        the noise is small it may take it anywhere in its box.

        >>> from flowguard.bounds.regions import Region
        >>> spline = flowguard.RobustSpline(*torch.zeros(3, 1), torch.zeros(()), shift_bound=1.0)
        >>> step = flowguard.bounds.Pointwise(
        ...     envelope=flowguard.bounds.envelope(spline), mask=torch.tensor([False, True])
        ... )
        >>> step.through(Region.cube(torch.full((1, 2), 9.0, dtype=torch.float64)), 9.0, 0.0).box
        tensor([[ 9., 10.]], dtype=torch.float64)
        >>> step.through(Region.cube(torch.full((1, 2), 0.1, dtype=torch.float64)), 0.1, 0.0).box
        tensor([[0.1000, 5.0000]], dtype=torch.float64)
    """

    envelope: Envelope
    mask: Tensor | None = None

    @property
    def features(self) -> int | None:
        r"""The length of the mask; :py:`None` without one."""
        return None if self.mask is None else self.mask.numel()

    @property
    def operations(self) -> int:
        r"""Those of the envelope."""
        return self.envelope.roundings

    @property
    def peak(self) -> float:
        r"""The gain of the envelope."""
        return 0.0 if self.envelope.limit is not None else self.envelope.gain

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns the region after the map, by its envelope, on the features of the mask."""
        return region.elementwise(self.envelope, self._mask(region), roundoff)

    def link(self, region: Region, radius: float, roundoff: float) -> Link:
        r"""Returns the course of the map, by its envelope."""
        mask = self._mask(region)
        grown, slack = region.growth(self.envelope, mask, roundoff)
        return Course.map(self.envelope, mask, region.box, grown, slack)

    def _mask(self, region: Region) -> Tensor:
        everywhere = torch.ones(region.box.shape[1], dtype=torch.bool)
        return everywhere if self.mask is None else self.mask.detach().cpu()


@dataclass(frozen=True, kw_only=True, eq=False)
class Limit(Step):
    r"""A map of each feature that takes none farther from zero, and none beyond a bound.

    Arguments:
        bound: The bound.
        beside: The largest absolute value of what is added before the map, and taken away after
            it: rounding errors are relative to that, too.

    Example:
        >>> from flowguard.bounds.regions import Region
        >>> region = Region.cube(torch.tensor([[3.0, 300.0]], dtype=torch.float64))
        >>> flowguard.bounds.Limit(bound=10.0).through(region, 300.0, 0.0).box
        tensor([[ 3., 10.]], dtype=torch.float64)
    """

    bound: float
    beside: float = 0.0

    @property
    def operations(self) -> int:
        r"""Those of a map and of what is added before, and taken away after it."""
        return 12

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns the cube of what is as large as before, and within the bound."""
        share = gamma(self.operations, roundoff)
        grown = region.box + share * (region.box + self.beside)
        return Region.cube(grown.clamp(max=(1 + share) * self.bound))


@dataclass(frozen=True, kw_only=True, eq=False)
class Join(Step):
    r"""The inverse of a split: further features :math:`m + e^s z` come in, with bounded m and s.

    Arguments:
        joined: The number of features that come in.
        mean_bound: The bound of :math:`m`.
        scale_bound: The bound of :math:`s`.

    Example:
        >>> from flowguard.bounds.regions import Region
        >>> step = flowguard.bounds.Join(joined=1, mean_bound=2.0, scale_bound=0.0)
        >>> step.through(Region.cube(torch.full((1, 2), 7.0, dtype=torch.float64)), 4.0, 0.0).box
        tensor([[7., 7., 6.]], dtype=torch.float64)
    """

    joined: int
    mean_bound: float
    scale_bound: float

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns the region with the further features, as large as mean, scale and noise let
        them be."""
        return region.join(self.joined, self._reach(radius, roundoff))

    def link(self, region: Region, radius: float, roundoff: float) -> Link:
        r"""Returns the further features."""
        return Joined(self._reach(radius, roundoff))

    def _reach(self, radius: float, roundoff: float) -> float:
        largest = torch.tensor(self.scale_bound, dtype=torch.float64).exp().item()
        largest = self.mean_bound + largest * radius
        # The exponential of a rounded s, two units of its own, a product and a sum.
        return largest * (1 + (8 + self.scale_bound) * roundoff)


@dataclass(frozen=True, kw_only=True, eq=False)
class Unsqueeze(Step):
    r"""The inverse of a squeeze: features become positions.

    Arguments:
        factor: The factor that height and width grow by.

    Example:
        Four features of a cell become four positions of one feature, each with a bound of its own.

        >>> from flowguard.bounds.regions import Region
        >>> region = Region.cube(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64))
        >>> flowguard.bounds.Unsqueeze(factor=2).through(region, 4.0, 0.0).box.shape
        torch.Size([4, 1])
    """

    factor: int

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns the region of the positions that each cell becomes."""
        return region.unsqueeze(self.factor)

    def link(self, region: Region, radius: float, roundoff: float) -> Link | None:
        r"""Returns the positions, if all features are told apart."""
        return None if region.box.shape[1] % self.factor**2 else Unfolded(self.factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Flatten(Step):
    r"""The end of a layer after which features are no longer told apart, as those of an image.

    Example:
        >>> from flowguard.bounds.regions import Region
        >>> region = Region.cube(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
        >>> flowguard.bounds.Flatten().through(region, 3.0, 0.0).box
        tensor([[3.]], dtype=torch.float64)
    """

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns a cube of one feature, with the largest side of the region."""
        return Region.cube(region.box.new_full((1, 1), region.largest))


@dataclass(frozen=True, kw_only=True, eq=False)
class Remark(_Still):
    r"""A row in the table for what the bound leaves out, such as an image that is added last.

    Example:
        >>> remark = flowguard.bounds.Remark(kind="Upsample", depends="adds the enlarged condition")
        >>> print(flowguard.bounds.Certificate("a model", (remark,), 0.0).table())
        layer  type      bound in  bound out  depends on the condition
               Upsample  4         4          adds the enlarged condition
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Refused(Step):
    r"""A layer that no bound is known for.

    Arguments:
        reason: Why, in words.
        gain: By how much it may multiply its input at worst, if that is known.

    Example:
        >>> spline = flowguard.RobustSpline(*torch.zeros(3, 1), torch.zeros(()), shift_bound=None)
        >>> (refused,) = flowguard.certify(spline).refused
        >>> refused.reason
        'its shift is free; give a shift_bound'
    """

    reason: str
    gain: float | None = None
    depends: str = "without bound"

    @property
    def finite(self) -> bool:
        r"""Always true: nothing is claimed that could be infinite."""
        return True  # it claims nothing


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, Envelope):
        known = (value.offset, value.floor, value.gain) if value.limit is None else ()
        return all(map(math.isfinite, known)) and not math.isnan(value.displacement)
    return not isinstance(value, float) or math.isfinite(value)


def constant(t: Tensor) -> Tensor:
    r"""A constant of a layer, as the certificate computes with it; NaN, which certifies nothing,
    if it is complex.

    Arguments:
        t: The constant, with shape :math:`(*)`, of any dtype and on any device.

    Returns:
        The constant without its gradient, with shape :math:`(*)`, in float64 on the CPU.

    Example:
        >>> flowguard.bounds.constant(torch.tensor([0.5, 3.0], dtype=torch.bfloat16))
        tensor([0.5000, 3.0000], dtype=torch.float64)
        >>> flowguard.bounds.constant(torch.tensor(1j))
        tensor(nan, dtype=torch.float64)
    """
    if t.is_complex():
        return torch.full(t.shape, math.nan, dtype=torch.float64)
    return t.detach().to("cpu", torch.float64)
