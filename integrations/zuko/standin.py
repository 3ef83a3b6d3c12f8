r"""zuko's own splines, computed by flowguard: for models as they are, without training anew."""

__all__ = ["SPLINES", "InPlaceRQSTransform", "splines"]

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor
from zuko.transforms import MonotonicRQSTransform

from flowguard.functional import softmax_spline
from flowguard.migration.standin import StandIn, Switch, disagreement, draw

#: The bound and the least slope that zuko's splines have if none is given.
BOUND, SLOPE = 5.0, 1e-3

PARAMETERS: dict[str, Any] = {
    **dict.fromkeys(("self", "widths", "heights", "derivatives"), Parameter.empty),
    "bound": BOUND,
    "slope": SLOPE,
    "kwargs": Parameter.empty,
}


class InPlaceRQSTransform(MonotonicRQSTransform):
    r"""Creates zuko's spline, computed by :func:`flowguard.functional.softmax_spline`.

    It is what a ``MonotonicRQSTransform`` becomes inside of :func:`splines`. Its knots are worked
    out when they are asked for.

    Arguments:
        widths: The unconstrained widths of the bins, with shape :math:`(*, K)`.
        heights: The unconstrained heights, with shape :math:`(*, K)`.
        derivatives: The unconstrained slopes at the inner knots, with shape :math:`(*, K - 1)`.
        bound: The bound :math:`B` of the box.
        slope: The least slope of zuko's parameterisation.
        kwargs: Keyword arguments of ``torch.distributions.Transform``.

    Example:
        >>> f = InPlaceRQSTransform(torch.zeros(8), torch.zeros(8), torch.zeros(7))
        >>> f(torch.tensor([-9.0, 0.0, 2.0]))
        tensor([-9.,  0.,  2.])
        >>> f
        InPlaceRQSTransform(bins=8)
    """

    def __init__(
        self,
        widths: Tensor,
        heights: Tensor,
        derivatives: Tensor,
        bound: float = BOUND,
        slope: float = SLOPE,
        **kwargs: Any,
    ) -> None:
        super(MonotonicRQSTransform, self).__init__(**kwargs)
        self.parameters = widths, heights, derivatives
        self.bound, self.slope = bound, slope

    @property
    def bins(self) -> int:
        r"""The number of bins."""
        return self.parameters[0].shape[-1]

    @cached_property
    def knots(self) -> MonotonicRQSTransform:
        r"""The same spline as zuko makes it."""
        made = object.__new__(MonotonicRQSTransform)
        SPLINES.theirs(MonotonicRQSTransform, "__init__")(
            made, *self.parameters, bound=self.bound, slope=self.slope
        )
        return made

    @property
    def horizontal(self) -> Tensor:
        r"""Where the bins begin and end, with shape :math:`(*, K + 1)`."""
        return self.knots.horizontal

    @property
    def vertical(self) -> Tensor:
        r"""Where their values begin and end, with shape :math:`(*, K + 1)`."""
        return self.knots.vertical

    @property
    def derivatives(self) -> Tensor:
        r"""The slopes at all knots, with shape :math:`(*, K + 1)`."""
        return self.knots.derivatives

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        widths, heights, derivatives = self.parameters
        return softmax_spline(
            x.to(torch.promote_types(x.dtype, widths.dtype)),
            widths,
            heights,
            derivatives,
            bound=self.bound,
            least=(0.0, 0.0, 0.0),
            clip=-math.log(self.slope),
            inverse=inverse,
        )

    def _call(self, x: Tensor) -> Tensor:
        return self._run(x, inverse=False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._run(y, inverse=True)[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the value and the logarithm of the slope.

        Arguments:
            x: The input, with shape :math:`(*)`.
        """
        return self._run(x, inverse=False)


def splines() -> AbstractContextManager[None]:
    r"""Lets the ``MonotonicRQSTransform`` that this thread makes inside of it be computed by
    flowguard, as a :class:`InPlaceRQSTransform`.

    The models stay as they are, and so do their numbers up to rounding; but extreme parameters give
    finite numbers, and they are faster. What was made inside stays what it is outside. It can be
    nested. Classes that were derived from zuko's, code that is compiled, and other threads keep the
    host's; for all threads there is ``flowguard.register("zuko", splines=True)``.

    Whether the host's class is the one that flowguard knows is tried out: its parameters have to be
    the same, and the numbers that it returns.

    Raises:
        RuntimeError: If the host's class is another one.

    Example:
        >>> import zuko
        >>> flow = zuko.flows.NSF(3)
        >>> x = torch.randn(5, 3)
        >>> before = flow().log_prob(x)
        >>> with splines():
        ...     torch.allclose(flow().log_prob(x), before, atol=1e-5)
        True
    """
    return SPLINES.on()


def _make(theirs: Callable[..., None]) -> Callable[..., None]:
    def initialise(self: Any, *args: Any, **options: Any) -> None:
        # A class of its own may rely on what the host's does. The compiler makes one loop of the
        # host's too, but knows of no class that changes.
        if type(self) is not MonotonicRQSTransform or torch.compiler.is_compiling():
            theirs(self, *args, **options)
            return
        self.__class__ = InPlaceRQSTransform
        InPlaceRQSTransform.__init__(self, *args, **options)

    return initialise


def _refuse(theirs: Callable[..., None]) -> str:
    def run(make: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def numbers(x: Tensor, *params: Tensor, bound: float, slope: float) -> tuple[Tensor, ...]:
            f = make(*params, bound=bound, slope=slope)
            return *f.call_and_ladj(x), f.inv(x), f(x)

        return numbers

    options = [{"bound": b, "slope": s} for b in (2.0, 5.0) for s in (1e-3, 1e-2)]
    calls = [(draw(bins, bins - 1, 6.0), option) for bins in (2, 5) for option in options]
    return disagreement(
        run(MonotonicRQSTransform),
        run(InPlaceRQSTransform),
        calls,
        parameters=PARAMETERS,
        signature=theirs,
    )


def _find() -> Iterator[StandIn]:
    yield StandIn(MonotonicRQSTransform, "__init__", _make, _refuse)


#: The switch by which the splines of the host are computed here.
SPLINES = Switch("zuko", _find)
