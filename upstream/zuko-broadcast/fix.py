r"""Affine flows and couplings that broadcast an input against many conditions, for zuko 1.6.0.

with applied():
    flow(c).log_prob(x)  # x of shape (features,), c of shape (7, context): shape (7,)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Size, Tensor
from zuko.transforms import AdditiveTransform, CouplingTransform, MonotonicAffineTransform


def affine_ladj(self: MonotonicAffineTransform, x: Tensor, y: Tensor) -> Tensor:
    return self.log_scale.expand(torch.broadcast_shapes(self.log_scale.shape, x.shape))


def additive_ladj(self: AdditiveTransform, x: Tensor, y: Tensor) -> Tensor:
    return x.new_zeros(torch.broadcast_shapes(self.shift.shape, x.shape))


def merge(self: CouplingTransform, x_a: Tensor, x_b: Tensor, shape: Size) -> Tensor:
    r"""The method `merge`: what was transformed may have the larger batch, that of the context."""
    batch = torch.broadcast_shapes(x_a.shape[:-1], x_b.shape[:-1])
    x = x_b.new_empty(*batch, shape[-1])
    x[..., self.idx_a] = x_a
    x[..., self.idx_b] = x_b
    return x


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into zuko, and takes them out again."""
    name = "log_abs_det_jacobian"
    with (
        patch.object(MonotonicAffineTransform, name, affine_ladj),
        patch.object(AdditiveTransform, name, additive_ladj),
        patch.object(CouplingTransform, "merge", merge),
    ):
        yield
