r"""flowguard in sbi: robust estimators to train, and what sbi's own are certified, attacked, watched
and migrated by.

sbi's conventions hold: an estimator of the posterior takes parameters :math:`\theta` as *input* and
observations :math:`x` as *condition*; its log-densities have shape ``(sample, batch)``, its samples
``(*sample, batch, *event)``. What flowguard calls data and context are sbi's input and condition:
``flowguard.migrate(posterior, theta, x)``.
"""

__all__ = [
    "GuardedPosterior",
    "calibrate",
    "estimators",
    "flow_of",
    "posterior_nn",
    "protect",
    "with_estimators",
]

from flowguard.hosts import missing

try:
    import sbi  # noqa: F401
except ImportError as error:
    raise missing("sbi") from error

from .builders import posterior_nn
from .conditioners import calibrate
from .estimators import estimators, flow_of, with_estimators
from .guard import GuardedPosterior, protect
