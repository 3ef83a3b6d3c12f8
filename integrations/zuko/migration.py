r"""How zuko's flows are made robust, for :func:`flowguard.migrate`."""

__all__: list[str] = []

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

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
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform
from zuko.utils import unpack

from flowguard.migration import Site, Surgeon, surgeon
from flowguard.migration.exchange import successor
from flowguard.migration.imitate import RescaledSpline
from flowguard.spline.invert import unconstrain
from flowguard.transforms import RobustSpline

LAYERS = (ElementWiseTransform, GeneralCouplingTransform, MaskedAutoregressiveTransform)
UNIVARIATES = (MonotonicAffineTransform, MonotonicRQSTransform)


class _Witness(Transform):
    r"""A transform that tells what it was asked."""

    def __init__(self, base: Any, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.base = base
        self.tell = tell
        self.domain, self.codomain = base.domain, base.codomain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.tell(x)
        return self.base.call_and_ladj(x)


class CarriedSpline(nn.Module):
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
        # zuko's soft clip makes NaN of what is infinite.
        spline = self.univariate(*(p.clamp(-1e30, 1e30) for p in phi))
        widths, heights, derivatives = unconstrain(
            spline.horizontal.diff() / (2 * self.bound),
            spline.vertical.diff() / (2 * self.bound),
            spline.derivatives[..., 1:-1],
            slope=self.slope,
        )
        return RobustSpline(widths, heights, derivatives, bound=self.bound, slope=self.slope)


class _Layer(Site):
    r"""A layer of zuko, whose hyper-network computes the parameters of a univariate transform."""

    def __init__(self, operation: Surgeon, name: str, layer: Any) -> None:
        f = _univariate(layer)
        super().__init__(operation, name, layer, f"{type(layer).__name__}[{type(f).__name__}]")
        self.univariate = layer.univariate
        self.shapes = list(layer.shapes)
        self.phi: Tensor
        self.hidden: Tensor
        self.x: Tensor

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
    def inputs(self) -> Tensor:
        return self.x

    def old(self, rows: Tensor | slice) -> Transform:
        return self.univariate(*unpack(self.phi[rows], self.shapes))

    def carry(self, slope: float | None) -> nn.Module | None:
        f = _univariate(self.layer)
        if not isinstance(f, MonotonicRQSTransform):
            return None
        bound = f.horizontal[..., -1].item()
        return successor(self.layer, univariate=CarriedSpline(self.univariate, bound, slope))

    def build(self, spline: RescaledSpline) -> nn.Module:
        old = self.layer
        total = sum(prod(shape) for shape in spline.shapes)
        last = _last(old.hyper[-1], old.total, total)
        hyper: Any = successor(old.hyper, out_features=last.out_features)
        hyper[-1] = last
        return successor(old, univariate=spline, shapes=spline.shapes, total=total, hyper=hyper)

    def learned(self) -> list[nn.Parameter]:
        return list(self.robust.hyper[-1].parameters())

    def new(self, rows: Tensor | slice) -> Transform:
        layer = self.robust
        phi = layer.hyper[-1](self.hidden[rows])
        phi = phi.unflatten(-1, (self.x.shape[-1], layer.total))
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


def _replaceable(layer: nn.Module) -> bool:
    # Subclasses may use their hyper-network in ways of their own; and without a hyper-network
    # there is no condition that could do harm.
    return (
        type(layer) in LAYERS
        and hasattr(layer, "hyper")
        and isinstance(_univariate(layer), UNIVARIATES)
    )


class _Zuko(Surgeon):
    r"""What it takes to operate on zuko's lazy distributions."""

    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        return self.model(context).log_prob(x)

    def sites(self) -> list[Site]:
        return [_Layer(self, n, m) for n, m in self.model.named_modules() if _replaceable(m)]

    def kept(self) -> dict[str, str]:
        containers = (zuko.lazy.LazyComposedTransform, zuko.lazy.LazyInverse)
        return {
            f"{name} ({type(m).__name__})": ""
            for name, m in self.model.named_modules()
            if isinstance(m, zuko.lazy.LazyTransform)
            and not isinstance(m, containers)
            and not _replaceable(m)
        }


@surgeon.register
def _(model: zuko.lazy.LazyDistribution) -> Surgeon:
    return _Zuko(model)
