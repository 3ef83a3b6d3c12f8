r"""How glasflow's layers are bounded and sampled: those of its fork of nflows, and its own flows,
which have no embedding network and call the context *conditional*."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from flowguard.adversary import Sampler, Tensors, sampler
from flowguard.bounds import rule

from . import _nflows_bounds as nflows

__all__: list[str] = []


def _sample(model: Any, context: Tensors) -> tuple[Sampler, Tensors]:
    base = model._distribution
    if not nflows._is(base, "StandardNormal"):
        raise nflows.unknown_noise(base)

    def draw(z: Tensor, y: Tensors) -> Any:
        return model._transform.inverse(z, context=y)[0]

    like = context if isinstance(context, Tensor) else context[0]
    return draw, like.new_zeros(like.shape[0], *base._shape)


nflows.register("glasflow.nflows")
FLOW = import_module("glasflow.flows.base").Flow
rule(FLOW)(nflows._flow)
sampler.register(FLOW)(_sample)
