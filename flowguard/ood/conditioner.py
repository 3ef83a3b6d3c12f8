r"""The OOD-aware conditioner: an encoder that knows what it was trained on."""

__all__ = ["OODConditioner", "Policy", "unguarded"]

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import FrameType
from typing import Any, Literal, Self, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from flowguard.numerics import evaluating, evaluation_mode, trains
from flowguard.ood import recording
from flowguard.ood.embeddings import (
    Selector,
    contexts,
    device_of,
    to_levels,
    with_levels,
)
from flowguard.ood.errors import OODContextError, OODContextWarning
from flowguard.ood.fingerprint import Seal, fingerprint
from flowguard.ood.gaussian import Shrinkage
from flowguard.ood.levels import LevelSet, Statistic
from flowguard.ood.report import OODReport

F = TypeVar("F", bound=Callable[..., Any])

#: What the compiler leaves alone, by what it does.
_kept_out: dict[Callable[..., Any], Callable[..., Any]] = {}


def _eager(function: F) -> F:
    r"""Keeps a method out of what is compiled, as `torch.compiler.disable` does, which loads the
    whole compiler at once: here it is asked when something has loaded it."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        if function not in _kept_out:
            _kept_out[function] = torch.compiler.disable(function)
        return _kept_out[function](*args, **options)

    return cast(F, call)


#: What to do with contexts out of distribution; see :class:`flowguard.OODConditioner`.
Policy = Literal["warn", "report", "raise", "shrink"]

# A context variable: in other threads, the guards of the same model go on.
_past: ContextVar[tuple[nn.Module, ...]] = ContextVar("flowguard_unguarded", default=())


def conditioners(model: nn.Module) -> dict[str, "OODConditioner"]:
    r"""Returns the conditioners within a model by their paths.

    Arguments:
        model: The model.
    """
    return {path: m for path, m in model.named_modules() if isinstance(m, OODConditioner)}


@contextmanager
def unguarded(model: Any) -> Iterator[None]:
    r"""Looks past the guards of a model, within and in this thread: they score nothing, tell nothing
    and refuse nothing, calibrated or not. Only ``"shrink"`` goes on to move embeddings, in silence,
    as it is a part of what the model computes.

    Arguments:
        model: The model. Nothing is done for what is no module.

    Example:
        >>> import torch
        >>> conditioner = OODConditioner(policy="raise").eval()
        >>> with unguarded(conditioner):
        ...     conditioner(torch.zeros(1, 2))
        tensor([[0., 0.]])
    """
    found = conditioners(model).values() if isinstance(model, nn.Module) else ()
    token = _past.set((*_past.get(), *found))
    try:
        yield
    finally:
        _past.reset(token)


class OODConditioner(nn.Module):
    r"""Creates an encoder that tells how far a context is from the training set.

    It wraps any module from a context to an embedding, returns what the module returns, and
    scores each level of the embedding against the Gaussian of the training contexts, calibrated
    on held-out ones. Then it acts by its policy:

    - ``"warn"``: one :class:`OODContextWarning` per call that has flagged contexts. Nothing is
      dropped or changed.
    - ``"report"``: nothing but :attr:`report`.
    - ``"raise"``: an :class:`OODContextError` that names the flagged contexts.
    - ``"shrink"``: every embedding vector (every pixel of a map) beyond the calibrated boundary
      is moved along its Mahalanobis radius onto it, differentiably, so that the flow stays on
      ground it knows; a warning tells of flagged contexts. Vectors within are left bit for bit,
      vectors with NaN or inf become the mean.

    Life of a conditioner:

    1. *Not calibrated yet, in training mode*: an ordinary encoder, at no cost. Train the flow
       with it.
    2. *Not calibrated yet, in evaluation mode*: a call raises :class:`~flowguard.ood.NotFittedError`, because a
       guard that does not guard should not go unnoticed. To validate a model before its fit, set
       ``conditioner.policy = "report"``, under which the call passes through and :attr:`report`
       refuses.
    3. :meth:`fit` on training contexts, :meth:`calibrate` on contexts that were held out. From
       then on every call is scored, whether or not :meth:`~torch.nn.Module.eval` was called, and the encoder runs
       in evaluation mode in it, as it did in these two, and gets its modes back.
    4. :meth:`train` (also of a model around it) switches scoring and policy off, so that training
       goes on undisturbed, :meth:`~torch.nn.Module.eval` switches them on. If the encoder's weights have changed
       since the fit, scoring raises a :class:`RuntimeError`; fit and calibrate again.

    Statistics and calibration are part of the ``state_dict``, as tensors. A fresh conditioner,
    fitted or not, takes on the state that it loads, and guards if it is calibrated.

    Inside ``torch.compile`` the encoder is compiled and the score runs as it is, after a graph
    break; ``fullgraph=True`` and ``torch.export`` need the bare ``conditioner.encoder``.

    Warning:
        The p-values hold for contexts exchangeable with the calibration contexts: crops of other
        photographs are not quite, and copies of training contexts are not at all. Under autocast
        or in another precision the features differ; fit and calibrate as you will sample.

    Arguments:
        encoder: The encoder; its output is a tensor, or a list, tuple or dictionary of tensors,
            one per level and finest first, with shapes :math:`(N, C)` or :math:`(N, C, H, W)`.
            If :py:`None`, the context itself is the embedding.
        policy: What to do with contexts out of distribution.
        levels: The names of the levels; for a dictionary, the keys to score. By default
            ``"level1"``, ``"level2"`` and so on, or the keys.
        alpha: The share of in-distribution images that may be flagged. It needs at least
            ``levels / alpha - 1`` calibration images; with fewer, images beyond all of these are
            flagged, and :meth:`calibrate` warns of it.
        boundary: The quantile of the calibration pixels (or vectors) beyond which ``"shrink"``
            moves an embedding back. It is apart from `alpha`: an image can be in distribution
            and have a pixel that is not.
        shrinkage: How the covariance is shrunk, ``"oas"``, ``"ledoit_wolf"`` or a number.
        normalize: Whether embeddings are scaled to unit length first (``"l2"``) or not.
        statistic: What an image is judged by: the ``"mean"`` of its pixel scores, their
            ``"max"``, or the ``"share"`` of pixels above the 0.99 quantile of training pixels.
            The maximum grows with the number of pixels: it suits images of the size of the
            calibration's.
        required: Whether a call in evaluation mode is refused before the calibration. If not, the
            policy ``"warn"`` lets it pass too, and warns once where a fit or a loaded state shows
            that the conditioner was meant to guard.

    Raises:
        TypeError: If the encoder is no module.
        ValueError: If an option is out of range, or the policy ``"shrink"`` is asked for with
            `normalize`.

    Example:
        >>> import torch
        >>> conditioner = OODConditioner(nn.Linear(3, 2), policy="report", alpha=0.01)
        >>> conditioner = conditioner.fit(torch.randn(4096, 3), progress=False)
        >>> conditioner = conditioner.calibrate(torch.randn(1024, 3), progress=False)
        >>> conditioner(torch.tensor([[0.1, 0.2, -0.3], [100.0, 0.0, 0.0]])).shape
        torch.Size([2, 2])
        >>> conditioner.report.flagged
        tensor([False,  True])
    """

    def __init__(
        self,
        encoder: nn.Module | None = None,
        policy: Policy = "warn",
        *,
        levels: Sequence[str] | None = None,
        alpha: float = 0.001,
        boundary: float = 0.999,
        shrinkage: Shrinkage = "oas",
        normalize: Literal["l2"] | None = None,
        statistic: Statistic = "mean",
        required: bool = True,
    ) -> None:
        super().__init__()
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(
                f"encoder must be a torch.nn.Module or None; got {type(encoder).__name__}: "
                "wrap it in a module"
            )
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1; got {alpha}")
        if not 0 < boundary <= 1:
            raise ValueError(f"boundary must lie in (0, 1]; got {boundary}")
        if levels is not None and (isinstance(levels, str) or len(set(levels)) < len(levels)):
            raise ValueError(f"levels must be a list of different names; got {levels!r}")
        self.encoder = encoder
        self.guard = LevelSet(shrinkage, normalize, statistic)
        self.level_names = None if levels is None else list(levels)
        self.alpha = alpha
        self.boundary = boundary
        self.required = required
        self.policy = policy
        self._told = False
        self._off = False
        self._last = recording.PerThread()
        self._seal = Seal("encoder")

    # -- properties --------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        r"""What is done with contexts out of distribution."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        if policy not in get_args(Policy):
            raise ValueError(
                f"policy must be one of {', '.join(get_args(Policy))}; got {policy!r}"
            )
        if policy == "shrink" and self.guard.normalize is not None:
            raise ValueError(
                "policy='shrink' needs normalize=None; got normalize="
                f"{self.guard.normalize!r}: a vector scaled to unit length has lost the length "
                "that would have to shrink"
            )
        self._policy: Policy = policy

    @property
    def fitted(self) -> bool:
        r"""Whether :meth:`fit` was called."""
        return self.guard.fitted

    @property
    def calibrated(self) -> bool:
        r"""Whether :meth:`calibrate` was called."""
        return self.guard.calibrated

    @property
    def report(self) -> OODReport | None:
        r"""The report of the last scored call in this thread, :py:`None` before any.

        Example:
            >>> import torch
            >>> guard = OODConditioner(policy="report", alpha=0.01)
            >>> guard = guard.fit(torch.randn(512, 3), progress=False)
            >>> guard = guard.calibrate(torch.randn(128, 3), progress=False).eval()
            >>> guard.report is None
            True
            >>> y = guard(torch.zeros(2, 3))
            >>> guard.report.flagged
            tensor([False, False])
        """
        self.guard.require(calibrated=True, owner="conditioner")
        return self._last.value

    def extra_repr(self) -> str:
        r"""Returns policy and alpha, for the printed module."""
        return f"policy={self.policy!r}, alpha={self.alpha:g}"

    def train(self, mode: bool = True) -> Self:
        r"""Sets the mode as of any module; in training mode scores and policy are off.

        Arguments:
            mode: Whether it is training mode.
        """
        self._off = mode
        return super().train(mode)

    # -- fit ---------------------------------------------------------------------------------

    def fit(
        self,
        batches: Iterable[Any],
        progress: bool = True,
        *,
        context: Selector = None,
        distributed: bool = False,
    ) -> Self:
        r"""Fits one Gaussian per level to training contexts, in one pass.

        The encoder runs in evaluation mode without gradients, and gets its mode back. An earlier
        fit is replaced, once the new one has succeeded.

        Arguments:
            batches: The batches, a DataLoader or any iterable of contexts, with shape
                :math:`(N, *)` each; a tensor is cut into batches along its first dimension.
            progress: Whether to show a progress bar.
            context: Which part of a batch is the context, if it is a tuple or a dictionary:
                an index, a key, or a function of the batch.
            distributed: Whether all ranks of the default process group fit together, each on
                its own share of the batches.

        Raises:
            NotFittedError: If there are fewer than two vectors.
            ValueError: If there is no batch, or a feature is not finite.

        Example:
            >>> import torch
            >>> batches = [(torch.randn(64, 3), torch.zeros(64)) for _ in range(4)]
            >>> OODConditioner().fit(batches, progress=False, context=0).fitted
            True
        """
        guard = self.guard.fresh()
        with evaluating(self.encoder):
            for y in contexts(batches, context, device_of(self.encoder), progress, "fit"):
                self.check(y)
                guard.update(self._embed(y)[1])
        guard.finalize(fingerprint(self.encoder), distributed)
        self.guard, self._last.value = guard, None
        return self

    def calibrate(
        self,
        batches: Iterable[Any],
        progress: bool = True,
        *,
        context: Selector = None,
        distributed: bool = False,
    ) -> Self:
        r"""Calibrates the scores on contexts that neither the fit nor the training has seen.

        Each context (each image) counts as one; a warning tells if they are too few for
        :math:`\alpha`. See :meth:`fit` for the arguments. Scoring is switched on.

        Arguments:
            batches: The held-out contexts, in batches with shape :math:`(N, *)`.
            progress: Whether to show a progress bar.
            context: Which part of a batch is the context.
            distributed: Whether all ranks calibrate together.

        Raises:
            NotFittedError: If the conditioner is not fitted.
            RuntimeError: If the encoder's weights changed since the fit.
            ValueError: If there is no context, or a feature is not finite.

        Example:
            >>> import torch
            >>> guard = OODConditioner(alpha=0.05).fit(torch.randn(512, 3), progress=False)
            >>> guard.calibrate(torch.randn(64, 3), progress=False).calibrated
            True
        """
        self.guard.require(calibrated=False, owner="conditioner")
        self._seal.check(self.encoder, self.guard.fingerprint)
        calibrators = self.guard.calibrators()
        with evaluating(self.encoder):
            for y in contexts(batches, context, device_of(self.encoder), progress, "calibrate"):
                self.check(y)
                self.guard.add(calibrators, self._embed(y)[1])
        self.guard.set_calibration(calibrators, self.alpha, distributed)
        self._off, self._last.value = False, None
        return self

    def check(self, y: Any) -> None:
        r"""Refuses contexts that the conditioner shall be neither fitted to nor calibrated with;
        here none. For subclasses that know more of their contexts.

        Arguments:
            y: A batch of contexts.
        """

    # -- use ---------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, y: Any) -> OODReport:
        r"""Returns the report on contexts, whatever the policy, and touches nothing.

        The encoder runs in evaluation mode.

        Arguments:
            y: The contexts, as the encoder takes them.

        Raises:
            NotFittedError: The conditioner is not fitted, or not calibrated.
            RuntimeError: The encoder's weights changed since the fit.
            ValueError: The levels or their sizes differ from those of the fit.

        Example:
            >>> import torch
            >>> guard = OODConditioner(alpha=0.05).fit(torch.randn(512, 3), progress=False)
            >>> guard = guard.calibrate(torch.randn(64, 3), progress=False)
            >>> guard.score(torch.tensor([[0.0, 0.1, -0.2], [50.0, 0.0, 0.0]])).flagged
            tensor([False,  True])
        """
        self.guard.require(calibrated=True, owner="conditioner")
        with evaluating(self.encoder):
            _, levels = self._embed(y)
        return self._score(y, levels)

    def forward(self, y: Any) -> Any:
        r"""Returns what the encoder makes of contexts; scores it and acts by the policy, in
        evaluation mode."""
        if self._off:
            if recording.listening():
                self._overheard(y)
            return self._encode(y)
        if not self.calibrated:
            untold = not self._told and (self.guard.fitted or self.guard.loaded)
            if self.policy != "report" and not self.training:
                if self.required or self.policy != "warn" or untold:
                    self._unready()
            return self._encode(y)
        # Dropout and batch normalisation in training mode are not what was calibrated.
        moody = self.encoder is not None and trains(self.encoder)
        return self._guarded(y, self._evaluated(y) if moody else self._encode(y))

    def _encode(self, y: Any) -> Any:
        return y if self.encoder is None else self.encoder(y)

    @_eager
    def _unready(self) -> None:
        r"""Refuses, or says once, that nothing is checked yet."""
        if self._is_past:
            return
        if self.required or self.policy != "warn":
            self.guard.require(calibrated=True, owner="conditioner")
        self._told = True
        lack = "fitted but not calibrated" if self.fitted else "not fitted"
        warnings.warn(
            f"The guard is {lack}, so that no condition is checked; this is said once. Call "
            "`fit(batches)` on training conditions and `calibrate(batches)` on held-out ones, or "
            "set its policy to 'report'.",
            stacklevel=_caller(),
        )

    @_eager
    def _evaluated(self, y: Any) -> Any:
        with evaluation_mode(self.encoder):
            return self._encode(y)

    @_eager
    def _guarded(self, y: Any, output: Any) -> Any:
        if self._is_past:
            if self.policy != "shrink":
                return output
            levels = to_levels(output, self.level_names)
            return self._shrink(output, levels, self._score(y, levels))
        levels = to_levels(output, self.level_names)
        report = self._score(y, levels)
        self._last.value = report
        for recorder in recording.active():
            recorder.record(self, report)
        return self._act(output, levels, report)

    @property
    def _is_past(self) -> bool:
        return any(m is self for m in _past.get())

    @_eager
    def _overheard(self, y: Any) -> None:
        r"""In training mode a monitor may still ask; the policy stays off."""
        if recording.active() and self.calibrated and not self._is_past:
            report = self.score(y)
            for recorder in recording.active():
                recorder.record(self, report)

    def _act(self, output: Any, levels: dict[str, Tensor], report: OODReport) -> Any:
        if self.policy == "report":
            return output
        flagged = bool(report.flagged.any())
        if flagged and self.policy == "raise":
            raise OODContextError(f"{report.summary()} Nothing was computed.", report)
        if flagged:
            end = (
                "Nothing was dropped or changed: look at the report, or set the policy to "
                "'shrink', 'raise' or 'report'."
            )
            if self.policy == "shrink":
                end = "Embeddings beyond the calibrated boundary were moved onto it."
            warnings.warn(f"{report.summary()} {end}", OODContextWarning, stacklevel=_caller())
        return self._shrink(output, levels, report) if self.policy == "shrink" else output

    def _shrink(self, output: Any, levels: dict[str, Tensor], report: OODReport) -> Any:
        moved = {}
        for name, level in self.guard.items():
            told, features = report.levels[name], levels[name]
            scores = told.score if told.map is None else told.map
            moved[name] = level.pull(features, scores, told.boundary)
        unchanged = all(moved[name] is levels[name] for name in moved)
        return output if unchanged else with_levels(output, moved)

    def _embed(self, y: Any) -> tuple[Any, dict[str, Tensor]]:
        output = self._encode(y)
        return output, to_levels(output, self.level_names)

    @torch.no_grad()
    def _score(self, y: Any, levels: dict[str, Tensor]) -> OODReport:
        self._seal.check(self.encoder, self.guard.fingerprint)
        wrong = None if self.encoder is None else _not_finite(y, levels)
        levels = {name: value.detach() for name, value in levels.items()}
        return self.guard.score(levels, self.alpha, self.boundary, wrong)


def _not_finite(y: Any, levels: dict[str, Tensor]) -> Tensor | None:
    r"""Which contexts are not finite; an encoder can hide it (a maximum drops -inf, say)."""
    count = len(next(iter(levels.values())))
    if not isinstance(y, Tensor) or not y.ndim:
        return None
    if len(y) == count:
        return ~(y.isfinite().flatten(1).all(dim=1) if y.ndim > 1 else y.isfinite())
    return ~y.isfinite().all()[None] if count == 1 else None


def _caller() -> int:
    r"""The `stacklevel` of the first frame outside torch and this package."""
    package = os.path.dirname(os.path.dirname(__file__))
    inside = (os.path.dirname(torch.__file__) + os.sep, package + os.sep)
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level
