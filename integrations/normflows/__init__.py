r"""flowguard in normflows: couplings, Glow blocks and multiscale flows that take a context.

normflows' conventions hold: `forward` goes from noise to data and `inverse` from data to noise,
both return the output and the log-determinant, `sample` returns the samples and their log-density.
A context may have fewer rows than what it goes with: row :math:`i` then belongs to row
:math:`i \bmod B` of a context with :math:`B` rows, so that one row is shared by all, and
:py:`flow.sample(n, context)` makes `n` samples in all, for `n` a multiple of :math:`B`.
``flowguard.register("normflows")`` puts the names into ``normflows.flows``; importing this module
changes nothing there.
"""

__all__ = [
    "EXPORTS",
    "SPLINES",
    "ConditionalMultiscaleFlow",
    "ContextAdapter",
    "GaussianPrior",
    "GuardedConditionalFlow",
    "RobustCouplingBlock",
    "RobustGlowBlock",
    "RobustSplineAutoregressive",
    "RobustSplineCoupling",
    "splines",
]

from flowguard.hosts import missing

try:
    import normflows  # noqa: F401
except ImportError as error:
    raise missing("normflows") from error

from . import rules  # noqa: F401  # also for classes of ours alone
from .adapter import ContextAdapter
from .bases import GaussianPrior
from .glow import RobustCouplingBlock, RobustGlowBlock
from .guard import GuardedConditionalFlow
from .layers import RobustSplineAutoregressive, RobustSplineCoupling
from .multiscale import ConditionalMultiscaleFlow
from .standin import SPLINES, splines

OURS = {"EXPORTS", "SPLINES", "splines"}  # what stays here
#: What `flowguard.register` puts into each namespace.
EXPORTS = {"normflows.flows": tuple(name for name in __all__ if name not in OURS)}
