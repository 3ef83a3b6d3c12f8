r"""What image models share: all but their encoder, their base, and what bounds them."""

__all__ = [
    "MARGIN",
    "MEMORY",
    "ImageCondition",
    "ImageModel",
    "TileSize",
    "pad_to",
    "pad_to_multiple",
]

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Self, SupportsFloat, SupportsIndex

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.functional import KEPT, check_margin, limited
from flowguard.image.conditioning import Origin, origin_of
from flowguard.image.flow import ConditionalMultiscaleFlow, FlowCondition
from flowguard.image.layers import HALVES
from flowguard.image.tiling import MEMORY, TiledFlow, TileSize
from flowguard.models.checkpoints import (
    DEAD,
    Checkpoint,
    ImportReport,
    dtype_of,
    load,
    plan_flow,
    plan_module,
)
from flowguard.models.precision import PRECISIONS, Precision, networks, wanted
from flowguard.models.ranges import ImageConditioner, advice, mistaken
from flowguard.models.store import Pretrained
from flowguard.numerics import network_dtype, normal_log_prob, repeat_rows, sum_rows

BITS = ("dim", "pixel")
METHODS = ("condition", "forward", "nll", "encode", "decode", "latent_shapes", "sample")

#: How far from [0, 1] the images of a new model may lie.
MARGIN = 0.25
#: The most pixels of images that are made at a time: more take more memory, and no less time each.
TOGETHER = 2**18


class ImageCondition(NamedTuple):
    r"""All that depends on the condition of an image model alone, to be shared by many calls.

    :meth:`ImageModel.condition` makes it. It serves the model that made it, as long as its
    weights do not change.

    Attributes:
        images: The conditions as they were given, with shape :math:`(B, 3, H, W)`.
        maps: What the flow needs to know of them.
        base: What the flow's images are the residual over, where they are, with shape
            :math:`(B, 3, H', W')`.
        mean: The mean of the last latent, where it is not zero.
        origin: What made it; none for what is used up at once.
        margin: The margin of the model when it was made.
        networks: What the networks computed in; none for the dtype of the images.

    Example:
        The encoder runs once, for as many samples as one likes:

        >>> model = flowguard.models.SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
        >>> condition = model.condition(torch.rand(1, 3, 8, 8))
        >>> [model.sample(condition, temperature=t).shape for t in (0.0, 0.9)]
        [torch.Size([1, 1, 3, 16, 16]), torch.Size([1, 1, 3, 16, 16])]
    """

    images: Tensor
    maps: FlowCondition
    base: Tensor | None
    mean: Tensor | None
    origin: Origin | None = None
    margin: float | None = None
    networks: torch.dtype | None = None


Given = Tensor | ImageCondition


class ImageModel(Pretrained, nn.Module):
    r"""Creates a conditional flow over images given other images, :math:`p(x | y)`.

    A model is its encoder, its base and its rule of bounds: a subclass makes encoder and flow,
    says in :meth:`base_of` what its images are the residual over, or in :meth:`mean_of` what its
    noise is centred on, and has a rule for :func:`flowguard.certify`. All else is here.

    Arguments:
        encoder: A module from conditions to a list with one map for each level of the flow.
        flow: The flow.
        quant: The number of grey levels of the images.
        margin: How far from :math:`[0, 1]` images may lie; see :meth:`limit`. If :py:`None`, they
            may lie anywhere.

    Attributes:
        conditioner: The encoder, inside of a :class:`flowguard.OODConditioner`. Once it is fitted
            and calibrated, every call warns of conditions out of distribution, unless its policy
            is another one; before that, a model that was loaded says once that it does not.
        scale: How many times larger an image is than its condition, in each direction.
        words: What a model calls an image and its condition: the name of the argument and what it
            is, for each. Signatures, help and messages say so.

    Images are RGB, with values in :math:`[0, 1]` and shape :math:`(B, 3, sH, sW)`, conditions
    have shape :math:`(B, 3, H, W)`, of any size: internally they are padded to what the flow
    needs, and the images are cropped. Images of other values, such as 0 to 255, have no likelihood:
    :meth:`nll` refuses them. Conditions of such values are warned of once, as they may be meant.

    Raises:
        TypeError: If `quant` is no whole number.
        ValueError: If there are fewer than two grey levels, or the margin leaves no room for them.

    Example:
        >>> class Denoiser(ImageModel):
        ...     def __init__(self):
        ...         encoder = flowguard.models.PyramidEncoder(8, scale=1, levels=1)
        ...         super().__init__(encoder, ConditionalMultiscaleFlow(3, 8, levels=1, steps=1))
        ...
        ...     def base_of(self, padded):
        ...         return padded
        >>> model, noisy = Denoiser(), torch.rand(2, 3, 13, 9)
        >>> model.sample(noisy, num_samples=5, temperature=0.8).shape
        torch.Size([5, 2, 3, 13, 9])
    """

    scale: int = 1
    words: ClassVar[Sequence[tuple[str, str]]] = (("x", "images"), ("y", "conditions"))
    _margin: float | None = None  # that of models that were pickled before there were any
    #: What a folder means that does not say it: models that were saved before have no margin.
    unsaid: ClassVar[Mapping[str, Any]] = {"margin": None}
    warned: bool = False  # of conditions that look as if they were not divided by 255

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in METHODS if "words" in vars(cls) else ():
            own, shared = getattr(cls, name), getattr(ImageModel, name)
            if inspect.unwrap(own) is inspect.unwrap(shared):  # not one that a model made anew
                setattr(cls, name, _in_words(shared, cls.words))

    def __init__(
        self,
        encoder: nn.Module,
        flow: ConditionalMultiscaleFlow,
        quant: int = 256,
        margin: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(quant, bool) or not isinstance(quant, SupportsIndex):
            raise TypeError(f"quant must be a whole number of grey levels; got {quant!r}")
        if quant < 2:
            raise ValueError(f"there must be at least 2 grey levels; got quant={quant}")
        self.quant = quant
        self.margin = margin
        self.import_report: ImportReport | None = None
        self.conditioner = ImageConditioner(encoder, required=False)
        self.flow = flow

    # -- the range of images ---------------------------------------------------------------------

    def limit(self, margin: float | None = MARGIN) -> Self:
        r"""Keeps the images of a trained model within a margin around :math:`[0, 1]` from now on.

        What the flow makes, on its base, passes :func:`flowguard.functional.limited`: within
        :math:`[0, 1]` and the inner half of the margin nothing changes, bit for bit, neither
        images nor their likelihood; what lies beyond is bent back, so that no image leaves
        :math:`(-m, 1 + m)`. Images that lie outside have no latents: :meth:`encode` takes those of
        the nearest that has, with a log-determinant of :math:`-\infty`, and :meth:`nll` is
        infinite. The base is then made of the condition as a picture: cut to :math:`[0, 1]`.

        It is saved with the model, and holds for conditions that are made afterwards.

        Arguments:
            margin: The margin :math:`m`; :py:`None` lets images lie anywhere.

        Raises:
            TypeError: If it is no number.
            ValueError: If it is not positive, or so small that noise within a grey level leaves its half.

        Example:
            >>> from flowguard.models import SuperResolutionFlow
            >>> model = SuperResolutionFlow(levels=1, steps=1, hidden=8, features=8, margin=None)
            >>> far = [100 * torch.randn(1, *s) for s in model.latent_shapes(torch.rand(1, 3, 4, 4))]
            >>> lr = torch.rand(1, 3, 4, 4)
            >>> bool(model.decode(far, lr).max() > 100)
            True
            >>> bool(model.limit(0.25).decode(far, lr).max() <= 1.25)
            True
        """
        self.margin = margin
        return self

    @property
    def margin(self) -> float | None:
        r"""How far from :math:`[0, 1]` images may lie; :py:`None` if anywhere. See :meth:`limit`."""
        return self._margin

    @margin.setter
    def margin(self, margin: float | None) -> None:
        if margin is not None:
            check_margin(margin)
            margin = float(margin)  # which a file can hold, whatever kind of number it was
            self._check_room(margin, self.quant)
        self._margin = margin

    @staticmethod
    def _check_room(margin: float, levels: int) -> None:
        noise = 0.5 / (levels - 1)
        if noise > KEPT * margin:
            raise ValueError(
                f"the margin must be at least a grey level, {2 * noise:.4g} of {levels};"
                f" got {margin:g}: limit() sets another one"
            )

    def extra_repr(self) -> str:
        r"""Returns the margin, for the printed module."""
        return "" if self.margin is None else f"margin={self.margin:g}"

    # -- the encoder's weights -------------------------------------------------------------------

    @property
    def frozen(self) -> bool:
        r"""Whether the encoder is not trained: it has parameters, and none requires a gradient."""
        parameters = list(self.conditioner.get_submodule("encoder").parameters())
        return bool(parameters) and not any(p.requires_grad for p in parameters)

    def freeze_encoder(self, frozen: bool = True) -> Self:
        r"""Leaves the encoder out of training: its parameters require no gradient, so that none is
        computed and nothing is kept for it, and it stays in evaluation mode.

        Gradients with respect to the conditions are computed as before.

        Arguments:
            frozen: Whether it is left out, or taken in again.
        """
        encoder = self.conditioner.get_submodule("encoder").requires_grad_(not frozen)
        encoder.train(self.training and not frozen)
        return self

    def train(self, mode: bool = True) -> Self:
        r"""Sets the mode as of any module; a frozen encoder stays in evaluation mode.

        Arguments:
            mode: Whether it is training mode.
        """
        super().train(mode)
        if self.frozen:
            self.conditioner.get_submodule("encoder").eval()
        return self

    # -- what a model may say of itself ----------------------------------------------------------

    def base_of(self, padded: Tensor) -> Tensor | None:
        r"""Returns what the flow's images are the residual over, with their shape; :py:`None` for
        nothing.

        Arguments:
            padded: The condition, prepared and padded, with shape :math:`(B, C, H, W)`.
        """
        return None

    def mean_of(self, features: Sequence[Tensor], padded: Tensor) -> Tensor | None:
        r"""Returns the mean of the last latent, with its shape; :py:`None` for zero.

        Arguments:
            features: The encoder's maps, each with shape :math:`(B, C, H, W)`.
            padded: The condition, prepared and padded, with shape :math:`(B, C, H, W)`.
        """
        return None

    def prepare(self, y: Tensor) -> Tensor:
        r"""Returns what the encoder is fed, before it is padded: the condition as it is.

        Arguments:
            y: The condition, with shape :math:`(B, 3, H, W)`.

        Returns:
            What it is fed, with shape :math:`(B, C, H, W)`.
        """
        return y

    def check_shape(self, y: Tensor) -> None:
        r"""Refuses conditions of another shape than :math:`(B, 3, H, W)`.

        Arguments:
            y: The conditions.

        Raises:
            ValueError: If they have another shape.
        """
        if y.dim() != 4 or y.shape[1] != 3 or 0 in y.shape[-2:]:
            name = self.words[1][0]
            raise ValueError(f"{name} must have shape (B, 3, H, W); got {tuple(y.shape)}")

    def perturbed(self, x: Tensor, y: Given) -> tuple[Tensor, Given]:
        r"""Returns the pair that the likelihood is computed of: noise may come to it in training.

        Arguments:
            x: The images, dequantised, with shape :math:`(B, 3, H, W)`.
            y: The conditions, with shape :math:`(B, 3, H', W')`, or what :meth:`condition` made of
                them.

        Returns:
            Both, with the same shapes.
        """
        return x, y

    def scored(self, latents: list[Tensor], condition: ImageCondition, x: Tensor) -> list[Tensor]:
        r"""Returns the latents whose density is computed; they may be others in training.

        Arguments:
            latents: The latents, with the shapes that :meth:`latent_shapes` lists.
            condition: What :meth:`condition` made.
            x: The images, as they were given, with shape :math:`(B, 3, H, W)`.
        """
        return latents

    # -- the condition ---------------------------------------------------------------------------

    @property
    def multiple(self) -> int:
        r"""What the size of a condition is padded to a multiple of."""
        return max(1, self.flow.multiple // self.scale)

    def condition(self, y: Tensor, *, precision: Precision | None = None) -> ImageCondition:
        r"""Computes all that depends on the condition alone, to be shared by many calls.

        Whatever takes conditions takes this instead, as long as it is the same model with the
        same weights: a copy, or the model after a step of training, refuses it with a
        :class:`ValueError`. Compiled code does not ask; what it made, :meth:`sign` vouches for.
        Options, such as the policy of the guard, are those of when it was made.

        Arguments:
            y: The conditions, with shape :math:`(B, 3, H, W)`.
            precision: What the networks compute in; see :meth:`sample`. What is made is used in
                the same precision.

        Example:
            >>> from flowguard.models import SuperResolutionFlow
            >>> model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
            >>> condition = model.eval().condition(torch.rand(1, 3, 8, 8))
            >>> dull, lively = (model.sample(condition, temperature=t) for t in (0.0, 0.9))
            >>> dull.shape
            torch.Size([1, 1, 3, 16, 16])
        """
        with self.computing(y, precision):
            self.watch(y)
            return self.sign(self.look(y))

    def computing(
        self, y: Given, precision: Precision | None
    ) -> contextlib.AbstractContextManager[object]:
        r"""Within, the model's networks compute in a precision.

        Arguments:
            y: The conditions, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made of them.
            precision: The precision; see :meth:`sample`.

        Raises:
            ValueError: If there is no such precision, or the condition was made in another.
            TypeError: If the model or the conditions are not in float32.
        """
        if not isinstance(y, ImageCondition):
            dtype = wanted(self, precision)
            if dtype is None or not isinstance(y, Tensor):
                return contextlib.nullcontext()
            self._check_dtype(self.words[1][0], y, cast=False)
            return networks(dtype, y)
        if precision not in (None, "auto"):
            made = y.networks or y.images.dtype
            if wanted(self, precision) != made:
                name = next((n for n, d in PRECISIONS.items() if d == made), str(made))
                raise ValueError(
                    f"a condition is used in the precision that it was made in, {name};"
                    f" got precision={precision!r}: make it again with"
                    f" condition(..., precision={precision!r})"
                )
        return networks(y.networks or y.images.dtype, y.images)

    def sign(self, condition: ImageCondition) -> ImageCondition:
        r"""Returns a condition with the memory of the weights that went into it.

        Arguments:
            condition: What :meth:`look` made.
        """
        maps = self.flow.sign(condition.maps)
        return condition._replace(maps=maps, origin=origin_of(self, besides=self.flow))

    def look(
        self,
        y: Tensor,
        noise: Tensor | float | None = 0.0,
        flow: ConditionalMultiscaleFlow | TiledFlow | None = None,
    ) -> ImageCondition:
        r"""Returns what :meth:`condition` does, without a memory of the weights.

        Arguments:
            y: The conditions, with shape :math:`(B, 3, H, W)`.
            noise: The noise that a noise-conditional flow is told of: a map, one number for all,
                or :py:`None` to leave out the parts of the flow that know of noise.
            flow: What the condition is for, if not the model's flow as it is.

        Raises:
            TypeError: If the conditions are no tensor of floating point numbers.
            ValueError: If they have another shape, or the noise is negative or infinite.
        """
        self._check(y)
        padded = pad_to_multiple(self.prepare(y), self.multiple)
        base = self.base_of(padded)
        if not self.flow.noise_channels and isinstance(noise, Real) and noise == 0:
            noise = None
        if isinstance(noise, float | Real):  # a float is one, which type checkers do not know
            if not 0 <= noise < math.inf:
                raise ValueError(f"the noise must be finite and not negative; got {noise}")
            noise = y.new_full((1, 1, 1, 1), float(noise))
        half = network_dtype(padded)
        # The layout of the encoder's input, which need not be in half precision itself, is that of
        # all its maps.
        fed = padded
        if half in HALVES and half != padded.dtype:
            fed = padded.contiguous(memory_format=torch.channels_last)
        features = self.conditioner(fed)
        maps = (flow or self.flow).work_out(features, noise)
        mean = self.mean_of(features, padded)
        computed = None if half == padded.dtype else half
        return ImageCondition(y, maps, base, mean, margin=self.margin, networks=computed)

    def known(
        self, y: Given, flow: ConditionalMultiscaleFlow | TiledFlow | None = None
    ) -> ImageCondition:
        r"""Returns what :meth:`condition` made, or makes it; refuses what others made.

        Arguments:
            y: The conditions, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made of
                them.
            flow: What the condition is for, if not the model's flow as it is.

        Raises:
            TypeError: If what :meth:`condition` made is given for a flow in tiles.
            ValueError: If another model made it, or the weights have changed since.
        """
        self.watch(y)
        return self._known(y, flow)

    def _known(
        self, y: Given, flow: ConditionalMultiscaleFlow | TiledFlow | None = None
    ) -> ImageCondition:
        if not isinstance(y, ImageCondition):
            return self.look(y, flow=flow)
        if isinstance(flow, TiledFlow):
            raise TypeError(
                "tiles are there so that the condition is never held as a whole: give the"
                f" {self.words[1][1]}, not what condition() made of them"
            )
        if y.origin is not None:
            y.origin.check(self)
        if y.margin != self.margin:
            raise ValueError(
                f"a condition serves a model of the margin {y.margin} that it was made for; got one"
                f" of {self.margin}: make it again, by condition(...)"
            )
        return y

    # -- checks ----------------------------------------------------------------------------------

    def watch(self, y: Given, x: Tensor | None = None) -> None:
        r"""Warns, once for each model, of conditions that look as if they were not divided by
        255, and refuses such images.

        Arguments:
            y: The conditions, with shape :math:`(B, 3, H, W)`; those that :meth:`condition` made
                were looked at then.
            x: The images, if there are any, with shape :math:`(B, 3, H', W')`.

        Raises:
            ValueError: If it is the images that look so.
        """
        (image, _), (condition, _) = self.words
        seen = {} if x is None else {image: x}
        if isinstance(y, Tensor) and y.is_floating_point() and not self.warned:
            seen[condition] = y[:, :3] if y.dim() == 4 else y  # what else there is has its own
        found = dict(zip(seen, mistaken(list(seen.values())), strict=True))
        if found.get(image):
            raise ValueError(advice(image, found[image]))
        if found.get(condition):
            self.warned = True
            warnings.warn(
                f"{advice(condition, found[condition])}. If they are meant, as conditions out of"
                " distribution are, all is well; it is said once",
                stacklevel=3,
            )

    def _check(self, y: Tensor) -> None:
        name, what = self.words[1]
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{name} must be a tensor of {what}, or what condition() made of them;"
                f" got {type(y).__name__}"
            )
        self.check_shape(y)
        self._check_dtype(name, y)

    def _check_dtype(self, name: str, images: Tensor, cast: bool = True) -> None:
        weight = next(self.parameters())
        dtype = weight.dtype
        if images.device != weight.device:
            raise ValueError(
                f"{name} must be on the device {weight.device} of the model; got {images.device}:"
                f" call {name}.to({str(weight.device)!r}), or move the model"
            )
        kind = images.device.type
        cast = cast and torch.is_autocast_enabled(kind)
        half = torch.get_autocast_dtype(kind) if cast else dtype
        if images.dtype not in (dtype, half):
            other = "" if half == dtype else f", or the {half} of autocast"
            rest = "" if images.is_floating_point() else ": divide those of 0 to 255 by 255"
            raise TypeError(
                f"{name} must have the dtype {dtype} of the model{other}; got {images.dtype}."
                f" Images have values in [0, 1]{rest}"
            )

    def _check_pair(self, x: Tensor, y: Tensor) -> None:
        (name, what), (given, _) = self.words
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor of {what}; got {type(x).__name__}")
        rows, (height, width), scale = y.shape[0], y.shape[-2:], self.scale
        fits = x.dim() == 4 and [-(-n // scale) for n in x.shape[-2:]] == [height, width]
        if not fits or x.shape[:2] != (rows, 3):
            lack = f" (less than {scale} rows or columns may lack)" if scale > 1 else ""
            raise ValueError(
                f"{name} must have shape {(rows, 3, scale * height, scale * width)} for {given} of"
                f" shape {tuple(y.shape)}{lack}; got {tuple(x.shape)}"
            )
        self._check_dtype(name, x)

    def _check_latents(self, latents: Sequence[Tensor]) -> None:
        self.flow.check_latents(latents)
        self._check_dtype("the latents", latents[0])

    # -- there and back --------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        y: Given,
        levels: int | None = None,
        *,
        dequantize: bool = True,
        bits_per: str = "dim",
    ) -> Tensor:
        r"""Returns what :meth:`nll` does, for wrappers that call the model.

        Such are :class:`torch.nn.parallel.DistributedDataParallel` and :func:`torch.compile`.

        Arguments:
            x: The images, with shape :math:`(B, 3, sH, sW)`.
            y: The conditions, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            levels: The number of grey levels of `x`. If :py:`None`, `quant`.
            dequantize: Whether to dequantise.
            bits_per: What the bits are divided by: ``"dim"`` or ``"pixel"``.
        """
        return self.nll(x, y, levels, dequantize=dequantize, bits_per=bits_per)

    def nll(
        self,
        x: Tensor,
        y: Given,
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

        Arguments:
            x: The images, with shape :math:`(B, 3, sH, sW)`.
            y: The conditions, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            levels: The number of grey levels of `x`. If :py:`None`, `quant`.
            dequantize: Whether to dequantise.
            bits_per: What the bits are divided by: ``"dim"`` or ``"pixel"``.

        Returns:
            The bits per dimension, or per pixel, of each image, with shape :math:`(B)`; infinite
            for an image beyond the margin, see :meth:`limit`.

        Raises:
            ValueError: If the images have values such as 0 to 255.

        Example:
            >>> from flowguard.models import SuperResolutionFlow
            >>> model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
            >>> hr, lr = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 8, 8)
            >>> model(hr, lr).mean().backward()  # a step of training
            >>> model.eval().nll(hr, lr).shape
            torch.Size([2])
        """
        levels = self.quant if levels is None else levels
        if levels < 2:
            raise ValueError(f"there must be at least 2 grey levels; got {levels}")
        if self.margin is not None and dequantize:
            self._check_room(self.margin, levels)
        if bits_per not in BITS:
            raise ValueError(f"bits_per must be one of {', '.join(BITS)}; got {bits_per!r}")
        if not isinstance(y, ImageCondition):
            self._check(y)
        self._check_pair(x, y.images if isinstance(y, ImageCondition) else y)
        self.watch(y, x)
        noisy = x + (torch.rand_like(x) - 0.5) / (levels - 1) if dequantize else x
        noisy, y = self.perturbed(noisy, y)
        with self.computing(y, None):
            condition = self._known(y)
            latents, ladj = self._encoded(noisy, condition, self.flow)
            latents = self.scored(latents, condition, x)
        log_prob = ladj + normal_log_prob(latents)
        dims = sum(math.prod(z.shape[1:]) for z in latents)
        bits = -log_prob / (math.log(2) * dims)
        if dequantize:
            bits = bits + math.log2(levels - 1)
        return bits if bits_per == "dim" else 3 * bits

    def encode(
        self,
        x: Tensor,
        y: Given,
        *,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
        precision: Precision | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        r"""Takes images to latents, given their conditions.

        Arguments:
            x: The images, with shape :math:`(B, 3, sH, sW)`.
            y: The conditions, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            tile: The height and width of a tile in pixels of the image, or ``"auto"``; see
                :meth:`decode`.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.
            precision: What the networks compute in; see :meth:`sample`.

        Returns:
            The latents, as :meth:`latent_shapes` lists them, and the log-determinant, with shape
            :math:`(B)`.

        Example:
            >>> from flowguard.models import SuperResolutionFlow
            >>> model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
            >>> hr, lr = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 8, 8)
            >>> latents, ladj = model.eval().encode(hr, lr)
            >>> torch.allclose(model.decode(latents, lr), hr, atol=1e-4)
            True
        """
        flow = self._way(tile, memory, progress)
        graph = torch.is_grad_enabled() and tile is None
        with torch.set_grad_enabled(graph), self.computing(y, precision):
            return self._encoded(x, self.known(y, flow), flow)

    def _encoded(
        self, x: Tensor, condition: ImageCondition, flow: ConditionalMultiscaleFlow | TiledFlow
    ) -> tuple[list[Tensor], Tensor]:
        self._check_pair(x, condition.images)
        x, bent = pad_to(x, *self._size(condition.images)), None
        if self.margin is not None:
            x, bent = limited(x, self.margin, inverse=True)
        if condition.base is not None:
            x = x - condition.base
        latents, ladj = flow(x, condition.maps)
        if bent is not None:
            ladj = ladj + sum_rows(bent)
        if condition.mean is not None:
            latents[-1] = latents[-1] - condition.mean
        return latents, ladj

    def decode(
        self,
        latents: Sequence[Tensor],
        y: Given,
        *,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
        precision: Precision | None = None,
    ) -> Tensor:
        r"""Takes latents to images, given their conditions. Nothing is clamped, but see
        :meth:`limit`.

        With `tile`, each step of the flow goes over the image a tile at a time, which takes far
        less memory, and no gradients. The image is that of the untiled computation but for
        rounding: there are no seams. The encoder's maps are held as a whole all the same.

        Arguments:
            latents: The latents; see :meth:`latent_shapes`. They may have
                :math:`n B` rows: row :math:`i` then belongs to condition :math:`i \bmod B`.
            y: The conditions, with shape :math:`(B, 3, H, W)`, or, without `tile`, what
                :meth:`condition` made.
            tile: The height and width of a tile in pixels of the image, or ``"auto"`` for what
                `memory` allows. If :py:`None`, the image is taken as a whole.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.
            precision: What the networks compute in; see :meth:`sample`.

        Returns:
            The images, with shape :math:`(n B, 3, sH, sW)`.

        Example:
            >>> from flowguard.models import SuperResolutionFlow
            >>> model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
            >>> lr = torch.rand(1, 3, 40, 50)
            >>> latents = [torch.randn(2, *shape) for shape in model.latent_shapes(lr)]
            >>> whole = model.eval().decode(latents, lr)
            >>> torch.allclose(model.decode(latents, lr, tile=32), whole, atol=1e-5)
            True
        """
        self._check_latents(latents)
        flow = self._way(tile, memory, progress)
        graph = torch.is_grad_enabled() and tile is None
        with torch.set_grad_enabled(graph), self.computing(y, precision):
            return self._decoded(latents, self.known(y, flow), flow)

    def _decoded(
        self,
        latents: Sequence[Tensor],
        condition: ImageCondition,
        flow: ConditionalMultiscaleFlow | TiledFlow,
    ) -> Tensor:
        if condition.mean is not None:
            *others, last = latents
            latents = [*others, last + repeat_rows(condition.mean, last)]
        x, _ = flow.inverse(latents, condition.maps, ladj=False)
        if condition.base is not None:
            x = x + repeat_rows(condition.base, x)
        if self.margin is not None:
            x, _ = limited(x, self.margin)
        height, width = condition.images.shape[-2:]
        return x[..., : self.scale * height, : self.scale * width]

    def _way(
        self, tile: TileSize, memory: float, progress: bool
    ) -> ConditionalMultiscaleFlow | TiledFlow:
        return self.flow if tile is None else TiledFlow(self.flow, tile, memory, progress)

    def _size(self, y: Tensor) -> tuple[int, int]:
        r"""The height and width of the image that the flow sees."""
        multiple = self.multiple
        height, width = (self.scale * multiple * -(-n // multiple) for n in y.shape[-2:])
        return height, width

    def latent_shapes(self, y: Given) -> list[tuple[int, int, int]]:
        r"""Returns the shape :math:`(C, H, W)` of each latent for such conditions.

        There is one for each level at whose end channels leave, finest first, and one for what is
        left at the end.

        Arguments:
            y: The conditions, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.

        Example:
            >>> from flowguard.models import SuperResolutionFlow
            >>> model = SuperResolutionFlow(scale=4, levels=2, steps=1, hidden=8, features=8)
            >>> model.latent_shapes(torch.rand(1, 3, 8, 8))
            [(6, 16, 16), (24, 8, 8)]
        """
        if not isinstance(y, ImageCondition):
            self._check(y)
        return self.flow.latent_shapes(
            *self._size(y.images if isinstance(y, ImageCondition) else y)
        )

    @torch.no_grad()
    def sample(
        self,
        y: Given,
        num_samples: int = 1,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        tile: TileSize = None,
        memory: float = MEMORY,
        progress: bool = False,
        precision: Precision | None = None,
    ) -> Tensor:
        r"""Draws images given their conditions. Nothing is clamped.

        Arguments:
            y: The conditions, with shape :math:`(B, 3, H, W)`, or what :meth:`condition` made.
            num_samples: The number :math:`n` of samples for each condition.
            temperature: The standard deviation of the latents, not negative.
            generator: A source of randomness, on the device of `y`.
            tile: The height and width of a tile in pixels of the image, or ``"auto"``; see
                :meth:`decode`. The latents are drawn for the whole image, and are the same.
            memory: The memory in bytes that tiles of the size ``"auto"`` take about.
            progress: Whether to show a progress bar over the tiles.
            precision: What the networks of encoder and couplings compute in: ``"bf16"``,
                ``"float16"``, which holds no numbers beyond 65 504 and so turns far conditions
                into NaN, ``"float32"``, or ``"auto"`` for the quicker of bf16 and float32 here,
                which :func:`flowguard.models.fastest` tells. All else, elementwise maps,
                log-determinants and the scores of the guard, is in float32. If :py:`None`, what
                :class:`torch.autocast` says around the call.

        Returns:
            The samples, with shape :math:`(n, B, 3, sH, sW)`.

        Example:
            >>> from flowguard.models import SuperResolutionFlow
            >>> model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
            >>> generator = torch.Generator().manual_seed(0)
            >>> model.eval().sample(torch.rand(4, 3, 8, 8), 5, 0.8, generator).shape
            torch.Size([5, 4, 3, 16, 16])
        """
        _check_sampling(num_samples, temperature)
        flow = self._way(tile, memory, progress)
        with self.computing(y, precision):
            return self._sampled(self.known(y, flow), flow, num_samples, temperature, generator)

    def _sampled(
        self,
        condition: ImageCondition,
        flow: ConditionalMultiscaleFlow | TiledFlow,
        num_samples: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        like = condition.images
        height, width = self._size(like)
        # Not `randn`, whose sizes the compiler must know if it is given a generator.
        latents = [
            temperature
            * like.new_empty(num_samples, len(like), *shape).normal_(generator=generator)
            for shape in self.flow.latent_shapes(height, width)
        ]
        # All at once in tiles: what they need to know of the condition is worked out once each.
        fits = max(1, TOGETHER // max(1, len(like) * height * width))
        at_once = num_samples if isinstance(flow, TiledFlow) else fits
        parts = zip(*(z.split(at_once) for z in latents), strict=True)
        images = (self._decoded([z.flatten(0, 1) for z in p], condition, flow) for p in parts)
        return torch.cat([*images]).unflatten(0, (num_samples, len(like)))

    @classmethod
    def imported(
        cls,
        make: Callable[[], Self],
        checkpoint: Checkpoint,
        dead: Iterable[str],
        inferred: Mapping[str, Any],
    ) -> Self:
        r"""Returns a model with the weights of a published checkpoint, for evaluation.

        Arguments:
            make: Makes the model.
            checkpoint: The checkpoint.
            dead: Further keys that may be there and are never read.
            inferred: What to say in the report about how the model was made.
        """
        # Drawing the weights that are overwritten must not disturb the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            model = make()
        state, label = checkpoint.state, checkpoint.label
        model.to(dtype_of(state, label))
        encoder = "conditioner.encoder"
        plan = plan_module(model.get_submodule(encoder), f"{encoder}.", "RRDB.")
        plan |= plan_flow(model.flow, checkpoint.layout)
        known = (*DEAD, *dead)
        model.import_report = load(model, plan, state, label=label, dead=known, inferred=inferred)
        return model.eval()


def _in_words(method: Callable[..., Any], words: Sequence[tuple[str, str]]) -> Callable[..., Any]:
    r"""Returns a method whose arguments `x` and `y` bear a model's own names, also in its help."""
    own = {general: name for general, (name, _) in zip("xy", words, strict=True)}
    general = {name: x for x, name in own.items()}
    foreign = own.keys() - general.keys()

    signature = inspect.signature(method)
    parameters = [p.replace(name=own.get(n, n)) for n, p in signature.parameters.items()]
    signature = signature.replace(parameters=parameters)

    @functools.wraps(method)
    def named(self: ImageModel, *args: Any, **kwargs: Any) -> Any:
        try:
            if not foreign.isdisjoint(kwargs):
                raise TypeError
            return method(self, *args, **{general.get(k, k): v for k, v in kwargs.items()})
        except TypeError:
            try:  # if it is that, what is too much or missing is said in these words
                signature.bind_partial(self, *args, **kwargs)
                signature.bind(self, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{method.__name__}(): {error}") from None
            raise

    named.__signature__ = signature  # type: ignore[attr-defined]
    told = inspect.getdoc(method) or ""
    for x, what, (name, ours) in zip("xy", ("images", "conditions"), words, strict=True):
        told = told.replace(f"{x}: The {what}", f"{name}: The {ours}").replace(
            f"`{x}`", f"`{name}`"
        )
    named.__doc__ = told
    return named


def _check_sampling(num_samples: int, temperature: float) -> None:
    if isinstance(num_samples, bool) or not isinstance(num_samples, Integral):
        raise TypeError(f"num_samples must be an integer; got {num_samples!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive; got {num_samples}")
    if isinstance(temperature, str) or not isinstance(temperature, SupportsFloat):
        raise TypeError(f"temperature must be a number; got {temperature!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative; got {temperature}")


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    r"""Pads images by replication, at the bottom and on the right."""
    bottom, right = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    r"""Pads images by replication until height and width are multiples."""
    height, width = (multiple * math.ceil(n / multiple) for n in x.shape[-2:])
    return pad_to(x, height, width)
