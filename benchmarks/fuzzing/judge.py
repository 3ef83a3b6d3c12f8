r"""The property: a model is refused with a reason, or no sample is beyond its bound."""

__all__ = ["RADII", "Verdict", "judge"]

import itertools
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.bounds import certify

from .maker import ROWS, Case, Maker, Source

RADII = [0.0, 1e-30, 0.01, 1.0, 4.0, 1e3, 1e10, 1e30]

#: How far contexts are; each row of a batch has one.
FINITE = [0.0, 1.0, 1.0, 30.0, 1e4, 1e10, 1e30]

#: What torch and the hosts say where they have no kernel for a dtype, or mix dtypes themselves.
UNSUPPORTED = (
    "not implemented for",
    "must have the same dtype",
    "have the same dtype",
    "same dtype",
    "Low precision dtypes",
    "expected scalar type",
    "and bias type",
    "should be the same",
    "Expected object of scalar type",
    "no kernel",
    "bound must lie in",  # a box that no spline takes
    "without overflow",  # nor one in half precision
    "This function was deprecated since version",  # an inverse of a host that torch took away
    "Index put requires the source and destination dtypes match",
)


#: Layers of networks that are not torch's own.
NETWORKS = {"Linear", "MaskedLinear", "NormedConv2d", "ZeroConv2d"}


@dataclass
class Verdict:
    r"""What was found of a case.

    Arguments:
        outcome: ``"certified"``, ``"refused"`` or ``"unsupported"``.
        found: What breaks the property, in words; empty if nothing does.
        reasons: Why it was refused.
        elements: The number of elements of samples that were compared.
        nan: The number of those that are NaN, and may be.
        bounded: Whether a bound was finite and compared.
        tightened: Whether the bounds were those of the tightened certificate.
        reach: The largest share of a bound that was reached.
        details: Figures.
    """

    outcome: str
    found: str = ""
    reasons: list[str] = field(default_factory=list)
    elements: int = 0
    nan: int = 0
    bounded: bool = False
    tightened: bool = False
    reach: float = 0.0
    details: str = ""


def judge(case: Case, m: Maker, certify: Any = certify) -> Verdict:
    r"""Returns what was found of a case.

    Arguments:
        case: The case.
        m: What chooses radii and contexts.
        certify: What certifies; the mutation run gives another.
    """
    try:
        certificate = certify(case.model)
    except Exception as error:
        return Verdict("refused", f"certify raises {_told(error)}", details=_trace())
    reasons = [step.reason for step in certificate.refused]
    if reasons or not certificate.certified:
        empty = not reasons or not all(reason.strip() for reason in reasons)
        return Verdict("refused", "it is refused without a reason" if empty else "", reasons)
    verdict = Verdict("certified")
    try:
        verdict.found = _compare(case, m, certificate, verdict)
    except Exception as error:
        words = str(error)
        if any(text in words for text in UNSUPPORTED):
            verdict.outcome = "unsupported"
        elif not case.tampered:
            verdict.found = f"sampling raises {_told(error)}"
            verdict.details = _trace()
    return verdict


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:120]}"


def _trace() -> str:
    return "".join(traceback.format_exc().splitlines(keepends=True)[-8:])


def _compare(case: Case, m: Maker, certificate: Any, verdict: Verdict) -> str:
    limit = torch.finfo(case.dtype).max
    bounds = [certificate.bound(radius) for radius in RADII]
    if any(math.isnan(b) or b < 0 for b in bounds):
        return f"a bound is negative or NaN: {bounds}"
    if any(b > a for b, a in itertools.pairwise(bounds)):
        return f"the bounds fall with the radius: {bounds}"
    if math.isnan(certificate.growth) or certificate.growth < 0:
        return f"the growth is {certificate.growth}"
    radii = [torch.tensor(r, dtype=case.dtype).item() for r in RADII if r <= limit]
    useful = [r for r in radii if math.isfinite(certificate.bound(r))]
    if not useful:
        return ""
    verdict.bounded = True
    plain = certificate
    if m.flip(0.25):
        certificate = certificate.tighten(steps=m.pick([0, 3]))
        verdict.tightened = True
    chosen = {m.pick(useful) for _ in range(2)} | {4.0} & {*useful}
    for radius in sorted(chosen):
        bound = certificate.bound(radius)
        if not 0 <= bound <= plain.bound(radius):
            return f"a bound of {plain.bound(radius)} is tightened to {bound}"
        noise = Source(radius, case.dtype)
        context = _contexts(case, ROWS)
        x = _sampled(case, noise, context, bound, verdict, infinite=False)
        if isinstance(x, str):
            return x
        if isinstance(context, Tensor | list) and x.numel() and len(x) == ROWS:
            found = _closer(case, noise, context, x, bound, verdict)
            if found:
                return found
        if case.context and radius == max(chosen):
            context = _contexts(case, ROWS, infinite=True)
            found = _sampled(case, Source(radius, case.dtype), context, bound, verdict, True)
            if isinstance(found, str):
                return found
    return ""


def _sampled(
    case: Case, noise: Source, context: Any, bound: float, verdict: Verdict, infinite: bool
) -> Tensor | str:
    r"""The samples, or in words what is wrong with them."""
    with torch.enable_grad(), _overflows() as excused:
        x = case.draw(noise, context).detach()
    if case.cuts:  # without gradients its parts are computed together
        noise = noise.repeated()
        with torch.no_grad():
            x = torch.cat((x, case.draw(noise, context)))
    verdict.elements += x.numel()
    if not x.numel():
        return x
    wide = x.double()
    largest = wide.abs().nan_to_num(0.0, posinf=math.inf).max().item()
    if largest > bound:
        return f"a sample of {largest:.9g} exceeds the bound {bound:.9g} for noise of {noise.radius:g}"
    verdict.reach = max(verdict.reach, largest / bound if bound else 0.0)
    nan = wide.isnan().flatten(1).any(1) if x.dim() > 1 else wide.isnan()
    verdict.nan += int(wide.isnan().sum())
    allowed = excused.rows(len(nan))
    if case.cuts:
        # Where sums overflow depends on their order, which is another one without gradients.
        half = len(nan) // 2
        allowed[half:] |= excused.rows(half, far=True)
    allowed = allowed | _given_nan(context, len(nan), infinite and not case.cuts)
    # Weights that move at each look overflow in one pass and not in another.
    if bool((nan & ~allowed).any()) and not case.tampered:
        where = "an infinite" if infinite else "a finite"
        return f"NaN for {where} context, where no network made it, and noise of {noise.radius:g}"
    return x


def _given_nan(context: Any, rows: int, infinite: bool) -> Tensor:
    r"""The rows whose context is NaN, or infinite where that is an excuse too."""
    found = torch.zeros(rows, dtype=torch.bool)
    for t in context if isinstance(context, list) else [context]:
        if isinstance(t, Tensor) and len(t) and not rows % len(t):
            bad = ~t.isfinite() if infinite else t.isnan()
            found |= bad.flatten(1).any(1).repeat(rows // len(t))
    return found


class _Excused:
    r"""The rows of which a network has made NaN, and those of which it has made infinity."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []
        self.far: list[Tensor] = []

    def look(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        cls = type(module)
        if not cls.__module__.startswith("torch.nn.modules") and cls.__name__ not in NETWORKS:
            return
        for bad, masks in (
            (output.detach().isnan(), self.masks),
            (~output.detach().isfinite(), self.far),
        ):
            if bool(bad.any()):
                masks.append(bad.flatten(1).any(1) if bad.dim() > 1 else bad)

    def rows(self, number: int, far: bool = False) -> Tensor:
        r"""Returns which of so many rows are excused."""
        found = torch.zeros(number, dtype=torch.bool)
        for mask in self.far if far else self.masks:
            if len(mask) and not number % len(mask):
                found |= mask.repeat(number // len(mask))
            else:
                found |= True
        return found


@contextmanager
def _overflows() -> Iterator[_Excused]:
    excused = _Excused()
    handle = nn.modules.module.register_module_forward_hook(excused.look)
    try:
        yield excused
    finally:
        handle.remove()


def _contexts(case: Case, rows: int, infinite: bool = False) -> Any:
    if not case.context:
        return None
    scales = [math.inf, math.nan, 1.0] if infinite else FINITE
    scale = torch.tensor(scales)[torch.randint(len(scales), (rows,))]
    tensors = []
    for shape in case.context:
        t = torch.randn(rows, *shape)
        far = scale.reshape(-1, *(1,) * len(shape))
        some = torch.rand_like(t) < 0.5 if infinite else torch.ones_like(t, dtype=torch.bool)
        far = torch.where(far.isinf(), t.sign() * math.inf, far * t)
        far = torch.where(some, far, t)
        most = math.inf if infinite else torch.finfo(case.dtype).max
        tensors.append(far.to(torch.float64).clamp(-most, most).to(case.dtype))
    return tensors if case.listed or len(tensors) > 1 else tensors[0]


def _closer(
    case: Case, noise: Source, context: Any, x: Tensor, bound: float, verdict: Verdict
) -> str:
    r"""Looks around the largest sample."""
    row = int(x.abs().nan_to_num(0.0).flatten(1).amax(1).argmax())
    near = Source(noise.radius, noise.dtype)
    near.again = _again(noise, row)
    moved = [_around(t, row, case) for t in (context if isinstance(context, list) else [context])]
    context = moved if isinstance(context, list) else moved[0]
    with torch.no_grad():
        x = case.draw(near, context)
    verdict.elements += x.numel()
    largest = x.double().abs().nan_to_num(0.0, posinf=math.inf).max().item() if x.numel() else 0.0
    if largest > bound:
        return f"a sample of {largest:.9g} exceeds the bound {bound:.9g} for noise of {noise.radius:g}"
    verdict.reach = max(verdict.reach, largest / bound if bound else 0.0)
    return ""


def _again(noise: Source, row: int) -> Iterator[Tensor]:
    for z in noise.given:
        if len(z) % ROWS or not len(z):
            yield z
            continue
        turned = torch.where(torch.rand(z.shape) < 0.1, -1.0, 1.0).to(z.dtype)
        corner = noise.radius * z[row].sign()
        yield (torch.where(torch.rand(z.shape) < 0.5, corner, z[row]) * turned).to(z.dtype)


def _around(t: Tensor, row: int, case: Case) -> Tensor:
    most = torch.finfo(case.dtype).max
    moved = t[row] * (1 + 0.3 * torch.randn(t.shape)).to(t.dtype)
    return moved.clamp(-most, most)
