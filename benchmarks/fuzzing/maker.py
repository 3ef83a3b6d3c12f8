r"""What makes random models: choices, sizes, weights, and the record of what was made."""

__all__ = ["CONTEXT", "ROWS", "Case", "Maker", "Source", "numbers"]

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn as nn
from torch import Tensor

T = TypeVar("T")

#: The number of features of a context, and of samples in a batch.
CONTEXT = 2
ROWS = 96

DTYPES = [torch.float32] * 14 + [torch.float64] * 3 + [torch.bfloat16, torch.float16]


class Source:
    r"""Creates noise of at most a radius: within the box, on its faces, in its corners, at zero.

    Arguments:
        radius: The largest absolute value.
        dtype: The dtype of noise that is asked for without one.
    """

    def __init__(self, radius: float, dtype: torch.dtype) -> None:
        self.radius, self.dtype = radius, dtype
        self.given: list[Tensor] = []
        self.again: Iterator[Tensor] | None = None  # what is given in place of new noise

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.again is not None:
            z = next(self.again)
        else:
            z = self.radius * _cube(shape).to(dtype or self.dtype)
            self.given.append(z)
        return z.reshape(shape).clone()

    def near(self, row: int) -> "Source":
        r"""Returns a source of what this one gave in a row, with some of the signs turned."""
        source = Source(self.radius, self.dtype)
        turned = []
        for z in self.given:
            sign = torch.where(torch.rand(z.shape) < 0.1, -1.0, 1.0).to(z.dtype)
            turned.append(z[row : row + 1] * sign)
        source.again = iter(turned)
        return source

    def repeated(self) -> "Source":
        r"""Returns a source of the same noise again."""
        source = Source(self.radius, self.dtype)
        source.again = iter(self.given)
        return source

    def patched(self) -> Any:
        r"""Lets what draws normal numbers get this noise in their place."""

        def randn(*size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            return self(*shape, dtype=dtype)

        def normal(mean: Tensor, std: Any, *_: Any, **__: Any) -> Tensor:
            return mean + std * self(*mean.shape, dtype=mean.dtype)

        def fill(t: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
            return t.copy_(mean + std * self(*t.shape, dtype=t.dtype))

        stack = ExitStack()
        stack.enter_context(patch.multiple(torch, randn=randn, normal=normal))
        stack.enter_context(patch.object(Tensor, "normal_", fill))
        return stack


def _cube(shape: Sequence[int]) -> Tensor:
    r"""Points of the cube of a half side of one, and of its faces, edges and corners."""
    z = 2 * torch.rand(shape, dtype=torch.float64) - 1
    if not z.numel():
        return z
    kind = torch.rand(len(z), *(1,) * (z.dim() - 1))
    corner = torch.where(z < 0, -1.0, 1.0)
    face = torch.where(torch.rand_like(z) < 0.5, corner, z)
    alike = torch.where(torch.rand_like(kind) < 0.5, -torch.ones_like(z), 1.0)
    z = torch.where(kind < 0.75, corner, torch.where(kind < 0.85, face, z))
    z = torch.where(kind > 0.93, alike, z)
    return torch.where(kind > 0.98, torch.zeros_like(z), z)


@dataclass
class Case:
    r"""A model, and how it is sampled.

    Arguments:
        model: What is certified.
        draw: The samples of noise and of a context.
        context: The shapes of the tensors of the context, without the rows; empty for none.
        listed: Whether the context is a list even of one tensor.
        dtype: The dtype of the model.
        made: The classes of all layers in it.
        tampered: How it was tampered with, in words; empty if it was not.
        cuts: Whether it cuts infinite contexts, such that they are no excuse for NaN.
    """

    model: Any
    draw: Callable[[Source, Any], Tensor]
    context: list[tuple[int, ...]] = field(default_factory=list)
    listed: bool = False
    dtype: torch.dtype = torch.float32
    made: list[type] = field(default_factory=list)
    tampered: str = ""
    cuts: bool = False


class Maker:
    r"""Creates choices by a source of randomness, and records the layers that are made by them.

    Arguments:
        random: The source, which determines all.
        wild: Whether constants may be far from one, singular or negative.
        wanted: A class that shall be made wherever it can be.
    """

    def __init__(self, random: Random, wild: bool, wanted: type | None = None) -> None:
        self.random, self.wild, self.wanted = random, wild, wanted
        self.made: list[type] = []
        self.depth = 0
        self.context = CONTEXT  # the number of features that layers are told; none if 0
        self.tails: str | None = None  # those that all splines of a host shall have
        torch.manual_seed(random.randint(0, 2**31 - 1))

    def pick(self, options: Sequence[T]) -> T:
        r"""Returns one of several."""
        return options[self.random.randint(0, len(options) - 1)]

    def flip(self, probability: float = 0.5) -> bool:
        r"""Returns true with a probability."""
        return self.random.randint(1, 1000) <= 1000 * probability

    def integer(self, least: int, most: int) -> int:
        r"""Returns an integer of a range, both ends included."""
        return self.random.randint(least, most)

    def note(self, layer: T) -> T:
        r"""Records a layer."""
        self.made.append(type(layer))
        return layer

    def positive(self) -> float:
        r"""Returns a size, of a box, say."""
        if self.wild and self.flip(0.2):
            return 10.0 ** self.integer(-9, 9)
        return self.pick([0.1, 0.5, 1.0, 3.0, 5.0])

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        r"""Returns constants."""
        t = numbers(shape, self.pick(KINDS) if self.wild and self.flip(0.4) else "normal")
        return t.to(dtype)

    def raw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        r"""Returns what a network may say: anything that is no NaN."""
        scale = self.pick([0.0, 1.0, 30.0, 1e4, 1e30, math.inf])
        t = torch.randn(shape)
        return (t.sign() * scale if math.isinf(scale) else t * scale).to(dtype)

    def spread(self, module: nn.Module) -> nn.Module:
        r"""Gives a module other weights: none at their start, some of them far out."""
        loud = self.pick([1.0, 1.0, 10.0, 1e3]) if self.wild else self.pick([1.0, 1.0, 3.0])
        still = self.flip(0.1)
        with torch.no_grad():
            for name, p in [*module.named_parameters(), *module.named_buffers()]:
                buffer = not isinstance(p, nn.Parameter)
                if not p.is_floating_point() or (buffer and not self._is_constant(name)) or still:
                    continue
                if self.wild and self.flip(0.15):
                    t = numbers(p.shape, self.pick(KINDS))
                    p.copy_(t.abs() if "var" in name else t)
                elif not buffer and p.numel() and any(s in name for s in NETWORKS):
                    p.add_(0.3 * torch.randn_like(p)).mul_(loud)
                elif not buffer:
                    p.add_(0.2 * torch.randn_like(p))
        return module

    def _is_constant(self, name: str) -> bool:
        return name.rpartition(".")[-1] in CONSTANTS and (self.wild or "running" in name)


#: Buffers that hold constants of a layer.
CONSTANTS = {"running_mean", "running_var", "_shift", "_scale", "rotation"}

#: Parts of names of networks, which may say anything.
NETWORKS = ("net", "hyper", "injector", "first", "rest", "param_map", "noise", "final", "blocks")

KINDS = [
    "large",
    "small",
    "zero",
    "one",
    "negative",
    "all sizes",
    "alike",
    "nearly alike",
    "spike",
]


def numbers(shape: Sequence[int], kind: str) -> Tensor:
    r"""Returns constants of a kind, in float32.

    Arguments:
        shape: The shape.
        kind: One of :data:`KINDS`, or ``"normal"``.
    """
    t = torch.randn(tuple(shape))
    match kind:
        case "large":
            return t * 10.0 ** torch.randint(1, 31, ()).item()
        case "small":
            return t * 10.0 ** -torch.randint(1, 31, ()).item()
        case "zero":
            return torch.zeros_like(t)
        case "one":
            return torch.ones_like(t)
        case "negative":
            return -t.abs()
        case "all sizes":
            return t * 10.0 ** (20 * torch.rand_like(t) - 10)
        case "alike" | "nearly alike":
            if t.dim() and t.numel():
                noise = t.clone()
                t[:] = t[:1].clone()
                if kind == "nearly alike":
                    t = t + 10.0 ** -torch.randint(2, 9, ()).item() * noise
            return t
        case "spike":
            if t.numel():
                t.view(-1)[torch.randint(t.numel(), ())] *= 1e6
            return t
        case _:
            return t
