r"""Super-resolution by a conditional flow."""

__all__ = ["SuperResolutionFlow"]

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowguard.functional import limited
from flowguard.image.flow import ConditionalMultiscaleFlow
from flowguard.image.maps import Coupling, Elementwise
from flowguard.image.published import published_flow
from flowguard.models.base import (
    MARGIN,
    Given,
    ImageCondition,
    ImageModel,
    pad_to,
    pad_to_multiple,
)
from flowguard.models.checkpoints import Checkpoint, Source
from flowguard.models.encoders.pyramid import PyramidEncoder
from flowguard.models.encoders.rrdb import RRDBEncoder
from flowguard.models.precision import Precision

FLOWS: dict[str, Callable[..., ConditionalMultiscaleFlow]] = {
    "bounded": ConditionalMultiscaleFlow,
    "published": published_flow,
}


class SuperResolutionFlow(ImageModel):
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
        margin: How far from :math:`[0, 1]` the images may lie; see :meth:`ImageModel.limit`. If
            :py:`None`, they may lie anywhere.

    Images are RGB, with values in :math:`[0, 1]` and shape :math:`(B, 3, H, W)`, of any size:
    internally they are padded to what the flow needs, and cropped.

    Raises:
        TypeError: If `quant` is no whole number.
        ValueError: If the scale is no power of two, the encoder has another number of channels, or an
            option is out of range.

    Example:
        >>> model = SuperResolutionFlow(scale=4, levels=2, steps=1, hidden=8, features=8)
        >>> hr, lr = torch.rand(2, 3, 37, 53), torch.rand(2, 3, 10, 14)
        >>> model.nll(hr, lr).shape
        torch.Size([2])
        >>> samples = model.sample(lr, num_samples=5, temperature=0.8)
        >>> samples.shape
        torch.Size([5, 2, 3, 40, 56])
    """

    words = (("hr", "HR images"), ("lr", "LR images"))

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
        margin: float | None = MARGIN,
    ) -> None:
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two from 2; got {scale}")
        if architecture not in FLOWS:
            raise ValueError(
                f"architecture must be one of {', '.join(FLOWS)}; got {architecture!r}"
            )
        if noise_std is not None and not 0 <= noise_std < math.inf:
            raise ValueError(f"noise_std must not be negative, or be None; got {noise_std}")
        own: int | None = getattr(encoder, "channels", None)
        features = (own or 64) if features is None else features
        if features < 1:
            raise ValueError(f"features must be positive; got {features}")
        if own not in (None, features):
            raise ValueError(f"features must be the {own} channels of the encoder; got {features}")
        if encoder is None:
            encoder = PyramidEncoder(features, scale=scale, levels=levels)
        own_count = {} if transition_steps is None else {"transition_steps": transition_steps}
        flow = FLOWS[architecture](
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
        super().__init__(encoder, flow, quant, margin)
        self.scale = scale
        self.overshoots = architecture == "published"
        self.residual = residual
        self.noise_std = noise_std

    @property
    def lr_multiple(self) -> int:
        r"""The same as `multiple`: what the size of an LR image is padded to."""
        return self.multiple

    def condition(
        self,
        lr: Tensor,
        noise: Tensor | float | None = 0.0,
        *,
        precision: Precision | None = None,
    ) -> ImageCondition:
        r"""Computes all that depends on the condition alone, to be shared by many calls.

        Whatever takes LR images takes this instead.

        Arguments:
            lr: The LR images, with shape :math:`(B, 3, H, W)`.
            noise: The noise that a noise-conditional flow is told of: a map with shape
                :math:`(B, 3, H', W')` of any size, or one number for all. If :py:`None`, the
                parts of the flow that know of noise are left out, which is not the same as 0.
            precision: What the networks compute in; see :meth:`sample`. What is made is used in
                the same precision.

        Example:
            >>> model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
            >>> condition = model.condition(torch.rand(1, 3, 5, 6))
            >>> a, b = model.sample(condition), model.sample(condition, num_samples=4)
        """
        with self.computing(lr, precision):
            self.watch(lr)
            return self.sign(self.look(lr, noise))

    def base_of(self, padded: Tensor) -> Tensor | None:
        r"""Returns the bicubic upsampling, with shape :math:`(B, 3, sH, sW)`, if the flow models the
        residual over it."""
        return self.upsample(padded) if self.residual else None

    def upsample(self, lr: Tensor) -> Tensor:
        r"""Returns the bicubic upsampling that the flow's residual is added to.

        Beside hard edges it overshoots. Where images have a margin, it is that of the LR image as
        a picture, whose values are cut to :math:`[0, 1]`, and cut to that itself. Else, unless the
        architecture is the published one, it is cut to the range that :math:`[0, 1]` and the image
        span.

        Arguments:
            lr: The LR images, with shape :math:`(B, 3, H, W)`.
        """
        shown = lr if self.margin is None else lr.clamp(0.0, 1.0)
        base = F.interpolate(shown, scale_factor=float(self.scale), mode="bicubic")
        if self.margin is not None:
            return base.clamp(0.0, 1.0)
        if self.overshoots:
            return base
        known = lr.detach().nan_to_num(0.0, posinf=math.inf, neginf=-math.inf)
        low = known.amin((1, 2, 3), keepdim=True).clamp(max=0.0)
        return base.clamp(low, known.amax((1, 2, 3), keepdim=True).clamp(min=1.0))

    def perturbed(self, x: Tensor, y: Given) -> tuple[Tensor, Given]:
        r"""Returns the pair with noise on both images, the LR image's being the HR image's,
        shrunk, in training mode and if the flow is made to know of noise. Where noise would leave
        the margin, beyond which nothing has a likelihood, it is bent back as samples are. Each
        has the shape that it had, padded."""
        if self.noise_std is None or not self.training or isinstance(y, ImageCondition):
            return x, y
        lr = pad_to_multiple(y, self.multiple)
        hr = pad_to(x, self.scale * lr.shape[-2], self.scale * lr.shape[-1])
        std = torch.rand_like(hr[:, :1, :1, :1]) * self.noise_std
        noise = std * torch.randn_like(hr)
        small = F.interpolate(noise, size=lr.shape[-2:], mode="bicubic", antialias=True)
        noisy = hr + noise if self.margin is None else limited(hr + noise, self.margin)[0]
        return noisy, self.look(lr + small, noise)

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
        r"""Returns an untrained model of the published architecture, with any coupling, and, as
        published, without a margin.

        Arguments:
            scale: The upscaling factor: 2, 4, 8 or 16.
            levels: The number of levels. If :py:`None`, 3 up to a scale of 4, and 4 beyond.
            steps: The number of steps at each level, or one number for each level.
            coupling: The elementwise map of the couplings.
            blocks: The number of blocks of the encoder.
            stacked: The blocks whose outputs the encoder stacks onto its maps.
            options: Further arguments of :class:`SuperResolutionFlow`: ``residual=False`` as in
                SRFlow; ``noise_std=0.05`` as in NCSR, 0.03 at a scale of 8; a `margin`.

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
            **{"margin": None, **options},
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
        found = Checkpoint(source)
        if found.layout.noise_channels:
            raise found.refused(
                "is a checkpoint of robustNF, for it knows of noise: use from_robustnf"
            )
        return cls._import(found, scale, stacked, coupling, residual=False)

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
        found = Checkpoint(source)
        if not found.layout.noise_channels:
            raise found.refused(
                "is no checkpoint of robustNF, for it does not know of noise: use from_srflow"
            )
        levels = len(found.layout.numbers)
        if noise_steps is None:
            noise_steps = [0 if i < max(1, levels - 2) else 16 for i in range(levels)]
        if noise_std is None:
            noise_std = 0.05 if levels <= 3 else 0.03
        return cls._import(
            found,
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
        found: Checkpoint,
        scale: int | None,
        stacked: Sequence[int] | None,
        coupling: Elementwise | None,
        *,
        residual: bool,
        noise_std: float | None = None,
        noise_steps: Sequence[int] | None = None,
    ) -> Self:
        layout = found.layout
        levels = len(layout.numbers)
        encoder = _encoder_options(found, stacked, residual)
        encoder |= {} if scale is None else {"scale": scale}
        count = layout.context_channels // encoder["features"] - 1
        if len(encoder["stacked"]) != count:
            raise found.refused(
                f"is of an encoder that stacks {count} blocks: stacked must name as many;"
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

        # At a scale of 2 the published encoder has layers for 4, and leaves them out.
        dead = [k for k in found.state if encoder["scale"] == 2 and _doubling(k) >= 2]
        return cls.imported(
            lambda: cls(
                **made,
                features=layout.context_channels,
                encoder=RRDBEncoder(**encoder, levels=levels),
                architecture="published",
                margin=None,
            ),
            found,
            dead,
            {**made, "encoder": encoder},
        )


def _doubling(key: str) -> int:
    r"""From which scale a doubling layer of the encoder starts; 0 for any other key."""
    doubling = re.match(r"RRDB\.upconv(\d+)\.", key)
    return 2 ** (int(doubling[1]) - 1) if doubling else 0


def _encoder_options(
    found: Checkpoint, stacked: Sequence[int] | None, robustnf: bool
) -> dict[str, Any]:
    r"""Infers the encoder from the shapes of its tensors."""
    if "RRDB.conv_second.weight" in found:
        raise found.refused("is a checkpoint of LLFlow: use LowLightFlow.from_llflow")
    trunk = found.trunk(stacked)
    doublings = found.count("RRDB.upconv")
    # SRFlow's configurations for a scale of 8 stack other blocks than all others do.
    usual = (1, 3, 5, 7) if doublings == 3 and not robustnf else (1, 8, 15, 22)
    channels = found.state["RRDB.conv_first.weight"].shape[1]
    trunk.setdefault("stacked", usual)
    return {"in_channels": channels, **trunk, "scale": 2**doublings}
