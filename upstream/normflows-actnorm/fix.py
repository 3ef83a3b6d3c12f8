r"""An `ActNorm` whose flag stays where it is and that evaluation leaves alone, for normflows 1.7.3.

with applied():
    model.eval()
    samples, log_q = model.sample(1)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from normflows.flows import ActNorm
from normflows.flows.affine.coupling import AffineConstFlow
from torch import Tensor


def forward(self: ActNorm, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    if _is_due(self, z):
        scale = _deviation(self, z)
        self.s.data.copy_(-scale.log())
        self.t.data.copy_(-z.mean(self.batch_dims, keepdim=True) / scale)
        self.data_dep_init_done.fill_(1)
    return AffineConstFlow.forward(self, z)


def inverse(self: ActNorm, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
    if _is_due(self, z):
        self.s.data.copy_(_deviation(self, z).log())
        self.t.data.copy_(z.mean(self.batch_dims, keepdim=True))
        self.data_dep_init_done.fill_(1)
    return AffineConstFlow.inverse(self, z)


def _is_due(self: ActNorm, z: Tensor) -> bool:
    r"""Whether this batch initialises: the first in training that has a deviation at all."""
    if not self.training or self.data_dep_init_done > 0:
        return False
    values = 1
    for dim in self.batch_dims:
        values *= z.shape[dim]
    return values > 1


def _deviation(self: ActNorm, z: Tensor) -> Tensor:
    return z.detach().std(self.batch_dims, keepdim=True) + 1e-6


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into normflows, and takes them out again."""
    with patch.multiple(ActNorm, forward=forward, inverse=inverse):
        yield
