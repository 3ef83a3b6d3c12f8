r"""nflows' own splines, computed by flowguard: for models as they are, without training anew."""

__all__ = ["SPLINES", "splines"]

from collections.abc import Iterator
from contextlib import AbstractContextManager

from flowguard.migration.standin import StandIn, Switch, straight, unconstrained

from .host import available, part

#: The modules that hold the functions, by their name within a host.
HOLDERS = (
    "transforms.splines.rational_quadratic",
    "transforms.splines",
    "transforms.autoregressive",
)


def splines() -> AbstractContextManager[None]:
    r"""Lets this thread compute the rational-quadratic splines of nflows, and of its fork in
    glasflow, by :func:`flowguard.functional.unconstrained_rational_quadratic_spline` inside of it.

    The models stay as they are, and so do their numbers up to rounding; but no assertion ends them,
    extreme parameters give finite numbers, and they are faster. Models that were made, copied or
    saved inside work outside. It can be nested. Other threads keep the host's function; for all of
    them there is ``flowguard.register("nflows", splines=True)``. What imported the host's function
    by its name elsewhere keeps it too.

    Whether the host's function is the one that flowguard knows is tried out: its parameters have to
    be the same, and the numbers that it returns.

    Raises:
        RuntimeError: If the host's function is another one.

    Example:
        >>> layer = part("transforms").PiecewiseRationalQuadraticCDF([3], tails="linear")
        >>> x = torch.randn(5, 3)
        >>> before, _ = layer(x)
        >>> with splines():
        ...     torch.allclose(layer(x)[0], before, atol=1e-6)
        True
    """
    return SPLINES.on()


def _find() -> Iterator[StandIn]:
    seen: list[object] = []
    for host in available():
        error = part("transforms.base", host).InputOutsideDomain
        for holder in (part(name, host) for name in HOLDERS):
            if not any(holder is other for other in seen):  # a fork may be but another name
                seen.append(holder)
                yield unconstrained(holder)
                yield straight(holder, error)


#: The switch by which the splines of the host are computed here.
SPLINES = Switch("nflows", _find)
