r"""The migration: an existing flow in, a robust flow out that starts where the old one was.

The core knows no library. An adapter derives from :class:`Surgeon` what it takes to operate on the
flows of its library, and registers it with :func:`surgeon`; it is looked for in
``flowguard.integrations._<library>_migrate``.
"""

__all__ = ["Migration", "Replacement", "Site", "Surgeon", "migrate", "surgeon"]

import abc
import copy
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from flowguard._imitate import AnyTransform, RescaledSpline, compare, imitate, units
from flowguard.certificate import Certificate, certify
from flowguard.ood.embeddings import evaluating
from flowguard.transforms import SHIFT_BOUND

Model = TypeVar("Model", bound=nn.Module)

FIT_ROWS = 4096  # calibration pairs that the imitation is fitted on; fine-tuning takes all
FIT_NUMBERS = 2**20  # numbers that these may have in all, so that images fit into the memory


class Site(abc.ABC):
    r"""A layer whose univariate map is replaced.

    Arguments:
        name: The name of the layer within the model.
        kind: What it is, in words.
    """

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind

    @abc.abstractmethod
    def listen(self) -> AbstractContextManager[None]:
        r"""Remembers, within the context, what the layer's map is asked in a pass of the model."""

    @property
    @abc.abstractmethod
    def inputs(self) -> Tensor:
        r"""The inputs of the univariate map that were heard, with shape :math:`(N, D)`."""

    @abc.abstractmethod
    def old(self, rows: Tensor | slice) -> AnyTransform:
        r"""Returns the old map of these rows of the inputs, in the direction heard."""

    def carry(self, slope: float | None) -> bool:
        r"""Carries the old map over, knot by knot, if it is a spline; returns whether it was."""
        return False

    @abc.abstractmethod
    def replace(self, spline: RescaledSpline) -> list[nn.Parameter]:
        r"""Puts the spline into the layer, with all-zero parameters, and returns what computes
        these: the hidden layers are kept."""

    @abc.abstractmethod
    def new(self, rows: Tensor | slice) -> AnyTransform:
        r"""Returns the new map of these rows of the inputs."""


class Surgeon(abc.ABC):
    r"""What it takes to operate on a model; adapters derive one for their library.

    Arguments:
        model: The model, a copy that may be changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abc.abstractmethod
    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        r"""Returns the log-density of each row."""

    @abc.abstractmethod
    def sites(self) -> list[Site]:
        r"""Returns the layers to replace."""

    @abc.abstractmethod
    def others(self) -> list[str]:
        r"""Names the layers that are kept as they are."""


@singledispatch
def surgeon(model: Any) -> Surgeon:
    r"""Returns who operates on a model. Adapters register the flows of their library here.

    Arguments:
        model: The model.
    """
    before = len(surgeon.registry)
    for library in {c.__module__.partition(".")[0] for c in type(model).__mro__}:
        name = f"flowguard.integrations._{library}_migrate"
        if library.isidentifier() and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    if len(surgeon.registry) > before:
        return surgeon(model)
    raise TypeError(
        f"flowguard does not know how to migrate {type(model).__name__}: give a flow of a library"
        " that it has an adapter for"
    )


@dataclass(frozen=True)
class Replacement:
    r"""A layer that was replaced.

    Arguments:
        name: The name of the layer within the model.
        before: What it was.
        after: What it is.
        error: The root mean square error of the imitation on the calibration batch, in standard
            deviations of the layer's output.
        ladj_error: The mean absolute error of the logarithm of its slope.
    """

    name: str
    before: str
    after: str
    error: float
    ladj_error: float


@dataclass(frozen=True)
class Migration:
    r"""The report of a migration. It prints as a table.

    Arguments:
        replaced: The layers that were replaced.
        kept: The names of the layers that were not.
        nll_before: The negative log-likelihood of the given pairs before, in nats.
        nll_swapped: The same after the layers were replaced.
        nll_after: The same after fine-tuning; :py:`None` without.
        certificate_before: The certificate before; see :func:`flowguard.certify`.
        certificate_after: The certificate after.
    """

    replaced: tuple[Replacement, ...]
    kept: tuple[str, ...]
    nll_before: float
    nll_swapped: float
    nll_after: float | None
    certificate_before: Certificate
    certificate_after: Certificate

    def __str__(self) -> str:
        lines = [
            f"{r.name}: {r.before} -> {r.after}, error {r.error:.3g} (log-slope {r.ladj_error:.3g})"
            for r in self.replaced
        ]
        lines += [f"{name}: kept" for name in self.kept]
        nll = f"NLL {self.nll_before:.4f} nats before, {self.nll_swapped:.4f} with the new layers"
        if self.nll_after is not None:
            nll += f", {self.nll_after:.4f} after fine-tuning"
        lines.append(nll)
        for when, certificate in (
            ("before", self.certificate_before),
            ("after", self.certificate_after),
        ):
            what = (
                f"certified, |x| <= {certificate.bound(4.0):.4g} for noise up to 4"
                if certificate.certified
                else "not certified"
            )
            lines.append(f"{when}: {what}")
        return "\n".join(lines)


def migrate(
    model: Model,
    x: Tensor,
    context: Any = None,
    *,
    steps: int = 0,
    lr: float = 1e-3,
    batch_size: int = 256,
    bins: int = 8,
    bound: float = 5.0,
    shift_bound: float | None = SHIFT_BOUND,
    slope: float | None = 1e-3,
    fit_steps: int = 200,
) -> tuple[Model, Migration]:
    r"""Makes a trained flow robust.

    Every conditional affine map becomes a :class:`flowguard.RobustSpline`. The hidden layers of
    the networks that compute its parameters are kept, their last layer is rebuilt, such that the
    new flow *imitates* the old one: each feature is brought to the units that the calibration
    pairs have there, a constant affine map, and the spline follows what the old map did beyond
    that, on the pairs and on samples. Where the old map leaves the box of the spline, it cannot
    follow, which is the point.

    Every rational-quadratic spline of the host becomes one too, without a shift and with the same
    knots, as far as `slope` allows: exactly, up to rounding, in the ordinary case.

    The model itself is not changed. Its mode (training or evaluation) is that of the copy.

    Arguments:
        model: The trained flow.
        x: Calibration data, best some thousand pairs that the flow was trained on, with shape
            :math:`(N, D)`.
        context: Their contexts, with :math:`N` rows, or :py:`None`.
        steps: The number of fine-tuning steps, with Adam on the calibration pairs.
        lr: The learning rate of these steps; it falls to zero.
        batch_size: The number of pairs for each of these steps.
        bins: The number of bins :math:`K` of the splines that replace affine maps.
        bound: The bound :math:`B` of their box, in standard deviations of the features.
        shift_bound: The bound of their shift, in standard deviations of the features.
        slope: The least slope of all splines.
        fit_steps: The number of steps of the imitation, for each layer.

    Returns:
        The robust copy and the report.

    Raises:
        TypeError: If no adapter knows the model.
        ValueError: If there are no calibration pairs, or not as many contexts as data.

    Example:
        >>> flow = zuko.flows.MAF(2, 3)  # doctest: +SKIP
        >>> robust, report = flowguard.migrate(flow, x, context, steps=200)  # doctest: +SKIP
        >>> report.certificate_after.certified  # doctest: +SKIP
        True
    """
    _check(x, context, steps, batch_size)
    result = copy.deepcopy(model)
    operation = surgeon(result)
    sites, kept = operation.sites(), operation.others()
    before, certificate = _nll(operation, x, context), certify(model)

    rows = torch.randperm(len(x), device=x.device)[: _at_once(x)]
    with ExitStack() as stack, evaluating(result):
        for site in sites:
            stack.enter_context(site.listen())
        operation.log_prob(x[rows], _rows(context, rows))
    options = {"bins": bins, "bound": bound, "shift_bound": shift_bound, "slope": slope}
    replaced = [_replace(site, options, fit_steps) for site in sites]

    swapped = _nll(operation, x, context)
    after = None
    if steps > 0:
        _finetune(operation, x, context, steps, lr, batch_size)
        after = _nll(operation, x, context)
    report = Migration(
        tuple(replaced), tuple(kept), before, swapped, after, certificate, certify(result)
    )
    return result, report


def _replace(site: Site, options: dict[str, Any], fit_steps: int) -> Replacement:
    x, everything = site.inputs, slice(None)
    if not site.carry(options["slope"]):
        with torch.no_grad():
            y = site.old(everything)(x)
        spline = RescaledSpline(*units(x), *units(y), **options)
        imitate(site.old, site.new, site.replace(spline), x, steps=fit_steps)
    new = site.new(everything)
    taught = compare(site.old(everything), new, x)
    return Replacement(site.name, site.kind, repr(new), *taught)


def _finetune(
    operation: Surgeon, x: Tensor, context: Any, steps: int, lr: float, batch_size: int
) -> None:
    parameters = [p for p in operation.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rows in _batches(len(x), batch_size, steps, x.device):
        optimizer.zero_grad()
        (-operation.log_prob(x[rows], _rows(context, rows)).mean()).backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def _batches(n: int, size: int, steps: int, device: torch.device) -> Iterator[Tensor]:
    r"""Yields rows, `steps` times, in epochs without repetition."""
    size = min(size, n)
    order = torch.randperm(n, device=device)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(n, device=device)
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def _nll(operation: Surgeon, x: Tensor, context: Any) -> float:
    with evaluating(operation.model):
        total = sum(
            operation.log_prob(x[rows], _rows(context, rows)).double().sum().item()
            for rows in torch.arange(len(x), device=x.device).split(_at_once(x))
        )
    return -total / len(x)


def _at_once(x: Tensor) -> int:
    return max(1, min(FIT_ROWS, FIT_NUMBERS // max(1, x[0].numel())))


def _rows(context: Any, rows: Tensor) -> Any:
    if isinstance(context, list | tuple):  # one for each level
        return type(context)(_rows(c, rows) for c in context)
    return None if context is None else context[rows]


def _check(x: Tensor, context: Any, steps: int, batch_size: int) -> None:
    if not isinstance(x, Tensor) or x.dim() < 2 or len(x) < 2:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of calibration data, one row for each; got {given}")
    for c in context if isinstance(context, list | tuple) else (context,):
        if c is not None and len(c) != len(x):
            raise ValueError(
                f"there must be one context for each row of x; got {len(c)} and {len(x)}"
            )
    if steps < 0 or batch_size < 1:
        raise ValueError(
            f"steps must not be negative, batch_size positive; got {steps} and {batch_size}"
        )
