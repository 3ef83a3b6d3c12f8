r"""Posteriors that look at an observation before they answer.

Every simulation-based posterior answers to every observation. Far from the simulations the answer
is nowhere in the prior, and rejection sampling goes on for ever. :func:`protect` gives a posterior
of the same class that is told from the simulations what is far.
"""

__all__ = ["GuardedPosterior", "protect"]

import copy
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from numbers import Real
from types import FrameType
from typing import Any, NamedTuple, get_args

import torch
from sbi.inference.posteriors import DirectPosterior, RejectionPosterior, VIPosterior
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from sbi.inference.posteriors.vector_field_posterior import VectorFieldPosterior
from torch import Tensor, nn

from flowguard.migration import Migration, migrate
from flowguard.ood import OODContextError, OODContextWarning, OODReport, unguarded
from flowguard.ood.conditioner import Policy
from flowguard.ood.recording import PerThread, active

from .estimators import estimators, parts, with_estimators
from .watch import Watch, deadline, merge_trials

#: What a posterior is asked with an observation, by the name of the argument ``x`` or by default.
ASKED = (
    "set_default_x",
    "sample",
    "sample_batched",
    "sample_via_ode",
    "log_prob",
    "log_prob_batched",
    "potential",
    "leakage_correction",
    "map",
    "train",
    "estimate_normalization_constant",
)

#: Where the potentials of posteriors keep a network that is conditioned on the observation.
CONDITIONED = ("posterior_estimator", "vector_field_estimator")

#: What estimators call the shapes of parameters and observations, by what potentials call them.
SHAPES = {
    ("posterior_estimator", "x"): "condition_shape",
    ("posterior_estimator", "theta"): "input_shape",
    ("vector_field_estimator", "x"): "condition_shape",
    ("vector_field_estimator", "theta"): "input_shape",
    ("likelihood_estimator", "x"): "input_shape",
    ("likelihood_estimator", "theta"): "condition_shape",
    ("ratio_estimator", "x"): "x_shape",
    ("ratio_estimator", "theta"): "theta_shape",
}

#: What estimators call the network that an observation goes through before anything else.
EMBEDDING = ("embedding_net", "condition_embedding")

#: What posteriors remember of the answers for their default observation.
REMEMBERED = ("_leakage_density_correction_factor", "_map", "_normalization_constant")

#: Posteriors that draw from their network and reject what is outside of the prior.
DRAWING = (DirectPosterior, VectorFieldPosterior)

#: Posteriors that sample by rejection, which never ends where nothing is accepted.
REJECTING = (*DRAWING, RejectionPosterior)

#: What is normalised by drawing, and what is drawn: each can be had without rejection by an option
#: of such a name.
WITHOUT = {
    "log_prob": "norm_posterior",
    "log_prob_batched": "norm_posterior",
    "leakage_correction": "norm_posterior",
}
DRAWN = "reject_outside_prior"

#: The argument by which sbi ends sampling by rejection.
LIMIT = "max_sampling_time"

#: What becomes of a far observation that is answered as it is, and what to do.
RISKS = {
    DRAWING: "most draws may fall outside of the prior, where sampling rejects them.",
    REJECTING: "most draws may be rejected.",
    (object,): "the answer extrapolates, and nothing tells how wrong it is.",
}
ADVICE = (
    "Nothing was changed: {risk} Look at the observation; if an answer is needed, {ways}protect "
    "the posterior with policy='shrink'."
)
MOVED = (
    "It was moved to the nearest of the simulations: the answer is that for an observation which "
    "the simulator explains, and not for this one."
)
GIVEN_UP = (
    "Sampling was given up after {seconds:g} seconds, as nearly all draws are rejected. {named} "
    "To have an answer, {ways}protect the posterior with policy='shrink', or give a longer "
    "time_limit."
)

# Within a call that is guarded, what it calls is not guarded again.
_inside: ContextVar[tuple[int, ...]] = ContextVar("flowguard_inside", default=())


class Verdict(NamedTuple):
    r"""What is found of the observations of a call."""

    report: OODReport
    r"""The report, with a row for each observation, or each trial of one."""
    p_value: Tensor
    r"""The p-value of each observation, with shape :math:`(N)`."""
    flagged: Tensor
    r"""Which of them are flagged, with shape :math:`(N)`."""
    trials: bool
    r"""Whether the rows are trials of one observation."""


@dataclass(eq=False)
class Guard:
    r"""Creates what a guarded posterior keeps beside what it was.

    Arguments:
        data: The watch of the data, where an estimator is not conditioned on these.
        policy: What is done with flagged observations.
        alpha: The share of false alarms.
        time_limit: The seconds that sampling for a flagged observation has.
        shape: The shape of one observation.
        migrations: The reports of the migrations.
        last: The last report of each thread.
    """

    data: Watch | None
    policy: Policy
    alpha: float
    time_limit: float | None
    shape: torch.Size
    migrations: list[Migration] = field(default_factory=list)
    last: PerThread = field(default_factory=PerThread)

    def rows(self, x: Any, device: Any) -> Tensor:
        r"""Returns observations as a batch of what the network takes.

        Arguments:
            x: The observations, as sbi takes them.
            device: The device of the posterior.

        Raises:
            ValueError: If they have another shape than the simulations, or there are none.
        """
        x = torch.as_tensor(x, dtype=torch.float32).to(device)
        event = self.shape
        if not x.ndim and event == (1,):  # a number is an observation of one number
            x = x.reshape(event)
        if x.shape[max(0, x.ndim - len(event)) :] != event:
            raise ValueError(
                f"an observation must have the shape {tuple(event)} of one simulation, or "
                f"(N, {', '.join(map(str, event))}) for N of them; got {tuple(x.shape)}"
            )
        rows = x.reshape(-1, *event)
        if not len(rows):
            raise ValueError(
                f"there must be at least one observation; got x of shape {tuple(x.shape)}"
            )
        return rows

    def judge(
        self, watches: dict[str, Watch], rows: Tensor, trials: bool = False, heeded: bool = False
    ) -> Verdict:
        r"""Returns the verdict on observations.

        Arguments:
            watches: The watches of the posterior, by name.
            rows: The observations, with shape :math:`(N, *X)`.
            trials: Whether they are trials of one observation.
            heeded: Whether guards of the user's own in the embedding nets act.

        Raises:
            ValueError: If an observation is not finite, nor becomes so when embedded.
        """
        embedded = {name: watch.embed(rows, heeded) for name, watch in watches.items()}
        _check_finite(rows, embedded)
        reports = {n: w.score(embedded[n]) for n, w in watches.items()}
        for recorder in active():
            for name, report in reports.items():
                recorder.record(watches[name].conditioner, report)
        report = _merged(reports, self.alpha)
        if not trials or len(rows) == 1:
            return Verdict(report, report.p_value, report.flagged, False)
        p = merge_trials(report.p_value)[None]
        return Verdict(report, p, p <= self.alpha, True)

    def told(self, verdict: Verdict, rows: Tensor, advice: str) -> str:
        r"""Returns the words for flagged observations.

        Arguments:
            verdict: The verdict.
            rows: The observations.
            advice: What to do about those that are answered as they are.
        """
        what = {"shrink": MOVED, "warn": advice}.get(self.policy, "Nothing was computed.")
        return f"{_named(verdict, rows, self.alpha)} {what}"


def protect(
    posterior: Any,
    theta: Any,
    x: Any,
    policy: Policy = "warn",
    *,
    robust: bool = False,
    alpha: float = 0.01,
    held_out: float = 0.5,
    time_limit: float | None = 60.0,
    seed: int = 0,
    **migration: Any,
) -> Any:
    r"""Returns a posterior that tells when an observation is not like the simulations.

    It is a copy of the same class, and is used as before. Whatever it is asked with an
    observation, it first compares the observation with the simulations, in the space that the
    network is conditioned on: standardised and embedded. An observation is *flagged* where its
    conformal p-value is at most `alpha`; one :class:`flowguard.ood.OODContextWarning` for each
    call names it and says what was done:

    - ``"warn"``: nothing. The samples are those of the unprotected posterior, bit for bit.
    - ``"shrink"``: its embedding is moved, along the Mahalanobis radius to the calibrated
      threshold and from there to the nearest of the simulations, so that the posterior answers on
      ground that it knows. Observations that are not flagged are answered as before, bit for bit.
    - ``"raise"``: an :class:`flowguard.ood.OODContextError`; nothing is computed.
    - ``"report"``: nothing, and no warning; :attr:`GuardedPosterior.ood_report` tells.

    Rejection sampling for a flagged observation ends after `time_limit` seconds with a
    :class:`RuntimeError`; without a guard it may never end.

    Posteriors whose network is not conditioned on the observation (likelihood and ratio estimators,
    variational posteriors) are guarded in the space of the data, where ``"shrink"`` moves the
    observation itself. Where they take several rows as independent trials of one observation, the
    p-values of the trials are merged into one.

    Guards in the posterior's parts, such as those of the members of an ensemble, are replaced. An
    :class:`flowguard.OODConditioner` in the embedding net goes on to act by its own policy, once
    for each call. The estimators are put into evaluation mode.

    Half of the simulations are fitted and half calibrate by default, drawn with `seed`; the state
    of torch's own generators is left alone. The promise holds for observations that are drawn as the
    simulations were: from the prior, or from the proposal in later rounds.

    Arguments:
        posterior: The posterior, as ``build_posterior`` returns it; an ensemble too.
        theta: The parameters of the simulations, with shape :math:`(N, D)`. They are needed by
            `robust` alone, and can be :py:`None` without it.
        x: The simulations, with shape :math:`(N, *X)`. Rows that are not finite when embedded are
            left out; from the migration, all that are not finite.
        policy: What is done with flagged observations.
        robust: Whether to make the flow robust first; see :func:`flowguard.migrate`. Its report is
            :attr:`GuardedPosterior.migrations`.
        alpha: The share of observations like the simulations that may be flagged.
        held_out: The share of the simulations that calibrate.
        time_limit: The seconds after which sampling for a flagged observation is given up, or
            :py:`None`.
        seed: The seed of the split.
        migration: Keyword arguments of :func:`flowguard.migrate`, with `robust`.

    Raises:
        TypeError: If it is no posterior of sbi, or migration is given options without `robust`.
        ValueError: If an option is out of range, theta and x differ in their number of rows, x has
            another shape than the posterior is conditioned on, or there are too few simulations
            for `alpha`.

    Example:
        >>> import torch
        >>> from sbi.inference.posteriors import DirectPosterior
        >>> from sbi.neural_nets import posterior_nn
        >>> from sbi.utils import BoxUniform
        >>> prior = BoxUniform(-torch.ones(2), torch.ones(2))
        >>> theta = prior.sample((400,))
        >>> x = theta + 0.1 * torch.randn(400, 2)
        >>> posterior = DirectPosterior(posterior_nn("maf")(theta, x), prior)  # or one of NPE's
        >>> posterior = protect(posterior, theta, x, policy="shrink")
        >>> posterior.ood_score(torch.tensor([[0.1, 0.2], [30.0, 0.0]])).flagged
        tensor([False,  True])
    """
    if not isinstance(posterior, NeuralPosterior):
        raise TypeError(
            "protect takes a posterior of sbi, as `inference.build_posterior()` returns it; got "
            f"{type(posterior).__name__}"
        )
    if migration and not robust:
        raise TypeError(
            f"{', '.join(migration)}: options of the migration need robust=True; got robust=False"
        )
    if robust and theta is None:
        raise ValueError("robust=True needs the parameters theta of the simulations; got None")
    if x is None:
        raise TypeError("x must be the simulations, with a row for each; got None")
    _check_options(policy, alpha, held_out, time_limit)
    theta, x = _simulations(theta, x)
    _check_shapes(posterior, theta, x)
    migrations: list[Migration] = []
    posterior = _unguarded(posterior)
    if robust and theta is not None:
        finite = theta.isfinite().all(dim=1) & x.flatten(1).isfinite().all(dim=1)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = [
                migrate(e, theta[finite], x[finite], **migration) for e in estimators(posterior)
            ]
        posterior = with_estimators(posterior, [new for new, _ in made])
        migrations = [report for _, report in made]
    for _, estimator in _held(posterior):
        estimator.eval()  # what dropout does at random has no distance
    data = _put_watches(posterior, alpha)
    vars(posterior)[_GUARD] = Guard(data, "report", alpha, time_limit, x.shape[1:], migrations)
    _fit(_watches(posterior), x.to(vars(posterior)["_device"]), alpha, held_out, seed)
    cls: Any = type(posterior)
    posterior.__class__ = guarded_class(cls)
    posterior.ood_policy = policy
    return posterior


_GUARD = "_flowguard"


class GuardedPosterior:
    r"""What :func:`protect` adds to a posterior; it is made by that alone.

    Example:
        >>> import torch
        >>> from sbi.inference.posteriors import DirectPosterior
        >>> from sbi.neural_nets import posterior_nn
        >>> from sbi.utils import BoxUniform
        >>> prior = BoxUniform(-torch.ones(2), torch.ones(2))
        >>> theta = prior.sample((400,))
        >>> x = theta + 0.1 * torch.randn(400, 2)
        >>> posterior = protect(DirectPosterior(posterior_nn("maf")(theta, x), prior), theta, x)
        >>> isinstance(posterior, GuardedPosterior), posterior.ood_policy
        (True, 'warn')
        >>> posterior.ood_score(torch.tensor([[0.2, 0.1], [50.0, 0.0]])).flagged
        tensor([False,  True])
    """

    @property
    def ood_report(self) -> OODReport | None:
        r"""The report on the last observation in this thread, or batch of these, :py:`None` before
        any."""
        return _guard(self).last.value

    @property
    def ood_policy(self) -> Policy:
        r"""What is done with flagged observations: ``"warn"``, ``"shrink"``, ``"raise"`` or
        ``"report"``. It can be changed at any time."""
        return _guard(self).policy

    @ood_policy.setter
    def ood_policy(self, policy: Policy) -> None:
        _check_policy(policy)
        guard = _guard(self)
        changed = "shrink" in (guard.policy, policy) and guard.policy != policy
        guard.policy = policy
        for watch in _watches(self).values():
            watch.shrinks = policy == "shrink"
        for name in REMEMBERED if changed else ():
            if name in vars(self):
                setattr(self, name, None)

    @property
    def migrations(self) -> list[Migration]:
        r"""What the migration says of each estimator; empty without ``robust=True``."""
        return _guard(self).migrations

    def ood_score(self, x: Any) -> OODReport:
        r"""Returns the report on observations, whatever the policy, and does nothing else.

        Arguments:
            x: The observations, with shape :math:`(N, *X)` or :math:`X`.

        Raises:
            ValueError: If they have another shape than the simulations, or are not finite.
        """
        guard = _guard(self)
        return guard.judge(_watches(self), guard.rows(x, vars(self)["_device"])).report

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (unguarded_class(self),), dict(self.__getstate__())  # type: ignore[call-overload]

    def __copy__(self) -> Any:
        return copy.deepcopy(self)  # whose watches follow its own policy


def _guard(posterior: Any) -> Guard:
    return vars(posterior)[_GUARD]


@cache
def guarded_class(cls: Any) -> Any:
    r"""Returns the subclass of a posterior that consults its guard first.

    Arguments:
        cls: The class of a posterior.
    """
    asked = {name: _consulting(cls, name) for name in ASKED if callable(getattr(cls, name, None))}
    asked["to"] = _moving(cls)
    doc = f"A :class:`{cls.__name__}` that looks at an observation before it answers."
    names = {"__doc__": doc, "__module__": __name__, **asked}
    return type(f"Guarded{cls.__name__}", (GuardedPosterior, cls), names)


def unguarded_class(posterior: Any) -> Any:
    r"""Returns what the class of a guarded posterior was before.

    Arguments:
        posterior: The guarded posterior.
    """
    mro = type(posterior).__mro__
    return mro[mro.index(GuardedPosterior) + 1]


def unguarded_view(posterior: Any) -> Any:
    r"""Returns what a guarded posterior is without its methods: all attributes are the same ones.

    Arguments:
        posterior: The guarded posterior.
    """
    cls = unguarded_class(posterior)
    view = cls.__new__(cls)
    vars(view).update(vars(posterior))
    return view


def _empty(cls: type) -> Any:
    r"""Returns an empty guarded posterior, to be filled from a pickle."""
    made = guarded_class(cls)
    return made.__new__(made)


def _consulting(cls: type, name: str) -> Callable[..., Any]:
    r"""Returns a method of a class, which looks at the observation before."""
    plain = getattr(cls, name)
    signature = inspect.signature(plain)

    @wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _inside.get():
            return plain(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)  # a TypeError as of the method itself
        x = call.arguments.get("x")
        given = x is not None
        x = x if given else self.default_x
        if x is None:  # the method tells what is missing
            return plain(self, *args, **kwargs)
        guard = _guard(self)
        rows = guard.rows(x, vars(self)["_device"])
        watches = _watches(self)
        verdict = guard.judge(watches, rows, trials=not _separate(self, name), heeded=True)
        guard.last.value = verdict.report
        ways = _ways(self, name)
        _act(guard, verdict, rows, ADVICE.format(risk=_risk(self), ways=ways))
        if name == "set_default_x":
            return plain(self, *args, **kwargs)
        seconds, given_up = None, ""
        if bool(verdict.flagged.any()) and _rejects(self) and not _limited(call):
            seconds = guard.time_limit
        data = guard.data
        if seconds is not None:
            named = _named(verdict, rows, guard.alpha)
            given_up = GIVEN_UP.format(named=named, seconds=seconds, ways=ways)
            if data is not None and LIMIT in signature.parameters:
                call.arguments[LIMIT] = seconds  # no watch is asked in the space of the data
        if data is not None and data.shrinks and bool(verdict.flagged.any()):
            moved = data.moved(rows)
            x = x if moved is rows else moved.reshape(torch.as_tensor(x).shape)
        if given:
            call.arguments["x"] = x
        with _within(self), deadline(seconds, given_up), _default_x(self, None if given else x):
            with ExitStack() as heard:  # what guards within had to say is said
                for watch in watches.values():
                    heard.enter_context(unguarded(watch.net))
                return plain(*call.args, **call.kwargs)

    return method


def _moving(cls: Any) -> Callable[..., Any]:
    r"""Returns the method that moves a posterior to a device, in which no question is asked."""
    plain = cls.to

    @wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _within(self):
            result = plain(self, *args, **kwargs)
        if (data := _guard(self).data) is not None:
            data.to(vars(self)["_device"])
        return result

    return method


def _limited(call: inspect.BoundArguments) -> bool:
    r"""Whether the caller has set a limit of time."""
    more = call.arguments.get("kwargs", {})
    return {**more, **call.arguments}.get(LIMIT) is not None


def _rejects(posterior: Any) -> bool:
    return any(isinstance(p, REJECTING) for p in _members(posterior))


def _risk(posterior: Any) -> str:
    r"""Returns what may become of the answer for a far observation."""
    members = _members(posterior)
    return next(
        risk for kinds, risk in RISKS.items() if any(isinstance(p, kinds) for p in members)
    )


def _ways(posterior: Any, name: str) -> str:
    r"""Returns how to ask without rejection, where a posterior has an option for it."""
    if name == "map":  # which draws where it starts, without options for that
        return ""
    option = WITHOUT.get(name, DRAWN)
    asked = "sample" if option == DRAWN else name.replace("leakage_correction", "log_prob")
    for part in _members(posterior):
        method = getattr(part, asked, None) if isinstance(part, DRAWING) else None
        if method is None or option not in inspect.signature(method).parameters:
            return ""
    verb = "sample" if asked == "sample" else f"call {asked}"
    return f"{verb} with `{option}=False`, or "


def _members(posterior: Any) -> list[Any]:
    return list(getattr(posterior, "posteriors", (posterior,)))


def _separate(posterior: Any, name: str) -> bool:
    r"""Whether the rows of an observation are observations of their own, and not its trials."""
    amortized = vars(posterior).get("_mode") == "amortized"
    return name.endswith("_batched") or amortized


def _act(guard: Guard, verdict: Verdict, rows: Tensor, advice: str) -> None:
    if not bool(verdict.flagged.any()) or guard.policy == "report":
        return
    message = guard.told(verdict, rows, advice)
    if guard.policy == "raise":
        raise OODContextError(message, verdict.report)
    warnings.warn(message, OODContextWarning, stacklevel=_caller())


def _caller() -> int:
    r"""Returns how far above :func:`_act` the first line is that is neither ours nor sbi's."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name != __name__ and not f"{name}.".startswith("sbi."):
            break
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def _within(posterior: Any) -> Iterator[None]:
    r"""Lets the methods of a posterior call each other unguarded, within and in this thread."""
    token = _inside.set((*_inside.get(), id(posterior)))
    try:
        yield
    finally:
        _inside.reset(token)


@contextmanager
def _default_x(posterior: Any, x: Tensor | None) -> Iterator[None]:
    r"""Lets a posterior, and those in it, answer for another default observation, within."""
    changed = [] if x is None or x is posterior.default_x else [posterior, *_members(posterior)]
    before = [vars(part).get("_x") for part in changed]
    try:
        for part in changed:
            part._x = x
        yield
    finally:
        for part, old in zip(changed, before, strict=True):
            part._x = old


def _named(verdict: Verdict, rows: Tensor, alpha: float) -> str:
    r"""Returns a sentence that names the flagged observations."""
    if not bool(verdict.flagged.any()):
        return ""
    worst = int(verdict.p_value.argmin())
    score, row = max(
        (float(level.score[i] / level.threshold) if level.threshold > 0 else math.inf, i)
        for level in verdict.report.levels.values()
        for i in ([worst] if not verdict.trials else range(len(rows)))
    )
    far = f", {math.sqrt(score):.3g} times as far as the calibrated threshold"
    if math.isinf(score):
        far = ""  # simulations that are all the same
    p = f"p = {float(verdict.p_value[worst]):.2g}"
    if verdict.trials:
        return (
            f"The observation of {len(rows)} trials is not like the simulations ({p}, "
            f"alpha = {alpha:g}); trial {row}{_values(rows[row])} is the farthest{far}."
        )
    if len(rows) == 1:
        return (
            f"The observation{_values(rows[0])} is not like the simulations: {p} "
            f"(alpha = {alpha:g}){far}."
        )
    places = verdict.flagged.nonzero().flatten().tolist()
    shown = ", ".join(map(str, places[:8])) + (", ..." if len(places) > 8 else "")
    return (
        f"{len(places)} of {len(rows)} observations are not like the simulations "
        f"(alpha = {alpha:g}): {shown}. The farthest is observation {row}"
        f"{_values(rows[row])}: {p}{far}."
    )


def _values(row: Tensor) -> str:
    r"""Returns a short observation in brackets, and nothing for a long one."""
    if row.numel() > 4:
        return ""
    return " [" + ", ".join(f"{v:.3g}" for v in row.flatten().tolist()) + "]"


def _check_finite(rows: Tensor, embedded: dict[str, Tensor]) -> None:
    odd = ~rows.flatten(1).isfinite().all(dim=1)
    lost = torch.stack([~e.flatten(1).isfinite().all(dim=1) for e in embedded.values()]).any(dim=0)
    if places := (odd & lost).nonzero().flatten().tolist():
        where = ", ".join(map(str, places[:8])) + (", ..." if len(places) > 8 else "")
        raise ValueError(
            f"observations must be finite, or become so by the embedding net; got NaN or inf in "
            f"{len(places)} of {len(rows)} (at {where}): leave these out, or fill in what is missing"
        )


def _merged(reports: dict[str, OODReport], alpha: float) -> OODReport:
    r"""Returns one report with a level for each watch, of which each had its share of alpha."""
    levels = {name: replace(_level(r), name=name) for name, r in reports.items()}
    non_finite = torch.stack([r.non_finite for r in reports.values()]).any(dim=0)
    attained = len(reports) * max(r.attained_alpha for r in reports.values())
    return OODReport(levels, non_finite, alpha, max(alpha, min(1.0, attained)))


def _level(report: OODReport) -> Any:
    (level,) = report.levels.values()
    return level


# -- making ------------------------------------------------------------------------------------


def _check_policy(policy: Any) -> None:
    if policy not in get_args(Policy):
        raise ValueError(f"policy must be one of {', '.join(get_args(Policy))}; got {policy!r}")


def _check_options(policy: Any, alpha: float, held_out: float, time_limit: float | None) -> None:
    _check_policy(policy)
    for name, value in (("alpha", alpha), ("held_out", held_out)):
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number between 0 and 1; got {value!r}")
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1; got {value}")
    if time_limit is not None and not isinstance(time_limit, Real):
        raise TypeError(f"time_limit must be seconds, or None for no limit; got {time_limit!r}")
    if time_limit is not None and not time_limit >= 0:
        raise ValueError(f"time_limit must be seconds, or None for no limit; got {time_limit}")


def _simulations(theta: Any, x: Any) -> tuple[Tensor | None, Tensor]:
    r"""Returns the simulations as sbi takes them: float32, with a row for each."""
    x = torch.as_tensor(x, dtype=torch.float32)
    if x.ndim < 2:
        raise ValueError(
            f"x must have a row for each simulation, shape (N, ...); got {tuple(x.shape)}"
        )
    if theta is None:
        return None, x
    theta = torch.as_tensor(theta, dtype=torch.float32)
    if theta.ndim != 2 or len(theta) != len(x):
        raise ValueError(
            "theta must have shape (N, D) with a row for each simulation; got "
            f"{tuple(theta.shape)} for x of shape {tuple(x.shape)}"
        )
    return theta, x


def _check_shapes(posterior: Any, theta: Tensor | None, x: Tensor) -> None:
    for name, estimator in _held(posterior):
        shapes = [getattr(estimator, SHAPES.get((name, w), ""), None) for w in ("x", "theta")]
        if shapes[0] != shapes[1] and theta is not None:
            if [theta.shape[1:], x.shape[1:]] == shapes:
                raise ValueError(
                    "theta and x seem to be swapped: protect(posterior, theta, x) takes the "
                    f"parameters first; got {tuple(theta.shape)} and {tuple(x.shape)}"
                )
        for what, given, expected in zip(("x", "theta"), (x, theta), shapes, strict=True):
            if given is not None and expected is not None and given.shape[1:] != expected:
                raise ValueError(
                    f"{what} must have shape (N, {', '.join(map(str, expected))}), as the "
                    f"estimator was made for; got {tuple(given.shape)}"
                )


def _held(posterior: Any) -> list[tuple[str, nn.Module]]:
    r"""Returns the estimators that the potentials of a posterior hold, and what they call them."""
    potential = posterior.potential_fn
    found = {
        id(part): (name, part)
        for one in getattr(potential, "potential_fns", (potential,))
        for name, part in vars(one).items()
        if isinstance(part, nn.Module)
    }
    return list(found.values())


def _unguarded(posterior: Any) -> Any:
    r"""Returns a copy of a posterior, without guards: its own, those of the members of an ensemble,
    and those of proposals that draw from the same estimator."""
    posterior = copy.deepcopy(posterior)
    found = _conditioned(posterior)
    for part in parts(posterior):
        shared = any(a is b for a in _conditioned(part) for b in found)
        of_its_own = part is posterior or any(part is member for member in _members(posterior))
        if isinstance(part, GuardedPosterior) and (of_its_own or shared):
            del vars(part)[_GUARD]
            part.__class__ = unguarded_class(part)
    for estimator in found:
        for watch in _watches_in(estimator):
            _exchange(estimator, watch, watch.net)
    return posterior


def _conditioned(posterior: Any) -> list[nn.Module]:
    r"""Returns the estimators of a posterior that are conditioned on observations."""
    if any(isinstance(p, VIPosterior) for p in _members(posterior)):
        return []  # what it samples from is fitted to one observation, or embeds it on its own
    return [estimator for name, estimator in _held(posterior) if name in CONDITIONED]


def _embedding(estimator: nn.Module) -> nn.Module | None:
    nets = (getattr(estimator, name, None) for name in EMBEDDING)
    return next((net for net in nets if isinstance(net, nn.Module)), None)


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    r"""Puts a module wherever a model has another one."""
    for part in list(model.modules()):
        for name, child in list(part._modules.items()):
            if child is old and part is not new:
                setattr(part, name, new)


def _put_watches(posterior: Any, alpha: float) -> Watch | None:
    r"""Puts watches into the estimators of a posterior, and returns one of the data if needed."""
    nets = [(e, _embedding(e)) for e in _conditioned(posterior)]
    pairs = [(e, net) for e, net in nets if net is not None]
    rest = len(_members(posterior)) > len(pairs)
    share = alpha / (len(pairs) + rest)
    for estimator, net in pairs:
        _exchange(estimator, net, Watch(net, share))
    return Watch(None, share).to(vars(posterior)["_device"]) if rest else None


def _watches_in(estimator: nn.Module) -> list[Watch]:
    return [part for part in estimator.modules() if isinstance(part, Watch)]


def _watches(posterior: Any) -> dict[str, Watch]:
    r"""Returns the watches of a posterior by name, wherever its estimators come from."""
    found = [watch for e in _conditioned(posterior) for watch in _watches_in(e)]
    names = [f"embedding {i + 1}" for i in range(len(found))] if len(found) > 1 else ["embedding"]
    watches = dict(zip(names, found, strict=False))
    data = _guard(posterior).data
    return watches if data is None else {**watches, "x": data}


def _fit(watches: dict[str, Watch], x: Tensor, alpha: float, held_out: float, seed: int) -> None:
    r"""Fits watches to simulations, and calibrates them with those held out."""
    embedded = {name: watch.embed(x) for name, watch in watches.items()}
    good = torch.stack([e.flatten(1).isfinite().all(1) for e in embedded.values()]).all(0)
    count = int(good.sum())
    if count < len(x):
        warnings.warn(
            f"{len(x) - count} of {len(x)} simulations are not finite, or become so when embedded: "
            "they are left out of the guard's fit.",
            stacklevel=3,
        )
    needed = math.ceil(len(watches) / alpha - 1e-9) - 1
    held = max(needed, round(held_out * count))
    least = max(2, needed // 2)
    if count - held < least <= count - needed:
        raise ValueError(
            f"held_out={held_out:g} leaves {count - held} of {count} simulations to fit, and alpha="
            f"{alpha:g} needs {least}: hold fewer out"
        )
    if count - held < least:
        raise ValueError(
            f"alpha={alpha:g} needs {needed} simulations to calibrate, and half as many to fit; "
            f"got {count}: give more, or a larger alpha"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(x.device)
    for name, watch in watches.items():
        rows = embedded[name][good][order]
        watch.fit(rows[held:], rows[:held])
