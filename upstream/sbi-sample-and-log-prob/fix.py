r"""Samples of several conditions in their own rows, for sbi 0.27.0.

with applied():
    samples, log_probs = estimator.sample_and_log_prob((1000,), x)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from sbi.neural_nets.estimators import NFlowsFlow
from torch import Tensor


def sample_and_log_prob(
    self: NFlowsFlow, sample_shape: torch.Size, condition: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    r"""Samples (*sample_shape, condition_batch_dim, *input_shape), and their log probabilities."""
    rows = len(condition)
    number = torch.Size(sample_shape).numel()
    # Of shape (rows, number, ...): the convention of nflows.
    samples, log_probs = self.net.sample_and_log_prob(number, context=condition)
    samples, log_probs = samples.transpose(0, 1), log_probs.transpose(0, 1)
    return (
        samples.reshape(*sample_shape, rows, *self.input_shape),
        log_probs.reshape(*sample_shape, rows),
    )


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the method into sbi, and takes it out again."""
    with patch.object(NFlowsFlow, "sample_and_log_prob", sample_and_log_prob):
        yield
