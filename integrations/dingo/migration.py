r"""How dingo's models are made robust, for :func:`flowguard.migrate`: by who knows their flow."""

__all__: list[str] = []

from typing import Any

from dingo.core.nn.nsf import FlowWrapper
from torch import Tensor

from flowguard.migration import Surgeon, surgeon
from flowguard.migration.wrapped import Wrapped

from .embedding import contexts, embedded


def _log_prob(model: Any, x: Tensor, context: Any) -> Tensor:
    density: Tensor = model.log_prob(x, *contexts(context))
    return density


@surgeon.register(FlowWrapper)
def _(model: Any) -> Surgeon:
    return Wrapped(model, ["flow"], _log_prob, embedded)
