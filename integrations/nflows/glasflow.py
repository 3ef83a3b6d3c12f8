r"""How glasflow's layers are bounded, sampled and migrated: those of its fork of nflows, and its
own flows, which have no embedding network and call the context *conditional*."""

__all__: list[str] = []

from importlib import import_module
from typing import Any

from torch import Tensor

from flowguard.bounds import rule
from flowguard.bounds.attack import Sampler, Tensors, sampler

from . import rules as nflows
from .bases import farthest
from .migration import operate_on


def _sample(model: Any, context: Tensors) -> tuple[Sampler, Tensors]:
    base = model._distribution
    mixed = nflows.is_mixture(base)
    if not (mixed or nflows.is_base(base, "StandardNormal")):
        raise nflows.unknown_noise(base)

    def draw(z: Tensor, y: Tensors) -> Any:
        if mixed:
            z = farthest(base._made, z, y)
        return model._transform.inverse(z, context=y)[0]

    shape = (base._made.features,) if mixed else base._shape
    like = context if isinstance(context, Tensor) else context[0]
    return draw, like.new_zeros(like.shape[0], *shape)


operate_on("glasflow.nflows")
nflows.register("glasflow.nflows")
FLOW = import_module("glasflow.flows.base").Flow
rule(FLOW)(nflows.flow_steps)
sampler.register(FLOW)(_sample)
