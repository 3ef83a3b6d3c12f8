r"""Normal distributions without a constant in float64, for nflows 0.14 and glasflow 0.4.1.

with applied():
    flow = Flow(transform, StandardNormal([8])).to("mps")
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

COPIES = tuple(name for name in ("nflows", "glasflow") if find_spec(name))
CLASSES = ("StandardNormal", "ConditionalDiagonalNormal", "DiagonalNormal")


def constructor(released: Callable) -> Callable:
    r"""The constructor, whose buffer has the default dtype. It says which device we are on."""

    def __init__(self: Any, shape: Any, *args: Any, **options: Any) -> None:
        released(self, shape, *args, **options)
        self._log_z = self._log_z.to(torch.get_default_dtype())

    return __init__


def log_prob(parameters: Callable) -> Callable:
    r"""The method `_log_prob`, for what gives means and logarithms of deviations."""

    def _log_prob(self: Any, inputs: Tensor, context: Tensor | None) -> Tensor:
        if inputs.shape[1:] != self._shape:
            raise ValueError(f"Expected input of shape {self._shape}, got {inputs.shape[1:]}")
        means, log_stds = parameters(self, context)
        energy = ((inputs - means) * torch.exp(-log_stds)).square() / 2
        # A number takes the dtype of what it is subtracted from: nothing is lost in float64.
        constant = self._shape.numel() * math.log(2 * math.pi) / 2
        return -(energy + log_stds).flatten(1).sum(1) - constant

    return _log_prob


def standard(self: Any, context: Tensor | None) -> tuple[Tensor, Tensor]:
    zero = self._log_z.new_zeros(())
    return zero, zero


def conditional(self: Any, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return self._compute_params(context)


def diagonal(self: Any, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return self.mean_.view(self._shape), self.log_std_.view(self._shape)


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into the copies of nflows that are installed, and takes them out again."""
    with ExitStack() as stack:
        for copy in COPIES:
            root = "glasflow.nflows" if copy == "glasflow" else copy
            normal = import_module(f"{root}.distributions.normal")
            for name, parameters in zip(CLASSES, (standard, conditional, diagonal), strict=True):
                made = getattr(normal, name)
                stack.enter_context(patch.object(made, "__init__", constructor(made.__init__)))
                stack.enter_context(patch.object(made, "_log_prob", log_prob(parameters)))
        yield
