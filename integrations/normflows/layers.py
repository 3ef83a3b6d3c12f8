r"""Robust splines over vectors: a coupling and its autoregressive twin.

Mind the direction: in normflows `forward` goes from noise to data, `inverse` from data to noise.
"""

__all__ = ["KINDS", "RobustSplineAutoregressive", "RobustSplineCoupling"]

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from normflows.flows import Flow
from normflows.nets import ResidualNet, made
from normflows.nets.made import MADE
from torch import Tensor

from flowguard.autoregression import masked_inverse
from flowguard.functional import SLOPE
from flowguard.transforms import SHIFT_BOUND, Univariate

from .context import TAIL_BOUND, check_sizes, context_like, robust_map, total, unpack

#: What the host's masked networks are made of, as it is known in which order they go.
KINDS = (MADE, made.MaskedLinear, made.MaskedFeedforwardBlock, made.MaskedResidualBlock)


class RobustSplineCoupling(Flow):
    r"""Creates a spline coupling whose samples are bounded for *every* context.

    It takes the place of :class:`normflows.flows.CoupledRationalQuadraticSpline`, argument for
    argument, with :class:`flowguard.RobustSpline` as its spline: every other feature is
    transformed with parameters computed from the rest and the context. A single feature is
    transformed given the context alone.

    `forward` goes from noise to data, `inverse` from data to noise; both return the output and the
    log-determinant with shape :math:`(B)`. The context may have fewer rows than the input: row
    :math:`i` then belongs to row :math:`i \bmod B` of the context, and one row is shared by all.

    Warning:
        Features outside of :math:`[-B, B]` are shifted, and not transformed otherwise. It is
        recommended to standardize features (zero mean, unit variance) before training.

    References:
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        num_input_channels: The number of features :math:`D`.
        num_blocks: The number of residual blocks of the network.
        num_hidden_channels: The number of hidden features of the network.
        num_context_channels: The number of context features, :py:`None` for no context.
        num_bins: The number of bins :math:`K`.
        tail_bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound of the splines' shift. If :py:`None`, the shift is free, and the
            samples are not bounded.
        activation: The constructor of the activation function.
        dropout_probability: The dropout probability of the network.
        reverse_mask: Whether the first feature is transformed rather than the second.
        init_identity: Whether the layer starts as the identity.
        slope: The least slope of the splines.
        tails: Only ``"linear"``: outside of the box the spline is the identity.
        apply_unconditional_transform: Whether the rest is transformed too, by splines that depend
            on nothing, as the stock layer does. A second spline costs time, and the next layer,
            with the mask reversed, transforms the rest anyway.

    Raises:
        ValueError: If the tails are not linear, or an option is out of range.

    Example:
        >>> layer = RobustSplineCoupling(3, 1, 16, num_context_channels=5, init_identity=False)
        >>> z, context = torch.randn(64, 3), torch.randn(64, 5)
        >>> x, log_det = layer(z, context)
        >>> torch.allclose(layer.inverse(x, context)[0], z, atol=1e-4)
        True
        >>> bool(layer(z, 1e30 * context)[0].isfinite().all())
        True
    """

    mask: Tensor
    order: Tensor

    def __init__(
        self,
        num_input_channels: int,
        num_blocks: int,
        num_hidden_channels: int,
        num_context_channels: int | None = None,
        num_bins: int = 8,
        tail_bound: float = TAIL_BOUND,
        shift_bound: float | None = SHIFT_BOUND,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout_probability: float = 0.0,
        reverse_mask: bool = False,
        init_identity: bool = True,
        *,
        slope: float | None = SLOPE,
        tails: str = "linear",
        apply_unconditional_transform: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            num_input_channels=num_input_channels,
            num_hidden_channels=num_hidden_channels,
            num_context_channels=num_context_channels,
            num_bins=num_bins,
        )
        if tails != "linear":
            raise ValueError(
                f"a robust spline is the identity outside of its box (tails='linear'); got {tails!r}"
            )
        self.features = num_input_channels
        self.context_channels = num_context_channels
        self.univariate, self.shapes = robust_map(num_bins, tail_bound, shift_bound, slope)
        self.first = 0 if reverse_mask or num_input_channels == 1 else 1
        features = torch.arange(num_input_channels)
        changed, kept = features[self.first :: 2], features[1 - self.first :: 2]
        self.register_buffer("mask", features % 2 == self.first, persistent=False)
        self.register_buffer("order", torch.cat((kept, changed)).argsort(), persistent=False)
        numbers = sum(math.prod(shape) for shape in self.shapes)
        self.net = ResidualNet(
            in_features=max(1, len(kept)),  # of a single feature there is no rest: a zero
            out_features=len(changed) * numbers,
            context_features=num_context_channels,
            hidden_features=num_hidden_channels,
            num_blocks=num_blocks,
            activation=activation(),
            dropout_probability=dropout_probability,
            use_batch_norm=False,
        )
        own = nn.Parameter(torch.zeros(len(kept) * numbers))
        self.unconditional = own if apply_unconditional_transform else None
        if init_identity:
            nn.init.zeros_(self.net.final_layer.weight)
            nn.init.zeros_(self.net.final_layer.bias)

    def extra_repr(self) -> str:
        r"""Returns the numbers of features and of context channels, for the printed module."""
        return f"features={self.features}, context_channels={self.context_channels}"

    def _splines(self, kept: Tensor, context: Tensor | None) -> Univariate:
        raw = self.net(kept if kept.shape[1] else kept.new_zeros(len(kept), 1), context)
        return unpack(self.univariate, self.shapes, raw)

    @property
    def _own(self) -> Univariate | None:
        if self.unconditional is None:
            return None
        return unpack(self.univariate, self.shapes, self.unconditional.unsqueeze(0))

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        _check_input(z, self.features)
        return z[:, 1 - self.first :: 2], z[:, self.first :: 2]

    def _merge(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat((kept, changed), dim=1).index_select(1, self.order)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the data and the log-determinant, with shape :math:`(B)`."""
        kept, changed = self._split(z)
        context = context_like(z, context, self.context_channels)
        own_ladj = None
        if (own := self._own) is not None:
            kept, own_ladj = own.inverse_and_ladj(kept)
        changed, ladj = self._splines(kept, context).inverse_and_ladj(changed)
        log_det = total(ladj) if own_ladj is None else total(ladj) + total(own_ladj)
        return self._merge(kept, changed), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the noise and the log-determinant, with shape :math:`(B)`."""
        kept, changed = self._split(z)
        context = context_like(z, context, self.context_channels)
        changed, ladj = self._splines(kept, context).call_and_ladj(changed)
        log_det = total(ladj)
        if (own := self._own) is not None:
            kept, ladj = own.call_and_ladj(kept)
            log_det = log_det + total(ladj)
        return self._merge(kept, changed), log_det


class RobustSplineAutoregressive(Flow):
    r"""Creates an autoregressive spline layer whose samples are bounded for *every* context.

    It takes the place of :class:`normflows.flows.AutoregressiveRationalQuadraticSpline`, argument
    for argument: each feature is transformed by a :class:`flowguard.RobustSpline` with parameters
    computed from the features before it and the context.

    `forward` goes from noise to data, in :math:`D` passes of the network's hidden layers; `inverse`
    from data to noise, in one.
    The context may have fewer rows than the input; see :class:`RobustSplineCoupling`.

    References:
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        num_input_channels: The number of features :math:`D`.
        num_blocks: The number of residual blocks of the network.
        num_hidden_channels: The number of hidden features of the network.
        num_context_channels: The number of context features, :py:`None` for no context.
        num_bins: The number of bins :math:`K`.
        tail_bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound of the splines' shift. If :py:`None`, the shift is free, and the
            samples are not bounded.
        activation: The constructor of the activation function.
        dropout_probability: The dropout probability of the network.
        permute_mask: Whether the order of the features is random.
        init_identity: Whether the layer starts as the identity.
        slope: The least slope of the splines.

    Example:
        >>> layer = RobustSplineAutoregressive(3, 1, 16, init_identity=False)
        >>> z = torch.randn(64, 3)
        >>> x, log_det = layer(z)
        >>> torch.allclose(layer.inverse(x)[0], z, atol=1e-4)
        True
    """

    def __init__(
        self,
        num_input_channels: int,
        num_blocks: int,
        num_hidden_channels: int,
        num_context_channels: int | None = None,
        num_bins: int = 8,
        tail_bound: float = TAIL_BOUND,
        shift_bound: float | None = SHIFT_BOUND,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout_probability: float = 0.0,
        permute_mask: bool = False,
        init_identity: bool = True,
        *,
        slope: float | None = SLOPE,
    ) -> None:
        super().__init__()
        check_sizes(
            num_input_channels=num_input_channels,
            num_hidden_channels=num_hidden_channels,
            num_context_channels=num_context_channels,
            num_bins=num_bins,
        )
        self.features = num_input_channels
        self.context_channels = num_context_channels
        self.univariate, self.shapes = robust_map(num_bins, tail_bound, shift_bound, slope)
        self.net = MADE(
            features=num_input_channels,
            hidden_features=num_hidden_channels,
            context_features=num_context_channels,
            num_blocks=num_blocks,
            output_multiplier=sum(math.prod(shape) for shape in self.shapes),
            use_residual_blocks=True,
            random_mask=False,
            permute_mask=permute_mask,
            activation=activation(),
            dropout_probability=dropout_probability,
            use_batch_norm=False,
        )
        if init_identity:
            nn.init.zeros_(self.net.final_layer.weight)
            nn.init.zeros_(self.net.final_layer.bias)

    def extra_repr(self) -> str:
        r"""Returns the numbers of features and of context channels, for the printed module."""
        return f"features={self.features}, context_channels={self.context_channels}"

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data, one feature after another; returns the data and the log-
        determinant, with shape :math:`(B)`."""
        _check_input(z, self.features)
        context = context_like(z, context, self.context_channels)

        def solve(z: Tensor, raw: Tensor, _: Any) -> tuple[Tensor, Tensor]:
            x, ladj = unpack(self.univariate, self.shapes, raw).inverse_and_ladj(z)
            return x, total(ladj)

        return masked_inverse(self.net, z, context, solve, kinds=KINDS)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise, all features at once; returns the noise and the log-determinant,
        with shape :math:`(B)`."""
        _check_input(z, self.features)
        context = context_like(z, context, self.context_channels)
        raw = self.net(z, context)
        out, ladj = unpack(self.univariate, self.shapes, raw).call_and_ladj(z)
        return out, total(ladj)


def _check_input(z: Tensor, features: int) -> None:
    if z.dim() != 2 or z.shape[1] != features:
        raise ValueError(f"the input must have shape (B, {features}); got {tuple(z.shape)}")
