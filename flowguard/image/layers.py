r"""The context-free layers of an image flow."""

__all__ = [
    "HALVES",
    "ActNorm",
    "FixedConv1x1",
    "Folded",
    "FoldedMix",
    "InvertibleConv1x1",
    "NormedConv2d",
    "OrthogonalConv1x1",
    "Squeeze",
    "ZeroConv2d",
    "folded",
    "laid_out",
    "pixelwise",
]

from typing import Any, NamedTuple, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flowguard.numerics import full_precision, inv, logabsdet, solve
from flowguard.ood.state import gather


class ZeroConv2d(nn.Conv2d):
    r"""Creates a 3×3 convolution that starts at zero, with a learned gain for each channel.

    .. math:: y = (W * x + b) \, e^{3 g}

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels.

    Example:
        >>> ZeroConv2d(2, 3)(torch.randn(1, 2, 4, 4)).abs().max()
        tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.logs = nn.Parameter(torch.zeros(out_channels, 1, 1))
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        r"""Returns weight and bias with the gain in them, with shapes :math:`(C', C, 3, 3)` and
        :math:`(C')`."""
        gain = torch.exp(3 * self.logs)
        bias = None if self.bias is None else self.bias * gain.flatten()
        return self.weight * gain.unsqueeze(1), bias

    def forward(self, x: Tensor) -> Tensor:
        r"""Returns the convolved maps, with shape :math:`(B, C', H, W)`."""
        # The gain goes into the small weights rather than onto the large output.
        return self._conv_forward(x, *self.folded())


class Squeeze(nn.Module):
    r"""Creates a squeeze, which trades resolution for channels: (C, H, W) to (4C, H/2, W/2).

    Arguments:
        factor: The factor in each direction.

    Example:
        >>> Squeeze()(torch.randn(1, 3, 4, 6))[0].shape
        torch.Size([1, 12, 2, 3])
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor

    def extra_repr(self) -> str:
        r"""Returns the factor, for the printed module."""
        return f"factor={self.factor}"

    def forward(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes blocks of pixels to channels; returns the output and zeros, with shape
        :math:`(B)`.

        Raises:
            ValueError: If height or width is odd.
        """
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(
                f"height and width must be multiples of {self.factor};"
                f" got {x.shape[-2]} and {x.shape[-1]}: pad the image first"
            )
        z = rearrange(x, "b c (h i) (w j) -> b (c i j) h w", i=self.factor, j=self.factor)
        return z, x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes channels to blocks of pixels; returns the output and zeros, with shape
        :math:`(B)`."""
        x = rearrange(z, "b (c i j) h w -> b c (h i) (w j)", i=self.factor, j=self.factor)
        return x, z.new_zeros(z.shape[0])


class ActNorm(nn.Module):
    r"""Creates an activation normalisation, initialised by the first batch seen in training.

    .. math:: y = (x + b) \, e^{s}

    In evaluation mode an uninitialised layer is the identity and stays so. Whether it is
    initialised is part of the state.

    Where :mod:`torch.distributed` is initialised with several processes, the first batch is that of
    all of them together, so that they stay one model: all must pass theirs, as in each step of
    :class:`torch.nn.parallel.DistributedDataParallel`.

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039

    Arguments:
        channels: The number of channels.

    Example:
        >>> layer = ActNorm(3)
        >>> z, ladj = layer(5 * torch.randn(4, 3, 8, 8) + 2)
        >>> bool(z.mean().abs() < 1e-5), bool((z.std() - 1).abs() < 0.01)
        (True, True)
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.logs = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(False))
        self._ready = False  # the buffer, known to the host without a synchronisation

    def extra_repr(self) -> str:
        r"""Returns the number of channels, for the printed module."""
        return f"channels={self.bias.shape[1]}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = bool(self.initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        r"""Sets shift and scale such that this batch gets mean zero and variance one.

        A batch that is not finite, or empty, changes nothing; a channel without variance is only
        shifted. Of several processes, the batch is that of all.

        Arguments:
            x: A batch, with shape :math:`(B, C, H, W)`.
        """
        if not _several_processes():
            if x.numel() == 0:
                return
            std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        else:
            std, mean = _std_mean_of_all(x)
        if not bool((torch.isfinite(std) & torch.isfinite(mean)).all()):
            return  # the next batch may be better
        self.bias.copy_(-mean)
        # A channel that does not vary says nothing about its scale.
        varies = std > 1e-6 * (1 + mean.abs())
        self.logs.copy_(torch.where(varies, -torch.log(std + 1e-6), 0.0))
        self.initialized.fill_(True)
        self._ready = True

    @property
    def pending(self) -> bool:
        r"""Whether the next batch in training mode initialises the layer."""
        if not self._ready and self.training:
            # The buffer may have been written by other means than `load_state_dict`.
            self._ready = bool(self.initialized)
        return self.training and not self._ready

    def forward(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        if self.pending:
            self.initialize(x)
        return (x + self.bias) * torch.exp(self.logs), _of_image(self.logs.sum(), x)

    def inverse(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        return z * torch.exp(-self.logs) - self.bias, _of_image(self.logs.sum(), z, -1)


def _several_processes() -> bool:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size() > 1


def _std_mean_of_all(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Standard deviation and mean of each channel over the batches of all processes."""
    rows = x.detach().transpose(0, 1).flatten(1).double()
    if rows.shape[1] == 0:  # which must not keep the others waiting
        rows = rows.new_zeros(rows.shape[0], 1)
    variance, mean = torch.var_mean(rows, dim=1, correction=0)
    count = torch.full_like(mean, x.numel() // x.shape[1])
    # All merge the same numbers in the same order, and find the same to the last bit.
    everyone = gather([count, mean, variance])
    counts, means, variances = (torch.stack(t) for t in zip(*everyone, strict=True))
    share = counts / counts.sum(0)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    shape = (1, -1, 1, 1)
    return variance.sqrt().reshape(shape).to(x), mean.reshape(shape).to(x)


class NormedConv2d(nn.Conv2d):
    r"""Creates a convolution without bias, followed by an activation normalisation.

    It keeps the size of the image. As the hidden layers of SRFlow's couplings, its weights start
    with a standard deviation of 0.05.

    References:
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200

    Arguments:
        in_channels: The number of input channels.
        out_channels: The number of output channels.
        kernel_size: The size of the kernel, odd.

    Example:
        >>> layer = NormedConv2d(3, 8)
        >>> y = layer(torch.randn(4, 3, 8, 8) + 7)  # initialises
        >>> bool(y.mean().abs() < 1e-4)
        True
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        nn.init.normal_(self.weight, std=0.05)
        self.norm = ActNorm(out_channels)

    def folded(self) -> tuple[Tensor, Tensor]:
        r"""Returns weight and bias with the normalisation in them, with shapes :math:`(C', C, k,
        k)` and :math:`(C')`."""
        gain = torch.exp(self.norm.logs).flatten()
        return self.weight * gain[:, None, None, None], self.norm.bias.flatten() * gain

    def forward(self, x: Tensor) -> Tensor:
        r"""Returns the convolved and normalised maps, with shape :math:`(B, C', H, W)`."""
        if self.norm.pending:
            with torch.no_grad():
                self.norm.initialize(self._conv_forward(x, self.weight, None))
        return self._conv_forward(x, *self.folded())


#: The dtypes of half precision.
HALVES = (torch.bfloat16, torch.float16)


def laid_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Returns maps of a dtype, laid out as its convolutions are quickest: in half precision with
    the channels of a pixel together, and else with the pixels of a channel.

    Arguments:
        x: The maps, or the kernels, with four dimensions.
        dtype: The dtype.

    Example:
        >>> laid_out(torch.zeros(1, 2, 3, 4), torch.bfloat16).stride()
        (24, 1, 8, 2)
    """
    if dtype not in HALVES:
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous()
    # By views, which torch.vmap takes, where it has no such format of memory.
    pixels = x.movedim(1, -1).to(dtype, memory_format=torch.contiguous_format)
    return pixels.contiguous().movedim(-1, 1)


def folded(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    r"""Returns weight and bias of the plain convolution that a convolution amounts to.

    Arguments:
        conv: A :class:`torch.nn.Conv2d`, :class:`NormedConv2d` or :class:`ZeroConv2d`.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> weight, bias = folded(ZeroConv2d(2, 3))
        >>> weight.shape
        torch.Size([3, 2, 3, 3])
    """
    if isinstance(conv, NormedConv2d | ZeroConv2d):
        return conv.folded()
    if type(conv) is nn.Conv2d:
        return conv.weight, conv.bias
    raise TypeError(f"only convolutions can be folded; got {type(conv).__name__}")


class Folded(NamedTuple):
    r"""A convolution that keeps the size of the image, with all its factors in the weights."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, conv: nn.Module) -> Self:
        r"""Returns what a convolution amounts to; see :func:`folded`."""
        return cls(*folded(conv))

    def to(self, dtype: torch.dtype) -> Self:
        r"""Returns the same convolution with weights of a dtype, laid out for it."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return type(self)(laid_out(self.weight, dtype), bias)

    # Not a call, which the compiler of torch 2.6 does not know of named tuples.
    def forward(self, x: Tensor) -> Tensor:
        r"""Returns what the convolution makes of maps of shape :math:`(B, C, H, W)`."""
        size = self.weight.shape[-1]
        if size == 1:
            return pixelwise(x, self.weight.flatten(1), self.bias)
        return F.conv2d(x, self.weight, self.bias, padding=size // 2)


class FoldedMix(NamedTuple):
    r"""Normalisation and 1×1 convolution in one, :math:`y = W x + b` at each pixel, and back."""

    there: Tensor
    offset: Tensor
    back: Tensor
    way_back: Tensor
    ladj: Tensor  # of one pixel

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the output, with shape :math:`(B, C, H, W)`, and the
        log-determinant, with shape :math:`(B)`."""
        return _exactly(x, self.there, self.offset), _of_image(self.ladj, x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the output, with shape :math:`(B, C, H, W)`, and the
        log-determinant, with shape :math:`(B)`."""
        return _exactly(z, self.back, self.way_back), _of_image(self.ladj, z, -1)


def _exactly(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    with full_precision(x):
        return pixelwise(x, matrix.to(x.dtype), bias.to(x.dtype))


def _of_image(ladj: Tensor, x: Tensor, sign: int = 1) -> Tensor:
    return (ladj * (sign * x.shape[-2] * x.shape[-1])).expand(x.shape[0])


def pixelwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Multiplies every pixel by a matrix and adds a bias, by one matrix product for an image, or
    for all where the channels of a pixel lie together.

    Arguments:
        x: The images, with shape :math:`(B, C, H, W)`.
        matrix: The matrix, with shape :math:`(C', C)`.
        bias: The bias, with shape :math:`(C')`.

    Example:
        >>> pixelwise(torch.ones(1, 2, 3, 4), torch.eye(2)).shape
        torch.Size([1, 2, 3, 4])
    """
    pixels = x.movedim(1, -1)
    if not x.is_contiguous() and pixels.is_contiguous():
        # With one thread, torch has no quick 1×1 convolution for it.
        return F.linear(pixels, matrix, bias).movedim(-1, 1)
    flat, matrix = x.flatten(2), matrix.expand(x.shape[0], -1, -1)
    y = torch.bmm(matrix, flat) if bias is None else torch.baddbmm(bias[:, None], matrix, flat)
    return y.unflatten(2, x.shape[-2:])


def _mix(x: Tensor, weight: Tensor) -> Tensor:
    r"""Multiplies every pixel by a matrix, never in a lower precision than that of `x`.

    Autocast, or `torch.set_float32_matmul_precision`, would round the matrix here and its inverse
    there, and the two would no longer undo each other; so would the convolutions of a GPU, which
    by default keep ten bits. Its matrix products keep all.
    """
    with full_precision(x):
        weight = weight.to(x.dtype)
        return F.conv2d(x, weight[:, :, None, None]) if x.is_cpu else pixelwise(x, weight)


class InvertibleConv1x1(nn.Module):
    r"""Creates an invertible 1×1 convolution, :math:`y = W x` at each pixel.

    It starts as a random rotation. The inverse and the determinant are computed in float64,
    whatever the dtype of the image.

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039

    Arguments:
        channels: The number of channels.

    Example:
        >>> layer = InvertibleConv1x1(3)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(layer.inverse(layer(x)[0])[0], x, atol=1e-5)
        True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        q, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        self.weight = nn.Parameter(q.to(torch.get_default_dtype()).contiguous())

    def extra_repr(self) -> str:
        r"""Returns the number of channels, for the printed module."""
        return f"channels={self.weight.shape[0]}"

    def _ladj(self, x: Tensor) -> Tensor:
        ladj = logabsdet(self.weight.double())
        return (ladj * (x.shape[-2] * x.shape[-1])).to(x.dtype).expand(x.shape[0])

    def forward(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        return _mix(x, self.weight), self._ladj(x)

    def inverse(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        return _mix(z, inv(self.weight.double())), -self._ladj(z)


class OrthogonalConv1x1(nn.Module):
    r"""Creates a 1×1 convolution by a rotation, :math:`y = W x` at each pixel.

    .. math:: W = (I + S)^{-1} (I - S) \, Q, \quad S = (A - A^T) / 2

    with a fixed random rotation :math:`Q`, which it starts as, and a free matrix :math:`A`. As
    :math:`W` is orthogonal whatever :math:`A` is, the layer and its inverse keep the Euclidean
    norm of every pixel, and with it all bounds.

    References:
        | Trivializations for Gradient-Based Optimization on Manifolds (Lezcano-Casado, 2019)
        | https://arxiv.org/abs/1909.09501

    Arguments:
        channels: The number of channels.

    Example:
        >>> layer = OrthogonalConv1x1(3)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(layer(x)[0].norm(dim=1), x.norm(dim=1), atol=1e-5)
        True
    """

    rotation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        q, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        self.register_buffer("rotation", q.to(torch.get_default_dtype()).contiguous())
        self.raw = nn.Parameter(torch.zeros(channels, channels))

    def extra_repr(self) -> str:
        r"""Returns the number of channels, for the printed module."""
        return f"channels={self.raw.shape[0]}"

    @property
    def weight(self) -> Tensor:
        r"""The rotation :math:`W`, with shape :math:`(C, C)`."""
        raw = self.raw.double()
        skew = (raw - raw.T) / 2
        eye = torch.eye(len(raw), dtype=raw.dtype, device=raw.device)
        # I + S is never singular, for the eigenvalues of S are imaginary.
        cayley = solve(eye + skew, eye - skew)
        # What is stored in float32 is orthogonal to 1e-7 only: a step of Newton's iteration for
        # the polar decomposition squares that, for models that are made float64 afterwards.
        q = self.rotation.double()
        q = 1.5 * q - 0.5 * q @ (q.T @ q)
        return (cayley @ q).to(self.raw.dtype)

    def forward(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Rotates the channels; returns the output and zeros, with shape :math:`(B)`."""
        return _mix(x, self.weight), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Rotates the channels back; returns the output and zeros, with shape :math:`(B)`."""
        return _mix(z, self.weight.T), z.new_zeros(z.shape[0])


class FixedConv1x1(nn.Module):
    r"""Creates a 1×1 convolution by a random rotation that is not trained.

    It holds the rotation and its transpose, and undoes the one by the other, as robustNF does:
    where the stored matrices are rotations up to rounding only, so is the round trip.

    References:
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        channels: The number of channels.

    Example:
        >>> layer = FixedConv1x1(3)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(layer.inverse(layer(x)[0])[0], x, atol=1e-5)
        True
    """

    weight: Tensor
    transpose: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        q, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        q = q.to(torch.get_default_dtype())
        self.register_buffer("weight", q.contiguous())
        self.register_buffer("transpose", q.T.contiguous())

    def extra_repr(self) -> str:
        r"""Returns the number of channels, for the printed module."""
        return f"channels={self.weight.shape[0]}"

    def forward(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        return _mix(x, self.weight), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        return _mix(z, self.transpose), z.new_zeros(z.shape[0])
