r"""Image flows in nflows' terms: a context map for each level, and the flow step."""

__all__ = ["ConditionalMultiscaleTransform", "RobustFlowStep"]

from collections.abc import Callable, Mapping, Sequence
from math import prod
from numbers import Integral
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.functional import FINE_SLOPE
from flowguard.image import ActNorm, InvertibleConv1x1, OrthogonalConv1x1
from flowguard.numerics import cut

from .coupling import RobustSplineCouplingTransform
from .host import part
from .maps import unpack_maps
from .spline import IMAGE_SHIFT_BOUND, TAIL_BOUND, check_positive

MultiscaleCompositeTransform: Any = part("transforms.base").MultiscaleCompositeTransform
CompositeTransform: Any = part("transforms.base").CompositeTransform
ConvResidualNet: Any = part("nn.nets").ConvResidualNet

Shape = tuple[int, ...]

MIXES: dict[str, type[InvertibleConv1x1 | OrthogonalConv1x1]] = {
    "free": InvertibleConv1x1,
    "orthogonal": OrthogonalConv1x1,
}


class ConditionalMultiscaleTransform(MultiscaleCompositeTransform):
    r"""Creates a multiscale composition in which each level gets its own spatial context.

    It takes the place of nflows' ``MultiscaleCompositeTransform``: transforms are added in the
    same way, one for each level, finest first; after each but the last, half of the channels leave
    as latents, and the latents of all levels make one vector, in the same order.

    The context is one of these:

    - a list (or a dictionary) with a map for each level, of the size of that level's outputs. The maps tell the
      size of the images, which may be another one at each call.
    - the same list as one tensor, made by :func:`pack_maps`; needed within
      ``nflows.flows.Flow``, which repeats the rows of tensors only. Say so with
      `context_channels`.
    - one map, which is resized to each level. The images have the size that was given when the
      transforms were added, unless `context_size` tells the size of the map that goes with it:
      then they grow with the map.
    - anything else, such as :py:`None` or vectors: each level gets it as it is, and the images
      have the size that was given when the transforms were added.

    References:
        | Density estimation using Real NVP (Dinh et al., 2017)
        | https://arxiv.org/abs/1605.08803
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200

    Arguments:
        num_transforms: The number of levels :math:`L`.
        split_dim: The dimension along which the outputs of a level are split.
        context_channels: The number of channels of each level's map, if the context is a tensor
            that :func:`pack_maps` made.
        context_size: The size :math:`(H, W)` of the one map that goes with images of the size that
            the transforms are added for.

    Raises:
        RuntimeError: If another number of transforms was added.
        ValueError: If inputs, latents or context do not fit.

    Example:
        >>> flow = ConditionalMultiscaleTransform(2, context_channels=(8, 8))
        >>> squeeze = part("transforms").SqueezeTransform()
        >>> c, h, w = 3, 8, 12
        >>> for _ in range(2):
        ...     c, h, w = squeeze.get_output_shape(c, h, w)
        ...     step = RobustFlowStep(c, context_channels=8, hidden_channels=16)
        ...     shape = flow.add_transform(CompositeTransform([squeeze, step]), (c, h, w))
        ...     c, h, w = shape or (0, 0, 0)
        >>> x = torch.randn(2, 3, 8, 12)
        >>> context = [torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)]
        >>> z, ladj = flow(x, context)
        >>> z.shape, ladj.shape
        (torch.Size([2, 288]), torch.Size([2]))
        >>> torch.allclose(flow.inverse(z, context)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        num_transforms: int,
        split_dim: int = 1,
        *,
        context_channels: Sequence[int] | None = None,
        context_size: Sequence[int] | None = None,
    ) -> None:
        check_positive(num_transforms=num_transforms)
        _check_integers("context_channels", context_channels)
        _check_integers("context_size", context_size)
        super().__init__(num_transforms, split_dim)
        if context_channels is not None and len(context_channels) != num_transforms:
            raise ValueError(
                f"context_channels must hold a number for each of the {num_transforms} levels;"
                f" got {context_channels}"
            )
        if context_size is not None and (len(context_size) != 2 or min(context_size) < 1):
            raise ValueError(
                f"context_size must be the height and width of a map; got {context_size}"
            )
        if context_size is not None and context_channels is not None:
            raise ValueError(
                "context_channels is for a map of each level, context_size for one map of all;"
                " give one of them"
            )
        self.context_channels = None if context_channels is None else tuple(context_channels)
        self.context_size = None if context_size is None else tuple(context_size)
        self._level_shapes: list[Shape] = []

    def extra_repr(self) -> str:
        r"""Returns the number of levels and the split dimension, for the printed module."""
        return f"levels={self._num_transforms}, split_dim={self._split_dim}"

    def add_transform(
        self, transform: nn.Module, transform_output_shape: Sequence[int]
    ) -> Shape | None:
        r"""Adds the transform of the next level; to be called once for each.

        Arguments:
            transform: The transform.
            transform_output_shape: The shape of its outputs, without the batch. Images may have
                another size later on; see above.

        Returns:
            The shape of the inputs of the next level, :py:`None` after the last.
        """
        shape = tuple(int(n) for n in transform_output_shape)
        hidden: Shape | None = super().add_transform(transform, shape)
        self._level_shapes.append(shape)
        return hidden

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes data to flat latents; returns the latents, with shape :math:`(N, D)`, and the
        log-determinant.

        Arguments:
            inputs: The data, with shape :math:`(N, C, H, W)`, or :math:`(N, D)`.
            context: The context; see above.

        Raises:
            ValueError: If inputs or context do not fit.
        """
        shapes, contexts = self._plan(context)
        if self._split_dim >= inputs.dim():
            raise ValueError(
                f"the inputs must have a dimension {self._split_dim} to split; got shape"
                f" {tuple(inputs.shape)}"
            )
        self._check_size(inputs, shapes)
        total = inputs.new_zeros(inputs.shape[0])
        latents: list[Tensor] = []
        for transform, shape, c in zip(self._transforms, shapes, contexts, strict=True):
            inputs, ladj = transform(inputs, c)
            total = total + ladj
            if inputs.shape[1:] != shape:
                raise ValueError(
                    f"level {len(latents) + 1} must return outputs of shape {shape} for this"
                    f" context, as it was added; got {tuple(inputs.shape[1:])}"
                )
            leaving = inputs
            if len(latents) < self._num_transforms - 1:
                leaving, inputs = torch.tensor_split(
                    inputs, (self._leaving(shape),), dim=self._split_dim
                )
            latents.append(leaving.flatten(1))
        return torch.cat(latents, dim=1), total

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        r"""Takes flat latents to data; returns the data and the log-determinant.

        Arguments:
            inputs: The latents, with shape :math:`(N, D)`.
            context: The context; see above.

        Raises:
            ValueError: If latents or context do not fit.
        """
        if inputs.dim() != 2:
            raise ValueError(
                f"the latents must have shape (N, D); got {tuple(inputs.shape)}: flatten them"
            )
        shapes, contexts = self._plan(context)
        self._check_size(inputs, shapes)
        leaving = [self._leaving_shape(shape) for shape in shapes[:-1]] + shapes[-1:]
        latents = inputs.split([prod(shape) for shape in leaving], dim=1)
        total = inputs.new_zeros(inputs.shape[0])
        parts = [
            latent.unflatten(1, shape) for latent, shape in zip(latents, leaving, strict=True)
        ]
        outputs = parts.pop()
        for i in reversed(range(self._num_transforms)):
            if i < self._num_transforms - 1:
                outputs = torch.cat((parts[i], outputs), dim=self._split_dim)
            outputs, ladj = self._transforms[i].inverse(outputs, contexts[i])
            total = total + ladj
        return outputs, total

    def latent_size(self, context: Any = None) -> int:
        r"""Returns the number of latents of one sample, given this context.

        Arguments:
            context: The context; see above.
        """
        return prod(self._plan(context)[0][0])

    def _leaving(self, shape: Shape) -> int:
        return (shape[self._split_dim - 1] + 1) // 2

    def _leaving_shape(self, shape: Shape) -> Shape:
        i = self._split_dim - 1
        return (*shape[:i], self._leaving(shape), *shape[i + 1 :])

    def _check_size(self, inputs: Tensor, shapes: list[Shape]) -> None:
        size, expected = prod(inputs.shape[1:]), prod(shapes[0])
        if size != expected:
            raise ValueError(
                f"with this context, there must be {expected} numbers in a sample; got {size},"
                f" in inputs of shape {tuple(inputs.shape)}. Images of another size than the"
                " transforms were added for need a context that tells it: a map for each level,"
                " or one map and context_size"
            )

    def _plan(self, context: Any) -> tuple[list[Shape], list[Any]]:
        r"""The shape of the outputs of each level, and what each gets as context."""
        if len(self._transforms) != self._num_transforms:
            raise RuntimeError(
                f"{self._num_transforms} transforms must be added; got {len(self._transforms)}"
            )
        images = len(self._shape) == 3
        if isinstance(context, Mapping):
            context = list(context.values())
        if isinstance(context, (list, tuple)):  # the compiler of torch 2.6 stops at a union
            return self._plan_maps([cut(m) for m in context], images)
        if not isinstance(context, Tensor) or context.dim() != 4 or not images:
            return self._level_shapes, [context] * self._num_transforms
        if self.context_channels is not None:
            return self._plan_maps(self._unpacked(cut(context)), images)
        shapes = self._level_shapes
        if self.context_size is not None:
            shapes = self._resized(context.shape[-2:], self.context_size)
        return shapes, [_resize(cut(context), shape[1:]) for shape in shapes]

    @property
    def _shape(self) -> Shape:
        return self._level_shapes[0]

    def _unpacked(self, packed: Tensor) -> list[Tensor]:
        channels = self.context_channels or ()
        if packed.shape[1] != sum(channels):
            raise ValueError(
                f"the context must have {sum(channels)} channels, {channels} for the levels;"
                f" got {packed.shape[1]}"
            )
        shapes = self._resized(packed.shape[-2:], self._shape[1:])
        return unpack_maps(packed, channels, [(h, w) for _, h, w in shapes])

    def _plan_maps(self, maps: list[Any], images: bool) -> tuple[list[Shape], list[Any]]:
        wrong = images and any(not isinstance(m, Tensor) or m.dim() != 4 for m in maps)
        if len(maps) != self._num_transforms or wrong:
            given = [tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__ for m in maps]
            raise ValueError(
                f"the context must hold a map (N, C, H, W) for each of the"
                f" {self._num_transforms} levels; got {given}"
            )
        if not images:
            return self._level_shapes, maps
        shapes = self._resized(maps[0].shape[-2:], self._shape[1:])
        sizes, given = [shape[1:] for shape in shapes], [tuple(m.shape[-2:]) for m in maps]
        if sizes != given:
            raise ValueError(
                f"the maps must have the sizes {sizes} of the levels; got sizes {given}"
            )
        return shapes, maps

    def _resized(self, size: Sequence[int], before: Sequence[int]) -> list[Shape]:
        r"""The shapes of the levels where what had the size `before` has another one."""
        (rows, columns), (height, width) = size, before
        if any(h * rows % height or w * columns % width for _, h, w in self._level_shapes):
            raise ValueError(
                f"the size of the context must fit the levels, which have sizes"
                f" {[s[1:] for s in self._level_shapes]} for one of size {tuple(before)}; got"
                f" {tuple(size)}"
            )
        return [(c, h * rows // height, w * columns // width) for c, h, w in self._level_shapes]


def _check_integers(name: str, given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, Sequence) or not all(isinstance(n, Integral) for n in given):
        raise TypeError(f"{name} must be a sequence of integers; got {given!r}")


def _resize(context: Tensor, size: Shape) -> Tensor:
    if context.shape[-2:] == size:
        return context
    return F.interpolate(context, size, mode="bilinear", antialias=True)


class RobustFlowStep(CompositeTransform):
    r"""Creates the step of an image flow: activation normalisation, 1×1 convolution, and a
    coupling with robust splines.

    The first batch in training mode initialises the normalisation. As a composition of three
    transforms it can be taken apart like any ``CompositeTransform``.

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039

    Arguments:
        channels: The number of channels :math:`C`, at least 2. The second half is transformed.
        context_channels: The number of channels of the context map, if there is one.
        hidden_channels: The number of channels of the network's hidden layers.
        num_blocks: The number of residual blocks of the network.
        transform_net_create_fn: In place of the last three, a function that returns the network;
            see :class:`RobustSplineCouplingTransform`.
        num_bins: The number of bins :math:`K`.
        tail_bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound of the shift. If :py:`None`, the shift is free.
        slope: The least slope.
        mix: The 1×1 convolution: ``"orthogonal"``, a rotation, which keeps the bound of the
            samples small and is never singular, or ``"free"``, as in Glow.

    Raises:
        ValueError: If there are less than two channels, or an option is out of range.

    Example:
        >>> step = RobustFlowStep(12, context_channels=8, hidden_channels=16)
        >>> x, context = torch.randn(2, 12, 4, 4), torch.randn(2, 8, 4, 4)
        >>> z, ladj = step(x, context)
        >>> torch.allclose(step.inverse(z, context)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        channels: int,
        context_channels: int | None = None,
        hidden_channels: int = 64,
        *,
        num_blocks: int = 2,
        transform_net_create_fn: Callable[[int, int], nn.Module] | None = None,
        num_bins: int = 8,
        tail_bound: float = TAIL_BOUND,
        shift_bound: float | None = IMAGE_SHIFT_BOUND,
        slope: float | None = FINE_SLOPE,
        mix: str = "orthogonal",
    ) -> None:
        check_positive(channels=channels, hidden_channels=hidden_channels)
        if context_channels is not None:
            check_positive(context_channels=context_channels)
        if channels < 2:
            raise ValueError(f"a step needs at least 2 channels; got {channels}")
        if mix not in MIXES:
            raise ValueError(f"mix must be one of {', '.join(MIXES)}; got {mix!r}")

        def residual(inputs: int, outputs: int) -> nn.Module:
            net: nn.Module = ConvResidualNet(
                inputs, outputs, hidden_channels, context_channels, num_blocks
            )
            return net

        coupling = RobustSplineCouplingTransform(
            torch.arange(channels) >= channels // 2,
            transform_net_create_fn or residual,
            num_bins,
            tail_bound,
            shift_bound,
            slope,
        )
        super().__init__([ActNorm(channels), MIXES[mix](channels), coupling])
