r"""What is known of the core's univariate maps, whatever their parameters are."""

__all__ = ["conditional", "undetermined"]

import math
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor

from flowguard import transforms
from flowguard.bounds.regions import Envelope
from flowguard.bounds.rules import departure, envelope, envelope_rule, rule
from flowguard.bounds.steps import Pointwise, Refused, Step

FREE = "its shift is free; give a shift_bound"


def conditional(
    g: Envelope, name: str = "", kind: str = "", mask: Tensor | None = None
) -> Pointwise | Refused:
    r"""The step of a univariate map with conditional parameters, refused where it has no bound.

    Arguments:
        g: What is known of the map, as :func:`envelope` tells it.
        name: The name of the layer within the model.
        kind: The class of the layer.
        mask: Which features are transformed, with shape :math:`(C)`. :py:`None` means all.

    Example:
        >>> spline = flowguard.RobustSpline(*torch.zeros(3, 1), torch.zeros(()))
        >>> flowguard.bounds.conditional(flowguard.bounds.envelope(spline)).depends
        'within a box of 5 and a shift of 5'
        >>> affine = flowguard.transforms.AffineTransform(torch.zeros(()), torch.zeros(()))
        >>> flowguard.bounds.conditional(flowguard.bounds.envelope(affine)).reason
        'its shift is free, and its slope may fall to 0.0001'
    """
    if g.reason:
        gain = g.gain if math.isfinite(g.gain) else None
        return Refused(name=name, kind=kind, reason=g.reason, gain=gain)
    return Pointwise(name=name, kind=kind, depends=g.depends, envelope=g, mask=mask)


#: The maps whose bounds are options, and none of their parameters.
MAPS = (
    transforms.AdditiveTransform,
    transforms.AffineTransform,
    transforms.CubicBSplineTransform,
    transforms.ReparametrizedAffineTransform,
    transforms.RobustSpline,
)


def undetermined(constructor: Callable[..., Any], known: tuple[type, ...] = ()) -> str:
    r"""Returns why one map of a constructor does not tell what bounds all of them, in words; empty
    if it does: if it is a known class, with plain options, or one that states its own bound.

    Arguments:
        constructor: From parameters to a map, as a layer calls it.
        known: Classes of modules that construct maps which are bounded by their options.

    Example:
        >>> from functools import partial
        >>> undetermined(partial(flowguard.RobustSpline, bound=3.0))
        ''
        >>> undetermined(lambda w, h, d, t: flowguard.RobustSpline(w, h, d, t, bound=t.max()))
        'the bound of <lambda> may depend on its parameters; give a class, or a partial of one'
    """
    while type(constructor) is partial and not constructor.args:
        if not all(v is None or isinstance(v, Real) for v in constructor.keywords.values()):
            break
        constructor = constructor.func
    if isinstance(constructor, type):
        # A class that overrides nothing of its base is that; what else it does, its map tells.
        alike = any(issubclass(constructor, c) and _made_as(constructor, c) for c in MAPS)
        if alike or "inverse_bound" in vars(constructor):
            return ""
    for cls in known:
        if isinstance(constructor, cls):
            return departure(constructor, cls)
    name = getattr(constructor, "__name__", type(constructor).__name__)
    return f"the bound of {name} may depend on its parameters; give a class, or a partial of one"


def _made_as(derived: type, base: type) -> bool:
    return all(getattr(derived, n) is getattr(base, n) for n in ("__init__", "__new__"))


@envelope_rule(transforms.RobustSpline, transforms.CubicBSplineTransform)
def _spline(
    f: transforms.RobustSpline | transforms.CubicBSplineTransform, sampling: bool
) -> Envelope:
    shift = 0.0 if f.shift is None else f.shift_bound
    if shift is None:
        return Envelope(1.0, math.inf, reason=FREE)
    # Sampling subtracts the shift before the box, where the forward direction adds it after.
    return Envelope(
        gain=1.0,
        offset=shift,
        floor=max(f.bound - shift, 0.0) if sampling else f.bound,
        displacement=2 * f.bound + shift,
        inside=f.bound if sampling else f.bound + shift,
        edge=f.bound + shift if sampling else f.bound,
        depends=f"within a box of {f.bound:g} and a shift of {shift:g}",
    )


@envelope_rule(transforms.AdditiveTransform)
def _additive(f: transforms.AdditiveTransform, sampling: bool) -> Envelope:
    if f.shift_bound is None:
        return Envelope(1.0, math.inf, reason=FREE)
    shift = f.shift_bound
    return Envelope(
        1.0,
        shift,
        displacement=shift,
        inside=0.0,
        edge=0.0,
        depends=f"within a shift of {shift:g}",
    )


@envelope_rule(transforms.AffineTransform)
def _affine(f: transforms.AffineTransform, sampling: bool) -> Envelope:
    return Envelope(
        1 / f.eps if sampling else 1 + f.eps,
        math.inf,
        reason=f"its shift is free, and its slope may fall to {f.eps:g}",
    )


@envelope_rule(transforms.ReparametrizedAffineTransform)
def _reparametrized(f: transforms.ReparametrizedAffineTransform, sampling: bool) -> Envelope:
    gain = 1 + f.eps if sampling else 1 / f.eps
    return Envelope(gain, math.inf, reason="its shift is free")


@rule(
    transforms.AdditiveTransform,
    transforms.AffineTransform,
    transforms.CubicBSplineTransform,
    transforms.ReparametrizedAffineTransform,
    transforms.RobustSpline,
    transforms.Univariate,
)
def _univariate(f: transforms.Univariate, sampling: bool) -> Iterator[Step]:
    yield conditional(envelope(f, sampling))
