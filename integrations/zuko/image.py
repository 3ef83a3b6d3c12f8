r"""The multiscale flow over images, as zuko's lazy transformation and lazy distribution.

The shapes change along a multiscale flow, so that its base lives on a list of latents, one for
each level. zuko's distributions have one event shape: here the latents are one flat vector, the
finest level first.
"""

__all__ = ["ConditionalMultiscaleTransform", "MultiscaleFlow", "MultiscaleTransform"]

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform
from zuko.distributions import DiagNormal, NormalizingFlow
from zuko.lazy import LazyDistribution, LazyTransform

from flowguard.image import ConditionalMultiscaleFlow, Coupling

Context = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None


class MultiscaleTransform(Transform):
    r"""Creates a transformation from images to flat latents, given one context map per level.

    The domain has three event dimensions, the codomain one. What depends on the maps alone is
    computed here, once, and shared by all calls.

    Arguments:
        flow: The multiscale flow of the core.
        maps: The context map of each level :math:`l`, finest first, with shape
            :math:`(*, C', H / 2^l, W / 2^l)`; the leading dimensions are the batch.

    Example:
        >>> core = flowguard.image.ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=16)
        >>> f = MultiscaleTransform(core, [torch.randn(2, 8, 4, 6)])
        >>> z = f(torch.randn(5, 2, 3, 8, 12))
        >>> z.shape
        torch.Size([5, 2, 288])
        >>> f.inv(z).shape
        torch.Size([5, 2, 3, 8, 12])
    """

    domain = constraints.independent(constraints.real, 3)
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self, flow: ConditionalMultiscaleFlow, maps: Sequence[Tensor], cache_size: int = 0
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.flow = flow
        self.maps = maps
        self.batch_shape = maps[0].shape[:-3]
        self.image = Size((flow.channels, 2 * maps[0].shape[-2], 2 * maps[0].shape[-1]))
        self.latents = flow.latent_shapes(*self.image[1:])
        self._conditions = self._condition(self.batch_shape)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({tuple(self.image)} -> {self._size})"

    @property
    def _size(self) -> int:
        return self.image.numel()  # a bijection keeps the number of dimensions

    def _condition(self, batch: Size) -> Any:
        return self.flow.condition([_rows(m.expand(*batch, *m.shape[-3:]), 3) for m in self.maps])

    def _align(self, x: Tensor, event: int) -> tuple[Tensor, Size, Any]:
        r"""Returns `x` as rows, their batch shape, and the conditions that go with them."""
        shape = torch.broadcast_shapes(x.shape[: x.dim() - event], self.batch_shape)
        rows = _rows(x.expand(*shape, *x.shape[x.dim() - event :]), event)
        # The core takes row i of the contexts for row i, modulo their number: right if the
        # batch of the contexts comes last in that of the images.
        last = shape[len(shape) - len(self.batch_shape) :] == self.batch_shape
        return rows, shape, self._conditions if last else self._condition(shape)

    def _check(self, shape: Size, expected: Size, what: str) -> None:
        if shape[-len(expected) :] != expected:
            raise ValueError(
                f"given this context, {what} must have shape (*, {', '.join(map(str, expected))});"
                f" got {tuple(shape)}"
            )

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x.shape, self.image, "images")
        rows, shape, conditions = self._align(x, 3)
        latents, ladj = self.flow(rows, conditions)
        z = torch.cat([latent.flatten(1) for latent in latents], dim=1)
        return z.reshape(*shape, self._size), ladj.reshape(shape)

    def _backward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self._check(z.shape, Size((self._size,)), "latents")
        rows, shape, conditions = self._align(z, 1)
        split = rows.split([prod(s) for s in self.latents], dim=1)
        latents = [t.unflatten(1, s) for t, s in zip(split, self.latents, strict=True)]
        x, ladj = self.flow.inverse(latents, conditions)
        return x.reshape(*shape, *self.image), ladj.reshape(shape)

    def _call(self, x: Tensor) -> Tensor:
        return self._forward(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._backward(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Returns :math:`\log |\det J|` at `x`, with the batch shape.

        Arguments:
            x: The images, with shape :math:`(*, C, H, W)`.
            y: Their latents, which are not needed.
        """
        return self._forward(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the latents and :math:`\log |\det J|` at `x`, in one pass.

        Arguments:
            x: The images, with shape :math:`(*, C, H, W)`.
        """
        return self._forward(x)

    @property
    def inv(self) -> Transform:
        r"""The inverse transformation."""
        return _Inverse(self)

    def forward_shape(self, shape: Size) -> Size:
        r"""Returns the shape of the latents of images of this shape.

        Arguments:
            shape: The shape :math:`(*, C, H, W)`.

        Raises:
            ValueError: If it is not that of images given this context.
        """
        self._check(Size(shape), self.image, "images")
        return Size((*shape[:-3], self._size))

    def inverse_shape(self, shape: Size) -> Size:
        r"""Returns the shape of the images of latents of this shape.

        Arguments:
            shape: The shape :math:`(*, D)`.

        Raises:
            ValueError: If it is not that of latents given this context.
        """
        self._check(Size(shape), Size((self._size,)), "latents")
        return Size((*shape[:-1], *self.image))


class _Inverse(_InverseTransform):
    r"""The inverse, which knows its log-determinant without a second pass."""

    _inv: MultiscaleTransform

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._inv._backward(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self._inv._backward(x)[1]


class ConditionalMultiscaleTransform(LazyTransform):
    r"""Creates a lazy multiscale transformation from images to flat latents.

    It is Glow's, or SRFlow's, in zuko's terms: composed with other transformations it makes a
    :class:`zuko.flows.Flow`, and :class:`MultiscaleFlow` is one.

    Arguments:
        shape: The shape :math:`(C, H, W)` of the images, or the number of channels :math:`C`
            alone; then the context tells the size. Height and width must be multiples of
            :math:`2^L`.
        context_channels: The number of channels of the context. If it is 0, there is none, and
            `shape` must be complete.
        levels: The number of levels :math:`L`.
        steps: The number of steps at each level.
        hidden: The number of channels of the hidden layers of the couplings.
        coupling: The elementwise map of the couplings; see :func:`flowguard.image.elementwise`.
        scale: How many times larger an image is than its context in each direction, where the
            context is an image and `shape` a number of channels.

    Raises:
        ValueError: If the shape is incomplete, or does not fit the levels.

    Example:
        >>> t = ConditionalMultiscaleTransform(3, 1, levels=2, steps=1, hidden=8, scale=2)
        >>> y = torch.randn(4, 1, 8, 16)  # such as the image in grey, at half the resolution
        >>> t(y)
        MultiscaleTransform((3, 16, 32) -> 1536)
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        context_channels: int = 0,
        *,
        levels: int = 3,
        steps: int = 8,
        hidden: int = 64,
        coupling: Coupling = "robust",
        scale: int = 1,
    ) -> None:
        super().__init__()
        channels, *size = (shape,) if isinstance(shape, int) else tuple(shape)
        if len(size) not in (0, 2):
            raise ValueError(
                "shape must be a number of channels or a shape (channels, height, width);"
                f" got {shape}"
            )
        if context_channels == 0 and not size:
            raise ValueError(
                "without a context, shape must tell the size (channels, height, width);"
                f" got the number of channels {channels} alone"
            )
        self.context_channels = context_channels
        self.size = size or None
        self.scale = scale
        self.flow = ConditionalMultiscaleFlow(
            channels,
            max(context_channels, 1),  # without a context, the maps are zeros
            levels=levels,
            steps=steps,
            hidden=hidden,
            coupling=coupling,
        )
        if size:
            self.flow.latent_shapes(*size)  # refuses a size that does not fit

    def _map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        return [(h, w) for _, h, w in self.flow.latent_shapes(height, width)]

    def maps(self, c: Context = None) -> list[Tensor]:
        r"""Returns the context map of each level, finest first.

        Arguments:
            c: The context: a list (or a dictionary) with one map for each level, or an image,
                which is resampled to the size of each level, or :py:`None` if there is none.

        Raises:
            ValueError: If there is a context where none is taken, none where one is, or one of
                another shape.
        """
        if c is None and self.size is not None and self.context_channels == 0:
            like = next(self.flow.parameters())
            return [like.new_zeros(1, *size) for size in self._map_sizes(*self.size)]
        if c is None or self.context_channels == 0:
            raise ValueError(
                f"the flow has {self.context_channels} context channels;"
                f" got {'no context' if c is None else 'a context'}"
            )
        maps = self._resample(c) if isinstance(c, Tensor) else list(_values(c))
        self._check(maps)
        return maps

    def _resample(self, y: Tensor) -> list[Tensor]:
        if y.dim() < 3:
            raise ValueError(
                "the context must be an image (*, C, H, W) or a list of maps;"
                f" got a tensor of shape {tuple(y.shape)}"
            )
        height, width = self.size or (self.scale * s for s in y.shape[-2:])
        rows = _rows(y, 3)
        return [
            F.interpolate(rows, size, mode="bilinear", antialias=True).reshape(
                *y.shape[:-2], *size
            )
            for size in self._map_sizes(height, width)
        ]

    def _check(self, maps: list[Tensor]) -> None:
        height, width = self.size or (2 * s for s in maps[0].shape[-2:])
        expected = [(self.context_channels, *size) for size in self._map_sizes(height, width)]
        given = [tuple(m.shape[-3:]) for m in maps]
        if given != expected:
            raise ValueError(
                f"the context must hold a map for each of the {len(expected)} levels, with shapes"
                f" {expected}; got {given}"
            )
        if len({m.shape[:-3] for m in maps}) > 1:
            raise ValueError(
                "the maps of all levels must have the same batch;"
                f" got {[tuple(m.shape[:-3]) for m in maps]}"
            )

    def forward(self, c: Context = None) -> Transform:
        r"""Returns the transformation given a context.

        Arguments:
            c: The context; see :meth:`maps`.

        Returns:
            The transformation from images, with shape :math:`(*, C, H, W)`, to flat latents, with
            shape :math:`(*, D)`.
        """
        return MultiscaleTransform(self.flow, self.maps(c))


class MultiscaleFlow(LazyDistribution):
    r"""Creates a conditional multiscale flow over images, with robust splines as couplings.

    At each level the image is squeezed by two, passes `steps` steps (activation normalization,
    invertible 1×1 convolution, conditional coupling), and, but at the last level, half of its
    channels leave as that level's latents. The base is normal, on the latents of all levels.

    The first batch that :meth:`log_prob` sees in training mode initialises the activation
    normalizations.

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200

    Arguments:
        shape: The shape :math:`(C, H, W)` of the images, or the number of channels :math:`C`
            alone; then the context tells the size, another one at each call if need be.
        context_channels: The number of channels of the context. If it is 0, there is none, and
            `shape` must be complete.
        kwargs: Keyword arguments passed to :class:`ConditionalMultiscaleTransform`.

    Example:
        >>> flow = MultiscaleFlow(3, 8, levels=2, steps=1, hidden=16)
        >>> y = [torch.randn(4, 8, 8, 12), torch.randn(4, 8, 4, 6)]
        >>> x = torch.randn(4, 3, 16, 24)
        >>> flow(y).log_prob(x).shape
        torch.Size([4])
        >>> flow(y, temperature=0.8).sample((5,)).shape
        torch.Size([5, 4, 3, 16, 24])
        >>> glow = MultiscaleFlow((3, 32, 32), levels=3, steps=1, hidden=16)
        >>> glow().event_shape
        torch.Size([3, 32, 32])
    """

    def __init__(
        self, shape: int | Sequence[int], context_channels: int = 0, **kwargs: Any
    ) -> None:
        super().__init__()
        self.transform = ConditionalMultiscaleTransform(shape, context_channels, **kwargs)

    def forward(self, c: Context = None, temperature: float = 1.0) -> NormalizingFlow:
        r"""Returns the distribution of images given a context.

        Arguments:
            c: The context: a list (or a dictionary) with one map for each level :math:`l`, finest
                first, with shape :math:`(*, C', H / 2^l, W / 2^l)`; or an image with shape
                :math:`(*, C', H', W')`, which is resampled to the size of each level.
            temperature: The standard deviation of the base. At 0 there is one sample for each
                context, the image of zero, and no density.

        Returns:
            The distribution :math:`p(X | c)`, with event shape :math:`(C, H, W)`.

        Raises:
            ValueError: If the temperature is negative, or the context does not fit.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative; got {temperature}")
        transform = self.transform(c)
        zeros = transform.maps[0].new_zeros(transform.image.numel())
        base = DiagNormal(zeros, torch.full_like(zeros, temperature))
        return NormalizingFlow(transform, base.expand(transform.batch_shape))


def _rows(x: Tensor, event: int) -> Tensor:
    r"""Flattens all but the last `event` dimensions; there may be none, or one of size 0."""
    batch, shape = x.shape[: x.dim() - event], x.shape[x.dim() - event :]
    return x.reshape(batch.numel(), *shape)


def _values(c: Sequence[Tensor] | Mapping[str, Tensor]) -> Sequence[Tensor]:
    return list(c.values()) if isinstance(c, Mapping) else c
