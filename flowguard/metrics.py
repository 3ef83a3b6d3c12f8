r"""What restored images are measured by.

Images have shape :math:`(B, C, H, W)` and values in :math:`[0, 1]`, or are ``uint8`` with values
up to 255; floating-point images need not be quantised. Pictures are measured as they would be
shown: values beyond :math:`[0, 1]` are cut, NaN is black. :func:`error_rate` and
:func:`nan_rate` count what this hides.
"""

__all__ = [
    "bits_per_dim",
    "diversity",
    "error_rate",
    "gt_mean",
    "imresize",
    "low_light",
    "lpips",
    "lpips_map",
    "lr_psnr",
    "nan_rate",
    "psnr",
    "quantise",
    "ssim",
]

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from flowguard.hosts import install
from flowguard.io.pictures import GREY, shown, whole_numbers

#: A distance of images (N, 3, H, W) to images of the same shape, as a map (N, H, W).
Distance = Callable[[Tensor, Tensor], Tensor]
Net = Literal["alex", "vgg", "squeeze"]

WINDOW = 11  # rows and columns of the Gaussian window of the SSIM


def _shown(image: Tensor) -> Tensor:
    r"""The image on [0, 1], in double precision where the device has it."""
    if image.dim() != 4:
        raise ValueError(f"images must have shape (B, C, H, W); got {tuple(image.shape)}")
    dtype = torch.float32 if image.device.type == "mps" else torch.float64
    if image.dtype == torch.uint8:
        return image.to(dtype) / 255
    if not image.is_floating_point():
        raise TypeError(f"images must be floating-point or uint8; got {image.dtype}")
    return shown(image.detach().to(dtype))


def _pair(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != target.shape:
        raise ValueError(
            "image and target must have the same shape;"
            f" got {tuple(image.shape)} and {tuple(target.shape)}"
        )
    return _shown(image), _shown(target)


def span(condition: Tensor, beyond: float = 0.0) -> tuple[float, float]:
    r"""Returns the range that is spanned by [0, 1] and a condition, and so much on both sides.

    Arguments:
        condition: The condition, of any shape.
        beyond: How much more it is.

    Example:
        >>> span(torch.tensor([-0.5, 0.2]))
        (-0.5, 1.0)
    """
    return min(0.0, float(condition.min())) - beyond, max(1.0, float(condition.max())) + beyond


def quantise(image: Tensor) -> Tensor:
    r"""Returns images as bytes, rounded to the nearest of 256 levels.

    Arguments:
        image: The images, with shape :math:`(B, C, H, W)`.

    Raises:
        TypeError: If the images are neither floating point nor ``uint8``.
        ValueError: If they have another shape.

    Example:
        >>> quantise(torch.tensor([-0.2, 0.5, 1.2, torch.nan]).reshape(1, 1, 2, 2)).flatten()
        tensor([  0, 128, 255,   0], dtype=torch.uint8)
    """
    return image if image.dtype == torch.uint8 else whole_numbers(_shown(image)).to(torch.uint8)


def psnr(image: Tensor, target: Tensor) -> Tensor:
    r"""Returns the peak signal-to-noise ratio in dB,
    :math:`-10 \log_{10} \frac{1}{CHW} \sum (x - t)^2`.

    Arguments:
        image: The images, with shape :math:`(B, C, H, W)`.
        target: The truth, with the same shape.

    Returns:
        One number for each image, with shape :math:`(B)`; infinite for equal ones.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> psnr(torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.1)).round()
        tensor([20., 20.], dtype=torch.float64)
    """
    image, target = _pair(image, target)
    return -10 * torch.log10((image - target).square().flatten(1).mean(1))


def _grey(image: Tensor) -> Tensor:
    if image.shape[1] == 1:
        return image
    if image.shape[1] != 3:
        raise ValueError(f"grey is defined for 1 or 3 channels; got {image.shape[1]}")
    weights = image.new_tensor(GREY).reshape(1, 3, 1, 1)
    return (image * weights).sum(1, keepdim=True)


def ssim(image: Tensor, target: Tensor, grey: bool = False) -> Tensor:
    r"""Returns the structural similarity, as MATLAB computes it.

    The window is Gaussian, 11×11 with :math:`\sigma = 1.5`; only windows within the image count.
    For colour images it is the mean over the channels.

    References:
        | Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al., 2004)
        | https://doi.org/10.1109/TIP.2003.819861

    Arguments:
        image: The images, with shape :math:`(B, C, H, W)`, at least 11×11.
        target: The truth, with the same shape.
        grey: Whether to compare luminance only.

    Returns:
        One number for each image, with shape :math:`(B)`.

    Raises:
        ImportError: If torchmetrics is not installed.
        ValueError: If the shapes differ, or the images are smaller than the window.

    Example:
        >>> image = torch.rand(2, 3, 16, 16)
        >>> ssim(image, image)
        tensor([1., 1.], dtype=torch.float64)
    """
    structural = _torchmetrics("structural_similarity_index_measure", "the SSIM")
    image, target = _pair(image, target)
    if min(image.shape[-2:]) < WINDOW:
        raise ValueError(
            f"the SSIM needs images of at least {WINDOW}×{WINDOW}; got {tuple(image.shape[-2:])}"
        )
    if grey:
        image, target = _grey(image), _grey(target)
    if not len(image):
        return image.new_zeros(0)
    _, full = structural(
        image, target, data_range=1.0, sigma=1.5, reduction="none", return_full_image=True
    )
    half = WINDOW // 2
    return full[..., half:-half, half:-half].flatten(1).mean(1)


def _torchmetrics(name: str, what: str) -> Any:
    try:
        import torchmetrics.functional.image as functional
    except ImportError as error:
        raise ImportError(f"{what} needs torchmetrics: {install('metrics')}") from error
    return getattr(functional, name)


def _cubic(x: Tensor) -> Tensor:
    r"""Keys' kernel with a = -1/2, that of MATLAB."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))


def _resampling(size: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    r"""The matrix that resizes `size` pixels, with shape (ceil(scale * size), size)."""
    new = math.ceil(scale * size - 1e-9)
    shrink = min(scale, 1.0)  # a kernel wider than a pixel is the antialiasing
    # Pixel i covers (i, i + 1); centres of new pixels in the coordinates of the old ones.
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = math.ceil(4 / shrink) + 2
    first = torch.floor(centre - 2 / shrink)
    index = first[:, None] + torch.arange(taps, dtype=torch.float64)
    weight = _cubic(shrink * (centre[:, None] - index))
    weight = weight / weight.sum(1, keepdim=True)
    index = index.long() % (2 * size)  # symmetric: … 1 0 | 0 1 … n-1 | n-1 …
    index = torch.minimum(index, 2 * size - 1 - index)
    matrix = torch.zeros(new, size, dtype=torch.float64).scatter_add_(1, index, weight)
    return matrix.to(device, dtype)


def imresize(image: Tensor, scale: float) -> Tensor:
    r"""Resizes images as MATLAB's ``imresize`` does: bicubic, antialiased, symmetric borders.

    ``uint8`` images are rounded after each of the two passes, floating-point ones never, nor are
    they clamped.

    Arguments:
        image: The images, with shape :math:`(*, H, W)`.
        scale: The factor of height and width, above zero; for a shrunk image, such as ``1 / 4``.

    Returns:
        The images, with shape :math:`(*, \lceil sH \rceil, \lceil sW \rceil)`.

    Raises:
        TypeError: If the images are neither floating point nor ``uint8``.
        ValueError: If the scale is not positive, or there is nothing to resize.

    Example:
        >>> imresize(torch.rand(2, 3, 37, 51), 1 / 4).shape
        torch.Size([2, 3, 10, 13])
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive; got {scale}")
    if image.dim() < 2 or 0 in image.shape[-2:]:
        raise ValueError(f"images must have shape (*, H, W); got {tuple(image.shape)}")
    whole = image.dtype == torch.uint8
    if not (whole or image.is_floating_point()):
        raise TypeError(f"images must be floating-point or uint8; got {image.dtype}")
    exact = torch.float32 if image.device.type == "mps" else torch.float64
    dtype = exact if whole else torch.promote_types(image.dtype, torch.float32)
    rows, columns = (_resampling(n, scale, dtype, image.device) for n in image.shape[-2:])
    tall = rows @ image.to(dtype)
    if whole:
        tall = tall.round().clamp(0, 255)
    small = tall @ columns.mT
    return small.round().clamp(0, 255).to(torch.uint8) if whole else small.to(image.dtype)


def lr_psnr(image: Tensor, lr: Tensor, scale: int) -> Tensor:
    r"""Returns how well an enlarged image keeps to its condition: the PSNR between its MATLAB-like
    bicubic reduction and the LR image, both of 8 bits.

    Arguments:
        image: The enlarged images, with shape :math:`(B, 3, H, W)`.
        lr: The LR images, with shape :math:`(B, 3, \lceil H / s \rceil, \lceil W / s \rceil)`;
            for the number of the literature, ``imresize(quantise(hr), 1 / scale)``.
        scale: The factor :math:`s`.

    Returns:
        One number for each image, with shape :math:`(B)`.

    Raises:
        ValueError: If the scale is not positive, or the sizes do not fit.

    Example:
        >>> hr = torch.rand(1, 3, 16, 16)
        >>> lr_psnr(hr, imresize(quantise(hr), 1 / 4), scale=4)
        tensor([inf], dtype=torch.float64)
    """
    if scale <= 0:
        raise ValueError(f"scale must be positive; got {scale}")
    return psnr(imresize(quantise(image), 1 / scale), quantise(lr))


def gt_mean(image: Tensor, target: Tensor) -> Tensor:
    r"""Scales images such that their mean luminance becomes that of the truth.

    Published low-light numbers often include this step, which uses the truth; see
    :func:`low_light`. The mean is taken of the image as shown, on :math:`[0, 1]`, so that one
    exploded value does not darken the whole picture.

    Arguments:
        image: The images, with shape :math:`(B, C, H, W)`.
        target: The truth, with the same shape.

    Example:
        >>> target = torch.full((1, 3, 2, 2), 0.8, dtype=torch.float64)
        >>> torch.allclose(gt_mean(0.5 * target, target), target)
        True
    """
    image, target = _pair(image, target)
    mean, wanted = (_grey(t).flatten(1).mean(1) for t in (image, target))
    factor = torch.where(mean > 0, wanted / mean, torch.ones_like(mean))
    return image * factor.reshape(-1, 1, 1, 1)


def low_light(image: Tensor, target: Tensor) -> dict[str, Tensor]:
    r"""Returns PSNR and SSIM of brightened images, without and with :func:`gt_mean`.

    The two differ by several dB; a number is worth little if it does not say which it is.

    Arguments:
        image: The images, with shape :math:`(B, C, H, W)`.
        target: The truth, with the same shape.

    Example:
        >>> image, target = torch.rand(2, 1, 3, 16, 16)
        >>> sorted(low_light(image, target))
        ['psnr', 'psnr_gt_mean', 'ssim', 'ssim_gt_mean']
    """
    scaled = gt_mean(image, target)
    return {
        "psnr": psnr(image, target),
        "psnr_gt_mean": psnr(scaled, target.to(scaled) / _peak(target)),
        "ssim": ssim(image, target),
        "ssim_gt_mean": ssim(scaled, target.to(scaled) / _peak(target)),
    }


def _peak(image: Tensor) -> int:
    return 255 if image.dtype == torch.uint8 else 1


def squared_error(image: Tensor, target: Tensor) -> Tensor:
    r"""Returns the mean squared error of each pixel, a :data:`Distance` that needs no network.

    Arguments:
        image: The images, with shape :math:`(B, C, H, W)`.
        target: The truth, with the same shape.
    """
    return (image - target).square().mean(1)


def diversity(samples: Tensor, target: Tensor, distance: Distance | None = None) -> Tensor:
    r"""Returns the diversity score of the NTIRE challenge on learning the SR space, in percent.

    .. math:: 100 \, \frac{G - L}{G}, \quad
        G = \min_i \frac{1}{HW} \sum_p d_{ip}, \quad L = \frac{1}{HW} \sum_p \min_i d_{ip}

    It is 0 if one sample is the best everywhere, and grows as different samples are best at
    different places.

    References:
        | NTIRE 2021 Learning the Super-Resolution Space Challenge (Lugmayr et al., 2021)

    Arguments:
        samples: The samples, with shape :math:`(n, B, C, H, W)`.
        target: The truth, with shape :math:`(B, C, H, W)`.
        distance: From images and truth to the map :math:`d`. The challenge takes the spatial
            LPIPS, :func:`lpips_map`; by default it is the squared error, which needs no network.
            The scores of the two cannot be compared.

    Returns:
        One number for each image, with shape :math:`(B)`.

    Raises:
        ValueError: If the shapes do not fit, or there is no sample.

    Example:
        >>> target = torch.zeros(1, 3, 1, 2)
        >>> left, right = target.clone(), target.clone()
        >>> left[..., 0] = right[..., 1] = 1.0
        >>> diversity(torch.stack((left, right)), target)  # each is right at another pixel
        tensor([100.], dtype=torch.float64)
    """
    if samples.dim() != 5 or samples.shape[1:] != target.shape or not len(samples):
        raise ValueError(
            "samples must have shape (n, B, C, H, W), n positive, for a target of shape"
            f" (B, C, H, W); got {tuple(samples.shape)} and {tuple(target.shape)}"
        )
    measure = squared_error if distance is None else distance
    truth = _shown(target)
    maps = torch.stack([measure(_shown(sample), truth) for sample in samples]).flatten(2)
    best = maps.mean(2).amin(0)
    everywhere = maps.amin(0).mean(1)
    return torch.where(best > 0, 100 * (best - everywhere) / best, torch.zeros_like(best))


def error_rate(
    samples: Tensor, per_pixel: bool = False, low: float = -0.5, high: float = 1.5
) -> Tensor:
    r"""Returns the share of erroneous samples, before any clamping.

    As the paper counts it, a sample is erroneous if any of its values lies outside
    [`low`, `high`] or is not finite.

    References:
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        samples: The samples, with shape :math:`(*, C, H, W)`.
        per_pixel: Whether to count pixels, of which any channel may err, rather than samples.
        low: The least value.
        high: The greatest value.

    Returns:
        The share, in :math:`[0, 1]`; NaN if there are no samples.

    Example:
        >>> x = torch.tensor([0.5, 1.6, -0.4, torch.nan]).reshape(1, 1, 2, 2)
        >>> error_rate(x), error_rate(x, per_pixel=True)
        (tensor(1.), tensor(0.5000))
    """
    return _share(~((samples >= low) & (samples <= high)), per_pixel)


def nan_rate(samples: Tensor, per_pixel: bool = False) -> Tensor:
    r"""Returns the share of samples with a value that is not finite.

    Arguments:
        samples: The samples, with shape :math:`(*, C, H, W)`.
        per_pixel: Whether to count pixels rather than samples.

    Returns:
        The share, in :math:`[0, 1]`; NaN if there are no samples.

    Example:
        >>> samples = torch.zeros(4, 3, 2, 2)
        >>> samples[0, 0, 0, 0] = torch.nan
        >>> nan_rate(samples), nan_rate(samples, per_pixel=True)
        (tensor(0.2500), tensor(0.0625))
    """
    return _share(~torch.isfinite(samples), per_pixel)


def _share(wrong: Tensor, per_pixel: bool) -> Tensor:
    if wrong.dim() < 3:
        raise ValueError(f"samples must have shape (*, C, H, W); got {tuple(wrong.shape)}")
    pixels = wrong.any(-3)
    return (pixels if per_pixel else pixels.flatten(-2).any(-1)).float().mean()


def bits_per_dim(log_prob: Tensor, dims: int, levels: int = 256) -> Tensor:
    r"""Returns bits per dimension from the log-density of images dequantised on :math:`[0, 1]`.

    .. math:: -\frac{\log p}{D \log 2} + \log_2 (\text{levels} - 1)

    Arguments:
        log_prob: The log-densities in nats, with shape :math:`(*)`, of images to which uniform
            noise of one grey level's width was added.
        dims: The number of dimensions :math:`D = CHW`.
        levels: The number of grey levels, at the multiples of :math:`1 / (\text{levels} - 1)`.

    Raises:
        ValueError: If there are no dimensions, or less than two levels.

    Example:
        >>> bits_per_dim(torch.zeros(2), dims=12, levels=257)
        tensor([8., 8.])
    """
    if dims < 1 or levels < 2:
        raise ValueError(
            f"dims must be positive and levels at least 2; got dims={dims} and levels={levels}"
        )
    return -log_prob / (math.log(2) * dims) + math.log2(levels - 1)


@cache
def _lpips_net(net: Net, spatial: bool) -> Any:
    try:
        import torchvision  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: F401
    except ImportError as error:
        raise ImportError(
            "LPIPS needs torchvision, for its networks, beside torchmetrics: pip install"
            " torchvision (the build that fits your torch); its weights are downloaded once"
        ) from error
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ImportError as error:
        raise ImportError(f"LPIPS needs torchmetrics: {install('metrics')}") from error
    network = LearnedPerceptualImagePatchSimilarity(net, normalize=True).net
    network.spatial = spatial
    return network.eval()


def lpips_map(image: Tensor, target: Tensor, net: Net = "alex") -> Tensor:
    r"""Returns the spatial LPIPS, a distance for :func:`diversity`.

    Arguments:
        image: The images, with shape :math:`(B, 3, H, W)`.
        target: The truth, with the same shape.
        net: The network.

    Raises:
        ImportError: If torchvision or torchmetrics is not installed.

    Example:
        The first call downloads the weights of the network.

        >>> image, target = torch.rand(2, 2, 3, 64, 64)
        >>> lpips_map(image, target).shape  # doctest: +SKIP
        torch.Size([2, 64, 64])
    """
    return _lpips(image, target, net, spatial=True)[:, 0]


def lpips(image: Tensor, target: Tensor, net: Net = "alex") -> Tensor:
    r"""Returns the learned perceptual distance of images.

    References:
        | The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018)
        | https://arxiv.org/abs/1801.03924

    Arguments:
        image: The images, with shape :math:`(B, 3, H, W)`.
        target: The truth, with the same shape.
        net: The network.

    Returns:
        One number for each image, with shape :math:`(B)`.

    Raises:
        ImportError: If torchvision or torchmetrics is not installed.

    Example:
        The first call downloads the weights of the network.

        >>> image, target = torch.rand(2, 2, 3, 64, 64)
        >>> lpips(image, target).shape  # doctest: +SKIP
        torch.Size([2])
    """
    return _lpips(image, target, net, spatial=False).flatten(1).mean(1)


@torch.no_grad()
def _lpips(image: Tensor, target: Tensor, net: Net, *, spatial: bool) -> Tensor:
    network = _lpips_net(net, spatial)
    image, target = (t.float() for t in _pair(image, target))
    result: Tensor = network.to(image.device)(image, target, normalize=True)
    return result
