r"""A base distribution for images of any size, which may look at what is known already; and what
normflows' conditional base becomes when a flow is made robust.
"""

__all__ = ["BoundedDiagGaussian", "GaussianPrior", "from_noise", "moments_of"]

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn as nn
from normflows.distributions.base import (
    BaseDistribution,
    ConditionalDiagGaussian,
    DiagGaussian,
)
from torch import Tensor

from flowguard.functional import bounded
from flowguard.image import ZeroConv2d
from flowguard.migration.exchange import successor
from flowguard.migration.moments import BoundedMoments
from flowguard.numerics import normal_log_prob, repeat_rows

from .context import check_sizes, context_like


class GaussianPrior(BaseDistribution):
    r"""Creates a Gaussian base for one level of an image flow, for images of any size.

    .. math:: z = \mu + e^{s} \, \epsilon

    with :math:`|\mu| \leq` `mean_bound` and :math:`|s| \leq` `scale_bound` for each channel. They
    are constants, or computed from the latents :math:`z_1` of the coarser levels, from the context,
    or from both: the prior of a split that looks at what remains. As both are bounded, samples
    are bounded for every context. It starts as standard normal.

    Arguments:
        num_channels: The number of channels of the latent.
        context_channels: The number of channels of the context, :py:`None` for no context.
        given_channels: The number of channels of :math:`z_1`, :py:`None` if it is not looked at.
        mean_bound: The bound of the mean.
        scale_bound: The bound of the log-scale.

    Raises:
        ValueError: If a bound is not positive and finite, or a size not a positive number.

    Example:
        >>> base = GaussianPrior(6, context_channels=3, given_channels=6)
        >>> z, log_p = base(2, context=torch.randn(2, 3, 4, 4), given=torch.randn(2, 6, 4, 4))
        >>> z.shape, log_p.shape
        (torch.Size([2, 6, 4, 4]), torch.Size([2]))
    """

    def __init__(
        self,
        num_channels: int,
        context_channels: int | None = None,
        given_channels: int | None = None,
        *,
        mean_bound: float = 3.0,
        scale_bound: float = 2.0,
    ) -> None:
        super().__init__()
        check_sizes(
            num_channels=num_channels,
            context_channels=context_channels,
            given_channels=given_channels,
        )
        for name, bound in (("mean_bound", mean_bound), ("scale_bound", scale_bound)):
            if not 0 < bound < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {bound}")
        self.num_channels = num_channels
        self.context_channels = context_channels
        self.given_channels = given_channels
        self.mean_bound = mean_bound
        self.scale_bound = scale_bound
        self.temperature: float | None = None  # normflows sets it while it samples
        inputs = (context_channels or 0) + (given_channels or 0)
        self.net = ZeroConv2d(inputs, 2 * num_channels) if inputs else None
        constant = nn.Parameter(torch.zeros(1, 2 * num_channels, 1, 1))
        self.constant = None if inputs else constant

    def extra_repr(self) -> str:
        r"""Returns the numbers of channels, for the printed module."""
        return (
            f"{self.num_channels}, context_channels={self.context_channels},"
            f" given_channels={self.given_channels}"
        )

    def moments(
        self, z: Tensor, context: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        r"""Returns the mean and the log-scale of the latent.

        Arguments:
            z: A latent, of which only the shape matters.
            context: The context.
            given: The latents :math:`z_1` of the coarser levels.

        Raises:
            ValueError: If context or coarser latents do not fit.
        """
        context = context_like(z, context, self.context_channels)
        if self.given_channels is not None:
            expected = (self.given_channels, *z.shape[2:])
            if given is None or given.shape[1:] != expected:
                got = None if given is None else tuple(given.shape)
                raise ValueError(
                    f"the prior looks at latents of shape (B, {', '.join(map(str, expected))}) that"
                    f" are known already; got {got}"
                )
            given = repeat_rows(given, z)
        if self.net is None:
            raw = self.constant
        else:
            raw = self.net(torch.cat([t for t in (given, context) if t is not None], dim=1))
        mean, logs = raw.chunk(2, dim=1)  # type: ignore[union-attr]
        return bounded(mean, self.mean_bound), bounded(logs, self.scale_bound)

    def forward(
        self,
        num_samples: int = 1,
        context: Tensor | None = None,
        given: Tensor | None = None,
        size: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Draws samples, and returns them with their log-density.

        Arguments:
            num_samples: The number of samples.
            context: The context, with shape :math:`(B, C', H, W)` or :math:`(B, C')`.
            given: The latents :math:`z_1` of the coarser levels.
            size: The height and width of the latent. If :py:`None`, those of `given`, or else of
                `context`.

        Raises:
            ValueError: If nothing tells the size, or context or coarser latents do not fit.
        """
        if size is None:
            known = [t for t in (given, context) if t is not None and t.dim() == 4]
            if not known:
                raise ValueError("a prior for images of any size must be told the size: give size")
            size = known[0].shape[-2:]
        like = next(self.parameters())
        shape = (num_samples, self.num_channels, *size)
        eps = torch.randn(shape, dtype=like.dtype, device=like.device)
        mean, logs = self.moments(eps, context, given)
        temperature = 1.0 if self.temperature is None else self.temperature
        return mean + torch.exp(logs) * (temperature * eps), self._log_density(eps, logs)

    def log_prob(
        self, z: Tensor, context: Tensor | None = None, given: Tensor | None = None
    ) -> Tensor:
        r"""Returns the log-density of latents.

        Arguments:
            z: The latents.
            context: The context.
            given: The latents :math:`z_1` of the coarser levels.

        Returns:
            The log-density in nats, with shape :math:`(N)`.
        """
        mean, logs = self.moments(z, context, given)
        temperature = 1.0 if self.temperature is None else self.temperature
        return self._log_density((z - mean) * torch.exp(-logs) / temperature, logs)

    def _log_density(self, eps: Tensor, logs: Tensor) -> Tensor:
        if self.temperature is not None:
            logs = logs + (math.log(self.temperature) if self.temperature > 0 else -math.inf)
        return normal_log_prob(eps) - logs.expand_as(eps).flatten(1).sum(1)


class BoundedDiagGaussian(ConditionalDiagGaussian):
    r"""Creates the Gaussian base with bounded mean and scale that takes the place of one of
    normflows'; see :meth:`in_place_of`."""

    moments: BoundedMoments

    @classmethod
    def in_place_of(cls, old: ConditionalDiagGaussian, moments: BoundedMoments) -> Self:
        r"""Returns a base with the encoder of another.

        Arguments:
            old: The host's ``ConditionalDiagGaussian``.
            moments: The bounds.
        """
        return successor(old, cls, moments=moments)

    def forward(
        self, num_samples: int = 1, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Draws samples, and returns them with their log-density.

        Arguments:
            num_samples: The number of samples.
            context: The context, with as many rows, or one.
        """
        mean, logs = self.moments(*moments_of(self, context))
        eps = torch.randn(num_samples, *self.shape, dtype=mean.dtype, device=mean.device)
        return mean + torch.exp(logs) * eps, self._log_density(eps, logs)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Returns the log-density of noise.

        Arguments:
            z: The noise.
            context: The context.
        """
        mean, logs = self.moments(*moments_of(self, context))
        return self._log_density((z - mean) * torch.exp(-logs), logs)

    def _log_density(self, eps: Tensor, logs: Tensor) -> Tensor:
        return normal_log_prob(eps) - logs.expand_as(eps).flatten(1).sum(1)


def moments_of(base: ConditionalDiagGaussian, context: Any) -> tuple[Tensor, Tensor]:
    r"""Returns the mean and log-scale that the encoder of a base asks for.

    Arguments:
        base: The base.
        context: The context.
    """
    mean, logs = base.context_encoder(context).tensor_split(2, dim=-1)
    return mean, logs


def from_noise(base: Any, noise: Tensor, told: Mapping[str, Any]) -> Tensor:
    r"""Takes standard normal noise to samples of a Gaussian base; of another, its own samples
    count as the noise.

    Arguments:
        base: The base.
        noise: The noise, with the shape of the samples.
        told: What the base is told besides, by name, such as its context.
    """
    if isinstance(base, GaussianPrior):
        mean, logs = base.moments(noise, told.get("context"), told.get("given"))
        return mean + torch.exp(logs) * noise
    if isinstance(base, DiagGaussian):
        return base.loc + torch.exp(base.log_scale) * noise
    if isinstance(base, ConditionalDiagGaussian):
        mean, logs = moments_of(base, told.get("context"))
        if isinstance(base, BoundedDiagGaussian):
            mean, logs = base.moments(mean, logs)
        return mean + torch.exp(logs) * noise
    return noise
