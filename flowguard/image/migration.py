r"""How image flows are made robust, for :func:`flowguard.migrate`.

Every affine map of a coupling becomes a robust spline that follows it, computed from what the old
networks ask for: they are kept as a whole. A free prior of a split is bounded such that nothing
changes where it was on the calibration data.

What takes the place of a layer tells by `changes` what it is, beyond the weights and the layer that
was there, and `restore` makes it again: so it is saved as a part of a model.
"""

__all__ = ["BoundedSplit", "ImageSurgeon", "InscribedCoupling"]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.functional import FAITHFUL, check_bound
from flowguard.image.coupling import ConditionalCoupling
from flowguard.image.flow import ConditionalMultiscaleFlow
from flowguard.image.maps import Affine, Elementwise, Inscribed, ReparametrizedAffine
from flowguard.image.steps import Split
from flowguard.migration.exchange import successor
from flowguard.migration.imitate import AffineMap, AnyTransform, RescaledSpline
from flowguard.migration.inscribe import InscribedAffine
from flowguard.migration.surgeon import Site, Surgeon, surgeon
from flowguard.numerics import instead, normal_log_prob
from flowguard.transforms import Univariate

PIXELS = 4096  # of those that a layer was asked for, how many are kept
ROOM = 1.5  # by how much the bounds of a prior exceed what was met


class InscribedCoupling(ConditionalCoupling):
    r"""Creates a conditional coupling whose affine maps are followed by robust splines.

    It has the networks of the coupling that it takes the place of; see :meth:`in_place_of`.
    """

    units: nn.ModuleDict  # what makes the splines of each part, in the units of its channels

    @classmethod
    def in_place_of(cls, old: ConditionalCoupling, units: Mapping[str, InscribedAffine]) -> Self:
        r"""Returns the coupling that takes the place of another.

        Arguments:
            old: The coupling, with affine maps; those of its parts that are robust already stay.
            units: What makes the splines of a part, by the name of the part; see
                :meth:`ConditionalCoupling.map_of`.

        Raises:
            ValueError: If the maps of the coupling are not affine.
        """
        if not isinstance(old.map, Affine | ReparametrizedAffine):
            raise ValueError(f"splines are inscribed for affine maps alone; got {old.map}")
        before = dict(old.units.items()) if isinstance(old, InscribedCoupling) else {}
        return successor(old, cls, units=nn.ModuleDict({**before, **units}))

    def map_of(self, part: str) -> Elementwise:
        r"""Returns the elementwise map whose parameters a part computes.

        Arguments:
            part: ``"injector"``, ``"noise"`` or ``"rest"``.
        """
        affine = super().map_of(part)
        if part not in self.units or not isinstance(affine, Affine | ReparametrizedAffine):
            return affine
        return Inscribed(affine, self.units[part])

    def changes(self) -> dict[str, Any]:
        r"""Returns what :meth:`restore` takes, of numbers and texts alone."""
        return {"units": {part: units.options for part, units in self.units.items()}}

    @classmethod
    def restore(cls, old: nn.Module, units: Mapping[str, Mapping[str, Any]]) -> Self:
        r"""Returns the coupling with the state of its units still to be loaded.

        Arguments:
            old: The coupling that it takes the place of.
            units: The options of the splines of each part.

        Raises:
            ValueError: If the maps of the coupling are not affine.
        """
        if not isinstance(old, ConditionalCoupling) or not {*units} <= {*parts_of(old)}:
            raise ValueError(
                f"splines are inscribed for the parts of a coupling; got {type(old).__name__} and"
                f" {', '.join(units)}"
            )
        made = {}
        for part, options in units.items():
            channels = old.kept + old.changed if part == "injector" else old.changed
            zero, one = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, channels, 1, 1)
            made[part] = InscribedAffine(
                zero.clone(), one.clone(), zero.clone(), one.clone(), **options
            )
            made[part](one, zero)  # refuses options that there are not
        return cls.in_place_of(old, made)


class BoundedSplit(Split):
    r"""Creates a split whose prior is bounded, without any change well within the bounds.

    It has the network of the split that it takes the place of; see :meth:`in_place_of`.
    """

    @classmethod
    def in_place_of(cls, old: Split, mean_bound: float, scale_bound: float) -> Self:
        r"""Returns the split that takes the place of another.

        Arguments:
            old: The split, with a free prior.
            mean_bound: The bound of the mean.
            scale_bound: The bound of the log-scale.
        """
        new = successor(old, cls)
        new.tame(mean_bound, scale_bound)
        return new

    def changes(self) -> dict[str, Any]:
        r"""Returns what :meth:`restore` takes, of numbers alone."""
        return {"mean_bound": self.mean_bound, "scale_bound": self.scale_bound}

    @classmethod
    def restore(cls, old: nn.Module, mean_bound: float, scale_bound: float) -> Self:
        r"""Returns the split again.

        Arguments:
            old: The split that it takes the place of.
            mean_bound: The bound of the mean.
            scale_bound: The bound of the log-scale.

        Raises:
            ValueError: If the prior of the split is not free.
        """
        if not isinstance(old, Split) or not _is_free(old):
            raise ValueError(f"the free prior of a split is bounded; got {old}")
        check_bound(mean_bound, "mean_bound")
        check_bound(scale_bound, "scale_bound")
        return cls.in_place_of(old, mean_bound, scale_bound)


def parts_of(coupling: ConditionalCoupling) -> tuple[str, ...]:
    r"""Returns the names of the parts of a coupling that compute the parameters of a map."""
    return ("injector", "rest") if coupling.noise is None else ("injector", "noise", "rest")


class _Witness(Univariate):
    r"""A univariate map that tells what it was asked."""

    def __init__(self, base: Univariate, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.base, self.tell = base, tell

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.tell(x)
        return self.base.call_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.base.inverse_and_ladj(y)
        self.tell(x)
        return x, ladj


class _Hearing:
    r"""An elementwise map that tells what it was asked, with which lines."""

    def __init__(self, base: Any, tell: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self.base, self.tell = base, tell
        self.parameters = base.parameters

    def transform(self, phi: Tensor) -> Univariate:
        slope, value = self.base.line(phi)
        return _Witness(self.base.transform(phi), lambda x: self.tell(x, slope, value))


class _Lines(Site):
    r"""A layer that applies lines to some channels of its input."""

    def __init__(self, operation: Surgeon, name: str, layer: nn.Module, kind: str) -> None:
        super().__init__(operation, name, layer, kind)
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def _tell(self, x: Tensor, slope: Tensor, value: Tensor) -> None:
        rows = [
            t.expand(x.shape).detach().movedim(1, -1).flatten(0, -2) for t in (x, slope, value)
        ]
        some = torch.randperm(len(rows[0]), device=x.device)[:PIXELS]
        self.asked.append((rows[0][some], rows[1][some], rows[2][some]))

    @property
    def heard(self) -> bool:
        return bool(self.asked)

    def _heard(self, which: int) -> Tensor:
        return torch.cat([a[which] for a in self.asked])

    @property
    def inputs(self) -> Tensor:
        return self._heard(0)

    def old(self, rows: Tensor | slice) -> AnyTransform:
        return AffineMap(self._heard(1)[rows].log(), self._heard(2)[rows])


class _Part(_Lines):
    r"""A part of a coupling."""

    def __init__(
        self, operation: Surgeon, path: str, coupling: ConditionalCoupling, part: str
    ) -> None:
        kind = f"ConditionalCoupling[{type(coupling.map).__name__}]"
        super().__init__(operation, f"{path}.{part}", coupling, kind)
        self.path = path
        self.part = part

    @contextmanager
    def listen(self) -> Iterator[None]:
        coupling: ConditionalCoupling = self.layer
        before = coupling.map_of

        def map_of(part: str) -> Elementwise:
            found = before(part)
            return _Hearing(found, self._tell) if part == self.part else found

        with instead(coupling, "map_of", map_of):
            yield

    def build(self, spline: RescaledSpline) -> nn.Module:
        flat = InscribedAffine.around(spline, *(self._heard(i) for i in range(3)))
        # Channels come before the pixels.
        units = InscribedAffine(*(t[:, None, None].clone() for t in flat.units), **flat.options)
        self.layer = self.operation.model.get_submodule(self.path)  # after its other parts
        return InscribedCoupling.in_place_of(self.layer, {self.part: units})

    def new(self, rows: Tensor | slice) -> AnyTransform:
        slope, value = (self._heard(i)[rows][..., None, None] for i in (1, 2))
        return _Pixels(self.robust.units[self.part](slope, value))


class _Pixels(Univariate):
    r"""A map of images, for pixels in rows."""

    def __init__(self, base: Univariate) -> None:
        super().__init__()
        self.base = base

    def __repr__(self) -> str:
        return repr(self.base)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.base._forward(x[..., None, None])
        return y[..., 0, 0], ladj[..., 0, 0]


class _Prior(_Lines):
    r"""The prior of a split, which is a line for what leaves."""

    def __init__(self, operation: Surgeon, name: str, split: Split) -> None:
        super().__init__(operation, name, split, "Split[free prior]")
        self.most = [0.0, 0.0]

    @contextmanager
    def listen(self) -> Iterator[None]:
        def hear(module: Split, inputs: tuple[Any, ...], output: Any) -> None:
            dropped = inputs[0][:, module.kept :]
            mean, logs = module.prior(inputs[0][:, : module.kept], *inputs[1:2])
            self.most = [
                max(m, t.abs().max().item()) for m, t in zip(self.most, (mean, logs), strict=True)
            ]
            self._tell(dropped, torch.exp(-logs), -mean * torch.exp(-logs))

        hook = self.layer.register_forward_hook(hear)
        try:
            yield
        finally:
            hook.remove()

    def build(self, spline: RescaledSpline) -> nn.Module:
        bounds = (max(m, 1.0) * ROOM / FAITHFUL for m in self.most)
        return BoundedSplit.in_place_of(self.layer, *bounds)

    def new(self, rows: Tensor | slice) -> AnyTransform:
        return self.old(rows)  # the same on all that was met


class ImageSurgeon(Surgeon):
    r"""What it takes to operate on image flows, and on models that hold one.

    Data are images, contexts what the flow or the model takes.

    Example:
        >>> flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=8, coupling="affine")
        >>> operation = flowguard.migration.surgeon(flow)
        >>> type(operation).__name__, [site.name for site in operation.sites()]
        ('ImageSurgeon', ['steps.0.0.coupling.injector', 'steps.0.0.coupling.rest'])
    """

    @property
    def flow(self) -> ConditionalMultiscaleFlow:
        r"""The flow itself."""
        flow = self.model.get_submodule("flow") if hasattr(self.model, "flow") else self.model
        assert isinstance(flow, ConditionalMultiscaleFlow)  # what this is registered for
        return flow

    def _latents(self, x: Tensor, context: Any) -> tuple[list[Tensor], Tensor]:
        model: Any = self.model
        latents, ladj = (model if self.flow is model else model.encode)(x, context)
        return latents, ladj

    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        r"""Returns the log-density of each image in nats, with shape :math:`(N)`."""
        latents, ladj = self._latents(x, context)
        return ladj + normal_log_prob(latents)

    def sites(self) -> list[Site]:
        r"""Returns the affine parts of couplings, and the free priors."""
        found: list[Site] = []
        for name, module in self.model.named_modules():
            if isinstance(module, ConditionalCoupling) and _is_affine(module):
                found += [_Part(self, name, module, part) for part in parts_of(module)]
            if isinstance(module, Split) and _is_free(module):
                found.append(_Prior(self, name, module))
        return found

    def kept(self) -> dict[str, str]:
        r"""Names the couplings that are not affine, and the splits whose prior is bounded."""
        return {
            f"{name} ({type(module).__name__})": why
            for name, module in self.model.named_modules()
            if (why := _why_not(module))
        }

    def encode(self, x: Tensor, context: Any) -> Tensor | None:
        r"""Returns the latents of each image, in one row, with shape :math:`(N, D)`."""
        latents, _ = self._latents(x, context)
        self.shapes = [z.shape[1:] for z in latents]
        return torch.cat([z.flatten(1) for z in latents], dim=1)

    def decode(self, z: Tensor, context: Any) -> Tensor:
        r"""Returns the images of some latents, with shape :math:`(N, C, H, W)`; see
        :meth:`encode`."""
        model: Any = self.model
        parts = z.split([shape.numel() for shape in self.shapes], dim=1)
        latents = [t.unflatten(1, shape) for t, shape in zip(parts, self.shapes, strict=True)]
        if self.flow is model:
            return self.flow.inverse(latents, context, ladj=False)[0]
        image: Tensor = model.decode(latents, context)
        return image


def _why_not(module: nn.Module) -> str:
    r"""Says why a coupling or a split is kept; empty if it is one to replace, or none of these."""
    if isinstance(module, ConditionalCoupling) and not _is_affine(module):
        affine = isinstance(module.map, Affine | ReparametrizedAffine)
        return "robust already" if affine else f"its map is not affine, but {module.map}"
    if isinstance(module, Split) and not _is_free(module):
        return "its prior is bounded already"
    return ""


def _is_affine(coupling: ConditionalCoupling) -> bool:
    migrated = isinstance(coupling.map_of("rest"), Inscribed)
    return isinstance(coupling.map, Affine | ReparametrizedAffine) and not migrated


def _is_free(split: Split) -> bool:
    return split.mean_bound is None or split.scale_bound is None


surgeon.register(ConditionalMultiscaleFlow, ImageSurgeon)
