r"""Robust conditional normalizing flows, and a warning where the condition is unknown."""

from flowguard import bounds, functional, image, models, ood, transforms
from flowguard._version import __version__
from flowguard.bounds import Certificate, attack, certify
from flowguard.hosts import register, unregister
from flowguard.migration import Migration, migrate
from flowguard.ood import OODConditioner, OODContextError, OODContextWarning, monitor
from flowguard.transforms import RobustSpline

__all__ = [
    "Certificate",
    "Migration",
    "OODConditioner",
    "OODContextError",
    "OODContextWarning",
    "RobustSpline",
    "__version__",
    "attack",
    "bounds",
    "certify",
    "functional",
    "image",
    "migrate",
    "models",
    "monitor",
    "ood",
    "register",
    "transforms",
    "unregister",
]
