r"""Conditional multiscale flows over images, for any image size."""

from flowguard.image import rules as rules
from flowguard.image.coupling import Condition, ConditionalCoupling
from flowguard.image.flow import ConditionalMultiscaleFlow, FlowCondition
from flowguard.image.layers import (
    ActNorm,
    FixedConv1x1,
    InvertibleConv1x1,
    NormedConv2d,
    OrthogonalConv1x1,
    Squeeze,
    ZeroConv2d,
)
from flowguard.image.maps import (
    Affine,
    Coupling,
    CubicBSpline,
    Elementwise,
    ReparametrizedAffine,
    Robust,
    elementwise,
)
from flowguard.image.migration import ImageSurgeon
from flowguard.image.published import published_flow
from flowguard.image.steps import FlowStep, Split, TransitionStep

__all__ = [
    "ActNorm",
    "Affine",
    "Condition",
    "ConditionalCoupling",
    "ConditionalMultiscaleFlow",
    "Coupling",
    "CubicBSpline",
    "Elementwise",
    "FixedConv1x1",
    "FlowCondition",
    "FlowStep",
    "ImageSurgeon",
    "InvertibleConv1x1",
    "NormedConv2d",
    "OrthogonalConv1x1",
    "ReparametrizedAffine",
    "Robust",
    "Split",
    "Squeeze",
    "TransitionStep",
    "ZeroConv2d",
    "elementwise",
    "published_flow",
]
