r"""What the OOD package raises and warns with."""

__all__ = ["NotFittedError", "OODContextError", "OODContextWarning"]

from typing import Self

from flowguard.ood.report import OODReport


class NotFittedError(RuntimeError):
    r"""Raised when a score is asked of something that is not fitted, or not calibrated, yet.

    Example:
        >>> import torch
        >>> from flowguard import OODConditioner
        >>> OODConditioner().score(torch.zeros(1, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        flowguard.ood.errors.NotFittedError: ...
    """


class OODContextWarning(UserWarning):
    r"""Warns that contexts are out of distribution, or not finite. Nothing was dropped.

    Example:
        >>> import torch, warnings
        >>> from flowguard import OODConditioner
        >>> guard = OODConditioner(alpha=0.01)
        >>> guard = guard.fit(torch.randn(512, 2), progress=False)
        >>> guard = guard.calibrate(torch.randn(512, 2), progress=False).eval()
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     _ = guard(torch.tensor([[0.0, 0.0], [99.0, 0.0]]))
        >>> told[0].category.__name__, int(guard.report.flagged.sum())
        ('OODContextWarning', 1)
    """


class OODContextError(ValueError):
    r"""Raised under the policy ``"raise"`` when a context is out of distribution.

    Arguments:
        message: What is wrong, for people.
        report: The report of the refused call.

    Example:
        >>> import torch
        >>> from flowguard import OODConditioner
        >>> guard = OODConditioner(policy="raise", alpha=0.01)
        >>> guard = guard.fit(torch.randn(512, 2), progress=False)
        >>> guard = guard.calibrate(torch.randn(512, 2), progress=False).eval()
        >>> try:
        ...     guard(torch.tensor([[0.0, 0.0], [99.0, 0.0]]))
        ... except OODContextError as error:
        ...     print(error.indices, error.levels)
        [1] [['level1']]
    """

    def __init__(self, message: str, report: OODReport) -> None:
        super().__init__(message)
        self.report = report
        self.indices: list[int] = report.flagged.nonzero().flatten().tolist()
        r"""The places of the refused contexts in their batch."""
        self.levels: list[list[str]] = [
            [name for name, level in report.levels.items() if bool(level.flagged[i])]
            for i in self.indices
        ]
        r"""For each of them, the names of the levels that flagged it."""
        self.scores: dict[str, list[float]] = {
            name: level.score[self.indices].tolist() for name, level in report.levels.items()
        }
        r"""For each level, their scores."""
        self.p_values: list[float] = report.p_value[self.indices].tolist()
        r"""Their p-values over all levels."""

    def __reduce__(self) -> tuple[type[Self], tuple[str, OODReport]]:
        return type(self), (str(self), self.report)
