r"""Image models: encoders, and flows for super-resolution and low-light enhancement."""

from flowguard._surgery import surgeon
from flowguard.image import ImageSurgeon
from flowguard.models.checkpoints import CheckpointError, ImportReport
from flowguard.models.encoders import PyramidEncoder
from flowguard.models.lowlight import LowLightFlow
from flowguard.models.lowlight_encoder import LowLightEncoder
from flowguard.models.rrdb import RRDBEncoder
from flowguard.models.superres import ImageCondition, SuperResolutionFlow

__all__ = [
    "CheckpointError",
    "ImageCondition",
    "ImportReport",
    "LowLightEncoder",
    "LowLightFlow",
    "PyramidEncoder",
    "RRDBEncoder",
    "SuperResolutionFlow",
]

for model in (LowLightFlow, SuperResolutionFlow):
    surgeon.register(model, ImageSurgeon)
