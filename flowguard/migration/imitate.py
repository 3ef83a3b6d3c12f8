r"""Robust splines that imitate other univariate maps."""

__all__ = [
    "SAME",
    "AffineMap",
    "InUnits",
    "Rescaled",
    "RescaledSpline",
    "Taught",
    "compare",
    "imitate",
    "units",
]

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.functional import FINE_SLOPE, check_bound, check_shift_bound, check_slope
from flowguard.transforms import SHIFT_BOUND, RobustSpline, Univariate

AnyTransform = Any  # hosts give their transforms `call_and_ladj`, torch does not

SMALLEST = 1e-6  # the least scale of a feature; a feature that never varies has none of its own
ROWS = 512  # rows that a step of the fit looks at
SAME = 1e-2  #: by how many nats a density may move until a row counts as cut


class AffineMap(Univariate):
    r"""Creates the affine map :math:`f(x) = e^s x + t` of a host, to be imitated.

    Arguments:
        log_scale: The logarithm :math:`s` of the slope.
        shift: The value :math:`t` at zero.
    """

    def __init__(self, log_scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.log_scale, self.shift = log_scale, shift

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + self.shift, self.log_scale.expand_as(x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self.shift) * (-self.log_scale).exp(), -self.log_scale.expand_as(y)


class Rescaled(Univariate):
    r"""Creates a univariate map in other units, :math:`f(x) = m + s \, g((x - \mu) / \sigma)`.

    It is computed in the dtype of the units, if that is the finer one; what it returns has the
    dtype of its argument.

    Arguments:
        base: The map :math:`g`.
        loc_in: The origin :math:`\mu` of the input.
        scale_in: The unit :math:`\sigma` of the input.
        loc_out: The origin :math:`m` of the output.
        scale_out: The unit :math:`s` of the output.
    """

    def __init__(
        self,
        base: Univariate,
        loc_in: Tensor,
        scale_in: Tensor,
        loc_out: Tensor,
        scale_out: Tensor,
    ) -> None:
        super().__init__()
        self.base = base
        self.loc_in, self.scale_in = loc_in, scale_in
        self.loc_out, self.scale_out = loc_out, scale_out

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.base})"

    @property
    def units(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Origin and unit of the input, and origin and unit of the output."""
        return self.loc_in, self.scale_in, self.loc_out, self.scale_out

    def _gain(self, ladj: Tensor) -> Tensor:
        return (self.scale_out / self.scale_in).log().to(ladj.dtype)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.base._forward((x - self.loc_in) / self.scale_in)
        y = y * self.scale_out + self.loc_out
        return y.to(x.dtype), ladj + self._gain(ladj)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.base._backward((y - self.loc_out) / self.scale_out)
        x = x * self.scale_in + self.loc_in
        return x.to(y.dtype), ladj - self._gain(ladj)

    def inverse_bound(self, radius: float) -> float:
        r"""Returns the bound of the inverse, in the worst of the features.

        Arguments:
            radius: The bound of its argument.
        """
        bounds = zip(*(t.detach().double().flatten().tolist() for t in self.units), strict=True)
        return max(
            abs(loc_in) + scale_in * self.base.inverse_bound((radius + abs(loc_out)) / scale_out)
            for loc_in, scale_in, loc_out, scale_out in bounds
        )


class InUnits(nn.Module):
    r"""Creates what constructors of robust splines in the units of each feature have in common.

    Arguments:
        loc_in: The origin of the input, with shape :math:`(D)` or one that broadcasts.
        scale_in: The unit of the input.
        loc_out: The origin of the output.
        scale_out: The unit of the output.
        bound: The bound :math:`B` of the box, in these units.
        shift_bound: The bound of the shift, in these units.
        slope: The least slope, in these units.
    """

    loc_in: Tensor
    scale_in: Tensor
    loc_out: Tensor
    scale_out: Tensor

    def __init__(
        self,
        loc_in: Tensor,
        scale_in: Tensor,
        loc_out: Tensor,
        scale_out: Tensor,
        *,
        bound: float = 5.0,
        shift_bound: float | None = SHIFT_BOUND,
        slope: float | None = FINE_SLOPE,
    ) -> None:
        super().__init__()
        check_bound(bound)
        check_shift_bound(shift_bound)
        check_slope(slope)
        self.register_buffer("loc_in", loc_in)
        self.register_buffer("scale_in", scale_in)
        self.register_buffer("loc_out", loc_out)
        self.register_buffer("scale_out", scale_out)
        self.bound = bound
        self.shift_bound = shift_bound
        self.slope = slope

    @property
    def units(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Origin and unit of the input, and origin and unit of the output."""
        return self.loc_in, self.scale_in, self.loc_out, self.scale_out

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        errors: list[str] = args[-1]
        for name in ("loc_in", "scale_in", "loc_out", "scale_out"):
            unit = getattr(self, name)
            if not bool((unit.isfinite() & ((unit > 0) | name.startswith("loc"))).all()):
                rule = "finite" if name.startswith("loc") else "finite and positive"
                errors.append(f"{prefix}{name} must be {rule}; got {unit.flatten().tolist()[:4]}")

    @property
    def options(self) -> dict[str, Any]:
        r"""The options of the splines."""
        return {"bound": self.bound, "shift_bound": self.shift_bound, "slope": self.slope}

    def extra_repr(self) -> str:
        return f"bound={self.bound}, shift_bound={self.shift_bound}"


class RescaledSpline(InUnits):
    r"""Creates a constructor of robust splines in the units of each feature.

    The units do not depend on the condition: what it can do to a sample stays bounded. Zero
    parameters give the affine map from the units of the input to those of the output.

    Arguments:
        loc_in: The origin of the input, with shape :math:`(D)`.
        scale_in: The unit of the input, with shape :math:`(D)`.
        loc_out: The origin of the output, with shape :math:`(D)`.
        scale_out: The unit of the output, with shape :math:`(D)`.
        bins: The number of bins :math:`K`.
        options: The bounds of box and shift and the least slope; see :class:`InUnits`.

    Example:
        >>> spline = RescaledSpline(*torch.tensor([[0.0], [2.0], [1.0], [4.0]]))
        >>> f = spline(*(torch.zeros(1, *shape) for shape in spline.shapes))
        >>> f(torch.tensor([3.0]))
        tensor([7.])
    """

    def __init__(
        self,
        loc_in: Tensor,
        scale_in: Tensor,
        loc_out: Tensor,
        scale_out: Tensor,
        *,
        bins: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(loc_in, scale_in, loc_out, scale_out, **options)
        self.shapes = RobustSpline.shapes(bins)
        self.bins = bins

    def extra_repr(self) -> str:
        return f"bins={self.bins}, {super().extra_repr()}"

    def forward(self, *phi: Tensor) -> Rescaled:
        r"""Returns the spline with these parameters.

        Arguments:
            phi: The unconstrained widths, heights, derivatives and shift.
        """
        widths, heights, derivatives, shift = phi
        spline = RobustSpline(widths, heights, derivatives, shift, **self.options)
        return Rescaled(spline, *self.units)


class Taught(NamedTuple):
    r"""How well a map imitates another.

    Arguments:
        error: The root mean square error, in standard deviations of the output.
        ladj_error: The mean absolute error of the logarithm of the slope.
        cut: The share of the rows at which it does not follow: where the logarithm of the slope of
            any feature is off by more than a hundredth.
    """

    error: float
    ladj_error: float
    cut: float


def units(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns origin and unit of each feature of a batch, with shape :math:`(N, *, D)`."""
    std, mean = torch.std_mean(x, dim=tuple(range(x.dim() - 1)), correction=0)
    return mean, std.clamp_min(SMALLEST)


def imitate(
    old: Callable[[Tensor], AnyTransform],
    new: Callable[[Tensor], Rescaled],
    parameters: Iterable[nn.Parameter],
    x: Tensor,
    *,
    steps: int,
) -> None:
    r"""Fits a spline to another univariate map, where data and samples are.

    Each step looks at data and, for the same conditions, at what the old map makes of noise: the
    first is what a density needs, the second what samples need.

    Arguments:
        old: The old map of some rows of the batch.
        new: The new map of some rows of the batch.
        parameters: What the new map is learned by.
        x: The inputs of the map, with shape :math:`(N, D)`.
        steps: The number of steps of Adam.
    """
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        rows = torch.randint(len(x), (min(ROWS, len(x)),), device=x.device)
        with torch.no_grad():
            teacher = old(rows)
            like = new(rows)
            noise = like.loc_out + like.scale_out * torch.randn_like(x[rows])
            points = torch.stack((x[rows], teacher.inv(noise)))
            goal, goal_ladj = teacher.call_and_ladj(points)
            inside = _inside(like, points, goal)
            # What is not finite would make NaN of a gradient that does not count.
            points = torch.where(inside, points, like.loc_in)
            goal, goal_ladj = (torch.where(inside, t, 0.0) for t in (goal, goal_ladj))
        optimizer.zero_grad()
        pupil = new(rows)
        y, ladj = pupil.call_and_ladj(points)
        loss = ((y - goal) / pupil.scale_out).square() + 0.5 * (ladj - goal_ladj).square()
        torch.where(inside, loss, 0.0).mean().backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def compare(old: AnyTransform, new: AnyTransform, x: Tensor) -> Taught:
    r"""Tells how well a map imitates another.

    Arguments:
        old: The old map.
        new: The new map.
        x: The inputs, with shape :math:`(N, D)`.
    """
    (goal, goal_ladj), (y, ladj) = old.call_and_ladj(x), new.call_and_ladj(x)
    _, scale = units(goal)
    off = (ladj - goal_ladj).abs()
    return Taught(
        ((y - goal) / scale).square().mean().sqrt().item(),
        off.mean().item(),
        (off > SAME).any(-1).double().mean().item(),
    )


def _inside(like: Rescaled, x: Tensor, y: Tensor) -> Tensor:
    r"""Where the old map runs within the box; elsewhere no spline can follow it."""
    box = like.base.bound  # type: ignore[attr-defined]
    u, v = (x - like.loc_in) / like.scale_in, (y - like.loc_out) / like.scale_out
    return (u.abs() < box) & (v.abs() < box)
