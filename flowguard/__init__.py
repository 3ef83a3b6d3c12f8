r"""Robust conditional normalizing flows, and a warning where the condition is unknown."""

from flowguard import functional, image, models, ood, transforms
from flowguard._version import __version__
from flowguard.ood import OODConditioner, OODContextError, OODContextWarning, monitor
from flowguard.transforms import RobustSpline

__all__ = [
    "OODConditioner",
    "OODContextError",
    "OODContextWarning",
    "RobustSpline",
    "__version__",
    "functional",
    "image",
    "models",
    "monitor",
    "ood",
    "transforms",
]
