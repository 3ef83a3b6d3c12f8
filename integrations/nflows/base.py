r"""The base of image flows in nflows' terms, for images of any size."""

__all__ = ["MultiscaleNormal"]

from typing import Any

import torch
from torch import Tensor

from flowguard.numerics import normal_log_prob

from .host import part
from .image import ConditionalMultiscaleTransform

Distribution: Any = part("distributions.base").Distribution


class MultiscaleNormal(Distribution):
    r"""Creates a standard normal base for the latents of a multiscale transform, as many as the
    context asks for.

    nflows' ``StandardNormal`` has one size. With this base, one ``nflows.flows.Flow`` samples, and
    tells the density of, images of any size.

    Arguments:
        transform: The transform whose latents these are.

    Raises:
        TypeError: If the transform is another one.

    Example:
        >>> from . import RobustFlowStep
        >>> transform = ConditionalMultiscaleTransform(1, context_channels=(8,))
        >>> step = part("transforms").CompositeTransform(
        ...     [part("transforms").SqueezeTransform(), RobustFlowStep(12, 8, 16)]
        ... )
        >>> _ = transform.add_transform(step, (12, 4, 4))
        >>> flow = part("flows").Flow(transform, MultiscaleNormal(transform))
        >>> flow.sample(5, torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 5, 3, 8, 8])
        >>> flow.sample(5, torch.randn(2, 8, 6, 4)).shape
        torch.Size([2, 5, 3, 12, 8])
    """

    def __init__(self, transform: ConditionalMultiscaleTransform) -> None:
        super().__init__()
        if not isinstance(transform, ConditionalMultiscaleTransform):
            raise TypeError(
                "transform must be the ConditionalMultiscaleTransform whose latents these are;"
                f" got {type(transform).__name__}"
            )
        # Within a tuple, it is no part of this module: its state would be saved twice.
        self._of = (transform,)

    def latent_size(self, context: Any = None) -> int:
        r"""Returns the number of latents of one sample, given this context.

        Arguments:
            context: The context of the flow, as the transform takes it.
        """
        return self._of[0].latent_size(context)

    def _log_prob(self, inputs: Tensor, context: Any) -> Tensor:
        size = self.latent_size(context)
        if inputs.shape[1:] != (size,):
            raise ValueError(
                f"with this context, latents must have shape (N, {size});"
                f" got {tuple(inputs.shape)}"
            )
        return normal_log_prob(inputs)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        size = self.latent_size(context)
        if context is None:
            return torch.randn(num_samples, size, device=self._device())
        noise = torch.randn(
            len(context) * num_samples, size, dtype=context.dtype, device=context.device
        )
        return noise.unflatten(0, (len(context), num_samples))

    def _device(self) -> torch.device:
        return next((p.device for p in self._of[0].parameters()), torch.device("cpu"))

    def _mean(self, context: Tensor | None) -> Tensor:
        size = self.latent_size(context)
        if context is None:
            return torch.zeros(size, device=self._device())
        return context.new_zeros(len(context), size)
