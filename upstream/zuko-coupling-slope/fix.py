r"""The least slope of affine couplings as an argument, for zuko 1.6.0.

with applied():
    flow = zuko.flows.RealNVP(8, context=4, slope=0.1)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from zuko.flows import NICE
from zuko.transforms import MonotonicAffineTransform


def constructor(released: Callable) -> Callable:
    def __init__(
        self: NICE,
        features: int,
        context: int = 0,
        transforms: int = 3,
        randmask: bool = False,
        slope: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        r"""As before, and:

        Arguments:
            slope: The minimum slope of the affine transformation(s). Ignored if
                :py:`univariate` is given.
        """
        kwargs.setdefault("univariate", partial(MonotonicAffineTransform, slope=slope))
        released(self, features, context, transforms, randmask, **kwargs)

    return __init__


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the constructor into zuko, and takes it out again."""
    with patch.object(NICE, "__init__", constructor(NICE.__init__)):
        yield
