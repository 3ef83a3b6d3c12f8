r"""Super-resolution by a conditional flow."""

__all__ = ["SuperResolutionFlow"]

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.image.coupling import repeat_rows
from flowguard.image.maps import Elementwise
from flowguard.image.multiscale import ConditionalMultiscaleFlow
from flowguard.models.encoders import PyramidEncoder
from flowguard.ood import OODConditioner
from flowguard.persistence import Pretrained


class SuperResolutionFlow(Pretrained, nn.Module):
    r"""Creates a conditional flow for super-resolution, :math:`p(\text{HR} | \text{LR})`.

    A conditional multiscale flow models the residual of the high-resolution image over the
    bicubic upsampling of the low-resolution one. Its encoder is an
    :class:`flowguard.OODConditioner`: once fitted and calibrated, it tells at which level and
    where a condition is unlike the training set.

    References:
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        scale: The upscaling factor, a power of two from 2.
        levels: The number of levels :math:`L` of the flow.
        steps: The number of steps :math:`K` at each level.
        hidden: The number of channels of the hidden layers of the couplings.
        features: The number of channels of the feature maps.
        coupling: The elementwise map of the couplings: ``"robust"``, ``"affine"``,
            ``"reparametrized"``, ``"bspline"``, or an object; see
            :func:`flowguard.image.elementwise`.
        encoder: A module from LR images to a list with one map of `features` channels for each
            level; see :class:`flowguard.models.PyramidEncoder`, the default.

    Images are RGB, with values in :math:`[0, 1]` and shape :math:`(B, 3, H, W)`, of any size:
    internally they are padded to what the flow needs, and cropped.

    Example:
        >>> model = SuperResolutionFlow(scale=4, levels=2, steps=1, hidden=8, features=8)
        >>> hr, lr = torch.rand(2, 3, 37, 53), torch.rand(2, 3, 10, 14)
        >>> model.nll(hr, lr).shape
        torch.Size([2])
        >>> samples = model.sample(lr, num_samples=5, temperature=0.8)
        >>> samples.shape
        torch.Size([5, 2, 3, 40, 56])
    """

    def __init__(
        self,
        *,
        scale: int = 4,
        levels: int = 2,
        steps: int = 4,
        hidden: int = 64,
        features: int = 64,
        coupling: str | Elementwise = "robust",
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two from 2; got {scale}")
        self.scale = scale
        if encoder is None:
            encoder = PyramidEncoder(features, scale=scale, levels=levels)
        self.conditioner = OODConditioner(encoder, policy="report")
        self.flow = ConditionalMultiscaleFlow(
            3, features, levels=levels, steps=steps, hidden=hidden, coupling=coupling
        )

    @property
    def lr_multiple(self) -> int:
        r"""What the size of an LR image is padded to a multiple of."""
        return max(1, self.flow.multiple // self.scale)

    def _pad_lr(self, lr: Tensor) -> Tensor:
        if lr.dim() != 4 or lr.shape[1] != 3 or 0 in lr.shape[-2:]:
            raise ValueError(f"lr must have shape (B, 3, H, W); got {tuple(lr.shape)}")
        self._check_dtype("lr", lr)
        return pad_to_multiple(lr, self.lr_multiple)

    def _check_dtype(self, name: str, images: Tensor) -> None:
        dtype = next(self.parameters()).dtype
        if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"{name} must have the dtype {dtype} of the model, with values in [0, 1];"
                f" got {images.dtype}"
            )

    def _check_hr(self, hr: Tensor, lr: Tensor) -> None:
        h, w = lr.shape[-2:]
        fits = hr.dim() == 4 and tuple(math.ceil(n / self.scale) for n in hr.shape[-2:]) == (h, w)
        if not fits or hr.shape[:2] != lr.shape[:2]:
            raise ValueError(
                f"hr must have shape {(lr.shape[0], 3, self.scale * h, self.scale * w)} for lr of"
                f" shape {tuple(lr.shape)} (less than {self.scale} rows or columns may lack);"
                f" got {tuple(hr.shape)}"
            )
        self._check_dtype("hr", hr)

    def upsample(self, lr: Tensor) -> Tensor:
        r"""Returns the bicubic upsampling that the flow's residual is added to.

        Arguments:
            lr: The LR images, with shape :math:`(B, 3, H, W)`.
        """
        return F.interpolate(lr, scale_factor=float(self.scale), mode="bicubic")

    def nll(self, hr: Tensor, lr: Tensor, levels: int = 256) -> Tensor:
        r"""Returns an upper bound of the negative log-likelihood in bits per dimension.

        The image is dequantised with uniform noise, so that the bound holds for images with
        `levels` grey levels. An image whose size the flow does not take is padded by
        replication; the bits are those of the padded image, per padded dimension.

        Arguments:
            hr: The HR images, with shape :math:`(B, 3, sH, sW)`.
            lr: The LR images, with shape :math:`(B, 3, H, W)`.
            levels: The number of grey levels of `hr`.

        Returns:
            The bits per dimension of each image, with shape :math:`(B)`.
        """
        if levels < 2:
            raise ValueError(f"there must be at least 2 grey levels; got {levels}")
        self._pad_lr(lr)
        self._check_hr(hr, lr)
        noisy = hr + (torch.rand_like(hr) - 0.5) / (levels - 1)
        latents, ladj = self.encode(noisy, lr)
        log_prob = ladj + sum(
            (-0.5 * (z.square() + math.log(2 * math.pi))).flatten(1).sum(1) for z in latents
        )
        dims = sum(math.prod(z.shape[1:]) for z in latents)
        return -log_prob / (math.log(2) * dims) + math.log2(levels - 1)

    def encode(self, hr: Tensor, lr: Tensor) -> tuple[list[Tensor], Tensor]:
        r"""Takes HR images to latents, given their LR images.

        Arguments:
            hr: The HR images, with shape :math:`(B, 3, sH, sW)`.
            lr: The LR images, with shape :math:`(B, 3, H, W)`.

        Returns:
            One latent for each level, and the log-determinant, with shape :math:`(B)`.
        """
        padded = self._pad_lr(lr)
        self._check_hr(hr, lr)
        size = [self.scale * n for n in padded.shape[-2:]]
        return self.flow(
            pad_to(hr, size[0], size[1]) - self.upsample(padded), self.conditioner(padded)
        )

    def decode(self, latents: Sequence[Tensor], lr: Tensor) -> Tensor:
        r"""Takes latents to HR images, given the LR images. Nothing is clamped.

        Arguments:
            latents: One latent for each level; see :meth:`latent_shapes`. They may have
                :math:`n B` rows: row :math:`i` then belongs to LR image :math:`i \bmod B`.
            lr: The LR images, with shape :math:`(B, 3, H, W)`.

        Returns:
            The HR images, with shape :math:`(n B, 3, sH, sW)`.
        """
        padded = self._pad_lr(lr)
        residual, _ = self.flow.inverse(latents, self.conditioner(padded))
        base = self.upsample(padded)
        hr = residual + repeat_rows(base, residual)
        return hr[..., : self.scale * lr.shape[-2], : self.scale * lr.shape[-1]]

    def latent_shapes(self, lr: Tensor) -> list[tuple[int, int, int]]:
        r"""Returns the shape :math:`(C, H, W)` of each level's latent for such LR images.

        Arguments:
            lr: The LR images, with shape :math:`(B, 3, H, W)`.
        """
        height, width = self._pad_lr(lr).shape[-2:]
        return self.flow.latent_shapes(self.scale * height, self.scale * width)

    @torch.no_grad()
    def sample(
        self,
        lr: Tensor,
        num_samples: int = 1,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Draws HR images given LR images. Nothing is clamped.

        Arguments:
            lr: The LR images, with shape :math:`(B, 3, H, W)`.
            num_samples: The number :math:`n` of samples for each image.
            temperature: The standard deviation of the latents, not negative.
            generator: A source of randomness, on the device of `lr`.

        Returns:
            The samples, with shape :math:`(n, B, 3, sH, sW)`.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive; got {num_samples}")
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative; got {temperature}")
        latents = [
            temperature
            * torch.randn(
                num_samples * lr.shape[0],
                *shape,
                generator=generator,
                dtype=lr.dtype,
                device=lr.device,
            )
            for shape in self.latent_shapes(lr)
        ]
        return self.decode(latents, lr).unflatten(0, (num_samples, lr.shape[0]))


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    r"""Pads images by replication, at the bottom and on the right."""
    bottom, right = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    r"""Pads images by replication until height and width are multiples."""
    height, width = (multiple * math.ceil(n / multiple) for n in x.shape[-2:])
    return pad_to(x, height, width)
