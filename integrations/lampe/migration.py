r"""How lampe's estimators are made robust, for :func:`flowguard.migrate`: by who knows their flow."""

__all__: list[str] = []

from typing import Any

from lampe.inference import NPE

from flowguard.migration import Surgeon, surgeon
from flowguard.migration.wrapped import Wrapped


@surgeon.register(NPE)
def _(npe: Any) -> Surgeon:
    return Wrapped(
        npe,
        ["flow"],
        log_prob=lambda npe, theta, x: npe(theta, x),
        embed=lambda npe, x: x,
    )
