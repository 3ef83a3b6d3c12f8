r"""The worst that the maps of a certified flow may do: a lower bound that no network limits.

An adversary chooses the noise, and what each conditional map makes of each feature, as the
certificate has it: anything that the envelope of the map allows, whatever the condition and the
other features are. What it reaches lies between what an attack on conditions reaches, whose
networks choose, and what is certified.
"""

__all__ = ["reached"]

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowguard.bounds import Join, Linear, Noise, Permute, Pointwise, Scale, Unsqueeze, constant
from flowguard.bounds.certificate import Certificate

#: From a shape (P, C) to numbers between -1 and 1, with shape (N, P, C).
Choose = Callable[..., Tensor]


def reached(certificate: Certificate, radius: float) -> float:
    r"""Returns the largest value that the adversary finds, by gradient ascent for each output.

    Arguments:
        certificate: The certificate, of robust maps, additive ones and constants.
        radius: The largest absolute value of the noise.
    """
    best = 0.0
    for _ in range(2):
        angles: list[Tensor] = []
        with torch.no_grad():
            outputs = _sample(certificate, radius, _choices(angles, 1)).numel()
        angles.clear()
        _sample(certificate, radius, _choices(angles, outputs))
        optimizer = torch.optim.Adam(angles, 0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        for _ in range(200):
            x = _sample(certificate, radius, _choices(angles, outputs)).flatten(1).diagonal()
            best = max(best, x.abs().max().item())
            optimizer.zero_grad()
            (-x.sum()).backward()
            optimizer.step()
            schedule.step()
    return best


def _choices(angles: list[Tensor], rows: int) -> Choose:
    r"""What takes the sines of the angles in turn, and draws new ones after the last."""
    left: Iterator[Tensor] = iter(list(angles))

    def choose(*shape: int) -> Tensor:
        angle = next(left, None)
        if angle is None:
            angle = torch.randn(rows, *shape, dtype=torch.float64).requires_grad_()
            angles.append(angle)
        return angle.sin()

    return choose


def _sample(certificate: Certificate, radius: float, choose: Choose) -> Tensor:
    r"""Samples with shape (N, P, C), given what is chosen."""
    size = next(s.features for s in certificate.steps if s.features is not None)
    x = radius * choose(1, size)
    for step in certificate.steps:
        if isinstance(step, Linear):
            x = x @ constant(step.matrix).T
        elif isinstance(step, Scale):
            x = x * constant(step.factor).flatten() + constant(step.offset).flatten()
        elif isinstance(step, Permute):
            x = x[..., step.order]
        elif isinstance(step, Pointwise):
            moved = _moved(step, x, choose(*x.shape[1:]))
            x = moved if step.mask is None else torch.where(step.mask, moved, x)
        elif isinstance(step, Join):
            reach = step.mean_bound + math.exp(step.scale_bound) * radius
            x = torch.cat((x, reach * choose(x.shape[1], step.joined)), -1)
        elif isinstance(step, Unsqueeze):
            x = x.unflatten(-1, (-1, step.factor**2)).transpose(-1, -2).flatten(1, 2)
        elif isinstance(step, Noise):
            assert step.size == x.shape[-1]  # the noise is where it starts from
    return x


def _moved(step: Pointwise, z: Tensor, share: Tensor) -> Tensor:
    g = step.envelope
    if not math.isfinite(g.edge):
        raise ValueError(f"the adversary knows robust maps alone; got {step.kind} ({g.depends})")
    near = z.abs() <= g.edge
    low, high = z - g.offset, z + g.offset
    low = torch.where(near, low.clamp(max=-g.inside), low)
    high = torch.where(near, high.clamp(min=g.inside), high)
    return (low + high) / 2 + share * (high - low) / 2
