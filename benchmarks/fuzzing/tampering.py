r"""What users do to a model that its rules do not expect: hooks, other methods, parametrizations."""

__all__ = ["WRAPPERS", "tampered", "wrapped"]

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

from flowguard.bounds.parts import parts

from .maker import Case, Maker

LOUDER = 1e3


def louder(value: Any) -> Any:
    r"""Makes all numbers of what a method returned large."""
    if isinstance(value, Tensor):
        return LOUDER * value + LOUDER if value.is_floating_point() else value
    if isinstance(value, list):
        return [louder(v) for v in value]
    if type(value) is tuple:
        return tuple(louder(v) for v in value)
    return value


def _hook(m: Maker, part: nn.Module) -> str:
    part.register_forward_hook(lambda module, args, output: louder(output))
    return "a forward hook"


def _pre_hook(m: Maker, part: nn.Module) -> str:
    part.register_forward_pre_hook(lambda module, args: louder(args))
    return "a forward pre-hook"


def _methods(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        if base in (nn.Module, object, torch.distributions.Transform):
            continue
        for name, value in vars(base).items():
            if inspect.isfunction(value) and not (name.startswith("__") and name != "__call__"):
                yield name


USUAL = ("inverse", "forward", "_inverse", "_call", "_backward", "_forward")


def _method(m: Maker, part: Any) -> str | None:
    names = sorted({*_methods(type(part))} - {"extra_repr", "train", "meta"})
    usual = [name for name in names if name in USUAL]
    if not names:
        return None
    return m.pick(usual) if usual and m.flip(0.6) else m.pick(names)


def _override(m: Maker, part: Any) -> str | None:
    name = _method(m, part)
    if name is None:
        return None
    old = getattr(type(part), name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return louder(old(self, *args, **kwargs))

    part.__class__ = type(f"Loud{type(part).__name__}", (type(part),), {name: method})
    return f"a subclass that overrides {name}"


def _instance(m: Maker, part: Any) -> str | None:
    name = _method(m, part)
    if name is None:
        return None
    old = getattr(part, name)
    setattr(part, name, lambda *args, **kwargs: louder(old(*args, **kwargs)))
    return f"a method {name} of the object"


class _Raised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return louder(x)


class _Moving(nn.Module):
    r"""Weights that are larger each time they are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def forward(self, x: Tensor) -> Tensor:
        self.looks += 1
        return x * 2.0**self.looks


def _parametrization(m: Maker, part: nn.Module) -> str | None:
    names = [n for n, p in part.named_parameters(recurse=False) if p.is_floating_point()]
    if not names:
        return None
    name = m.pick(names)
    kind = m.integer(0, 5)
    matrix = getattr(part, name).dim() >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == 0 and matrix:
            parametrizations.weight_norm(part, name)
            return f"a weight norm of {name}"
        if kind == 1 and matrix:
            parametrizations.spectral_norm(part, name)
            return f"a spectral norm of {name}"
        if kind == 2 and matrix:
            nn.utils.weight_norm(part, name)
            return f"an old weight norm of {name}"
        if kind == 3 and matrix:
            nn.utils.spectral_norm(part, name)
            return f"an old spectral norm of {name}"
        if kind == 4:
            parametrize.register_parametrization(part, name, _Moving(), unsafe=True)
            return f"a moving parametrization of {name}"
        parametrize.register_parametrization(part, name, _Raised(), unsafe=True)
    return f"a parametrization of {name}"


def _shadow(m: Maker, part: nn.Module) -> str | None:
    r"""An attribute that takes the place of a parameter, after the parameter was removed."""
    names = [n for n, p in part.named_parameters(recurse=False) if p.is_floating_point()]
    if not names:
        return None
    name = m.pick(names)
    value = louder(getattr(part, name).detach().clone())
    delattr(part, name)
    setattr(part, name, value)
    return f"a plain tensor in place of {name}"


WAYS: list[Callable[[Maker, Any], str | None]] = [
    _hook,
    _pre_hook,
    _override,
    _override,
    _instance,
    _parametrization,
    _parametrization,
    _shadow,
]


#: Modules that hold a model and leave it as it is.
WRAPPERS: list[Any] = [nn.DataParallel, AveragedModel, nn.Sequential]


def wrapped(m: Maker, case: Case) -> Case:
    r"""Returns a case within a module that leaves it as it is.

    Arguments:
        m: What chooses.
        case: The case, whose model is wrapped.
    """
    if isinstance(case.model, nn.Module):
        kind = m.wanted if m.wanted in WRAPPERS else m.pick(WRAPPERS)
        case.model = m.note(kind(case.model))
    return case


def tampered(m: Maker, case: Case) -> Case:
    r"""Returns a case with something unexpected done to its model.

    Arguments:
        m: What chooses.
        case: The case, whose model is changed.
    """
    if isinstance(case.model, nn.Module):
        part: Any = m.pick([*case.model.modules()])
        words = m.pick(WAYS)(m, part)
    else:
        part = m.pick([p for p in parts(case.model) if not isinstance(p, Tensor)])
        ways = WAYS if isinstance(part, nn.Module) else [_override, _instance]
        words = m.pick(ways)(m, part)
    if words:
        case.tampered = f"{words} in {type(part).__mro__[0].__name__}"
    return case
