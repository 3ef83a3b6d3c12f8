r"""flowguard in nflows: robust couplings for vectors and images, and robust image flows.

nflows' conventions hold: a transform takes ``(inputs, context)`` from data to noise and returns
``(outputs, logabsdet)``, with ``logabsdet`` of shape :math:`(N)`; samples have shape
``(contexts, samples, ...)``. The host is nflows or, where that is not installed, its maintained
fork ``glasflow.nflows``. ``flowguard.register("nflows")`` puts the names into
``nflows.transforms``; importing this module changes nothing there.
"""

from ._nflows_autoregressive import MaskedRobustSplineAutoregressiveTransform
from ._nflows_coupling import RobustSplineCDF, RobustSplineCouplingTransform
from ._nflows_host import HOST

__all__ = [
    "EXPORTS",
    "HOST",
    "MaskedRobustSplineAutoregressiveTransform",
    "RobustSplineCDF",
    "RobustSplineCouplingTransform",
]

EXPORTS = {
    f"{HOST}.transforms": (
        "MaskedRobustSplineAutoregressiveTransform",
        "RobustSplineCDF",
        "RobustSplineCouplingTransform",
    ),
}
