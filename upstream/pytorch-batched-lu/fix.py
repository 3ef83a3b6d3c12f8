r"""Factorisations by LU one matrix at a time, for torch 2.13 with MKL.

    with applied():
        inverses = torch.linalg.inv(weights)  # (16, 192, 192)

What the C++ should do instead is told in the README; this serves until then.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

#: Functions of one matrix that factorise it by LU.
FUNCTIONS = ("inv", "lu_factor", "slogdet", "det")

#: Columns from which on LAPACK swaps rows in a threaded way; batches of 96 come back.
LARGE = 97


def one_by_one(function: Callable) -> Callable:
    r"""A function of matrices (*, n, n), which sees one large matrix at a time on a CPU."""

    @wraps(function)
    def ours(A: Tensor, *args: Any, **options: Any) -> Any:
        batch = A.shape[:-2]
        if A.device.type != "cpu" or batch.numel() < 2 or A.shape[-1] < LARGE or "out" in options:
            return function(A, *args, **options)
        each = [function(a, *args, **options) for a in A.flatten(0, -3)]
        if isinstance(each[0], Tensor):
            return _stacked(each, batch)
        parts = (_stacked(part, batch) for part in zip(*each, strict=True))
        return type(each[0])(parts)

    return ours


def _stacked(parts: Any, batch: torch.Size) -> Tensor:
    return torch.stack(list(parts)).unflatten(0, batch)


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the functions into `torch.linalg`, and takes them out again."""
    with ExitStack() as stack:
        for name in FUNCTIONS:
            ours = one_by_one(getattr(torch.linalg, name))
            stack.enter_context(patch.object(torch.linalg, name, ours))
        yield
