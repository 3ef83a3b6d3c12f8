r"""A rational-quadratic spline whose inverse does not end in an assertion, for nflows 0.14.

    with applied():
        samples = flow.sample(1000, context)

The fork of nflows in glasflow 0.4.1 has the same function, and is changed with it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

COPIES = tuple(name for name in ("nflows", "glasflow") if find_spec(name))


def rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    *,
    released: Callable,
    **options: bool,
) -> tuple[Tensor, Tensor]:
    r"""The spline of Durkan et al. (2019): `released` forward, and our own inverse.

    Shapes are those of nflows: inputs (*,), widths and heights (*, K), derivatives (*, K + 1).
    """
    kept = {
        "left": left,
        "right": right,
        "bottom": bottom,
        "top": top,
        "min_bin_width": min_bin_width,
        "min_bin_height": min_bin_height,
        "min_derivative": min_derivative,
        **options,
    }
    bins = unnormalized_widths.shape[-1]
    outside = inverse and (inputs.min() < bottom or inputs.max() > top)
    too_wide = bins * max(min_bin_width, min_bin_height) > 1
    if not inverse or outside or too_wide:  # the latter two raise there
        logits = (unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
        return released(inputs, *logits, inverse=inverse, **kept)

    x = knots(unnormalized_widths, min_bin_width, left, right)
    y = knots(unnormalized_heights, min_bin_height, bottom, top)
    # nflows after 0.14 has an option, by which derivatives of zero mean a slope of one.
    beta = 0.6931471805599453 / (1 - min_derivative) if options.get("enable_identity_init") else 1
    d = min_derivative + F.softplus(unnormalized_derivatives, beta=beta)

    k = (inputs[..., None] >= y[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (of.gather(-1, k + i).squeeze(-1) for of in (x, y, d) for i in (0, 1))
    w, h, u = x1 - x0, y1 - y0, inputs - y0
    s = h / w
    bend = d0 + d1 - 2 * s
    # Equations 6 to 8 of the paper: a root of at² + bt + c, from which the place in the bin is.
    a = h * (s - d0) + u * bend
    b = h * d0 - u * bend
    c = -s * u
    # It is never negative but by rounding, at a flat knot that ends a steep bin. Not zero, as the
    # gradient of the root would be 0 · ∞ there.
    discriminant = (b**2 - 4 * a * c).clamp(min=torch.finfo(inputs.dtype).tiny)
    # In [0, 1] but by rounding: what leaves its bin may leave the box, too.
    t = (2 * c / (-b - discriminant.sqrt())).clamp(0, 1)

    side = t * (1 - t)
    above = s**2 * (d1 * t**2 + 2 * s * side + d0 * (1 - t) ** 2)
    return x0 + t * w, 2 * (s + bend * side).log() - above.log()


def knots(logits: Tensor, least: float, low: float, high: float) -> Tensor:
    r"""The K + 1 ends of K bins, none of which is smaller than `least` of the whole."""
    shares = least + (1 - least * logits.shape[-1]) * logits.softmax(-1)
    inner = low + (high - low) * shares.cumsum(-1)[..., :-1]
    ends = torch.full_like(inner[..., :1], low), torch.full_like(inner[..., :1], high)
    return torch.cat((ends[0], inner, ends[1]), dim=-1)


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the spline into the copies of nflows that are installed, and takes it out again."""
    with ExitStack() as stack:
        for copy in COPIES:
            root = "glasflow.nflows" if copy == "glasflow" else copy
            splines = import_module(f"{root}.transforms.splines")
            module = import_module(f"{root}.transforms.splines.rational_quadratic")
            ours = partial(rational_quadratic_spline, released=module.rational_quadratic_spline)
            users = splines, module, import_module(f"{root}.transforms.autoregressive")
            for user in users:
                stack.enter_context(patch.object(user, "rational_quadratic_spline", ours))
        yield
