r"""Operations on a model inside of wrappers of torch's."""

__all__ = ["Wrapped"]

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch.nn as nn
from torch import Tensor

from flowguard.bounds.holders import wrapped_again
from flowguard.migration.surgeon import Site, Surgeon


class Wrapped(Surgeon):
    r"""What it takes to operate on a model that is compiled, data-parallel or averaged.

    Arguments:
        wrapper: The wrapper, or several, which stays as it is.
        path: The name of the model within.
        operation: Who operates on a copy of the model.
    """

    def __init__(self, wrapper: nn.Module, path: str, operation: Surgeon) -> None:
        self.wrapper, self.path, self.operation = wrapper, path, operation
        self._around: nn.Module | None = None  # what is wrapped
        self._whole = wrapper
        super().__init__(operation.model)

    @property
    def model(self) -> nn.Module:
        r"""The model within."""
        return self.operation.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.operation.model = model

    @property
    def subject(self) -> Any:
        r"""The model, wrapped as it was."""
        inner = self.operation.subject
        if self._around is not inner:
            self._around, self._whole = inner, wrapped_again(self.wrapper, inner)
        return self._whole

    @property
    def places(self) -> Sequence[Any]:
        r"""Those of the model."""
        return self.operation.places

    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        r"""Returns the log-density of each row under the model."""
        return self.operation.log_prob(x, context)

    def sites(self) -> list[Site]:
        r"""Returns the sites in the model, named within the wrapper."""
        sites = self.operation.sites()
        for site in sites:
            site.name = f"{self.path}.{site.name}" if site.name else self.path
        return sites

    def kept(self) -> Mapping[str, str]:
        r"""Names the layers of the model that are kept."""
        return {f"{self.path}.{name}": why for name, why in self.operation.kept().items()}

    def encode(self, x: Tensor, context: Any) -> Tensor | None:
        r"""Returns the noise of each row, as the model does."""
        return self.operation.encode(x, context)

    def decode(self, z: Tensor, context: Any) -> Tensor:
        r"""Returns the samples of some noise, as the model does."""
        return self.operation.decode(z, context)

    def tuning(self) -> AbstractContextManager[None]:
        r"""Holds while the model is fine-tuned."""
        return self.operation.tuning()
