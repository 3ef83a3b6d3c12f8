r"""flowguard in lampe: the flow in its ``NPE`` is certified, attacked, watched and migrated.

lampe's ``NPE`` is called as ``npe(theta, x)`` and returns log-densities; its flow is one of zuko's,
of the parameters given an observation: ``flowguard.migrate(npe, theta, x)``.
"""

__all__: list[str] = []

from flowguard.hosts import missing

try:
    import lampe  # noqa: F401
except ImportError as error:
    raise missing("lampe") from error
