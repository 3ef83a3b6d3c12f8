r"""What nflows' conditional bases become when a flow is made robust: the same networks, with bounded
means and scales.
"""

__all__ = [
    "BoundedDiagonalNormal",
    "BoundedMADE",
    "BoundedMADEMoG",
    "base_sites",
    "bounded_base",
    "farthest",
    "why_kept",
]

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from flowguard.bounds import Noise, Refused, Step, constant, departure
from flowguard.migration import Site, Surgeon
from flowguard.migration.exchange import successor
from flowguard.migration.moments import BoundedMoments, MomentsSite
from flowguard.numerics import instead

from .host import CANDIDATES, part

ConditionalDiagonalNormal: Any = part("distributions.normal").ConditionalDiagonalNormal
MADEMoG: Any = part("distributions.mixture").MADEMoG
MixtureOfGaussiansMADE: Any = part("nn.nde").MixtureOfGaussiansMADE

#: The bases whose samples no condition reaches.
CONSTANT = ("normal.StandardNormal", "normal.DiagonalNormal", "uniform.BoxUniform")

#: The weight, as a share of the largest, from which on a component of a mixture is met in samples.
LIKELY = 0.01


class BoundedDiagonalNormal(ConditionalDiagonalNormal):
    r"""Creates the normal base with bounded mean and scale that takes the place of one of the host's;
    see :meth:`in_place_of`."""

    moments: BoundedMoments

    @classmethod
    def in_place_of(cls, old: Any, moments: BoundedMoments) -> Any:
        r"""Returns a base with the network of another.

        Arguments:
            old: The host's ``ConditionalDiagonalNormal``.
            moments: The bounds.
        """
        return successor(old, cls, moments=moments)

    def _compute_params(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.moments(*super()._compute_params(context))


class BoundedMADE(MixtureOfGaussiansMADE):
    r"""Creates the network of a mixture, whose means and raw scales are bounded."""

    moments: BoundedMoments

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Returns the logits, means and raw scales, with shape :math:`(N, D K 3)`."""
        logits, mean, raw = split(self, super().forward(inputs, context))
        return torch.stack((logits, *self.moments(mean, raw)), dim=-1).flatten(1)


class BoundedMADEMoG(MADEMoG):
    r"""Creates the mixture of normal bases with bounded means and scales that takes the place of one
    of the host's; see :meth:`in_place_of`."""

    @classmethod
    def in_place_of(cls, old: Any, moments: BoundedMoments) -> Any:
        r"""Returns a base with the network of another.

        Arguments:
            old: The host's ``MADEMoG``.
            moments: The bounds, for each feature and component; those of the log-scale are of what
                the network says about the scale.
        """
        return successor(old, cls, _made=successor(old._made, BoundedMADE, moments=moments))


def split(made: Any, outputs: Tensor) -> tuple[Tensor, ...]:
    r"""Returns logits, means and raw scales, each with shape :math:`(N, D, K)`.

    Arguments:
        made: The network of a mixture.
        outputs: What it said.
    """
    return outputs.unflatten(1, (made.features, made.num_mixture_components, 3)).unbind(-1)


def scale_of(made: Any, raw: Tensor) -> Tensor:
    r"""Returns the scale of a mixture's components.

    Arguments:
        made: The network.
        raw: What it says about them.
    """
    return F.softplus(raw) + made.epsilon


class _Normal(MomentsSite):
    r"""The conditional normal base."""

    @contextmanager
    def listen(self) -> Iterator[None]:
        compute = self.layer._compute_params

        def hear(context: Any) -> Any:
            moments = compute(context)
            self.tell(*moments)
            return moments

        with instead(self.layer, "_compute_params", hear):
            yield

    def bounded(self, bounds: BoundedMoments) -> nn.Module:
        return BoundedDiagonalNormal.in_place_of(self.layer, bounds)


class _Mixture(MomentsSite):
    r"""The conditional mixture, whose raw scales stand for the logarithms of its scales."""

    @contextmanager
    def listen(self) -> Iterator[None]:
        made = self.layer._made
        forward = made.forward  # its density calls this method, and not the module

        def hear(*args: Any, **kwargs: Any) -> Tensor:
            output: Tensor = forward(*args, **kwargs)
            self.tell(*split(made, output)[1:])
            return output

        with instead(made, "forward", hear):
            yield

    def bounded(self, bounds: BoundedMoments) -> nn.Module:
        return BoundedMADEMoG.in_place_of(self.layer, bounds)


SITES: dict[str, type[MomentsSite]] = {
    "normal.ConditionalDiagonalNormal": _Normal,
    "mixture.MADEMoG": _Mixture,
}


def _name(base: Any) -> str:
    r"""The name of a base's class within the distributions of its host; empty if it is of none."""
    cls = type(base)
    for host in CANDIDATES:
        prefix = f"{host}.distributions."
        if cls.__module__.startswith(prefix):
            return f"{cls.__module__.removeprefix(prefix)}.{cls.__qualname__}"
    return ""


def base_sites(operation: Surgeon) -> list[Site]:
    r"""Returns the sites of the conditional bases that can be bounded.

    Arguments:
        operation: The surgeon, whose model it is.
    """
    return [
        SITES[_name(m)](operation, name, m)
        for name, m in operation.model.named_modules()
        if _name(m) in SITES
    ]


def why_kept(base: Any) -> str:
    r"""Says why a base is kept; empty if it is one to replace, or one that no condition reaches.

    Arguments:
        base: The base of a flow.
    """
    if type(base) in (BoundedDiagonalNormal, BoundedMADEMoG):
        return "bounded already"
    if _name(base) in (*CONSTANT, *SITES) or not isinstance(base, nn.Module):
        return ""
    if type(base).__module__.partition(".")[0] == "flowguard":
        return ""
    return "flowguard does not know how the condition reaches its noise"


def bounded_base(name: str, base: Any) -> Iterator[Step]:
    r"""The steps of a base that was bounded.

    Arguments:
        name: The name of the base.
        base: The base.
    """
    kind = type(base).__name__
    mixed = isinstance(base, BoundedMADEMoG)
    why = departure(base, BoundedMADEMoG if mixed else BoundedDiagonalNormal)
    if why := why or (departure(base._made, BoundedMADE) if mixed else ""):
        yield Refused(name=name, kind=kind, reason=why)
    elif not mixed:
        size = base._shape.numel()
        yield Noise(name=name, kind=kind, size=size, event=size)
        yield from base.moments.steps(name, kind)
    else:
        made = base._made
        yield Noise(name=name, kind=kind, size=made.features, event=made.features)
        yield from worst_component(made).steps(name, kind)


def farthest(made: Any, z: Tensor, context: Tensor | None) -> Tensor:
    r"""Returns what a mixture makes of noise, feature after feature, by those of its likely
    components that lie farthest out.

    Arguments:
        made: The network of a mixture.
        z: The noise, with shape :math:`(N, D)`.
        context: The context, or :py:`None`.
    """
    features: list[Tensor] = []
    rest = torch.zeros_like(z)
    for i in range(made.features):
        x = torch.cat((*features, rest[:, i:]), dim=1)
        logits, mean, raw = (t[:, i] for t in split(made, made.forward(x, context)))
        values = mean + scale_of(made, raw) * z[:, i : i + 1]
        likely = logits >= logits.amax(1, keepdim=True) + math.log(LIKELY)
        chosen = torch.where(likely, values.abs(), -1.0).argmax(1, keepdim=True)
        features.append(values.gather(1, chosen))
    return torch.cat(features, dim=1)


def worst_component(made: BoundedMADE) -> BoundedMoments:
    r"""Returns bounds that hold for all components of each feature, of scales themselves.

    Arguments:
        made: The network of a mixture.
    """
    moments = made.moments
    mean, room = constant(moments.mean), constant(moments.mean_room)
    low, high = (mean - room).amin(-1), (mean + room).amax(-1)
    widest = scale_of(made, moments.largest.amax(-1)).log()
    middle = (low + high) / 2
    return BoundedMoments(middle, (high - low) / 2, widest, torch.zeros_like(widest))
