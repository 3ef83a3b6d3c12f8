r"""An inverse of zuko's spline without NaN, for zuko 1.6.0.

with applied():
    samples = flow(c).sample((1000,))
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from zuko.transforms import MonotonicRQSTransform


def inverse(self: MonotonicRQSTransform, y: Tensor) -> Tensor:
    r"""The method `_inverse`: the place z in the bin of y is a root of az² + bz + c."""
    inside, x0, x1, y0, y1, d0, d1, s = self.bin(self.searchsorted(self.vertical, y) - 1)

    u = inside * (y - y0)
    bend = d0 + d1 - 2 * s
    a = (y1 - y0) * (s - d0) + u * bend
    b = (y1 - y0) * d0 - u * bend
    c = -s * u

    # It is never negative but by rounding, at a flat knot that ends a steep bin. Not zero, as the
    # gradient of the root would be 0 · ∞ there.
    discriminant = (b**2 - 4 * a * c).clamp(min=torch.finfo(a.dtype).tiny)
    # In [0, 1] but by rounding: what leaves its bin may leave the box, too.
    z = (2 * c / (-b - discriminant.sqrt())).clamp(0, 1)

    return torch.where(inside, x0 + z * (x1 - x0), y)


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the method into zuko, and takes it out again."""
    with patch.object(MonotonicRQSTransform, "_inverse", inverse):
        yield
