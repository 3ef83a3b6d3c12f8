r"""What flows make of a condition."""

__all__ = ["Answer", "Partner", "answer", "partners"]

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowguard.bounds import certify
from flowguard.demo.run import Judged, artefact_mask
from flowguard.models import SuperResolutionFlow
from flowguard.models.base import ImageModel
from flowguard.ood import OODReport

from . import words


@dataclass(frozen=True)
class Partner:
    r"""A model that answers, under the name that it is shown by.

    Arguments:
        name: The name.
        model: The model.
        certificate: Its certificate, as a line.
        precision: What its networks compute in; :py:`None` for what they are saved in.
    """

    name: str
    model: ImageModel
    certificate: str
    precision: Any = None


@dataclass(frozen=True)
class Answer(Judged):
    r"""What a model made of a condition, and what its guard said."""

    report: OODReport | None
    seconds: float


def partners(
    robust: ImageModel, affine: ImageModel | None = None, precision: str | None = None
) -> list[Partner]:
    r"""Returns the models that answer: the affine one and the same behind ``"shrink"``, if there
    is one, and the robust one.

    The guards of all of them report; none warns or raises.

    Arguments:
        robust: The robust model, which keeps the policy ``"shrink"`` if it has it.
        affine: Its affine partner.
        precision: What the networks compute in.

    Example:
        >>> from flowguard.models import SuperResolutionFlow
        >>> robust = SuperResolutionFlow(levels=1, steps=1, hidden=8, features=8)
        >>> [partner.name for partner in partners(robust)]
        ['robust']
    """
    found = []
    if affine is not None:
        found.append(_partner("affine", affine, "report", precision))
        if affine.conditioner.calibrated:
            guarded = copy.deepcopy(affine)
            found.append(_partner("affine, its guard shrinks", guarded, "shrink", precision))
    shrinks = robust.conditioner.policy == "shrink" and robust.conditioner.calibrated
    name, policy = ("robust, its guard shrinks", "shrink") if shrinks else ("robust", "report")
    return [*found, _partner(name, robust, policy, precision)]


def _partner(name: str, model: ImageModel, policy: Any, precision: str | None) -> Partner:
    model.eval().conditioner.policy = policy
    added = isinstance(model, SuperResolutionFlow) and model.residual and model.margin is None
    return Partner(name, model, words.certificate(certify(model), added=added), precision)


@torch.no_grad()
def answer(partner: Partner, condition: Tensor, temperature: float, seed: int = 0) -> Answer:
    r"""Returns what a model makes of a condition.

    Arguments:
        partner: The model.
        condition: The condition, with shape :math:`(3, H, W)`.
        temperature: The standard deviation of the noise.
        seed: The seed of the noise: it is the same for all models whose latents have one shape.

    Returns:
        The answer, on the CPU, of which `sample` has shape :math:`(1, 3, sH, sW)`.

    Example:
        >>> from flowguard.models import SuperResolutionFlow
        >>> (robust,) = partners(SuperResolutionFlow(levels=1, steps=1, hidden=8, features=8))
        >>> made = answer(robust, torch.rand(3, 16, 20), temperature=0.8)
        >>> made.sample.shape, made.share
        (torch.Size([1, 3, 64, 80]), 0.0)
    """
    model, start = partner.model, time.perf_counter()
    parameter = next(model.parameters())
    y = condition[None].to(parameter.device, parameter.dtype)
    generator = torch.Generator(device=y.device).manual_seed(seed)
    x = model.sample(y, 1, temperature, generator, tile="auto", precision=partner.precision)[0]
    report = model.conditioner.report if model.conditioner.calibrated else None
    x = x.float().cpu()
    return Answer(x, artefact_mask(x, y.float().cpu()), report, time.perf_counter() - start)
