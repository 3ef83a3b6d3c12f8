r"""Bounds of samples for every condition: certificates, what they are made of, and the attack."""

__all__ = [
    "Attack",
    "Certificate",
    "Envelope",
    "Flatten",
    "Join",
    "Limit",
    "Linear",
    "Noise",
    "Permute",
    "Pointwise",
    "Refused",
    "Remark",
    "Scale",
    "Step",
    "Unsqueeze",
    "attack",
    "certify",
    "conditional",
    "constant",
    "departure",
    "envelope",
    "envelope_rule",
    "has_rule",
    "rule",
    "sampler",
    "steps",
    "within",
]

from flowguard.bounds import torch_rules as torch_rules
from flowguard.bounds.attack import Attack, attack, sampler
from flowguard.bounds.certificate import Certificate, certify
from flowguard.bounds.regions import Envelope
from flowguard.bounds.rules import (
    departure,
    envelope,
    envelope_rule,
    has_rule,
    rule,
    steps,
    within,
)
from flowguard.bounds.steps import (
    Flatten,
    Join,
    Limit,
    Linear,
    Noise,
    Permute,
    Pointwise,
    Refused,
    Remark,
    Scale,
    Step,
    Unsqueeze,
    constant,
)
from flowguard.bounds.univariate import conditional
