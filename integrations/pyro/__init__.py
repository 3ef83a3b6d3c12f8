r"""flowguard in Pyro: its conditional affine flows made robust and certified.

Pyro's conventions hold: a transform goes from noise to data, so that what is sampled runs it as it
is called, and what is scored runs its inverse; a conditional transform or distribution becomes an
ordinary one by ``condition(context)``; the log-determinant has the shape of the batch; samples have
the shape ``(*sample, *batch, *event)``. A lone transform is taken as any of torch's,
whose inverse is the way to data: certify the distribution, or ``transform.inv``.

``flowguard.register("pyro")`` puts :class:`flowguard.RobustSpline`, which works in Pyro's
distributions as it is, into ``pyro.distributions.transforms``.
"""

__all__ = ["EXPORTS", "RobustSpline"]

from flowguard.hosts import missing
from flowguard.transforms import RobustSpline

try:
    import pyro  # noqa: F401
except ImportError as error:
    raise missing("pyro") from error

#: What `flowguard.register` puts into each namespace.
EXPORTS = {"pyro.distributions.transforms": ("RobustSpline",)}
