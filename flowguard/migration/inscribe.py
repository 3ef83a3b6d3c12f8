r"""Affine maps inscribed into the box of a robust spline, and shifts into their bounds.

Where :mod:`flowguard.migration.imitate` fits a network to an affine map, this computes the spline from what
the old network asks for, in closed form, so that the network is kept as a whole.
"""

__all__ = [
    "ALL",
    "Additional",
    "InscribedAffine",
    "InscribedLine",
    "InscribedShift",
    "inscribe",
    "middle",
    "single",
]

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.functional import FAITHFUL, saturate
from flowguard.migration.imitate import SMALLEST, InUnits, Rescaled, RescaledSpline
from flowguard.numerics import watchable
from flowguard.spline.invert import unconstrain
from flowguard.spline.options import Options
from flowguard.transforms import AdditiveTransform, RobustSpline, Univariate

STRAIGHT = 0.9  # the share of the box in which the map is straight, for slopes up to one
STRAIGHT_STEEP = 0.75  # and for the steepest ones, which need some room to bend
INNER = (
    0.5  # the share of the box that all values which were met shall lie in: rarer ones shall, too
)
WIDEST = 4.0  # by how much it may be widened for that
ALL = slice(None)  #: all features
CLEAR = 1.05  # how far within its limits a spline has to be for its middle to be called straight
MANY = 0.25  # the share of bent elements from which on all go through the spline
FAR = 1e6  # what an intercept is cut at first: far beyond any box, and its square is finite


def inscribe(
    gain: Tensor,
    intercept: Tensor,
    *,
    bound: float,
    shift_bound: float | None,
    slope: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Returns the unconstrained parameters of a robust spline that follows :math:`a u + b`.

    The shift takes :math:`b` where the map is flat, and little of it where it is steep. What is
    left is a line through the box :math:`[-B, B]^2`: on its way through the inner square the
    spline is that line, and on either side one bin leads to a corner of the box. As both end
    slopes of the middle bin are its secant, it is straight.

    Arguments:
        gain: The slope :math:`a > 0`, with shape :math:`(*)`.
        intercept: The value :math:`b` at zero, with shape :math:`(*)`.
        bound: The bound :math:`B` of the box.
        shift_bound: The bound of the shift; :py:`None` for none.
        slope: The least slope of the spline.

    Returns:
        Widths, heights and derivatives, with shape :math:`(*, 2)`, and shifts.
    """
    least = _flattest(gain.dtype, bound, slope)
    a = gain.clamp(least, 1 / least)
    b = intercept.clamp(-FAR, FAR)
    steep = a.clamp_min(1.0)
    shift = b / steep.square()
    if shift_bound is not None:
        shift = saturate(shift, shift_bound)
    edge = bound * (STRAIGHT_STEEP + (STRAIGHT - STRAIGHT_STEEP) / steep)
    rest = steep * saturate((b - shift) / (steep * edge), 1.0) * edge  # crosses the inner square
    left = torch.maximum(-edge, (-edge - rest) / a)
    right = torch.minimum(edge, (edge - rest) / a)
    widths = torch.stack((left + bound, right - left, bound - right), dim=-1)
    low, high = (a * u + rest for u in (left, right))
    heights = torch.stack((low + bound, high - low, bound - high), dim=-1)
    slopes = torch.stack((a, a), dim=-1)
    share = 1 / (2 * bound)
    raw = unconstrain(widths * share, heights * share, slopes, slope=slope)
    if shift_bound is not None:  # what `flowguard.functional.bounded` undoes
        scale = 2 * shift_bound / math.pi
        shift = scale * torch.tan(shift / scale)
    return *raw, shift


def _of(unit: Tensor, of: Tensor | slice) -> Tensor:
    r"""The units of some features, where they do not share theirs."""
    return unit if isinstance(of, slice) or unit.shape[-1] == 1 else unit[..., of]


def _flattest(dtype: torch.dtype, bound: float, slope: float | None) -> float:
    r"""The least slope that is followed, whose inverse is the greatest."""
    # A secant of a bin is at least that share: twice as much leaves room for the bends.
    return max(2 * Options(dtype, bound, slope).share(), 1e-3)


def single(t: Tensor) -> Tensor:
    r"""Returns a tensor in single precision, if it was in half: that has too few digits for knots,
    and no room for what is far.

    Arguments:
        t: The tensor.
    """
    return t.to(torch.promote_types(t.dtype, torch.float32))


class InscribedLine(Rescaled):
    r"""Creates the robust spline that follows :math:`s x + t` in units, for maps that are lines
    nearly everywhere.

    Where the spline is that line, which is nearly everywhere that it was made for, the line is
    what is computed: value, slope and gradients are those of the spline up to rounding. The other
    elements, in the bends, outside of the box and where the spline cannot follow, go through the
    spline. What is compiled, traced, batched by `torch.func`, or on another device than the CPU,
    goes there as a whole, as which elements these are would have to be read back.

    Arguments:
        scale: The slope :math:`s`, with shape :math:`(*)`, in single precision or better.
        shift: The value :math:`t` at zero, with shape :math:`(*)`.
        units: Origin and unit of the input, and of the output.
        bound: The bound :math:`B` of the box.
        shift_bound: The bound of the spline's shift; :py:`None` for none.
        slope: The least slope of the spline.

    Example:
        >>> units = torch.tensor([0.0, 1.0, 0.0, 1.0]).unbind()
        >>> options = {"bound": 5.0, "shift_bound": 5.0, "slope": 1e-3}
        >>> f = InscribedLine(torch.tensor(2.0), torch.tensor(0.5), units, **options)
        >>> f(torch.tensor([1.0])), f(torch.tensor([1e6])) == f.base(torch.tensor([1e6]))
        (tensor([2.5000]), tensor([True]))
    """

    def __init__(
        self,
        scale: Tensor,
        shift: Tensor,
        units: Sequence[Tensor],
        *,
        bound: float,
        shift_bound: float | None,
        slope: float | None,
    ) -> None:
        Univariate.__init__(self)  # the spline is made when it is asked for
        self.scale, self.shift = scale, shift
        self.loc_in, self.scale_in, self.loc_out, self.scale_out = units
        self.bound, self.shift_bound, self.slope = bound, shift_bound, slope

    @property
    def options(self) -> dict[str, Any]:
        r"""The options of the spline."""
        return {"bound": self.bound, "shift_bound": self.shift_bound, "slope": self.slope}

    @property
    def base(self) -> RobustSpline:  # type: ignore[override]
        r"""The spline, in the units."""
        loc_in, scale_in, loc_out, scale_out = self.units
        gain = self.scale * (scale_in / scale_out)
        intercept = (self.scale * loc_in + self.shift - loc_out) / scale_out
        return RobustSpline(*inscribe(gain, intercept, **self.options), **self.options)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(x, False)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(y, True)

    def _run(self, v: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if not (watchable() and v.device.type == "cpu"):
            return self._through_spline(v, inverse)
        wide = v.to(torch.promote_types(v.dtype, self.scale.dtype))
        out, ladj = _line(wide, self.scale, self.shift, inverse)
        with torch.no_grad():
            seen = self._in_units(*((out, wide) if inverse else (wide, out)))
            shape = seen[-1].shape  # that of the units too
            bent = None if self._is_throughout_straight(*seen) else ~self._is_straight(*seen)
            count = 0 if bent is None else int(bent.count_nonzero())
        if bent is not None and count > MANY * bent.numel():
            return self._through_spline(v, inverse)
        if bent is not None and count:
            # What is not finite would make NaN of gradients that do not count.
            parts = [t.expand(bent.shape) for t in (wide, self.scale, self.shift)]
            at, gain, by = (
                t.masked_fill(bent, k) for t, k in zip(parts, (0.0, 1.0, 0.0), strict=True)
            )
            out, ladj = _line(at, gain, by, inverse)
            x, scale, shift = (t[bent] for t in parts)
            units = [t.expand(bent.shape)[bent] for t in self.units]
            few = InscribedLine(scale, shift, units, **self.options)
            there = (bent,)
            bends, slopes = few._through_spline(x, inverse)
            out, ladj = out.index_put(there, bends), ladj.index_put(there, slopes.to(ladj))
        return out.to(v.dtype).expand(shape), ladj.expand(shape)

    def _through_spline(self, v: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return super()._backward(v) if inverse else super()._forward(v)

    def _in_units(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Input, output, slope and intercept, in the units."""
        u, v = (x - self.loc_in) / self.scale_in, (y - self.loc_out) / self.scale_out
        a = self.scale * (self.scale_in / self.scale_out)
        return u, v, a, torch.addcmul(v, a, u, value=-1)

    def _slopes(self, dtype: torch.dtype) -> tuple[float, float, float]:
        r"""The least and the largest slope of lines that may be straight, and the share that is
        kept clear of secants."""
        o = Options(dtype, self.bound, self.slope)
        share = CLEAR * o.share()
        # The middle bin has a least height and width, which secants do not keep it clear of where
        # the least slope is tiny, or there is none.
        least = max(
            _flattest(dtype, self.bound, self.slope),
            o.share() + CLEAR * o.least(3) / STRAIGHT_STEEP,
        )
        flattest = least
        if share > 0:
            # Of a flat line, the bins at both sides are steep, as far as a secant may be that.
            flattest = max(least, (1 - (1 - STRAIGHT) / share) / STRAIGHT)
        return flattest, 1 / least, share

    def _room(self, steep: Any, edge: Any, share: float) -> Any:
        r"""Up to what rest of a steep line the flattest bin at its side, with the secant
        m = a (B - e) / (a B - e + |rest|), allows for its slope: m² ≥ λ² a."""
        return steep**0.5 * (self.bound - edge) / share - steep * self.bound + edge

    def _is_throughout_straight(self, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> bool:
        r"""Whether a few bounds are enough to tell that all elements are straight, as
        :func:`_is_straight` has it."""
        if not v.numel():
            return True
        flattest, steepest, share = self._slopes(a.dtype)
        (least, most), *rest = ([e.item() for e in torch.aminmax(t)] for t in (a, u, v, b))
        if not flattest <= least <= most <= steepest or share > 0.5:
            return False
        farthest, reach, by = (max(-low, high) for low, high in rest)
        steep = max(most, 1.0)
        edge = self.bound * (STRAIGHT_STEEP + (STRAIGHT - STRAIGHT_STEEP) / steep)
        # With θ = 1 / a², what is left of the output without the shift is (1 - θ) v + θ a u, at most
        # (1 - θ) |v| + √θ |u| ≤ |v| + u² / 4 |v|.
        inner = reach + farthest**2 / (4 * reach) if reach > 0 else farthest
        # The room is concave in the slope, hence least at either end.
        far = FAITHFUL * STRAIGHT * self.bound
        if share > 0:
            ends = (1.0, STRAIGHT * self.bound), (steep, edge)
            far = min(far, *(self._room(s, e, share) for s, e in ends))
        shifts = math.inf if self.shift_bound is None else FAITHFUL * self.shift_bound
        return max(farthest, inner) <= edge and by <= shifts and by * (1 - steep**-2) <= far

    def _is_straight(self, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        r"""Where the spline of :func:`inscribe` is the line through these."""
        steep = a.clamp_min(1.0)
        by = b / steep.square()
        edge = self.bound * (STRAIGHT_STEEP + (STRAIGHT - STRAIGHT_STEEP) / steep)
        flattest, steepest, share = self._slopes(a.dtype)
        fine = (a >= flattest) & (a <= steepest)
        # On its way through the inner square.
        fine = fine & (u.abs() <= edge) & ((v - by).abs() <= edge)
        if self.shift_bound is not None:
            fine = fine & (by.abs() <= FAITHFUL * self.shift_bound)
        far = FAITHFUL * steep * edge  # and what is left is followed
        if share > 0:
            far = torch.minimum(far, self._room(steep, edge, share))
        return fine & ((b - by).abs() <= far)


def _line(v: Tensor, scale: Tensor, shift: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    out = (v - shift) / scale if inverse else torch.addcmul(shift, scale, v)
    ladj = scale.to(out.dtype).log()
    return out, (-ladj if inverse else ladj).expand(out.shape)


class Additional(nn.Module):
    r"""A module with buffers of its own, which older weights know nothing of."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The weights of the flow before its migration fit as they are: the buffers stay.
        if any(prefix + name in state_dict for name in self._buffers):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class InscribedAffine(Additional, InUnits):
    r"""Creates a constructor of robust splines that follow affine maps, in the units of each
    feature; :meth:`around` finds these.

    Its arguments are those of :class:`flowguard.migration.imitate.InUnits`.

    Example:
        >>> f = InscribedAffine(*torch.tensor([[0.0], [1.0], [0.0], [1.0]]))
        >>> f(torch.tensor([0.5]), torch.tensor([2.0]))(torch.tensor([3.0]))
        tensor([3.5000])
    """

    @classmethod
    def around(cls, spline: RescaledSpline, x: Tensor, scale: Tensor, shift: Tensor) -> Self:
        r"""Returns a constructor in units that suit what was met.

        The units of a feature are such that a slope in the middle of most that are met is one; see
        :func:`middle`. Of input and output, the one that needs the larger box decides its size.
        Where values were met far out in the box, or beyond it, the units are up to four times as
        large, so that it is as rare as can be that the spline cannot follow.

        Arguments:
            spline: Origins and units of input and output, and the options.
            x: The inputs that were met, with shape :math:`(N, *, D)`.
            scale: The slopes that were met.
            shift: The shifts that were met.
        """
        x, scale, shift = single(x), single(scale), single(shift)
        log = scale.detach().flatten(0, -2).clamp(SMALLEST, 1 / SMALLEST).log()
        one = middle(log, -math.log(_flattest(log.dtype, spline.bound, spline.slope))).exp()
        room = INNER * spline.bound
        unit = torch.maximum(
            spline.scale_in * _widening(x, spline.loc_in, spline.scale_in, room),
            spline.scale_out
            / one
            * _widening(x * scale + shift, spline.loc_out, spline.scale_out, room),
        )
        return cls(
            spline.loc_in,
            unit,
            spline.loc_out,
            unit * one,
            **spline.options,
        )

    def forward(self, scale: Tensor, shift: Tensor, of: Tensor | slice = ALL) -> Rescaled:
        r"""Returns the spline that follows :math:`s x + t`.

        Arguments:
            scale: The slope :math:`s`, with shape :math:`(*, D)`.
            shift: The value :math:`t` at zero, with shape :math:`(*, D)`.
            of: The features that are meant, if they are not all: :math:`D` of them.
        """
        units = [_of(single(t), of) for t in self.units]
        return InscribedLine(single(scale), single(shift), units, **self.options)


def middle(logs: Tensor, reach: float) -> Tensor:
    r"""Returns the middle of the interval that costs the least likelihood.

    A row whose log-slope lies outside of the interval is cut to its end, and loses as many nats as
    it is outside. Their sum is least where as many rows are cut at one end as at the other. Where
    several intervals do the same, that nearest to the middle of 98 % of the rows is taken, so that
    a few outliers do not move it for their own sake.

    Arguments:
        logs: The log-slopes that were met, with shape :math:`(N, D)`.
        reach: How far the interval goes to either side.

    Returns:
        The middle for each feature, with shape :math:`(D)`.

    Example:
        >>> logs = torch.cat((torch.linspace(-1.0, 1.0, 999), torch.tensor([-30.0])))
        >>> middle(logs[:, None], 2.0).abs() < 0.03
        tensor([True])
    """
    low = logs.sort(dim=0).values
    high = low.flip(0)
    fits = high - low <= 2 * reach  # after so many rows are cut at each end
    cut = fits.to(torch.uint8).argmax(dim=0, keepdim=True)
    least, most = (t.gather(0, cut)[0] for t in (low, high))
    few = len(logs) // 100
    return ((low[few] + high[few]) / 2).clamp(most - reach, least + reach)


def _widening(x: Tensor, loc: Tensor, scale: Tensor, room: float) -> Tensor:
    r"""By how much a unit has to grow such that all values are within some units."""
    farthest = ((x.detach() - loc) / scale).abs().flatten(0, -2).amax(0)
    return (farthest / room).clamp(1.0, WIDEST)


class InscribedShift(Additional):
    r"""Creates a constructor of bounded shifts that follow free ones.

    Arguments:
        spline: The units of the input, and the bound in these units.
        shift: The shifts that were met, with shape :math:`(N, *, D)`. Where they were met beyond
            the bound, the units are up to four times as large.

    Example:
        >>> units = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        >>> f = InscribedShift(RescaledSpline(*units), torch.zeros(2, 1))
        >>> f(torch.tensor([torch.inf]))(torch.tensor([3.0])) <= 3.0 + 5.0
        tensor([True])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, spline: RescaledSpline, shift: Tensor) -> None:
        super().__init__()
        self.shift_bound = spline.shift_bound
        shift = single(shift)
        loc, scale = shift.detach().flatten(0, -2).mean(0), spline.scale_in
        if self.shift_bound is not None:
            scale = scale * _widening(shift, loc, scale, FAITHFUL * self.shift_bound)
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def extra_repr(self) -> str:
        r"""Returns the bound of the shift, for the printed module."""
        return f"shift_bound={self.shift_bound}"

    def forward(self, shift: Tensor, of: Tensor | slice = ALL) -> Rescaled:
        r"""Returns the map :math:`x + t`.

        Arguments:
            shift: The shift :math:`t`, with shape :math:`(*, D)`.
            of: The features that are meant, if they are not all: :math:`D` of them.
        """
        loc, unit = _of(self.loc, of), _of(self.scale, of)
        raw = (shift - loc) / unit
        if self.shift_bound is not None:
            scale = 2 * self.shift_bound / math.pi
            raw = scale * torch.tan(saturate(raw, self.shift_bound) / scale)
        base = AdditiveTransform(raw, self.shift_bound)
        return Rescaled(base, torch.zeros_like(loc), unit, loc, unit)
