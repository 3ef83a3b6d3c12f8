r"""The conditional multiscale flow."""

__all__ = ["ConditionalMultiscaleFlow", "FlowStep", "Split"]

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.functional import bounded
from flowguard.image.coupling import Condition, ConditionalCoupling, repeat_rows
from flowguard.image.layers import (
    ActNorm,
    InvertibleConv1x1,
    OrthogonalConv1x1,
    Squeeze,
    ZeroConv2d,
)
from flowguard.image.maps import Elementwise

#: For each level its context map, and what each of its steps made of it.
Conditions = list[tuple[Tensor, list[Condition]]]
Context = Sequence[Tensor] | Conditions

#: What contexts are cut at: infinite ones would become NaN (∞ - ∞) in the convolutions.
FARTHEST = 1e20

MIXES: dict[str, type[InvertibleConv1x1 | OrthogonalConv1x1]] = {
    "free": InvertibleConv1x1,
    "orthogonal": OrthogonalConv1x1,
}


class FlowStep(nn.Module):
    r"""Creates a step: activation normalisation, 1×1 convolution, conditional coupling.

    Arguments:
        channels: The number of channels.
        context_channels: The number of channels of the context.
        hidden: The number of channels of the hidden layers.
        coupling: The elementwise map; see :func:`flowguard.image.elementwise`.
        mix: The 1×1 convolution: ``"free"``, as in Glow, or ``"orthogonal"``.

    Example:
        >>> step = FlowStep(12, 8, hidden=16)
        >>> z, ladj = step(torch.randn(2, 12, 4, 4), torch.randn(2, 8, 4, 4))
        >>> ladj.shape
        torch.Size([2])
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        hidden: int = 64,
        coupling: str | Elementwise = "robust",
        mix: str = "free",
    ) -> None:
        super().__init__()
        if mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}; got {mix!r}")
        self.actnorm = ActNorm(channels)
        self.mix: InvertibleConv1x1 | OrthogonalConv1x1 = MIXES[mix](channels)
        self.coupling = ConditionalCoupling(
            channels, context_channels, hidden=hidden, coupling=coupling
        )

    def forward(
        self, x: Tensor, context: Tensor | Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        x, a = self.actnorm(x)
        x, b = self.mix(x)
        x, c = self.coupling(x, context)
        return x, a + b + c

    def inverse(
        self, z: Tensor, context: Tensor | Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        z, c = self.coupling.inverse(z, context)
        z, b = self.mix.inverse(z)
        z, a = self.actnorm.inverse(z)
        return z, a + b + c


class Split(nn.Module):
    r"""Creates a split: half of the channels leave as a latent, given those that remain.

    .. math:: \epsilon = (x_2 - \mu(x_1, y)) \, e^{-s(x_1, y)}

    with :math:`|\mu| \leq` `mean_bound` and :math:`|s| \leq` `scale_bound`, so that the inverse
    is bounded whatever remains and whatever the context is.

    Arguments:
        channels: The number of channels.
        context_channels: The number of channels of the context.
        mean_bound: The bound of the mean.
        scale_bound: The bound of the log-scale.

    Example:
        >>> split = Split(12, 8)
        >>> x, context = torch.randn(2, 12, 4, 4), torch.randn(2, 8, 4, 4)
        >>> rest, latent, ladj = split(x, context)
        >>> rest.shape, latent.shape
        (torch.Size([2, 6, 4, 4]), torch.Size([2, 6, 4, 4]))
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        mean_bound: float = 3.0,
        scale_bound: float = 2.0,
    ) -> None:
        super().__init__()
        self.kept = channels - channels // 2
        self.dropped = channels // 2
        self.mean_bound = mean_bound
        self.scale_bound = scale_bound
        self.net = ZeroConv2d(self.kept + context_channels, 2 * self.dropped)

    def extra_repr(self) -> str:
        return f"kept={self.kept}, dropped={self.dropped}"

    def _prior(self, kept: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.net(torch.cat((kept, repeat_rows(context, kept)), dim=1))
        mean, logs = raw.chunk(2, dim=1)
        return bounded(mean, self.mean_bound), bounded(logs, self.scale_bound)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, dropped = x.tensor_split((self.kept,), dim=1)
        mean, logs = self._prior(kept, context)
        return kept, (dropped - mean) * torch.exp(-logs), -logs.flatten(1).sum(1)

    def inverse(self, kept: Tensor, latent: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        mean, logs = self._prior(kept, context)
        dropped = latent * torch.exp(logs) + mean
        return torch.cat((kept, dropped), dim=1), logs.flatten(1).sum(1)


class ConditionalMultiscaleFlow(nn.Module):
    r"""Creates a conditional multiscale flow over images.

    At each level the image is squeezed by two, passes `steps` conditional flow steps, and, but at
    the last level, half of its channels leave as that level's latent. Level 1 is the finest.

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200

    Arguments:
        channels: The number of channels of the image.
        context_channels: The number of channels of the context map of each level.
        levels: The number of levels :math:`L`.
        steps: The number of steps :math:`K` at each level.
        hidden: The number of channels of the hidden layers of the couplings.
        coupling: The elementwise map of the couplings; see :func:`flowguard.image.elementwise`.
        mix: The 1×1 convolutions: ``"free"``, as in Glow, or ``"orthogonal"``, rotations that
            keep the bound of the samples small; see :func:`flowguard.certify`.

    The context is a list with one map for each level: the map of level :math:`l` has shape
    :math:`(B, context\_channels, H / 2^l, W / 2^l)`; or it is what :meth:`condition` made of it.
    It may have fewer rows than the image: row :math:`i` of the image then belongs to row
    :math:`i \bmod B` of the context.

    Example:
        >>> flow = ConditionalMultiscaleFlow(3, 8, levels=2, steps=1, hidden=16)
        >>> x = torch.randn(2, 3, 8, 12)
        >>> context = [torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)]
        >>> latents, ladj = flow(x, context)
        >>> [tuple(z.shape) for z in latents]
        [(2, 6, 4, 6), (2, 24, 2, 3)]
        >>> torch.allclose(flow.inverse(latents, context)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        levels: int = 3,
        steps: int = 8,
        hidden: int = 64,
        coupling: str | Elementwise = "robust",
        mix: str = "free",
    ) -> None:
        super().__init__()
        if levels < 1 or steps < 1:
            raise ValueError(f"levels and steps must be positive; got {levels} and {steps}")
        self.channels = channels
        self.levels = levels
        self.squeeze = Squeeze()
        self.steps = nn.ModuleList()
        self.splits = nn.ModuleList()
        c = channels
        for level in range(levels):
            c = 4 * c
            self.steps.append(
                nn.ModuleList(
                    FlowStep(c, context_channels, hidden=hidden, coupling=coupling, mix=mix)
                    for _ in range(steps)
                )
            )
            if level < levels - 1:
                split = Split(c, context_channels)
                self.splits.append(split)
                c = split.kept

    def _level(self, level: int) -> list[FlowStep]:
        steps = self.steps[level]
        return list(cast(Iterable[FlowStep], steps))

    def _split(self, level: int) -> Split:
        return cast(Split, self.splits[level])

    @property
    def multiple(self) -> int:
        r"""What height and width of an image must be a multiple of."""
        return 2**self.levels

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        r"""Returns the shape :math:`(C, H, W)` of each level's latent for an image of this size.

        Arguments:
            height: The height of the image, a multiple of :math:`2^L`.
            width: The width of the image, a multiple of :math:`2^L`.
        """
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"height and width must be multiples of {self.multiple}; got {height} and {width}"
            )
        shapes, c = [], self.channels
        for level in range(self.levels):
            height, width, c = height // 2, width // 2, 4 * c
            if level < self.levels - 1:
                shapes.append((c // 2, height, width))
                c = c - c // 2
            else:
                shapes.append((c, height, width))
        return shapes

    def condition(self, context: Sequence[Tensor]) -> Conditions:
        r"""Computes all that depends on the context alone, to be shared by many calls.

        Contexts are cut at :math:`\pm 10^{20}`, so that infinite ones give finite images. NaN
        stays NaN.

        Arguments:
            context: One map for each level.

        Example:
            >>> flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=16)
            >>> condition = flow.condition([torch.randn(1, 8, 4, 4)])
            >>> x, ladj = flow.inverse([torch.randn(5, 12, 4, 4)], condition)
            >>> x.shape
            torch.Size([5, 3, 8, 8])
        """
        if len(context) != self.levels:
            raise ValueError(
                f"the context must hold one map for each of the {self.levels} levels;"
                f" got {len(context)}"
            )
        return [
            (c, [step.coupling.condition(c) for step in self._level(level)])
            for level, c in enumerate(_cut(c) for c in context)
        ]

    def _conditions(self, context: Context | None) -> Conditions:
        if context is None:
            raise ValueError("a conditional flow needs a context; got None")
        if isinstance(context, Tensor):
            raise TypeError("the context must be a list with one map for each level; got a tensor")
        if len(context) > 0 and not isinstance(context[0], Tensor):
            return cast(Conditions, context)
        return self.condition(cast(Sequence[Tensor], context))

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        r"""Takes images to latents.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`, `H` and `W` multiples of :math:`2^L`.
            context: The context maps, or what :meth:`condition` made of them.

        Returns:
            One latent for each level and the log-determinant, with shape :math:`(B)`.
        """
        conditions = self._conditions(context)
        self.latent_shapes(*x.shape[-2:])  # refuses a size that does not fit, before the work
        latents = []
        total = x.new_zeros(x.shape[0])
        for level, (features, per_step) in enumerate(conditions):
            x, _ = self.squeeze(x)
            for step, condition in zip(self._level(level), per_step, strict=True):
                x, ladj = step(x, condition)
                total = total + ladj
            if level < self.levels - 1:
                x, latent, ladj = self._split(level)(x, features)
                total = total + ladj
                latents.append(latent)
        return [*latents, x], total

    def inverse(
        self,
        z: Sequence[Tensor],
        context: Context | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Takes latents to images.

        Arguments:
            z: One latent for each level.
            context: The context maps, or what :meth:`condition` made of them.

        Returns:
            The images, with shape :math:`(B, C, H, W)`, and the log-determinant.
        """
        if len(z) != self.levels:
            raise ValueError(
                f"there must be one latent for each of the {self.levels} levels; got {len(z)}"
            )
        conditions = self._conditions(context)
        x = z[-1]
        total = x.new_zeros(x.shape[0])
        for level in reversed(range(self.levels)):
            features, per_step = conditions[level]
            if level < self.levels - 1:
                x, ladj = self._split(level).inverse(x, z[level], features)
                total = total + ladj
            steps = list(zip(self._level(level), per_step, strict=True))
            for step, condition in reversed(steps):
                x, ladj = step.inverse(x, condition)
                total = total + ladj
            x, _ = self.squeeze.inverse(x)
        return x, total

    def log_prob(
        self,
        x: Tensor,
        context: Context | None = None,
    ) -> Tensor:
        r"""Returns the log-density :math:`\log p(x | y)` in nats, with shape :math:`(B)`.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            context: The context maps, or what :meth:`condition` made of them.
        """
        latents, ladj = self(x, context)
        return ladj + sum(
            (-0.5 * (z.square() + math.log(2 * math.pi))).flatten(1).sum(1) for z in latents
        )


def _cut(context: Tensor) -> Tensor:
    farthest = min(FARTHEST, torch.finfo(context.dtype).max)
    return context.clamp(-farthest, farthest)
