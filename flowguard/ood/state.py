r"""Buffers that hold statistics: float64 wherever possible, shaped by what they load."""

__all__ = ["PinnedState", "gather", "supports_float64"]

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup


def supports_float64(device: torch.device) -> bool:
    r"""Whether tensors on the device can be float64 (Apple's MPS cannot).

    Arguments:
        device: The device.
    """
    return device.type != "mps"


class PinnedState(nn.Module):
    r"""Creates a module whose buffers follow the model's device but never its dtype.

    ``model.half()`` or ``model.to(torch.bfloat16)`` would otherwise round moments and quantiles.
    On a device without float64 the buffers stay on the CPU.

    A state is loaded whatever the shapes of the buffers are before: a fresh object does not know
    how many features it will be given.
    """

    def _changed(self) -> None:
        r"""Called when buffers were moved or loaded: forget what was derived from them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = _follow(fn, buffer)
        self._changed()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if buffer is not None and isinstance(loaded, Tensor) and loaded.shape != buffer.shape:
                self._buffers[name] = buffer.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._changed()


def _follow(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    target = fn(torch.empty(0, device=buffer.device)).device
    if not supports_float64(target):
        return buffer.cpu()
    if target != buffer.device:
        return buffer.to(target)
    result = fn(buffer)  # for what is neither cast nor move, like `share_memory_`
    return result if result.dtype == buffer.dtype else buffer


def gather(tensors: Sequence[Tensor], group: ProcessGroup | None = None) -> list[list[Tensor]]:
    r"""Returns the tensors of all ranks, on the CPU, in the order of the ranks.

    Arguments:
        tensors: The tensors of this rank.
        group: The process group; the default one if :py:`None`.

    Raises:
        RuntimeError: If there is no process group.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            "merging across ranks needs an initialised process group; got none: call "
            "`torch.distributed.init_process_group` first, or leave the merge out"
        )
    everyone: list[list[Tensor]] = [[] for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather_object(everyone, [t.cpu() for t in tensors], group=group)
    return everyone
