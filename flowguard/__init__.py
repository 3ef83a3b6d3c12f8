r"""Robust conditional normalizing flows, and a warning where the condition is unknown."""

from flowguard import functional, transforms
from flowguard._version import __version__
from flowguard.transforms import RobustSpline

__all__ = ["RobustSpline", "__version__", "functional", "transforms"]
