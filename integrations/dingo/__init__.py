r"""flowguard in dingo: the flow in its ``FlowWrapper`` is certified, attacked, watched and migrated.

dingo's wrapper is called as ``model(y, *x)`` and returns log-densities: `y` are the parameters, and
an embedding network takes as many contexts as there are. The flow is one of glasflow's fork of
nflows: ``flowguard.migrate(model, y, (x, ...))``.
"""

__all__: list[str] = []

from flowguard.hosts import missing

try:
    import dingo  # noqa: F401
except ImportError as error:
    raise missing("dingo") from error
