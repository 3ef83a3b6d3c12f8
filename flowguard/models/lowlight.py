r"""Low-light enhancement by a conditional flow."""

__all__ = ["LowLightFlow", "rescale_brightness"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.image.flow import Conditions, published_flow
from flowguard.image.layers import Squeeze
from flowguard.image.maps import Coupling, Elementwise
from flowguard.image.tiling import tiled_forward, tiled_inverse
from flowguard.models._padding import pad_to_multiple
from flowguard.models.base import MEMORY, TileSize, bar, check_sampling, groups, pixels_of
from flowguard.models.checkpoints import (
    DEAD,
    CheckpointError,
    ImportReport,
    Source,
    State,
    count_blocks,
    dtype_of,
    kernel_of,
    load,
    plan_flow,
    plan_module,
    read_flow_layout,
    read_state,
)
from flowguard.models.encoders.lowlight import LowLightEncoder, color_map
from flowguard.models.store import Pretrained
from flowguard.numerics import normal_log_prob, repeat_rows
from flowguard.ood import OODConditioner

BITS = ("dim", "pixel")
#: What LLFlow's encoder carries along and never reads, beside the last of its ``downconv``.
DEAD_ENCODER = ("HRconv", "awb_para", "conv_last")


@dataclass(frozen=True)
class LowLightCondition:
    r"""All that depends on the condition of a model alone, to be shared by many calls.

    :meth:`LowLightFlow.condition` makes it. It is of no use to another model, nor to the same one
    after a step of training.
    """

    low: Tensor
    mean: Tensor  # of the latent
    maps: Conditions


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
    if not isinstance(image, Tensor) or not image.is_floating_point():
        given = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be a tensor of floating-point numbers; got {given}")
    known = torch.isfinite(image)
    dtype = torch.promote_types(image.dtype, torch.float32)
    cut = torch.where(known, image, 0.0).clamp(0, 1).flatten(-3).sum(-1, dtype=dtype)
    mean = cut / known.flatten(-3).sum(-1).clamp_min(1)
    wanted = torch.as_tensor(brightness, dtype=dtype, device=image.device)
    if wanted.dim() and wanted.shape != mean.shape:
        raise ValueError(
            f"brightness must be a number or have the shape {tuple(mean.shape)}, one for each"
            f" image; got {tuple(wanted.shape)}"
        )
    if not bool(((wanted >= 0) & wanted.isfinite()).all()):
        raise ValueError(f"brightness must be finite and not negative; got {brightness}")
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
        quant: The number of grey levels of the images.

    Images are RGB, with values in :math:`[0, 1]` and shape :math:`(B, 3, H, W)`, of any size:
    internally they are padded to what the flow needs, and cropped. In place of dark images, all
    methods take what :func:`flowguard.models.encoders.lowlight.low_light_input` made of them, with
    shape :math:`(B, 6, H, W)`, such as a crop of a larger image whose histogram was equalised.

    Example:
        >>> encoder = LowLightEncoder(features=8, growth=4, blocks=1, stacked=(0,), levels=2)
        >>> model = LowLightFlow(levels=2, steps=1, hidden=8, encoder=encoder)
        >>> high, low = torch.rand(2, 3, 37, 53), 0.1 * torch.rand(2, 3, 37, 53)
        >>> model.nll(high, low).shape
        torch.Size([2])
        >>> model.sample(low, num_samples=5, temperature=0.8).shape
        torch.Size([5, 2, 3, 37, 53])
    """

    def __init__(
        self,
        *,
        levels: int = 3,
        steps: int | Sequence[int] = 12,
        hidden: int = 64,
        coupling: Coupling = "robust",
        encoder: LowLightEncoder | None = None,
        target_ratio: float = 0.2,
        mix: str = "free",
        quant: int = 256,
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
        if quant < 2:
            raise ValueError(f"there must be at least 2 grey levels; got quant={quant}")
        self.target_ratio = target_ratio
        self.quant = quant
        self.import_report: ImportReport | None = None
        self.conditioner = OODConditioner(encoder, policy="report")
        # One squeeze by 2^L, though the flow squeezes L times by 2: published, and as good.
        self.squeeze = Squeeze(2**levels)
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
        r"""Returns the target ratio, for the printed module."""
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
                f"{name} must have the dtype {dtype} of the model; got {images.dtype}."
                " Images have values in [0, 1]"
            )

    def _check_high(self, high: Tensor, low: Tensor) -> None:
        if not isinstance(high, Tensor):
            raise TypeError(f"high must be a tensor of bright images; got {type(high).__name__}")
        if high.shape != (low.shape[0], 3, *low.shape[-2:]):
            raise ValueError(
                f"high must have shape {(low.shape[0], 3, *low.shape[-2:])} for low of shape"
                f" {tuple(low.shape)}; got {tuple(high.shape)}"
            )
        self._check_dtype("high", high)

    def _squeeze(self, colors: Tensor) -> Tensor:
        return self.squeeze(colors)[0]

    def condition(self, low: Tensor) -> LowLightCondition:
        r"""Computes all that depends on the condition alone, to be shared by many calls.

        Whatever takes dark images takes this instead.

        Arguments:
            low: The dark images, with shape :math:`(B, 3, H, W)`.
        """
        maps, mean = self._features(low)
        return LowLightCondition(low, mean, self.flow.condition(maps))

    def _features(self, low: Tensor) -> tuple[list[Tensor], Tensor]:
        """The feature maps, and the mean of the latent."""
        padded = self._pad_low(low)
        maps = self.conditioner(padded)
        return maps, self._squeeze(self.encoder.color_map(maps).to(padded.dtype))

    def _condition(self, low: Tensor | LowLightCondition) -> LowLightCondition:
        return low if isinstance(low, LowLightCondition) else self.condition(_images(low))

    def color_map(self, low: Tensor | LowLightCondition) -> Tensor:
        r"""Returns the colour map of the bright image that the encoder predicts.

        Arguments:
            low: The dark images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
        """
        condition = self._condition(low)
        height, width = condition.low.shape[-2:]
        return self.squeeze.inverse(condition.mean)[0][..., :height, :width]

    def nll(
        self,
        high: Tensor,
        low: Tensor | LowLightCondition,
        levels: int | None = None,
        *,
        dequantize: bool = True,
        bits_per: str = "dim",
    ) -> Tensor:
        r"""Returns an upper bound of the negative log-likelihood in bits per dimension.

        The image is dequantised with uniform noise, so that the bound holds for images with
        `levels` grey levels. An image whose size the flow does not take is padded by
        replication; the bits are those of the padded image, per padded dimension.

        The published models were trained with ``dequantize=False, bits_per="pixel"``: without
        the noise, and divided by the number of pixels rather than that of dimensions. That is a
        density of numbers that are in truth discrete, and bounds nothing.

        In training mode, each image's noise is centred on its own colour map with probability
        `target_ratio` (published: all images of a batch or none, in evaluation too): a target
        that helps training, but knows of the bright image. Only in evaluation mode are the bits
        those of a density of the bright image given the dark one.

        Arguments:
            high: The bright images, with shape :math:`(B, 3, H, W)`.
            low: The dark images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            levels: The number of grey levels of `high`. If :py:`None`, `quant`.
            dequantize: Whether to dequantise.
            bits_per: What the bits are divided by: ``"dim"`` or ``"pixel"``.

        Returns:
            The bits per dimension, or per pixel, of each image, with shape :math:`(B)`.
        """
        levels = self.quant if levels is None else levels
        if levels < 2:
            raise ValueError(f"there must be at least 2 grey levels; got {levels}")
        if bits_per not in BITS:
            raise ValueError(f"bits_per must be one of {', '.join(BITS)}; got {bits_per!r}")
        condition = self._condition(low)
        self._check_high(high, condition.low)
        noisy = high + (torch.rand_like(high) - 0.5) / (levels - 1) if dequantize else high
        latents, ladj = self.encode(noisy, condition)
        (z,) = latents
        if self.training:
            z = self._mixed(z, condition.mean, high)
        log_prob = ladj + normal_log_prob(z)
        bits = -log_prob / (math.log(2) * math.prod(z.shape[1:]))
        if dequantize:
            bits = bits + math.log2(levels - 1)
        return bits if bits_per == "dim" else 3 * bits

    def _mixed(self, z: Tensor, mean: Tensor, high: Tensor) -> Tensor:
        """The latent in training: some rows are centred on the bright images' own colours."""
        own = self._squeeze(color_map(pad_to_multiple(high, self.flow.multiple)))
        drawn = torch.rand(len(high), 1, 1, 1, device=high.device) < self.target_ratio
        return torch.where(drawn, z + mean - own, z)

    def encode(
        self,
        high: Tensor,
        low: Tensor | LowLightCondition,
        *,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
    ) -> tuple[list[Tensor], Tensor]:
        r"""Takes bright images to latents, given their dark images.

        Arguments:
            high: The bright images, with shape :math:`(B, 3, H, W)`.
            low: The dark images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            tile: The height and width of a tile in pixels, or ``"auto"``; see :meth:`decode`.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.

        Returns:
            A list with the latent, centred on the colour map, which is standard normal under the
            model, and the log-determinant, with shape :math:`(B)`.
        """
        if tile is None:
            condition = self._condition(low)
            self._check_high(high, condition.low)
            padded = pad_to_multiple(high, self.flow.multiple)
            latents, ladj = self.flow(padded, condition.maps)
            return [z - condition.mean for z in latents], ladj
        low = _whole(low)
        with torch.no_grad():
            maps, mean = self._features(low)
            self._check_high(high, low)
            padded = pad_to_multiple(high, self.flow.multiple)
            size = pixels_of(tile, self.flow, memory, len(low))
            height, width = padded.shape[-2:]
            with bar(self.flow, height, width, progress) as tell:
                latents, ladj = tiled_forward(self.flow, padded, maps, size, None, tell)
        return [z - mean for z in latents], ladj

    def decode(
        self,
        latents: Sequence[Tensor],
        low: Tensor | LowLightCondition,
        *,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
    ) -> Tensor:
        r"""Takes latents to bright images, given the dark images. Nothing is clamped.

        With `tile`, each step of the flow goes over the image a tile at a time, which takes far
        less memory, and no gradients. The image is that of the untiled computation but for
        rounding: there are no seams. The encoder's maps are held as a whole all the same.

        Arguments:
            latents: A list with the centred latent; see :meth:`latent_shapes`. Zeros give the
                published output. It may have :math:`n B` rows: row :math:`i` then belongs to dark
                image :math:`i \bmod B`.
            low: The dark images, with shape :math:`(B, 3, H, W)`, or, without `tile`, what
                :meth:`condition` made.
            tile: The height and width of a tile in pixels, or ``"auto"`` for what `memory`
                allows. If :py:`None`, the image is taken as a whole.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.

        Returns:
            The bright images, with shape :math:`(n B, 3, H, W)`.
        """
        if not isinstance(latents, Tensor) and len(latents) != 1:
            raise ValueError(f"there must be a list with one latent; got {len(latents)}")
        self.flow.check_latents(latents)
        self._check_dtype("the latent", latents[0])
        if tile is None:
            condition = self._condition(low)
            low = condition.low
            z = latents[0] + repeat_rows(condition.mean, latents[0])
            high, _ = self.flow.inverse([z], condition.maps, ladj=False)
        else:
            low = _whole(low)
            with torch.no_grad():
                maps, mean = self._features(low)
                z = latents[0] + repeat_rows(mean, latents[0])
                size = pixels_of(tile, self.flow, memory, len(low))
                height, width = (self.flow.multiple * n for n in mean.shape[-2:])
                with bar(self.flow, height, width, progress) as tell:
                    high = tiled_inverse(self.flow, [z], maps, size, None, tell)
        return high[..., : low.shape[-2], : low.shape[-1]]

    def latent_shapes(self, low: Tensor | LowLightCondition) -> list[tuple[int, int, int]]:
        r"""Returns the shape :math:`(C, H, W)` of the latent for such dark images, in a list.

        Arguments:
            low: The dark images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
        """
        size = (low.low if isinstance(low, LowLightCondition) else _images(low)).shape[-2:]
        multiple = self.flow.multiple
        height, width = (multiple * math.ceil(n / multiple) for n in size)
        return self.flow.latent_shapes(height, width)

    @torch.no_grad()
    def sample(
        self,
        low: Tensor | LowLightCondition,
        num_samples: int = 1,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        brightness: Tensor | float | None = None,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
    ) -> Tensor:
        r"""Draws bright images given dark ones. Nothing is clamped.

        Arguments:
            low: The dark images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            num_samples: The number :math:`n` of samples for each image.
            temperature: The standard deviation of the latents, not negative. Zero, as published,
                gives the same image each time.
            generator: A source of randomness, on the device of `low`.
            brightness: The mean that each sample is scaled to, a number or one for each dark
                image with shape :math:`(B)`; see :func:`rescale_brightness`.
            tile: The height and width of a tile in pixels, or ``"auto"``; see :meth:`decode`. The
                latents are drawn for the whole image, and are the same.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.

        Returns:
            The samples, with shape :math:`(n, B, 3, H, W)`.
        """
        check_sampling(num_samples, temperature)
        (shape,) = self.latent_shapes(low)
        like = low.low if isinstance(low, LowLightCondition) else self.encoder.prepare(low)
        latent = temperature * torch.randn(
            num_samples,
            len(like),
            *shape,
            generator=generator,
            dtype=like.dtype,
            device=like.device,
        )
        if tile is None:
            condition = self._condition(low)
            size = like.shape[-2] * like.shape[-1]
            parts = [self.decode([rows], condition) for rows in groups(latent, size)]
            samples = torch.cat(parts).unflatten(0, latent.shape[:2])
        else:
            rows = latent.flatten(0, 1)
            tiled = self.decode([rows], low, tile=tile, memory=memory, progress=progress)
            samples = tiled.unflatten(0, latent.shape[:2])
        if brightness is None:
            return samples
        wanted = torch.as_tensor(brightness, device=like.device)
        if wanted.dim() and wanted.shape != (len(like),):
            raise ValueError(
                f"brightness must be a number or have the shape {(len(like),)}, one for each dark"
                f" image; got {tuple(wanted.shape)}"
            )
        return rescale_brightness(samples, wanted.expand(samples.shape[:2]))

    @classmethod
    def published(
        cls,
        *,
        small: bool = False,
        coupling: Coupling = "robust",
        **options: Any,
    ) -> Self:
        r"""Returns an untrained model of the published size, with any coupling.

        Arguments:
            small: Whether to return LLFlow's small net rather than its large one.
            coupling: The elementwise map of the couplings.
            options: Further arguments of :class:`LowLightFlow`.

        Example:
            >>> model = LowLightFlow.published(small=True)
            >>> model.encoder.channels, len(model.flow.steps[0])
            (64, 4)
        """
        if small:
            small_net = LowLightEncoder(32, blocks=4, stacked=(1,))
            return cls(steps=4, encoder=small_net, coupling=coupling, **options)
        return cls(coupling=coupling, **options)

    @classmethod
    def from_llflow(
        cls,
        source: Source,
        *,
        stacked: Sequence[int] | None = None,
        coupling: Elementwise | None = None,
    ) -> Self:
        r"""Returns LLFlow's model with the weights of one of its checkpoints, for evaluation.

        Levels, steps, coupling and encoder are inferred from the shapes. What each key became is
        told by the attribute `import_report`.

        Arguments:
            source: The path of the checkpoint, or the state dict: raw or nested, with or without
                ``module.`` before its names.
            stacked: The blocks whose outputs the encoder stacks, which no shape tells. If
                :py:`None`, those of the published configurations: 1, or 1, 3, 5 and 7.
            coupling: The elementwise map, if it is not the one that the names tell.

        Raises:
            CheckpointError: If it is no such checkpoint: if keys are missing, unexpected, or of
                another shape, with their names. It is a :class:`ValueError`.
        """
        state, label = read_state(source)
        layout = read_flow_layout(state, label)
        if layout.noise_channels or "RRDB.conv_second.weight" not in state:
            raise CheckpointError(
                f"{label} is a checkpoint of a super-resolution flow, or lacks the key"
                " RRDB.conv_second.weight of LLFlow's encoder: for the former see"
                " SuperResolutionFlow.from_srflow and from_robustnf"
            )
        flow = layout.options
        if flow.pop("splits"):
            raise CheckpointError(f"{label} has splits; those of LLFlow have none")
        encoder = _encoder_options(state, label, layout.context_channels)
        encoder |= {} if stacked is None else {"stacked": tuple(stacked)}
        made = {**flow, "coupling": layout.map if coupling is None else coupling}
        transitions = made.pop("transition_steps")
        if transitions != 2:
            raise CheckpointError(
                f"{label} must have 2 steps without coupling at each level; it has {transitions}"
            )
        # Drawing the weights that are overwritten must not disturb the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            model = cls(**made, encoder=LowLightEncoder(**encoder, levels=made["levels"]))
        model.to(dtype_of(state, label))
        plan = plan_module(model.encoder, "conditioner.encoder.", "RRDB.")
        plan |= plan_flow(model.flow, layout)
        unread = (*DEAD_ENCODER, f"downconv{made['levels']}")
        model.import_report = load(
            model,
            plan,
            state,
            label=label,
            dead=(*DEAD, *(f"RRDB.{n}.{leaf}" for n in unread for leaf in ("weight", "bias"))),
            inferred={**made, "encoder": encoder},
        )
        return model.eval()


def _whole(low: Tensor | LowLightCondition) -> Tensor:
    if isinstance(low, LowLightCondition):
        raise TypeError(
            "tiles are there so that the condition is never held as a whole: give the dark images,"
            " not what condition() made of them"
        )
    return _images(low)


def _images(low: Tensor) -> Tensor:
    if not isinstance(low, Tensor):
        raise TypeError(
            "low must be a tensor of dark images, or what condition() made of them;"
            f" got {type(low).__name__}"
        )
    return low


def _encoder_options(state: State, label: str, context_channels: int) -> dict[str, Any]:
    """Infers the encoder from the shapes of its tensors."""
    features = kernel_of(state, "RRDB.conv_first.weight", label)[0]
    count = context_channels // features - 1
    return {
        "features": features,
        "growth": kernel_of(state, "RRDB.RRDB_trunk.0.RDB1.conv1.weight", label)[0],
        "blocks": count_blocks(state, "RRDB.RRDB_trunk."),
        "stacked": tuple(2 * i + 1 for i in range(count)),
    }
