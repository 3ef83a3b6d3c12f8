r"""normflows' own splines, computed by flowguard: for models as they are, without training anew."""

__all__ = ["SPLINES", "splines"]

from collections.abc import Iterator
from contextlib import AbstractContextManager

import normflows.utils.splines

from flowguard.migration.standin import StandIn, Switch, straight, unconstrained


def splines() -> AbstractContextManager[None]:
    r"""Lets this thread compute the rational-quadratic splines of normflows by
    :func:`flowguard.functional.unconstrained_rational_quadratic_spline` inside of it.

    The models stay as they are, and so do their numbers up to rounding; but no assertion ends them,
    extreme parameters give finite numbers, and they are faster. Models that were made, copied or
    saved inside work outside. It can be nested. Other threads keep the host's function; for all of
    them there is ``flowguard.register("normflows", splines=True)``.

    One thing is not the host's: with a list of tails (as in ``CircularCoupledRationalQuadraticSpline``)
    normflows makes zeros of all that lies outside of the box, which has no inverse. Here that stays
    as it is, as with tails of one kind.

    Whether the host's function is the one that flowguard knows is tried out: its parameters have to
    be the same, and the numbers that it returns.

    Raises:
        RuntimeError: If the host's function is another one.

    Example:
        >>> layer = normflows.flows.AutoregressiveRationalQuadraticSpline(3, 1, 16)
        >>> z = torch.randn(5, 3)
        >>> before, _ = layer(z)
        >>> with splines():
        ...     torch.allclose(layer(z)[0], before, atol=1e-5)
        True
    """
    return SPLINES.on()


def _find() -> Iterator[StandIn]:
    yield unconstrained(normflows.utils.splines, ("linear", "circular"))
    yield straight(normflows.utils.splines)


#: The switch by which the splines of the host are computed here.
SPLINES = Switch("normflows", _find)
