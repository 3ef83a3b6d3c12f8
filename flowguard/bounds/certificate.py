r"""The certificate: a number that no sample can exceed, whatever the condition is."""

__all__ = ["Certificate", "Row", "Table", "certify"]

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from flowguard.bounds.holders import steps_within
from flowguard.bounds.parts import gather, parts
from flowguard.bounds.regions import Region
from flowguard.bounds.relaxation import Chain
from flowguard.bounds.rules import compiled
from flowguard.bounds.steps import Linear, Noise, Refused, Step
from flowguard.hosts import opened

#: A radius beside which all shifts vanish, and whose square is finite.
FAR = 1e60
#: The coarsest relative error of one operation that a bound is made for.
COARSEST = 0.01
BROKEN = "it holds numbers that are not finite"

#: The relative error to which the factors of a float32 product are rounded in each mode.
REDUCED = {"bf16": 2.0**-8, "tf32": 2.0**-11, "high": 2.0**-11, "medium": 2.0**-8}


class Row(NamedTuple):
    r"""A layer in the table of a certificate.

    Arguments:
        name: The name of the layer within the model.
        type: The class of the layer.
        bound_in: The largest absolute value before the layer.
        bound_out: The largest absolute value after it, :math:`\infty` if there is no bound.
        depends: How the layer depends on the condition, in words.
        reason: Why the layer is not certified, in words; empty if it is.
        gain: By how much a layer that is not certified may multiply its input, if that is known.
    """

    name: str
    type: str
    bound_in: float
    bound_out: float
    depends: str
    reason: str = ""
    gain: float | None = None


class Table(list[Row]):
    r"""The rows of a certificate, which print as a table."""

    def __str__(self) -> str:
        lines = [("layer", "type", "bound in", "bound out", "depends on the condition")]
        for row in self:
            depends = f"{row.depends}; not certified: {row.reason}" if row.reason else row.depends
            if row.gain is not None:
                depends += f" (gain up to {row.gain:.4g})"
            lines.append(
                (row.name, row.type, f"{row.bound_in:.4g}", f"{row.bound_out:.4g}", depends)
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


@dataclass(frozen=True, eq=False)
class Certificate:
    r"""What a flow can be proved to do to noise, whatever the condition is; see :func:`certify`.

    It holds for the weights that the model had when it was made, and equals itself alone: to
    compare two of them, compare their :meth:`to_dict`.

    Arguments:
        model: The class of the model.
        steps: What the layers do, in sampling order.
        roundoff: The relative error of one operation of the model.
        largest: The largest number that the model can hold.
        effort: How many steps of a search tighten the bounds, if any; see :meth:`tighten`.

    Example:
        >>> spline = flowguard.RobustSpline(*torch.zeros(3, 1), torch.zeros(()), shift_bound=1.0)
        >>> certificate = flowguard.certify(spline, roundoff=0.0)
        >>> certificate.certified, certificate.bound(9.0)
        (True, 10.0)
        >>> round(certificate.growth, 6)
        1.0
        >>> sorted(certificate.to_dict(radius=9.0))
        ['bound', 'certified', 'growth', 'layers', 'model', 'radius', 'roundoff']
    """

    model: str
    steps: tuple[Step, ...]
    roundoff: float
    largest: float = math.inf
    effort: int | None = None
    _tables: dict[float, "Table"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def certified(self) -> bool:
        r"""Whether there is a bound: no layer was refused."""
        return not self.refused

    @property
    def refused(self) -> list[Refused]:
        r"""The layers that stand in the way of a bound.

        Example:
            >>> flow = flowguard.image.ConditionalMultiscaleFlow(
            ...     3, 8, levels=1, steps=1, hidden=16, coupling="affine"
            ... )
            >>> [refused.name for refused in flowguard.certify(flow).refused]
            ['steps.0.0.coupling.rest', 'steps.0.0.coupling.injector']
        """
        return [s for s in self.steps if isinstance(s, Refused)]

    @property
    def event_size(self) -> int | None:
        r"""The number of elements of the noise, :py:`None` if it varies or is not known."""
        return next((s.event for s in self.steps if isinstance(s, Noise)), None)

    @property
    def growth(self) -> float:
        r"""The limit of ``bound(radius) / radius`` for large radii, :math:`\infty` without bound.

        Far out, this is the only factor by which noise can be amplified.
        """
        rows = replace(self, largest=math.inf, effort=None)._table(FAR)
        factor = rows[-1].bound_out / FAR if rows else 1.0
        return factor if factor > FAR**-0.5 else 0.0  # of what no noise gets beyond

    def bound(
        self,
        radius: float | None = None,
        *,
        confidence: float | None = None,
        temperature: float = 1.0,
        event_size: int | None = None,
    ) -> float:
        r"""Returns a number that no element of a sample can exceed in absolute value.

        Arguments:
            radius: The largest absolute value of the noise.
            confidence: In place of `radius`, the probability with which all elements of Gaussian
                noise shall be smaller than the radius.
            temperature: The standard deviation of that noise.
            event_size: The number of its elements, if the model does not tell, as of an image
                model, whose images may have any size.

        Raises:
            ValueError: If not exactly one of `radius` and `confidence` is given, if one of the
                numbers is out of range, or if the size of the noise is not known.

        Example:
            >>> spline = flowguard.RobustSpline(*torch.zeros(3, 1), torch.zeros(()), shift_bound=1.0)
            >>> certificate = flowguard.certify(spline, roundoff=0.0)
            >>> certificate.bound(9.0)
            10.0
            >>> round(certificate.bound(confidence=0.99, event_size=100), 3)  # noise up to 3.89
            5.0
        """
        if (radius is None) == (confidence is None):
            raise ValueError(
                f"give either radius or confidence; got radius={radius}, confidence={confidence}"
            )
        if confidence is not None:
            radius = self._radius(confidence, temperature, event_size)
        rows = self._table(float(radius))  # type: ignore[arg-type]
        return rows[-1].bound_out if rows else float(radius)  # type: ignore[arg-type]

    def tighten(self, steps: int = 20) -> "Certificate":
        r"""Returns a certificate of the same model whose bounds are smaller, and take longer.

        For each radius that it is asked for, it follows every output back to the noise; see "A
        bound read backwards" in the documentation. Its bounds are never larger than those of this
        certificate. They are computed once for each radius, in seconds for a small image model
        and in minutes for one of a hundred layers.

        Arguments:
            steps: The number of steps of the search that makes the bounds smaller. The bounds
                hold for any number of them, also for none.

        Raises:
            ValueError: If the number of steps is negative.

        Example:
            >>> flow = flowguard.image.ConditionalMultiscaleFlow(3, 8, levels=2, steps=1, hidden=16)
            >>> certificate = flowguard.certify(flow)
            >>> certificate.tighten(steps=5).bound(4.0) < certificate.bound(4.0)
            True
        """
        if steps < 0:
            raise ValueError(f"steps must not be negative; got {steps}")
        return replace(self, effort=steps)

    def table(self, radius: float = 4.0) -> Table:
        r"""Returns a row for each layer, in sampling order. It prints as a table.

        Arguments:
            radius: The largest absolute value of the noise.

        Example:
            >>> spline = flowguard.RobustSpline(*torch.zeros(3, 1), torch.zeros(()), shift_bound=1.0)
            >>> (row,) = flowguard.certify(spline, roundoff=0.0).table(9.0)
            >>> row.bound_in, row.bound_out
            (9.0, 10.0)
        """
        return self._table(radius)

    def to_dict(self, radius: float = 4.0) -> dict[str, Any]:
        r"""Returns the certificate as plain numbers, strings, lists and dictionaries.

        Arguments:
            radius: The largest absolute value of the noise that the bounds are for.
        """
        return {
            "model": self.model,
            "certified": self.certified,
            "radius": radius,
            "bound": self.bound(radius),
            "growth": self.growth,
            "roundoff": self.roundoff,
            "layers": [row._asdict() for row in self.table(radius)],
        }

    def __str__(self) -> str:
        if self.certified:
            head = f"{self.model}: certified, growth {self.growth:.4g}; for noise up to 4:"
        else:
            names = ", ".join(f"{s.name or s.kind} ({s.kind})" for s in self.refused[:3])
            more = len(self.refused) - 3
            names += f" and {more} more" if more > 0 else ""
            head = f"{self.model}: not certified, because of {names}; for noise up to 4:"
        return f"{head}\n{self.table()}"

    def _table(self, radius: float) -> Table:
        if not 0 <= radius < math.inf:
            raise ValueError(f"radius must be finite and not negative; got {radius}")
        if radius not in self._tables:
            self._tables[radius] = Table(self._rows(radius))
        return Table(self._tables[radius])

    def _rows(self, radius: float) -> Iterator[Row]:
        features = next((s.features for s in self.steps if s.features is not None), 1)
        box = torch.full((1, features), radius, dtype=torch.float64)
        start = Region.cube(box)
        chain = None if self.effort is None else Chain(start, self.effort)
        region: Region | None = start
        before = radius
        for i, step in enumerate(self.steps):
            reason, gain = "", None
            if isinstance(step, Refused):
                region, reason, gain = None, step.reason, step.gain
            elif region is not None:
                if step.features not in (None, region.box.shape[1]):
                    box = region.box.new_full((1, step.features), region.largest)
                    region = Region.cube(box)
                    if chain is not None:
                        chain.add(None, region)
                if isinstance(step, Noise):
                    radius = region.largest
                after = step.through(region, radius, self.roundoff)
                if chain is not None:
                    chain.add(step.link(region, radius, self.roundoff), after)
                    if isinstance(step, Linear) or i == len(self.steps) - 1:
                        after = chain.tighten(after)
                region = after if max(after.largest, step.peak) <= self.largest else None
            largest = math.inf if region is None else region.largest
            yield Row(step.name, step.kind, before, largest, step.depends, reason, gain)
            before = largest

    def _radius(self, confidence: float, temperature: float, event_size: int | None) -> float:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
        if not temperature >= 0:
            raise ValueError(f"temperature must not be negative; got {temperature}")
        if not all(s.normal for s in self.steps if isinstance(s, Noise)):
            raise ValueError(
                "the noise of this model is not standard normal: give a radius, not a confidence"
            )
        size = self.event_size if event_size is None else event_size
        if size is None or size < 1:
            raise ValueError(
                f"the noise of {self.model} has no fixed size: give event_size, the number of all"
                f" elements of an image; got {event_size}"
            )
        # (1 - 2 Φ(-r))^n = p, without the cancellation of 1 - p^(1/n)
        tail = -math.expm1(math.log(confidence) / size)
        quantile = torch.special.ndtri(torch.tensor(tail / 2, dtype=torch.float64))
        return -temperature * quantile.item()


def certify(model: Any, *, roundoff: float | None = None) -> Certificate:
    r"""Proves that no condition can make a flow explode, from its weights alone.

    Walks the layers in sampling order and composes what is known of each, such that for the
    certificate `c`

    .. math:: |f^{-1}(z; y)|_\infty \leq c.\mathrm{bound}(R)
        \quad \text{for all } |z|_\infty \leq R \text{ and all } y

    A layer that depends on the condition without bound, or that flowguard has no rule for, is
    named, and the certificate is then not `certified`. See "What is guaranteed, and what is not"
    in the documentation for the proof and its assumptions.

    References:
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        model: A flow or a layer of flowguard, or of a library that it has rules for; or what
            samples from one, such as a posterior of sbi, or a module that holds one and whose
            source shows that it hands on its samples as they are. Of a
            :class:`flowguard.models.SuperResolutionFlow`, the residual over the upsampled
            condition is bounded.
        roundoff: The relative error of one operation of the model, for which the bound allows.
            If :py:`None`, that of the coarsest dtype of its weights, or of autocast where it is
            called under it; zero proves the bound for exact arithmetic. What
            :func:`torch.set_float32_matmul_precision` allows, such as TF32, is allowed for as it
            is set at the time of the call.

    Raises:
        ValueError: If `roundoff` is negative, or so coarse that no bound is known.

    Example:
        >>> flow = flowguard.image.ConditionalMultiscaleFlow(3, 8, levels=2, steps=1, hidden=16)
        >>> certificate = flowguard.certify(flow)
        >>> certificate.certified
        True
        >>> certificate.bound(4.0) > 4.0
        True
        >>> print(flowguard.certify(flowguard.RobustSpline(*torch.zeros(3, 1), torch.zeros(()))))
        RobustSpline: certified, growth 1; for noise up to 4:
        layer  type          bound in  bound out  depends on the condition
               RobustSpline  4         9          within a box of 5 and a shift of 5
    """
    inner = opened(model).module
    tensors = [part for part in parts(inner) if isinstance(part, Tensor)]
    dtypes = _dtypes(tensors)
    if roundoff is None:
        # The certificate itself is computed in float64, whose own rounding shall not count.
        roundoff = max(2.0**-50, *(torch.finfo(d).eps / 2 for d in dtypes))
        coarse = [d for d in dtypes if torch.finfo(d).eps / 2 >= COARSEST]
        if coarse:
            names = ", ".join(sorted(map(str, coarse)))
            return _certificate(model, [Refused(reason=f"no bound is known in {names}")], 0.0)
    if not 0 <= roundoff < COARSEST:
        raise ValueError(f"roundoff must lie between 0 and {COARSEST}; got {roundoff}")
    # Where weights are broken, so is all that rules would make of them: they alone are told.
    walk: list[Step] = [
        Refused(name=name, kind=what, reason=BROKEN) for name, what in _broken(inner)
    ]
    if _global_forward_hooks or _global_forward_pre_hooks:
        reason = "hooks of all modules, which may change what they return, are registered"
        walk.append(Refused(kind="torch.nn.Module", reason=reason))
    if not walk:
        reduced = {conv: _reduced(tensors, conv) for conv in (False, True)}
        walk = [_told(step, roundoff, reduced) for step in steps_within(model)]
    return _certificate(model, walk, roundoff, min(torch.finfo(d).max for d in dtypes))


def _certificate(
    model: Any, walk: list[Step], roundoff: float, largest: float = math.inf
) -> Certificate:
    kind = type(compiled(model)).__name__
    return Certificate(kind, tuple(walk), roundoff, largest)


def _dtypes(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    r"""The dtypes that a model with these tensors computes in."""
    floating = [t for t in tensors if t.is_floating_point()]
    found = {t.dtype for t in floating}
    if not any(t.dim() for t in floating):  # numbers take the dtype of what they meet
        found.add(torch.get_default_dtype())
    kinds = {t.device.type for t in tensors} or {"cpu"}
    found |= {torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)}
    return found


def _reduced(tensors: Iterable[Tensor], convolution: bool) -> float:
    r"""To which relative error the matrix units round the factors of float32 products."""
    if not any(t.dtype == torch.float32 for t in tensors):
        return 0.0
    modes = {"none"}
    for device in {t.device.type for t in tensors}:
        # On CPUs what is a product here is a convolution there, and the other way round.
        kinds = {"matmul", "conv"} if convolution or device == "cpu" else {"matmul"}
        modes |= {_mode(device, kind) for kind in kinds}
    return max(REDUCED.get(mode, 0.0) for mode in modes)


def _mode(device: str, kind: str) -> str:
    r"""The precision that products or convolutions in float32 are computed in, in torch's words."""
    name = {"cpu": "mkldnn", "cuda": "cuda" if kind == "matmul" else "cudnn"}.get(device, "")
    units = getattr(getattr(torch.backends, name, None), kind, None)
    mode = getattr(units, "fp32_precision", None)
    if mode is not None:
        return str(mode)
    if device == "cuda" and kind == "conv" and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return torch.get_float32_matmul_precision()  # before torch 2.9 there is one word for all


def _broken(model: Any) -> Iterator[tuple[str, str]]:
    r"""Goes over the names of the tensors that spoil all samples."""
    model = gather(model)
    for name, parameter in model.named_parameters():
        # A sum is finite only if all that it adds is; where it overflows, each is looked at.
        if not bool(parameter.sum().isfinite()) and not bool(parameter.isfinite().all()):
            yield name, "Parameter"
    for prefix, module in model.named_modules():
        if type(module).__module__.startswith("flowguard.ood"):
            continue  # what tells of strange conditions has NaN where it knows nothing yet
        for name, buffer in module.named_buffers(prefix, recurse=False):
            # Masks may well be infinite.
            if bool(buffer.sum().isnan()) and bool(buffer.isnan().any()):
                yield name, "Buffer"


def _told(step: Step, roundoff: float, reduced: dict[bool, float]) -> Step:
    r"""The step, refused if its numbers are not finite or drown in the rounding errors."""

    def refused(reason: str) -> Refused:
        return Refused(name=step.name, kind=step.kind, reason=reason, depends=step.depends)

    if not step.finite:
        return refused(BROKEN)
    if isinstance(step, Linear):
        step = replace(step, factors=reduced[step.convolution])
    operations = step.operations
    if operations * roundoff >= 1:
        return refused(
            f"{operations} operations after one another, each with a relative error of"
            f" {roundoff:.3g}, may lose all digits"
        )
    return step
