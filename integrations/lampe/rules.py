r"""How lampe's estimators are bounded, for :func:`flowguard.certify`, and sampled, for attacks."""

__all__: list[str] = []

from collections.abc import Iterator
from typing import Any

from lampe.inference import NPE

from flowguard.bounds import Step, rule, within
from flowguard.bounds.attack import Sampler, Tensors, sampler


@rule(NPE)
def _npe(npe: Any, sampling: bool) -> Iterator[Step]:
    yield from within("flow", npe.flow, sampling)


@sampler.register(NPE)
def _sample(npe: Any, context: Tensors) -> tuple[Sampler, Tensors]:
    return sampler(npe.flow, context)
