r"""A context manager that reads what the levels of any model say."""

__all__ = ["Monitor", "monitor"]

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from flowguard.hosts import opened
from flowguard.numerics import evaluating
from flowguard.ood import recording
from flowguard.ood.conditioner import OODConditioner, conditioners
from flowguard.ood.embeddings import Selector, contexts, device_of, to_levels
from flowguard.ood.fingerprint import Seal, fingerprint
from flowguard.ood.gaussian import Shrinkage
from flowguard.ood.levels import LevelSet, Statistic
from flowguard.ood.report import OODReport


def monitor(
    model: nn.Module,
    levels: Sequence[str] | None = None,
    *,
    alpha: float = 0.001,
    shrinkage: Shrinkage = "oas",
    normalize: Literal["l2"] | None = None,
    statistic: Statistic = "mean",
) -> "Monitor":
    r"""Returns a monitor of a model; see :class:`flowguard.ood.Monitor` for the arguments.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> watch = monitor(model, levels=["0"], alpha=0.01)
        >>> watch = watch.fit(torch.randn(4096, 3), progress=False)
        >>> watch = watch.calibrate(torch.randn(1024, 3), progress=False)
        >>> with watch:
        ...     _ = model(torch.tensor([[0.1, 0.2, -0.3], [100.0, 0.0, 0.0]]))
        >>> watch.report
        OODReport(contexts=2, levels=['0'], flagged=1)
    """
    return Monitor(
        model, levels, alpha=alpha, shrinkage=shrinkage, normalize=normalize, statistic=statistic
    )


class Monitor(nn.Module):
    r"""Creates a context manager that records reports while a model runs, however it is called.

    There are two kinds:

    - Without ``levels`` (or with names of conditioner levels), it records what the
      :class:`OODConditioner`\ s in the model report. They keep their own policy and alpha. In
      training mode, when they are silent, they score for the monitor, for which the encoder runs
      once more, in evaluation mode.
    - With ``levels``, names of submodules as :meth:`~torch.nn.Module.named_modules` gives them,
      it hooks these while it is entered, and scores what they return. Such a monitor is fitted
      and calibrated once; ``watch.state_dict()`` keeps the result. The model does not become a
      part of it.

    A *pass* ends when a level reports for the second time; :attr:`report` is the last pass,
    `reports` the last hundred. Calls in other threads are not recorded, nested monitors
    each record for themselves, and hooks are gone after the ``with`` block, also after an
    exception.

    Hooks cannot see into a compiled module, nor what dropout and batch normalisation in training
    mode would have computed in evaluation mode; entering either raises a :class:`RuntimeError`.
    Conditioners in a compiled model are recorded.

    Arguments:
        model: The model, or what holds it, such as a posterior of sbi.
        levels: The submodules to hook, or the conditioner levels to record.
        alpha: The share of false alarms, for hooked levels.
        shrinkage: See :class:`OODConditioner`, for hooked levels.
        normalize: See :class:`OODConditioner`, for hooked levels.
        statistic: See :class:`OODConditioner`, for hooked levels.

    Raises:
        TypeError: If the model is no module and holds none.
        ValueError: If there is no conditioner to record, or a name is unknown.

    Example:
        >>> import torch
        >>> from flowguard import OODConditioner
        >>> guard = OODConditioner(nn.Linear(3, 4), policy="report", alpha=0.01)
        >>> guard = guard.fit(torch.randn(512, 3), progress=False)
        >>> guard = guard.calibrate(torch.randn(512, 3), progress=False)
        >>> model = nn.Sequential(guard, nn.Linear(4, 2)).eval()
        >>> with Monitor(model) as watch:
        ...     _ = model(torch.zeros(5, 3))
        ...     _ = model(torch.full((5, 3), 99.0))
        >>> [int(report.flagged.sum()) for report in watch.reports]
        [0, 5]
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[str] | None = None,
        *,
        alpha: float = 0.001,
        shrinkage: Shrinkage = "oas",
        normalize: Literal["l2"] | None = None,
        statistic: Statistic = "mean",
    ) -> None:
        super().__init__()
        model = opened(model).module
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the model must be a torch.nn.Module, or hold one; got {type(model).__name__}"
            )
        self._model = (model,)  # in a tuple, so that it is not registered as a submodule
        self.alpha = alpha
        self.guard = LevelSet(shrinkage, normalize, statistic)
        self._sources = conditioners(model)
        self._hooked, self._wanted = _resolve(model, self._sources, levels)
        self._handles: list[RemovableHandle] = []
        self._complete = True
        self._seal = Seal("model")
        self.reports: deque[OODReport] = deque(maxlen=100)

    # -- fit ---------------------------------------------------------------------------------

    def fit(
        self,
        batches: Iterable[Any],
        progress: bool = True,
        *,
        run: Callable[[Any], Any] | None = None,
        context: Selector = None,
        distributed: bool = False,
    ) -> Self:
        r"""Fits one Gaussian per hooked level, in one pass over training contexts.

        Arguments:
            batches: The batches, with shape :math:`(N, *)` each; see :meth:`OODConditioner.fit`.
            progress: Whether to show a progress bar.
            run: What to do with a context so that the hooked submodules run, each once;
                ``model(context)`` by default. For an nflows flow, for instance,
                ``lambda y: flow.sample(1, context=y)``.
            context: Which part of a batch is the context.
            distributed: Whether all ranks fit together.

        Raises:
            RuntimeError: If it records conditioners, or hooks lie in a compiled module.
            ValueError: If a submodule did not run once for each batch, or a feature is not
                finite.

        Example:
            >>> import torch
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
            >>> watch = Monitor(model, levels=["0"], alpha=0.05)
            >>> watch = watch.fit(torch.randn(512, 3), progress=False)
            >>> watch = watch.calibrate(torch.randn(64, 3), progress=False)
            >>> with watch:
            ...     _ = model(torch.full((2, 3), 99.0))
            >>> watch.report.flagged
            tensor([True, True])
        """
        self._require_hooks("fit")
        guard = self.guard.fresh()
        self._each(guard.update, batches, run, context, progress, "fit")
        guard.finalize(fingerprint(self._model[0]), distributed)
        self.guard = guard
        return self

    def calibrate(
        self,
        batches: Iterable[Any],
        progress: bool = True,
        *,
        run: Callable[[Any], Any] | None = None,
        context: Selector = None,
        distributed: bool = False,
    ) -> Self:
        r"""Calibrates the hooked levels on held-out contexts; see :meth:`fit`.

        Arguments:
            batches: The held-out contexts, in batches with shape :math:`(N, *)`.
            progress: Whether to show a progress bar.
            run: What to do with a context.
            context: Which part of a batch is the context.
            distributed: Whether all ranks calibrate together.

        Raises:
            NotFittedError: If the monitor is not fitted.
            RuntimeError: If weights of the model changed since the fit.
        """
        self._require_hooks("calibrate")
        self.guard.require(calibrated=False, owner="monitor")
        self._seal.check(self._model[0], self.guard.fingerprint)
        calibrators = self.guard.calibrators()
        add = partial(self.guard.add, calibrators)
        self._each(add, batches, run, context, progress, "calibrate")
        self.guard.set_calibration(calibrators, self.alpha, distributed)
        return self

    def _require_hooks(self, name: str) -> None:
        if not self._hooked:
            raise RuntimeError(
                f"this monitor records the OODConditioners of the model; call `{name}` on these: "
                f"{[path or 'model' for path in self._sources]}"
            )
        _refuse_compiled(self._model[0], self._hooked)

    def _each(
        self,
        use: Callable[[dict[str, Tensor]], None],
        batches: Iterable[Any],
        run: Callable[[Any], Any] | None,
        select: Selector,
        progress: bool,
        name: str,
    ) -> None:
        r"""Runs the model on each batch and hands on what the hooked submodules return."""
        model = self._model[0]
        run = model if run is None else run
        seen: dict[str, Tensor] = {}
        thread = threading.get_ident()

        def capture(path: str, output: Any) -> None:
            levels = _named(path, output) if threading.get_ident() == thread else {}
            if twice := seen.keys() & levels:
                raise ValueError(
                    f"{min(twice)!r} must run once for one batch; got a second run: give a `run` "
                    "that runs it once, or hook another submodule"
                )
            seen.update((key, value.detach()) for key, value in levels.items())

        with ExitStack() as stack:
            for path, module in self._hooked.items():
                stack.callback(module.register_forward_hook(_hook(path, capture)).remove)
            stack.enter_context(evaluating(model))
            for y in contexts(batches, select, device_of(model), progress, name):
                seen.clear()
                run(y)
                for path in self._hooked:
                    if not any(_of(key, path) for key in seen):
                        raise ValueError(
                            f"{path!r} must run once for one batch; got no run: say with `run=` "
                            "how a context reaches it"
                        )
                # In the order that was asked for, not in that of the calls.
                use({k: v for path in self._hooked for k, v in seen.items() if _of(k, path)})

    # -- record ------------------------------------------------------------------------------

    @property
    def report(self) -> OODReport | None:
        r"""The report of the last pass, :py:`None` before any."""
        return self.reports[-1] if self.reports else None

    def __enter__(self) -> Self:
        model = self._model[0]
        if self._hooked:
            self.guard.require(calibrated=True, owner="monitor")
            _refuse_compiled(model, self._hooked)
            _refuse_moody(model)
        for path, source in () if self._hooked else self._sources.items():
            source.guard.require(
                calibrated=True, owner=f"conditioner {path!r}" if path else "model"
            )
        recording.enter(self)
        try:
            for path, module in self._hooked.items():
                self._handles.append(module.register_forward_hook(_hook(path, self._hear)))
        except BaseException:
            self._exit()
            raise
        self._complete = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit()

    def _exit(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        recording.leave(self)

    def record(self, module: nn.Module, report: OODReport) -> None:
        r"""Hears of a conditioner's report; called by the conditioner.

        Arguments:
            module: The conditioner.
            report: Its report.
        """
        for path, source in () if self._hooked else self._sources.items():
            if source is module:
                names = {name: _full(self._sources, path, name) for name in report.levels}
                levels = {
                    full: replace(report.levels[name], name=full)
                    for name, full in names.items()
                    if self._wanted is None or full in self._wanted
                }
                if levels:
                    self._add(replace(report, levels=levels))

    def _hear(self, path: str, output: Any) -> None:
        if self in recording.active():
            self._seal.check(self._model[0], self.guard.fingerprint)
            levels = {k: v.detach() for k, v in _named(path, output).items()}
            self._add(self.guard.score(levels, self.alpha, partial=True))

    def _add(self, new: OODReport) -> None:
        last = None if self._complete else self.report
        self._complete = False
        if last is None or last.levels.keys() & new.levels or len(last) != len(new):
            self.reports.append(new)
            return
        # Levels of one guard share its alpha; several conditioners flag independently of
        # each other, so that their shares of false alarms add up.
        share = 0 if self._hooked else 1
        self.reports[-1] = OODReport(
            {**last.levels, **new.levels},
            last.non_finite | new.non_finite,
            last.alpha + share * new.alpha,
            min(1.0, last.attained_alpha + share * new.attained_alpha),
        )


def _full(sources: dict[str, OODConditioner], path: str, name: str) -> str:
    r"""A level's name, led by its conditioner's where there are several."""
    return name if len(sources) < 2 else f"{path}.{name}"


def _resolve(
    model: nn.Module, sources: dict[str, OODConditioner], levels: Sequence[str] | None
) -> tuple[dict[str, nn.Module], set[str] | None]:
    r"""What to hook, or which of the conditioners' levels to record (None: all)."""
    modules = {path: module for path, module in model.named_modules() if path}
    if levels is None:
        if not sources:
            raise ValueError(
                "the model must hold an OODConditioner, around its encoder, or `levels=[...]` must "
                f"name the submodules to watch; got neither, and submodules {_some(modules)}"
            )
        return {}, None
    if isinstance(levels, str) or not levels:
        raise ValueError(f"levels must be a list of names; got {levels!r}")
    known = {_full(sources, p, n) for p, source in sources.items() for n in source.guard.names}
    if set(levels) <= known:
        return {}, set(levels)
    if unknown := [name for name in levels if name not in modules]:
        raise ValueError(
            "levels must name submodules of the model, or fitted levels; got "
            f"{unknown[0]!r}, where the levels are {sorted(known)} and the submodules "
            f"{_some(modules)}"
        )
    return {name: modules[name] for name in levels}, None


def _some(modules: dict[str, nn.Module]) -> str:
    names = list(modules)
    return f"{names[:12]}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _refuse_compiled(model: nn.Module, hooked: Iterable[str]) -> None:
    for path in hooked:
        parts = path.split(".")
        for i in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:i]))
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise RuntimeError(
                    f"{path!r} lies in a compiled module, which does not run hooks reliably; give "
                    "the monitor the module from before torch.compile (`compiled._orig_mod`) and "
                    "call that, or wrap the encoder in an OODConditioner, which can be compiled"
                )


def _refuse_moody(model: nn.Module) -> None:
    r"""What hooks hear cannot be computed again in the mode of the fit."""
    for path, module in model.named_modules():
        if module.training and _is_moody(module):
            raise RuntimeError(
                "a model must be watched in evaluation mode, in which it was fitted and "
                f"calibrated; got {path!r}, a {type(module).__name__}, in training mode, where "
                "its outputs are others: call `model.eval()` first"
            )


def _is_moody(module: nn.Module) -> bool:
    if isinstance(module, _NormBase):
        return module.track_running_stats
    # Attention and recurrent layers have a rate of their own in place of a layer.
    rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    return isinstance(module, nn.RReLU) or (isinstance(rate, int | float) and rate > 0)


def _hook(path: str, hear: Callable[[str, Any], None]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        hear(path, output)

    return hook


def _named(path: str, output: Any) -> dict[str, Tensor]:
    r"""The levels of a submodule: its own name, or several names below it."""
    if isinstance(output, Tensor):
        return to_levels(output, [path])
    return {f"{path}.{name}": value for name, value in to_levels(output).items()}


def _of(key: str, path: str) -> bool:
    return key == path or key.startswith(f"{path}.")
