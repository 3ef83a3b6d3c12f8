r"""The Glow block with robust splines and a spatial context.

Mind the direction: in normflows `forward` goes from noise to data, `inverse` from data to noise;
the layers of the core that a block is made of go the other way.
"""

__all__ = ["LUConv1x1", "RobustCouplingBlock", "RobustGlowBlock", "conv_net"]

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from normflows.flows import Flow
from torch import Tensor

from flowguard.functional import FINE_SLOPE
from flowguard.image import ActNorm, InvertibleConv1x1, OrthogonalConv1x1
from flowguard.numerics import lu
from flowguard.transforms import Univariate

from .context import (
    IMAGE_SHIFT_BOUND,
    IMAGE_TAIL_BOUND,
    TAIL_BOUND,
    Constructor,
    additive_map,
    check_sizes,
    context_like,
    robust_map,
    total,
    unpack,
)

SPLIT_MODES = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")
SCALE_MAPS = ("exp", "sigmoid", "sigmoid_inv")


class RobustCouplingBlock(Flow):
    r"""Creates a coupling with any network and any univariate map.

    It takes the place of :class:`normflows.flows.AffineCouplingBlock`: one half of the features is
    kept, the other transformed with parameters that the network computes from the first half and
    the context. `forward` goes from noise to data, `inverse` from data to noise.

    Arguments:
        param_map: The network. It takes the kept half, with the context behind it in dimension 1,
            and returns :math:`P` numbers for each transformed feature, one feature after another;
            for the default map in the order :math:`K - 1` widths, :math:`K - 1` heights,
            :math:`K - 1` derivatives, shift.
        context_channels: The number of channels of the context, :py:`None` for no context. With a
            checkerboard, two neighbours share a position: the network gets twice as many.
        split_mode: The halves, as :class:`normflows.flows.Split` makes them.
        univariate: The constructor of the map. If :py:`None`, use the robust spline with two bins.
        shapes: The shapes of its parameters.

    Raises:
        ValueError: If the split is unknown, or only one of map and shapes is given.

    Example:
        >>> layer = RobustCouplingBlock(nn.Conv2d(2 + 3, 2 * 4, 1), context_channels=3)
        >>> z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)
        >>> x, log_det = layer(z, context)
        >>> torch.allclose(layer.inverse(x, context)[0], z, atol=1e-4)
        True
    """

    def __init__(
        self,
        param_map: nn.Module,
        context_channels: int | None = None,
        split_mode: str = "channel",
        univariate: Constructor | None = None,
        shapes: list[tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        if split_mode not in SPLIT_MODES:
            raise ValueError(
                f"split_mode must be one of {', '.join(SPLIT_MODES)}; got {split_mode!r}"
            )
        if (univariate is None) != (shapes is None):
            raise ValueError("univariate and shapes belong together: give both, or neither")
        if univariate is None or shapes is None:
            univariate, shapes = robust_map(2, TAIL_BOUND, IMAGE_SHIFT_BOUND, FINE_SLOPE)
        self.context_channels = context_channels
        self.split_mode = split_mode
        self.univariate = univariate
        self.shapes = shapes
        self.param_map = param_map

    def extra_repr(self) -> str:
        r"""Returns the channels of the context and the split, for the printed module."""
        return f"context_channels={self.context_channels}, split_mode={self.split_mode!r}"

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Splits into the half that is kept and the half that is transformed.

        Arguments:
            z: The features, with shape :math:`(B, C, *)`.

        Raises:
            ValueError: If a checkerboard has an odd last dimension.
        """
        if self.split_mode == "channel":
            kept, changed = z.tensor_split(((z.shape[1] + 1) // 2,), dim=1)
            return kept, changed
        if self.split_mode == "channel_inv":
            changed, kept = z.tensor_split(((z.shape[1] + 1) // 2,), dim=1)
            return kept, changed
        if z.shape[-1] % 2:
            raise ValueError(
                f"a checkerboard needs an even last dimension; got shape {tuple(z.shape)}"
            )
        even, odd = z.unflatten(-1, (-1, 2)).unbind(-1)
        white = self._white(even)
        return torch.where(white, even, odd), torch.where(white, odd, even)

    def merge(self, kept: Tensor, changed: Tensor) -> Tensor:
        r"""Puts together what :meth:`split` has split.

        Arguments:
            kept: The half that was kept, with the shape that :meth:`split` gave it.
            changed: The half that was transformed, likewise.

        Returns:
            The features, with shape :math:`(B, C, *)`.
        """
        if self.split_mode == "channel":
            return torch.cat((kept, changed), dim=1)
        if self.split_mode == "channel_inv":
            return torch.cat((changed, kept), dim=1)
        white = self._white(kept)
        pair = torch.where(white, kept, changed), torch.where(white, changed, kept)
        return torch.stack(pair, dim=-1).flatten(-2)

    def _white(self, half: Tensor) -> Tensor:
        r"""Whether the kept one of two neighbours is the first."""
        parity = torch.zeros((), dtype=torch.long, device=half.device)
        for size in half.shape[1:-1]:
            parity = parity.unsqueeze(-1) + torch.arange(size, device=half.device)
        first = 0 if self.split_mode.endswith("inv") else 1
        return parity.unsqueeze(-1) % 2 == first

    def _map(self, z: Tensor, kept: Tensor, context: Tensor | None) -> Univariate:
        context = context_like(z, context, self.context_channels)
        if context is not None:
            if self.split_mode.startswith("checkerboard") and z.dim() == 4:
                context = context.unflatten(-1, (-1, 2)).movedim(-1, 2).flatten(1, 2)
            kept = torch.cat((kept, context), dim=1)
        return unpack(self.univariate, self.shapes, self.param_map(kept))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the data and the log-determinant, with shape :math:`(B)`."""
        kept, changed = self.split(z)
        changed, ladj = self._map(z, kept, context).inverse_and_ladj(changed)
        return self.merge(kept, changed), total(ladj)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the noise and the log-determinant, with shape :math:`(B)`."""
        kept, changed = self.split(z)
        changed, ladj = self._map(z, kept, context).call_and_ladj(changed)
        return self.merge(kept, changed), total(ladj)


class LUConv1x1(nn.Module):
    r"""Creates an invertible 1×1 convolution :math:`z = P L U x` that cannot become singular.

    As the layers of the core, its `forward` goes from data to noise. It starts as a random
    rotation. Product and inverse are computed in float64, whatever the dtype of the image; the
    log-determinant is a sum.

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039

    Arguments:
        channels: The number of channels.

    Example:
        >>> layer = LUConv1x1(3)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(layer.inverse(layer(x)[0])[0], x, atol=1e-5)
        True
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        q, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        p, lower, upper = lu(q)
        diagonal = upper.diagonal()
        dtype = torch.get_default_dtype()
        self.register_buffer("permutation", p.to(dtype))
        self.register_buffer("signs", diagonal.sign().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.logs = nn.Parameter(diagonal.abs().log().to(dtype))

    def extra_repr(self) -> str:
        r"""Returns the number of channels, for the printed module."""
        return f"channels={self.logs.shape[0]}"

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns the matrices :math:`P`, :math:`L` and :math:`U`, in float64."""
        logs, signs = self.logs.double(), self.signs.double()
        eye = torch.eye(len(logs), dtype=logs.dtype, device=logs.device)
        lower = self.lower.double().tril(-1) + eye
        upper = self.upper.double().triu(1) + torch.diag(signs * logs.exp())
        return self.permutation.double(), lower, upper

    def _ladj(self, x: Tensor) -> Tensor:
        return (self.logs.sum() * (x.shape[-2] * x.shape[-1])).to(x.dtype).expand(x.shape[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise, as the layers of the core do; returns the image and the log-
        determinant, with shape :math:`(B)`."""
        p, lower, upper = self.factors()
        weight = (p @ lower @ upper).to(x.dtype)
        return F.conv2d(x, weight[:, :, None, None]), self._ladj(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data, as the layers of the core do; returns the image and the log-
        determinant, with shape :math:`(B)`."""
        p, lower, upper = self.factors()
        weight = torch.linalg.solve_triangular(lower, p.T, upper=False, unitriangular=True)
        weight = torch.linalg.solve_triangular(upper, weight, upper=True).to(z.dtype)
        return F.conv2d(z, weight[:, :, None, None]), -self._ladj(z)


class RobustGlowBlock(Flow):
    r"""Creates a Glow block that takes a context, and whose samples are bounded for all of them.

    It takes the place of :class:`normflows.flows.GlowBlock`: in its `forward` direction, from
    noise to data, a coupling by :class:`flowguard.RobustSpline`, the inverse of a 1×1 convolution,
    and the inverse of an activation normalization; in its `inverse` direction, from data to noise,
    the reverse. As in normflows, the first batch in training mode initialises the activation
    normalization, whichever way it passes: let this be data, not samples. In evaluation mode
    nothing does.

    The context is a map with shape :math:`(B, C', H, W)`, of the size of the image at this block,
    or a vector with shape :math:`(B, C')` for all positions. It may have fewer rows than the
    input: row :math:`i` then belongs to row :math:`i \bmod B` of the context.

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        channels: The number of channels of the image. With one channel there is no convolution,
            and the split must be a checkerboard.
        hidden_channels: The number of channels of the hidden layers of the network.
        context_channels: The number of channels of the context, :py:`None` for no context.
        split_mode: The halves of the coupling: ``"channel"``, ``"channel_inv"``,
            ``"checkerboard"`` or ``"checkerboard_inv"``.
        scale: Whether the coupling is a spline. If :py:`False`, it is only a bounded shift.
        scale_map: How stock blocks make a scale. A spline has none, so that this has no effect: it
            is there that calls of the stock block need no change.
        leaky: The slope of the leaky ReLUs of the network.
        init_zeros: Whether the coupling starts as the identity.
        use_lu: Whether the convolution is parametrized by its LU decomposition, so that it cannot
            become singular.
        net_actnorm: Whether the network normalizes its activations.
        orthogonal: Whether the convolution is a rotation in place of both; it keeps certificates
            small; see :class:`flowguard.image.OrthogonalConv1x1`.
        num_bins: The number of bins :math:`K`; two are the cheapest.
        tail_bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound of the shift. If :py:`None`, the shift is free, and the samples are
            not bounded.
        slope: The least slope of the splines.

    Raises:
        ValueError: If an option is unknown or out of range.

    Example:
        >>> block = RobustGlowBlock(12, 16, context_channels=3)
        >>> x, context = torch.randn(2, 12, 8, 8), torch.randn(2, 3, 8, 8)
        >>> z, log_det = block.inverse(x, context)
        >>> torch.allclose(block(z, context)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        context_channels: int | None = None,
        split_mode: str = "channel",
        scale: bool = True,
        scale_map: str = "sigmoid",
        leaky: float = 0.0,
        init_zeros: bool = True,
        use_lu: bool = True,
        net_actnorm: bool = False,
        *,
        orthogonal: bool = False,
        num_bins: int = 2,
        tail_bound: float = IMAGE_TAIL_BOUND,
        shift_bound: float | None = IMAGE_SHIFT_BOUND,
        slope: float | None = FINE_SLOPE,
    ) -> None:
        super().__init__()
        if scale_map not in SCALE_MAPS:
            raise ValueError(
                f"scale_map must be one of {', '.join(SCALE_MAPS)}; got {scale_map!r}"
            )
        check_sizes(
            channels=channels, hidden_channels=hidden_channels, context_channels=context_channels
        )
        kept, changed = _halves(channels, split_mode)
        univariate, shapes = (
            robust_map(num_bins, tail_bound, shift_bound, slope)
            if scale
            else additive_map(shift_bound)
        )
        width = (context_channels or 0) * (2 if split_mode.startswith("checkerboard") else 1)
        net = conv_net(
            kept + width,
            hidden_channels,
            changed * sum(math.prod(shape) for shape in shapes),
            leaky=leaky,
            init_zeros=init_zeros,
            actnorm=net_actnorm,
        )
        self.channels = channels
        self.context_channels = context_channels
        self.coupling = RobustCouplingBlock(net, context_channels, split_mode, univariate, shapes)
        self.mix: nn.Module | None = None
        if channels > 1:
            mix = OrthogonalConv1x1 if orthogonal else LUConv1x1 if use_lu else InvertibleConv1x1
            self.mix = mix(channels)
        self.actnorm = ActNorm(channels)

    def _check(self, z: Tensor) -> None:
        if z.dim() != 4 or z.shape[1] != self.channels:
            raise ValueError(
                f"the input must have shape (B, {self.channels}, H, W); got {tuple(z.shape)}"
            )

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the data and the log-determinant, with shape :math:`(B)`."""
        self._check(z)
        z, total = self.coupling(z, context)
        if self.mix is not None:
            z, log_det = self.mix.inverse(z)  # type: ignore[operator]
            total = total + log_det
        if self.actnorm.pending:
            _normalize_samples(self.actnorm, z)
        z, log_det = self.actnorm.inverse(z)
        return z, total + log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the noise and the log-determinant, with shape :math:`(B)`."""
        self._check(z)
        z, total = self.actnorm(z)
        if self.mix is not None:
            z, log_det = self.mix(z)
            total = total + log_det
        z, log_det = self.coupling.inverse(z, context)
        return z, total + log_det


@torch.no_grad()
def _normalize_samples(layer: ActNorm, z: Tensor) -> None:
    r"""Initialises the layer such that its inverse normalizes this batch."""
    layer.initialize(z)
    if layer.pending:
        return  # a batch that is not finite changes nothing
    layer.bias.mul_(-layer.logs.exp())
    layer.logs.neg_()


class _Normalize(ActNorm):
    r"""An activation normalization within a network, where no log-determinant is asked for."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class _ConvNet(nn.Sequential):
    r"""A sequence of convolutions, in the memory format that suits them."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        # Channels last: on CPUs this spares a reordering before and after each convolution. (The
        # argument `memory_format` is not for `vmap`.)
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return super().forward(x).contiguous()


def conv_net(
    inputs: int,
    hidden: int,
    outputs: int,
    *,
    leaky: float = 0.0,
    init_zeros: bool = True,
    actnorm: bool = False,
) -> nn.Sequential:
    r"""Returns the network of a Glow block: convolutions of 3×3, 1×1 and 3×3.

    Arguments:
        inputs: The number of channels of the input.
        hidden: The number of channels of the hidden layers.
        outputs: The number of channels of the output.
        leaky: The slope of the leaky ReLUs.
        init_zeros: Whether the output starts at zero.
        actnorm: Whether activations are normalized.
    """
    layers: list[nn.Module] = []
    for width, size in ((inputs, 3), (hidden, 1)):
        layers.append(nn.Conv2d(width, hidden, size, padding=size // 2, bias=not actnorm))
        if actnorm:
            layers.append(_Normalize(hidden))
        # What the activation overwrites, no gradient asks for; a negative slope would hide signs.
        layers.append(nn.LeakyReLU(leaky, inplace=leaky >= 0))
    last = nn.Conv2d(hidden, outputs, 3, padding=1)
    if init_zeros:
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
    return _ConvNet(*layers, last)


def _halves(channels: int, split_mode: str) -> tuple[int, int]:
    r"""The numbers of channels that a coupling keeps and transforms."""
    if split_mode not in SPLIT_MODES:
        raise ValueError(f"split_mode must be one of {', '.join(SPLIT_MODES)}; got {split_mode!r}")
    if split_mode.startswith("checkerboard"):
        return channels, channels
    if channels < 2:
        raise ValueError(
            f"a split of the channels needs at least 2 of them; got {channels}:"
            " use split_mode='checkerboard'"
        )
    first, second = (channels + 1) // 2, channels // 2
    return (first, second) if split_mode == "channel" else (second, first)
