r"""Conditional multiscale flows over images, for any image size."""

from flowguard.image.coupling import Condition, ConditionalCoupling
from flowguard.image.layers import (
    ActNorm,
    InvertibleConv1x1,
    OrthogonalConv1x1,
    Squeeze,
    ZeroConv2d,
)
from flowguard.image.maps import (
    Affine,
    CubicBSpline,
    Elementwise,
    ReparametrizedAffine,
    Robust,
    elementwise,
)
from flowguard.image.multiscale import ConditionalMultiscaleFlow, FlowStep, Split

__all__ = [
    "ActNorm",
    "Affine",
    "Condition",
    "ConditionalCoupling",
    "ConditionalMultiscaleFlow",
    "CubicBSpline",
    "Elementwise",
    "FlowStep",
    "InvertibleConv1x1",
    "OrthogonalConv1x1",
    "ReparametrizedAffine",
    "Robust",
    "Split",
    "Squeeze",
    "ZeroConv2d",
    "elementwise",
]
