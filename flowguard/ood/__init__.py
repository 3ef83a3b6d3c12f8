r"""Out-of-distribution contexts: per image, per level, per pixel, calibrated, with a policy."""

__all__ = [
    "LevelReport",
    "Monitor",
    "NotFittedError",
    "OODConditioner",
    "OODContextError",
    "OODContextWarning",
    "OODReport",
    "StreamingGaussian",
    "monitor",
    "unguarded",
]

from flowguard.ood.conditioner import OODConditioner, unguarded
from flowguard.ood.errors import NotFittedError, OODContextError, OODContextWarning
from flowguard.ood.gaussian import StreamingGaussian
from flowguard.ood.monitoring import Monitor, monitor
from flowguard.ood.report import LevelReport, OODReport
