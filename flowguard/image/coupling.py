r"""The conditional coupling of image flows."""

__all__ = ["Condition", "ConditionalCoupling", "Inner", "crop", "fit_noise", "last_layers"]

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.image.layers import (
    Folded,
    FoldedMix,
    NormedConv2d,
    ZeroConv2d,
    laid_out,
)
from flowguard.image.maps import Coupling, Elementwise, apply, elementwise
from flowguard.numerics import repeat_rows

#: The rows and the columns of a tile that are wanted; the others are there for the convolutions.
Inner = tuple[slice, slice]


class Condition(NamedTuple):
    r"""What a step needs to know of the context, computed once for each context.

    What is made without gradients holds the step's weights too, with all factors in them: they
    are folded once, to run many times, and only as long as the parameters do not change.

    Attributes:
        injected: The parameters of the feature-conditional half, with shape :math:`(B, C n, H, W)`.
        hidden: The context's part of the first layer of the self-conditional half, with shape
            :math:`(B, hidden, H, W)`.
        noise: The noise map at the size of this level, where one is given.
        map: What takes the injected parameters, if not the raw ones.
        mix: What comes before the coupling, its weights folded.
        rest: The self-conditional half's layers, but for the context's share, their weights folded.
        told: Those of the part that knows of noise.

    Example:
        >>> coupling = ConditionalCoupling(12, 8, hidden=16)
        >>> condition = coupling.condition(torch.randn(1, 8, 4, 4))
        >>> condition.hidden.shape
        torch.Size([1, 16, 4, 4])
        >>> x = torch.randn(1, 12, 4, 4)
        >>> z, ladj = coupling(x, condition)
        >>> torch.allclose(coupling.inverse(z, condition)[0], x, atol=1e-4)
        True
    """

    injected: Tensor
    hidden: Tensor
    noise: Tensor | None = None
    map: Elementwise | None = None
    mix: FoldedMix | None = None
    rest: Sequence[Folded] = ()
    told: Sequence[Folded] = ()


class ConditionalCoupling(nn.Module):
    r"""Creates a conditional coupling with a feature-conditional and a self-conditional half.

    First all channels are transformed with parameters computed from the context, then the second
    half of the channels with parameters computed from the first half and the context. In between,
    a coupling that knows of noise transforms the second half with parameters computed from the
    first half and a map of the noise.

    References:
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200
        | SoftFlow: Probabilistic Framework for Normalizing Flow on Manifolds (Kim et al., 2020)
        | https://arxiv.org/abs/2006.04604

    Arguments:
        channels: The number of channels :math:`C`, at least 2.
        context_channels: The number of channels of the context.
        hidden: The number of channels of the hidden layers.
        coupling: The elementwise map, by name or as an object; see
            :func:`flowguard.image.elementwise`.
        normed: Whether the hidden layers have an activation normalisation in place of a bias, as
            published; see :class:`flowguard.image.NormedConv2d`.
        noise_channels: The number of channels of the noise map. If it is 0, the coupling knows
            nothing of noise.

    Where `ladj` is false, the inverse leaves the log-determinant out, which takes up to half of the
    work of the maps, and returns NaN in its place.

    The context has shape :math:`(B, context\_channels, H, W)`, or is what :meth:`condition` made
    of it. It may have fewer rows than `x`, where each stands for several samples: row :math:`i`
    of `x` then belongs to row :math:`i \bmod B` of the context.

    For a tile of an image, `inner` names its rows and columns that are wanted: the output and the
    log-determinant are theirs. There must be :data:`flowguard.image.tiling.HALO` further ones on
    each side that is not the image's.

    Raises:
        ValueError: If a number of channels is out of range, or there is no map of that name.

    Example:
        >>> layer = ConditionalCoupling(12, 8, hidden=16)
        >>> x, context = torch.randn(2, 12, 4, 4), torch.randn(2, 8, 4, 4)
        >>> z, ladj = layer(x, context)
        >>> torch.allclose(z, x)  # starts as the identity
        True
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        hidden: int = 64,
        coupling: Coupling = "robust",
        normed: bool = False,
        noise_channels: int = 0,
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"a coupling needs at least 2 channels; got {channels}")
        if hidden < 1 or context_channels < 1:
            raise ValueError(
                "hidden and context_channels must be positive;"
                f" got {hidden} and {context_channels}"
            )
        if noise_channels < 0:
            raise ValueError(f"noise_channels must not be negative; got {noise_channels}")
        self.map = elementwise(coupling)
        self.kept = channels // 2
        self.changed = channels - self.kept
        n = self.map.parameters
        conv: Callable[..., nn.Conv2d] = NormedConv2d if normed else _conv
        self.injector = nn.Sequential(
            conv(context_channels, hidden, 3),
            nn.ReLU(),
            conv(hidden, hidden, 1),
            nn.ReLU(),
            ZeroConv2d(hidden, channels * n),
        )
        # One convolution over [x, context], split such that the context's share is reusable. Its
        # normalisation, if it has one, is that of the context's share.
        self.first_context = conv(context_channels, hidden, 3)
        self.first_kept = nn.Conv2d(self.kept, hidden, 3, padding=1, bias=False)
        self.rest = nn.Sequential(
            nn.ReLU(),
            conv(hidden, hidden, 1),
            nn.ReLU(),
            ZeroConv2d(hidden, self.changed * n),
        )
        self.noise_channels = noise_channels
        self.noise: nn.Sequential | None = None
        if normed:
            nn.init.normal_(self.first_kept.weight, std=0.05)
        if noise_channels:
            self.noise = nn.Sequential(
                conv(self.kept + noise_channels, hidden, 3),
                nn.ReLU(),
                conv(hidden, hidden, 1),
                nn.ReLU(),
                ZeroConv2d(hidden, self.changed * n),
            )

    def extra_repr(self) -> str:
        r"""Returns the number of channels and the map, for the printed module."""
        return f"channels={self.kept + self.changed}, map={self.map}"

    def map_of(self, part: str) -> Elementwise:
        r"""Returns the elementwise map whose parameters a part computes.

        Arguments:
            part: ``"injector"``, ``"noise"`` or ``"rest"``.
        """
        return self.map

    def condition(self, context: Tensor, noise: Tensor | None = None) -> Condition:
        r"""Computes all that depends on the context alone.

        Arguments:
            context: The context, with shape :math:`(B, context\_channels, H, W)`.
            noise: The noise map; see :func:`fit_noise`. If :py:`None`, the part of the coupling
                that knows of noise is left out, which is not the same as a noise of zero.
        """
        self.check_context(context)
        first = self.first_context
        if isinstance(first, NormedConv2d) and first.norm.pending:
            # Not by a call: the normalisation is not one of the context's share alone. It is still
            # the identity, and must not be part of the graph.
            hidden = F.conv2d(context, first.weight, padding=1)
        else:
            hidden = first(context)
        return Condition(self.injector(context), hidden, self.fit_noise(noise, context))

    def check_context(self, context: Tensor) -> None:
        r"""Refuses a context of another shape than :math:`(B, context\_channels, H, W)`.

        Arguments:
            context: The context.

        Raises:
            ValueError: If it has another shape.
        """
        channels = self.first_context.in_channels
        if context.dim() != 4 or context.shape[1] != channels:
            raise ValueError(
                f"the context must have shape (B, {channels}, H, W); got {tuple(context.shape)}"
            )

    def fit_noise(self, noise: Tensor | None, context: Tensor) -> Tensor | None:
        r"""Returns the noise map at the size of the context, or None where none is wanted.

        Arguments:
            noise: The noise map, with shape :math:`(B, C, H, W)`; see :func:`fit_noise`.
            context: The context, with shape :math:`(B, *, H', W')`.
        """
        if self.noise is None or noise is None:
            return None
        return fit_noise(noise, self.noise_channels, context)

    def _raw(self, kept: Tensor, condition: Condition) -> Tensor:
        first, hidden = self.first_context, condition.hidden
        if condition.rest:
            first_kept, *rest = condition.rest
            made = first_kept.forward(laid_out(kept, first_kept.weight.dtype))
            return last_layers(rest, add_rows(made, hidden))
        if not isinstance(first, NormedConv2d):
            return self.rest(self.first_kept(kept) + hidden)
        if not (kept.numel() > 0 and first.norm.pending):
            gain = torch.exp(first.norm.logs)
            return self.rest(torch.addcmul(hidden, self.first_kept(kept), gain))
        # Until it is initialised, by this batch, the normalisation in `hidden` is the identity.
        return self.rest(first.norm(self.first_kept(kept) + hidden)[0])

    def _raws(self, kept: Tensor, condition: Condition) -> list[tuple[Elementwise, Tensor]]:
        r"""The maps of the changed half, with their raw parameters, in forward order."""
        raws = [(self.map_of("rest"), self._raw(kept, condition))]
        if condition.noise is not None and self.noise is not None:
            both = torch.cat((kept, condition.noise.to(kept.dtype)), dim=1)
            told = condition.told
            if told:
                both = laid_out(both, told[0].weight.dtype)
            noise = last_layers(told[1:], told[0].forward(both)) if told else self.noise(both)
            raws.insert(0, (self.map_of("noise"), noise))
        return raws

    def _match(self, x: Tensor, context: Tensor | Condition | None) -> Condition:
        if context is None:
            raise ValueError("a conditional coupling needs a context; got None")
        if isinstance(context, Tensor):
            context = self.condition(context)
        family = context.map or self.map_of("injector")
        channels, made = self.kept + self.changed, context.injected.shape[1]
        if x.shape[1] != channels:
            raise ValueError(f"there must be {channels} channels at this level; got {x.shape[1]}")
        if made != channels * family.parameters:
            raise ValueError(
                f"the condition was made by another coupling: it holds {made} parameters for each"
                f" pixel, and this one takes {channels * family.parameters}"
            )
        if context.hidden.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                f"the context must have the size {tuple(x.shape[-2:])} of the image at this level;"
                f" got {tuple(context.hidden.shape[-2:])}"
            )
        held = () if torch.is_grad_enabled() else (context.mix, context.rest, context.told)
        return Condition(
            repeat_rows(context.injected, x),
            context.hidden if held and context.rest else repeat_rows(context.hidden, x),
            None if context.noise is None else repeat_rows(context.noise, x),
            context.map,
            *held,
        )

    def forward(
        self, x: Tensor, context: Tensor | Condition | None = None, inner: Inner | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Takes data to noise; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        condition = self._match(x, context)
        family = condition.map or self.map_of("injector")
        around = x
        injected = crop(condition.injected, inner)
        x, ladj = apply(family, crop(x, inner), injected, inverse=False)
        kept, changed = x.tensor_split((self.kept,), dim=1)
        seen = kept
        if inner is not None:  # the convolutions see what is around the tile, transformed
            seen, _ = apply(family, around, condition.injected, inverse=False)
            seen = seen[:, : self.kept]
        for part, raw in self._raws(seen, condition):
            changed, more = apply(part, changed, crop(raw, inner), inverse=False)
            ladj = ladj + more
        return torch.cat((kept, changed), dim=1), ladj

    def inverse(
        self,
        z: Tensor,
        context: Tensor | Condition | None = None,
        inner: Inner | None = None,
        ladj: bool = True,
    ) -> tuple[Tensor, Tensor]:
        r"""Takes noise to data; returns the output and the log-determinant, with shape
        :math:`(B)`."""
        condition = self._match(z, context)
        raws = self._raws(z[:, : self.kept], condition)
        kept, changed = crop(z, inner).tensor_split((self.kept,), dim=1)
        total = z.new_zeros(())
        for part, raw in reversed(raws):
            changed, more = apply(part, changed, crop(raw, inner), inverse=True, ladj=ladj)
            total = total + more
        both, injected = torch.cat((kept, changed), dim=1), crop(condition.injected, inner)
        family = condition.map or self.map_of("injector")
        x, more = apply(family, both, injected, inverse=True, ladj=ladj)
        return x, total + more


def add_rows(y: Tensor, t: Tensor) -> Tensor:
    r"""Adds a tensor to another in place, row :math:`i \bmod B` of it to row :math:`i`.

    Arguments:
        y: What is overwritten, with shape :math:`(n B, *)`.
        t: What is added, with shape :math:`(B, *)`.
    """
    if len(t) in (1, len(y)):
        return y.add_(t)
    y.unflatten(0, (-1, len(t))).add_(t)
    return y


def last_layers(layers: Sequence[Folded], hidden: Tensor) -> Tensor:
    r"""Applies the layers of a network after its first, whose output is overwritten.

    Arguments:
        layers: The layers; an activation comes before each.
        hidden: What the first layer made, with shape :math:`(B, C, H, W)`.
    """
    for layer in layers:
        hidden = layer.forward(hidden.relu_())
    return hidden


def crop(t: Tensor, inner: Inner | None) -> Tensor:
    r"""Returns the wanted part of a tile; all of it, if :py:`None`."""
    return t if inner is None else t[..., inner[0], inner[1]]


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def fit_noise(noise: Tensor, channels: int, context: Tensor) -> Tensor:
    r"""Resizes a noise map to the size of a context, bicubically; one channel stands for all.

    Arguments:
        noise: The noise map, with shape :math:`(B, C, H, W)` or one that broadcasts to the batch
            of the context: for a constant, :math:`(B, 1, 1, 1)`.
        channels: The number of channels :math:`C`.
        context: The context, with shape :math:`(B, *, H', W')`.

    Raises:
        TypeError: If the noise is no tensor.
        ValueError: If it has another shape.
    """
    if not isinstance(noise, Tensor):
        raise TypeError(
            f"the noise must be a tensor, a number or None; got {type(noise).__name__}"
        )
    if noise.dim() != 4 or noise.shape[1] not in (1, channels) or 0 in noise.shape[-2:]:
        raise ValueError(
            f"the noise must have shape (B, {channels}, H, W), with one channel where all are the"
            f" same; got {tuple(noise.shape)}"
        )
    size = context.shape[-2:]
    if noise.shape[-2:] == (1, 1):
        noise = noise.expand(-1, -1, *size)
    elif noise.shape[-2:] != size:
        noise = F.interpolate(noise, size=size, mode="bicubic", align_corners=False)
    rows = context.shape[0] if noise.shape[0] == 1 else noise.shape[0]
    if rows != context.shape[0]:
        raise ValueError(
            f"there must be one noise map for each of the {context.shape[0]} contexts;"
            f" got {noise.shape[0]}"
        )
    return noise.expand(rows, channels, *size)
