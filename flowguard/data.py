r"""Photographs to learn from, and conditions that no model has learned from."""

__all__ = [
    "CALIBRATION_PHOTOGRAPHS",
    "HELD_OUT_PHOTOGRAPH",
    "OTHER_WORLDS",
    "TRAINING_PHOTOGRAPHS",
    "AlignedCrops",
    "Corruption",
    "PairedCrops",
    "Pictures",
    "blur",
    "corruptions",
    "crop_to_multiple",
    "delinearize",
    "downsample",
    "expose",
    "jpeg",
    "linearize",
    "photograph",
    "read_image",
]

import importlib.resources
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowguard.hosts import install
from flowguard.io.pictures import read_image, to_uint8

#: Colour photographs that scikit-image ships, by file name.
TRAINING_PHOTOGRAPHS = ("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
#: The photographs that guards are calibrated on, of those that scikit-image brings.
CALIBRATION_PHOTOGRAPHS = ("motorcycle_right.png",)
#: The photograph that nothing is trained or calibrated on.
HELD_OUT_PHOTOGRAPH = "chelsea.png"
#: Pictures from other worlds: medicine, astronomy, print, a test pattern.
OTHER_WORLDS = {
    "retina": "retina.jpg",
    "immunohistochemistry": "ihc.png",
    "hubble": "hubble_deep_field.jpg",
    "page of text": "page.png",
    "checkerboard": "chessboard_GRAY.png",
}


def photograph(name: str) -> Tensor:
    r"""Returns a picture that scikit-image ships, with shape :math:`(3, H, W)`.

    Arguments:
        name: The name of the file, such as ``"chelsea.png"``.

    Raises:
        ImportError: If scikit-image is not installed.
        FileNotFoundError: If it ships no such file.

    Example:
        >>> photograph("chelsea.png").shape
        torch.Size([3, 300, 451])
    """
    try:
        folder = importlib.resources.files("skimage") / "data"
    except ModuleNotFoundError as error:
        raise ImportError(f"the photographs come with scikit-image: {install('demo')}") from error
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"this version of scikit-image ships no {name!r}")
    with file.open("rb") as stream:
        return read_image(stream)


def downsample(hr: Tensor, scale: int) -> Tensor:
    r"""Shrinks images by bicubic interpolation with antialiasing, onto :math:`[0, 1]`.

    Arguments:
        hr: The images, with shape :math:`(B, 3, sH, sW)`.
        scale: The factor :math:`s`.

    Raises:
        ValueError: If height or width is no multiple of the scale.

    Returns:
        The small images, with shape :math:`(B, 3, H, W)`.

    Example:
        >>> downsample(torch.full((1, 3, 32, 48), 0.5), scale=4).shape
        torch.Size([1, 3, 8, 12])
    """
    if scale < 1 or hr.shape[-2] % scale or hr.shape[-1] % scale:
        raise ValueError(
            f"height and width must be multiples of {scale}; got {tuple(hr.shape[-2:])}"
        )
    size = (hr.shape[-2] // scale, hr.shape[-1] // scale)
    return F.interpolate(hr, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def crop_to_multiple(image: Tensor, multiple: int) -> Tensor:
    r"""Cuts rows and columns at the bottom and on the right until the size is a multiple.

    Arguments:
        image: The image, with shape :math:`(*, H, W)`.
        multiple: What height and width shall be multiples of.

    Returns:
        A view of the image, with shape :math:`(*, H', W')`; empty where it is smaller than that.

    Example:
        >>> crop_to_multiple(torch.zeros(3, 67, 50), 8).shape
        torch.Size([3, 64, 48])
    """
    h, w = (n - n % multiple for n in image.shape[-2:])
    return image[..., :h, :w]


class Pictures(Protocol):
    r"""Pictures of which parts can be had, such as :class:`flowguard.io.folder.PictureFiles`.

    Attributes:
        sizes: The rows and columns of each picture.

    Example:
        Pictures of one's own kind, here grey ramps that nobody holds in memory:

        >>> class Ramps:
        ...     sizes = [(64, 96)] * 10
        ...
        ...     def window(self, index, top, left, height, width):
        ...         return torch.linspace(0, 1, 96)[left : left + width].expand(3, height, width)
        >>> hr, lr = next(iter(PairedCrops(Ramps(), scale=4, size=32, batch=2, seed=0)))
        >>> hr.shape, lr.shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 3, 8, 8]))
    """

    sizes: Sequence[tuple[int, int]]

    def window(self, index: int, top: int, left: int, height: int, width: int) -> Tensor:
        r"""Returns a part of a picture, with shape :math:`(3, H, W)`."""


class _Held:
    r"""Pictures that are tensors."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.images = list(images)
        self.sizes = [(image.shape[-2], image.shape[-1]) for image in images]

    def window(self, index: int, top: int, left: int, height: int, width: int) -> Tensor:
        return self.images[index][:, top : top + height, left : left + width]


class _Crops:
    r"""An endless stream of aligned random crops, of which :meth:`_pair` makes each.

    Attributes:
        sizes: The rows and columns of each condition.
    """

    def __init__(
        self,
        targets: Sequence[tuple[int, int]],
        conditions: Sequence[tuple[int, int]],
        *,
        scale: int,
        size: int,
        batch: int,
        seed: int,
    ) -> None:
        if size < 1 or size % scale:
            raise ValueError(f"size must be a multiple of the scale {scale}; got {size}")
        if not targets:
            raise ValueError("there must be at least one image; got none")
        for target, condition in zip(targets, conditions, strict=True):
            if min(target) < size:
                raise ValueError(
                    f"images must have at least {size} rows and columns; got {target}"
                )
            if tuple(scale * n for n in condition) != target:
                raise ValueError(
                    f"a target must have {scale} times the rows and columns of its condition;"
                    f" got {target} and {condition}"
                )
        self.sizes = list(conditions)
        self.scale = scale
        self.size = size
        self.batch = batch
        self.seed = seed

    def _pair(self, index: int, i: int, j: int) -> list[Tensor]:
        r"""The crops of target and condition at a place of the condition."""
        raise NotImplementedError

    def _crop(self, rng: np.random.Generator, shares: np.ndarray[Any, Any]) -> list[Tensor]:
        index = int(rng.choice(len(self.sizes), p=shares))
        n = self.size // self.scale
        i, j = (int(rng.integers(0, m - n + 1)) for m in self.sizes[index])
        pair = self._pair(index, i, j)
        if rng.integers(2):
            pair = [p.flip(-1) for p in pair]
        turns = int(rng.integers(4))
        return [torch.rot90(p, turns, (-2, -1)) for p in pair]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(self.seed)
        areas = np.array([h * w for h, w in self.sizes], dtype=float)
        while True:
            pairs = [self._crop(rng, areas / areas.sum()) for _ in range(self.batch)]
            yield torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


class AlignedCrops(_Crops):
    r"""Creates an endless stream of aligned random crops of image pairs.

    Crops are flipped and turned at random. Larger images are asked more often.

    Arguments:
        pairs: Pairs of a target and its condition, with shapes :math:`(C, sH, sW)` and
            :math:`(C', H, W)`.
        scale: The factor :math:`s`.
        size: The height and width of a target's crop, a multiple of `scale`.
        batch: The number of crops in a batch.
        seed: The seed of the stream: the same seed gives the same crops.

    Raises:
        ValueError: If there are no images, or their sizes do not fit crop and scale.

    Example:
        >>> pairs = [(torch.rand(3, 64, 64), torch.rand(6, 64, 64))]
        >>> target, condition = next(iter(AlignedCrops(pairs, size=32, batch=8, seed=0)))
        >>> target.shape, condition.shape
        (torch.Size([8, 3, 32, 32]), torch.Size([8, 6, 32, 32]))
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        *,
        scale: int = 1,
        size: int,
        batch: int,
        seed: int,
    ) -> None:
        targets, conditions = ([(p[k].shape[-2], p[k].shape[-1]) for p in pairs] for k in (0, 1))
        super().__init__(targets, conditions, scale=scale, size=size, batch=batch, seed=seed)
        self.pairs = list(pairs)

    def _pair(self, index: int, i: int, j: int) -> list[Tensor]:
        s, n = self.scale, self.size // self.scale
        target, condition = self.pairs[index]
        return [
            target[:, s * i : s * i + self.size, s * j : s * j + self.size],
            condition[:, i : i + n, j : j + n],
        ]


class PairedCrops(_Crops):
    r"""Creates an endless stream of aligned random crops of HR images and their LR images.

    A crop of the LR image is that of the whole photograph's, so that it knows what lies beyond
    its border; no more of it is made. Crops are flipped and turned at random.

    Arguments:
        images: HR images, with shape :math:`(3, H, W)` each, or a source of them, such as
            :class:`flowguard.io.folder.PictureFiles`.
        scale: The downsampling factor.
        size: The height and width of an HR crop, a multiple of `scale`.
        batch: The number of crops in a batch.
        seed: The seed of the stream: the same seed gives the same crops.

    Example:
        >>> crops = PairedCrops([torch.rand(3, 64, 64)], scale=4, size=32, batch=8, seed=0)
        >>> hr, lr = next(iter(crops))
        >>> hr.shape, lr.shape
        (torch.Size([8, 3, 32, 32]), torch.Size([8, 3, 8, 8]))
    """

    def __init__(
        self,
        images: Sequence[Tensor] | Pictures,
        *,
        scale: int,
        size: int,
        batch: int,
        seed: int,
    ) -> None:
        self.images = _Held(images) if isinstance(images, Sequence) else images
        small = [(h // scale, w // scale) for h, w in self.images.sizes]
        large = [(scale * h, scale * w) for h, w in small]
        super().__init__(large, small, scale=scale, size=size, batch=batch, seed=seed)

    def _pair(self, index: int, i: int, j: int) -> list[Tensor]:
        s, n, (rows, columns) = self.scale, self.size // self.scale, self.sizes[index]
        # The cubic kernel reaches two pixels of the LR image to each side of a centre.
        top, left = max(0, i - 2), max(0, j - 2)
        height, width = min(rows, i + n + 2) - top, min(columns, j + n + 2) - left
        hr = self.images.window(index, s * top, s * left, s * height, s * width)
        i, j = i - top, j - left
        return [
            hr[:, s * i : s * i + self.size, s * j : s * j + self.size],
            downsample(hr[None], s)[0, :, i : i + n, j : j + n],
        ]


def linearize(image: Tensor) -> Tensor:
    r"""Returns the light that sRGB values in :math:`[0, 1]` stand for, in :math:`[0, 1]`.

    References:
        | IEC 61966-2-1, the sRGB colour space

    Arguments:
        image: The image, of any shape.

    Returns:
        The light, with the shape of the image.

    Example:
        >>> linearize(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.2140, 1.0000])
    """
    return torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)


def delinearize(light: Tensor) -> Tensor:
    r"""Returns the sRGB values of light in :math:`[0, 1]`; the inverse of :func:`linearize`.

    Arguments:
        light: The light, not negative, of any shape.

    Returns:
        The sRGB values, with the shape of the light.

    Example:
        A grey card, which sends back 18 % of the light, is nearly middle grey:

        >>> delinearize(torch.tensor([0.0, 0.18, 1.0]))
        tensor([0.0000, 0.4614, 1.0000])
    """
    return torch.where(
        light <= 0.0031308, 12.92 * light, 1.055 * light.clamp_min(1e-9) ** (1 / 2.4) - 0.055
    )


def expose(
    image: Tensor,
    exposure: Tensor | float,
    generator: torch.Generator,
    *,
    full_well: float = 1000.0,
    read_noise: float = 2.0,
) -> Tensor:
    r"""Takes a photograph once more, at another exposure, with the noise of a sensor.

    The photograph's light is scaled, counted as electrons with Poisson noise, read with normal
    noise, cut at the sensor's range, and stored as sRGB of 8 bits.

    Arguments:
        image: The photograph in :math:`[0, 1]`, with shape :math:`(*, 3, H, W)`.
        exposure: What light is multiplied by, a number or a tensor that broadcasts to the image;
            below 1 it gets darker, above 1 what is bright is cut.
        generator: The source of the noise.
        full_well: The number of electrons at which a pixel is white.
        read_noise: The standard deviation of the noise of reading, in electrons.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> bright = torch.full((3, 64, 64), 0.5)
        >>> dark = expose(bright, 0.05, generator)
        >>> light = linearize(dark).mean() / linearize(bright).mean()
        >>> bool((light - 0.05).abs() < 0.002), bool(dark.std() > 0.01)
        (True, True)
    """
    electrons = (full_well * exposure * linearize(image)).clamp_min(0)
    counted = torch.poisson(electrons, generator=generator)
    noise = torch.randn(counted.shape, generator=generator, dtype=counted.dtype)
    light = ((counted + read_noise * noise) / full_well).clamp(0, 1)
    return (255 * delinearize(light)).round() / 255


def blur(image: Tensor, sigma: float, reach: int | None = None) -> Tensor:
    r"""Blurs an image by a Gaussian; beyond its border the outermost pixels go on.

    Arguments:
        image: The image, with shape :math:`(C, H, W)`.
        sigma: The standard deviation in pixels; 0 leaves the image as it is.
        reach: How many pixels the kernel reaches to each side; three standard deviations by
            default.

    Raises:
        ValueError: If the standard deviation is negative or not finite.

    Example:
        >>> edge = torch.zeros(3, 8, 8)
        >>> edge[..., 4:] = 1.0
        >>> bool(0 < blur(edge, 1.0)[0, 0, 3] < 0.5)
        True
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and not negative; got {sigma}")
    if sigma == 0:
        return image
    reach = math.ceil(3 * sigma) if reach is None else reach
    at = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-at.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    wide = F.pad(image[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(wide, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]


def jpeg(image: Tensor, quality: int) -> Tensor:
    r"""Returns an image as it is read back from a JPEG file: cut to :math:`[0, 1]`, of 8 bits.

    Arguments:
        image: The image in :math:`[0, 1]`, with shape :math:`(3, H, W)`.
        quality: The quality, from 1 to 95.

    Raises:
        ImportError: If Pillow is not installed.

    Example:
        >>> grey = torch.full((3, 16, 16), 0.5)
        >>> bool((jpeg(grey, 90) - grey).abs().max() < 0.01)
        True
    """
    levels = to_uint8(image)
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"JPEG needs Pillow: {install('cli')}") from error
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, format="JPEG", quality=quality)
    stream.seek(0)
    return read_image(stream).to(image)


@dataclass(frozen=True)
class Corruption:
    r"""A way to spoil a condition, at several strengths.

    Arguments:
        name: The name, with the symbol of the strength.
        strengths: The strengths, weakest first.
        function: From an image, with shape :math:`(*, 3, H, W)`, and a strength to the spoilt
            image, with the same shape; nothing is clamped.
        meaning: What it does, with ``{}`` for the strength.

    Example:
        >>> darker = Corruption("gamma", (1.5, 3.0), lambda y, strength: y**strength)
        >>> darker(torch.full((1, 3, 2, 2), 0.5), 3.0).unique()
        tensor([0.1250])
    """

    name: str
    strengths: tuple[float, ...]
    function: Callable[[Tensor, float], Tensor]
    meaning: str = ""

    def said(self, strength: float) -> str:
        r"""Returns what the spoilt image is.

        Arguments:
            strength: The strength.

        Example:
            >>> corruptions(0)[2].said(5.0)
            'the held-out photograph, 5 times as bright'
        """
        return self.meaning.format(f"{strength:g}")

    def __call__(self, y: Tensor, strength: float) -> Tensor:
        return self.function(y, strength)


def corruptions(seed: int) -> list[Corruption]:
    r"""Returns corruptions of a condition, within and beyond :math:`[0, 1]`.

    Arguments:
        seed: The seed of the noise.

    Example:
        >>> [corruption.name for corruption in corruptions(seed=0)]
        ['noise σ', 'clamped noise σ', 'gain', 'inversion', 'negative', 'saturation']
        >>> gain = corruptions(seed=0)[2]
        >>> gain.strengths, gain(torch.full((3, 1, 1), 0.5), 20.0).max()
        ((2.0, 5.0, 20.0), tensor(10.))
    """

    def noise(y: Tensor, sigma: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return y + sigma * torch.randn(y.shape, generator=generator).to(y)

    def saturate(y: Tensor, factor: float) -> Tensor:
        grey = y.mean(dim=-3, keepdim=True)
        return (grey + factor * (y - grey)).clamp(0, 1)

    whole = "the held-out photograph"
    return [
        Corruption(
            "noise σ", (0.1, 0.3, 1.0), noise, f"{whole} with noise of standard deviation {{}}"
        ),
        Corruption(
            "clamped noise σ",
            (0.3, 1.0),
            lambda y, s: noise(y, s).clamp(0, 1),
            f"{whole} with noise of standard deviation {{}}, cut to [0, 1]",
        ),
        Corruption("gain", (2.0, 5.0, 20.0), lambda y, s: s * y, f"{whole}, {{}} times as bright"),
        Corruption("inversion", (1.0, 3.0), lambda y, s: 1 - s * y, f"1 minus {{}} times {whole}"),
        Corruption("negative", (1.0, 5.0), lambda y, s: -s * y, f"{whole} times -{{}}"),
        Corruption("saturation", (3.0, 20.0), saturate, f"{whole} with {{}} times its colour"),
    ]
