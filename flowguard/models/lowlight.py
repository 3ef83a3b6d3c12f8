r"""Low-light enhancement by a conditional flow."""

__all__ = ["LowLightFlow", "rescale_brightness"]

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from flowguard.functional import limited
from flowguard.image.layers import Squeeze
from flowguard.image.maps import Coupling, Elementwise
from flowguard.image.published import published_flow
from flowguard.models.base import (
    MARGIN,
    MEMORY,
    Given,
    ImageCondition,
    ImageModel,
    TileSize,
    pad_to_multiple,
)
from flowguard.models.checkpoints import Checkpoint, Source, Stacked
from flowguard.models.encoders.lowlight import FirstGuess, LowLightEncoder, color_map
from flowguard.models.precision import Precision

#: What LLFlow has none of.
PUBLISHED: dict[str, Any] = {"residual": False, "margin": None}
#: What LLFlow's encoder carries along and never reads, beside the last of its ``downconv``.
DEAD_ENCODER = ("HRconv", "awb_para", "conv_last")


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

    Raises:
        TypeError: If the images are not of floating point numbers.
        ValueError: If the brightness has another shape, or is out of range.

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


class LowLightFlow(ImageModel):
    r"""Creates a conditional flow for low-light enhancement, :math:`p(\text{high} | \text{low})`.

    A conditional multiscale flow of the architecture of LLFlow, with any coupling. The noise is
    normal around a colour map that the encoder predicts, with every latent pixel's own colours,
    so that noise of zero already gives the enhanced image. Unlike LLFlow, the flow models by
    default what an image adds to a first guess, which a small network makes. Once fitted and calibrated, the
    conditioner around the encoder tells where a condition is unlike the training set; see
    :class:`ImageModel`, which has the methods.

    In training mode, each image's noise is centred on its own colour map with probability
    `target_ratio` (published: all images of a batch or none, in evaluation too): a target that
    helps training, but knows of the bright image. Only in evaluation mode are the bits of
    :meth:`nll` those of a density of the bright image given the dark one.

    References:
        | Low-Light Image Enhancement with Normalizing Flow (Wang et al., 2022)
        | https://arxiv.org/abs/2109.05923

    Arguments:
        levels: The number of levels :math:`L`, of flow and encoder.
        steps: How many steps :math:`K` each level has: one number for all, or one for each.
        hidden: The width of the couplings.
        coupling: What the couplings apply to each value: the name of a map, or an object; see
            :func:`flowguard.image.elementwise`, which lists them.
        encoder: The encoder, with as many levels; the published one by default.
        target_ratio: The share of the images in training for which the noise is centred on the
            colour map of the bright image itself, not on the predicted one.
        mix: The 1×1 convolutions; see :class:`flowguard.image.ConditionalMultiscaleFlow`.
        residual: Whether the flow models the residual over a
            :class:`flowguard.models.encoders.lowlight.FirstGuess`, or, as published, the image
            itself.
        quant: How many grey levels the images have.
        margin: How far from :math:`[0, 1]` the images may lie; see :meth:`ImageModel.limit`. If
            :py:`None`, they may lie anywhere.

    Both images have shape :math:`(B, 3, H, W)`, of any size. In place of dark images, all methods
    take what :func:`flowguard.models.encoders.lowlight.low_light_input` made of them, with
    shape :math:`(B, 6, H, W)`, such as a crop of a larger image whose histogram was equalised.

    Raises:
        TypeError: If the encoder is none for low light, or `quant` no whole number.
        ValueError: If the encoder has other levels, or an option is out of range.

    Example:
        >>> encoder = LowLightEncoder(features=8, growth=4, blocks=1, stacked=(0,), levels=2)
        >>> model = LowLightFlow(levels=2, steps=1, hidden=8, encoder=encoder)
        >>> high, low = torch.rand(4, 3, 37, 53), 0.1 * torch.rand(4, 3, 37, 53)
        >>> model.nll(high, low).shape
        torch.Size([4])
        >>> model.sample(low, num_samples=5, temperature=0.8).shape
        torch.Size([5, 4, 3, 37, 53])
    """

    words = (("high", "bright images"), ("low", "dark images"))
    #: What a folder means that does not say it: models had neither margin nor first guess.
    unsaid: ClassVar[Mapping[str, Any]] = {**ImageModel.unsaid, "residual": False}
    guess: FirstGuess

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
        residual: bool = True,
        quant: int = 256,
        margin: float | None = MARGIN,
    ) -> None:
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
        c = encoder.channels
        flow = published_flow(
            3, c, levels=levels, steps=steps, hidden=hidden, coupling=coupling, mix=mix, splits=0
        )
        super().__init__(encoder, flow, quant=quant, margin=margin)
        self.target_ratio = target_ratio
        self.residual = residual
        # One squeeze by 2^L, though the flow squeezes L times by 2: published, and as good.
        self.squeeze = Squeeze(2**levels)

    def extra_repr(self) -> str:
        r"""Returns the target ratio and the margin, for the printed module."""
        return ", ".join(
            filter(None, [f"target_ratio={self.target_ratio:g}", super().extra_repr()])
        )

    @property
    def residual(self) -> bool:
        r"""Whether the flow models the residual over a first guess, which is dropped, or made
        untrained, where that is changed."""
        return getattr(self, "guess", None) is not None

    @residual.setter
    def residual(self, residual: bool) -> None:
        if residual and not self.residual:
            self.guess = FirstGuess().to(next(self.flow.parameters()))
        elif not residual and self.residual:
            del self.guess

    @property
    def encoder(self) -> LowLightEncoder:
        r"""The encoder."""
        return cast(LowLightEncoder, self.conditioner.encoder)

    def check_shape(self, y: Tensor) -> None:
        r"""Refuses what is neither dark images nor what was made of them.

        Arguments:
            y: The conditions.

        Raises:
            ValueError: If they have neither shape :math:`(B, 3, H, W)` nor :math:`(B, 6, H, W)`.
        """
        self.encoder.check(y)

    def prepare(self, y: Tensor) -> Tensor:
        r"""Returns the encoder's input, with shape :math:`(B, 6, H, W)`: what padding adds shall
        not count in the histogram."""
        return self.encoder.prepare(y)

    def base_of(self, padded: Tensor) -> Tensor | None:
        r"""Returns the first guess, with shape :math:`(B, 3, H, W)`, if the flow models the residual
        over it."""
        return self.guess(padded) if self.residual else None

    def mean_of(self, features: Sequence[Tensor], padded: Tensor) -> Tensor:
        r"""Returns the colour map that the encoder predicts, with the shape of the latent."""
        return self._squeeze(self.encoder.color_map(features).to(padded.dtype))

    def _squeeze(self, colors: Tensor) -> Tensor:
        return self.squeeze(colors)[0]

    def color_map(self, low: Given) -> Tensor:
        r"""Returns the colour map of the bright image that the encoder predicts.

        Arguments:
            low: The dark images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
        """
        condition = self.known(low)
        height, width = condition.images.shape[-2:]
        return self.squeeze.inverse(_mean(condition))[0][..., :height, :width]

    def scored(self, latents: list[Tensor], condition: ImageCondition, x: Tensor) -> list[Tensor]:
        r"""Returns the latent, with the shape that it has; in training, some rows are centred on the
        images' own colours."""
        if not self.training:
            return latents
        (z,) = latents
        own = self._squeeze(color_map(pad_to_multiple(x, self.multiple)))
        drawn = torch.rand(len(x), 1, 1, 1, device=x.device) < self.target_ratio
        return [torch.where(drawn, z + _mean(condition) - own, z)]

    def sample(
        self,
        low: Given,
        num_samples: int = 1,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        brightness: Tensor | float | None = None,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
        precision: Precision | None = None,
    ) -> Tensor:
        r"""Draws bright images given dark ones. Nothing is clamped.

        Arguments:
            low: The dark images, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            num_samples: The number :math:`n` of samples for each image.
            temperature: The standard deviation of the latents, not negative. Zero, as published,
                gives the same image each time.
            generator: A source of randomness, on the device of `low`.
            brightness: The mean that each sample is scaled to, a number or one for each dark
                image with shape :math:`(B)`; see :func:`rescale_brightness`. What leaves the
                margin then is bent back once more.
            tile: The height and width of a tile in pixels, or ``"auto"``; see :meth:`decode`. The
                latents are drawn for the whole image, and are the same.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.
            precision: What the networks compute in; see :meth:`ImageModel.sample`.

        Returns:
            The samples, with shape :math:`(n, B, 3, H, W)`.

        Raises:
            ValueError: If there is not one brightness for each dark image, or an option is out of range.
        """
        how: dict[str, Any] = {
            "tile": tile,
            "memory": memory,
            "progress": progress,
            "precision": precision,
        }
        samples = super().sample(low, num_samples, temperature, generator, **how)
        if brightness is None:
            return samples
        rows = samples.shape[1]
        wanted = torch.as_tensor(brightness, device=samples.device)
        if wanted.dim() and wanted.shape != (rows,):
            raise ValueError(
                f"brightness must be a number or have the shape {(rows,)}, one for each dark"
                f" image; got {tuple(wanted.shape)}"
            )
        scaled = rescale_brightness(samples, wanted.expand(samples.shape[:2]))
        return scaled if self.margin is None else limited(scaled, self.margin)[0]

    @classmethod
    def published(
        cls, *, small: bool = False, coupling: Coupling = "robust", **options: Any
    ) -> Self:
        r"""Returns an untrained model of the published size, with any coupling, and, as
        published, without a first guess and without a margin.

        Arguments:
            small: Whether to return LLFlow's small net rather than its large one.
            coupling: As that of :class:`LowLightFlow`.
            options: Further arguments of :class:`LowLightFlow`, such as a `margin`.

        Example:
            >>> model = LowLightFlow.published(small=True)
            >>> model.encoder.channels, len(model.flow.steps[0])
            (64, 4)
        """
        options = {**PUBLISHED, **options}
        if small:
            small_net = LowLightEncoder(32, blocks=4, stacked=(1,))
            return cls(steps=4, encoder=small_net, coupling=coupling, **options)
        return cls(coupling=coupling, **options)

    @classmethod
    def from_llflow(
        cls, source: Source, *, stacked: Stacked = None, coupling: Elementwise | None = None
    ) -> Self:
        r"""Returns LLFlow's model with the weights of one of its checkpoints, for evaluation.

        Levels, steps, coupling and encoder are inferred from the shapes. What each key became is
        told by the attribute `import_report`.

        Arguments:
            source: The checkpoint, a path or a state dict; see
                :func:`flowguard.models.checkpoints.read_state`.
            stacked: Which blocks the encoder stacks, for no shape tells. If :py:`None`, as
                published: 1, or 1, 3, 5 and 7.
            coupling: The map of the couplings, if the names tell a wrong one.

        Raises:
            CheckpointError: If its keys are not those of LLFlow, with the names of those that are
                missing, unexpected, or of another shape. It is a :class:`ValueError`.
        """
        checkpoint = Checkpoint(source)
        layout = checkpoint.layout
        if layout.noise_channels or "RRDB.conv_second.weight" not in checkpoint:
            raise checkpoint.refused(
                "is a checkpoint of a super-resolution flow, or lacks the key"
                " RRDB.conv_second.weight of LLFlow's encoder: for the former see"
                " SuperResolutionFlow.from_srflow and from_robustnf"
            )
        made = {**layout.options, "coupling": layout.map if coupling is None else coupling}
        if made.pop("splits"):
            raise checkpoint.refused("has splits; those of LLFlow have none")
        trunk = checkpoint.trunk(stacked)
        count = layout.context_channels // trunk["features"] - 1
        trunk.setdefault("stacked", tuple(2 * i + 1 for i in range(count)))
        transitions = made.pop("transition_steps")
        if transitions != 2:
            raise checkpoint.refused(
                f"must have 2 steps without coupling at each level; it has {transitions}"
            )
        levels = layout.options["levels"]
        unread = (*DEAD_ENCODER, f"downconv{levels}")
        return cls.imported(
            lambda: cls(**made, encoder=LowLightEncoder(**trunk, levels=levels), **PUBLISHED),
            checkpoint,
            [f"RRDB.{name}.{leaf}" for name in unread for leaf in ("weight", "bias")],
            {**made, "encoder": trunk},
        )


def _mean(condition: ImageCondition) -> Tensor:
    return cast(Tensor, condition.mean)
