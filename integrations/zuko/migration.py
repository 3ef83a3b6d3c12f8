r"""How zuko's flows are made robust, for :func:`flowguard.migrate`."""

__all__: list[str] = []

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
import torch.nn as nn
import zuko
from torch import Tensor
from torch.distributions import Transform
from zuko.flows import (
    ElementWiseTransform,
    GeneralCouplingTransform,
    MaskedAutoregressiveTransform,
)
from zuko.nn import Linear, MaskedLinear
from zuko.transforms import MonotonicRQSTransform
from zuko.utils import unpack

from flowguard.migration import Site, Surgeon, holder, surgeon
from flowguard.migration.exchange import successor
from flowguard.migration.imitate import Rescaled, RescaledSpline
from flowguard.migration.inscribe import ALL, InscribedAffine, InscribedShift
from flowguard.migration.moments import BoundedMoments, MomentsSite
from flowguard.spline.invert import unconstrain
from flowguard.transforms import (
    AffineTransform,
    ReparametrizedAffineTransform,
    RobustSpline,
    Univariate,
)

from .autoregressive import GroupedAutoregressive, OfFeatures
from .bases import BoundedNormal, depends, normal_of
from .standin import InPlaceRQSTransform

T = zuko.transforms

LAYERS = (ElementWiseTransform, GeneralCouplingTransform, MaskedAutoregressiveTransform)
#: zuko has its additive transform from 1.5 on.
ADDITIVE: tuple[type, ...] = tuple(
    getattr(T, name) for name in ("AdditiveTransform",) if hasattr(T, name)
)
#: The baselines of the core, which take the place of zuko's affine map in a layer.
BASELINES = (AffineTransform, ReparametrizedAffineTransform)
INSCRIBED = (T.MonotonicAffineTransform, *ADDITIVE, *BASELINES)
UNIVARIATES = (*INSCRIBED, T.MonotonicRQSTransform, InPlaceRQSTransform)
CONTAINERS = (zuko.lazy.LazyComposedTransform, zuko.lazy.LazyInverse)
LARGEST = 1e20  # what parameters are cut at: zuko's soft clips make NaN of what is infinite


class _Witness(Transform):
    r"""A transform that tells what it was asked, on the side of its inputs."""

    bijective = True

    def __init__(self, base: Any, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.base = base
        self.tell = tell
        self.domain, self.codomain = base.domain, base.codomain

    def _call(self, x: Tensor) -> Tensor:
        self.tell(x)
        return self.base(x)

    def _inverse(self, y: Tensor) -> Tensor:
        x = self.base.inv(y)
        self.tell(x)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self.tell(x)
        return self.base.log_abs_det_jacobian(x, y)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.tell(x)
        return self.base.call_and_ladj(x)


class InscribedUnivariate(OfFeatures):
    r"""Creates a constructor of robust maps that follow affine ones.

    Arguments:
        univariate: The constructor of the affine maps.
        map: What makes the robust ones of slope and value at zero, or of a shift.
    """

    def __init__(
        self, univariate: Callable[..., Any], map: InscribedAffine | InscribedShift
    ) -> None:
        super().__init__()
        self.univariate = univariate
        self.map = map

    def forward(self, *phi: Tensor, of: Tensor | slice = ALL) -> Rescaled:
        r"""Returns the map with these parameters.

        Arguments:
            phi: The parameters, as zuko takes them.
            of: The features that are meant, if they are not all.
        """
        scale, shift = line(self.univariate(*map(_cut, phi)))
        if isinstance(self.map, InscribedShift):
            return self.map(shift, of)
        return self.map(scale, shift, of)

    def of(self, features: Tensor) -> Callable[..., Rescaled]:
        return partial(self, of=features)


def _cut(p: Tensor) -> Tensor:
    r"""Cuts parameters, in half precision at what their clips may double."""
    far = min(LARGEST, torch.finfo(p.dtype).max / 4)
    return p.clamp(-far, far)


def line(f: Any) -> tuple[Tensor, Tensor]:
    r"""Returns slope and value at zero of one of zuko's affine maps, or of those of the core.

    Arguments:
        f: The map.
    """
    if isinstance(f, BASELINES):
        value, ladj = f.call_and_ladj(torch.zeros_like(f.shift))
        return ladj.exp(), value
    return getattr(f, "scale", torch.ones_like(f.shift)), f.shift


class CarriedSpline(OfFeatures):
    r"""Creates a constructor of robust splines with the knots of zuko's splines.

    Arguments:
        univariate: The constructor of zuko's splines.
        bound: The bound of their box.
        slope: The least slope of the robust splines.
    """

    def __init__(
        self,
        univariate: Callable[..., MonotonicRQSTransform],
        bound: float,
        slope: float | None,
    ) -> None:
        super().__init__()
        self.univariate = univariate
        self.bound: float = bound
        self.slope = slope

    def forward(self, *phi: Tensor) -> RobustSpline:
        r"""Returns the spline with these parameters.

        Arguments:
            phi: The unconstrained widths, heights and derivatives, as zuko takes them.
        """
        spline = self.univariate(*map(_cut, phi))
        widths, heights, derivatives = unconstrain(
            spline.horizontal.diff() / (2 * self.bound),
            spline.vertical.diff() / (2 * self.bound),
            spline.derivatives[..., 1:-1],
            slope=self.slope,
        )
        return RobustSpline(widths, heights, derivatives, bound=self.bound, slope=self.slope)

    def of(self, features: Tensor) -> Self:
        return self  # which makes the same of each


class _Layer(Site):
    r"""A layer of zuko, whose hyper-network computes the parameters of a univariate transform."""

    def __init__(self, operation: Surgeon, name: str, layer: Any) -> None:
        f = _univariate(layer)
        kind = f"{type(layer).__name__}[{type(f).__name__}]"
        super().__init__(operation, name, layer, kind, isinstance(f, ADDITIVE))
        self.univariate = layer.univariate
        self.shapes = list(layer.shapes)
        self.rebuilt = False
        self.phi: Tensor
        self.hidden: Tensor
        self.x: Tensor | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        def univariate(*phi: Tensor) -> Transform:
            self.phi = torch.cat(
                [
                    p.flatten(p.dim() - len(s)) if s else p[..., None]
                    for p, s in zip(phi, self.shapes, strict=True)
                ],
                dim=-1,
            )
            return _Witness(self.univariate(*phi), tell)

        def tell(x: Tensor) -> None:
            self.x = x

        def hear(module: nn.Module, inputs: tuple[Tensor]) -> None:
            (self.hidden,) = inputs

        self.layer.univariate = univariate
        hook = self.layer.hyper[-1].register_forward_pre_hook(hear)
        try:
            yield
        finally:
            hook.remove()
            self.layer.univariate = self.univariate

    @property
    def heard(self) -> bool:
        return self.x is not None

    @property
    def inputs(self) -> Tensor:
        assert self.x is not None  # asked after it was heard
        return self.x

    def old(self, rows: Tensor | slice) -> Transform:
        return self.univariate(*unpack(self.phi[rows], self.shapes))

    def carry(self, slope: float | None) -> nn.Module | None:
        f = _univariate(self.layer)
        if not isinstance(f, MonotonicRQSTransform):
            return None
        bound = f.horizontal[..., -1].item()
        return self._with(CarriedSpline(self.univariate, bound, slope))

    def build(self, spline: RescaledSpline) -> nn.Module:
        scale, shift = line(self.old(slice(None)))
        map = (
            InscribedShift(spline, shift)
            if self.additive
            else InscribedAffine.around(spline, self.inputs, scale, shift)
        )
        univariate = InscribedUnivariate(self.univariate, map).train(self.layer.training)
        return self._with(univariate)

    def _with(self, univariate: OfFeatures) -> nn.Module:
        masked = type(self.layer) is MaskedAutoregressiveTransform
        kind = GroupedAutoregressive if masked else None
        return successor(self.layer, kind, univariate=univariate)

    def rebuild(self, spline: RescaledSpline) -> nn.Module:
        self.rebuilt = True
        old = self.layer
        total = sum(math.prod(shape) for shape in spline.shapes)
        last = _last(old.hyper[-1], old.total, total)
        hyper: Any = successor(old.hyper, out_features=last.out_features)
        hyper[-1] = last
        return successor(old, univariate=spline, shapes=spline.shapes, total=total, hyper=hyper)

    def learned(self) -> list[nn.Parameter]:
        return list(self.robust.hyper[-1].parameters()) if self.rebuilt else []

    def new(self, rows: Tensor | slice) -> Transform:
        layer = self.robust
        if not self.rebuilt:
            return layer.univariate(*unpack(self.phi[rows], self.shapes))
        phi = layer.hyper[-1](self.hidden[rows])
        phi = phi.unflatten(-1, (self.inputs.shape[-1], layer.total))
        return layer.univariate(*unpack(phi, layer.shapes))


def _last(old: Any, before: int, after: int) -> Any:
    r"""Returns a last layer of zeros with `after` numbers for each feature instead of `before`."""
    features = old.out_features // before
    new: Any
    if isinstance(old, MaskedLinear):
        new = MaskedLinear(old.mask[::before].repeat_interleave(after, dim=0))
    else:
        new = Linear(old.in_features, features * after)
    new = new.to(old.weight)
    for p in new.parameters():
        nn.init.zeros_(p)
    return new


def _univariate(layer: Any) -> Transform:
    return layer.univariate(*(torch.zeros(shape) for shape in layer.shapes))


def _why_not(layer: Any) -> str:
    r"""Says why a transform is kept; empty if it is one to replace."""
    if type(layer).__module__.partition(".")[0] == "flowguard":
        return "robust already"
    if isinstance(layer, zuko.lazy.UnconditionalTransform):
        return _constant(layer())
    if type(layer) not in LAYERS:
        if isinstance(layer, zuko.flows.FFJTransform):
            return "it integrates a differential equation, and has no univariate map to replace"
        if known := [cls.__name__ for cls in type(layer).__mro__ if cls in LAYERS]:
            # It may use its hyper-network in ways of its own.
            return f"a subclass of {known[0]}, which may work in its own way"
        return "flowguard does not know it"
    if not hasattr(layer, "hyper"):
        return "no condition reaches it"
    f = _univariate(layer)
    if type(f) in UNIVARIATES:
        return ""
    if isinstance(f, Univariate):
        return "robust already" if math.isfinite(f.inverse_bound(0.0)) else FREE
    if parts := getattr(f, "transforms", ()):
        if any(isinstance(part, T.CircularShiftTransform) for part in parts):
            return "its spline is one of a circle, and no condition leads out of that"
        f = parts[-1] if isinstance(parts[-1], T.MonotonicTransform) else parts[0]
    return (
        f"its univariate map, a {type(f).__name__}, is neither affine nor a rational-quadratic"
        " spline, so that no robust one follows it exactly"
    )


FREE = "its map is one of flowguard's whose options leave it free: give a shift_bound"


def _constant(f: Transform) -> str:
    poles = [part.bound for part in _parts(f) if isinstance(part, T.SoftclipTransform)]
    if not poles:
        return "no condition reaches it"
    return (
        f"no condition reaches it, but its inverse has poles at -{poles[0]:g} and {poles[0]:g}: what"
        " a robust layer sends near them explodes there, and no certificate holds"
    )


def _parts(f: Any) -> list[Transform]:
    return [p for t in getattr(f, "transforms", ()) for p in _parts(t)] or [f]


class _Base(MomentsSite):
    r"""A base whose distribution depends on the context."""

    foreign = ""  # what else than a normal distribution was heard

    @contextmanager
    def listen(self) -> Iterator[None]:
        def hear(module: nn.Module, inputs: Any, output: Any) -> None:
            normal = normal_of(output)
            if normal is None:
                self.foreign = type(getattr(output, "base_dist", output)).__name__
                self.asked = [(torch.zeros(1), torch.zeros(1))]  # heard, and of no use
            else:
                self.tell(normal.loc, normal.scale.log())

        hook = self.layer.register_forward_hook(hear)
        try:
            yield
        finally:
            hook.remove()

    def refusal(self) -> str:
        return self.foreign and _foreign(self.foreign)

    def bounded(self, bounds: BoundedMoments) -> nn.Module:
        return BoundedNormal(self.layer, bounds).train(self.layer.training)


def _foreign(kind: str) -> str:
    return (
        f"its distribution is a {kind}, and of conditional ones only independent normal features"
        " are bounded"
    )


def _bases(model: nn.Module) -> Iterator[tuple[str, Any]]:
    r"""Goes over the conditional bases of all flows in a model that are not bounded yet."""
    for name, m in model.named_modules():
        base = m.base if isinstance(m, zuko.lazy.Flow) else None
        # Where the base is a flow, the base of that is looked at.
        if base is None or isinstance(base, BoundedNormal | zuko.lazy.Flow):
            continue
        if depends(base):
            yield f"{name}.base" if name else "base", base


class _Zuko(Surgeon):
    r"""What it takes to operate on zuko's lazy distributions, and on what holds some."""

    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        model: Any = self.model
        if isinstance(model, zuko.lazy.LazyDistribution):
            return model(context).log_prob(x)
        if hasattr(model, "log_prob"):
            return model.log_prob(x) if context is None else model.log_prob(x, context)
        return self.held_log_prob(x, context)

    def sites(self) -> list[Site]:
        layers = [
            _Layer(self, name, m)
            for name, m in self.model.named_modules()
            if type(m) in LAYERS and not _why_not(m)
        ]
        bases = [
            _Base(self, name, base)
            for name, base in _bases(self.model)
            if not isinstance(base, zuko.flows.GMM)
        ]
        return [*layers, *bases]

    def kept(self) -> dict[str, str]:
        kept = {
            f"{name} ({type(m).__name__})": why
            for name, m in self.model.named_modules()
            if isinstance(m, zuko.lazy.LazyTransform)
            and not isinstance(m, CONTAINERS)
            and (why := _why_not(m))
        }
        return kept | {
            f"{name} ({type(base).__name__})": _foreign("Mixture")
            for name, base in _bases(self.model)
            if isinstance(base, zuko.flows.GMM)
        }


surgeon.register(zuko.lazy.LazyDistribution, _Zuko)
holder(zuko.lazy.LazyDistribution, zuko.lazy.LazyTransform)(_Zuko)
