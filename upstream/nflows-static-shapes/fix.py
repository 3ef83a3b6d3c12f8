r"""A rational-quadratic spline of static shapes, for nflows 0.14 and its fork in glasflow 0.4.1.

with applied():
    flow = torch.compile(flow, fullgraph=True)
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

COPIES = tuple(name for name in ("nflows", "glasflow") if find_spec(name))


def unconstrained_rational_quadratic_spline(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    enable_identity_init: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The spline of Durkan et al. (2019) within [-tail_bound, tail_bound], else the identity.

    All inputs go through the spline, those outside as 0, and `where` takes what counts: no
    selection by a mask, whose size is known only when it runs.
    """
    if tails != "linear":
        raise RuntimeError(f"{tails} tails are not implemented.")
    bins = unnormalized_widths.shape[-1]
    for of, least in (("width", min_bin_width), ("height", min_bin_height)):
        if least * bins > 1:
            raise ValueError(f"Minimal bin {of} too large for the number of bins")

    inside = (inputs >= -tail_bound) & (inputs <= tail_bound)
    beta = math.log(2) / (1 - min_derivative) if enable_identity_init else 1
    # The slope at both ends is 1, as that of the identity.
    one = math.log(math.exp(1 - min_derivative) - 1)
    d = F.pad(unnormalized_derivatives, (1, 1), value=one)
    d = min_derivative + F.softplus(d, beta=beta)
    x = _knots(unnormalized_widths, min_bin_width, tail_bound)
    y = _knots(unnormalized_heights, min_bin_height, tail_bound)

    # 0 is in every box. To clamp would leave NaN as it is, whose gradients would be NaN, too.
    v = torch.where(inside, inputs, 0.0)
    k = (v[..., None] >= (y if inverse else x)[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (of.gather(-1, k + i).squeeze(-1) for of in (x, y, d) for i in (0, 1))
    value, ladj = (_backward if inverse else _forward)(v, x0, x1, y0, y1, d0, d1)
    outputs = torch.where(inside, value, inputs)
    return outputs, torch.where(inside, -ladj if inverse else ladj, 0.0)


def _knots(logits: Tensor, least: float, bound: float) -> Tensor:
    shares = least + (1 - least * logits.shape[-1]) * logits.softmax(-1)
    inner = 2 * bound * shares.cumsum(-1)[..., :-1] - bound
    ends = torch.full_like(inner[..., :1], bound)
    return torch.cat((-ends, inner, ends), dim=-1)


def _ladj(t: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    r"""The logarithm of the slope at the place t in a bin: equation 5 of the paper."""
    side = t * (1 - t)
    above = s**2 * (d1 * t**2 + 2 * s * side + d0 * (1 - t) ** 2)
    return above.log() - 2 * (s + (d0 + d1 - 2 * s) * side).log()


def _forward(v: Tensor, *knots: Tensor) -> tuple[Tensor, Tensor]:
    r"""The value and the logarithm of the slope: equations 4 and 5 of the paper."""
    x0, x1, y0, y1, d0, d1 = knots
    s = (y1 - y0) / (x1 - x0)
    t = (v - x0) / (x1 - x0)
    side = t * (1 - t)
    value = y0 + (y1 - y0) * (s * t**2 + d0 * side) / (s + (d0 + d1 - 2 * s) * side)
    return value, _ladj(t, s, d0, d1)


def _backward(v: Tensor, *knots: Tensor) -> tuple[Tensor, Tensor]:
    r"""The value of the inverse, and that of the map there: equations 6 to 8 of the paper."""
    x0, x1, y0, y1, d0, d1 = knots
    h, u = y1 - y0, v - y0
    s = h / (x1 - x0)
    bend = d0 + d1 - 2 * s
    a, b, c = h * (s - d0) + u * bend, h * d0 - u * bend, -s * u
    # Not asserted: it would end the graph, and a number below 0 is rounding.
    discriminant = (b**2 - 4 * a * c).clamp(min=torch.finfo(a.dtype).tiny)
    t = (2 * c / (-b - discriminant.sqrt())).clamp(0, 1)
    return x0 + t * (x1 - x0), _ladj(t, s, d0, d1)


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the spline into the copies of nflows that are installed, and takes it out again."""
    name = "unconstrained_rational_quadratic_spline"
    with ExitStack() as stack:
        for copy in COPIES:
            root = "glasflow.nflows" if copy == "glasflow" else copy
            for user in ("splines", "splines.rational_quadratic", "autoregressive"):
                module = import_module(f"{root}.transforms.{user}")
                ours = unconstrained_rational_quadratic_spline
                stack.enter_context(patch.object(module, name, ours))
        yield
