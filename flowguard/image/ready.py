r"""What a step can compute before it sees an image or latents, to run many times on one context.

The normalisations go into the weights beside them, and the 1×1 convolution is inverted once and
merged with the activation normalisation. All this is for use without gradients, and only as long
as the parameters do not change.
"""

__all__ = ["PixelMap", "PixelMaps", "Ready", "Weights", "last_layers", "mixes"]

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowguard.image.layers import (
    ActNorm,
    FixedConv1x1,
    InvertibleConv1x1,
    OrthogonalConv1x1,
    pixelwise,
)

Mix = FixedConv1x1 | InvertibleConv1x1 | OrthogonalConv1x1


class Weights(NamedTuple):
    r"""A convolution that keeps the size of the image, with all its factors in the weights."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        size = self.weight.shape[-1]
        if size == 1:
            return pixelwise(x, self.weight.flatten(1), self.bias)
        return F.conv2d(x, self.weight, self.bias, padding=size // 2)


class PixelMap(NamedTuple):
    r"""Normalisation and 1×1 convolution in one: :math:`y = W x + b` at each pixel."""

    matrix: Tensor
    bias: Tensor
    ladj: Tensor  # of one pixel

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ladj = (self.ladj * (x.shape[-2] * x.shape[-1])).expand(x.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            return pixelwise(x, self.matrix.to(x.dtype), self.bias.to(x.dtype)), ladj


#: Those of the forward and of the inverse direction.
PixelMaps = tuple[PixelMap, PixelMap]


class Ready(NamedTuple):
    r"""A step, ready to be run."""

    forward_mix: PixelMap
    inverse_mix: PixelMap
    first: Weights
    rest: tuple[Weights, Weights]
    noise: tuple[Weights, Weights, Weights] | None


def last_layers(weights: Sequence[Weights], hidden: Tensor) -> Tensor:
    r"""Applies the layers of a network after its first, whose output is overwritten."""
    for weight in weights:
        hidden = weight(hidden.relu_())
    return hidden


def mixes(norms: Sequence[ActNorm], layers: Sequence[Mix]) -> list[PixelMaps]:
    r"""Merges normalisations and the 1×1 convolutions after them, in both directions.

    Arguments:
        norms: The normalisations, of equal size.
        layers: The 1×1 convolutions.
    """
    bias = torch.stack([n.bias.flatten() for n in norms]).double()
    logs = torch.stack([n.logs.flatten() for n in norms]).double()
    matrix = torch.stack([m.weight for m in layers]).double()
    ladj = logs.sum(1)
    if isinstance(layers[0], InvertibleConv1x1):
        back = torch.linalg.inv(matrix)
        ladj = ladj + torch.linalg.slogdet(matrix).logabsdet
    elif isinstance(layers[0], FixedConv1x1):
        back = torch.stack([m.get_buffer("transpose") for m in layers]).double()
    else:
        back = matrix.mT
    there = matrix * logs.exp().unsqueeze(1)
    offset = (there @ bias.unsqueeze(2)).squeeze(2)
    back = back * torch.exp(-logs).unsqueeze(2)
    dtype = norms[0].bias.dtype
    parts = (t.to(dtype).unbind() for t in (there, offset, ladj, back, -bias, -ladj))
    return [
        (PixelMap(*columns[:3]), PixelMap(*columns[3:])) for columns in zip(*parts, strict=True)
    ]
