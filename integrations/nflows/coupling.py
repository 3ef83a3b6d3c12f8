r"""The robust coupling for vectors and images, in nflows' terms."""

__all__ = ["RobustSplineCDF", "RobustSplineCouplingTransform"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.functional import SLOPE
from flowguard.image import Robust
from flowguard.numerics import cut

from .host import kin, part
from .spline import (
    SHIFT_BOUND,
    TAIL_BOUND,
    SplineHead,
    apply_map,
    check_floating,
    check_tails,
    map_of,
)

Transform: Any = part("transforms.base").Transform


class RobustSplineCDF(Transform):
    r"""Creates robust splines with free parameters, one for each feature, as an elementwise
    transform that depends on nothing else.

    It starts as the identity, but for :math:`10^{-6}`. It is what
    :class:`RobustSplineCouplingTransform` does to the features that it would leave as they are,
    if it is asked to.

    Arguments:
        shape: The shape of the features, :math:`(D)`, :math:`(C)` or :math:`(C, H, W)`. With a
            number of channels :math:`C` alone, all positions of an image share their splines.
        num_bins: The number of bins :math:`K`.
        tail_bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound of the shift. If :py:`None`, the shift is free.
        slope: The least slope.

    Example:
        >>> layer = RobustSplineCDF([2])
        >>> layer(torch.zeros(5, 2))[1].shape
        torch.Size([5])
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_bins: int = 8,
        tail_bound: float = TAIL_BOUND,
        shift_bound: float | None = SHIFT_BOUND,
        slope: float | None = SLOPE,
    ) -> None:
        super().__init__()
        self.map = map_of(num_bins, tail_bound, shift_bound, slope)
        features, *image = shape
        self.phi = nn.Parameter(torch.empty(features, self.map.parameters, *image))
        # nflows' own start far from the identity, and its tests ask that they do something.
        nn.init.uniform_(self.phi, -1e-6, 1e-6)

    def extra_repr(self) -> str:
        r"""Returns the number of features and the family of splines, for the printed module."""
        return f"features={self.phi.shape[0]}, {self.map}"

    def _run(self, inputs: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        ones = (1,) * (inputs.dim() - self.phi.dim())
        phi = self.phi.reshape(1, *self.phi.shape, *ones)
        return apply_map(self.map.transform(phi), inputs, inverse)

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise, whatever the context; returns the noise, with the shape of the data,
        and the log-determinant, with shape :math:`(N)`."""
        return self._run(inputs, inverse=False)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data, whatever the context; returns the data and the log-determinant.

        Arguments:
            inputs: The noise, with shape :math:`(N, D)` or with those of an image.
            context: Not looked at.

        Returns:
            The data, with the same shape, and the log-determinant, with shape :math:`(N)`.
        """
        return self._run(inputs, inverse=True)


class RobustSplineCouplingTransform(*kin("transforms.coupling", "CouplingTransform")):  # type: ignore[misc]
    r"""Creates a coupling with robust splines, whose inverse cannot explode whatever the context.

    It takes the place of nflows' ``PiecewiseRationalQuadraticCouplingTransform``. Features where
    the mask is positive are transformed by splines :math:`f(x) = \mathrm{RQS}(x) + t`, with
    parameters that a network computes from the other features and the context. Outside of
    :math:`[-B, B]` the slope is one, and with :math:`|t| \leq \beta`

    .. math:: |f^{-1}(z)| \leq \max(B, |z| + \beta)

    for every context; see :func:`flowguard.certify`. There are no minimum widths, heights and
    derivatives as in nflows: `slope` bounds all of them. Infinite contexts are cut at
    :math:`10^{20}`.

    The transform starts as the identity. nflows' own networks (whatever has a ``final_layer``)
    get a last layer of zeros. The outputs of any other network, which is left as it is, are
    multiplied by a learned gain that starts at zero.

    References:
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032

    Arguments:
        mask: Which features (or channels) are transformed, with shape :math:`(C)`: those where it
            is positive. The others stay as they are.
        transform_net_create_fn: A function of the numbers of inputs and outputs that returns the
            network. It is called as ``net(inputs, context)`` and returns, for one transformed
            feature after another, :math:`3 (K - 1) + 1` numbers: widths, heights, derivatives and
            shift, as :py:`flowguard.RobustSpline.shapes(num_bins)`.
        num_bins: The number of bins :math:`K`.
        tail_bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound :math:`\beta` of the shift. If :py:`None`, the shift is free, and
            samples are not bounded.
        slope: The least slope; the greatest is its inverse. Over images :py:`1e-3` is better.
        apply_unconditional_transform: Whether the other features are transformed too, by splines
            that depend on nothing.
        img_shape: The size :math:`(H, W)` of the images, for unconditional splines that differ
            from one position to another. If :py:`None`, all positions share theirs.
        tails: ``"linear"``; there is no other.
        identity_init: Whether to start as the identity. Otherwise the network is taken as it is.

    The inputs have shape :math:`(N, C)` or :math:`(N, C, H, W)`, the log-determinant
    :math:`(N)`.

    Raises:
        ValueError: If an option is out of range, if the inputs have another number of features,
            or if the network returns another number of outputs.

    Example:
        >>> def net(inputs, outputs):
        ...     return part("nn.nets").ResidualNet(inputs, outputs, 16, context_features=3)
        >>> layer = RobustSplineCouplingTransform([1, 0, 1], net)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 3)
        >>> z, ladj = layer(x, context)
        >>> torch.allclose(z, x, atol=1e-6), ladj.shape
        (True, torch.Size([5]))
        >>> bool(layer.inverse(z, 1e30 * context)[0].isfinite().all())
        True
    """

    def __init__(
        self,
        mask: Tensor | Sequence[int],
        transform_net_create_fn: Callable[[int, int], nn.Module],
        num_bins: int = 8,
        tail_bound: float = TAIL_BOUND,
        shift_bound: float | None = SHIFT_BOUND,
        slope: float | None = SLOPE,
        apply_unconditional_transform: bool = False,
        img_shape: Sequence[int] | None = None,
        *,
        tails: str | None = "linear",
        identity_init: bool = True,
    ) -> None:
        check_tails(tails)
        if img_shape is not None and (not isinstance(img_shape, Sequence) or len(img_shape) != 2):
            raise ValueError(
                f"img_shape must be the height and width of the images, or None; got {img_shape!r}"
            )
        # The host's constructor asks for the number of parameters.
        self.map: Robust = map_of(num_bins, tail_bound, shift_bound, slope)

        def unconditional(features: int) -> RobustSplineCDF:
            shape = (features, *(img_shape or ()))
            return RobustSplineCDF(shape, num_bins, tail_bound, shift_bound, slope)

        super().__init__(
            mask,
            transform_net_create_fn,
            unconditional_transform=unconditional if apply_unconditional_transform else None,
        )
        self.head = SplineHead(
            self.map,
            len(self.transform_features),
            self.transform_net,
            identity_init=identity_init,
        )

    def extra_repr(self) -> str:
        r"""Returns the numbers of all and of transformed features, for the printed module."""
        return f"features={self.features}, transformed={len(self.transform_features)}"

    def _transform_dim_multiplier(self) -> int:
        return self.map.parameters

    def _check(self, inputs: Tensor) -> None:
        check_floating(inputs)
        if inputs.dim() not in (2, 4):
            raise ValueError(
                f"the inputs must have shape (N, D) or (N, C, H, W); got {tuple(inputs.shape)}"
            )
        if inputs.shape[1] != self.features:
            raise ValueError(
                f"the mask is for {self.features} features; got inputs of {inputs.shape[1]},"
                f" with shape {tuple(inputs.shape)}"
            )

    def _split(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        kept = inputs.index_select(1, self.identity_features)
        return kept, inputs.index_select(1, self.transform_features)

    def _join(self, inputs: Tensor, kept: Tensor | None, moved: Tensor) -> Tensor:
        # Under autocast the network, and with it the splines, has another dtype.
        outputs = inputs.index_copy(1, self.transform_features, moved.to(inputs.dtype))
        if kept is None:
            return outputs
        return outputs.index_copy(1, self.identity_features, kept.to(inputs.dtype))

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the noise, with shape :math:`(N, D)` or :math:`(N, C, H,
        W)`, and the log-determinant, with shape :math:`(N)`."""
        self._check(inputs)
        context = cut(context)
        kept, moved = self._split(inputs)
        moved, ladj = self.head(moved, self.transform_net(kept, context))
        if self.unconditional_transform is None:
            return self._join(inputs, None, moved), ladj
        kept, more = self.unconditional_transform(kept, context)
        return self._join(inputs, kept, moved), ladj + more

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the data and the log-determinant.

        Arguments:
            inputs: The noise, with shape :math:`(N, D)` or :math:`(N, C, H, W)`.
            context: The context, which the network takes, or :py:`None` if there is none.

        Returns:
            The data, with the same shape, and the log-determinant, with shape :math:`(N)`.
        """
        self._check(inputs)
        context = cut(context)
        kept, moved = self._split(inputs)
        if self.unconditional_transform is None:
            moved, ladj = self.head(moved, self.transform_net(kept, context), inverse=True)
            return self._join(inputs, None, moved), ladj
        kept, more = self.unconditional_transform.inverse(kept, context)
        moved, ladj = self.head(moved, self.transform_net(kept, context), inverse=True)
        return self._join(inputs, kept, moved), ladj + more
