r"""A fingerprint of an encoder's weights: statistics hold for the encoder that made them."""

__all__ = ["Seal", "fingerprint"]

import hashlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn


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

    Arguments:
        module: The module, or :py:`None`.
    """
    digest, empty = hashlib.blake2b(digest_size=16), True
    for name, value in _tensors(module) if module is not None else ():
        if value.is_floating_point():
            value = value.float()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        empty = False
    return "" if empty else digest.hexdigest()


class Seal:
    r"""Creates a memory of a module having passed the check; asking again costs no hashing.

    Writing through ``parameter.data`` goes unseen, as everywhere in autograd. Copies and pickles
    start unchecked.

    Arguments:
        what: What the module is, for the error.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._passed: str | None = None
        self._seen: list[tuple[weakref.ref[Tensor], int, int]] = []

    def __reduce__(self) -> tuple[type["Seal"], tuple[str]]:
        return Seal, (self.what,)

    def check(self, module: nn.Module | None, expected: str) -> None:
        r"""Raises a :class:`RuntimeError` unless the module has the expected fingerprint.

        Arguments:
            module: The module, or :py:`None`.
            expected: Its :func:`fingerprint` at the fit.

        Raises:
            RuntimeError: If the fingerprint is another one.
        """
        tensors = () if module is None else (*module.parameters(), *module.buffers())
        if self._passed == expected and len(self._seen) == len(tensors):
            pairs = zip(tensors, self._seen, strict=True)
            if all(
                ref() is tensor and (pointer, version) == _version(tensor) and version >= 0
                for tensor, (ref, pointer, version) in pairs
            ):
                return
        if fingerprint(module) != expected:
            raise RuntimeError(
                f"the {self.what}'s weights must be those of the fit; got others (trained on, cast "
                f"to another precision, or another {self.what}), for which its statistics do not "
                "hold: call `fit(batches)` and `calibrate(batches)` again"
            )
        self._seen = [(weakref.ref(tensor), *_version(tensor)) for tensor in tensors]
        self._passed = expected


def _version(tensor: Tensor) -> tuple[int, int]:
    r"""What changes with an in-place change; inference tensors do not count theirs."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
