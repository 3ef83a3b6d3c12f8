r"""How lampe's estimators are made robust, for :func:`flowguard.migrate`: by who knows their flow."""

__all__: list[str] = []

from typing import Any

from lampe.inference import NPE

from flowguard.migration import Surgeon, surgeon
from flowguard.migration.composite import Composite


@surgeon.register(NPE)
def _(npe: Any) -> Surgeon:
    return Composite(
        npe,
        ["flow"],
        log_prob=lambda npe, theta, x: npe(theta, x),
        embed=lambda npe, x: x,
    )
