r"""flowguard in zuko: robust flows, image flows and guarded flows.

zuko's conventions hold: a flow is a lazy module, ``flow(c)`` is a distribution, the transform of
``flow(c)`` goes from data to noise, ladj is summed over the event, and samples have shape
``(*sample, *batch, *event)``. ``flowguard.register("zuko")`` puts the names into ``zuko.flows``
and ``zuko.transforms``; importing this module changes nothing there.
"""

__all__ = [
    "EXPORTS",
    "SPLINES",
    "ConditionalMultiscaleTransform",
    "GuardedFlow",
    "InPlaceRQSTransform",
    "MultiscaleFlow",
    "MultiscaleTransform",
    "RobustCouplingFlow",
    "RobustNSF",
    "RobustSpline",
    "splines",
]

from flowguard.hosts import missing
from flowguard.transforms import RobustSpline

try:
    import zuko  # noqa: F401
except ImportError as error:
    raise missing("zuko") from error

from .flows import GuardedFlow, RobustCouplingFlow, RobustNSF
from .image import ConditionalMultiscaleTransform, MultiscaleFlow, MultiscaleTransform
from .standin import SPLINES, InPlaceRQSTransform, splines

#: What `flowguard.register` puts into each namespace.
EXPORTS = {
    "zuko.transforms": ("MultiscaleTransform", "RobustSpline"),
    "zuko.flows": (
        "ConditionalMultiscaleTransform",
        "GuardedFlow",
        "MultiscaleFlow",
        "RobustCouplingFlow",
        "RobustNSF",
    ),
}
