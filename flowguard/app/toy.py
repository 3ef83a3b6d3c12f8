r"""Two moons that a condition of two numbers turns and scales, and flows that learn them.

It is the exploding inverse in the smallest room: the conditions of training lie in a thin
parallelogram, and the page lets one drag the condition out of it.
"""

__all__ = ["FRAME", "REACH", "ToyFlow", "Toys", "drawn", "moons", "toys", "trained"]

import copy
import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.ood import OODConditioner
from flowguard.ood.report import OODReport
from flowguard.transforms import AffineTransform, RobustSpline, Univariate

REACH = 12.0  #: how far each number of the condition can be dragged
FRAME = 6.0  #: what is drawn of the plane of samples: from -FRAME to FRAME
STEPS, BATCH = 250, 192  # of training
CALIBRATION = 2048  # conditions for the guard's fit, and for its calibration
POINTS = 300  # of each flow
_EMBEDDING, _BLOCKS, _HIDDEN = 8, 3, 32

_LOCK = threading.Lock()


def parallelogram(n: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Draws conditions of training, with shape :math:`(n, 2)`.

    Arguments:
        n: Their number.
        generator: The source of randomness; by default that of torch.
    """
    u, v = (2 * torch.rand(2, n, generator=generator) - 1).unbind()
    return torch.stack((2 * u, u + 0.3 * v), dim=-1)


def moons(condition: Tensor, generator: torch.Generator) -> Tensor:
    r"""Draws a point of the two moons for each condition, which turns them by its first number and
    scales them by its second.

    Arguments:
        condition: The conditions, with shape :math:`(n, 2)`.
        generator: The source of randomness.

    Returns:
        The points, with shape :math:`(n, 2)`.

    Example:
        >>> moons(torch.zeros(5, 2), torch.Generator().manual_seed(0)).shape
        torch.Size([5, 2])
    """
    n = len(condition)
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    sign = torch.where(upper, 1.0, -1.0)
    x = sign * (angle.cos() - 0.5) + 0.05 * torch.randn(n, generator=generator)
    y = sign * (angle.sin() - 0.25) + 0.05 * torch.randn(n, generator=generator)
    turn, scale = condition[:, 0], (0.5 * condition[:, 1]).exp()
    c, s = turn.cos() * scale, turn.sin() * scale
    return torch.stack((c * x - s * y, s * x + c * y), dim=-1)


def _network(outputs: int) -> nn.Sequential:
    r"""What parameters come from, which are zero at first: the map is then the identity."""
    last = nn.Linear(_HIDDEN, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    first, second = nn.Linear(1 + _EMBEDDING, _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


class ToyFlow(nn.Module):
    r"""Creates a flow over points of the plane given two numbers, whose couplings have any map.

    Arguments:
        univariate: From parameters to the map of a coupling.
        shapes: The shapes of the parameters of one number.

    Example:
        >>> flow = ToyFlow(RobustSpline, RobustSpline.shapes(8))
        >>> flow.sample(torch.zeros(5, 2), torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, univariate: Callable[..., Univariate], shapes: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        self.univariate = univariate
        self.sizes = [math.prod(shape) for shape in shapes]
        self.scalar = [not shape for shape in shapes]
        encoder = nn.Sequential(nn.Linear(2, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _EMBEDDING))
        self.conditioner = OODConditioner(encoder, policy="report", alpha=0.01)
        width = sum(self.sizes)
        self.networks = nn.ModuleList(_network(width) for _ in range(2 * _BLOCKS))
        self.scales = nn.Parameter(torch.zeros(_BLOCKS, 2))  # of each block, the same for all

    def _map(self, number: int, other: Tensor, embedding: Tensor) -> Univariate:
        parts = self.networks[number](torch.cat((other[:, None], embedding), dim=-1))
        found = parts.split(self.sizes, dim=-1)
        return self.univariate(
            *(p[:, 0] if scalar else p for p, scalar in zip(found, self.scalar, strict=True))
        )

    def log_prob(self, x: Tensor, condition: Tensor) -> Tensor:
        r"""Returns the log-density of points, with shape :math:`(n)`.

        Arguments:
            x: The points, with shape :math:`(n, 2)`.
            condition: The conditions, with shape :math:`(n, 2)`.
        """
        embedding = self.conditioner(condition)
        ladj = x.new_zeros(len(x)) + self.scales.sum()
        for block in range(_BLOCKS):
            x = x * self.scales[block].exp()
            for k in (0, 1):
                at = self._map(2 * block + k, x[:, 1 - k], embedding)
                y, slope = at.call_and_ladj(x[:, k])
                x = torch.stack((y, x[:, 1]) if k == 0 else (x[:, 0], y), dim=-1)
                ladj = ladj + slope
        return ladj - x.square().sum(dim=-1) / 2 - math.log(2 * math.pi)

    @torch.no_grad()
    def sample(self, condition: Tensor, z: Tensor) -> Tensor:
        r"""Returns the points that noise becomes, with shape :math:`(n, 2)`.

        Arguments:
            condition: The conditions, with shape :math:`(n, 2)`.
            z: The noise, with shape :math:`(n, 2)`.
        """
        embedding, x = self.conditioner(condition), z
        for block in reversed(range(_BLOCKS)):
            for k in (1, 0):
                at = self._map(2 * block + k, x[:, 1 - k], embedding)
                y = at.inverse_and_ladj(x[:, k])[0]
                x = torch.stack((y, x[:, 1]) if k == 0 else (x[:, 0], y), dim=-1)
            x = x * (-self.scales[block]).exp()
        return x


#: The maps of the couplings, with the boxes and shifts of the image models.
_MAPS: dict[str, tuple[Callable[..., Univariate], Sequence[Sequence[int]]]] = {
    "affine": (AffineTransform, [(), ()]),
    "robust": (
        functools.partial(RobustSpline, bound=5.0, shift_bound=1.0),
        RobustSpline.shapes(2),
    ),
}


def trained(name: str, steps: int = STEPS, seed: int = 0) -> ToyFlow:
    r"""Returns a flow that has learned the moons, with a calibrated guard.

    Arguments:
        name: The coupling, ``"affine"`` or ``"robust"``.
        steps: The number of steps.
        seed: The seed of weights and data; torch's own generator is left as it was.

    Example:
        >>> trained("robust", steps=2).conditioner.calibrated
        True
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        flow = ToyFlow(*_MAPS[name])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            y = parallelogram(BATCH, generator)
            optimizer.zero_grad()
            flow.log_prob(moons(y, generator), y).mean().neg().backward()
            nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
            optimizer.step()
            schedule.step()
    guard = flow.conditioner
    guard.fit(parallelogram(CALIBRATION, generator), progress=False)
    guard.calibrate(parallelogram(CALIBRATION, generator), progress=False)
    return flow.eval()


class Toys(NamedTuple):
    r"""What the flows make of one condition.

    Arguments:
        points: The samples of each flow by its name, with shape :math:`(n, 2)`.
        report: What the guard of the robust one says of the condition.
    """

    points: dict[str, Tensor]
    report: OODReport

    def gone(self, name: str) -> float:
        r"""Returns the share of samples beyond what is drawn of the plane.

        Arguments:
            name: The name of the flow.
        """
        inside = (self.points[name].abs() <= FRAME).all(dim=-1)
        return 1 - float(inside.float().mean())


@functools.cache
def _learned() -> dict[str, ToyFlow]:
    affine, robust = trained("affine"), trained("robust")
    guarded = copy.deepcopy(affine)
    guarded.conditioner.policy = "shrink"
    return {"affine": affine, "affine, its guard shrinks": guarded, "robust": robust}


def toys() -> dict[str, ToyFlow]:
    r"""Returns the flows by name, trained when they are first asked for: some seconds."""
    with _LOCK:  # two who ask at once are given the same ones
        return _learned()


def drawn(first: float, second: float) -> Toys:
    r"""Returns what each flow makes of one condition and the same noise.

    Arguments:
        first: The first number of the condition, which turns the moons.
        second: Its second number, which scales them.

    Raises:
        ValueError: If one of them is not finite.
    """
    if not math.isfinite(first) or not math.isfinite(second):
        raise ValueError(f"a condition must be finite; got {first}, {second}")
    condition = torch.tensor([[first, second]], dtype=torch.float32).expand(POINTS, 2)
    z = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(0))
    flows = toys()
    points = {name: flow.sample(condition, z) for name, flow in flows.items()}
    return Toys(points, flows["robust"].conditioner.score(condition[:1]))
