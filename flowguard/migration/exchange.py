r"""Modules that take the place of others: made of them, put where they were, heard as they run.

Nothing here knows a library, or what is exchanged.
"""

__all__ = ["exchange", "overhear", "successor"]

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar, cast

import torch.nn as nn
from torch import Tensor

from flowguard.numerics import instead

M = TypeVar("M", bound=nn.Module)

Direction = Literal["forward", "inverse"]
Tell = Callable[[Direction, Any, Any, Tensor | None], None]

_STATE = frozenset(vars(nn.Module()))  # what torch keeps of any module: parameters, hooks, ...


def successor(
    old: nn.Module, kind: type[M] | None = None, *, without: Iterable[str] = (), **parts: Any
) -> M:
    r"""Returns a module that has all that another one has, but for some parts.

    Parameters, buffers, children, hooks and options are those of the old module, under their
    names, so that its state dict fits; no constructor runs. The old module is not changed.

    Arguments:
        old: The module.
        kind: The class of the new one. If :py:`None`, that of the old one.
        without: The names of attributes that are left out.
        parts: The attributes that differ.

    Example:
        >>> old = torch.nn.Linear(2, 3)
        >>> new = successor(old, bias=None)
        >>> new.weight is old.weight, new.bias, old.bias is None
        (True, None, False)
    """
    kind = cast(type[M], type(old)) if kind is None else kind
    new = kind.__new__(kind)
    for name, value in vars(old).items():
        if name not in without:
            vars(new)[name] = copy.copy(value) if name in _STATE else value
    # These hooks of torch's know their module, by a weak reference.
    hooks: dict[int, Any] = new._load_state_dict_pre_hooks
    hooks.update({k: type(h)(h.hook, new) for k, h in hooks.items() if h.with_module})
    for name, part in parts.items():
        setattr(new, name, part)
    return new


def exchange(
    model: nn.Module, old: nn.Module, new: nn.Module, places: Iterable[Any] = ()
) -> nn.Module:
    r"""Puts a module where another one is: wherever a module within the model refers to it, as a
    child, an attribute, or in a list or a dictionary of its own.

    Arguments:
        model: The model, which is changed.
        old: The module that goes.
        new: The module that comes.
        places: Other objects that refer to modules of the model.

    Returns:
        The model; the new module, if the model is the old one.
    """
    for holder in [*model.modules(), *places]:
        own = vars(holder)
        for place in (own, *own.values()):
            if isinstance(place, MutableMapping):
                found = [key for key, value in place.items() if value is old]
            elif isinstance(place, MutableSequence):
                found = [key for key, value in enumerate(place) if value is old]
            else:
                continue
            for key in found:
                place[key] = new
    return new if model is old else model


@contextmanager
def overhear(layer: nn.Module, net: nn.Module | None, tell: Tell) -> Iterator[None]:
    r"""Tells, within the context, of each call of a layer's `forward` and `inverse`, once it is
    done.

    Arguments:
        layer: The layer.
        net: A network within it, whose last output is told, if any.
        tell: Called with the direction, the input, what was returned, and a copy of the last
            output of the network.
    """
    said: list[Tensor | None] = [None]
    directions: tuple[Direction, ...] = ("forward", "inverse")

    def hear(module: nn.Module, inputs: Any, output: Tensor) -> None:
        # One after another, an autoregressive network gets its inputs: the last pass has them
        # all. Some layers write into what it says.
        said[0] = output.detach().clone()

    def spy(direction: Direction) -> Callable[..., Any]:
        run = getattr(layer, direction)

        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = run(inputs, *args, **kwargs)
            tell(direction, inputs, result, said[0])
            return result

        return call

    with ExitStack() as stack:
        if net is not None and type(net).__call__ is not nn.Module.__call__:
            stack.enter_context(_called(net, hear))
        elif net is not None:
            stack.callback(net.register_forward_hook(hear).remove)
        for direction in directions:
            stack.enter_context(instead(layer, direction, spy(direction)))
        yield


@contextmanager
def _called(net: nn.Module, hear: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    r"""Hears, within the context, a network that is called past the hooks of its module."""
    kind = type(net)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = kind.__call__(self, *args, **kwargs)
        hear(self, args, output)
        return output

    # Python looks for it in the class alone.
    net.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    try:
        yield
    finally:
        net.__class__ = kind
