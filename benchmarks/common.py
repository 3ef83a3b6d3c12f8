r"""What several benchmarks share: toy data, a loop that trains, and clocks read by turns.

The benchmarks are scripts of one folder, which Python looks into first.
"""

__all__ = ["allocated", "by_turns", "moons", "train", "turned", "two_moons"]

import importlib
import itertools
import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def two_moons(n: int, noise: float) -> Tensor:
    r"""Draws points on two half circles, with shape :math:`(n, 2)`.

    Arguments:
        n: The number of points.
        noise: The standard deviation of the noise around the circles.
    """
    t = math.pi * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, t.cos(), 1 - t.cos()) - 0.5
    y = torch.where(upper, t.sin(), 0.5 - t.sin()) - 0.25
    return torch.stack((x, y), dim=-1) + noise * torch.randn(n, 2)


def turned(points: Tensor, c: Tensor) -> Tensor:
    r"""Turns points by the first number of their contexts and scales them by the second.

    Arguments:
        points: The points, with shape :math:`(n, 2)`.
        c: The contexts, with the same shape.
    """
    cos, sin = c[:, 0].cos(), c[:, 0].sin()
    (x, y), scale = points.unbind(-1), torch.exp(0.3 * c[:, 1:])
    return scale * torch.stack((cos * x - sin * y, sin * x + cos * y), dim=-1)


def moons(n: int) -> tuple[Tensor, Tensor]:
    r"""Draws pairs of a point and a context, both of about unit variance.

    Arguments:
        n: The number of pairs.
    """
    c = torch.randn(n, 2)
    return 1.3 * turned(two_moons(n, 0.05), c), c


def train(
    flow: nn.Module,
    loss: Callable[..., Tensor],
    steps: int,
    *,
    draw: Callable[[int], tuple[Tensor, ...]] = moons,
    batch: int = 512,
    lr: float = 2e-3,
    clip: float = math.inf,
) -> None:
    r"""Trains a flow on fresh pairs, by Adam with a cosine decay, and leaves it for evaluation.

    Arguments:
        flow: The flow.
        loss: The loss of what `draw` returns.
        steps: The number of steps.
        draw: What draws a batch of so many rows.
        batch: The number of rows.
        lr: The learning rate at the start.
        clip: The greatest norm of the gradient.
    """
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    flow.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*draw(batch)).backward()
        if math.isfinite(clip):
            nn.utils.clip_grad_norm_(flow.parameters(), clip)
        optimizer.step()
        schedule.step()
    flow.eval()


def by_turns(
    runs: Mapping[Key, Callable[[], Any]],
    turns: int,
    warm: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    r"""Returns the seconds of each turn, so that other load on the machine falls on all alike.

    Arguments:
        runs: What is timed, by name. The order is reversed in every other turn.
        turns: The number of turns.
        warm: The number of turns before, which are not counted.
        clock: The clock.
    """
    times: dict[Key, list[float]] = {name: [] for name in runs}
    for turn in range(warm + turns):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            start = clock()
            runs[name]()
            if turn >= warm:
                times[name].append(clock() - start)
    return times


def allocated(call: Callable[[], Result], device: torch.device) -> tuple[Result, int, int, int]:
    r"""Returns what a call returns, the peak bytes of all that it allocates, the peak of what it
    releases again, and the bytes that stay.

    Every allocation and release of the device's allocator is recorded with its address. Memory that
    flowguard keeps for the next call is released first, to be counted.

    Arguments:
        call: The call.
        device: The device whose memory counts.
    """
    importlib.import_module("flowguard.spline.inplace.memory").release()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        results = call()

    assert profile.profiler is not None
    kineto = profile.profiler.kineto_results
    assert kineto is not None

    events: list[tuple[int, int, int]] = []  # time, address, bytes (negative: released)
    stack = list(kineto.experimental_event_tree())
    while stack:
        node = stack.pop()
        stack += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            field = node.extra_fields
            if field.device.type == device.type:
                events.append((node.start_time_ns, field.ptr, field.alloc_size))
    events.sort(key=lambda event: event[0])

    position: dict[int, int] = {}  # of the event that allocated what is alive at this address
    changes: list[int] = []
    for _, address, size in events:
        # What was allocated before the call is not its own.
        if size > 0:
            position[address] = len(changes)
            changes.append(size)
        elif position.pop(address, None) is not None:
            changes.append(size)

    peak = max(itertools.accumulate(changes, initial=0))
    staying = sum(changes[i] for i in position.values())
    for i in position.values():
        changes[i] = 0
    return results, peak, max(itertools.accumulate(changes, initial=0)), staying
