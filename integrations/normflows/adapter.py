r"""How a context finds its way to the layers that take one, past those that do not."""

__all__ = ["ContextAdapter", "Route", "accepts", "route", "run_layer"]

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from normflows.flows import Composite, Flow, Reverse
from torch import Tensor


def accepts(function: Callable[..., Any], name: str) -> bool:
    r"""Tells whether a function takes an argument of that name, by its signature.

    Arguments:
        function: The function.
        name: The name of the argument.
    """
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@dataclass(frozen=True)
class Route:
    r"""What a layer is to a context.

    Arguments:
        kind: ``"context"`` if the layer takes it, ``"blind"`` if not, ``"reverse"`` or
            ``"composite"`` if it hands on to other layers.
        parts: The routes of these.
    """

    kind: str
    parts: "tuple[Route, ...]" = ()

    @property
    def takes(self) -> bool:
        r"""Whether the context reaches a layer that takes it."""
        return self.kind == "context" or any(part.takes for part in self.parts)


def route(flow: Any) -> Route:
    r"""Returns the route of a layer, from the signatures of its two directions.

    A layer of ours that was made without a context is blind. :class:`normflows.flows.Reverse` and
    :class:`normflows.flows.Composite` are looked into.

    Arguments:
        flow: The layer.

    Raises:
        TypeError: If it is no layer of normflows' kind, or takes the context in one direction only.
    """
    if type(flow) is Reverse:
        return Route("reverse", (route(flow.flow),))
    if type(flow) is Composite:
        return Route("composite", tuple(route(part) for part in flow._flows))
    inverse = getattr(flow, "inverse", None)
    if not isinstance(flow, nn.Module) or not callable(inverse):
        raise TypeError(
            "a layer must be a module with `forward` and `inverse`, such as those of"
            f" normflows.flows; got {type(flow).__name__}"
        )
    takes = accepts(flow.forward, "context")
    if takes != accepts(inverse, "context"):
        raise TypeError(
            f"{type(flow).__name__} takes a context in its"
            f" {'forward' if takes else 'inverse'} direction only, so that the two differ"
        )
    takes = takes and getattr(flow, "context_channels", 0) is not None
    return Route("context" if takes else "blind")


def run_layer(flow: Any, way: Route, z: Any, context: Any, inverse: bool) -> tuple[Any, Any]:
    r"""Runs a layer, with the context where its route says so.

    Arguments:
        flow: The layer.
        way: Its route.
        z: The input.
        context: The context, or a function that gives the context for an input.
        inverse: Whether to run the layer's `inverse`, from data to noise.
    """
    if way.kind == "reverse":
        return run_layer(flow.flow, way.parts[0], z, context, not inverse)
    if way.kind == "composite":
        pairs = list(zip(flow._flows, way.parts, strict=True))
        total: Any = 0
        for part, part_way in reversed(pairs) if inverse else pairs:
            z, log_det = run_layer(part, part_way, z, context, inverse)
            total = total + log_det
        return z, total
    call = flow.inverse if inverse else flow
    if way.kind == "blind":
        return call(z)
    return call(z, context=context(z) if callable(context) else context)


class ContextAdapter(Flow):
    r"""Creates a layer that takes a context from one that may not.

    :class:`normflows.ConditionalNormalizingFlow` hands its context to all of its layers, but most
    layers of normflows do not take one. This passes it to those that do, and leaves it out for
    the others. Which these are is read from their signatures, once, here;
    :class:`normflows.flows.Reverse` and :class:`normflows.flows.Composite` are looked into.

    Arguments:
        flow: The layer.

    Example:
        >>> import normflows
        >>> layer = ContextAdapter(normflows.flows.ActNorm((3,)))
        >>> z, context = torch.randn(64, 3), torch.randn(64, 5)
        >>> x, log_det = layer(z, context)
        >>> torch.allclose(layer.inverse(x, context)[0], z, atol=1e-5)
        True
    """

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow
        self.route = route(flow)

    def extra_repr(self) -> str:
        r"""Returns whether the context reaches a layer that takes it, for the printed module."""
        return f"takes={self.route.takes}"

    def forward(self, z: Any, context: Tensor | None = None) -> tuple[Any, Any]:
        r"""Takes noise to data by the layer's `forward`; returns the output and the log-
        determinant, with shape :math:`(N)`."""
        return run_layer(self.flow, self.route, z, context, inverse=False)

    def inverse(self, z: Any, context: Tensor | None = None) -> tuple[Any, Any]:
        r"""Takes data to noise by the layer's `inverse`; returns the output and the log-
        determinant.

        Arguments:
            z: What the layer takes: a tensor with shape :math:`(N, *)`, or a list of them.
            context: The context, with shape :math:`(N, *)`, which is handed on to layers that take one.

        Returns:
            What the layer returns, and the log-determinant, with shape :math:`(N)`.
        """
        return run_layer(self.flow, self.route, z, context, inverse=True)
