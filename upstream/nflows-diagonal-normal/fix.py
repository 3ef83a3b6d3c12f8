r"""A mean and samples of nflows' `DiagonalNormal`, for nflows 0.14 and glasflow 0.4.1.

with applied():
    samples = Flow(transform, DiagonalNormal([8])).sample(1000)
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

COPIES = tuple(name for name in ("nflows", "glasflow") if find_spec(name))


def mean(self: Any, context: Tensor | None) -> Tensor:
    r"""The method `_mean`: a row for each of the context, which is ignored else."""
    one = self.mean_.view(self._shape)
    return one if context is None else one.expand(len(context), *self._shape)


def sample(self: Any, num_samples: int, context: Tensor | None) -> Tensor:
    r"""The method `_sample`, of shape (num_samples, ...), or (context, num_samples, ...)."""
    rows = (num_samples,) if context is None else (len(context), num_samples)
    noise = torch.randn(*rows, *self._shape, dtype=self.mean_.dtype, device=self.mean_.device)
    return self.mean_.view(self._shape) + self.log_std_.view(self._shape).exp() * noise


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into the copies of nflows that are installed, and takes them out again."""
    with ExitStack() as stack:
        for copy in COPIES:
            root = "glasflow.nflows" if copy == "glasflow" else copy
            made = import_module(f"{root}.distributions.normal").DiagonalNormal
            stack.enter_context(patch.object(made, "_mean", mean))
            stack.enter_context(patch.object(made, "_sample", sample))
        yield
