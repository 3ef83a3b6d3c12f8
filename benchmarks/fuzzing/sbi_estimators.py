r"""Estimators of sbi around flows of zuko, alone and as the mixture that an ensemble is."""

__all__ = ["ESTIMATORS", "case_of_sbi"]

from functools import partial
from typing import Any

import torch
import torch.nn as nn
from sbi.neural_nets.estimators import ZukoFlow
from torch import Tensor

from flowguard.integrations.sbi.estimators import Ensemble

from .lazy import flow_of_zuko
from .maker import CONTEXT, Case, Maker

ESTIMATORS = {Ensemble, ZukoFlow}


def case_of_sbi(m: Maker, dtype: torch.dtype) -> Case:
    r"""Returns an estimator, or a mixture of some.

    Arguments:
        m: What chooses.
        dtype: The dtype of the weights.
    """
    wanted, m.wanted, m.context = m.wanted, None, CONTEXT
    d = m.integer(2, 4)
    several = wanted is Ensemble or (wanted is None and m.flip(0.3))
    members = [_estimator(m, d) for _ in range(m.integer(2, 3) if several else 1)]
    weights = torch.full((len(members),), 1 / len(members))
    model: Any = m.note(Ensemble(members, weights)) if several else members[0]
    m.spread(model)
    model.to(dtype)
    m.wanted = wanted
    return Case(model, partial(_sample, members), [(CONTEXT,)], dtype=dtype)


def _estimator(m: Maker, d: int) -> Any:
    embedding = nn.Linear(CONTEXT, CONTEXT) if m.flip(0.2) else nn.Identity()
    return m.note(ZukoFlow(flow_of_zuko(m, d), embedding, torch.Size([d]), torch.Size([CONTEXT])))


def _sample(members: list[Any], noise: Any, context: Tensor) -> Tensor:
    with noise.patched():
        each = torch.stack([member.sample(torch.Size([]), context) for member in members])
    rows = torch.arange(each.shape[1])
    return each[torch.randint(len(members), rows.shape), rows]
