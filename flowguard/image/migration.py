r"""How image flows are made robust, for :func:`flowguard.migrate`.

Every affine map of a coupling becomes a robust spline that follows it, computed from what the old
networks ask for: they are kept as a whole. A free prior of a split is bounded such that nothing
changes where it was on the calibration data.
"""

__all__ = ["ImageSurgeon"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.image.coupling import ConditionalCoupling
from flowguard.image.flow import ConditionalMultiscaleFlow
from flowguard.image.maps import Affine, Elementwise, Inscribed, ReparametrizedAffine
from flowguard.image.split import Split
from flowguard.migration.imitate import Affine as AffineMap
from flowguard.migration.imitate import AnyTransform, RescaledSpline
from flowguard.migration.inscribe import FAITHFUL, InscribedAffine
from flowguard.migration.surgeon import Site, Surgeon, surgeon
from flowguard.numerics import normal_log_prob
from flowguard.transforms import Univariate

PIXELS = 4096  # of those that a layer was asked for, how many are kept
ROOM = 1.5  # by how much the bounds of a prior exceed what was met


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

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(name, kind)
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

    def __init__(self, name: str, coupling: ConditionalCoupling, part: str) -> None:
        super().__init__(f"{name}.{part}", f"ConditionalCoupling[{type(coupling.map).__name__}]")
        self.coupling = coupling
        self.part = part

    @contextmanager
    def listen(self) -> Iterator[None]:
        before = self.coupling.map_of

        def map_of(part: str) -> Elementwise:
            found = before(part)
            return _Hearing(found, self._tell) if part == self.part else found

        inherited = "map_of" not in vars(self.coupling)
        object.__setattr__(self.coupling, "map_of", map_of)
        try:
            yield
        finally:
            if inherited:
                object.__delattr__(self.coupling, "map_of")
            else:
                object.__setattr__(self.coupling, "map_of", before)

    def replace(self, spline: RescaledSpline) -> list[nn.Parameter]:
        self.units = InscribedAffine(spline, *(self._heard(i) for i in range(3)))
        flat = {name: unit.clone() for name, unit in self.units.named_buffers()}
        for name, unit in flat.items():
            setattr(self.units, name, unit[:, None, None])  # channels come before the pixels
        self.coupling.add_module(f"{self.part}_units", self.units)
        return []  # there is nothing to fit

    def new(self, rows: Tensor | slice) -> AnyTransform:
        slope, value = (self._heard(i)[rows][..., None, None] for i in (1, 2))
        return _Pixels(self.units(slope, value))


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

    def __init__(self, name: str, split: Split) -> None:
        super().__init__(name, "Split[free prior]")
        self.split = split
        self.most = [0.0, 0.0]

    @contextmanager
    def listen(self) -> Iterator[None]:
        def hear(module: Split, inputs: tuple[Any, ...], output: Any) -> None:
            dropped = inputs[0][:, module.kept :]
            mean, logs = module._prior(inputs[0][:, : module.kept], *inputs[1:2])
            self.most = [
                max(m, t.abs().max().item()) for m, t in zip(self.most, (mean, logs), strict=True)
            ]
            self._tell(dropped, torch.exp(-logs), -mean * torch.exp(-logs))

        hook = self.split.register_forward_hook(hear)
        try:
            yield
        finally:
            hook.remove()

    def replace(self, spline: RescaledSpline) -> list[nn.Parameter]:
        self.split.tame(*(max(m, 1.0) * ROOM / FAITHFUL for m in self.most))
        return []

    def new(self, rows: Tensor | slice) -> AnyTransform:
        return self.old(rows)  # the same on all that was met


class ImageSurgeon(Surgeon):
    r"""What it takes to operate on image flows, and on models that hold one.

    Data are images, contexts what the flow or the model takes.
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
        r"""Returns the log-density of each image, with shape :math:`(B)`."""
        latents, ladj = self._latents(x, context)
        return ladj + normal_log_prob(latents)

    def sites(self) -> list[Site]:
        r"""Returns the affine maps of the couplings and of the splits, in the order of the
        modules."""
        found: list[Site] = []
        for name, module in self.model.named_modules():
            if isinstance(module, ConditionalCoupling) and _is_affine(module):
                parts = (
                    ("injector", "rest") if module.noise is None else ("injector", "noise", "rest")
                )
                found += [_Part(name, module, part) for part in parts]
            if isinstance(module, Split) and _is_free(module):
                found.append(_Prior(name, module))
        return found

    def others(self) -> list[str]:
        r"""Returns names and classes of couplings and splits that stay as they are."""
        return [
            f"{name} ({type(module).__name__})"
            for name, module in self.model.named_modules()
            if (isinstance(module, ConditionalCoupling) and not _is_affine(module))
            or (isinstance(module, Split) and not _is_free(module))
        ]

    def encode(self, x: Tensor, context: Any) -> Tensor | None:
        r"""Returns the latents of all levels as one row for each image, with shape :math:`(B, D)`."""
        latents, _ = self._latents(x, context)
        self.shapes = [z.shape[1:] for z in latents]
        return torch.cat([z.flatten(1) for z in latents], dim=1)

    def decode(self, z: Tensor, context: Any) -> Tensor:
        r"""Returns the images of such rows, with the shapes of the last call of :meth:`encode`."""
        model: Any = self.model
        parts = z.split([shape.numel() for shape in self.shapes], dim=1)
        latents = [t.unflatten(1, shape) for t, shape in zip(parts, self.shapes, strict=True)]
        if self.flow is model:
            return self.flow.inverse(latents, context, ladj=False)[0]
        image: Tensor = model.decode(latents, context)
        return image


def _is_affine(coupling: ConditionalCoupling) -> bool:
    migrated = isinstance(coupling.map_of("rest"), Inscribed)
    return isinstance(coupling.map, Affine | ReparametrizedAffine) and not migrated


def _is_free(split: Split) -> bool:
    return split.mean_bound is None or split.scale_bound is None


surgeon.register(ConditionalMultiscaleFlow, ImageSurgeon)
