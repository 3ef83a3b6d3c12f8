r"""Affine flows that can be pickled, for glasflow 0.4.1.

    with applied():
        torch.save(flow, "flow.pt")

The file names functions of this module: who reads it needs a copy of the same name.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch
from glasflow.transforms import coupling, utils
from torch import Tensor
from torch.nn.functional import softplus


def nflows(x: Tensor) -> Tensor:
    return torch.sigmoid(x + 2) + 1e-3


def nflows_general(x: Tensor) -> Tensor:
    return (softplus(x) + 1e-3).clamp(0, 3)


def log(x: Tensor, scale: float) -> Tensor:
    r"""Between exp(-scale) and exp(scale)."""
    return torch.exp(2 * scale * (torch.sigmoid(x) - 0.5))


SCALE_ACTIVATIONS = {"nflows": nflows, "nflows_general": nflows_general, "wide": nflows_general}
SCALE_ACTIVATIONS |= {f"log{n}": partial(log, scale=float(n)) for n in (1, 2, 3)}


def get_scale_activation(activation: str | Callable) -> Callable:
    r"""A function that pickle finds by its name, or a partial one of such."""
    if not isinstance(activation, str):
        return activation
    if activation in SCALE_ACTIVATIONS:
        return SCALE_ACTIVATIONS[activation]
    if activation.startswith("log"):
        return partial(log, scale=float(activation[3:]))
    raise ValueError(
        f"Unknown activation: {activation}; it must be a function, logN with a number N, or one "
        f"of {', '.join(SCALE_ACTIVATIONS)}"
    )


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the functions into glasflow, and takes them out again."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(utils, "SCALE_ACTIVATIONS", SCALE_ACTIVATIONS))
        for module in (utils, coupling):
            stack.enter_context(patch.object(module, "get_scale_activation", get_scale_activation))
        yield
