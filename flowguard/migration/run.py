r"""The course of a migration: listen, replace layer by layer, compare, fine-tune, report."""

__all__ = ["Plan", "hooked", "migrate", "typical"]

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.bounds.certificate import certify
from flowguard.bounds.holders import unwrapped
from flowguard.bounds.parts import gather
from flowguard.functional import FINE_SLOPE, check_bound, check_shift_bound, check_slope
from flowguard.hosts import opened
from flowguard.migration.imitate import SAME, SMALLEST, RescaledSpline, compare, imitate, units
from flowguard.migration.inscribe import single
from flowguard.migration.report import Migration, Replacement, SampleError
from flowguard.migration.surgeon import Site, Surgeon, surgeon
from flowguard.migration.wrapped import Wrapped
from flowguard.numerics import evaluating
from flowguard.ood import unguarded
from flowguard.transforms import SHIFT_BOUND

Model = TypeVar("Model")

FIT_ROWS = 4096  # calibration pairs that the imitation is fitted on; fine-tuning takes all
FIT_NUMBERS = 2**20  # numbers that these may have in all, so that images fit into the memory
NEVER_ASKED = "the calibration pairs do not reach it"
AS_ASKED = "additive, and left as asked"
PLANNED = "a robust map"
TRIED = 512  # samples that are made before and after
FARTHEST = 10.0  # standard deviations from the data within which samples are compared
ABSURD = 20.0  # by how many spreads an outlier is less likely than the median row
FEWEST = 20  # rows of which one may be an outlier
OUTLIERS = 0.01  # the share of rows up to which they are outliers, and not a part of the data
ROUNDINGS = 16  # units of rounding that a log-density may move by without a reason

Density = Callable[[Tensor, Any], Tensor]


def migrate(
    model: Model,
    x: Tensor | None = None,
    context: Any = None,
    *,
    calibration: Any = None,
    state_dict: Mapping[str, Any] | None = None,
    log_prob: Callable[[Any, Tensor, Any], Tensor] | None = None,
    additive: Literal["bound", "keep"] = "bound",
    dry_run: bool = False,
    steps: int = 0,
    lr: float = 1e-3,
    batch_size: int = 256,
    bins: int | None = None,
    bound: float = 5.0,
    shift_bound: float | None = SHIFT_BOUND,
    slope: float | None = FINE_SLOPE,
    fit_steps: int = 200,
) -> tuple[Model, Migration]:
    r"""Makes a trained flow robust.

    Every conditional affine map becomes a :class:`flowguard.RobustSpline`. The hidden layers of
    the networks that compute its parameters are kept, and the new flow *imitates* the old one:
    each feature is brought to the units that the calibration pairs have there, a constant affine
    map, and the spline follows what the old map did beyond that. Where the old map leaves the box
    of the spline, it cannot follow, which is the point.

    The old network is kept as a whole, and the affine map that it asks for is inscribed into the
    box of a spline of three bins: exactly, where slope and value at zero are within the range that
    the box has room for, which is chosen such that the calibration pairs lose as little likelihood
    as can be. With `bins`, the last layer of each of zuko's networks is rebuilt instead, for as
    many bins, and fitted in `fit_steps` steps: that can learn more, but loses some likelihood first.

    Every rational-quadratic spline of the host becomes one too, without a shift and with the same
    knots, as far as `slope` allows: exactly, up to rounding, in the ordinary case. A normal base
    whose mean and scale depend on the context is bounded such that nothing changes in the range
    that they have on the calibration pairs.

    Rows that the old flow finds absurd are *outliers*: at most one in a hundred, each of them less
    likely than the median row by twenty times what the least likely tenth of all rows is. They are
    left out of the calibration, of fine-tuning and of the figures, and the report tells their
    share, and the share of the rows that the new flow does not follow.

    Guards in the model, such as :class:`flowguard.OODConditioner`, score nothing meanwhile.

    The model itself is not changed. Its mode (training or evaluation) is that of the copy.

    Arguments:
        model: The trained flow, or any module that holds layers of one; of Pyro, a distribution;
            or what holds that, such as a posterior of sbi. What it holds is made robust then, in a
            copy of the same class.
        x: Calibration data, best some thousand pairs that the flow was trained on, with shape
            :math:`(N, D)`, or :math:`(N, C, H, W)` for images.
        context: Their contexts, with :math:`N` rows, or :py:`None`. If the model takes a list of
            contexts, as for each level of an image, a list.
        calibration: In place of both, the data, a pair :py:`(x, context)`, or batches of one of
            these, such as a data loader, all of which are taken.
        state_dict: The weights of the trained flow, if `model` only is its architecture.
        log_prob: How to get the log-density of each row, called with the model, data and contexts.
            By default, what the adapter knows of its library's flows.
        additive: What to do with couplings that only shift, where the adapter knows them:
            ``"bound"`` bounds the shift, ``"keep"`` leaves them.
        dry_run: If :py:`True`, the model itself is returned, with the report of what would become
            of it. Without calibration pairs the report tells the layers only.
        steps: The number of fine-tuning steps, with Adam on the calibration pairs.
        lr: The learning rate of these steps; it falls to zero.
        batch_size: The number of pairs for each of these steps.
        bins: The number of bins :math:`K` of splines that are fitted to zuko's affine maps. If
            :py:`None`, they are inscribed, as those of other libraries.
        bound: The bound :math:`B` of their box, in standard deviations of the features.
        shift_bound: The bound of their shift, in standard deviations of the features.
        slope: The least slope of all splines.
        fit_steps: The number of steps of the imitation, for each layer that is fitted.

    Returns:
        The robust copy and the report.

    Raises:
        TypeError: If no adapter knows the model, or how to get its log-density, if the model
            cannot go from data to noise, or if contexts are no tensors.
        ValueError: If there are fewer than two calibration pairs, not as many contexts as data, or
            if they, or what the model makes of them, are not finite, or not of floating point.
        RuntimeError: If `state_dict` does not fit the model.

    Example:
        >>> import zuko
        >>> flow = zuko.flows.MAF(2, 3, transforms=2, hidden_features=[16])  # a trained one
        >>> x, context = torch.randn(256, 2), torch.randn(256, 3)
        >>> robust, report = flowguard.migrate(flow, x, context)
        >>> report.certificate_before.certified, report.certificate_after.certified
        (False, True)
        >>> same = robust(context).log_prob(x) - flow(context).log_prob(x)
        >>> bool(same.abs().max() < 1e-3)
        True
    """
    if calibration is not None:
        if x is not None or context is not None:
            raise ValueError("give either x and context, or calibration; got both")
        x, context = _gather(calibration)
    if x is not None or not dry_run:
        x = _check(x, context)
    _check_options(steps, batch_size, additive)
    check_bound(bound)
    check_shift_bound(shift_bound)
    check_slope(slope)
    with ExitStack() as stack:
        # Some callers switch autograd off for good, but a copy made in inference mode could never
        # be trained, and fits need gradients.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        x, context = _ordinary(x), _ordinary(context)
        whole, closed = opened(model)
        wrappers, inner = unwrapped(whole)
        operation = surgeon(_copied(inner))
        if wrappers:
            operation = Wrapped(whole, ".".join(wrappers), operation)
        if state_dict is not None:
            loaded = operation.subject if wrappers else operation.model
            loaded.load_state_dict(state_dict)
        if dry_run:  # what is tried out shall not move the caller's random numbers
            stack.enter_context(torch.random.fork_rng())
        stack.enter_context(unguarded(operation.model))
        density: Density = operation.log_prob
        if log_prob is not None:
            told = log_prob
            density = lambda x, context: told(operation.subject, x, context)  # noqa: E731
        plan = Plan(
            {"bound": bound, "shift_bound": shift_bound, "slope": slope},
            bins,
            fit_steps,
            additive == "keep",
        )
        if x is None:
            return model, _announce(operation, plan)
        try:
            before = _log_densities(operation.model, density, x, context)
        except NotImplementedError as error:
            raise _without_density(model, error) from error
        rows = typical(before).nonzero()[:, 0]
        outliers = 1 - len(rows) / len(x)
        if outliers > 0:
            x, context, before = x[rows], _rows(context, rows), before[rows]
        report = replace(
            _operate(operation, density, x, context, before, plan),
            outliers=outliers,
            dry_run=dry_run,
        )
        if report.replaced:
            report = replace(report, cut=outliers + (1 - outliers) * report.cut)
        if steps > 0 and report.replaced and not dry_run:
            with operation.tuning():
                _finetune(operation.model, density, x, context, steps, lr, batch_size)
            report = replace(
                report,
                nll_after=_nll(operation.model, density, x, context),
                certificate_after=certify(operation.subject),
            )
    return (model if dry_run else closed(operation.subject)), report


def _copied(model: Model) -> Model:
    r"""A copy, without the graphs of what some modules remember of their last call."""
    memo: dict[int, Any] = {}
    for module in gather(model).modules():
        for value in vars(module).values():
            for t in value if isinstance(value, tuple) else (value,):
                if isinstance(t, Tensor) and not t.is_leaf:
                    memo[id(t)] = t.detach().clone()
    return copy.deepcopy(model, memo)


class Plan(NamedTuple):
    r"""What the caller asked for.

    Arguments:
        options: The options of all splines.
        bins: The number of bins of those that are fitted; :py:`None` if they are inscribed.
        fit_steps: The number of steps of a fit.
        keep_additive: Whether layers that only shift are left.
    """

    options: dict[str, Any]
    bins: int | None
    fit_steps: int
    keep_additive: bool


def typical(log_density: Tensor) -> Tensor:
    r"""Tells which rows are no outliers, by their log-density under a trained flow.

    An outlier is less likely than the median row by at least twenty times what the least likely
    tenth is, and by at least twenty nats. If there are more of them than one in a hundred, they are a
    part of the data, and none is an outlier; nor is any of fewer than twenty rows.

    Arguments:
        log_density: The log-density of each row, with shape :math:`(N)`; where it is NaN, it counts
            as the least.

    Example:
        >>> typical(torch.cat((torch.randn(199), torch.tensor([-450.0])))).sum()
        tensor(199)
    """
    nll = -log_density.double().nan_to_num(-math.inf, math.inf, -math.inf)
    order = nll.sort().values
    median, tenth = order[(len(nll) - 1) // 2], order[9 * (len(nll) - 1) // 10]
    far = nll > median + ABSURD * (tenth - median).clamp_min(1.0)
    most = max(1, int(OUTLIERS * len(nll))) if len(nll) >= FEWEST else 0
    return ~far if int(far.sum()) <= most else torch.ones_like(far)


def _sites(operation: Surgeon, plan: Plan) -> tuple[list[Site], dict[str, str]]:
    r"""The sites to operate on, and the names of all other layers with why they are kept."""
    kept, sites = dict(operation.kept()), []
    for site in operation.sites():
        if plan.keep_additive and site.additive:
            kept[_name(site)] = AS_ASKED
        else:
            sites.append(site)
    return sites, kept


def _name(site: Site) -> str:
    return f"{site.name} ({site.kind})"


def _announce(operation: Surgeon, plan: Plan) -> Migration:
    r"""Tells which layers would be replaced, without calibration pairs."""
    sites, kept = _sites(operation, plan)
    planned = [Replacement(s.name, s.kind, PLANNED, math.nan, math.nan) for s in sites]
    return Migration(
        tuple(planned),
        tuple(kept),
        None,
        None,
        None,
        certify(operation.subject),
        None,
        _told(kept),
        dry_run=True,
        hooked=hooked(operation.model),
    )


def _told(kept: Mapping[str, str]) -> dict[str, str]:
    return {name: why for name, why in kept.items() if why}


def _operate(
    operation: Surgeon, density: Density, x: Tensor, context: Any, before: Tensor, plan: Plan
) -> Migration:
    r"""Replaces the layers of a model that gives the data these log-densities before."""
    certificate = certify(operation.subject)
    sites, kept = _sites(operation, plan)
    trial = _Trial(operation, x, context)
    rows = torch.randperm(len(x), device=x.device)[: _at_once(x)]
    with ExitStack() as stack, evaluating(operation.model):
        for site in sites:
            stack.enter_context(site.listen())
        density(x[rows], _rows(context, rows))
    replaced = []
    for site in sites:
        if not site.heard:
            kept[_name(site)] = NEVER_ASKED
        elif why := site.refusal():
            kept[_name(site)] = why
        else:
            replaced.append(_replace(site, plan))
    after = _log_densities(operation.model, density, x, context) if replaced else before
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps * before.abs()
    # What was not finite has not moved, as long as it is not.
    moved = ~((after - before).abs() <= SAME + rounding) & before.isfinite()
    return Migration(
        tuple(replaced),
        tuple(kept),
        -before.mean().item(),
        -after.mean().item(),
        None,
        certificate,
        certify(operation.subject) if replaced else certificate,
        _told(kept),
        trial.error(),
        cut=moved.double().mean().item(),
        hooked=hooked(operation.model),
    )


def hooked(model: nn.Module) -> tuple[str, ...]:
    r"""Names the modules with hooks before or after them, apart from those of torch's own, such as of a
    weight normalisation, and from those that record scores.

    Arguments:
        model: The model.
    """
    return tuple(
        f"{name} ({type(module).__name__})" if name else type(module).__name__
        for name, module in model.named_modules()
        if any(
            not str(getattr(hook, "__module__", "")).startswith(("torch.", "flowguard.ood."))
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )
    )


def _without_density(model: Any, error: NotImplementedError) -> TypeError:
    return TypeError(
        "a flow is migrated by the log-density of calibration data, but"
        f" {type(model).__name__} does not go from data to noise: {error or 'a layer has no inverse'}"
    )


class _Trial:
    r"""Samples of the model as it is when this is made, to be made again later.

    Arguments:
        operation: Who knows how the model samples.
        x: The calibration data.
        context: Their contexts.
    """

    def __init__(self, operation: Surgeon, x: Tensor, context: Any) -> None:
        rows = torch.arange(min(len(x), _at_once(x), TRIED), device=x.device)
        self.operation = operation
        self.context = _rows(context, rows)
        with evaluating(operation.model):
            z = operation.encode(x[rows], self.context)
            self.z = None if z is None else z.roll(1, dims=0)  # noise meets another context
            self.samples = self._sample()
        dims = [d for d in range(x.dim()) if d != 1]
        std, self.mean = torch.std_mean(x[rows], dim=dims, keepdim=True, correction=0)
        self.unit = std.clamp_min(SMALLEST)

    def _sample(self) -> Tensor | None:
        try:
            return None if self.z is None else self.operation.decode(self.z, self.context)
        except NotImplementedError:
            return None

    def error(self) -> SampleError | None:
        r"""Tells how far the samples are from what they were."""
        with evaluating(self.operation.model):
            again = self._sample()
        if again is None or self.samples is None:
            return None
        # What is not finite is not near.
        near = ((self.samples - self.mean).abs() <= FARTHEST * self.unit).flatten(1).all(1)
        exploded = 1 - near.double().mean().item()
        moved = ((again - self.samples)[near].abs() / self.unit).double().flatten()
        if not len(moved):
            return SampleError(math.nan, math.nan, exploded)
        median, q99 = moved.quantile(moved.new_tensor([0.5, 0.99])).tolist()
        return SampleError(median, q99, exploded)


def _replace(site: Site, plan: Plan) -> Replacement:
    x, everything, options = site.inputs, slice(None), plan.options
    carried = site.carry(options["slope"])
    if carried is not None:
        site.put(carried)
    else:
        with torch.no_grad():
            y = site.old(everything)(x)
        boxes = (*units(single(x)), *units(single(y)))
        if not all(unit.isfinite().all() for unit in boxes):
            raise ValueError(
                f"the model takes calibration data to NaN or infinity, at {site.name} ({site.kind}):"
                " give data that the flow was trained on, and leave out what it cannot take"
            )
        rebuilt = None
        if plan.bins is not None:
            rebuilt = site.rebuild(RescaledSpline(*boxes, bins=plan.bins, **options))
        site.put(rebuilt or site.build(RescaledSpline(*boxes, **options)))
        if parameters := site.learned():
            imitate(site.old, site.new, parameters, x, steps=plan.fit_steps)
    new = site.new(everything)
    taught = compare(site.old(everything), new, x)
    return Replacement(site.name, site.kind, site.becomes, *taught)


def _finetune(
    model: nn.Module,
    density: Density,
    x: Any,
    context: Any,
    steps: int,
    lr: float,
    batch_size: int,
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"all parameters of the model are frozen, and {steps} steps of fine-tuning were asked"
            " for: leave steps out, or let some parameters require gradients"
        )
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rows in _batches(len(x), batch_size, steps, x.device):
        optimizer.zero_grad()
        (-density(x[rows], _rows(context, rows)).mean()).backward()
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


def _log_densities(model: nn.Module, density: Density, x: Any, context: Any) -> Tensor:
    r"""Returns the log-density of each row, in double precision."""
    with evaluating(model):
        rows = torch.arange(len(x), device=x.device).split(_at_once(x))
        return torch.cat([density(x[some], _rows(context, some)).double() for some in rows])


def _nll(model: nn.Module, density: Density, x: Any, context: Any) -> float:
    return -_log_densities(model, density, x, context).mean().item()


def _at_once(x: Tensor) -> int:
    return max(1, min(FIT_ROWS, FIT_NUMBERS // max(1, x[0].numel())))


def _rows(context: Any, rows: Tensor) -> Any:
    if isinstance(context, list | tuple):  # one for each level
        return type(context)(_rows(c, rows) for c in context)
    return None if context is None else context[rows]


def _gather(calibration: Any) -> tuple[Any, Any]:
    r"""Returns data and contexts of a tensor, of a pair, or of batches."""
    if isinstance(calibration, Tensor):
        return calibration, None
    if isinstance(calibration, tuple):
        if len(calibration) not in (1, 2):
            raise ValueError(f"calibration must be a pair (x, context); got {len(calibration)}")
        return calibration[0], calibration[1] if len(calibration) == 2 else None
    if not isinstance(calibration, Iterable) or isinstance(calibration, Mapping | str):
        raise TypeError(
            "calibration must be a tensor, a pair (x, context), or batches of one of these;"
            f" got {type(calibration).__name__}"
        )
    pairs = [_gather(tuple(b) if isinstance(b, list) else b) for b in calibration]
    if not pairs:
        raise ValueError("calibration gave no batch; an iterator is spent after one pass")
    x, contexts = zip(*pairs, strict=True)
    try:
        return torch.cat(x), _cat(contexts)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            "the batches of calibration do not fit together; for a single pair give a tuple"
            f" (x, context): {error}"
        ) from error


def _cat(contexts: Any) -> Any:
    if any(c is None for c in contexts):
        return None
    if isinstance(contexts[0], list | tuple):
        return [_cat(level) for level in zip(*contexts, strict=True)]
    return torch.cat(contexts)


def _ordinary(data: Any) -> Any:
    r"""Returns data that autograd may see, though they were made in inference mode."""
    if isinstance(data, list | tuple):
        return type(data)(map(_ordinary, data))
    return data.clone() if isinstance(data, Tensor) and data.is_inference() else data


def _check(x: Any, context: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() < 2:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of calibration data, one row for each; got {given}")
    if len(x) < 2:
        raise ValueError(
            "the calibration data must have at least two rows, as the units of each layer are"
            " standard deviations over the rows, and best some thousand, as what is rare has to be"
            f" among them; got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"x must be of floating point; got {x.dtype}: x.float() makes it so")
    for c in context if isinstance(context, list | tuple) else (context,):
        if not isinstance(c, Tensor | None):
            raise TypeError(
                "context must be a tensor, or a list of tensors where a flow takes several;"
                f" got {type(c).__name__}"
            )
        if c is not None and len(c) != len(x):
            raise ValueError(
                f"there must be one context for each row of x; got {len(c)} and {len(x)}"
            )
        _check_finite("context", c)
    _check_finite("x", x)
    return x


def _check_finite(name: str, data: Any) -> None:
    r"""Refuses data that is not finite: one such number, and the units of a layer are not."""
    if isinstance(data, Tensor) and not (fine := data.isfinite()).all():
        rows = (
            len(data) - int(fine.flatten(1).all(1).sum()) if data.dim() > 1 else int((~fine).sum())
        )
        raise ValueError(
            f"the calibration data must be finite; got {rows} of {len(data)} rows of {name} with"
            " NaN or infinite values: leave these rows out"
        )


def _check_options(steps: int, batch_size: int, additive: str) -> None:
    if steps < 0 or batch_size < 1:
        raise ValueError(
            f"steps must not be negative, batch_size positive; got {steps} and {batch_size}"
        )
    if additive not in ("bound", "keep"):
        raise ValueError(f"additive must be 'bound' or 'keep'; got {additive!r}")
