r"""Robust conditional normalizing flows, and a warning where the condition is unknown."""

from flowguard._version import __version__

__all__ = ["__version__"]
