r"""How dingo's models are bounded, for :func:`flowguard.certify`, and sampled, for attacks."""

__all__: list[str] = []

from collections.abc import Iterator
from typing import Any

import torch
from dingo.core.nn.nsf import FlowWrapper

from flowguard.bounds import Step, rule, within
from flowguard.bounds.attack import Sampler, Tensors, sampler

from .embedding import embedded


@rule(FlowWrapper)
def _wrapper(model: Any, sampling: bool) -> Iterator[Step]:
    yield from within("flow", model.flow, sampling)


@sampler.register(FlowWrapper)
def _sample(model: Any, context: Tensors) -> tuple[Sampler, Tensors]:
    with torch.no_grad():
        draw, noise = sampler(model.flow, embedded(model, context))
    return lambda z, y: draw(z, embedded(model, y)), noise
