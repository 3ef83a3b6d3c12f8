r"""What it takes to operate on a model: the sites of its layers, and who knows them."""

__all__ = ["Site", "Surgeon", "holder", "no_density", "surgeon"]

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.bounds.holders import HeldConditions, held
from flowguard.bounds.parts import parts
from flowguard.hosts import HOSTS, WRAPPERS, load
from flowguard.migration.exchange import exchange
from flowguard.migration.imitate import AnyTransform, RescaledSpline


class Surgeon(abc.ABC):
    r"""What it takes to operate on a model; adapters derive one for their library.

    Arguments:
        model: The model, a copy that may be changed. If a site is all of it, another takes its
            place.

    Example:
        The surgeon of a flow that has nothing to replace; most take their sites from their layers.

        >>> class Noise(nn.Module):
        ...     def log_prob(self, x):
        ...         return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
        >>> @flowguard.migration.surgeon.register(Noise)
        ... class NoiseSurgeon(flowguard.migration.Surgeon):
        ...     def log_prob(self, x, context):
        ...         return self.model.log_prob(x)
        ...
        ...     def sites(self):
        ...         return []
        ...
        ...     def kept(self):
        ...         return {"noise": "it has no parameters"}
        >>> model, report = flowguard.migrate(Noise(), torch.zeros(8, 1))
        >>> report.kept, round(report.nll_before, 4)
        (('noise',), 0.9189)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._holding: Holding | None = None

    def held_log_prob(self, x: Tensor, context: Any) -> Tensor:
        r"""Returns the log-density of each row of a model that tells none itself, but holds a flow
        and does nothing more.

        Raises:
            TypeError: If it does not, or does more.

        Arguments:
            x: The data, with shape :math:`(N, *)`.
            context: What the model is given of them, or :py:`None`.

        Returns:
            The log-density in nats, with shape :math:`(N)`.
        """
        if self._holding is None:
            self._holding = Holding(self.model)
        return self._holding.log_prob(x, context)

    @abc.abstractmethod
    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        r"""Returns the log-density of each row.

        Arguments:
            x: The data, with shape :math:`(N, *)`.
            context: What the model is given of them, or :py:`None`.

        Returns:
            The log-density in nats, with shape :math:`(N)`.
        """

    @abc.abstractmethod
    def sites(self) -> list["Site"]:
        r"""Returns the sites of the layers to replace."""

    @abc.abstractmethod
    def kept(self) -> Mapping[str, str]:
        r"""Names the layers that are kept as they are, and says why; empty where it cannot tell."""

    def encode(self, x: Tensor, context: Any) -> Tensor | None:
        r"""Returns the noise of each row, :py:`None` where the adapter cannot tell.

        Arguments:
            x: The data, with shape :math:`(N, *)`.
            context: What the model is given of them, or :py:`None`.
        """
        return None

    def decode(self, z: Tensor, context: Any) -> Tensor:
        r"""Returns the samples of some noise, if :meth:`encode` gives any.

        Arguments:
            z: The noise, with the shape that :meth:`encode` gives.
            context: What the model is given, or :py:`None`.

        Raises:
            NotImplementedError: Where there is no inverse.
        """
        raise NotImplementedError

    @property
    def subject(self) -> Any:
        r"""What was asked to be migrated: the model, or what it holds the modules of."""
        return self.model

    @property
    def places(self) -> Sequence[Any]:
        r"""The objects that refer to layers and are no modules."""
        return ()

    def tuning(self) -> AbstractContextManager[None]:
        r"""Holds while the model is fine-tuned."""
        return nullcontext()


class Holding:
    r"""Creates the density of a module that only holds a flow, and has no method `log_prob`.

    Arguments:
        model: The module.

    Raises:
        TypeError: If it holds none, or several, or does more than hold it.
    """

    def __init__(self, model: nn.Module) -> None:
        found = held(model)
        if found is None:
            raise no_density(model)
        if found.reason:
            raise TypeError(f"{no_density(model)}: {found.reason}")
        self.model, self.path = model, found.path
        self.told = HeldConditions(model, found.path)
        self.checked = False

    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        r"""Returns the log-density of the flow, given what the module tells it of a context."""
        density = surgeon(self.model.get_submodule(self.path)).log_prob
        found = density(x, self.told(context, x))
        if not self.checked:
            self._check(x, context, found.detach())
            self.checked = True
        return found

    def _check(self, x: Tensor, context: Any, found: Tensor) -> None:
        r"""Refuses a module that returns another density than the flow, or none at all."""
        way = self.told.way
        with torch.no_grad():
            says = self.model(x) if way is None else way(context, x)
            says = says.log_prob(x) if hasattr(says, "log_prob") else says
        if isinstance(says, Tensor):
            known = found if says.dim() else found.mean()
            for sign in (1, -1):  # a density or a loss
                if says.shape == known.shape and torch.allclose(sign * says, known, 1e-4, 1e-3):
                    return
        raise TypeError(
            f"{type(self.model).__name__} does more than hold its {self.path}: what it returns is"
            f" not the density that {self.path} has of the same data; migrate model.{self.path}, or"
            " give migrate(..., log_prob=lambda model, x, context: ...)"
        )


class Site(abc.ABC):
    r"""A layer of a model whose univariate map is replaced. All adapters keep to one contract:

    - *What is here*: the module `layer`. It is listened to in a pass of the model
      (:meth:`listen`); :attr:`inputs` and :meth:`old` then are what its map was asked, and what
      the map was. Until something is put here, nothing of the model is changed.
    - *What may go in*: a module that is called as the old one is and is an instance of what its
      library looks for. :meth:`carry` or :meth:`build` make it of the old one, which stays as it
      is, by :func:`flowguard.migration.exchange.successor`: networks, parameters, buffers, hooks
      and options are the same objects under the same names, so that an earlier state dict fits.
      It can be copied and pickled wherever the old one can.
    - *How it goes in*: by :meth:`put`, which is the same for all. The new module takes the place
      of the old one wherever the model refers to it, and is `robust` from then on.
      :meth:`learned` and :meth:`new` ask it.

    Arguments:
        operation: The surgeon, whose model it is.
        name: The name of the layer within the model.
        layer: The layer.
        kind: What it is, in words.
        additive: Whether the old map only shifts, so that the caller may want to keep it.

    Example:
        >>> import zuko
        >>> flow = zuko.flows.MAF(2, 1, transforms=1, hidden_features=[8])
        >>> operation = flowguard.migration.surgeon(flow)
        >>> (site,) = operation.sites()
        >>> site.name, site.kind
        ('transform.transforms.0', 'MaskedAutoregressiveTransform[MonotonicAffineTransform]')
        >>> with site.listen():
        ...     _ = operation.log_prob(torch.randn(16, 2), torch.randn(16, 1))
        >>> site.heard, site.inputs.shape
        (True, torch.Size([16, 2]))
    """

    layer: Any
    robust: Any

    def __init__(
        self, operation: Surgeon, name: str, layer: nn.Module, kind: str, additive: bool = False
    ) -> None:
        self.operation = operation
        self.name = name
        self.layer = layer
        self.kind = kind
        self.additive = additive

    @abc.abstractmethod
    def listen(self) -> AbstractContextManager[None]:
        r"""Remembers, within the context, what the layer's map is asked in a pass of the model."""

    @property
    def heard(self) -> bool:
        r"""Whether the layer was asked anything. One that was not is kept."""
        return True

    def refusal(self) -> str:
        r"""Says why nothing can be put here after what was heard, if so: the layer is kept."""
        return ""

    @property
    @abc.abstractmethod
    def inputs(self) -> Tensor:
        r"""The inputs of the univariate map that were heard, with shape :math:`(N, *, D)`."""

    @abc.abstractmethod
    def old(self, rows: Tensor | slice) -> AnyTransform:
        r"""Returns the old map of these rows of the inputs, in the direction heard.

        Arguments:
            rows: Which of the :math:`N` rows, as indices with shape :math:`(n)` or as a slice.

        Returns:
            A transform of tensors with shape :math:`(n, *, D)`.
        """

    def carry(self, slope: float | None) -> nn.Module | None:
        r"""Returns the layer with the knots of the old map, if that is a spline.

        Arguments:
            slope: The least slope of the robust splines.
        """
        return None

    @abc.abstractmethod
    def build(self, spline: RescaledSpline) -> nn.Module:
        r"""Returns the layer with a robust map that follows the old one.

        Arguments:
            spline: The units of the inputs and outputs that were heard, and the options.
        """

    def rebuild(self, spline: RescaledSpline) -> nn.Module | None:
        r"""Returns the layer with robust splines that can learn to follow the old map, where there
        is such a thing.

        Arguments:
            spline: What makes the splines, with as many bins as the caller asked for.
        """
        return None

    def put(self, new: nn.Module) -> None:
        r"""Puts a new layer in the place of the old one.

        Arguments:
            new: What :meth:`carry` or :meth:`build` returned.
        """
        self.operation.model = exchange(
            self.operation.model, self.layer, new, self.operation.places
        )
        self.robust = new

    def learned(self) -> list[nn.Parameter]:
        r"""Returns what computes the parameters of the new map, to be fitted to the old one; the
        hidden layers are kept. Nothing is fitted where nothing is returned."""
        return []

    @property
    def becomes(self) -> str:
        r"""What the layer is now, in words."""
        return repr(self.new(slice(None)))

    @abc.abstractmethod
    def new(self, rows: Tensor | slice) -> AnyTransform:
        r"""Returns the new map of these rows of the inputs.

        Arguments:
            rows: Which of the :math:`N` rows, as indices with shape :math:`(n)` or as a slice.

        Returns:
            A transform of tensors with shape :math:`(n, *, D)`.
        """


_HOLDERS: dict[type, Callable[[nn.Module], Surgeon]] = {}


def holder(*classes: type) -> Callable[[type[Surgeon]], type[Surgeon]]:
    r"""Registers who operates on any model that has a layer of these classes somewhere.

    Arguments:
        classes: The layers of a library.

    Example:
        >>> class Layer(nn.Module):
        ...     pass
        >>> @flowguard.migration.holder(Layer)
        ... class LayersSurgeon(flowguard.migration.Surgeon):
        ...     log_prob = flowguard.migration.Surgeon.held_log_prob
        ...
        ...     def sites(self):
        ...         return []
        ...
        ...     def kept(self):
        ...         return {}
        >>> type(flowguard.migration.surgeon(nn.Sequential(Layer()))).__name__
        'LayersSurgeon'
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

    Raises:
        TypeError: If nobody knows the model, nor anything that it holds.

    Example:
        >>> import zuko
        >>> flow = zuko.flows.MAF(2, 1, transforms=2)
        >>> [site.name for site in flowguard.migration.surgeon(flow).sites()]
        ['transform.transforms.0', 'transform.transforms.1']
    """
    before = len(surgeon.registry)
    load(model, "migration")
    if len(surgeon.registry) > before and surgeon.dispatch(type(model)) is not _UNKNOWN:
        return surgeon(model)
    for part in parts(model):
        if isinstance(part, Tensor):
            continue
        load(part, "migration")
        for cls in type(part).__mro__:
            if cls in _HOLDERS:
                return _HOLDERS[cls](model)
    what = type(model).__name__
    if isinstance(model, str | Path | Mapping):  # a file of weights, or what was read from it
        raise TypeError(
            f"a flow to be migrated must be a module; got {what}: build the flow that the weights"
            " belong to, load them into it, and give that"
        )
    raise TypeError(
        f"flowguard does not know how to migrate {what}: give a flow of a library that it has an"
        f" adapter for ({', '.join((*HOSTS, *WRAPPERS))}), or a module that holds layers of one"
    )


def no_density(model: Any) -> TypeError:
    r"""Returns the error that says what to do about a model without a density that is known."""
    return TypeError(
        f"flowguard does not know how to get the log-density of {type(model).__name__}, which has"
        " no method log_prob: give migrate(..., log_prob=lambda model, x, context: ...)"
    )


_UNKNOWN = surgeon.dispatch(object)
