r"""Image models: encoders, and flows for super-resolution and low-light enhancement."""

from flowguard.models import rules as rules
from flowguard.models.base import ImageCondition, ImageModel
from flowguard.models.checkpoints import CheckpointError, ImportReport
from flowguard.models.encoders.lowlight import LowLightEncoder
from flowguard.models.encoders.pyramid import PyramidEncoder
from flowguard.models.encoders.rrdb import RRDBEncoder
from flowguard.models.lowlight import LowLightFlow
from flowguard.models.precision import Trial, fastest
from flowguard.models.store import PretrainedError, Recorded, load
from flowguard.models.superres import SuperResolutionFlow

__all__ = [
    "CheckpointError",
    "ImageCondition",
    "ImageModel",
    "ImportReport",
    "LowLightEncoder",
    "LowLightFlow",
    "PretrainedError",
    "PyramidEncoder",
    "RRDBEncoder",
    "Recorded",
    "SuperResolutionFlow",
    "Trial",
    "fastest",
    "load",
]
