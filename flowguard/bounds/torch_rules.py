r"""The rules of torch's own transforms, with constants, of what combines transforms, and of the
modules that hold one other and do nothing but call it.

A transform alone is taken to go from data to noise; a distribution runs its transforms the other
way, as they are called.
"""

__all__ = [
    "affine",
    "after",
    "base_steps",
    "composed",
    "known_bases",
    "permuted",
    "squashed",
    "transformed",
]

import math
from collections.abc import Iterable, Iterator
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    Normal,
    TransformedDistribution,
    transforms,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from flowguard.bounds.holders import steps_within
from flowguard.bounds.regions import Envelope
from flowguard.bounds.rules import departure, envelope, envelope_rule, named, rule, steps, within
from flowguard.bounds.steps import Noise, Permute, Refused, Scale, Step, constant
from flowguard.bounds.univariate import conditional
from flowguard.hosts import load
from flowguard.transforms import InverseTransform

NO_PERMUTATION = "its indices are no permutation"


@rule(nn.DataParallel, DistributedDataParallel, AveragedModel)
def _wrapped(wrapper: Any, sampling: bool) -> Iterator[Step]:
    yield from named("module", steps_within(wrapper.module, sampling))


@rule(nn.Sequential)
def _sequential(stack: nn.Sequential, sampling: bool) -> Iterator[Step]:
    if len(stack) == 1:
        yield from named("0", steps_within(stack[0], sampling))
    else:
        reason = "of a Sequential only that of one flow alone is known: certify the flow in it"
        yield Refused(reason=reason)


#: The classes of normal distributions, and of what makes independent dimensions an event.
_NORMALS: set[type] = {Normal}
_EVENTS: set[type] = {Independent}


def known_bases(normals: Iterable[type] = (), events: Iterable[type] = ()) -> None:
    r"""Registers classes of a host that sample as torch's do.

    Arguments:
        normals: Normal distributions with `loc` and `scale`.
        events: What makes independent dimensions of its `base_dist` an event.
    """
    _NORMALS.update(normals)
    _EVENTS.update(events)


@rule(TransformedDistribution)
def transformed(d: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of a distribution of transforms, from noise to data, with the constants that it has.

    Arguments:
        d: The distribution.
        sampling: Whether it is run towards data.
    """
    if not sampling:
        yield Refused(reason="a distribution is bounded in its sampling direction only")
        return
    yield from base_steps(d.base_dist)
    for i, part in enumerate(d.transforms):
        yield from within(f"transforms.{i}", part, False)


def base_steps(base: Distribution) -> Iterator[Step]:
    r"""The noise of a base whose parameters are constants. Of one that is normal, feature by
    feature, it is standard normal, and refused if its rows differ; of any other one, its samples are
    the noise.

    Arguments:
        base: The base.
    """
    name, kind = "base_dist", type(base).__name__
    shape = base.event_shape or base.batch_shape
    size, event = (shape[-1], shape.numel()) if shape else (1, 1)
    loc = scale = None
    while cls := _known(base):
        if why := departure(base, cls):
            yield Refused(name=name, kind=kind, reason=why)
            return
        if cls in _NORMALS:
            loc, scale = _rows(base.loc), _rows(base.scale)  # type: ignore[attr-defined]
            if loc is None or scale is None:
                reason = "its constants differ from one row of a batch to another"
                yield Refused(name=name, kind=kind, reason=reason)
                return
            break
        base = base.base_dist  # type: ignore[attr-defined]
    if loc is None or scale is None:
        yield Noise(name=name, kind=kind, size=size, event=event, normal=False)
        return
    yield Noise(name=name, kind=kind, size=size, event=event)
    if bool(loc.ne(0).any()) or bool(scale.ne(1).any()):
        yield Scale(name=name, kind=kind, factor=scale, offset=loc)


def _known(base: Distribution) -> type | None:
    r"""The class of normal distributions, or of events, that a base is of or derived from."""
    load(base, "rules")
    return next((c for c in type(base).__mro__ if c in _NORMALS or c in _EVENTS), None)


def _rows(t: Tensor) -> Tensor | None:
    r"""The numbers of the last dimension, if they are the same along all others."""
    if not t.dim():
        return constant(t)
    rows = t.detach().reshape(-1, t.shape[-1])
    same = len(rows) > 0 and bool(rows.eq(rows[:1]).all())
    return constant(rows[0]) if same else None


@rule(transforms.ComposeTransform)
def composed(f: Any, sampling: bool) -> Iterator[Step]:
    r"""The rule of transforms one after another.

    Arguments:
        f: What holds them in its `parts`.
        sampling: Whether they are run towards data, inverted.
    """
    parts = list(enumerate(f.parts))
    for i, part in reversed(parts) if sampling else parts:
        yield from within(f"parts.{i}", part, sampling)


@rule(transforms._InverseTransform, InverseTransform)
def _inverse(f: transforms._InverseTransform, sampling: bool) -> Iterator[Step]:
    yield from steps(f._inv, not sampling)


@rule(transforms.IndependentTransform)
def _independent(f: transforms.IndependentTransform, sampling: bool) -> Iterator[Step]:
    yield from steps(f.base_transform, sampling)


def affine(factor: Tensor, shift: Tensor, sampling: bool) -> Step:
    r"""The step of x -> factor x + shift with constants."""
    if max(factor.dim(), shift.dim()) > 1:
        return Refused(reason="its constants differ from one row of a batch to another")
    if sampling:
        return Scale(factor=1 / factor, offset=-shift / factor)
    return Scale(factor=factor, offset=shift)


def permuted(order: Tensor, sampling: bool = False, name: str = "") -> Step:
    r"""The step of x -> x[order], or of its inverse where it is sampled; refused where the indices
    are no permutation."""
    if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        return Refused(name=name, reason=NO_PERMUTATION, depends="not at all")
    return Permute(name=name, order=torch.argsort(order) if sampling else order)


@rule(transforms.AffineTransform)
def _constant_affine(f: transforms.AffineTransform, sampling: bool) -> Iterator[Step]:
    yield affine(_number(f.scale), _number(f.loc), sampling)


def _number(value: Tensor | float) -> Tensor:
    # A plain number has the dtype of what it is multiplied with, which may be float64.
    return constant(torch.as_tensor(value, dtype=torch.float64))


SQUASHING = (transforms.SigmoidTransform, transforms.TanhTransform)


@rule(*SQUASHING)
def _squash(f: transforms.Transform, sampling: bool) -> Iterator[Step]:
    yield conditional(envelope(f, sampling))


@envelope_rule(*SQUASHING)
def _squash_envelope(f: transforms.Transform, sampling: bool) -> Envelope:
    return Envelope(reason="its inverse has poles") if sampling else squashed(1.0)


def squashed(bound: float) -> Envelope:
    r"""What is known of a map onto an interval.

    Arguments:
        bound: The largest absolute value in it.
    """
    return Envelope(0.0, 0.0, floor=bound, depends="not at all", roundings=4)


@envelope_rule(transforms.ComposeTransform)
def _compose_envelope(f: transforms.ComposeTransform, sampling: bool) -> Envelope:
    parts = [envelope(part, sampling) for part in f.parts]
    return reduce(after, reversed(parts) if sampling else parts)


@envelope_rule(transforms._InverseTransform, InverseTransform)
def _inverse_envelope(f: transforms._InverseTransform, sampling: bool) -> Envelope:
    return envelope(f._inv, not sampling)


def after(first: Envelope, second: Envelope) -> Envelope:
    r"""What is known of one map after another, in sampling order."""
    if first.reason or second.reason:
        return first if first.reason else second
    depends = f"{first.depends}, then {second.depends}"
    roundings = first.roundings + second.roundings
    if first.limit is not None or second.limit is not None:
        limit = partial(_reach, first, second)
        return Envelope(limit=limit, depends=depends, roundings=roundings)
    keeps = second.gain >= 1  # so that the offset is no less than that of both
    return Envelope(
        gain=second.gain * first.gain,
        offset=second.offset + second.gain * first.offset,
        floor=max(second.floor - second.gain * first.offset, second.gain * first.floor),
        displacement=first.displacement + second.displacement,
        # What one of the two takes off the line stays within its box, but for the other's shift.
        inside=max(first.inside + second.offset, second.inside) if keeps else math.inf,
        edge=max(first.edge, second.edge + first.offset) if keeps else math.inf,
        depends=depends,
        roundings=roundings,
    )


def _reach(first: Envelope, second: Envelope, radius: float) -> float:
    return second.reach(first.reach(radius))
