r"""Random transforms of the core, of torch and of zuko, with constant parameters."""

__all__ = ["TRANSFORMS", "case_of_transforms", "family", "transform", "univariate"]

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import zuko
from torch.distributions import transforms as torch_transforms

from flowguard import transforms as core
from flowguard.bounds import Envelope, envelope_rule
from flowguard.image import Affine, CubicBSpline, ReparametrizedAffine, Robust
from flowguard.integrations.zuko import InPlaceRQSTransform

from .maker import ROWS, Case, Maker

Z = zuko.transforms
Build = Callable[[Maker, int, torch.dtype], Any]


def _bins(m: Maker, d: int, dtype: torch.dtype) -> list[Any]:
    n = m.integer(1, 4)
    return [m.raw(d, n, dtype=dtype) for _ in range(3)]


def _robust(m: Maker, d: int, dtype: torch.dtype) -> Any:
    shift = None if m.flip(0.2) else m.raw(d, dtype=dtype)
    return core.RobustSpline(*_bins(m, d, dtype), shift, **spline_options(m))


def spline_options(m: Maker) -> dict[str, Any]:
    r"""Returns options of a robust spline."""
    shift = None if m.flip(0.03) else m.positive()
    return {"bound": m.positive(), "shift_bound": shift, "slope": m.pick([None, 1e-3, 1e-3, 0.3])}


def _cubic(m: Maker, d: int, dtype: torch.dtype) -> Any:
    shift = None if m.flip(0.2) else m.raw(d, dtype=dtype)
    parts = m.raw(d, 4, dtype=dtype), m.raw(d, 6, dtype=dtype), shift
    return core.CubicBSplineTransform(*parts, bound=m.positive(), shift_bound=_bound(m))


def _bound(m: Maker) -> float | None:
    return None if m.flip(0.1) else m.positive()


def _additive(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return core.AdditiveTransform(m.raw(d, dtype=dtype), _bound(m))


class Tripled(core.Univariate):
    r"""A map that states a bound of its own."""

    def _forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x / 3, torch.zeros_like(x)

    def _backward(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 3 * y, torch.zeros_like(y)

    def inverse_bound(self, radius: float) -> float:
        return 3 * radius


def _mine(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return m.pick([core.Univariate, Tripled])()


def _inverse(m: Maker, d: int, dtype: torch.dtype) -> Any:
    build = m.pick([_robust, _cubic, _additive])
    inverse = build(m, d, dtype).inv
    m.note(inverse.inv)
    return inverse


def _their_inverse(m: Maker, d: int, dtype: torch.dtype) -> Any:
    f = transform(m, d, dtype)
    if isinstance(f, torch_transforms.ComposeTransform | core.Univariate):
        # Their inverses are of other classes: what stands within has one of this class.
        f = torch_transforms.IndependentTransform(f, 0) if f.domain.event_dim == 0 else f
    return f.inv


def _constant(m: Maker, d: int, dtype: torch.dtype) -> Any:
    rows = (d,) if m.flip(0.8) else m.pick([(), (1,), (1, d)])
    loc, scale = m.tensor(*rows, dtype=dtype), m.tensor(*rows, dtype=dtype)
    if m.flip(0.2):
        loc, scale = float(m.positive()), float(m.positive())
    return torch_transforms.AffineTransform(loc, scale)


def _independent(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return torch_transforms.IndependentTransform(_elementwise(m, d, dtype), 1)


def _dependent(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return Z.DependentTransform(_elementwise(m, d, dtype), 1)


def _elementwise(m: Maker, d: int, dtype: torch.dtype) -> Any:
    cls = m.pick([c for c in ELEMENTWISE if c in TRANSFORMS])
    return m.note(TRANSFORMS[cls](m, d, dtype))


def _compose(m: Maker, d: int, dtype: torch.dtype) -> Any:
    parts = [transform(m, d, dtype) for _ in range(m.integer(1, 3))]
    return torch_transforms.ComposeTransform(_again(m, parts))


def _composed(m: Maker, d: int, dtype: torch.dtype) -> Any:
    parts = [transform(m, d, dtype) for _ in range(m.integer(1, 3))]
    return Z.ComposedTransform(*_again(m, parts))


def _again(m: Maker, parts: list[Any]) -> list[Any]:
    return [*parts, parts[0]] if m.flip(0.2) else parts


def _monotonic_affine(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return Z.MonotonicAffineTransform(m.tensor(d, dtype=dtype), m.tensor(d, dtype=dtype))


def _lu(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return Z.LULinearTransform(m.tensor(d, d, dtype=dtype) + torch.eye(d, dtype=dtype))


def _rotation(m: Maker, d: int, dtype: torch.dtype) -> Any:
    return Z.RotationTransform(m.tensor(d, d).to(dtype))


def _rqs(cls: Any, m: Maker, d: int, dtype: torch.dtype) -> Any:
    return cls(m.tensor(d, 4), m.tensor(d, 4), m.tensor(d, 3), bound=m.positive())


def _squash(cls: Any, m: Maker, d: int, dtype: torch.dtype) -> Any:
    f = cls()
    m.note(f)
    return f.inv if m.flip(0.7) else f


TRANSFORMS: dict[type, Build] = {
    core.AdditiveTransform: _additive,
    core.AffineTransform: lambda m, d, t: core.AffineTransform(m.raw(d), m.raw(d)),
    core.CubicBSplineTransform: _cubic,
    core.InverseTransform: _inverse,
    core.ReparametrizedAffineTransform: lambda m, d, t: core.ReparametrizedAffineTransform(
        m.raw(d), m.raw(d)
    ),
    core.RobustSpline: _robust,
    core.Univariate: _mine,
    torch_transforms.AffineTransform: _constant,
    torch_transforms.ComposeTransform: _compose,
    torch_transforms.IndependentTransform: _independent,
    torch_transforms._InverseTransform: _their_inverse,
    Z.BernsteinTransform: lambda m, d, t: Z.BernsteinTransform(torch.randn(d, 6)),
    Z.BoundedBernsteinTransform: lambda m, d, t: Z.BoundedBernsteinTransform(torch.randn(d, 6)),
    Z.CircularShiftTransform: lambda m, d, t: Z.CircularShiftTransform(m.positive()),
    Z.ComposedTransform: _composed,
    Z.DependentTransform: _dependent,
    Z.GaussianizationTransform: lambda m, d, t: Z.GaussianizationTransform(*torch.randn(2, d, 3)),
    Z.IdentityTransform: lambda m, d, t: Z.IdentityTransform(),
    Z.LULinearTransform: _lu,
    Z.MonotonicAffineTransform: _monotonic_affine,
    InPlaceRQSTransform: partial(_rqs, InPlaceRQSTransform),
    Z.MonotonicRQSTransform: partial(_rqs, Z.MonotonicRQSTransform),
    Z.MonotonicTransform: lambda m, d, t: Z.MonotonicTransform(torch.tanh, ()),
    Z.PermutationTransform: lambda m, d, t: Z.PermutationTransform(torch.randperm(d)),
    Z.RotationTransform: _rotation,
    Z.SOSPolynomialTransform: lambda m, d, t: Z.SOSPolynomialTransform(torch.randn(d, 2, 3)),
    Z.SoftclipTransform: lambda m, d, t: Z.SoftclipTransform(m.positive()),
    Z.UnconstrainedMonotonicTransform: lambda m, d, t: Z.UnconstrainedMonotonicTransform(
        torch.exp, torch.zeros(d), phi=()
    ),
}
for _cls in (torch_transforms.SigmoidTransform, torch_transforms.TanhTransform):
    TRANSFORMS[_cls] = partial(_squash, _cls)
for _cls in (Z.CosTransform, Z.SinTransform):
    TRANSFORMS[_cls] = partial(_squash, _cls)
if hasattr(Z, "AdditiveTransform"):  # zuko has it from 1.5 on
    TRANSFORMS[Z.AdditiveTransform] = lambda m, d, t: Z.AdditiveTransform(m.tensor(d, dtype=t))

ELEMENTWISE = [
    core.AdditiveTransform,
    core.CubicBSplineTransform,
    core.InverseTransform,
    core.RobustSpline,
    Z.CircularShiftTransform,
    Z.IdentityTransform,
    Z.MonotonicAffineTransform,
]

#: What no bound is known for, and is made more rarely.
FREE = {
    InPlaceRQSTransform,
    core.AffineTransform,
    core.ReparametrizedAffineTransform,
    core.Univariate,
    torch_transforms.SigmoidTransform,
    torch_transforms.TanhTransform,
    Z.BernsteinTransform,
    Z.BoundedBernsteinTransform,
    Z.CosTransform,
    Z.GaussianizationTransform,
    Z.SinTransform,
    Z.MonotonicRQSTransform,
    Z.MonotonicTransform,
    Z.SOSPolynomialTransform,
    Z.SoftclipTransform,
    Z.UnconstrainedMonotonicTransform,
}


def transform(m: Maker, d: int, dtype: torch.dtype) -> Any:
    r"""Returns a random transform of vectors.

    Arguments:
        m: What chooses.
        d: The number of features.
        dtype: The dtype of its constants.
    """
    if m.wanted in TRANSFORMS and (m.depth == 0 or m.flip(0.3)):
        cls = m.wanted
    else:
        names = list(TRANSFORMS) if m.flip(0.05) else [c for c in TRANSFORMS if c not in FREE]
        deep = {torch_transforms.ComposeTransform, Z.ComposedTransform}
        cls = m.pick([c for c in names if m.depth < 2 or c not in deep])
    m.depth += 1
    made = TRANSFORMS[cls](m, d, dtype)
    m.depth -= 1
    return m.note(made)


def univariate(m: Maker) -> tuple[Callable[..., Any], list[tuple[int, ...]]]:
    r"""Returns what makes a univariate transform of the outputs of a network, and their shapes."""
    bins = m.integer(2, 4)
    shapes = core.RobustSpline.shapes(bins)
    robust = partial(core.RobustSpline, **spline_options(m))
    match m.integer(0, 19):
        case 0:
            return Z.MonotonicAffineTransform, [(), ()]
        case 1:
            return partial(core.CubicBSplineTransform, shift_bound=m.positive()), [(4,), (6,), ()]
        case 2:
            return partial(core.AdditiveTransform, shift_bound=m.positive()), [()]
        case 3:
            other = partial(core.RobustSpline, **spline_options(m))
            return partial(_both, robust, other), shapes
        case 4:
            return partial(_turned, robust), shapes
        case 5:
            return core.AdditiveTransform, [()]
        case 6:
            return partial(_boxed, m.positive()), shapes
        case _:
            return robust, shapes


def _both(first: Any, second: Any, *phi: torch.Tensor) -> Any:
    return Z.ComposedTransform(first(*phi), second(*phi).inv)


def _turned(robust: Any, *phi: torch.Tensor) -> Any:
    return robust(*phi).inv


def _boxed(bound: float, w: torch.Tensor, *phi: torch.Tensor) -> Any:
    # The box is as large as the network says.
    return core.RobustSpline(w, *phi, bound=bound * (1 + float(w.abs().max().nan_to_num())))


class Mine:
    r"""A map of the user's own for couplings of images."""

    parameters = 1

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def transform(self, phi: torch.Tensor) -> Any:
        return core.AdditiveTransform(phi.squeeze(2), shift_bound=self.bound)


@envelope_rule(Mine)
def _envelope_of_mine(family: Mine, sampling: bool) -> Envelope:
    return Envelope(1.0, family.bound, displacement=family.bound)


def family(m: Maker) -> Any:
    r"""Returns a random elementwise map of a coupling of images."""
    kind = m.wanted if m.wanted in FAMILIES else None
    match m.integer(0, 19):
        case 0:
            kind = kind or Affine
        case 1:
            kind = kind or ReparametrizedAffine
        case 2 | 3:
            kind = kind or CubicBSpline
        case 4 | 5:
            kind = kind or Mine
        case _:
            kind = kind or Robust
    return m.note(FAMILIES[kind](m))


FAMILIES: dict[Any, Callable[[Maker], Any]] = {
    Affine: lambda m: Affine(),
    CubicBSpline: lambda m: CubicBSpline(bound=m.positive(), shift_bound=_bound(m)),
    Mine: lambda m: Mine(m.positive()),
    ReparametrizedAffine: lambda m: ReparametrizedAffine(),
    Robust: lambda m: Robust(bins=m.integer(2, 4), **spline_options(m)),
}


def case_of_transforms(m: Maker, dtype: torch.dtype) -> Case:
    r"""Returns a transform with constant parameters, and with random ones in each row."""
    d = m.integer(1, 5)
    f = transform(m, d, dtype)
    return Case(f, lambda noise, context: f.inv(noise(ROWS, d)))
