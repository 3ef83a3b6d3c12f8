r"""Numbers that splines are computed with.

They are functions, for the compiler to take them as the constants that they are. Asked for dynamic
shapes, it takes a number that is global, in a table or a default for one that may change, and comes
to a stop where two splines have it in common.
"""

__all__ = [
    "far",
    "log2_e",
    "max_logit",
    "min_derivative",
    "min_fraction",
    "most",
    "most_lean",
    "pi",
    "room",
    "steepest",
    "threshold",
    "top",
]

import math

import torch


def pi() -> float:
    r"""Half the turn of a circle."""
    return 3.141592653589793


def log2_e() -> float:
    r"""The logarithm of e to the base of two."""
    return 1.4426950408889634


def min_fraction() -> float:
    r"""The least width and height of a bin, as a share of the box (published: 1e-3)."""
    return 1e-3


def most_lean() -> float:
    r"""What keeps the slope at the knot of two bins finite in single precision."""
    return 1 - 1e-5


def min_derivative() -> float:
    r"""The least inner derivative of the published parameterisation."""
    return 1e-3


def max_logit(dtype: torch.dtype) -> float:
    r"""The logarithm of its largest one: its square has to be finite beside the square of the
    largest ratio of two secants.

    Arguments:
        dtype: What is computed in.
    """
    return 300.0 if dtype == torch.float64 else 30.0


def most() -> float:
    r"""Where logits are cut, as the exponential of it is finite; and raw slopes, whose maps are
    constant beyond."""
    return 60.0


def top() -> float:
    r"""The exponential above which a logit was cut there."""
    return math.exp(most()) * (1 - 1e-5)


def room() -> float:
    r"""The least room above the mean of two secants for the slope at their knot."""
    return 1e-3


def far() -> float:
    r"""Where logits of the usual parameterisation are cut; differences of these are finite."""
    return 1e30


def steepest() -> float:
    r"""Where raw slopes of it are cut; products of a few of these are finite."""
    return 1e6


def threshold() -> float:
    r"""From where on PyTorch's softplus is the identity."""
    return 20.0
