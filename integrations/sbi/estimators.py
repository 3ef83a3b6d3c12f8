r"""Where the flows are in sbi's posteriors and estimators, and how others are put there.

A posterior holds its estimator twice or more: as an attribute, in its potential, in what it has
cached. All of these become the new one here, in a copy.
"""

__all__ = ["FLOWS", "Ensemble", "estimators", "flow_of", "parts", "with_estimators"]

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from sbi.neural_nets.estimators import NFlowsFlow, ZukoFlow, ZukoUnconditionalFlow
from torch import Tensor, nn

from flowguard.hosts import Opened, opened

#: sbi's estimators that are a flow of a host, which they call ``net``.
FLOWS = (NFlowsFlow, ZukoFlow, ZukoUnconditionalFlow)

#: What posteriors remember of their estimator, or of what was sampled with it, with what they
#: start from.
REMEMBERED = (
    "_leakage_density_correction_factor",
    "_map",
    "_mcmc_init_params",
    "_normalization_constant",
    "_posterior_sampler",
    "_trained_on",
)


def estimators(model: Any) -> list[nn.Module]:
    r"""Returns the estimators of a posterior, in the order of an ensemble; of an estimator, itself.

    A posterior of NPE has one of the posterior, which is what samples; one of NLE or NRE an
    estimator of the likelihood or of a ratio, in its potential.

    Arguments:
        model: One of sbi's posteriors or estimators.

    Raises:
        TypeError: If there is no estimator, as in a posterior with a potential of the user's own.

    Example:
        >>> from sbi.inference.posteriors import DirectPosterior
        >>> from sbi.neural_nets import posterior_nn
        >>> from sbi.utils import BoxUniform
        >>> theta, x = torch.rand(2, 50, 3)
        >>> estimator = posterior_nn("maf")(theta, x)
        >>> posterior = DirectPosterior(estimator, BoxUniform(torch.zeros(3), torch.ones(3)))
        >>> estimators(posterior)[0] is estimator
        True
    """
    if isinstance(model, nn.Module):
        return [model]
    found = {
        id(part): part
        for potential in _potentials(getattr(model, "potential_fn", None))
        for name, part in getattr(potential, "__dict__", {}).items()
        if name.endswith("estimator") and isinstance(part, nn.Module)
    }
    if not found:
        kind = type(getattr(model, "potential_fn", model)).__name__
        raise TypeError(
            "a posterior must hold an estimator of sbi's, such as those of NPE do; got a"
            f" {type(model).__name__} with a {kind}: give the flow itself"
        )
    return list(found.values())


def _potentials(potential: Any) -> list[Any]:
    return list(getattr(potential, "potential_fns", (potential,)))


def flow_of(estimator: nn.Module) -> nn.Module:
    r"""Returns the flow of nflows or zuko that an estimator is made of.

    Arguments:
        estimator: One of sbi's estimators.

    Raises:
        TypeError: If it is made of something else, such as a mixture or a classifier.

    Example:
        >>> from sbi.neural_nets import posterior_nn
        >>> type(flow_of(posterior_nn("maf")(*torch.rand(2, 50, 3)))).__module__
        'nflows.flows.base'
    """
    if not isinstance(estimator, FLOWS):
        raise TypeError(
            "the estimator must be a flow, one of"
            f" {', '.join(cls.__name__ for cls in FLOWS)}; got a {type(estimator).__name__}"
        )
    return estimator.net


def with_estimators(posterior: Any, new: Sequence[nn.Module]) -> Any:
    r"""Returns a copy of a posterior with other estimators: of the same class, with the same prior,
    default observation, device and options. What it remembered of the old ones is forgotten; a
    variational posterior has to be trained again.

    Arguments:
        posterior: One of sbi's posteriors, which is not changed.
        new: The new estimators, in the order of :func:`estimators`.

    Raises:
        TypeError: If the posterior holds no estimator.
        ValueError: If there are not as many as it holds.

    Example:
        >>> from sbi.inference.posteriors import DirectPosterior
        >>> from sbi.neural_nets import posterior_nn
        >>> from sbi.utils import BoxUniform
        >>> theta, x = torch.rand(2, 50, 3)
        >>> estimator = posterior_nn("maf")(theta, x)
        >>> posterior = DirectPosterior(estimator, BoxUniform(torch.zeros(3), torch.ones(3)))
        >>> other = with_estimators(posterior, [posterior_nn("nsf")(theta, x)])
        >>> type(other) is type(posterior), estimators(posterior)[0] is estimator
        (True, True)
    """
    old = estimators(posterior)
    if len(old) != len(new):
        raise ValueError(
            f"there must be a new estimator for each of the {len(old)} of the"
            f" {type(posterior).__name__}; got {len(new)}"
        )
    # Wherever the copy refers to an old one, there is the new one.
    memo: dict[int, Any] = {id(a): b for a, b in zip(old, new, strict=True)}
    result = copy.deepcopy(posterior, memo)
    for part in parts(result):
        for name in REMEMBERED:
            if name in vars(part):
                setattr(part, name, None)
    return result


def parts(posterior: Any) -> Iterator[Any]:
    r"""Goes over a posterior and those in it: the members of an ensemble, and proposals.

    Arguments:
        posterior: One of sbi's posteriors.
    """
    yield posterior
    for part in (*getattr(posterior, "posteriors", ()), getattr(posterior, "proposal", None)):
        if isinstance(part, NeuralPosterior):
            yield from parts(part)


class Ensemble(nn.Module):
    r"""Creates the mixture that the estimators of an ensemble are.

    Arguments:
        estimators: The estimators.
        weights: The weight of each.
    """

    def __init__(self, estimators: Sequence[nn.Module], weights: Tensor) -> None:
        super().__init__()
        self.estimators = nn.ModuleList(estimators)
        self.weights = weights

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        r"""Returns the log-density of the mixture, as sbi's estimators do.

        Arguments:
            input: The inputs, with shape :math:`(S, N, *)`.
            condition: The conditions, with shape :math:`(N, *)`.
        """
        each = [e.log_prob(input, condition) for e in self.estimators]  # type: ignore[operator]
        weights = self.weights.to(each[0])
        return torch.logsumexp(torch.stack(each, -1) + weights.log(), dim=-1)


@opened.register
def _(posterior: NeuralPosterior) -> Opened:
    found = estimators(posterior)
    if len(found) == 1:
        return Opened(found[0], lambda new: with_estimators(posterior, [new]))
    weights = getattr(posterior, "weights", torch.full((len(found),), 1 / len(found)))
    ensemble = Ensemble(found, weights)
    return Opened(ensemble, lambda new: with_estimators(posterior, list(new.estimators)))
