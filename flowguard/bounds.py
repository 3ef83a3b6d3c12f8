r"""How certificates learn what a layer does to noise: one rule for each class.

A rule takes a layer and returns the :class:`Step`\ s that its sampling direction makes. Rules are
found by class; a subclass that overrides anything of the class whose rule it would inherit is not
covered by it. A layer without a rule is *refused*: named in the certificate, never guessed.

The rules of another library's layers live in ``flowguard/integrations/_<library>_bounds.py`` and
are imported when the first of its layers is met.
"""

__all__ = [
    "Envelope",
    "Flatten",
    "Join",
    "Linear",
    "Noise",
    "Permute",
    "Refused",
    "Remark",
    "Scale",
    "Step",
    "Univariate",
    "Unsqueeze",
    "constant",
    "envelope",
    "envelope_rule",
    "load_rules",
    "rule",
    "steps",
    "within",
]

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowguard._regions import Envelope, Region

Decorated = TypeVar("Decorated")


@dataclass(frozen=True, kw_only=True)
class Step:
    r"""What one part of a layer does on the way from noise to data.

    Arguments:
        name: The name of the layer within the model.
        kind: The class of the layer.
        depends: How the step depends on the condition, in words.
    """

    name: str = ""
    kind: str = ""
    depends: str = "not at all"

    @property
    def features(self) -> int | None:
        r"""The number of features that the step takes, if it tells."""
        return None

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
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Noise(Step):
    r"""The noise that a flow starts from, at each of its positions.

    Arguments:
        size: The number of features of a position.
        event: The number of elements of all the noise, or :py:`None` if it varies.
        normal: Whether the noise is standard normal.
    """

    size: int
    event: int | None = None
    normal: bool = True

    @property
    def features(self) -> int:
        return self.size

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        return region


@dataclass(frozen=True, kw_only=True)
class Linear(Step):
    r"""A constant linear map :math:`x \mapsto W x` of the features of a position.

    Arguments:
        matrix: The matrix :math:`W`, with shape :math:`(C, C)`.
        error: A matrix :math:`E \geq 0` such that the rounding error of the layer is at most
            :math:`C u E |x|`, with `u` that of one operation. If :py:`None`, use :math:`|W|`, which
            holds for products.
    """

    matrix: Tensor
    error: Tensor | None = None

    @property
    def features(self) -> int:
        return self.matrix.shape[1]

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        matrix = constant(self.matrix)
        error = matrix.abs() if self.error is None else constant(self.error)
        return region.linear(matrix, error, roundoff)


@dataclass(frozen=True, kw_only=True)
class Scale(Step):
    r"""A constant elementwise map :math:`x_i \mapsto s_i x_i + b_i`."""

    factor: Tensor
    offset: Tensor

    @property
    def features(self) -> int | None:
        n = max(self.factor.numel(), self.offset.numel())
        return n if n > 1 else None

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        shape = region.box.shape[1]
        factor, offset = (constant(t).flatten().expand(shape) for t in (self.factor, self.offset))
        return region.scale(factor, offset, roundoff)


@dataclass(frozen=True, kw_only=True)
class Permute(Step):
    r"""A permutation: feature `i` of the output is feature `order[i]` of the input."""

    order: Tensor

    @property
    def features(self) -> int:
        return self.order.numel()

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        return region.permute(self.order.detach().cpu())


@dataclass(frozen=True, kw_only=True)
class Univariate(Step):
    r"""A univariate map of some features, with parameters that depend on anything.

    Arguments:
        envelope: What holds for the map whatever its parameters are.
        mask: Which features are transformed, with shape :math:`(C)`. :py:`None` means all.
    """

    envelope: Envelope
    mask: Tensor | None = None

    @property
    def features(self) -> int | None:
        return None if self.mask is None else self.mask.numel()

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        everywhere = torch.ones(region.box.shape[1], dtype=torch.bool)
        mask = everywhere if self.mask is None else self.mask.detach().cpu()
        return region.elementwise(self.envelope, mask, roundoff)


@dataclass(frozen=True, kw_only=True)
class Join(Step):
    r"""The inverse of a split: further features :math:`m + e^s z` come in, with bounded m and s.

    Arguments:
        joined: The number of features that come in.
        mean_bound: The bound of :math:`m`.
        scale_bound: The bound of :math:`s`.
    """

    joined: int
    mean_bound: float
    scale_bound: float

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        largest = torch.tensor(self.scale_bound, dtype=torch.float64).exp().item()
        largest = self.mean_bound + largest * radius
        # The exponential of a rounded s, two units of its own, a product and a sum.
        return region.join(self.joined, largest * (1 + (8 + self.scale_bound) * roundoff))


@dataclass(frozen=True, kw_only=True)
class Unsqueeze(Step):
    r"""The inverse of a squeeze: features become positions."""

    factor: int

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        return region.unsqueeze(self.factor)


@dataclass(frozen=True, kw_only=True)
class Flatten(Step):
    r"""The end of a layer after which features are no longer told apart, as those of an image."""

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        return Region.cube(region.box.new_full((1, 1), region.largest))


@dataclass(frozen=True, kw_only=True)
class Remark(Step):
    r"""A row in the table for what the bound leaves out, such as an image that is added last."""

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        return region


@dataclass(frozen=True, kw_only=True)
class Refused(Step):
    r"""A layer that no bound is known for.

    Arguments:
        reason: Why, in words.
        gain: By how much it may multiply its input at worst, if that is known.
    """

    reason: str
    gain: float | None = None
    depends: str = "without bound"

    @property
    def finite(self) -> bool:
        return True  # it claims nothing


Rule = Callable[..., Iterable[Step]]
_RULES: dict[type, Rule] = {}
_ENVELOPES: dict[type, Callable[..., Envelope]] = {}


def rule(*classes: type) -> Callable[[Decorated], Decorated]:
    r"""Registers the rule of layers of these classes.

    The rule is called as ``rule(layer, inverse)`` and returns the steps in sampling order;
    `inverse` is :py:`True` unless sampling runs the layer in its forward direction.

    Arguments:
        classes: The classes, each with its subclasses that override nothing.

    Example:
        >>> class Twice(torch.nn.Module):
        ...     def forward(self, x, context=None):
        ...         return 2 * x, x[0].numel() * torch.full(x.shape[:1], 2.0).log()
        ...
        ...     def inverse(self, z, context=None):
        ...         return z / 2, -self(z)[1]
        >>> @flowguard.bounds.rule(Twice)
        ... def twice(layer, inverse):
        ...     factor = torch.tensor(0.5 if inverse else 2.0)
        ...     yield flowguard.bounds.Scale(factor=factor, offset=torch.tensor(0.0))
        >>> round(flowguard.certify(Twice()).bound(3.0), 5)
        1.5
    """

    def register(function: Decorated) -> Decorated:
        for cls in classes:
            _RULES[cls] = function  # type: ignore[assignment]
        return function

    return register


def envelope_rule(*classes: type) -> Callable[[Decorated], Decorated]:
    r"""Registers what is known of univariate transforms of these classes.

    The rule is called as ``rule(transform, inverse)`` and returns an :class:`Envelope` that holds
    whatever the parameters of the transform are; it may rely on its options only.

    Arguments:
        classes: The classes, each with its subclasses that override nothing.
    """

    def register(function: Decorated) -> Decorated:
        for cls in classes:
            _ENVELOPES[cls] = function  # type: ignore[assignment]
        return function

    return register


def steps(layer: Any, inverse: bool = True) -> list[Step]:
    r"""Returns the steps of a layer in sampling order, each named within the layer.

    Arguments:
        layer: The layer.
        inverse: Whether sampling runs the layer in its inverse direction.
    """
    layer = getattr(layer, "_orig_mod", layer)  # what torch.compile wraps
    kind = type(layer).__name__
    found = _lookup(_RULES, layer)
    if isinstance(found, str):
        return [Refused(kind=kind, reason=found)]
    return [s if s.kind else replace(s, kind=kind) for s in found(layer, inverse)]


def envelope(transform: Any, inverse: bool = True) -> Envelope:
    r"""Returns what is known of a univariate transform, whatever its parameters are.

    Arguments:
        transform: The transform.
        inverse: Whether sampling runs it in its inverse direction.
    """
    found = _lookup(_ENVELOPES, transform)
    if not isinstance(found, str):
        return found(transform, inverse)
    # A class that states its own bound, as `Univariate` invites it to, is taken at its word.
    if inverse and "inverse_bound" in vars(type(transform)):
        if math.isfinite(transform.inverse_bound(1.0)):
            return Envelope(limit=transform.inverse_bound, depends="within its inverse_bound")
        found = "its inverse_bound is infinite"
    return Envelope(reason=found)


def within(name: str, layer: Any, inverse: bool = True) -> list[Step]:
    r"""Returns the steps of a part of a layer, their names prefixed by the name of the part.

    Arguments:
        name: The name of the part.
        layer: The part.
        inverse: Whether sampling runs it in its inverse direction.
    """
    return [replace(s, name=f"{name}.{s.name}" if s.name else name) for s in steps(layer, inverse)]


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, Envelope):
        known = (value.offset, value.floor, value.gain) if value.limit is None else ()
        return all(map(math.isfinite, known)) and not math.isnan(value.displacement)
    return not isinstance(value, float) or math.isfinite(value)


def constant(t: Tensor) -> Tensor:
    r"""A constant of a layer, as the certificate computes with it."""
    return t.detach().to("cpu", torch.float64)


def load_rules(layer: Any) -> None:
    r"""Imports the rules for the library that a layer's class, or one of its bases, comes from."""
    for library in {c.__module__.partition(".")[0] for c in type(layer).__mro__}:
        name = f"flowguard.integrations._{library}_bounds"
        if library.isidentifier() and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def _lookup(rules: dict[type, Any], layer: Any) -> Any:
    r"""The rule for a layer, or in words why there is none."""
    mro = type(layer).__mro__
    base = next((c for c in mro if c in rules), None)
    if base is None:
        load_rules(layer)
        base = next((c for c in mro if c in rules), None)
    if base is None:
        return f"flowguard knows no rule for {_full(type(layer))}"
    for cls in mro[: mro.index(base)]:
        for name in vars(cls):
            if hasattr(base, name) and name not in _HARMLESS and not _is_dunder(name):
                return (
                    f"{_full(cls)} overrides {name} of {base.__name__}, which the rule relies on"
                )
    return rules[base]


#: What a subclass may define anew without changing its samples.
_HARMLESS = {"_abc_impl", "extra_repr"}


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name != "__call__"


def _full(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
