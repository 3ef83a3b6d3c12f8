r"""What stands between an observation and the network that is conditioned on it."""

__all__ = ["Watch", "deadline", "merge_trials"]

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from flowguard.numerics import evaluating
from flowguard.ood import OODConditioner, OODReport, unguarded
from flowguard.ood.fingerprint import Seal, fingerprint
from flowguard.ood.levels import Level
from flowguard.ood.state import supports_float64

#: How many simulations are remembered: at most, in all numbers of theirs, and at least.
MOST, NUMBERS, LEAST = 4096, 2**20, 64

#: When the call that runs in this thread has to end, and what to say then.
_deadline: ContextVar[tuple[float, str] | None] = ContextVar("flowguard_deadline", default=None)


@contextmanager
def deadline(seconds: float | None, message: str) -> Iterator[None]:
    r"""Ends what asks a :class:`Watch` again after so many seconds, within and in this thread.

    Rejection sampling draws from the network until enough draws are accepted, which can be never.

    Arguments:
        seconds: The seconds; :py:`None` for no end.
        message: What the :class:`RuntimeError` says.
    """
    end = None if seconds is None else (time.monotonic() + seconds, message)
    token = _deadline.set(end)
    try:
        yield
    finally:
        _deadline.reset(token)


def merge_trials(p: Tensor) -> Tensor:
    r"""Returns one p-value for trials of one observation, whatever their dependence.

    .. math:: p = \min(1, 2 \min(n \, p_{(1)}, 2 \, p_{(\lceil n/2 \rceil)}))

    Bonferroni's rule finds one odd trial, Rüger's a drift of all; the factor pays for having both.

    References:
        | Combining p-values via averaging (Vovk & Wang, 2020)
        | https://arxiv.org/abs/1212.4966

    Arguments:
        p: The p-values of the trials, with shape :math:`(n)`.

    Returns:
        The p-value, with shape :math:`()`; that of the trial itself if there is one only.
    """
    if len(p) == 1:
        return p[0]
    ordered = p.sort().values
    middle = ordered[(len(p) + 1) // 2 - 1]
    return (2 * torch.minimum(len(p) * ordered[0], 2 * middle)).clamp(max=1)


class Watch(nn.Module):
    r"""Creates a network that gives what another one gives, and knows how strange that is.

    It stands where the other network stood, and costs nothing but for :attr:`shrinks`, which moves
    flagged embeddings to the simulations; others stay as they are, bit for bit. Embeddings are
    standardised before they are scored, so that features of any scale count.

    Arguments:
        net: The network, from observations to embeddings; the identity if :py:`None`.
        alpha: The share of observations like the simulations that may be flagged.
    """

    mean: Tensor
    scale: Tensor
    known: Tensor
    whitened: Tensor

    def __init__(self, net: nn.Module | None, alpha: float) -> None:
        super().__init__()
        self.net = nn.Identity() if net is None else net
        self.conditioner = OODConditioner(None, "report", alpha=alpha)
        for name in ("mean", "scale", "known", "whitened"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))
        self.shrinks = False
        self.threshold = math.inf
        self.event = torch.Size()
        r"""The shape of one embedding."""
        self._fingerprint = ""
        self._seal = Seal("embedding net")

    def get_extra_state(self) -> dict[str, Any]:
        r"""Returns what the fit has found beside tensors, to be saved with these."""
        found = {"threshold": self.threshold, "event": list(self.event)}
        return {**found, "fingerprint": self._fingerprint}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        r"""Takes on what :meth:`get_extra_state` has saved.

        Arguments:
            state: What it has saved.
        """
        self.threshold, self.event = state["threshold"], torch.Size(state["event"])
        self._fingerprint = state["fingerprint"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, buffer in self._buffers.items():  # whose shapes are those of another fit
            loaded = state_dict.get(prefix + name)
            if buffer is not None and isinstance(loaded, Tensor):
                self._buffers[name] = buffer.new_empty(loaded.shape, dtype=loaded.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        r"""Returns the embeddings of observations, moved where they must be.

        Arguments:
            x: The observations, with shape :math:`(N, *)`.

        Returns:
            The embeddings, with shape :math:`(N, C)`.

        Raises:
            RuntimeError: If the time for an answer is over.
        """
        end = _deadline.get()
        if end is not None and time.monotonic() >= end[0]:
            raise RuntimeError(end[1])
        embedding = self.net(x)
        return self.moved(embedding) if self.shrinks else embedding

    def moved(self, embedding: Tensor) -> Tensor:
        r"""Returns embeddings with those that are flagged moved to the simulations.

        Each goes back along its Mahalanobis radius to the calibrated threshold, and from there to
        the nearest simulation of the fit: the ellipsoid alone also holds places where none is.

        Arguments:
            embedding: The embeddings, with shape :math:`(*, *E)`, :math:`E` that of one.
        """
        rows = self._standardised(embedding.detach())
        flagged = self._level.scores(rows) > self.threshold
        if not bool(flagged.any()):
            return embedding
        # Samplers ask for the same observation many times over.
        outside, place = rows[flagged].unique(dim=0, return_inverse=True)
        moved = embedding.reshape(rows.shape).clone()
        moved[flagged] = self.known[self._nearest(outside)].to(moved)[place]
        return moved.reshape(embedding.shape)

    def _nearest(self, outside: Tensor) -> Tensor:
        r"""Returns the places of the simulations that are nearest to rows on the threshold."""
        on = self._level.pull(outside, self._level.scores(outside), self.threshold)
        return torch.cat(
            [torch.cdist(r, self.whitened).argmin(dim=1) for r in self._whiten(on).split(256)]
        )

    @property
    def _level(self) -> Level:
        ((_, level),) = self.conditioner.guard.items()
        return level

    def _whiten(self, rows: Tensor) -> Tensor:
        mean, whitening = self._level.gaussian.kernel(rows.device, rows.dtype)
        return (rows.to(mean) - mean) @ whitening.T

    @torch.no_grad()
    def embed(self, x: Tensor, heeded: bool = False) -> Tensor:
        r"""Returns what the network makes of observations, in evaluation mode and in parts.

        Arguments:
            x: The observations, with shape :math:`(N, *X)`.
            heeded: Whether guards in the network act; if not, they are looked past.
        """
        with evaluating(self.net), nullcontext() if heeded else unguarded(self.net):
            return torch.cat([self.net(part) for part in x.split(1024)])

    def fit(self, fitted: Tensor, held_out: Tensor) -> None:
        r"""Fits and calibrates it.

        Arguments:
            fitted: The embeddings to fit, with shape :math:`(N, *E)`.
            held_out: The embeddings to calibrate with.

        Raises:
            ValueError: If an embedding is not finite.
        """
        self.event = fitted.shape[1:]
        flat = fitted.flatten(1).to(_exact(fitted))
        deviation, self.mean = torch.std_mean(flat, dim=0)
        self.scale = torch.where(deviation > 0, deviation, 1.0)
        self.conditioner.fit(self._standardised(fitted), progress=False)
        self.conditioner.calibrate(self._standardised(held_out), progress=False)
        report = self.conditioner.score(self._standardised(fitted))
        self.threshold = report.levels[self.conditioner.guard.names[0]].threshold
        ordinary = fitted.flatten(1)[~report.flagged]
        self.known = ordinary[: max(LEAST, min(MOST, NUMBERS // ordinary.shape[1]))]
        self.whitened = self._whiten(self._standardised(self.known))
        self._fingerprint = fingerprint(self.net)

    def score(self, embedding: Tensor) -> OODReport:
        r"""Returns the report on embeddings, one level with a row for each.

        Arguments:
            embedding: The embeddings, with shape :math:`(N, *E)`.

        Raises:
            RuntimeError: If the weights of the network are not those of the fit.
        """
        self._seal.check(self.net, self._fingerprint)
        return self.conditioner.score(self._standardised(embedding))

    def _standardised(self, embedding: Tensor) -> Tensor:
        rows = embedding.reshape(-1, max(1, self.event.numel())).to(_exact(embedding))
        return (rows - self.mean) / self.scale


def _exact(t: Tensor) -> torch.dtype:
    r"""A mean much larger than the deviation would drown it in float32."""
    return torch.float64 if supports_float64(t.device) else torch.float32
