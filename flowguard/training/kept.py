r"""The maps of a frozen encoder, kept for pictures that come again."""

__all__ = ["KeptMaps"]

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowguard.ood.fingerprint import fingerprint


class KeptMaps:
    r"""Creates a store of an encoder's maps, for whole pictures and for crops that come again.

    A condition is known by its pixels: the same file and the same crop are found again, whoever
    reads them, and a file that was changed, or a crop that was turned, is another one. Each
    condition is encoded for itself, so that its maps do not depend on what came with it. The first
    ones are kept, until the budget is used up; none makes place for another, as pictures that come
    by turns would then never be found.

    It pays for pictures of validation, or crops at fixed places. Random crops never come again.

    Arguments:
        budget: The number of bytes that may be kept, in the memory of the machine.

    Attributes:
        used: The number of bytes that are.
        found: How often a condition was found again.
        made: How often one was encoded.

    Raises:
        ValueError: If the budget is negative.

    Example:
        >>> from flowguard.models import PyramidEncoder
        >>> encoder = PyramidEncoder(4, levels=2, blocks=1).requires_grad_(False).eval()
        >>> kept, y = KeptMaps(10**6), torch.rand(3, 3, 8, 8)
        >>> kept.renew(encoder)
        >>> with kept.serving(encoder):
        ...     first, second = encoder(y), encoder(y)
        >>> kept.found, kept.made, torch.equal(first[0], second[0])
        (3, 3, True)
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"budget must not be negative; got {budget}")
        self.budget = budget
        self.used = self.found = self.made = 0
        self._maps: dict[bytes, list[Tensor]] = {}
        self._weights: str | None = None

    def renew(self, encoder: nn.Module) -> None:
        r"""Forgets all maps if they are those of other weights.

        Arguments:
            encoder: The encoder that is going to be asked.
        """
        weights = fingerprint(encoder)
        if weights != self._weights:
            self._maps.clear()
            self.used, self._weights = 0, weights

    @contextmanager
    def serving(self, encoder: nn.Module) -> Iterator[None]:
        r"""Lets an encoder answer with what is kept, within, and keeps what it answers.

        Arguments:
            encoder: A frozen encoder, whose weights :meth:`renew` has seen.

        Raises:
            ValueError: If it is not frozen, as its maps would have no gradient.
        """
        if encoder.training or any(p.requires_grad for p in encoder.parameters()):
            raise ValueError(
                "maps are kept of an encoder that is frozen: whose parameters require no gradient,"
                " and which is in evaluation mode; got one that is not"
            )
        make = encoder.forward

        def forward(y: Tensor) -> list[Tensor]:
            rows = [self._maps_of(make, row) for row in y.split(1)]
            return [torch.cat(level) for level in zip(*rows, strict=True)]

        encoder.forward = forward
        try:
            yield
        finally:
            del encoder.forward

    def _maps_of(self, make: Callable[[Tensor], Sequence[Tensor]], y: Tensor) -> list[Tensor]:
        if y.requires_grad and torch.is_grad_enabled():  # somebody wants to know how they change
            return list(make(y))
        key = _key(y)
        kept = self._maps.get(key)
        if kept is not None:
            self.found += 1
            return [t.to(y.device) for t in kept]
        self.made += 1
        with torch.no_grad():
            maps = list(make(y))
        size = sum(t.numel() * t.element_size() for t in maps)
        if self.used + size <= self.budget:
            self._maps[key] = [t.cpu() for t in maps]
            self.used += size
        return maps


def _key(y: Tensor) -> bytes:
    r"""What tells a condition from others: its pixels, its shape and the precision it is seen in."""
    device = y.device.type
    seen = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else y.dtype
    pixels = y.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{tuple(y.shape)}{y.dtype}{seen}".encode(), digest_size=16)
    digest.update(pixels.flatten().view(torch.uint8).numpy().data)
    return digest.digest()
