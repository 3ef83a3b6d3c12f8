r"""The one thing the OOD package asks of ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["gather"]


def gather(tensors: Sequence[Tensor], group: ProcessGroup | None = None) -> list[list[Tensor]]:
    r"""Returns the tensors of all ranks, on the CPU, in the order of the ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            "Merging across ranks needs an initialised process group; call "
            "`torch.distributed.init_process_group` first, or leave the merge out."
        )
    everyone: list[list[Tensor]] = [[] for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather_object(everyone, [t.cpu() for t in tensors], group=group)
    return everyone
