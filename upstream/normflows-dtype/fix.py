r"""Determinants in the dtype, and on the device, of the data, for normflows 1.7.3.

with applied():
    loss = model.double().forward_kld(x)
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from normflows import ConditionalNormalizingFlow, NormalizingFlow
from normflows.flows import Composite
from torch import Tensor

Result = tuple[Tensor, Tensor]


def cascade(inputs: Tensor, funcs: Iterable) -> Result:
    r"""The static method `_cascade` of `Composite`."""
    log_det = inputs.new_zeros(len(inputs))
    for func in funcs:
        inputs, by = func(inputs)
        log_det = log_det + by
    return inputs, log_det


def forward_and_log_det(self: NormalizingFlow, z: Tensor) -> Result:
    return cascade(z, self.flows)


def inverse_and_log_det(self: NormalizingFlow, x: Tensor) -> Result:
    return cascade(x, (flow.inverse for flow in reversed(self.flows)))


def forward_kld(self: NormalizingFlow, x: Tensor) -> Tensor:
    return -self.log_prob(x).mean()


def conditional_forward_and_log_det(
    self: ConditionalNormalizingFlow, z: Tensor, context: Tensor | None = None
) -> Result:
    return cascade(z, (_given(flow, context) for flow in self.flows))


def conditional_inverse_and_log_det(
    self: ConditionalNormalizingFlow, x: Tensor, context: Tensor | None = None
) -> Result:
    return cascade(x, (_given(flow.inverse, context) for flow in reversed(self.flows)))


def conditional_forward_kld(
    self: ConditionalNormalizingFlow, x: Tensor, context: Tensor | None = None
) -> Tensor:
    return -self.log_prob(x, context).mean()


def _given(func: torch.nn.Module, context: Tensor | None):
    return lambda z: func(z, context=context)


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into normflows, and takes them out again."""
    methods = {
        NormalizingFlow: (forward_and_log_det, inverse_and_log_det, forward_kld),
        ConditionalNormalizingFlow: (
            conditional_forward_and_log_det,
            conditional_inverse_and_log_det,
            conditional_forward_kld,
        ),
    }
    with ExitStack() as stack:
        stack.enter_context(patch.object(Composite, "_cascade", staticmethod(cascade)))
        for made, ours in methods.items():
            for method in ours:
                name = method.__name__.removeprefix("conditional_")
                stack.enter_context(patch.object(made, name, method))
        yield
