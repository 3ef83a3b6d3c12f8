r"""How certificates learn what a layer does to noise: one rule for each class.

A rule takes a layer and returns the :class:`Step`\ s that its sampling direction makes. A
rule is for exactly its class: what overrides anything of it, in a subclass or in the instance
alone, has hooks or parametrizations, is not covered (:func:`departure`). A layer without a rule is
*refused*: named in the certificate, never guessed.

The rules of another library's layers live in ``flowguard.integrations.<library>.rules`` and are
imported when the first of its layers is met.
"""

__all__ = [
    "compiled",
    "departure",
    "envelope",
    "envelope_rule",
    "has_rule",
    "hooks_of",
    "named",
    "rule",
    "steps",
    "within",
]

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch.nn as nn
from torch.nn.utils import parametrize

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

    Example:
        >>> class Shifted(flowguard.transforms.Univariate):
        ...     def __init__(self, shift):
        ...         super().__init__()
        ...         self.shift = shift.tanh()
        >>> @flowguard.bounds.envelope_rule(Shifted)
        ... def shifted(transform, sampling):
        ...     return flowguard.bounds.Envelope(gain=1.0, offset=1.0, depends="within a shift of 1")
        >>> round(flowguard.certify(Shifted(torch.zeros(()))).bound(4.0), 5)
        5.0
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

    Example:
        >>> [type(step).__name__ for step in flowguard.bounds.steps(flowguard.image.Squeeze())]
        ['Unsqueeze']
        >>> flowguard.bounds.steps(torch.nn.ReLU())[0].reason
        'flowguard knows no rule for torch.nn.modules.activation.ReLU'
    """
    wrapper = layer
    layer = compiled(layer)
    kind = type(layer).__name__
    found = hooks_of(wrapper) or _lookup(_RULES, layer)
    if isinstance(found, str):
        return [Refused(kind=kind, reason=found)]
    return [s if s.kind else replace(s, kind=kind) for s in found(layer, sampling)]


def compiled(layer: Any) -> Any:
    r"""Returns what `torch.compile` has wrapped; anything else as it is.

    Arguments:
        layer: The layer.
    """
    kind = type(layer)
    # A module of a user's own may hold something under that name, and do anything with it.
    wraps = kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo")
    return layer._orig_mod if wraps else layer


def has_rule(layer: Any) -> bool:
    r"""Whether there is a rule for the class of a layer, or for one that it is derived from; those
    of torch's containers do not count, as they say nothing of what is in them.

    Arguments:
        layer: The layer.

    Example:
        >>> flowguard.bounds.has_rule(flowguard.image.Squeeze())
        True
        >>> flowguard.bounds.has_rule(torch.nn.ReLU())
        False
    """
    load(layer, "rules")
    base = next((c for c in type(layer).__mro__ if c in _RULES), None)
    return base is not None and not base.__module__.startswith("torch.")


def envelope(transform: Any, sampling: bool = True) -> Envelope:
    r"""Returns what is known of a univariate transform, whatever its parameters are.

    Arguments:
        transform: The transform.
        sampling: Whether it runs towards data, in its inverse direction.

    Example:
        >>> spline = flowguard.RobustSpline(*torch.zeros(3, 1), torch.zeros(()), bound=3.0, shift_bound=1.0)
        >>> flowguard.bounds.envelope(spline).reach(10.0)
        11.0
        >>> flowguard.bounds.envelope(torch.distributions.transforms.ExpTransform()).reason
        'flowguard knows no rule for torch.distributions.transforms.ExpTransform'
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


def named(name: str, found: Iterable[Step]) -> list[Step]:
    r"""Returns steps with their names prefixed by the name of a part.

    Arguments:
        name: The name of the part.
        found: Its steps.
    """
    return [replace(s, name=f"{name}.{s.name}" if s.name else name) for s in found]


def within(name: str, layer: Any, sampling: bool = True) -> list[Step]:
    r"""Returns the steps of a part of a layer, their names prefixed by the name of the part.

    Arguments:
        name: The name of the part.
        layer: The part.
        sampling: Whether it runs towards data; see :func:`rule`.

    Example:
        >>> flow = flowguard.image.Squeeze()
        >>> [(step.name, step.kind) for step in flowguard.bounds.within("first", flow)]
        [('first', 'Squeeze')]
    """
    return named(name, steps(layer, sampling))


def departure(part: Any, cls: type) -> str:
    r"""Returns in words how an object departs from what a class does; empty if it does not.

    Rules that rely on a part of a layer without asking for its steps ask this of the part.

    Arguments:
        part: The object, of the class or of one derived from it.
        cls: The class.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> departure(layer, torch.nn.Linear)
        ''
        >>> layer.forward = lambda x: 1e9 * x
        >>> departure(layer, torch.nn.Linear)
        'it has a forward of its own in place of that of torch.nn.modules.linear.Linear'
    """
    kind = type(part)
    if cls not in kind.__mro__:
        return f"it is a {_full(kind)}, where a {_full(cls)} is expected"
    if isinstance(part, nn.Module) and parametrize.is_parametrized(part):
        names = ", ".join(part.parametrizations)  # type: ignore[arg-type]
        return f"its {names} is made anew at each look, by a parametrization"
    for derived in kind.__mro__[: kind.__mro__.index(cls)]:
        for name in vars(derived):
            if not _is_harmless(name) and (hasattr(cls, name) or _is_dunder(name)):
                return f"{_full(derived)} overrides {name} of {cls.__name__}, which the rule relies on"
    for name in getattr(part, "__dict__", ()):
        if name in _methods(kind):  # type: ignore[arg-type]  # classes are hashable
            return f"it has a {name} of its own in place of that of {_full(kind)}"
    return hooks_of(part)


@cache
def _methods(kind: type) -> set[str]:
    r"""The names of the methods of a class; those of properties an instance cannot hide."""
    found: dict[str, Any] = {}
    for cls in reversed(kind.__mro__):
        found.update(vars(cls))
    return {n for n, value in found.items() if callable(value) or isinstance(value, classmethod)}


def hooks_of(part: Any) -> str:
    r"""Says which hooks a module has that might change what it returns; empty for none.

    Arguments:
        part: The module, or an object that has no hooks.
    """
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        for hook in getattr(part, kind, {}).values():
            # What records scores changes nothing.
            if not str(getattr(hook, "__module__", "")).startswith("flowguard.ood."):
                return "it has forward hooks, which may change what it returns"
    return ""


def _lookup(rules: dict[type, Any], layer: Any) -> Any:
    r"""The rule for a layer, or in words why there is none."""
    mro = type(layer).__mro__
    base = next((c for c in mro if c in rules), None)
    if base is not mro[0]:  # its library may have a rule for the class itself
        load(layer, "rules")
        base = next((c for c in mro if c in rules), None)
    if base is None:
        return f"flowguard knows no rule for {_full(type(layer))}{_held(rules, layer)}"
    return departure(layer, base) or rules[base]


def _held(rules: dict[type, Any], layer: Any) -> str:
    r"""Says which part of an unknown module has a rule."""
    for name, part in layer.named_modules() if isinstance(layer, nn.Module) else ():
        load(part, "rules")
        # That torch's containers have a rule says nothing of what they hold.
        of_torch = type(part).__module__.startswith("torch.")
        if name and not of_torch and any(c in rules for c in type(part).__mro__):
            return f"; it holds a {type(part).__name__}, see certify(model.{name})"
    return ""


#: What a subclass may define anew without changing its samples.
_HARMLESS = {
    "__abstractmethods__",
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__init__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__qualname__",
    "__repr__",
    "__slotnames__",
    "__static_attributes__",
    "__str__",
    "__weakref__",
    "_abc_impl",
    "extra_repr",
}


def _is_harmless(name: str) -> bool:
    # huggingface_hub gives each subclass of what it saves a description of its own.
    return name in _HARMLESS or name.startswith("_hub_mixin_")


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _full(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
