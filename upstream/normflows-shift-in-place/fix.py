r"""A `Shift` that leaves the caller's data alone, for normflows 1.7.3.

with applied():
    loss = model.forward_kld(images)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from normflows.transforms import Shift
from torch import Tensor


def forward(self: Shift, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    return _moved(z, -self.shift)


def inverse(self: Shift, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    return _moved(z, self.shift)


def _moved(z: Tensor, by: float) -> tuple[Tensor, Tensor]:
    x = z + by
    return x, x.new_zeros(len(x))  # of the dtype that bytes have after it


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into normflows, and takes them out again."""
    with patch.multiple(Shift, forward=forward, inverse=inverse):
        yield
