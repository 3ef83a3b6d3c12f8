r"""The robust autoregressive transform, in nflows' terms."""

__all__ = ["MaskedRobustSplineAutoregressiveTransform"]

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from flowguard.autoregression import masked_inverse
from flowguard.functional import SLOPE
from flowguard.numerics import cut, unhooked

from .host import part
from .spline import (
    SHIFT_BOUND,
    TAIL_BOUND,
    PartialHead,
    SplineHead,
    check_floating,
    check_positive,
    check_tails,
    map_of,
)

AutoregressiveTransform: Any = part("transforms.autoregressive").AutoregressiveTransform
made: Any = part("transforms.made")
MADE: Any = made.MADE
#: What the host's networks are made of, as it is known in which order they go.
KINDS = (MADE, made.MaskedLinear, made.MaskedFeedforwardBlock, made.MaskedResidualBlock)


class MaskedRobustSplineAutoregressiveTransform(AutoregressiveTransform):
    r"""Creates a masked autoregressive transform with robust splines, whose inverse cannot
    explode whatever the context.

    It takes the place of nflows' ``MaskedPiecewiseRationalQuadraticAutoregressiveTransform``; see
    :class:`RobustSplineCouplingTransform` for the splines, and for what bounds them. It starts as
    the identity. Sampling works out each unit of the network once, when all features that it
    depends on are known.

    References:
        | Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017)
        | https://arxiv.org/abs/1705.07057
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        features: The number of features :math:`D`.
        hidden_features: The number of hidden features of the masked network.
        context_features: The number of context features, if there is a context.
        num_bins: The number of bins :math:`K`.
        tail_bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound :math:`\beta` of the shift. If :py:`None`, the shift is free, and
            samples are not bounded.
        slope: The least slope; the greatest is its inverse.
        num_blocks: The number of blocks of the network.
        use_residual_blocks: Whether the blocks are residual.
        random_mask: Whether the masks are random, for blocks that are not residual.
        activation: The activation function.
        dropout_probability: The probability of dropout.
        use_batch_norm: Whether the blocks normalise their batch.
        tails: ``"linear"``; there is no other.
        identity_init: Whether to start as the identity.

    The network ``autoregressive_net`` returns, for one feature after another,
    :math:`3 (K - 1) + 1` numbers: widths, heights, derivatives and shift, as
    :py:`flowguard.RobustSpline.shapes(num_bins)`.

    Example:
        >>> layer = MaskedRobustSplineAutoregressiveTransform(3, 16, context_features=2)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> z, ladj = layer(x, context)
        >>> torch.allclose(layer.inverse(z, context)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        context_features: int | None = None,
        num_bins: int = 8,
        tail_bound: float = TAIL_BOUND,
        shift_bound: float | None = SHIFT_BOUND,
        slope: float | None = SLOPE,
        num_blocks: int = 2,
        use_residual_blocks: bool = True,
        random_mask: bool = False,
        activation: Callable[[Tensor], Tensor] = F.relu,
        dropout_probability: float = 0.0,
        use_batch_norm: bool = False,
        *,
        tails: str | None = "linear",
        identity_init: bool = True,
    ) -> None:
        check_tails(tails)
        check_positive(features=features, hidden_features=hidden_features)
        spline = map_of(num_bins, tail_bound, shift_bound, slope)
        net = MADE(
            features=features,
            hidden_features=hidden_features,
            context_features=context_features,
            num_blocks=num_blocks,
            output_multiplier=spline.parameters,
            use_residual_blocks=use_residual_blocks,
            random_mask=random_mask,
            activation=activation,
            dropout_probability=dropout_probability,
            use_batch_norm=use_batch_norm,
        )
        super().__init__(net)
        self.features = features
        self.map = spline
        self.head = SplineHead(spline, features, net, hidden_features, identity_init)

    def extra_repr(self) -> str:
        r"""Returns the number of features, for the printed module."""
        return f"features={self.features}"

    def _output_dim_multiplier(self) -> int:
        return self.map.parameters

    def _check(self, inputs: Tensor) -> None:
        check_floating(inputs)
        if inputs.dim() != 2 or inputs.shape[1] != self.features:
            raise ValueError(
                f"the inputs must have shape (N, {self.features}); got {tuple(inputs.shape)}"
            )

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the noise, with shape :math:`(N, D)`, and the
        log-determinant, with shape :math:`(N)`."""
        self._check(inputs)
        return self.head(inputs, self.autoregressive_net(inputs, cut(context)))

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data, one feature after another; returns the data and the
        log-determinant.

        Arguments:
            inputs: The noise, with shape :math:`(N, D)`.
            context: The context, with shape :math:`(N, C)`, or :py:`None` if there is none.

        Returns:
            The data, with the same shape, and the log-determinant, with shape :math:`(N)`.
        """
        self._check(inputs)

        def solve(y: Tensor, raw: Tensor, of: Any) -> tuple[Tensor, Tensor]:
            # Other heads than ours know of no features by themselves.
            return self.head(y, raw, True, of) if alike else self.head(y, raw, inverse=True)

        head = self.head
        alike = isinstance(head, PartialHead) and head.is_partial() and unhooked(head)
        net = self.autoregressive_net
        return masked_inverse(net, inputs, cut(context), solve, kinds=KINDS, alike=alike)
