r"""What a model consists of, where not all of it are modules: transforms, distributions, and what
hosts make of them."""

__all__ = ["gather", "parts"]

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.distributions import Distribution, Transform

from flowguard.hosts import of_a_host


def parts(model: Any) -> Iterator[Any]:
    r"""Goes over a model and all that it holds, each once: modules, transforms, distributions and
    objects of the hosts, through lists, tuples and partial functions; and over their tensors. Of
    the modules, parameters and buffers alone count as such.

    Arguments:
        model: The model.

    Example:
        >>> from torch.distributions import AffineTransform, Normal, TransformedDistribution
        >>> f = AffineTransform(torch.zeros(2), torch.ones(2))
        >>> d = TransformedDistribution(Normal(torch.zeros(2), torch.ones(2)), [f])
        >>> sorted(type(part).__name__ for part in parts(d) if not isinstance(part, torch.Tensor))
        ['AffineTransform', 'Normal', 'TransformedDistribution']
    """
    seen: set[int] = set()
    ahead = deque([model])
    while ahead:
        part = ahead.popleft()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, list | tuple):
            ahead += part
        elif isinstance(part, partial):
            ahead += (part.func, *part.args, *part.keywords.values())
        elif isinstance(part, Tensor):
            yield part
        elif isinstance(part, nn.Module):
            yield part
            ahead += (*part._parameters.values(), *part._buffers.values())
            ahead += part._modules.values()
            if isinstance(part, Transform) or of_a_host(part):
                ahead += _without_tensors(vars(part).values())
        elif isinstance(part, Transform | Distribution) or of_a_host(part):
            yield part
            ahead += vars(part).values()


def _without_tensors(values: Any) -> Iterator[Any]:
    r"""What modules have that is no tensor: masks, say, are none of their numbers."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from (item for item in value if not isinstance(item, Tensor))
        elif not isinstance(value, Tensor):
            yield value


def gather(model: Any) -> nn.Module:
    r"""Returns a module that holds all modules of a model which is none itself; a module as it is.

    Arguments:
        model: The model.
    """
    if isinstance(model, nn.Module):
        return model
    found = [part for part in parts(model) if isinstance(part, nn.Module)]
    within = {id(inner) for part in found for inner in part.modules() if inner is not part}
    return nn.ModuleList(part for part in found if id(part) not in within)
