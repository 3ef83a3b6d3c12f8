r"""The precision that the networks of image models compute in.

Encoders and the networks of couplings may compute in half precision. What they end in does not:
elementwise maps, activation normalisations, 1×1 convolutions, log-determinants and the scores of
the guard stay in float32, and so does what the blocks of an encoder add to. Images therefore move
by the rounding of the maps' parameters, whatever the noise is, and certified bounds, which hold for
all parameters, hold as before.
"""

__all__ = ["PRECISIONS", "Precision", "Trial", "fastest", "networks", "wanted"]

import contextlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.numerics import evaluation_mode, network_dtype
from flowguard.ood import unguarded

#: The name of one of these, or ``"auto"`` for what is quickest.
Precision = Literal["auto", "bf16", "float16", "float32"]

#: The dtypes that networks can compute in, by name.
PRECISIONS = {"bf16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

TILE = 16  # rows and columns of the condition that the precisions are tried on
TURNS = 3  # the first of which is not counted


class Trial(NamedTuple):
    r"""Which precision took the least time, and the seconds of each.

    Arguments:
        precision: The precision.
        seconds: The seconds that a tile took, by the name of each precision.

    Example:
        >>> print(Trial("bf16", {"float32": 0.12, "bf16": 0.05}))
        bf16, the quickest on a tile here (float32 120 ms, bf16 50 ms)
    """

    precision: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in self.seconds.items())
        return f"{self.precision}, the quickest on a tile here ({times})"


_taken: WeakKeyDictionary[nn.Module, dict[tuple[torch.device, int], Trial]] = WeakKeyDictionary()


def fastest(model: Any, clock: Callable[[], float] = time.perf_counter) -> Trial:
    r"""Tries float32 and bf16 on a small tile, and returns which took less time.

    Without units for it, a processor takes longer for half precision than for single. The answer
    is kept for each model, device and number of threads. Nothing is scored or warned of, and no
    random number is drawn.

    Arguments:
        model: An image model in float32.
        clock: The clock.

    Example:
        >>> model = flowguard.models.SuperResolutionFlow(levels=1, steps=1, hidden=8, features=8)
        >>> fastest(model).precision in ("bf16", "float32")
        True
    """
    device = next(model.parameters()).device
    known = _taken.setdefault(model, {})
    key = (device, torch.get_num_threads())
    if key not in known:
        y = torch.linspace(0, 1, 3 * TILE**2, device=device).reshape(1, 3, TILE, TILE)
        times: dict[str, list[float]] = {"float32": [], "bf16": []}
        with evaluation_mode(model), unguarded(model), torch.no_grad():
            for _ in range(TURNS):
                for name, taken in times.items():
                    start = clock()
                    drawn = torch.Generator(device).manual_seed(0)
                    x = model.sample(y, temperature=0.0, generator=drawn, precision=name)
                    float(x.sum())  # waits for a GPU
                    taken.append(clock() - start)
        seconds = {name: min(taken[1:]) for name, taken in times.items()}
        known[key] = Trial(min(seconds, key=lambda name: seconds[name]), seconds)
    return known[key]


def wanted(model: nn.Module, precision: str | None) -> torch.dtype | None:
    r"""Returns the dtype that a precision stands for; :py:`None` for what the caller has set.

    Arguments:
        model: The model.
        precision: The name of the precision, or :py:`None`.

    Raises:
        ValueError: If there is no such precision.
        TypeError: If the model is not in float32.
    """
    if precision is None:
        return None
    if not isinstance(precision, str) or precision not in get_args(Precision):
        raise ValueError(
            f"precision must be one of {', '.join(get_args(Precision))}, or None for what is set"
            f" by torch.autocast, if anything; got {precision!r}"
        )
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise TypeError(
            f"precision is for models in torch.float32; got {precision!r} and a model in {dtype}:"
            " leave it out, or make the model float32 by model.float()"
        )
    return PRECISIONS[fastest(model).precision if precision == "auto" else precision]


def networks(dtype: torch.dtype | None, x: Tensor) -> contextlib.AbstractContextManager[object]:
    r"""Networks compute in a dtype within.

    Arguments:
        dtype: The dtype; :py:`None` to leave it as it is.
        x: A tensor on the device in question.
    """
    if dtype is None or dtype == network_dtype(x):
        return contextlib.nullcontext()
    if dtype == torch.float32:
        return torch.autocast(x.device.type, enabled=False)
    return torch.autocast(x.device.type, dtype)
