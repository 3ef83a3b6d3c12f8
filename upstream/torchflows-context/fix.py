r"""Multiscale flows that read their context, for torchflows 1.2.1.

with applied():
    flow = Flow(MultiscaleRealNVP((3, 16, 16), context_shape=(4,)))
    flow.log_prob(x, context=c)
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torchflows.bijections.finite.multiscale.base import MultiscaleBijection
from torchflows.bijections.finite.multiscale.conditioning.classic import ConvNetConditioner
from torchflows.bijections.finite.multiscale.conditioning.resnet import ResNetConditioner

CONDITIONERS = (ConvNetConditioner, ResNetConditioner)


def multiscale(released: Callable) -> Callable:
    r"""The constructor, which hands the shape of the context to the networks of its couplings."""

    def __init__(self: MultiscaleBijection, *args: Any, **options: Any) -> None:
        released(self, *args, **options)
        shape = self.context_shape
        for part in self.modules():
            # Those of `small_bijection` have theirs already.
            if isinstance(part, CONDITIONERS) and part.context_shape is None and shape is not None:
                attach(part, shape)

    return __init__


def network(released: Callable) -> Callable:
    r"""The constructor of the networks: one that is told of a context has a map of it."""

    def __init__(self: nn.Module, *args: Any, **options: Any) -> None:
        released(self, *args, **options)
        if self.context_shape is not None:
            attach(self, self.context_shape)

    return __init__


def attach(part: nn.Module, shape: tuple[int, ...]) -> None:
    part.context_shape = shape
    part.context_layer = nn.Linear(math.prod(shape), part.n_predicted_parameters)


def conditioner(released: Callable) -> Callable:
    r"""The method of the networks: what the image says, plus what the context says."""

    def predict_theta_flat(self: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        theta = released(self, x, context)
        if not hasattr(self, "context_layer"):  # no context, or made before the change
            return theta
        if context is None:
            raise ValueError(f"context must have shape (..., {self.context_shape}); got None")
        return theta + self.context_layer(context.flatten(-len(self.context_shape)))

    return predict_theta_flat


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into torchflows, and takes them out again."""
    with ExitStack() as stack:
        made = MultiscaleBijection
        stack.enter_context(patch.object(made, "__init__", multiscale(made.__init__)))
        for made in CONDITIONERS:
            ours = conditioner(made.predict_theta_flat)
            stack.enter_context(patch.object(made, "predict_theta_flat", ours))
            stack.enter_context(patch.object(made, "__init__", network(made.__init__)))
        yield
