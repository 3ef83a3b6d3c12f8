r"""flowguard in normflows: robust couplings and Glow blocks that take a context.

normflows' conventions hold: `forward` goes from noise to data and `inverse` from data to noise,
both return the output and the log-determinant with the batch shape, `sample` returns the samples
and their log-density. ``flowguard.register("normflows")`` puts the names into ``normflows.flows``;
importing this module changes nothing there.
"""

from . import missing

try:
    import normflows  # noqa: F401
except ImportError as error:
    raise missing("normflows") from error

from ._normflows_glow import RobustCouplingBlock, RobustGlowBlock
from ._normflows_layers import RobustSplineAutoregressive, RobustSplineCoupling

__all__ = [
    "EXPORTS",
    "RobustCouplingBlock",
    "RobustGlowBlock",
    "RobustSplineAutoregressive",
    "RobustSplineCoupling",
]

EXPORTS = {
    "normflows.flows": (
        "RobustCouplingBlock",
        "RobustGlowBlock",
        "RobustSplineAutoregressive",
        "RobustSplineCoupling",
    ),
}
