r"""The attack: gradient ascent on condition and noise, to make a sample as large as it can be."""

__all__ = ["Attack", "Sampler", "attack", "sampler"]

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Generator, Tensor

from flowguard.bounds.holders import HeldConditions, held, unwrapped
from flowguard.hosts import load, opened
from flowguard.numerics import evaluation_mode
from flowguard.ood import unguarded

#: A tensor, or a list of tensors of one batch, as the latents of a multiscale flow.
Tensors = Any
#: From noise and condition to samples.
Sampler = Callable[[Tensors, Tensors], Tensor]

#: What the elements of an unrestricted context are kept below, so that they stay finite.
FARTHEST = 1e30


@dataclass(frozen=True, eq=False)
class Attack:
    r"""What an attack has reached; see :func:`attack`. It equals itself alone.

    Arguments:
        value: The largest absolute value of a sample, :math:`\infty` if one was not finite.
        context: The condition of the largest finite sample, with batch size one.
        noise: The noise of that sample.
        sample: The largest finite sample.
        trace: The largest absolute value at each step of each restart, with shape
            :math:`(restarts, steps + 1)`; :math:`\infty` where a sample was not finite.

    Example:
        >>> found = flowguard.attack(lambda z, y: z * y, torch.ones(1, 2), radius=1.0,
        ...     latents=torch.zeros(1, 2), steps=10, restarts=2)
        >>> round(found.value, 3), found.overflowed  # noise up to 4, conditions up to 2
        (8.0, False)
        >>> found.context.shape, found.trace.shape
        (torch.Size([1, 2]), torch.Size([2, 11]))
    """

    value: float
    context: Tensors = field(repr=False)
    noise: Tensors = field(repr=False)
    sample: Tensor = field(repr=False)
    trace: Tensor = field(repr=False)

    @property
    def overflowed(self) -> bool:
        r"""Whether a sample was not finite."""
        return math.isinf(self.value)


@singledispatch
def sampler(model: Any, context: Tensors) -> tuple[Sampler, Tensors]:
    r"""Returns how a model samples: a function from noise and condition to samples, and an
    example of its noise for this condition. Adapters register their library's flows here.

    Arguments:
        model: The model.
        context: The condition.

    Returns:
        The function and the noise, a tensor whose first dimension is the batch of the context or a
        list of such tensors.

    Raises:
        TypeError: If nobody has said how to sample from such a model.

    Example:
        >>> flow = flowguard.image.ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=8)
        >>> context = [torch.zeros(2, 8, 4, 4)]
        >>> draw, noise = flowguard.bounds.sampler(flow, context)
        >>> draw(noise, context).shape
        torch.Size([2, 3, 8, 8])
    """
    before = len(sampler.registry)
    load(model, "rules")
    if len(sampler.registry) > before:
        return sampler(model, context)
    wrappers, inner = unwrapped(model)
    if wrappers:
        return sampler(inner, context)
    found = held(model)
    if found is not None and not found.reason:
        told = HeldConditions(model, found.path)
        draw, latents = sampler(found.flow, told(context))
        return (lambda z, y: draw(z, told(y))), latents
    if found is not None:
        raise TypeError(
            f"flowguard does not know how to sample from {type(model).__name__}: {found.reason}"
        )
    raise TypeError(
        f"flowguard does not know how to sample from {type(model).__name__};"
        " give a function (noise, context) -> samples, and latents, an example of its noise"
    )


def attack(
    model: Any,
    context: Tensors,
    *,
    radius: float | None = None,
    norm: str = "linf",
    noise: float = 4.0,
    steps: int = 100,
    restarts: int = 4,
    latents: Tensors = None,
    generator: Generator | None = None,
) -> Attack:
    r"""Looks for the condition and the noise that make a sample explode.

    .. math:: \max_{y, z} |f^{-1}(z; y)|_\infty \quad \text{over} \quad
        \lVert y - y_0 \rVert \leq \epsilon, \; |z|_\infty \leq R

    by projected gradient ascent with normalised steps, from several starts: the first restart
    from the given condition, the others from random ones in the ball. Each row of the condition
    is attacked by itself. Gradients pass through what lies between the given condition and the
    sample: for an attack on feature maps give the flow and the maps, for one on images the model
    and the images. No gradient is left on the model, whose mode is set to evaluation meanwhile.
    Guards in it, such as :class:`flowguard.OODConditioner`, score and refuse nothing meanwhile; with
    the policy ``"shrink"`` they move embeddings as ever.

    What the attack reaches is a lower bound of the largest sample, as
    :func:`flowguard.certify` gives an upper bound.

    References:
        | Towards Deep Learning Models Resistant to Adversarial Attacks (Madry et al., 2017)
        | https://arxiv.org/abs/1706.06083

    Arguments:
        model: A flow of flowguard, or of a library that it has rules for, or what holds one, such
            as a posterior of sbi; or any function from noise and condition to samples.
        context: The condition :math:`y_0`, a tensor or a list of tensors with one batch.
        radius: The radius :math:`\epsilon` of the ball around the condition. If :py:`None`, the
            condition is not restricted.
        norm: The norm of the ball, ``"linf"`` or ``"l2"``, over all of a row.
        noise: The largest absolute value :math:`R` of the noise.
        steps: The number of steps.
        restarts: The number of starts.
        latents: An example of the noise, where `model` is a function. Only its shape matters.
        generator: A source of randomness, on the device of the condition.

    Raises:
        TypeError: If it is not known how to sample from the model.
        ValueError: If a number is out of range.

    Example:
        >>> flow = flowguard.image.ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=16)
        >>> result = flowguard.attack(flow, [torch.zeros(1, 8, 4, 4)], steps=5, restarts=1)
        >>> result.value <= flowguard.certify(flow).bound(4.0)
        True
        >>> result.trace.shape
        torch.Size([1, 6])
    """
    _check(radius, norm, noise, steps, restarts)
    model = opened(model).module
    with unguarded(model):
        draw, latents = sampler(model, context) if latents is None else (model, latents)
    ball = Ball([t.detach() for t in _listed(context)], radius, norm)
    best = Attack(-math.inf, context, latents, torch.empty(0), torch.empty(0))
    traces = []
    with unguarded(model), evaluation_mode(model):
        for restart in range(restarts):
            y = ball.random(generator) if restart else ball.center
            z = [noise * _uniform(t, generator) for t in _listed(latents)]
            trace = []
            for step in range(steps + 1):
                y, z = ([t.detach().requires_grad_() for t in ts] for ts in (y, z))
                with torch.enable_grad():
                    x = draw(_like(latents, z), _like(context, y))
                    values = x.abs().flatten(1).amax(1)
                finite, reached = values.isfinite(), values.detach()
                # NaN counts as infinite: no finite number was left to be found.
                trace.append(torch.where(finite, reached, math.inf).max())
                row = int(torch.where(finite, reached, -1.0).argmax())
                if finite[row] and reached[row].item() > best.value:
                    worst_y, worst_z = ([t[row : row + 1].detach() for t in ts] for ts in (y, z))
                    best = Attack(
                        reached[row].item(),
                        _like(context, worst_y),
                        _like(latents, worst_z),
                        x[row : row + 1].detach(),
                        best.trace,
                    )
                if step < steps and values.requires_grad:
                    slopes = _slopes(values, finite, [*y, *z])
                    size = max(0.2, 2.5 / steps) * (1 - step / steps)
                    y = ball.ascend(y, slopes[: len(y)], size)
                    z = [
                        (t + size * noise * g.sign()).clamp(-noise, noise)
                        for t, g in zip(z, slopes[len(y) :], strict=True)
                    ]
            traces.append(torch.stack(trace))
    history = torch.stack(traces).cpu()
    value = best.value if bool(history.isfinite().all()) else math.inf
    return replace(best, value=value, trace=history)


@dataclass(frozen=True)
class Ball:
    r"""The conditions that an attack may use: a ball around each row, or all."""

    center: list[Tensor]
    radius: float | None
    norm: str

    def random(self, generator: Generator | None) -> list[Tensor]:
        r"""Returns a condition within the ball; without radius, within a distance of one."""
        steps = [_uniform(t, generator) for t in self.center]
        size = 1.0 if self.radius is None else self.radius
        if self.norm == "l2":
            steps = _normalized(steps)
        return [t + size * s for t, s in zip(self.center, steps, strict=True)]

    def ascend(self, y: list[Tensor], slopes: list[Tensor], size: float) -> list[Tensor]:
        r"""Returns conditions uphill by that share of the radius, but still in the ball; without
        radius, of their distance from zero."""
        steps = _normalized(slopes) if self.norm == "l2" else [g.sign() for g in slopes]
        if self.radius is None:
            scale = 1 + self._size(y)
            return [
                (t + size * _rows(scale, t) * s).clamp(-FARTHEST, FARTHEST)
                for t, s in zip(y, steps, strict=True)
            ]
        moved = [
            t + size * self.radius * s - c for t, s, c in zip(y, steps, self.center, strict=True)
        ]
        if self.norm == "l2":
            shrink = (self.radius / self._size(moved)).clamp(max=1.0)
            moved = [d * _rows(shrink, d) for d in moved]
        else:
            moved = [d.clamp(-self.radius, self.radius) for d in moved]
        return [c + d for c, d in zip(self.center, moved, strict=True)]

    def _size(self, tensors: list[Tensor]) -> Tensor:
        r"""The norm of each row."""
        rows = torch.cat([t.detach().flatten(1) for t in tensors], dim=1)
        return rows.norm(dim=1) if self.norm == "l2" else rows.abs().amax(1)


def _slopes(values: Tensor, finite: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    r"""The gradient of each row's value, zero where there is none or the value is not finite."""
    with torch.enable_grad():
        total = torch.where(finite, values, 0.0).sum()
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return [
        torch.zeros_like(t) if g is None else torch.where(_rows(finite, g), g.nan_to_num(0.0), 0.0)
        for t, g in zip(inputs, grads, strict=True)
    ]


def _normalized(tensors: list[Tensor]) -> list[Tensor]:
    r"""All tensors, scaled to a Euclidean norm of one for each row, zero where they are zero."""
    rows = torch.cat([t.flatten(1) for t in tensors], dim=1)
    # The gradient of an exploding inverse has squares that overflow: first by the largest.
    largest = rows.abs().amax(1).clamp(min=torch.finfo(rows.dtype).tiny)
    norm = (rows / largest.unsqueeze(1)).norm(dim=1).clamp(min=1.0)
    return [t / _rows(largest, t) / _rows(norm, t) for t in tensors]


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def _uniform(like: Tensor, generator: Generator | None) -> Tensor:
    unit = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return 2 * unit - 1


def _listed(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _like(example: Tensors, tensors: list[Tensor]) -> Tensors:
    return tensors[0] if isinstance(example, Tensor) else tensors


def _check(radius: float | None, norm: str, noise: float, steps: int, restarts: int) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2'; got {norm!r}")
    if radius is not None and not 0 <= radius < math.inf:
        raise ValueError(
            f"radius must be finite and not negative, or None for no limit; got {radius}"
        )
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and not negative; got {noise}")
    if steps < 0 or restarts < 1:
        raise ValueError(
            f"steps must not be negative and restarts must be positive; got {steps} and {restarts}"
        )
