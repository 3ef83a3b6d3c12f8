r"""How certificates learn what a layer does to noise: one rule for each class.

A rule takes a layer and returns the :class:`Step`\ s that its sampling direction makes. Rules are
found by class; a subclass that overrides anything of the class whose rule it would inherit is not
covered by it. A layer without a rule is *refused*: named in the certificate, never guessed.

The rules of another library's layers live in ``flowguard.integrations.<library>.rules`` and are
imported when the first of its layers is met.
"""

__all__ = ["envelope", "envelope_rule", "rule", "steps", "within"]

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from flowguard.bounds.regions import Envelope
from flowguard.bounds.steps import Refused, Step
from flowguard.hosts import load

Decorated = TypeVar("Decorated")


Rule = Callable[..., Iterable[Step]]
_RULES: dict[type, Rule] = {}
_ENVELOPES: dict[type, Callable[..., Envelope]] = {}


def rule(*classes: type) -> Callable[[Decorated], Decorated]:
    r"""Registers the rule of layers of these classes.

    The rule is called as ``rule(layer, sampling)`` and returns the steps in the order in which
    they are taken; `sampling` is :py:`True` where the layer runs towards data, as a layer does
    unless something around it turns it round. Which of its methods that is, its library says:
    `inverse` in the core and in nflows, `forward` in normflows.

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
        ... def twice(layer, sampling):
        ...     factor = torch.tensor(0.5 if sampling else 2.0)
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

    The rule is called as ``rule(transform, sampling)`` and returns an :class:`Envelope` that holds
    whatever the parameters of the transform are; it may rely on its options only. `sampling` is
    :py:`True` where the transform runs towards data, in its inverse direction.

    Arguments:
        classes: The classes, each with its subclasses that override nothing.
    """

    def register(function: Decorated) -> Decorated:
        for cls in classes:
            _ENVELOPES[cls] = function  # type: ignore[assignment]
        return function

    return register


def steps(layer: Any, sampling: bool = True) -> list[Step]:
    r"""Returns the steps of a layer in the order taken, each named within the layer.

    Arguments:
        layer: The layer.
        sampling: Whether the layer runs towards data; see :func:`rule`.
    """
    layer = getattr(layer, "_orig_mod", layer)  # what torch.compile wraps
    kind = type(layer).__name__
    found = _lookup(_RULES, layer)
    if isinstance(found, str):
        return [Refused(kind=kind, reason=found)]
    return [s if s.kind else replace(s, kind=kind) for s in found(layer, sampling)]


def envelope(transform: Any, sampling: bool = True) -> Envelope:
    r"""Returns what is known of a univariate transform, whatever its parameters are.

    Arguments:
        transform: The transform.
        sampling: Whether it runs towards data, in its inverse direction.
    """
    found = _lookup(_ENVELOPES, transform)
    if not isinstance(found, str):
        return found(transform, sampling)
    # A class that states its own bound, as `Univariate` invites it to, is taken at its word.
    if sampling and "inverse_bound" in vars(type(transform)):
        if math.isfinite(transform.inverse_bound(1.0)):
            return Envelope(limit=transform.inverse_bound, depends="within its inverse_bound")
        found = "its inverse_bound is infinite"
    return Envelope(reason=found)


def within(name: str, layer: Any, sampling: bool = True) -> list[Step]:
    r"""Returns the steps of a part of a layer, their names prefixed by the name of the part.

    Arguments:
        name: The name of the part.
        layer: The part.
        sampling: Whether it runs towards data; see :func:`rule`.
    """
    return [
        replace(s, name=f"{name}.{s.name}" if s.name else name) for s in steps(layer, sampling)
    ]


def _lookup(rules: dict[type, Any], layer: Any) -> Any:
    r"""The rule for a layer, or in words why there is none."""
    mro = type(layer).__mro__
    base = next((c for c in mro if c in rules), None)
    if base is None:
        load(layer, "rules")
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
