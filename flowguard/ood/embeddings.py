r"""From whatever users have, batches and encoder outputs, to named levels and back."""

__all__ = ["Selector", "contexts", "device_of", "to_levels", "with_levels"]

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

#: Which part of a batch is the context: an index, a key, or a function.
Selector = int | str | Callable[[Any], Tensor] | None


def to_levels(output: Any, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    r"""Returns the embeddings of an encoder's output by name, finest first.

    Arguments:
        output: A tensor, or a list, tuple or dictionary of tensors, each with shape
            :math:`(N, C)` or :math:`(N, C, H, W)`; a lone vector :math:`(C)` counts as one.
        names: What to call the levels; for a dictionary, the keys to take.

    Raises:
        TypeError: If a level is no floating point tensor.
        ValueError: If there is no level, the names do not fit, or a level is a scalar.
    """
    if isinstance(output, Mapping):
        names = [str(key) for key in output] if names is None else names
        if missing := [name for name in names if name not in output]:
            raise ValueError(
                f"the encoder's output must have a level {missing[0]!r}; got {list(output)}"
            )
        values = [output[name] for name in names]
    else:
        values = [output] if isinstance(output, Tensor) or output is None else list(output)
        if names is not None and len(names) != len(values):
            raise ValueError(
                f"levels must name the {len(values)} levels that the encoder gives; got "
                f"{len(names)} names: {list(names)}"
            )
        names = names or [f"level{i + 1}" for i in range(len(values))]
    if not values:
        raise ValueError("the encoder must give a level at least; got an empty output")
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value)
            raise TypeError(
                f"level {name!r} must be a floating point tensor; got {what}: choose the outputs "
                "to watch with `levels=[...]` on a dictionary, or wrap the encoder"
            )
        if value.ndim == 0:
            raise ValueError(
                f"level {name!r} must have shape (N, C) or (N, C, H, W); got a scalar"
            )
    return {n: v[None] if v.ndim == 1 else v for n, v in zip(names, values, strict=True)}


def with_levels(output: Any, levels: Mapping[str, Tensor]) -> Any:
    r"""Returns the output with its levels replaced, in the type that it has.

    Arguments:
        output: The output of an encoder.
        levels: The new embeddings, by name, in the order of :func:`to_levels`.
    """
    if isinstance(output, Tensor):
        (value,) = levels.values()
        return value.reshape(output.shape)
    if isinstance(output, Mapping):
        replaced: Any = copy.copy(output)
        for name, value in levels.items():
            replaced[name] = value.reshape(output[name].shape)
        return replaced
    values = [v.reshape(o.shape) for v, o in zip(levels.values(), output, strict=True)]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def contexts(
    batches: Iterable[Any],
    select: Selector,
    device: torch.device | None,
    progress: bool,
    name: str,
) -> Iterator[Any]:
    r"""Yields the contexts of batches, on the encoder's device, under a progress bar.

    Arguments:
        batches: An iterable of batches, or a tensor, which is cut into batches.
        select: Which part of a batch is the context: a key, an index, or a function of the
            batch.
        device: The device, :py:`None` to leave contexts where they are.
        progress: Whether to show the bar.
        name: What the bar is called.

    Raises:
        TypeError: If the batches are not iterable, or are arrays or numbers.
        ValueError: If there is no batch, or nothing says which part of one is the context.
    """
    if isinstance(batches, np.ndarray):
        raise TypeError(
            f"`{name}` needs tensors; got an array of shape {batches.shape}: give"
            " torch.as_tensor(y).float(), contexts in the rows"
        )
    if isinstance(batches, Tensor):
        if not batches.ndim:
            raise ValueError(
                f"`{name}` needs a batch of contexts, one in each row; got a single number"
            )
        batches = batches.split(64)
    elif not isinstance(batches, Iterable):
        raise TypeError(
            f"`{name}` needs an iterable of batches, like a DataLoader or a list of tensors; "
            f"got {type(batches).__name__}"
        )
    empty = True
    for batch in tqdm(batches, desc=name, unit="batch", disable=not progress, leave=False):
        empty = False
        y = _select(batch, select)
        if isinstance(y, np.ndarray | int | float):
            raise TypeError(
                f"`{name}` needs batches of contexts as tensors; got one that is a"
                f" {type(y).__name__}: torch.as_tensor makes one of an array"
            )
        yield y.to(device) if device is not None and isinstance(y, Tensor) else y
    if empty:
        raise ValueError(
            f"`{name}` needs a batch at least; got none: an iterator is spent after one pass, "
            "so give a list, a DataLoader, or a fresh iterator"
        )


def _select(batch: Any, select: Selector) -> Any:
    if callable(select):
        return select(batch)
    if select is not None:
        try:
            return batch[select]
        except (KeyError, IndexError, TypeError) as error:
            told = f" with the keys {list(batch)}" if isinstance(batch, Mapping) else ""
            raise ValueError(
                "`context` must say which part of a batch is the context, by a key, an index or a"
                f" function; got {select!r}, for a batch that is a {type(batch).__name__}{told}"
            ) from error
    if isinstance(batch, list | tuple) and len(batch) == 1:
        return batch[0]
    if isinstance(batch, list | tuple | dict):
        keys = list(batch) if isinstance(batch, dict) else f"0 to {len(batch) - 1}"
        raise ValueError(
            "batches must be contexts, or `context=` must say which part of them is, by a key "
            f"({keys}) or a function of the batch; got a {type(batch).__name__} of {len(batch)}"
        )
    return batch


def device_of(module: nn.Module | None) -> torch.device | None:
    r"""Returns the device of a module's first tensor, :py:`None` where it has none.

    Arguments:
        module: The module, or :py:`None`.
    """
    if module is None:
        return None
    return next((t.device for t in (*module.parameters(), *module.buffers())), None)
