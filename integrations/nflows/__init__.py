r"""flowguard in nflows: robust couplings for vectors and images, and robust image flows.

nflows' conventions hold: a transform takes ``(inputs, context)`` from data to noise and returns
``(outputs, logabsdet)``, with ``logabsdet`` of shape :math:`(N)`; samples have shape
``(contexts, samples, ...)``. The host is nflows or, where that is not installed, its maintained
fork ``glasflow.nflows``. ``flowguard.register("nflows")`` puts the names into
``nflows.transforms``; importing this module changes nothing there.
"""

__all__ = [
    "EXPORTS",
    "HOST",
    "SPLINES",
    "ConditionalMultiscaleTransform",
    "MaskedRobustSplineAutoregressiveTransform",
    "MultiscaleNormal",
    "PackMaps",
    "RobustFlowStep",
    "RobustSplineCDF",
    "RobustSplineCouplingTransform",
    "pack_maps",
    "splines",
    "unpack_maps",
]

from .autoregressive import MaskedRobustSplineAutoregressiveTransform
from .base import MultiscaleNormal
from .coupling import RobustSplineCDF, RobustSplineCouplingTransform
from .host import HOST
from .image import ConditionalMultiscaleTransform, RobustFlowStep
from .maps import PackMaps, pack_maps, unpack_maps
from .standin import SPLINES, splines

#: What `flowguard.register` puts into each namespace.
EXPORTS = {
    f"{HOST}.distributions": ("MultiscaleNormal",),
    f"{HOST}.transforms": (
        "ConditionalMultiscaleTransform",
        "MaskedRobustSplineAutoregressiveTransform",
        "RobustFlowStep",
        "RobustSplineCDF",
        "RobustSplineCouplingTransform",
    ),
}
