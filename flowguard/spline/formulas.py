r"""The spline with its shift as formulas: what the compiler sees, and what can be differentiated."""

__all__ = ["evaluate", "pull_back"]

from types import ModuleType

from torch import Tensor

from flowguard.spline import bin as rq
from flowguard.spline import many, two, usual
from flowguard.spline.options import Options


def _kernel(widths: Tensor, o: Options) -> ModuleType:
    r"""What computes splines of as many bins."""
    if o.usual is not None:
        return usual
    return two if len(widths) == 1 else many


def evaluate(
    v: Tensor, w: Tensor, h: Tensor, d: Tensor, shift: Tensor | None, o: Options
) -> tuple[Tensor, ...]:
    r"""The value and the logarithm of the slope for input, parameters and shift."""
    v, w, h, d = (t.to(o.work) for t in (v, w, h, d))
    by = None
    if shift is not None:
        by = (rq.from_arc if o.prepared else rq.squash)(shift.to(o.work), o.shift_bound)
    if o.inverse and by is not None:
        v = v - by
    out, steep = _kernel(w, o).evaluate(v, (w, h, d), o)
    return out if o.inverse or by is None else out + by, steep


def pull_back(
    o: Options, x: Tensor, w: Tensor, h: Tensor, d: Tensor, shift: Tensor | None, *grads: Tensor
) -> tuple[Tensor | None, ...]:
    r"""The gradients to input, parameters and shift for those to both outputs."""
    x, w, h, d = (t.to(o.work) for t in (x, w, h, d))
    to_x, *to_params = _kernel(w, o).pull_back(x, (w, h, d), grads, o)
    to_shift = None
    if shift is not None:
        to_by = -to_x if o.inverse else grads[0]
        to_shift = rq.squash_pullback(shift.to(o.work), to_by, o.shift_bound)
    return to_x, *to_params, to_shift
