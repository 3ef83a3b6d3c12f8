r"""How sbi's estimators and posteriors are bounded, for :func:`flowguard.certify`, and sampled, for
attacks.

A direct posterior is bounded as its estimator is: it draws from it, and rejects some. Those that
sample by other means are refused, as what bounds the flow says nothing of their samples.
"""

__all__: list[str] = []

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from sbi.inference.posteriors import (
    DirectPosterior,
    EnsemblePosterior,
    ImportanceSamplingPosterior,
    MCMCPosterior,
    RejectionPosterior,
    VIPosterior,
)
from sbi.neural_nets.estimators import NFlowsFlow, ZukoFlow
from sbi.utils.sbiutils import CallableTransform
from torch import Tensor

from flowguard.bounds import Certificate, Noise, Refused, Step, certify, rule, steps, within
from flowguard.bounds.attack import Sampler, Tensors, sampler
from flowguard.bounds.regions import Region

from .estimators import FLOWS, Ensemble, estimators
from .guard import GuardedPosterior, guarded_class, unguarded_view

SAMPLING_ONLY = "an estimator is bounded in its sampling direction only"


@rule(*FLOWS)
def _estimator(estimator: Any, sampling: bool) -> Iterator[Step]:
    if sampling:
        yield from within("net", estimator.net)
    else:
        yield Refused(reason=SAMPLING_ONLY)


@rule(CallableTransform)
def _transform_of_prior(constructor: Any, sampling: bool) -> Iterator[Step]:
    r"""What ``z_score_theta="transform_to_unconstrained"`` puts before a flow."""
    yield from steps(constructor(), sampling)


@rule(DirectPosterior)
def _direct(posterior: Any, sampling: bool) -> Iterator[Step]:
    yield from within("posterior_estimator", posterior.posterior_estimator)


@rule(ImportanceSamplingPosterior, MCMCPosterior, RejectionPosterior, VIPosterior)
def _otherwise(posterior: Any, sampling: bool) -> Iterator[Step]:
    (estimator, *_) = estimators(posterior)
    kind = type(estimator).__name__
    if isinstance(estimator, FLOWS):
        reason = (
            "its samples do not come from the flow, so that what bounds this does not bound them:"
            f" certify its {kind}, which flowguard.integrations.sbi.estimators(posterior) finds"
        )
    else:
        reason = f"it samples by means of a {kind}, which bounds nothing"
    yield Refused(reason=reason)


@rule(EnsemblePosterior)
def _ensemble_posterior(posterior: Any, sampling: bool) -> Iterator[Step]:
    yield from _any("posteriors", posterior.posteriors)


@rule(GuardedPosterior)
def _guarded(posterior: Any, sampling: bool) -> Iterator[Step]:
    r"""A guard chooses what the flow is conditioned on, and the bound holds for every condition."""
    plain = unguarded_view(posterior)
    if type(posterior) is not guarded_class(type(plain)):  # type: ignore[arg-type]
        yield Refused(
            reason="its class is derived from that of a guarded posterior, and overrides it"
        )
        return
    yield from steps(plain, sampling)


@rule(Ensemble)
def _ensemble(ensemble: Ensemble, sampling: bool) -> Iterator[Step]:
    yield from _any("estimators", list(ensemble.estimators))


@dataclass(frozen=True, kw_only=True, eq=False)
class Either(Step):
    r"""What draws each sample from one of several flows, from noise to data in a single step.

    Arguments:
        members: The certificates of the flows.
    """

    members: tuple[Certificate, ...]

    def through(self, region: Region, radius: float, roundoff: float) -> Region:
        r"""Returns a cube that holds the samples of all members."""
        bounds = [
            # The whole decides what it can hold.
            replace(c, roundoff=max(c.roundoff, roundoff), largest=math.inf).bound(radius)
            for c in self.members
        ]
        return Region.cube(torch.full_like(region.box, max(bounds)))


def _any(name: str, members: list[Any]) -> Iterator[Step]:
    r"""The steps of what draws each sample from one of its members."""
    parts = [within(f"{name}.{i}", member) for i, member in enumerate(members)]
    if refused := [step for steps in parts for step in steps if isinstance(step, Refused)]:
        yield from refused
        return
    certificates = tuple(certify(member) for member in members)
    noises = [step for steps in parts for step in steps if isinstance(step, Noise)]
    sizes = {certificate.event_size for certificate in certificates}
    event = sizes.pop() if len(sizes) == 1 else None
    normal = all(noise.normal for noise in noises)
    yield Noise(name=name, size=event or 1, event=event, normal=normal)
    yield Either(name=name, members=certificates, depends="as its members do")


@sampler.register(NFlowsFlow)
def _sample_nflows(model: Any, context: Tensors) -> tuple[Sampler, Tensors]:
    return sampler(model.net, context)


@sampler.register(ZukoFlow)
def _sample_zuko(model: Any, context: Tensors) -> tuple[Sampler, Tensors]:
    with torch.no_grad():
        draw, noise = sampler(model.net, model.embedding_net(context))
    return lambda z, y: draw(z, model.embedding_net(y)), noise


@sampler.register(Ensemble)
def _sample_ensemble(model: Ensemble, context: Tensors) -> tuple[Sampler, Tensors]:
    draws, noises = zip(*(sampler(e, context) for e in model.estimators), strict=True)

    def draw(z: list[Tensor], y: Tensors) -> Tensor:
        return torch.stack([draw(n, y) for draw, n in zip(draws, z, strict=True)], dim=1)

    return draw, list(noises)
