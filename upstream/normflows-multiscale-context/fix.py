r"""A multiscale flow with a context, and priors of what is split off, for normflows 1.7.3.

    with applied():
        flow = MultiscaleFlow(q0, flows, merges, class_cond=False)
        flow.log_prob(x, context=[coarse, fine])
        flow.sample(8, context=[coarse, fine])

Builds on the contribution `normflows-context`, whose folder it needs beside its own, and puts it
in place too.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from normflows import MultiscaleFlow
from torch import Tensor

Context = Tensor | Sequence[Tensor] | None


def constructor(released: Callable) -> Callable:
    def __init__(
        self: MultiscaleFlow, *args: Any, condition_priors: bool = False, **options: Any
    ) -> None:
        r"""As before, and:

        Args:
          condition_priors: Flag, whether the base of what is split off is given what is kept
        """
        released(self, *args, **options)
        self.condition_priors = condition_priors

    return __init__


def at_levels(self: MultiscaleFlow, context: Context) -> list:
    r"""The context of each level, coarsest first as `q0` and `flows`; a tensor is that of all."""
    if context is None or isinstance(context, Tensor):
        return [context] * self.num_levels
    if len(context) != self.num_levels:
        raise ValueError(
            f"context must be a tensor, or one for each of the {self.num_levels} levels; "
            f"got {len(context)}"
        )
    return list(context)


def given(context: Any) -> dict[str, Any]:
    r"""The keyword of a layer or a base: none where there is no context, as in older layers."""
    return {} if context is None else {"context": context}


def prior(self: MultiscaleFlow, level: int, kept: Any, context: Any, y: Any) -> dict[str, Any]:
    r"""What the base of a level is given: classes, the context, what is kept, or the latter two."""
    if getattr(self, "condition_priors", False) and level > 0:  # none in older pickles
        context = kept if context is None else (kept, context)
    return given(context) | ({"y": y} if self.class_cond else {})


def log_prob(self: MultiscaleFlow, x: Tensor, y: Any = None, context: Context = None) -> Tensor:
    z, log_q = x, x.new_zeros(len(x))
    levels = at_levels(self, context)
    if self.transform is not None:
        z, log_det = self.transform.inverse(z)
        log_q = log_q + log_det
    for i in reversed(range(self.num_levels)):
        for flow in reversed(self.flows[i]):
            z, log_det = flow.inverse(z, **given(levels[i]))
            log_q = log_q + log_det
        own = z
        if i > 0:
            (z, own), log_det = self.merges[i - 1].inverse(z)
            log_q = log_q + log_det
        log_q = log_q + self.q0[i].log_prob(own, **prior(self, i, z, levels[i], y))
    return log_q


def sample(
    self: MultiscaleFlow,
    num_samples: int = 1,
    y: Any = None,
    temperature: float | None = None,
    context: Context = None,
) -> tuple[Tensor, Tensor]:
    z, log_q = None, 0
    with tempered(self, temperature):
        for i, own_context in enumerate(at_levels(self, context)):
            own, log_p = self.q0[i](num_samples, **prior(self, i, z, own_context, y))
            log_q = log_q + log_p
            z, log_det = (own, 0) if i == 0 else self.merges[i - 1]([z, own])
            log_q = log_q - log_det
            for layer in self.flows[i]:
                z, log_det = layer(z, **given(own_context))
                log_q = log_q - log_det
    if self.transform is None:
        return z, log_q
    x, log_det = self.transform(z)
    return x, log_q - log_det


@contextmanager
def tempered(self: MultiscaleFlow, temperature: float | None) -> Iterator[None]:
    r"""The bases at a temperature, which an error does not leave behind."""
    if temperature is None:
        yield
        return
    self.set_temperature(temperature)
    try:
        yield
    finally:
        self.reset_temperature()


def forward_and_log_det(
    self: MultiscaleFlow, z: Sequence[Tensor], context: Context = None
) -> tuple[Tensor, Tensor]:
    levels = at_levels(self, context)
    x, total = z[0], z[0].new_zeros(len(z[0]))
    for i in range(self.num_levels):
        if i > 0:
            x, log_det = self.merges[i - 1]([x, z[i]])
            total = total + log_det
        for flow in self.flows[i]:
            x, log_det = flow(x, **given(levels[i]))
            total = total + log_det
    if self.transform is not None:
        x, log_det = self.transform(x)
        total = total + log_det
    return x, total


def inverse_and_log_det(
    self: MultiscaleFlow, x: Tensor, context: Context = None
) -> tuple[list[Tensor], Tensor]:
    levels = at_levels(self, context)
    total = x.new_zeros(len(x))
    if self.transform is not None:
        x, log_det = self.transform.inverse(x)
        total = total + log_det
    z: list = [None] * self.num_levels
    for i in reversed(range(self.num_levels)):
        for flow in reversed(self.flows[i]):
            x, log_det = flow.inverse(x, **given(levels[i]))
            total = total + log_det
        z[i] = x
        if i > 0:
            (x, z[i]), log_det = self.merges[i - 1].inverse(x)
            total = total + log_det
    return z, total


def forward(self: MultiscaleFlow, x: Tensor, y: Any = None, context: Context = None) -> Tensor:
    return -self.log_prob(x, y, context)


def forward_kld(self: MultiscaleFlow, x: Tensor, y: Any = None, context: Context = None) -> Tensor:
    return -torch.mean(self.log_prob(x, y, context))


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the methods into normflows, and takes them out again."""
    file = Path(__file__).parents[1] / "normflows-context" / "fix.py"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is needed, as this change builds on it: copy both folders, side by side"
        )
    spec = importlib.util.spec_from_file_location("fix_normflows_context", file)
    layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    ours = (log_prob, sample, forward_and_log_det, inverse_and_log_det, forward, forward_kld)
    methods = {method.__name__: method for method in ours}
    methods["__init__"] = constructor(MultiscaleFlow.__init__)
    with layers.applied(), patch.multiple(MultiscaleFlow, **methods):
        yield
