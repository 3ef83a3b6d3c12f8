r"""Who operates on what holds flows in attributes of its own, and computes with them as it likes."""

__all__ = ["Wrapped"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor

from flowguard.migration.surgeon import Site, Surgeon, surgeon


class Wrapped(Surgeon):
    r"""Creates the surgeon of a model that holds flows: what becomes of these, who knows them tells;
    the density is the model's own.

    Arguments:
        model: The model.
        names: The names of the flows within it.
        log_prob: From model, data and contexts to the log-density of each row.
        embed: From model and contexts to the contexts of the flow, where there is only one. If
            :py:`None`, how samples move is not told.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        log_prob: Callable[[Any, Tensor, Any], Tensor],
        embed: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        super().__init__(model)
        self.names = tuple(names)
        self.density = log_prob
        self.embed = embed

    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        return self.density(self.model, x, context)

    def sites(self) -> list[Site]:
        found = []
        for name, inner in self._inner():
            for site in inner.sites():
                site.name = f"{name}.{site.name}" if site.name else name
                site.operation = self  # whose model refers to all of the layers
                found.append(site)
        return found

    def kept(self) -> Mapping[str, str]:
        return {
            f"{name}.{layer}": why
            for name, inner in self._inner()
            for layer, why in inner.kept().items()
        }

    def encode(self, x: Tensor, context: Any) -> Tensor | None:
        if self.embed is None:
            return None
        ((_, inner),) = self._inner()
        return inner.encode(x, self.embed(self.model, context))

    def decode(self, z: Tensor, context: Any) -> Tensor:
        ((_, inner),) = self._inner()
        return inner.decode(z, self.embed(self.model, context))  # type: ignore[misc]

    @contextmanager
    def tuning(self) -> Iterator[None]:
        with ExitStack() as stack:
            for _, inner in self._inner():
                stack.enter_context(inner.tuning())
            yield

    def _inner(self) -> Iterator[tuple[str, Surgeon]]:
        r"""Goes over the flows as they are now, with who knows them."""
        for name in self.names:
            yield name, surgeon(self.model.get_submodule(name))
