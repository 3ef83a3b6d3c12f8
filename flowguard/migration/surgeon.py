r"""What it takes to operate on a model: the layers to replace, and who knows them."""

__all__ = ["Site", "Surgeon", "holder", "surgeon"]

import abc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import singledispatch
from typing import Any

import torch.nn as nn
from torch import Tensor

from flowguard.hosts import load
from flowguard.migration.imitate import AnyTransform, RescaledSpline


class Site(abc.ABC):
    r"""A layer whose univariate map is replaced.

    Arguments:
        name: The name of the layer within the model.
        kind: What it is, in words.
        additive: Whether the old map only shifts, so that the caller may want to keep it.
    """

    def __init__(self, name: str, kind: str, additive: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.additive = additive

    @abc.abstractmethod
    def listen(self) -> AbstractContextManager[None]:
        r"""Remembers, within the context, what the layer's map is asked in a pass of the model."""

    @property
    def heard(self) -> bool:
        r"""Whether the layer was asked anything. One that was not is kept."""
        return True

    @property
    @abc.abstractmethod
    def inputs(self) -> Tensor:
        r"""The inputs of the univariate map that were heard, with shape :math:`(N, *, D)`."""

    @abc.abstractmethod
    def old(self, rows: Tensor | slice) -> AnyTransform:
        r"""Returns the old map of these rows of the inputs, in the direction heard."""

    def carry(self, slope: float | None) -> bool:
        r"""Carries the old map over, knot by knot, if it is a spline; returns whether it was."""
        return False

    @abc.abstractmethod
    def replace(self, spline: RescaledSpline) -> list[nn.Parameter]:
        r"""Puts the spline into the layer and returns what computes its parameters, to be fitted;
        the hidden layers are kept. Nothing is fitted where nothing is returned."""

    @abc.abstractmethod
    def new(self, rows: Tensor | slice) -> AnyTransform:
        r"""Returns the new map of these rows of the inputs."""


class Surgeon(abc.ABC):
    r"""What it takes to operate on a model; adapters derive one for their library.

    Arguments:
        model: The model, a copy that may be changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abc.abstractmethod
    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        r"""Returns the log-density of each row."""

    @abc.abstractmethod
    def sites(self) -> list[Site]:
        r"""Returns the layers to replace."""

    @abc.abstractmethod
    def others(self) -> list[str]:
        r"""Names the layers that are kept as they are."""

    def reasons(self) -> Mapping[str, str]:
        r"""Says why layers are kept, for any of the names that :meth:`others` gives."""
        return {}

    def encode(self, x: Tensor, context: Any) -> Tensor | None:
        r"""Returns the noise of each row, :py:`None` where the adapter cannot tell."""
        return None

    def decode(self, z: Tensor, context: Any) -> Tensor:
        r"""Returns the samples of some noise, if :meth:`encode` gives any; raises
        :py:`NotImplementedError` where there is no inverse."""
        raise NotImplementedError

    def tuning(self) -> AbstractContextManager[None]:
        r"""Holds while the model is fine-tuned."""
        return nullcontext()


_HOLDERS: dict[type, Callable[[nn.Module], Surgeon]] = {}


def holder(*classes: type) -> Callable[[type[Surgeon]], type[Surgeon]]:
    r"""Registers who operates on any model that has a layer of these classes somewhere.

    Arguments:
        classes: The layers of a library.
    """

    def register(who: type[Surgeon]) -> type[Surgeon]:
        _HOLDERS.update(dict.fromkeys(classes, who))
        return who

    return register


@singledispatch
def surgeon(model: Any) -> Surgeon:
    r"""Returns who operates on a model. Adapters register the flows of their library here, and the
    layers that any other model may hold with :func:`holder`.

    Arguments:
        model: The model.
    """
    before = len(surgeon.registry)
    load(model, "migration")
    if len(surgeon.registry) > before and surgeon.dispatch(type(model)) is not _UNKNOWN:
        return surgeon(model)
    for part in model.modules() if isinstance(model, nn.Module) else ():
        load(part, "migration")
        for cls in type(part).__mro__:
            if cls in _HOLDERS:
                return _HOLDERS[cls](model)
    raise TypeError(
        f"flowguard does not know how to migrate {type(model).__name__}: give a flow of a library"
        " that it has an adapter for, or a module that holds layers of one"
    )


_UNKNOWN = surgeon.dispatch(object)
