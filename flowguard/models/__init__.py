r"""Image models: encoders, and flows for super-resolution."""

from flowguard.models.encoders import PyramidEncoder
from flowguard.models.rrdb import RRDBEncoder
from flowguard.models.superres import SuperResolutionFlow

__all__ = ["PyramidEncoder", "RRDBEncoder", "SuperResolutionFlow"]
