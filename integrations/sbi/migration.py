r"""How sbi's estimators are made robust, for :func:`flowguard.migrate`: by who knows their flow."""

__all__: list[str] = []

from typing import Any

from sbi.neural_nets.estimators import NFlowsFlow, ZukoFlow, ZukoUnconditionalFlow
from torch import Tensor

from flowguard.migration import Surgeon, surgeon
from flowguard.migration.wrapped import Wrapped

from .estimators import Ensemble


def _log_prob(model: Any, x: Tensor, context: Any) -> Tensor:
    _check(model, x, context)
    density: Tensor = model.log_prob(x.unsqueeze(0), context)
    return density[0]


def _check(model: Any, x: Tensor, context: Any) -> None:
    r"""Refuses pairs that are not those of the estimator, above all the other way round."""
    one: Any = next(iter(model.estimators)) if isinstance(model, Ensemble) else model
    wanted = one.input_shape, one.condition_shape
    given = x.shape[1:], getattr(context, "shape", (0,))[1:]
    if given != wanted:
        raise ValueError(
            f"this estimator is of data of shape {tuple(wanted[0])} given contexts of shape"
            f" {tuple(wanted[1])}; got {tuple(given[0])} and {tuple(given[1])}: give parameters and"
            " observations for a posterior, migrate(posterior, theta, x), and the other way round"
            " for a likelihood"
        )


@surgeon.register(NFlowsFlow)
def _(model: Any) -> Surgeon:
    # The flow embeds its contexts itself.
    return Wrapped(model, ["net"], _log_prob, embed=lambda model, context: context)


@surgeon.register(ZukoFlow)
def _(model: Any) -> Surgeon:
    return Wrapped(
        model, ["net"], _log_prob, embed=lambda model, context: model.embedding_net(context)
    )


@surgeon.register(ZukoUnconditionalFlow)
def _(model: Any) -> Surgeon:
    return Wrapped(model, ["net"], lambda model, x, context: model.log_prob(x))


@surgeon.register(Ensemble)
def _(model: Any) -> Surgeon:
    names = [f"estimators.{i}" for i in range(len(model.estimators))]
    return Wrapped(model, names, _log_prob)
