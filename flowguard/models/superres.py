r"""Super-resolution by a conditional flow."""

__all__ = ["ImageCondition", "SuperResolutionFlow"]

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.image.flow import ConditionalMultiscaleFlow, FlowCondition
from flowguard.image.maps import Coupling, Elementwise
from flowguard.image.published import published_flow
from flowguard.image.tiling import tiled_forward, tiled_inverse
from flowguard.models._padding import pad_to, pad_to_multiple
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
from flowguard.models.encoders.pyramid import PyramidEncoder
from flowguard.models.encoders.rrdb import RRDBEncoder
from flowguard.models.store import Pretrained
from flowguard.numerics import normal_log_prob, repeat_rows
from flowguard.ood import OODConditioner

BITS = ("dim", "pixel")
FLOWS: dict[str, Callable[..., ConditionalMultiscaleFlow]] = {
    "bounded": ConditionalMultiscaleFlow,
    "published": published_flow,
}


@dataclass(frozen=True)
class ImageCondition:
    r"""All that depends on the condition of a model alone, to be shared by many calls.

    :meth:`SuperResolutionFlow.condition` makes it. It is of no use to another model, nor to the
    same one after a step of training.
    """

    lr: Tensor
    base: Tensor | None  # the upsampled condition, where the flow models the residual over it
    maps: FlowCondition


class SuperResolutionFlow(Pretrained, nn.Module):
    r"""Creates a conditional flow for super-resolution, :math:`p(\text{HR} | \text{LR})`.

    A conditional multiscale flow models the residual of the high-resolution image over the
    bicubic upsampling of the low-resolution one. Its encoder is an
    :class:`flowguard.OODConditioner`: once fitted and calibrated, it tells at which level and
    where a condition is unlike the training set.

    The published models are of this class too: see :meth:`published`, :meth:`from_srflow` and
    :meth:`from_robustnf`.

    References:
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200
        | Noise Conditional Flow Model for Learning the Super-Resolution Space (Kim & Son, 2021)
        | https://arxiv.org/abs/2106.04428
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        scale: The upscaling factor, a power of two from 2.
        levels: The number of levels :math:`L` of the flow.
        steps: The number of steps :math:`K` at each level, or one number for each level.
        hidden: The number of channels of the hidden layers of the couplings.
        features: The number of channels of the feature maps. If :py:`None`, that of the encoder,
            or 64.
        coupling: The elementwise map of the couplings: ``"robust"``, ``"affine"``,
            ``"reparametrized"``, ``"bspline"``, or an object; see
            :func:`flowguard.image.elementwise`.
        encoder: A module from LR images to a list with one map of `features` channels for each
            level; see :class:`flowguard.models.PyramidEncoder`, the default, and
            :class:`flowguard.models.RRDBEncoder`.
        architecture: ``"bounded"`` for :class:`flowguard.image.ConditionalMultiscaleFlow` as it
            is, whose priors are bounded, or ``"published"`` for that of SRFlow, NCSR and robustNF;
            see :func:`flowguard.image.published_flow`.
        mix: The 1×1 convolutions; see :class:`flowguard.image.FlowStep`.
        transition_steps: The number of steps without coupling at the start of each level. If
            :py:`None`, that of the architecture: none, or 2.
        splits: The number of levels at whose end channels leave. If :py:`None`, that of the
            architecture: all but one, or all but two.
        residual: Whether the flow models the residual over the bicubic upsampling, as in NCSR, or
            the image itself, as in SRFlow.
        quant: The number of grey levels of the images.
        noise_std: If given, the flow is made to know of noise, as in NCSR: training adds noise to
            both images, with a standard deviation up to this for each pair, and tells the flow.
        noise_steps: For each level, how many of its last steps are told of the noise. If
            :py:`None`, all.

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
        steps: int | Sequence[int] = 4,
        hidden: int = 64,
        features: int | None = None,
        coupling: Coupling = "robust",
        encoder: nn.Module | None = None,
        architecture: str = "bounded",
        mix: str = "free",
        transition_steps: int | None = None,
        splits: int | None = None,
        residual: bool = True,
        quant: int = 256,
        noise_std: float | None = None,
        noise_steps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two from 2; got {scale}")
        if architecture not in FLOWS:
            raise ValueError(
                f"architecture must be one of {', '.join(FLOWS)}; got {architecture!r}"
            )
        if quant < 2:
            raise ValueError(f"there must be at least 2 grey levels; got quant={quant}")
        if noise_std is not None and not 0 <= noise_std < math.inf:
            raise ValueError(f"noise_std must not be negative, or be None; got {noise_std}")
        self.scale = scale
        self.overshoots = architecture == "published"
        self.residual = residual
        self.quant = quant
        self.noise_std = noise_std
        self.import_report: ImportReport | None = None
        own: int | None = getattr(encoder, "channels", None)
        features = (own or 64) if features is None else features
        if features < 1:
            raise ValueError(f"features must be positive; got {features}")
        if own not in (None, features):
            raise ValueError(f"features must be the {own} channels of the encoder; got {features}")
        if encoder is None:
            encoder = PyramidEncoder(features, scale=scale, levels=levels)
        self.conditioner = OODConditioner(encoder, policy="report")
        own_count = {} if transition_steps is None else {"transition_steps": transition_steps}
        self.flow = FLOWS[architecture](
            3,
            features,
            levels=levels,
            steps=steps,
            hidden=hidden,
            coupling=coupling,
            mix=mix,
            splits=splits,
            noise_channels=0 if noise_std is None else 3,
            noise_steps=noise_steps,
            **own_count,
        )

    @property
    def lr_multiple(self) -> int:
        r"""What the size of an LR image is padded to a multiple of."""
        return max(1, self.flow.multiple // self.scale)

    def _pad_lr(self, lr: Tensor) -> Tensor:
        if not isinstance(lr, Tensor):
            raise TypeError(
                "lr must be a tensor of LR images, or what condition() made of them;"
                f" got {type(lr).__name__}"
            )
        if lr.dim() != 4 or lr.shape[1] != 3 or 0 in lr.shape[-2:]:
            raise ValueError(f"lr must have shape (B, 3, H, W); got {tuple(lr.shape)}")
        self._check_dtype("lr", lr)
        return pad_to_multiple(lr, self.lr_multiple)

    def _check_dtype(self, name: str, images: Tensor) -> None:
        dtype = next(self.parameters()).dtype
        if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"{name} must have the dtype {dtype} of the model; got {images.dtype}."
                " Images have values in [0, 1]"
            )

    def _check_hr(self, hr: Tensor, lr: Tensor) -> None:
        if not isinstance(hr, Tensor):
            raise TypeError(f"hr must be a tensor of HR images; got {type(hr).__name__}")
        h, w = lr.shape[-2:]
        fits = hr.dim() == 4 and tuple(math.ceil(n / self.scale) for n in hr.shape[-2:]) == (h, w)
        if not fits or hr.shape[:2] != lr.shape[:2]:
            raise ValueError(
                f"hr must have shape {(lr.shape[0], 3, self.scale * h, self.scale * w)} for lr of"
                f" shape {tuple(lr.shape)} (less than {self.scale} rows or columns may lack);"
                f" got {tuple(hr.shape)}"
            )
        self._check_dtype("hr", hr)

    def _check_latents(self, latents: Sequence[Tensor]) -> None:
        self.flow.check_latents(latents)
        self._check_dtype("the latents", latents[0])

    def condition(self, lr: Tensor, noise: Tensor | float | None = 0.0) -> ImageCondition:
        r"""Computes all that depends on the condition alone, to be shared by many calls.

        Whatever takes LR images takes this instead.

        Arguments:
            lr: The LR images, with shape :math:`(B, 3, H, W)`.
            noise: The noise that a noise-conditional flow is told of: a map with shape
                :math:`(B, 3, H', W')` of any size, or one number for all. If :py:`None`, the
                parts of the flow that know of noise are left out, which is not the same as 0.

        Example:
            >>> model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
            >>> condition = model.condition(torch.rand(1, 3, 5, 6))
            >>> a, b = model.sample(condition), model.sample(condition, num_samples=4)
        """
        padded, base, told = self._inputs(lr, noise)
        return ImageCondition(lr, base, self.flow.condition(self.conditioner(padded), told))

    def _inputs(
        self, lr: Tensor, noise: Tensor | float | None = 0.0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        r"""The padded LR images, what the flow's residual is added to, and the noise map."""
        padded = self._pad_lr(lr)
        base = self.upsample(padded) if self.residual else None
        if not self.flow.noise_channels and isinstance(noise, Real) and noise == 0:
            noise = None
        if isinstance(noise, float | Real):  # a float is one, which type checkers do not know
            if not 0 <= noise < math.inf:
                raise ValueError(f"the noise must be finite and not negative; got {noise}")
            noise = lr.new_full((1, 1, 1, 1), float(noise))
        return padded, base, noise

    def _condition(self, lr: Tensor | ImageCondition) -> ImageCondition:
        return lr if isinstance(lr, ImageCondition) else self.condition(lr)

    def upsample(self, lr: Tensor) -> Tensor:
        r"""Returns the bicubic upsampling that the flow's residual is added to.

        Beside hard edges it overshoots. Unless the architecture is the published one, it is cut
        to the range that :math:`[0, 1]` and the image span.

        Arguments:
            lr: The LR images, with shape :math:`(B, 3, H, W)`.
        """
        base = F.interpolate(lr, scale_factor=float(self.scale), mode="bicubic")
        if self.overshoots:
            return base
        known = lr.detach().nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)
        low = known.amin((1, 2, 3), keepdim=True).clamp(max=0.0)
        return base.clamp(low, known.amax((1, 2, 3), keepdim=True).clamp(min=1.0))

    def nll(
        self,
        hr: Tensor,
        lr: Tensor | ImageCondition,
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

        In training mode a noise-conditional model adds further noise to both images; see
        `noise_std`.

        Arguments:
            hr: The HR images, with shape :math:`(B, 3, sH, sW)`.
            lr: The LR images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            levels: The number of grey levels of `hr`. If :py:`None`, `quant`.
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
        if isinstance(lr, Tensor):
            self._pad_lr(lr)
        self._check_hr(hr, lr if isinstance(lr, Tensor) else lr.lr)
        if dequantize:
            hr = hr + (torch.rand_like(hr) - 0.5) / (levels - 1)
        if self.noise_std is not None and self.training and isinstance(lr, Tensor):
            hr, lr = self._with_noise(hr, lr, self.noise_std)
        latents, ladj = self.encode(hr, lr)
        log_prob = ladj + normal_log_prob(latents)
        dims = sum(math.prod(z.shape[1:]) for z in latents)
        bits = -log_prob / (math.log(2) * dims)
        if dequantize:
            bits = bits + math.log2(levels - 1)
        return bits if bits_per == "dim" else 3 * bits

    def _with_noise(self, hr: Tensor, lr: Tensor, most: float) -> tuple[Tensor, ImageCondition]:
        r"""The pair with noise on both images, the LR image's being the HR image's, shrunk."""
        lr = self._pad_lr(lr)
        hr = pad_to(hr, self.scale * lr.shape[-2], self.scale * lr.shape[-1])
        std = torch.rand_like(hr[:, :1, :1, :1]) * most
        noise = std * torch.randn_like(hr)
        small = F.interpolate(noise, size=lr.shape[-2:], mode="bicubic", antialias=True)
        return hr + noise, self.condition(lr + small, noise)

    def encode(
        self,
        hr: Tensor,
        lr: Tensor | ImageCondition,
        *,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
    ) -> tuple[list[Tensor], Tensor]:
        r"""Takes HR images to latents, given their LR images.

        Arguments:
            hr: The HR images, with shape :math:`(B, 3, sH, sW)`.
            lr: The LR images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            tile: The height and width of a tile in pixels of the HR image, or ``"auto"``; see
                :meth:`decode`.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.

        Returns:
            The latents, as :meth:`latent_shapes` lists them, and the log-determinant, with shape
            :math:`(B)`.
        """
        if tile is None:
            condition = self._condition(lr)
            x = self._from_hr(hr, condition.lr, condition.base)
            return self.flow(x, condition.maps)
        lr = self._whole(lr)
        padded, base, noise = self._inputs(lr)
        x = self._from_hr(hr, lr, base)
        size = pixels_of(tile, self.flow, memory, len(lr))
        with torch.no_grad(), bar(self.flow, *self._hr_size(lr), progress) as tell:
            return tiled_forward(self.flow, x, self.conditioner(padded), size, noise, tell)

    def _from_hr(self, hr: Tensor, lr: Tensor, base: Tensor | None) -> Tensor:
        self._check_hr(hr, lr)
        x = pad_to(hr, *self._hr_size(lr))
        return x if base is None else x - base

    def _whole(self, lr: Tensor | ImageCondition) -> Tensor:
        if isinstance(lr, ImageCondition):
            raise TypeError(
                "tiles are there so that the condition is never held as a whole: give the LR"
                " images, not what condition() made of them"
            )
        return lr

    def decode(
        self,
        latents: Sequence[Tensor],
        lr: Tensor | ImageCondition,
        *,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
    ) -> Tensor:
        r"""Takes latents to HR images, given the LR images. Nothing is clamped.

        With `tile`, each step of the flow goes over the image a tile at a time, which takes far
        less memory, and no gradients. The image is that of the untiled computation but for
        rounding: there are no seams. The encoder's maps are held as a whole all the same.

        Arguments:
            latents: The latents; see :meth:`latent_shapes`. They may have
                :math:`n B` rows: row :math:`i` then belongs to LR image :math:`i \bmod B`.
            lr: The LR images, with shape :math:`(B, 3, H, W)`, or, without `tile`, what
                :meth:`condition` made.
            tile: The height and width of a tile in pixels of the HR image, or ``"auto"`` for what
                `memory` allows. If :py:`None`, the image is taken as a whole.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.

        Returns:
            The HR images, with shape :math:`(n B, 3, sH, sW)`.

        Example:
            >>> model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
            >>> lr = torch.rand(1, 3, 40, 50)
            >>> latents = [torch.randn(2, *shape) for shape in model.latent_shapes(lr)]
            >>> whole = model.eval().decode(latents, lr)
            >>> torch.allclose(model.decode(latents, lr, tile=32), whole, atol=1e-5)
            True
        """
        self._check_latents(latents)
        if tile is None:
            condition = self._condition(lr)
            x, _ = self.flow.inverse(latents, condition.maps, ladj=False)
            return self._to_hr(x, condition.lr, condition.base)
        lr = self._whole(lr)
        padded, base, noise = self._inputs(lr)
        size = pixels_of(tile, self.flow, memory, len(lr))
        with torch.no_grad(), bar(self.flow, *self._hr_size(lr), progress) as tell:
            x = tiled_inverse(self.flow, latents, self.conditioner(padded), size, noise, tell)
            return self._to_hr(x, lr, base)

    def _to_hr(self, x: Tensor, lr: Tensor, base: Tensor | None) -> Tensor:
        if base is not None:
            x = x + repeat_rows(base, x)
        height, width = lr.shape[-2:]
        return x[..., : self.scale * height, : self.scale * width]

    def _hr_size(self, lr: Tensor) -> tuple[int, int]:
        height, width = (
            self.scale * self.lr_multiple * math.ceil(n / self.lr_multiple) for n in lr.shape[-2:]
        )
        return height, width

    def latent_shapes(self, lr: Tensor | ImageCondition) -> list[tuple[int, int, int]]:
        r"""Returns the shape :math:`(C, H, W)` of each latent for such LR images.

        There is one for each level at whose end channels leave, finest first, and one for what is
        left at the end.

        Arguments:
            lr: The LR images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
        """
        if isinstance(lr, ImageCondition):
            lr = lr.lr
        else:
            self._pad_lr(lr)
        return self.flow.latent_shapes(*self._hr_size(lr))

    @torch.no_grad()
    def sample(
        self,
        lr: Tensor | ImageCondition,
        num_samples: int = 1,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
    ) -> Tensor:
        r"""Draws HR images given LR images. Nothing is clamped.

        Arguments:
            lr: The LR images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            num_samples: The number :math:`n` of samples for each image.
            temperature: The standard deviation of the latents, not negative.
            generator: A source of randomness, on the device of `lr`.
            tile: The height and width of a tile in pixels of the HR image, or ``"auto"``; see
                :meth:`decode`. The latents are drawn for the whole image, and are the same.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.

        Returns:
            The samples, with shape :math:`(n, B, 3, sH, sW)`.
        """
        check_sampling(num_samples, temperature)
        shapes = self.latent_shapes(lr)
        given = lr.lr if isinstance(lr, ImageCondition) else lr
        n = given.shape[0]
        latents = [
            temperature
            * torch.randn(
                num_samples,
                n,
                *shape,
                generator=generator,
                dtype=given.dtype,
                device=given.device,
            )
            for shape in shapes
        ]
        if tile is not None:
            rows = [z.flatten(0, 1) for z in latents]
            x = self.decode(rows, lr, tile=tile, memory=memory, progress=progress)
        else:
            condition = self._condition(lr)
            pixels = self.scale**2 * given.shape[-2] * given.shape[-1]
            parts = zip(*(groups(z, pixels) for z in latents), strict=True)
            x = torch.cat([self.decode(part, condition) for part in parts])
        return x.unflatten(0, (num_samples, n))

    @classmethod
    def published(
        cls,
        *,
        scale: int = 4,
        levels: int | None = None,
        steps: int | Sequence[int] = 16,
        coupling: Coupling = "robust",
        blocks: int = 23,
        stacked: Sequence[int] = (1, 8, 15, 22),
        **options: Any,
    ) -> Self:
        r"""Returns an untrained model of the published architecture, with any coupling.

        Arguments:
            scale: The upscaling factor: 2, 4, 8 or 16.
            levels: The number of levels. If :py:`None`, 3 up to a scale of 4, and 4 beyond.
            steps: The number of steps at each level, or one number for each level.
            coupling: The elementwise map of the couplings.
            blocks: The number of blocks of the encoder.
            stacked: The blocks whose outputs the encoder stacks onto its maps.
            options: Further arguments of :class:`SuperResolutionFlow`: ``residual=False`` as in
                SRFlow; ``noise_std=0.05`` as in NCSR, 0.03 at a scale of 8.

        Example:
            >>> model = SuperResolutionFlow.published(steps=1, blocks=1, stacked=(0,))
            >>> model.sample(torch.rand(1, 3, 6, 8)).shape
            torch.Size([1, 1, 3, 24, 32])
        """
        levels = (3 if scale <= 4 else 4) if levels is None else levels
        encoder = RRDBEncoder(blocks=blocks, stacked=stacked, scale=scale, levels=levels)
        return cls(
            scale=scale,
            levels=levels,
            steps=steps,
            coupling=coupling,
            encoder=encoder,
            architecture="published",
            **options,
        )

    @classmethod
    def from_srflow(
        cls,
        source: Source,
        *,
        scale: int | None = None,
        stacked: Sequence[int] | None = None,
        coupling: Elementwise | None = None,
    ) -> Self:
        r"""Returns SRFlow's model with the weights of one of its checkpoints, for evaluation.

        Levels, steps, splits, coupling and encoder are inferred from the shapes. What each key
        became is told by the attribute `import_report`.

        Arguments:
            source: The path of the checkpoint, or the state dict: raw or nested, with or without
                ``module.`` before its names.
            scale: The upscaling factor. If :py:`None`, it is inferred from the encoder: right for
                4, 8 and 16.
            stacked: The blocks whose outputs the encoder stacks, which no shape tells. If
                :py:`None`, those of the published configurations.
            coupling: The elementwise map, if it is not the one that the names tell.

        Raises:
            CheckpointError: If it is no such checkpoint: if keys are missing, unexpected, or of
                another shape, with their names. It is a :class:`ValueError`.
        """
        state, label = read_state(source)
        layout = read_flow_layout(state, label)
        if layout.noise_channels:
            raise CheckpointError(
                f"{label} is a checkpoint of robustNF, for it knows of noise: use from_robustnf"
            )
        return cls._import(state, label, scale, stacked, coupling, residual=False)

    @classmethod
    def from_robustnf(
        cls,
        source: Source,
        *,
        scale: int | None = None,
        stacked: Sequence[int] | None = None,
        coupling: Elementwise | None = None,
        noise_std: float | None = None,
        noise_steps: Sequence[int] | None = None,
    ) -> Self:
        r"""Returns robustNF's model with the weights of one of its checkpoints, for evaluation.

        The same as :meth:`from_srflow`, but the flow models the residual over the bicubic
        upsampling, and knows of noise.

        Arguments:
            source: The path of the checkpoint, or the state dict.
            scale: The upscaling factor. If :py:`None`, it is inferred from the encoder: right for
                4, 8 and 16.
            stacked: The blocks whose outputs the encoder stacks, which no shape tells. If
                :py:`None`, those of the published configurations.
            coupling: The elementwise map, if it is not the one that the names tell.
            noise_std: The largest standard deviation of the noise that further training adds. If
                :py:`None`, that of the published configurations.
            noise_steps: For each level, how many of its last steps are told of the noise, which
                no shape tells either. If :py:`None`, as published: 16 at all levels but the first
                (of three), or but the first two.

        Raises:
            CheckpointError: If it is no such checkpoint.
        """
        state, label = read_state(source)
        layout = read_flow_layout(state, label)
        if not layout.noise_channels:
            raise CheckpointError(
                f"{label} is no checkpoint of robustNF, for it does not know of noise: use"
                " from_srflow"
            )
        levels = len(layout.numbers)
        if noise_steps is None:
            noise_steps = [0 if i < max(1, levels - 2) else 16 for i in range(levels)]
        if noise_std is None:
            noise_std = 0.05 if levels <= 3 else 0.03
        return cls._import(
            state,
            label,
            scale,
            stacked,
            coupling,
            residual=True,
            noise_std=noise_std,
            noise_steps=noise_steps,
        )

    @classmethod
    def _import(
        cls,
        state: State,
        label: str,
        scale: int | None,
        stacked: Sequence[int] | None,
        coupling: Elementwise | None,
        *,
        residual: bool,
        noise_std: float | None = None,
        noise_steps: Sequence[int] | None = None,
    ) -> Self:
        layout = read_flow_layout(state, label)
        levels = len(layout.numbers)
        encoder = _encoder_options(state, label, residual)
        encoder |= {} if scale is None else {"scale": scale}
        encoder |= {} if stacked is None else {"stacked": tuple(stacked)}
        count = layout.context_channels // encoder["features"] - 1
        if len(encoder["stacked"]) != count:
            raise CheckpointError(
                f"{label} is of an encoder that stacks {count} blocks: stacked must name as many;"
                f" got {encoder['stacked']}"
            )
        made: dict[str, Any] = {
            "scale": encoder["scale"],
            **layout.options,
            "coupling": layout.map if coupling is None else coupling,
            "residual": residual,
            "noise_std": noise_std,
            "noise_steps": None if noise_steps is None else list(noise_steps),
        }
        # Drawing the weights that are overwritten must not disturb the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            model = cls(
                **made,
                features=layout.context_channels,
                encoder=RRDBEncoder(**encoder, levels=levels),
                architecture="published",
            )
        model.to(dtype_of(state, label))
        plan = plan_module(
            model.get_submodule("conditioner.encoder"), "conditioner.encoder.", "RRDB."
        )
        plan |= plan_flow(model.flow, layout)
        model.import_report = load(
            model,
            plan,
            state,
            label=label,
            # At a scale of 2 the published encoder has layers for 4, and leaves them out.
            dead=(*DEAD, *(k for k in state if encoder["scale"] == 2 and _doubling(k) >= 2)),
            inferred={**made, "encoder": encoder},
        )
        return model.eval()


def _doubling(key: str) -> int:
    r"""From which scale a doubling layer of the encoder starts; 0 for any other key."""
    found = re.match(r"RRDB\.upconv(\d+)\.", key)
    return 2 ** (int(found[1]) - 1) if found else 0


def _encoder_options(state: State, label: str, robustnf: bool) -> dict[str, Any]:
    r"""Infers the encoder from the shapes of its tensors."""
    if "RRDB.conv_second.weight" in state:
        raise CheckpointError(f"{label} is a checkpoint of LLFlow: use LowLightFlow.from_llflow")
    features, in_channels, *_ = kernel_of(state, "RRDB.conv_first.weight", label)
    growth = kernel_of(state, "RRDB.RRDB_trunk.0.RDB1.conv1.weight", label)[0]
    doublings = count_blocks(state, "RRDB.upconv")
    # SRFlow's configurations for a scale of 8 stack other blocks than all others do.
    stacked = (1, 3, 5, 7) if doublings == 3 and not robustnf else (1, 8, 15, 22)
    return {
        "in_channels": in_channels,
        "features": features,
        "growth": growth,
        "blocks": count_blocks(state, "RRDB.RRDB_trunk."),
        "stacked": stacked,
        "scale": 2**doublings,
    }
