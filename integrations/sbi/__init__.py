r"""flowguard in sbi: its estimators and posteriors are certified, attacked, watched and migrated.

sbi's conventions hold: an estimator of the posterior takes parameters :math:`\theta` as *input* and
observations :math:`x` as *condition*; its log-densities have shape ``(sample, batch)``, its samples
``(*sample, batch, *event)``. What flowguard calls data and context are sbi's input and condition:
``flowguard.migrate(posterior, theta, x)``.
"""

__all__ = ["GuardedPosterior", "estimators", "flow_of", "protect", "with_estimators"]

from flowguard.hosts import missing

try:
    import sbi  # noqa: F401
except ImportError as error:
    raise missing("sbi") from error

from .estimators import estimators, flow_of, with_estimators
from .guard import GuardedPosterior, protect
