r"""What the robust layers for nflows share: from the outputs of a network to splines."""

__all__ = [
    "ALL",
    "IMAGE_SHIFT_BOUND",
    "SHIFT_BOUND",
    "TAIL_BOUND",
    "PartialHead",
    "SplineHead",
    "apply_map",
    "check_floating",
    "check_positive",
    "check_tails",
    "map_of",
]

import functools
import inspect
import math
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.image import Robust
from flowguard.numerics import sum_rows
from flowguard.transforms import Univariate

# Why these, and what the other hosts have: "Boxes and shifts" in docs/guarantees.md.
#: The box: that of the experiments of Durkan et al. (2019). nflows' own default of 1 is for data
#: that are known to lie within.
TAIL_BOUND = 3.0
#: The bound of the shift of splines over vectors: the box again, which cost no likelihood.
SHIFT_BOUND = 3.0
#: And of those over images: 1 was enough on photographs, and an image flow has many steps, each of
#: which adds its bound to that of the samples.
IMAGE_SHIFT_BOUND = 1.0

#: How much faster a gain learns than the network behind it. Without it, a coupling that starts
#: from a gain of zero lags behind one that starts from a last layer of zeros.
PACE = 10.0

ALL = slice(None)  #: all features


def map_of(
    num_bins: int, tail_bound: float, shift_bound: float | None, slope: float | None
) -> Robust:
    r"""Returns the family of splines with these options, after a look at them.

    Arguments:
        num_bins: The number of bins :math:`K`, 2 or more.
        tail_bound: The bound :math:`B` of the box.
        shift_bound: The bound of the shift, :py:`None` for a free one.
        slope: The least slope, :py:`None` for the published spline.

    Raises:
        ValueError: If an option is out of range.
    """
    if not isinstance(num_bins, Integral) or num_bins < 2:
        raise ValueError(f"num_bins must be an integer of at least 2; got {num_bins!r}")
    if not _positive(tail_bound):
        raise ValueError(f"tail_bound must be a positive number; got {tail_bound!r}")
    if shift_bound is not None and not _positive(shift_bound):
        raise ValueError(
            f"shift_bound must be a positive number, or None for a free shift; got {shift_bound!r}"
        )
    if slope is not None and not (_positive(slope) and slope <= 0.49):
        raise ValueError(
            f"slope must lie in (0, 0.49], or be None for the published spline; got {slope!r}"
        )
    return Robust(
        int(num_bins),
        float(tail_bound),
        None if shift_bound is None else float(shift_bound),
        None if slope is None else float(slope),
    )


def _positive(value: Any) -> bool:
    return isinstance(value, Real) and 0 < float(value) < math.inf


def check_tails(tails: str | None) -> None:
    r"""Refuses the tails that a robust spline does not have.

    Arguments:
        tails: The tails that were asked for.

    Raises:
        ValueError: If they are not linear.
    """
    if tails != "linear":
        raise ValueError(
            "a robust spline covers the whole line, and its tails are linear: leave `tails` out,"
            f" or give tails='linear'; got tails={tails!r}"
        )


def check_positive(**sizes: Any) -> None:
    r"""Refuses what is no positive integer.

    Arguments:
        sizes: The sizes, by name.

    Raises:
        ValueError: If a size is no positive integer.
    """
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name} must be a positive integer; got {size!r}")


def check_floating(inputs: Any) -> None:
    r"""Refuses inputs that are no floating point tensor: outputs have the dtype of the inputs.

    Arguments:
        inputs: The inputs.

    Raises:
        TypeError: If they are no floating point tensor.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        given = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"the inputs must be a floating point tensor; got {given}")


def apply_map(f: Univariate, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    r"""Applies a univariate map; returns the output and `ladj` with shape :math:`(N)`.

    Arguments:
        f: The map.
        x: The input, with shape :math:`(N, *)`.
        inverse: Whether the map goes back to data.
    """
    y, ladj = f.inverse_and_ladj(x) if inverse else f.call_and_ladj(x)
    return y, sum_rows(ladj)


class PartialHead(nn.Module):
    r"""What turns the outputs of a network into maps, for some features as for all: called with
    what is mapped, the outputs, the direction, and the indices of these features."""

    @classmethod
    @functools.cache
    def is_partial(cls) -> bool:
        r"""Returns whether all that takes the outputs can be asked of some features: what users
        write over it need not."""
        methods = (getattr(cls, name, None) for name in ("forward", "spline", "phi"))
        return all(m is None or "of" in inspect.signature(m).parameters for m in methods)


class SplineHead(PartialHead):
    r"""Creates what turns the outputs of a network into splines.

    The logits of widths and heights are divided by :math:`\sqrt{h}`, as nflows does, but nothing
    is written into what the network returned.

    The splines start as the identity. nflows' own networks get a last layer of zeros; the outputs
    of any other network, which is left as it is, are multiplied by a learned gain that starts at
    zero, one for each output.

    Arguments:
        map: The family of splines.
        features: The number of features :math:`C` that are transformed.
        net: The network.
        hidden: The width :math:`h` of the network. If :py:`None`, what the network tells.
        identity_init: Whether to start as the identity. Otherwise the network is taken as it is.
    """

    scale: Tensor

    def __init__(
        self,
        map: Robust,
        features: int,
        net: Any,
        hidden: int | None = None,
        identity_init: bool = True,
    ) -> None:
        super().__init__()
        self.map = map
        self.features = features
        n = map.parameters
        scale = torch.ones(n)
        scale[: 2 * (map.bins - 1)] = 1 / math.sqrt(hidden or _width(net))
        self.register_buffer("scale", scale, persistent=False)
        self.gain: nn.Parameter | None = None
        if identity_init and not _start_at_zero(net):
            self.gain = nn.Parameter(torch.zeros(features, n))

    def extra_repr(self) -> str:
        r"""Returns the family of splines, the number of features and whether there is a gain, for
        the printed module."""
        return f"{self.map}, features={self.features}, gain={self.gain is not None}"

    def phi(self, raw: Tensor, of: Tensor | slice = ALL) -> Tensor:
        r"""Returns the parameters of the splines.

        Arguments:
            raw: The outputs of the network, with shape :math:`(N, C n)` or
                :math:`(N, C n, H, W)`: for one feature after another its
                :math:`n = 3 (K - 1) + 1` numbers, widths, heights, derivatives and shift.
            of: The features that are meant.

        Returns:
            The parameters, with shape :math:`(N, C, n)` or :math:`(N, C, n, H, W)`.

        Raises:
            ValueError: If the network returned another number of outputs.
        """
        n = self.map.parameters
        features = self.features if isinstance(of, slice) else len(of)
        if raw.shape[1] != features * n:
            raise ValueError(
                f"the network must return {n} numbers for each of {features} features,"
                f" {features * n} in all; got {raw.shape[1]}"
            )
        phi = raw.unflatten(1, (features, n))
        ones = (1,) * (phi.dim() - 3)
        if self.gain is None:
            return phi * self.scale.reshape(-1, *ones)
        # An infinite output times a gain of zero would be NaN.
        far = torch.finfo(phi.dtype).max
        gain = PACE * self.gain[of] * self.scale
        return phi.clamp(-far, far) * gain.reshape(*gain.shape, *ones)

    def spline(self, raw: Tensor, of: Tensor | slice = ALL) -> Univariate:
        r"""Returns the :class:`flowguard.RobustSpline` of these outputs of the network; for their
        shape, see :meth:`phi`.

        Arguments:
            raw: The outputs of the network.
            of: The features that are meant.
        """
        return self.map.transform(self.phi(raw, of))

    def forward(
        self, x: Tensor, raw: Tensor, inverse: bool = False, of: Tensor | slice = ALL
    ) -> tuple[Tensor, Tensor]:
        r"""Transforms `x`, with shape :math:`(N, C)` or :math:`(N, C, H, W)`."""
        return apply_map(self.spline(raw, of), x, inverse)


def _start_at_zero(net: Any) -> bool:
    r"""Sets the last layer of one of nflows' own networks to zero; tells whether it is one."""
    last = getattr(net, "final_layer", None)
    if not isinstance(last, nn.Linear | nn.Conv2d):
        return False
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return True


def _width(net: Any) -> int:
    r"""The width of the network, which those of nflows tell."""
    for name in ("hidden_features", "hidden_channels"):
        width = getattr(net, name, None)
        if isinstance(width, int) and width > 0:
            return width
    return 1
