r"""How normflows' flows are made robust, for :func:`flowguard.migrate`.

Models are walked for the layers that :mod:`flowguard.integrations.normflows.sites` replaces.
"""

__all__: list[str] = []

import inspect
import math
from typing import Any

import torch
import torch.nn as nn
from normflows import ClassCondFlow, ConditionalNormalizingFlow, MultiscaleFlow, NormalizingFlow
from normflows.flows import (
    ActNorm,
    AffineConstFlow,
    BatchNorm,
    Invertible1x1Conv,
    InvertibleAffine,
    LULinearPermute,
    MaskedAffineFlow,
    Merge,
    Permute,
    Planar,
    Split,
    Squeeze,
)
from normflows.flows.affine.autoregressive import Autoregressive
from normflows.flows.base import Flow
from normflows.flows.neural_spline.autoregressive import (
    MaskedPiecewiseRationalQuadraticAutoregressive,
)
from normflows.flows.neural_spline.coupling import (
    PiecewiseRationalQuadraticCDF,
    PiecewiseRationalQuadraticCoupling,
)
from torch import Tensor

from flowguard.migration import Site, Surgeon, holder, surgeon
from flowguard.numerics import normal_log_prob

from .adapter import ContextAdapter
from .migrated import (
    CarriedCDF,
    CarriedCoupling,
    CarriedMaskedSpline,
    MigratedAutoregressive,
    MigratedCoupling,
    MigratedMasked,
)
from .sites import SITES

#: From how many passes on, one for each feature, sampling is too slow to try it out.
MANY_PASSES = 256

SPLINES = (PiecewiseRationalQuadraticCoupling, MaskedPiecewiseRationalQuadraticAutoregressive)
ROBUST = (
    CarriedCDF,
    CarriedCoupling,
    CarriedMaskedSpline,
    MigratedAutoregressive,
    MigratedCoupling,
    MigratedMasked,
)
#: Layers that take no notice of a condition.
CONSTANT = (
    ActNorm,
    AffineConstFlow,
    BatchNorm,
    Invertible1x1Conv,
    InvertibleAffine,
    LULinearPermute,
    Permute,
    PiecewiseRationalQuadraticCDF,
)
RESHAPING = (Merge, Split, Squeeze)


def _is_ours(layer: Any) -> bool:
    ours = type(layer).__module__.partition(".")[0] == "flowguard"
    return ours and not isinstance(layer, ContextAdapter)


def _goes_one_way(layer: Any) -> bool:
    r"""Whether a layer has no inverse, or one that is not implemented for its options."""
    inverse = getattr(type(layer), "inverse", None)
    return inverse is Flow.inverse or (isinstance(layer, Planar) and layer.act != "leaky_relu")


def _why_not(layer: Any) -> str:
    r"""Says why a layer is kept; empty if it is one to replace."""
    if isinstance(layer, ROBUST) or _is_ours(layer):
        return "robust already"
    if _goes_one_way(layer):
        return "it goes one way only: if that is from noise to data, the flow has no log-density"
    if type(layer) not in SITES:
        if isinstance(layer, CONSTANT):
            return "no condition reaches it"
        if known := [cls.__name__ for cls in type(layer).__mro__ if cls in SITES]:
            return f"a subclass of {known[0]}, which may work in its own way"
        return "flowguard has nothing to put in its place"
    if isinstance(layer, MaskedAffineFlow):
        if not bool(((layer.b == 0) | (layer.b == 1)).all()):
            return "its mask is not of zeros and ones"
        if not any(isinstance(net, nn.Module) for net in (layer.s, layer.t)):
            return "no condition reaches it"
    if hasattr(layer, "tails"):
        if layer.tails != "linear":
            return f"no condition leads out of its box (tails={layer.tails!r})"
        if isinstance(layer.tail_bound, Tensor) and layer.tail_bound.numel() > 1:
            return "its box differs from feature to feature"
        if layer.num_bins < 2:
            return "with a single bin it is the identity"
    return ""


@holder(Flow)
class _Normflows(Surgeon):
    r"""What it takes to operate on anything that holds layers of normflows."""

    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        try:
            return self._log_prob(x, context)
        except NotImplementedError as error:
            modules = self.model.named_modules()
            names = [
                f"{name or 'it'} ({type(m).__name__})"
                for name, m in modules
                if isinstance(m, Flow) and _goes_one_way(m)
            ]
            raise NotImplementedError(f"{error} Leave out {', '.join(names)}") from error

    def _log_prob(self, x: Tensor, context: Any) -> Tensor:
        model: Any = self.model
        if isinstance(model, NormalizingFlow) and not _is_conditional(model):
            if context is not None:
                raise ValueError(
                    f"{type(model).__name__} takes no context, but one was given: leave it out, or"
                    " use normflows.ConditionalNormalizingFlow"
                )
            return model.log_prob(x)
        if _is_conditional(model):
            return model.log_prob(x, context=context)
        if isinstance(model, MultiscaleFlow | ClassCondFlow):
            if context is None and getattr(model, "class_cond", True):
                raise ValueError(
                    f"{type(model).__name__} is class-conditional: give the classes of x as context"
                )
            return model.log_prob(x, context)
        if hasattr(model, "log_prob"):
            return model.log_prob(x) if context is None else model.log_prob(x, context)
        if not isinstance(model, Flow):
            return self.held_log_prob(x, context)
        # A lone layer is taken to standard normal noise.
        z, ladj = model.inverse(x) if context is None else model.inverse(x, context)
        return ladj + normal_log_prob(z)

    def sites(self) -> list[Site]:
        return [
            SITES[type(m)](self, name, m)
            for name, m in self.model.named_modules()
            if type(m) in SITES and not _why_not(m)
        ]

    def kept(self) -> dict[str, str]:
        kept: dict[str, str] = {}
        within: list[str] = []  # the parts of a layer are its own affair
        for name, m in self.model.named_modules():
            if (
                not isinstance(m, Flow)
                or isinstance(m, RESHAPING)
                or name.startswith(tuple(within))
            ):
                continue
            whole = isinstance(m, (*SITES, *CONSTANT)) or _is_ours(m)
            if whole or not any(isinstance(part, Flow) for part in m.modules() if part is not m):
                within.append(f"{name}." if name else "")
                if why := _why_not(m):
                    kept[f"{name} ({type(m).__name__})"] = why
        base = getattr(self.model, "q0", None)
        if _is_conditional(self.model) and _is_foreign(base):
            kept[f"q0 ({type(base).__name__})"] = UNKNOWN_BASE
        return kept

    def encode(self, x: Tensor, context: Any) -> Tensor | None:
        model: Any = self.model
        if x[0].numel() > MANY_PASSES and any(
            isinstance(m, Autoregressive) for m in model.modules()
        ):
            return None
        if isinstance(getattr(model, "flow", None), MultiscaleFlow):  # behind a guard
            return None
        z = self._noise(x, context)
        if z is not None and any(type(m) in SPLINES for m in model.modules()):
            try:  # some splines of normflows cannot go back
                self.decode(z, context)
            except AssertionError:
                return None
        return z

    def _noise(self, x: Tensor, context: Any) -> Tensor | None:
        model: Any = self.model
        if _is_conditional(model):
            return model.inverse(x, context=context)
        if isinstance(model, NormalizingFlow):
            return model.inverse(x)
        if isinstance(model, ClassCondFlow):
            for flow in reversed(model.flows):
                x, _ = flow.inverse(x)
            return x
        if isinstance(model, MultiscaleFlow):
            levels, _ = model.inverse_and_log_det(x, **_context(model, context))
            self.shapes = [z.shape[1:] for z in levels]
            return torch.cat([z.flatten(1) for z in levels], dim=1)
        return None

    def decode(self, z: Tensor, context: Any) -> Tensor:
        model: Any = self.model
        if _is_conditional(model):
            return model.forward(z, context=context)
        if isinstance(model, NormalizingFlow):
            return model.forward(z)
        if isinstance(model, ClassCondFlow):
            for flow in model.flows:
                z, _ = flow(z)
            return z
        levels = z.split([math.prod(shape) for shape in self.shapes], dim=1)
        noise = [t.unflatten(1, shape) for t, shape in zip(levels, self.shapes, strict=True)]
        return model.forward_and_log_det(noise, **_context(model, context))[0]


UNKNOWN_BASE = "flowguard does not know how the condition reaches its noise"


def _is_foreign(base: Any) -> bool:
    r"""Whether a base is neither normflows' nor flowguard's own."""
    return type(base).__module__.partition(".")[0] not in ("normflows", "flowguard")


def _is_conditional(model: Any) -> bool:
    return isinstance(model, ConditionalNormalizingFlow)


def _context(model: Any, context: Any) -> dict[str, Any]:
    r"""The context for the layers of a multiscale flow: normflows' own is for the base only."""
    takes = "context" in inspect.signature(model.inverse_and_log_det).parameters
    return {"context": context} if takes else {}


surgeon.register(NormalizingFlow)(_Normflows)
surgeon.register(ClassCondFlow)(_Normflows)
surgeon.register(MultiscaleFlow)(_Normflows)
