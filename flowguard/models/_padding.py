r"""Padding of images to sizes that a network takes."""

__all__ = ["pad_to", "pad_to_multiple"]

import math

import torch.nn.functional as F
from torch import Tensor


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    r"""Pads images by replication, at the bottom and on the right."""
    bottom, right = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    r"""Pads images by replication until height and width are multiples."""
    height, width = (multiple * math.ceil(n / multiple) for n in x.shape[-2:])
    return pad_to(x, height, width)
