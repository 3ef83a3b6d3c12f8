r"""Lists of context maps, one for each level, as one tensor that nflows can repeat.

``nflows.flows.Flow`` takes tensors only: it asks for their shape, and repeats their rows for
several samples. Here the maps of all levels become one tensor at the size of the finest, the
coarser ones with each pixel repeated, so that they can be taken out again bit for bit.
"""

__all__ = ["PackMaps", "pack_maps", "unpack_maps"]

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor


def pack_maps(maps: Sequence[Tensor] | Mapping[Any, Tensor]) -> Tensor:
    r"""Returns the maps of all levels as one tensor at the size of the finest.

    Arguments:
        maps: The maps, finest first, with shapes :math:`(N, C_l, H_l, W_l)`. The size of the first
            must be a multiple of all others.

    Returns:
        The tensor, with shape :math:`(N, \sum_l C_l, H_1, W_1)`.

    Raises:
        TypeError: If there is no list of tensors.
        ValueError: If the maps do not fit together.

    Example:
        >>> maps = [torch.randn(2, 8, 4, 6), torch.randn(2, 16, 2, 3)]
        >>> pack_maps(maps).shape
        torch.Size([2, 24, 4, 6])
    """
    levels = list(maps.values() if isinstance(maps, Mapping) else maps)
    if isinstance(maps, Tensor) or not all(isinstance(m, Tensor) for m in levels):
        raise TypeError(
            "maps must be a list of tensors, one for each level; got"
            f" {type(maps).__name__} of {', '.join(sorted({type(m).__name__ for m in levels}))}"
        )
    if not levels or any(m.dim() != 4 for m in levels):
        raise ValueError(
            "there must be a map (N, C, H, W) for each level;"
            f" got shapes {[tuple(m.shape) for m in levels]}"
        )
    height, width = levels[0].shape[-2:]
    if any(
        m.shape[0] != levels[0].shape[0] or height % m.shape[-2] or width % m.shape[-1]
        for m in levels
    ):
        raise ValueError(
            "all maps must have the same number of rows, and the size of the first must be a"
            f" multiple of all others; got shapes {[tuple(m.shape) for m in levels]}"
        )
    return torch.cat([_repeat(m, height, width) for m in levels], dim=1)


def _repeat(m: Tensor, height: int, width: int) -> Tensor:
    n, c, h, w = m.shape
    repeated = m[:, :, :, None, :, None].expand(n, c, h, height // h, w, width // w)
    return repeated.reshape(n, c, height, width)


def unpack_maps(
    packed: Tensor, channels: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    r"""Returns the maps that :func:`pack_maps` made one tensor of.

    Arguments:
        packed: The tensor, with shape :math:`(N, \sum_l C_l, H_1, W_1)`.
        channels: The number of channels :math:`C_l` of each level.
        sizes: The size :math:`(H_l, W_l)` of each level.

    Example:
        >>> maps = [torch.randn(2, 8, 4, 6), torch.randn(2, 16, 2, 3)]
        >>> packed = pack_maps(maps)
        >>> [m.shape[1:] for m in unpack_maps(packed, [8, 16], [(4, 6), (2, 3)])]
        [torch.Size([8, 4, 6]), torch.Size([16, 2, 3])]
    """
    height, width = packed.shape[-2:]
    parts = packed.split(list(channels), dim=1)
    return [
        part[..., :: height // h, :: width // w] for part, (h, w) in zip(parts, sizes, strict=True)
    ]


class PackMaps(nn.Module):
    r"""Creates an embedding network for ``nflows.flows.Flow`` from one that returns a list of
    maps, such as a :class:`flowguard.OODConditioner` around an encoder with several levels.

    Give the channels of the maps to :class:`ConditionalMultiscaleTransform` as
    ``context_channels``, which takes them apart again.

    Arguments:
        net: The network. Its output is a list, tuple or dictionary of maps, finest first.

    Example:
        >>> encoder = flowguard.models.PyramidEncoder(8, scale=1, levels=2)
        >>> PackMaps(flowguard.OODConditioner(encoder))(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 16, 4, 4])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, context: Any) -> Tensor:
        r"""Returns the maps of the network as one tensor, with shape :math:`(N, D)`; see
        :func:`pack_maps`."""
        return pack_maps(self.net(context))
