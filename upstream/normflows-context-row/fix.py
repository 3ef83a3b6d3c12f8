r"""Many samples for one condition, for normflows 1.7.3.

with applied():
    samples, log_q = model.sample(1000, context=x)  # x of shape (1, ...)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from normflows import ConditionalNormalizingFlow
from torch import Tensor


def rows(context: Any, num_samples: int) -> Any:
    r"""The context with a row for each sample: a single row counts for all."""
    if isinstance(context, Tensor) and context.dim() > 0:
        if len(context) == 1:
            return context.expand(num_samples, *context.shape[1:])
        if len(context) != num_samples:
            raise ValueError(
                f"context must have one row, or one for each of the {num_samples} samples; "
                f"got {len(context)}"
            )
    return context


def repeating(released: Callable) -> Callable:
    r"""A method that takes a number of samples and a context."""

    def method(
        self: Any, num_samples: int = 1, context: Any = None, *args: Any, **options: Any
    ) -> Any:
        return released(self, num_samples, rows(context, num_samples), *args, **options)

    return method


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into normflows, and takes them out again."""
    made = ConditionalNormalizingFlow
    ours = {name: repeating(getattr(made, name)) for name in ("sample", "reverse_kld")}
    with patch.multiple(made, **ours):
        yield
