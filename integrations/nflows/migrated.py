r"""What nflows' layers become when a flow is made robust: the same networks under another map.

A head turns what the network of the old layer returns into robust maps. The old weights fit into
the new layers by name: a state dict of the flow before its migration can be loaded after it.
"""

__all__ = [
    "AffineHead",
    "CarriedHead",
    "CouplingFormula",
    "Head",
    "MaskedFormula",
    "MigratedAutoregressiveTransform",
    "MigratedCouplingTransform",
    "NamedActivation",
    "ShiftHead",
]

import abc
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from flowguard.bounds import Pointwise, Step, rule, within
from flowguard.migration.exchange import successor
from flowguard.migration.imitate import Rescaled
from flowguard.migration.inscribe import InscribedAffine, InscribedShift
from flowguard.migration.knots import Knots
from flowguard.migration.rules import MAKERS, BoundOfMap, made_otherwise
from flowguard.transforms import RobustSpline, Univariate

from .autoregressive import MaskedRobustSplineAutoregressiveTransform
from .coupling import RobustSplineCouplingTransform
from .spline import ALL, PartialHead, apply_map

LARGEST = 1e20  # what scales and logits are cut at, so that infinite ones are finite

#: An attribute of glasflow's layers that the formulas hold, as far as it is no lambda of its own:
#: those cannot be pickled.
ACTIVATION = "scale_activation"

#: What glasflow's autoregressive transform has for one, if it is not told.
DEFAULT_LAMBDA = "MaskedAffineAutoregressiveTransform.__init__.<locals>.<lambda>"

Activation = Callable[[Tensor], Tensor]


#: Where glasflow keeps those that have names.
ACTIVATIONS = "glasflow.transforms.utils"


class NamedActivation:
    r"""Creates an activation of glasflow's that is saved by its name, as it is a lambda there.

    Arguments:
        name: The name, as glasflow's couplings take it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.function: Activation = import_module(ACTIVATIONS).get_scale_activation(name)

    @classmethod
    def of(cls, activation: Activation | None) -> Activation | None:
        r"""Returns the activation by its name if it has one, else as it is.

        Arguments:
            activation: The activation of a layer.
        """
        if getattr(activation, "__module__", None) != ACTIVATIONS:
            return activation
        known = vars(import_module(ACTIVATIONS))["SCALE_ACTIVATIONS"].items()
        names = [name for name, function in known if function is activation]
        # The others are made anew for each scale, which they hold.
        held = getattr(activation, "__closure__", None) or ()
        names += [f"log{cell.cell_contents!r}" for cell in held]
        return cls(names[0]) if names else activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.name,)


class CouplingFormula:
    r"""Creates a function from the outputs of a network to the scale and shift of a coupling, by
    the formula of the host's own class.

    Arguments:
        old: The host's layer.
    """

    def __init__(self, old: Any) -> None:
        self.source = type(old)
        self.num_transform_features = len(old.transform_features)
        self.activation: Activation | None = getattr(old, ACTIVATION, None)
        if self.activation is getattr(self.source, "DEFAULT_SCALE_ACTIVATION", None):
            self.activation = None
        self.activation = NamedActivation.of(self.activation)

    @property
    def scale_activation(self) -> Activation:
        r"""The activation of the scale, of which the formula of glasflow's class asks."""
        default: Activation = self.source.DEFAULT_SCALE_ACTIVATION
        return default if self.activation is None else self.activation

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.source._scale_and_shift(self, raw)
        return scale.movedim(1, -1), shift.movedim(1, -1)


class MaskedFormula:
    r"""Creates a function from the outputs of a network to the scale and shift of an
    autoregressive transform, by the formula of nflows or of glasflow.

    Arguments:
        old: The host's layer.
    """

    def __init__(self, old: Any) -> None:
        self.least: float = old._epsilon
        self.activation: Activation | None = getattr(old, ACTIVATION, None)
        if getattr(self.activation, "__qualname__", "") == DEFAULT_LAMBDA:
            self.activation = None
        self.activation = NamedActivation.of(self.activation)

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        unconstrained, shift = raw.unflatten(1, (-1, 2)).unbind(-1)
        if self.activation is None:
            return F.softplus(unconstrained) + self.least, shift
        return self.activation(unconstrained), shift


class Head(PartialHead, abc.ABC):
    r"""The abstract way from the outputs of a network to robust maps."""

    outputs: int  # the numbers that the network returns for each feature

    @abc.abstractmethod
    def univariate(self, raw: Tensor, of: Tensor | slice = ALL) -> Univariate:
        r"""Returns the maps, for inputs whose last dimension are the features.

        Arguments:
            raw: The outputs of the network, with shape :math:`(N, C n)` or
                :math:`(N, C n, H, W)`, in no less than single precision.
            of: The features that are meant.
        """

    @abc.abstractmethod
    def example(self) -> Univariate:
        r"""Returns one of the maps, to tell what bounds them all."""

    def forward(
        self, x: Tensor, raw: Tensor, inverse: bool = False, of: Tensor | slice = ALL
    ) -> tuple[Tensor, Tensor]:
        r"""Transforms `x`, with shape :math:`(N, C)` or :math:`(N, C, H, W)`."""
        f = self.univariate(raw.to(torch.promote_types(raw.dtype, torch.float32)), of)
        y, ladj = apply_map(f, x.movedim(1, -1), inverse)
        return y.movedim(-1, 1).to(x.dtype), ladj


class AffineHead(Head):
    r"""Creates the head that follows affine maps.

    Arguments:
        formula: From outputs to scale and shift.
        map: The splines that follow them.
    """

    def __init__(self, formula: CouplingFormula | MaskedFormula, map: InscribedAffine) -> None:
        super().__init__()
        self.formula = formula
        self.map = map
        self.outputs = 2

    def univariate(self, raw: Tensor, of: Tensor | slice = ALL) -> Rescaled:
        r"""Returns the robust splines that follow the affine maps that the outputs ask for."""
        scale, shift = self.formula(raw)
        return self.map(scale.clamp(max=LARGEST), shift, of)

    def example(self) -> Rescaled:
        r"""Returns one of the maps, to tell what bounds them all."""
        return self.map(torch.ones_like(self.map.loc_in), torch.zeros_like(self.map.loc_in))


class ShiftHead(Head):
    r"""Creates the head that follows shifts.

    Arguments:
        map: The bounded shifts that follow them.
    """

    def __init__(self, map: InscribedShift) -> None:
        super().__init__()
        self.map = map
        self.outputs = 1

    def univariate(self, raw: Tensor, of: Tensor | slice = ALL) -> Rescaled:
        r"""Returns the bounded shifts that follow those that the outputs ask for."""
        return self.map(raw.movedim(1, -1), of)

    def example(self) -> Rescaled:
        r"""Returns one of the maps, to tell what bounds them all."""
        return self.map(torch.zeros_like(self.map.loc))


class CarriedHead(Head):
    r"""Creates the head that takes over the knots of the host's rational-quadratic splines.

    Arguments:
        bins: The number of bins.
        knots: How the host makes knots of what its network says.
    """

    def __init__(self, bins: int, knots: Knots) -> None:
        super().__init__()
        self.knots = knots
        self.outputs = 3 * bins - 1

    def extra_repr(self) -> str:
        return f"bins={(self.outputs + 1) // 3}, bound={self.knots.bound:g}"

    def logits(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns the host's logits of widths, heights and slopes, each :math:`(N, *, C, n)`."""
        phi = raw.unflatten(1, (-1, self.outputs)).movedim((1, 2), (-2, -1))
        return self.knots.logits(phi)

    def univariate(self, raw: Tensor, of: Tensor | slice = ALL) -> RobustSpline:
        r"""Returns the robust splines through the host's knots."""
        return self.knots.robust(self.logits(raw))

    def example(self) -> RobustSpline:
        r"""Returns one of the maps, to tell what bounds them all."""
        zeros = torch.zeros(1, 1)
        return RobustSpline(zeros, zeros, zeros, bound=self.knots.bound, slope=self.knots.slope)


class MigratedCouplingTransform(RobustSplineCouplingTransform):
    r"""Creates the robust coupling that takes the place of one of the host's; see
    :meth:`in_place_of`."""

    @classmethod
    def in_place_of(cls, old: Any, head: Head) -> Self:
        r"""Returns a coupling with the masks, the network and the unconditional part of another.

        Arguments:
            old: The host's layer.
            head: What turns the outputs of the network into robust maps.
        """
        return successor(old, cls, without=(ACTIVATION,), head=head.train(old.training))

    def _transform_dim_multiplier(self) -> int:
        return self.head.outputs  # type: ignore[return-value]


class MigratedAutoregressiveTransform(MaskedRobustSplineAutoregressiveTransform):
    r"""Creates the robust autoregressive transform that takes the place of one of the host's; see
    :meth:`in_place_of`."""

    @classmethod
    def in_place_of(cls, old: Any, features: int, head: Head) -> Self:
        r"""Returns an autoregressive transform with the network of another.

        Arguments:
            old: The host's layer.
            features: The number of features.
            head: What turns the outputs of the network into robust maps.
        """
        head = head.train(old.training)
        return successor(old, cls, without=(ACTIVATION,), head=head, features=features)

    def _output_dim_multiplier(self) -> int:
        return self.head.outputs  # type: ignore[return-value]


@rule(MigratedCouplingTransform)
def _coupling(layer: Any, sampling: bool) -> Iterator[Step]:
    mask = torch.zeros(layer.features, dtype=torch.bool)
    mask[layer.transform_features.cpu()] = True
    if layer.unconditional_transform is not None:
        part = layer.unconditional_transform
        for step in within("unconditional_transform", part, sampling):
            yield replace(step, mask=~mask) if isinstance(step, Pointwise) else step
    yield from _steps(layer.head, mask, sampling)


@rule(MigratedAutoregressiveTransform)
def _autoregressive(layer: Any, sampling: bool) -> Iterator[Step]:
    yield from _steps(layer.head, torch.ones(layer.features, dtype=torch.bool), sampling)


def _steps(head: Head, mask: Tensor, sampling: bool) -> Iterator[Step]:
    strange = made_otherwise(head, AffineHead, CarriedHead, ShiftHead)
    inner = head.knots if isinstance(head, CarriedHead) else getattr(head, "map", None)
    strange = strange or made_otherwise(inner, *MAKERS, Knots)
    bound = BoundOfMap(head.example(), sampling, strange)
    yield from bound.steps(mask, "head", f"{type(head).__name__}[{bound.base}]")
