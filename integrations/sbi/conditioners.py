r"""Guards within estimators: embedding networks that hold a :class:`flowguard.OODConditioner`.

sbi trains and validates an estimator before a guard in it can know anything. Until it does, it lets
everything pass here.
"""

__all__ = ["LenientEmbedding", "calibrate", "lenient"]

import warnings
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowguard.hosts import opened
from flowguard.numerics import evaluating
from flowguard.ood import OODConditioner, unguarded
from flowguard.ood.conditioner import conditioners

from .guard import GuardedPosterior

P = TypeVar("P")

HELD_OUT = 0.25  # the share of the simulations that calibrate
BATCH = 1024

LATER = (
    "the OODConditioner in embedding_net knows no simulations yet: until it does, every observation"
    " passes. After training call flowguard.integrations.sbi.calibrate(posterior, x)"
)


class LenientEmbedding(nn.Module):
    r"""Creates the embedding network whose guards let everything pass until they are calibrated.

    Arguments:
        net: The network, which is or holds :class:`flowguard.OODConditioner`\ s.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        r"""Returns the embedding of observations, as the network makes it."""
        if all(guard.calibrated for guard in conditioners(self.net).values()):
            return self.net(x)
        with unguarded(self.net):
            return self.net(x)


def lenient(net: nn.Module) -> nn.Module:
    r"""Returns an embedding network that can be trained by sbi: as it is, unless there are guards in
    it that are not calibrated.

    Arguments:
        net: The network.
    """
    if isinstance(net, LenientEmbedding) or all(
        guard.calibrated for guard in conditioners(net).values()
    ):
        return net
    warnings.warn(LATER, stacklevel=3)
    return LenientEmbedding(net)


def calibrate(posterior: P, x: Tensor, *, held_out: float = HELD_OUT) -> P:
    r"""Fits and calibrates the guards in the embedding network of a posterior on simulations.

    Each guard gets what it gets within the network: standardised, and after the layers before it.

    Arguments:
        posterior: The posterior or the estimator, after its training; its guards are changed.
        x: The simulated observations, with shape :math:`(N, *)`, in random order; best some that
            the training has not seen.
        held_out: The share of them, at the end, that calibrates and is not fitted to.

    Returns:
        The same posterior.

    Raises:
        ValueError: If there is no guard, or there are too few simulations.

    Example:
        >>> from sbi.inference.posteriors import DirectPosterior
        >>> from sbi.neural_nets import posterior_nn
        >>> from sbi.utils import BoxUniform
        >>> prior = BoxUniform(-torch.ones(2), torch.ones(2))
        >>> theta = prior.sample((400,))
        >>> x = theta + 0.1 * torch.randn(400, 2)
        >>> guard = flowguard.OODConditioner(nn.Linear(2, 3), policy="report", alpha=0.05)
        >>> build = posterior_nn("maf", embedding_net=lenient(guard))
        >>> posterior = calibrate(DirectPosterior(build(theta, x), prior), x)
        >>> guard.calibrated
        True
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1; got {held_out}")
    if isinstance(posterior, GuardedPosterior):
        raise ValueError(
            "guards in the embedding network are calibrated before the posterior is protected; got "
            f"a {type(posterior).__name__}: calibrate(posterior, x) first, then protect it"
        )
    estimator = opened(posterior).module
    guards = conditioners(estimator)
    if not guards:
        raise ValueError(
            "the embedding network must hold an OODConditioner; got a"
            f" {type(posterior).__name__} without any: to guard it from outside, use"
            " flowguard.integrations.sbi.protect"
        )
    rows = len(x) - round(held_out * len(x))
    if not 2 <= rows < len(x):
        raise ValueError(f"there must be simulations to fit and to calibrate; got {len(x)} rows")
    for name, guard in guards.items():
        fed = _fed(estimator, guard, x)
        if len(fed) != len(x):
            raise ValueError(
                f"a guard must get one row for each simulation; {name!r} got {len(fed)} of {len(x)}"
            )
        guard.fit(fed[:rows], progress=False)
        guard.calibrate(fed[rows:], progress=False)
    return posterior


def _fed(estimator: Any, guard: OODConditioner, x: Tensor) -> Tensor:
    r"""What a guard gets when the estimator embeds observations."""
    heard: list[Tensor] = []

    def hear(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard.append(inputs[0].detach())

    device = next((p.device for p in estimator.parameters()), x.device)
    with ExitStack() as stack:
        stack.callback(guard.register_forward_pre_hook(hear).remove)
        stack.enter_context(unguarded(estimator))
        stack.enter_context(evaluating(estimator))
        for member in getattr(estimator, "estimators", [estimator]):
            for batch in x.to(device).split(BATCH):
                member.embedding_net(batch)
    return torch.cat(heard) if heard else x[:0]
