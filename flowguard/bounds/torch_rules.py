r"""The rules of torch's own transforms, with constants, of what combines transforms, and of the
modules that hold one other and do nothing but call it."""

__all__ = ["affine", "after", "squashed"]

import math
from collections.abc import Iterator
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import transforms
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from flowguard.bounds.regions import Envelope
from flowguard.bounds.rules import envelope, envelope_rule, rule, steps, within
from flowguard.bounds.steps import Refused, Scale, Step, constant
from flowguard.bounds.univariate import conditional
from flowguard.transforms import InverseTransform


@rule(nn.DataParallel, DistributedDataParallel, AveragedModel)
def _wrapped(wrapper: Any, sampling: bool) -> Iterator[Step]:
    yield from within("module", wrapper.module, sampling)


@rule(nn.Sequential)
def _sequential(stack: nn.Sequential, sampling: bool) -> Iterator[Step]:
    if len(stack) == 1:
        yield from within("0", stack[0], sampling)
    else:
        reason = "of a Sequential only that of one flow alone is known: certify the flow in it"
        yield Refused(reason=reason)


@rule(transforms.ComposeTransform)
def _compose(f: transforms.ComposeTransform, sampling: bool) -> Iterator[Step]:
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
