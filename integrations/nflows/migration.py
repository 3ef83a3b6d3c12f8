r"""How nflows' flows are made robust, for :func:`flowguard.migrate`.

Layers are known by the name of their class and of its module within the host, so that nflows and
its fork in glasflow are met alike, and neither is imported for the other's sake.
"""

__all__ = ["operate_on"]

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.migration import Site, Surgeon, holder
from flowguard.migration.exchange import overhear
from flowguard.migration.imitate import AffineMap, AnyTransform, RescaledSpline
from flowguard.migration.inscribe import InscribedAffine, InscribedShift
from flowguard.migration.knots import HostSpline, Knots, width_of
from flowguard.numerics import normal_log_prob

from .bases import base_sites, why_kept
from .host import CANDIDATES, HOST, part
from .migrated import (
    AffineHead,
    CarriedHead,
    CouplingFormula,
    Head,
    MaskedFormula,
    MigratedAutoregressiveTransform,
    MigratedCouplingTransform,
    ShiftHead,
)

AFFINE_COUPLING = "transforms.coupling.AffineCouplingTransform"
ADDITIVE_COUPLING = "transforms.coupling.AdditiveCouplingTransform"
SPLINE_COUPLING = "transforms.coupling.PiecewiseRationalQuadraticCouplingTransform"
AFFINE_MASKED = "transforms.autoregressive.MaskedAffineAutoregressiveTransform"
SPLINE_MASKED = "transforms.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform"
COUPLINGS = (AFFINE_COUPLING, ADDITIVE_COUPLING, SPLINE_COUPLING)
SPLINES = (SPLINE_COUPLING, SPLINE_MASKED)
REPLACEABLE = (*COUPLINGS, AFFINE_MASKED, SPLINE_MASKED)
CONTAINERS = (
    "transforms.base.CompositeTransform",
    "transforms.base.MultiscaleCompositeTransform",
    "transforms.base.InverseTransform",
)
#: The modules of the host whose transforms take no notice of a condition.
CONSTANT = tuple(
    f"transforms.{module}."
    for module in (
        "conv",
        "linear",
        "lu",
        "nonlinearities",
        "normalization",
        "orthogonal",
        "permutations",
        "qr",
        "reshape",
        "standard",
        "svd",
    )
)
#: From how many passes on, one for each feature, sampling is too slow to try it out.
MANY_PASSES = 256


def _name(cls: type) -> str:
    r"""The name of a class within its host; empty if it is of no host."""
    for host in CANDIDATES:
        if cls.__module__.startswith(f"{host}."):
            return f"{cls.__module__[len(host) + 1 :]}.{cls.__qualname__}"
    return ""


def _descends(module: Any, *names: str) -> bool:
    return any(_name(cls) in names for cls in type(module).__mro__)


def _kind(layer: Any) -> type | None:
    r"""The class of the host that a layer works as, if it is one to replace: its own, or the one
    that its own class overrides nothing of."""
    mro = type(layer).__mro__
    base = next((cls for cls in mro if _name(cls) in REPLACEABLE), None)
    for cls in mro[: 0 if base is None else mro.index(base)]:
        if any(hasattr(base, name) and not name.startswith("__") for name in vars(cls)):
            return None
    return base


def _why_not(layer: Any) -> str:
    r"""Says why a transform is kept; empty if it is one to replace."""
    kind = _kind(layer)
    name = _name(type(layer) if kind is None else kind)
    if name in SPLINES:
        if layer.tails != "linear":
            return f"no condition leads out of its box (tails={layer.tails!r})"
        return "with a single bin it is the identity" if layer.num_bins < 2 else ""
    if name in REPLACEABLE:
        return ""
    if type(layer).__module__.partition(".")[0] == "flowguard":
        return "robust already"
    if name.startswith(CONSTANT):
        return "no condition reaches it"
    if name.startswith(("transforms.coupling.Piecewise", "transforms.autoregressive.MaskedPiece")):
        return "of the splines, only rational-quadratic ones are carried over"
    if known := [cls.__name__ for cls in type(layer).__mro__ if _name(cls) in REPLACEABLE]:
        return f"a subclass of {known[0]}, which may work in its own way"
    return "flowguard does not know it"


class _Layer(Site):
    r"""A coupling or an autoregressive transform, whose network computes univariate maps."""

    def __init__(self, operation: Surgeon, name: str, layer: Any) -> None:
        kind: Any = _kind(layer)
        self.what = _name(kind)
        self.package = kind.__module__.rpartition(".")[0]
        additive = self.what == ADDITIVE_COUPLING
        super().__init__(operation, name, layer, type(layer).__name__, additive)
        self.asked: list[tuple[Tensor, Tensor]] = []

    @property
    def _net(self) -> nn.Module:
        layer = self.layer
        net: nn.Module = (
            layer.transform_net if self.what in COUPLINGS else layer.autoregressive_net
        )
        return net

    def listen(self) -> AbstractContextManager[None]:
        def tell(direction: str, inputs: Any, result: Any, said: Any) -> None:
            x = (result[0] if direction == "inverse" else inputs).detach()
            if self.what in COUPLINGS:
                x = x[:, self.layer.transform_features]
            self.asked.append((x, said))

        return overhear(self.layer, self._net, tell)

    @property
    def heard(self) -> bool:
        return bool(self.asked)

    @property
    def inputs(self) -> Tensor:
        return torch.cat([x for x, _ in self.asked]).movedim(1, -1)

    @property
    def raw(self) -> Tensor:
        r"""What the network returned."""
        raw = torch.cat([raw for _, raw in self.asked])
        return raw.to(torch.promote_types(raw.dtype, torch.float32))

    def _formula(self) -> CouplingFormula | MaskedFormula:
        return (CouplingFormula if self.what in COUPLINGS else MaskedFormula)(self.layer)

    def old(self, rows: Tensor | slice) -> AnyTransform:
        raw = self.raw[rows]
        if self.what in SPLINES:
            splines, head = part("splines", self.package), self.robust.head
            function = splines.unconstrained_rational_quadratic_spline
            return HostSpline(function, head.knots, head.logits(raw))
        scale, shift = self._formula()(raw)
        return AffineMap(scale.log(), shift)

    def carry(self, slope: float | None) -> nn.Module | None:
        if self.what not in SPLINES:
            return None
        # nflows asks the masked network for one of the names alone.
        names = ("hidden_features", "hidden_channels")[: 1 if self.what == SPLINE_MASKED else 2]
        knots = Knots.of(self.layer, slope, width_of(self._net, *names))
        return self._under(CarriedHead(self.layer.num_bins, knots))

    def build(self, spline: RescaledSpline) -> nn.Module:
        scale, shift = self._formula()(self.raw)
        if self.additive:
            return self._under(ShiftHead(InscribedShift(spline, shift)))
        map = InscribedAffine.around(spline, self.inputs, scale, shift)
        return self._under(AffineHead(self._formula(), map))

    def _under(self, head: Head) -> nn.Module:
        if self.what in COUPLINGS:
            return MigratedCouplingTransform.in_place_of(self.layer, head)
        features = self.inputs.shape[-1]
        return MigratedAutoregressiveTransform.in_place_of(self.layer, features, head)

    def new(self, rows: Tensor | slice) -> AnyTransform:
        return self.robust.head.univariate(self.raw[rows])


class _NFlows(Surgeon):
    r"""What it takes to operate on anything that holds transforms of the host."""

    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        model: Any = self.model
        if hasattr(model, "log_prob"):
            return model.log_prob(x) if context is None else model.log_prob(x, context)
        if not _is_transform(model):
            return self.held_log_prob(x, context)
        # A lone transform is taken to standard normal noise.
        z, ladj = model(x, context)
        return ladj + normal_log_prob(z)

    def sites(self) -> list[Site]:
        layers = [
            _Layer(self, name, module)
            for name, module in self.model.named_modules()
            if _kind(module) is not None and not _why_not(module)
        ]
        return [*layers, *base_sites(self)]

    def kept(self) -> dict[str, str]:
        kept: dict[str, str] = {}
        within: list[str] = []  # the parts of a layer are its own affair
        for name, module in self.model.named_modules():
            if any(name.startswith(prefix) for prefix in within) or not _is_transform(module):
                continue
            if _name(type(module)) in CONTAINERS or _holds_transforms(module):
                continue
            within.append(f"{name}." if name else "")
            if why := _why_not(module):
                kept[f"{name} ({type(module).__name__})"] = why
        for name, module in self.model.named_modules():
            base = vars(module).get("_modules", {}).get("_distribution")
            if base is not None and (why := why_kept(base)):
                inner = f"{name}._distribution" if name else "_distribution"
                kept[f"{inner} ({type(base).__name__})"] = why
        return kept

    def encode(self, x: Tensor, context: Any) -> Tensor | None:
        parts = _parts(self.model)
        if parts is None:
            return None
        if x[0].numel() > MANY_PASSES and any(_is_masked(m) for m in self.model.modules()):
            return None
        transform, embed = parts
        return transform(x, embed(context))[0]

    def decode(self, z: Tensor, context: Any) -> Tensor:
        transform, embed = _parts(self.model)  # type: ignore[misc]
        try:
            return transform.inverse(z, embed(context))[0]
        except Exception as error:
            if _name(type(error)) == "transforms.base.InverseNotAvailable":
                raise NotImplementedError("the flow cannot be inverted") from error
            raise

    @contextmanager
    def tuning(self) -> Iterator[None]:
        # Outside of training the host's linear layers remember their matrices, if told to.
        caching = [m for m in self.model.modules() if getattr(m, "using_cache", False) is True]
        for m in caching:
            m.using_cache = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for m in caching:
                m.using_cache = True  # type: ignore[assignment]
                m.cache.invalidate()  # type: ignore[operator, union-attr]


def _is_transform(module: Any) -> bool:
    return _descends(module, "transforms.base.Transform")


def _parts(model: Any) -> tuple[Any, Any] | None:
    r"""The transform of a flow, or a lone one, and what embeds its context."""
    if _is_transform(model):
        return model, nn.Identity()
    # glasflow has a base class of its own, without an embedding net.
    if _is_transform(getattr(model, "_transform", None)) and hasattr(model, "_distribution"):
        return model._transform, getattr(model, "_embedding_net", nn.Identity())
    return None


def _is_masked(module: Any) -> bool:
    return _descends(module, "transforms.autoregressive.AutoregressiveTransform")


def _holds_transforms(module: nn.Module) -> bool:
    r"""Whether a transform of the user's own is made of layers that are looked at one by one."""
    ours = _name(type(module)) or type(module).__module__.partition(".")[0] == "flowguard"
    return not ours and any(_is_transform(m) for m in module.modules() if m is not module)


def operate_on(host: str) -> None:
    r"""Registers who operates on models of a host.

    Arguments:
        host: The name of the host.
    """
    holder(part("transforms.base", host).Transform, part("flows.base", host).Flow)(_NFlows)


operate_on(HOST)
