r"""A fingerprint of an encoder's weights: statistics hold for the encoder that made them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "versions"]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            yield name.replace("_orig_mod.", ""), value  # what torch.compile puts in front


@torch.no_grad()
def fingerprint(module: nn.Module | None) -> str:
    r"""Returns a hash of the module's parameters and buffers, as float32 numbers.

    It survives a move to another device, ``.double()`` and ``torch.compile``, and changes with
    any weight that changes beyond float32 rounding, hence also under ``.half()``. It is empty for
    a module that holds no tensors.
    """
    digest, empty = hashlib.blake2b(digest_size=16), True
    for name, value in _tensors(module) if module is not None else ():
        if value.is_floating_point():
            value = value.float()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        empty = False
    return "" if empty else digest.hexdigest()


def versions(module: nn.Module | None) -> tuple[tuple[int, int], ...]:
    r"""Returns what changes when weights change in place or are replaced; cheap to compare.

    Writing through ``parameter.data`` goes unseen, as everywhere in autograd.
    """
    tensors = () if module is None else (*module.parameters(), *module.buffers())
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
