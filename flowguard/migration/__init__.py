r"""The migration: an existing flow in, a robust flow out that starts where the old one was.

The core knows no library. An adapter says what its library's layers are, in
``flowguard.integrations.<library>.migration``, and everything else is done here. The words, from
the outside in:

surgeon
    Who operates on a model: it knows how to get a density and samples of the library's models, and
    where their layers are. :class:`Surgeon` is what an adapter derives, :func:`surgeon` finds the
    one for a model by its class.
holder
    A model of a class that nobody knows, but which *holds* layers of a library somewhere, as a
    user's own module does. :func:`holder` registers who operates on these.
site
    A layer of the model whose map is replaced, with all that it takes: :class:`Site` is the one
    contract of the adapters.
successor, exchange
    The module that is made of the old layer, with the same networks, parameters and hooks under
    another map; and putting it wherever the model referred to the old one
    (:mod:`flowguard.migration.exchange`). The hosts' classes for them are called *migrated* where
    they follow affine maps, and *carried* where they are splines with the old knots.
units, rescaled
    The box of a robust spline is a square, but the features of a layer have means and spreads of
    their own. Each is brought to its units, an origin and a scale of input and output, constant
    whatever the condition is; a map in such units is a
    :class:`flowguard.migration.imitate.Rescaled` one.
inscribe
    To *compute* the spline that follows an affine map within its box, of the slope and intercept
    that the old network asks for: nothing is fitted, the network is kept as a whole
    (:mod:`flowguard.migration.inscribe`).
imitate
    To *fit* a spline to the old map: where the caller asks for so many bins, whose parameters are
    computed by a layer that is new, so that no closed form tells them (zuko;
    :mod:`flowguard.migration.imitate`).
cut
    What the new map does not follow of the old one. Its box and its slopes are chosen for the rows
    of the calibration data, but for *outliers*, which the old flow itself finds absurd.
moments
    The mean and log-scale of a normal base that depend on the condition. They are *bounded* by an
    interval around what they were in calibration (:mod:`flowguard.migration.moments`).
knots, carry
    The points that a rational-quadratic spline goes through. A spline of a host is *carried over* as
    the robust spline through the same knots: exactly, unless that is steeper or flatter than the
    robust one may be (:mod:`flowguard.migration.knots`).
"""

__all__ = [
    "Migration",
    "Replacement",
    "SampleError",
    "Site",
    "Surgeon",
    "holder",
    "migrate",
    "surgeon",
]

from flowguard.migration import rules as rules
from flowguard.migration.report import Migration, Replacement, SampleError
from flowguard.migration.run import migrate
from flowguard.migration.surgeon import Site, Surgeon, holder, surgeon
