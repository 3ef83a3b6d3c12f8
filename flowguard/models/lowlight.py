r"""Low-light enhancement by a conditional flow."""

__all__ = ["LowLightFlow", "rescale_brightness"]

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.bounds import Envelope, Noise, Step, Univariate, rule, within
from flowguard.image.coupling import repeat_rows
from flowguard.image.maps import Elementwise
from flowguard.image.multiscale import published_flow
from flowguard.models._padding import pad_to, pad_to_multiple
from flowguard.models.lowlight_encoder import LowLightEncoder, color_map
from flowguard.ood import OODConditioner
from flowguard.persistence import Pretrained


def rescale_brightness(image: Tensor, brightness: Tensor | float) -> Tensor:
    r"""Scales images such that their mean is the one wanted.

    The factor is found from the image cut to :math:`[0, 1]`, without what is not finite: a value
    gone astray, however large, moves it by no more than one pixel can. It is at most 1000. What
    is not finite stays so.

    Arguments:
        image: The images, with shape :math:`(*, C, H, W)`.
        brightness: The mean that is wanted: a number, or one for each image with shape
            :math:`(*)`.

    Returns:
        The scaled images. Nothing is clamped.

    Example:
        >>> image = torch.full((1, 3, 10, 10), 0.25)
        >>> image[0, 0, 0, 0] = 1e30
        >>> rescale_brightness(image, 0.5)[0, 1, 0, :3]
        tensor([0.4950, 0.4950, 0.4950])
    """
    known = torch.isfinite(image)
    cut = torch.where(known, image, 0.0).clamp(0, 1).flatten(-3).sum(-1, dtype=torch.float64)
    mean = cut / known.flatten(-3).sum(-1).clamp_min(1)
    wanted = torch.as_tensor(brightness, dtype=torch.float64, device=image.device)
    if wanted.dim() and wanted.shape != mean.shape:
        raise ValueError(
            f"brightness must be a number or have the shape {tuple(mean.shape)}, one for each"
            f" image; got {tuple(wanted.shape)}"
        )
    factor = (wanted / mean.clamp_min(1e-3)).to(image.dtype)
    return image * factor[..., None, None, None]


class LowLightFlow(Pretrained, nn.Module):
    r"""Creates a conditional flow for low-light enhancement, :math:`p(\text{high} | \text{low})`.

    A conditional multiscale flow of the architecture of LLFlow, with any coupling. The noise is
    normal around a colour map that the encoder predicts, with every latent pixel's own colours,
    so that noise of zero already gives the enhanced image. The encoder is inside an
    :class:`flowguard.OODConditioner`: once fitted and calibrated, it tells at which level and
    where a condition is unlike the training set.

    References:
        | Low-Light Image Enhancement with Normalizing Flow (Wang et al., 2022)
        | https://arxiv.org/abs/2109.05923
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        levels: The number of levels :math:`L` of the flow.
        steps: The number of steps :math:`K` at each level, or one number for each level.
        hidden: The number of channels of the hidden layers of the couplings.
        coupling: The elementwise map of the couplings: ``"robust"``, ``"affine"``,
            ``"reparametrized"``, ``"bspline"``, or an object; see
            :func:`flowguard.image.elementwise`.
        encoder: The encoder, with as many levels; the published one by default.
        target_ratio: The share of the images in training for which the noise is centred on the
            colour map of the bright image itself, not on the predicted one.
        mix: The 1×1 convolutions; see :class:`flowguard.image.ConditionalMultiscaleFlow`.

    Images are RGB, with values in :math:`[0, 1]` and shape :math:`(B, 3, H, W)`, of any size:
    internally they are padded to what the flow needs, and cropped. In place of dark images, all
    methods take what :func:`flowguard.models.lowlight_encoder.low_light_input` made of them, with
    shape :math:`(B, 6, H, W)`, such as a crop of a larger image whose histogram was equalised.

    Example:
        >>> encoder = LowLightEncoder(features=8, growth=4, blocks=1, stacked=(0,), levels=2)
        >>> model = LowLightFlow(levels=2, steps=1, hidden=8, encoder=encoder).eval()
        >>> high, low = torch.rand(2, 3, 37, 53), 0.1 * torch.rand(2, 3, 37, 53)
        >>> model.nll(high, low).shape
        torch.Size([2])
        >>> model.conditioner.policy = "report"
        >>> model.sample(low, num_samples=5, temperature=0.8).shape
        torch.Size([5, 2, 3, 37, 53])
    """

    def __init__(
        self,
        *,
        levels: int = 3,
        steps: int | Sequence[int] = 12,
        hidden: int = 64,
        coupling: str | Elementwise = "robust",
        encoder: LowLightEncoder | None = None,
        target_ratio: float = 0.2,
        mix: str = "free",
    ) -> None:
        super().__init__()
        encoder = LowLightEncoder(levels=levels) if encoder is None else encoder
        if not isinstance(encoder, LowLightEncoder):
            raise TypeError(
                "encoder must be a flowguard.models.LowLightEncoder, which predicts the colour"
                f" map too; got {type(encoder).__name__}"
            )
        if encoder.levels != levels:
            raise ValueError(
                f"the encoder must have the {levels} levels of the flow; got {encoder.levels}"
            )
        if not 0 <= target_ratio <= 1:
            raise ValueError(f"target_ratio must lie in [0, 1]; got {target_ratio}")
        self.target_ratio = target_ratio
        self.conditioner = OODConditioner(encoder, policy="report")
        self.flow = published_flow(
            3,
            encoder.channels,
            levels=levels,
            steps=steps,
            hidden=hidden,
            coupling=coupling,
            mix=mix,
            splits=0,
        )

    def extra_repr(self) -> str:
        return f"target_ratio={self.target_ratio:g}"

    @property
    def encoder(self) -> LowLightEncoder:
        r"""The encoder."""
        return cast(LowLightEncoder, self.conditioner.encoder)

    def _pad_low(self, low: Tensor) -> Tensor:
        # Pixels that padding adds shall not count in the histogram: prepare, then pad.
        prepared = self.encoder.prepare(low)
        self._check_dtype("low", low)
        return pad_to_multiple(prepared, self.flow.multiple)

    def _check_dtype(self, name: str, images: Tensor) -> None:
        dtype = next(self.parameters()).dtype
        if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"{name} must have the dtype {dtype} of the model, with values in [0, 1];"
                f" got {images.dtype}"
            )

    def _check_high(self, high: Tensor, low: Tensor) -> None:
        if high.shape != (low.shape[0], 3, *low.shape[-2:]):
            raise ValueError(
                f"high must have shape {(low.shape[0], 3, *low.shape[-2:])} for low of shape"
                f" {tuple(low.shape)}; got {tuple(high.shape)}"
            )
        self._check_dtype("high", high)

    def _squeeze(self, colors: Tensor) -> Tensor:
        # One squeeze by 2^L, though the flow squeezes L times by 2: published, and as good.
        return F.pixel_unshuffle(colors, self.flow.multiple)

    def _condition(self, padded: Tensor) -> tuple[list[Tensor], Tensor]:
        """The feature maps of a prepared and padded condition, and the mean of the latent."""
        maps = self.conditioner(padded)
        return maps, self._squeeze(self.encoder.color_map(maps).to(padded.dtype))

    def _encode(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The latent before it is centred, its predicted mean, and the log-determinant."""
        padded = self._pad_low(low)
        self._check_high(high, low)
        maps, mean = self._condition(padded)
        latents, ladj = self.flow(pad_to(high, *padded.shape[-2:]), maps)
        return latents[0], mean, ladj

    def color_map(self, low: Tensor) -> Tensor:
        r"""Returns the colour map of the bright image that the encoder predicts.

        Arguments:
            low: The dark images, with shape :math:`(B, 3, H, W)`.
        """
        padded = self._pad_low(low)
        colors = self.encoder.color_map(self.conditioner(padded))
        return colors[..., : low.shape[-2], : low.shape[-1]]

    def nll(self, high: Tensor, low: Tensor, levels: int = 256) -> Tensor:
        r"""Returns an upper bound of the negative log-likelihood in bits per dimension.

        The image is dequantised with uniform noise, so that the bound holds for images with
        `levels` grey levels. An image whose size the flow does not take is padded by
        replication; the bits are those of the padded image, per padded dimension.

        In training mode, each image's noise is centred on its own colour map with probability
        `target_ratio`, as published (there once for the batch): a target that helps training, but
        knows of the bright image. Only in evaluation mode are the bits those of a density of the
        bright image given the dark one.

        Arguments:
            high: The bright images, with shape :math:`(B, 3, H, W)`.
            low: The dark images, with shape :math:`(B, 3, H, W)`.
            levels: The number of grey levels of `high`.

        Returns:
            The bits per dimension of each image, with shape :math:`(B)`.
        """
        if levels < 2:
            raise ValueError(f"there must be at least 2 grey levels; got {levels}")
        self._pad_low(low)
        self._check_high(high, low)
        noisy = high + (torch.rand_like(high) - 0.5) / (levels - 1)
        z, mean, ladj = self._encode(noisy, low)
        if self.training:
            mean = self._mixed(mean, high)
        log_prob = ladj - 0.5 * ((z - mean).square() + math.log(2 * math.pi)).flatten(1).sum(1)
        return -log_prob / (math.log(2) * z[0].numel()) + math.log2(levels - 1)

    def _mixed(self, mean: Tensor, high: Tensor) -> Tensor:
        """The mean in training: some rows are those of the bright images' own colour maps."""
        own = self._squeeze(color_map(pad_to_multiple(high, self.flow.multiple)))
        drawn = torch.rand(len(high), 1, 1, 1, device=high.device) < self.target_ratio
        return torch.where(drawn, own, mean)

    def encode(self, high: Tensor, low: Tensor) -> tuple[list[Tensor], Tensor]:
        r"""Takes bright images to latents, given their dark images.

        Arguments:
            high: The bright images, with shape :math:`(B, 3, H, W)`.
            low: The dark images, with shape :math:`(B, 3, H, W)`.

        Returns:
            A list with the latent, centred on the colour map, that is standard normal under the
            model, and the log-determinant, with shape :math:`(B)`.
        """
        z, mean, ladj = self._encode(high, low)
        return [z - mean], ladj

    def decode(self, latents: Sequence[Tensor], low: Tensor) -> Tensor:
        r"""Takes latents to bright images, given the dark images. Nothing is clamped.

        Arguments:
            latents: A list with the centred latent; see :meth:`latent_shapes`. Zeros give the
                published output. It may have :math:`n B` rows: row :math:`i` then belongs to dark
                image :math:`i \bmod B`.
            low: The dark images, with shape :math:`(B, 3, H, W)`.

        Returns:
            The bright images, with shape :math:`(n B, 3, H, W)`.
        """
        if len(latents) != 1:
            raise ValueError(f"there must be a list with one latent; got {len(latents)}")
        maps, mean = self._condition(self._pad_low(low))
        high, _ = self.flow.inverse([latents[0] + repeat_rows(mean, latents[0])], maps)
        return high[..., : low.shape[-2], : low.shape[-1]]

    def latent_shapes(self, low: Tensor) -> list[tuple[int, int, int]]:
        r"""Returns the shape :math:`(C, H, W)` of the latent for such dark images, in a list.

        Arguments:
            low: The dark images, with shape :math:`(B, 3, H, W)`.
        """
        multiple = self.flow.multiple
        height, width = (multiple * math.ceil(n / multiple) for n in low.shape[-2:])
        return self.flow.latent_shapes(height, width)

    @torch.no_grad()
    def sample(
        self,
        low: Tensor,
        num_samples: int = 1,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        brightness: Tensor | float | None = None,
    ) -> Tensor:
        r"""Draws bright images given dark ones. Nothing is clamped.

        Arguments:
            low: The dark images, with shape :math:`(B, 3, H, W)`.
            num_samples: The number :math:`n` of samples for each image.
            temperature: The standard deviation of the latents, not negative. Zero, as published,
                gives the same image each time.
            generator: A source of randomness, on the device of `low`.
            brightness: The mean that each sample is scaled to, a number or one for each dark
                image with shape :math:`(B)`; see :func:`rescale_brightness`.

        Returns:
            The samples, with shape :math:`(n, B, 3, H, W)`.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive; got {num_samples}")
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative; got {temperature}")
        (shape,) = self.latent_shapes(low)
        rows = num_samples * low.shape[0]
        latent = torch.randn(rows, *shape, generator=generator, dtype=low.dtype, device=low.device)
        samples = self.decode([temperature * latent], low).unflatten(0, (num_samples, -1))
        if brightness is None:
            return samples
        wanted = torch.as_tensor(brightness, device=low.device).expand(samples.shape[:2])
        return rescale_brightness(samples, wanted)


@rule(LowLightFlow)
def _low_light(model: LowLightFlow, inverse: bool) -> Iterator[Step]:
    for step in within("flow", model.flow, inverse):
        yield step
        if isinstance(step, Noise):
            yield Univariate(
                name="mean",
                kind="colour map",
                envelope=Envelope(1.0, 1.0, displacement=1.0),
                depends="adds a colour map in (0, 1)",
            )
