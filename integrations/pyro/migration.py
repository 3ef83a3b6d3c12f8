r"""How Pyro's flows are made robust, for :func:`flowguard.migrate`.

A flow is a ``TransformedDistribution`` or a ``ConditionalTransformedDistribution``, which are no
modules, or any module that holds Pyro's transforms. All layers run from noise to data.
"""

__all__: list[str] = []

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
from pyro.distributions.conditional import (
    ConditionalComposeTransformModule,
    ConditionalTransform,
    ConditionalTransformedDistribution,
    ConstantConditionalTransform,
)
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.distributions.transforms import (
    AffineAutoregressive,
    AffineCoupling,
    BatchNorm,
    ConditionalAffineAutoregressive,
    ConditionalAffineCoupling,
)
from torch import Tensor
from torch.distributions import Transform, TransformedDistribution
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from flowguard.bounds.parts import gather, parts
from flowguard.migration import Site, Surgeon, holder, surgeon
from flowguard.migration.imitate import AffineMap, AnyTransform, RescaledSpline
from flowguard.migration.inscribe import InscribedAffine
from flowguard.numerics import instead, normal_log_prob

from .migrated import (
    MigratedAffineAutoregressive,
    MigratedAffineCoupling,
    MigratedConditionalAffineAutoregressive,
    MigratedConditionalAffineCoupling,
    line,
)

#: What takes the place of Pyro's layers.
MIGRATED: dict[type, Any] = {
    AffineAutoregressive: MigratedAffineAutoregressive,
    AffineCoupling: MigratedAffineCoupling,
    ConditionalAffineAutoregressive: MigratedConditionalAffineAutoregressive,
    ConditionalAffineCoupling: MigratedConditionalAffineCoupling,
}
CONDITIONAL = (ConditionalAffineAutoregressive, ConditionalAffineCoupling)
CONTAINERS = (
    ComposeTransform,
    ComposeTransformModule,
    ConditionalComposeTransformModule,
    ConstantConditionalTransform,
    IndependentTransform,
)


class _Layer(Site):
    r"""A coupling or an autoregressive transform, whose network computes affine maps."""

    def __init__(self, operation: Surgeon, name: str, layer: Any) -> None:
        super().__init__(operation, name, layer, type(layer).__name__)
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []  # inputs, slopes, values at zero

    @contextmanager
    def listen(self) -> Iterator[None]:
        if not isinstance(self.layer, CONDITIONAL):
            with self._listen_to(self.layer):
                yield
            return
        condition = self.layer.condition
        with ExitStack() as stack:

            def given(context: Tensor) -> Any:
                transform = condition(context)
                stack.enter_context(self._listen_to(transform))
                return transform

            stack.enter_context(instead(self.layer, "condition", given))
            yield

    @contextmanager
    def _listen_to(self, transform: Any) -> Iterator[None]:
        def spy(method: str) -> Callable[[Tensor], Tensor]:
            run = getattr(transform, method)

            def call(given: Tensor) -> Tensor:
                result: Tensor = run(given)
                self._tell(transform, given if method == "_call" else result)
                return result

            return call

        with ExitStack() as stack:
            for method in ("_call", "_inverse"):
                stack.enter_context(instead(transform, method, spy(method)))
            yield

    def _tell(self, transform: Any, x: Tensor) -> None:
        r"""Remembers the maps of what was asked, by the network that the transform has."""
        with torch.no_grad():
            if isinstance(transform, AffineAutoregressive):
                mean, raw = transform.arn(x)
            else:
                dim = transform.dim
                kept, x = x.tensor_split([transform.split_dim], dim=dim)
                says = transform.nn(kept.reshape(*kept.shape[:dim], -1))
                mean, raw = (
                    t.reshape(*t.shape[:-1], *x.shape[dim:]).movedim(dim, -1) for t in says
                )
                x = x.movedim(dim, -1)
            self.asked.append((x.detach(), *line(transform, mean, raw)))

    @property
    def heard(self) -> bool:
        return bool(self.asked)

    def _heard(self, which: int, rows: Tensor | slice = slice(None)) -> Tensor:
        return torch.cat([asked[which] for asked in self.asked])[rows]

    @property
    def inputs(self) -> Tensor:
        return self._heard(0)

    def old(self, rows: Tensor | slice) -> AffineMap:
        return AffineMap(self._heard(1, rows).log(), self._heard(2, rows))

    def build(self, spline: RescaledSpline) -> nn.Module:
        map = InscribedAffine.around(spline, self.inputs, self._heard(1), self._heard(2))
        new: nn.Module = MIGRATED[type(self.layer)].in_place_of(
            self.layer, map.train(self.layer.training)
        )
        return new

    def new(self, rows: Tensor | slice) -> AnyTransform:
        return self.robust.map(self._heard(1, rows), self._heard(2, rows))


def _why_not(part: Any) -> str:
    r"""Says why a transform is kept; empty if it is one to replace."""
    if type(part) in MIGRATED:
        return ""
    if type(part).__module__.partition(".")[0] == "flowguard":
        return "robust already"
    if known := [cls.__name__ for cls in type(part).__mro__ if cls in MIGRATED]:
        return f"a subclass of {known[0]}, which may work in its own way"
    if isinstance(part, BatchNorm) or not isinstance(part, ConditionalTransform | nn.Module):
        return "no condition reaches it"
    return "flowguard does not know it"


class _Pyro(Surgeon):
    r"""What it takes to operate on what holds Pyro's transforms.

    Arguments:
        model: A distribution, a transform, or a module that holds some.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(gather(model))
        self.given = model

    @property
    def subject(self) -> Any:
        r"""The distribution, or the module that was given."""
        return self.model if isinstance(self.given, nn.Module) else self.given

    @property
    def places(self) -> list[Any]:
        r"""The distributions and transforms that hold others."""
        return [part for part in parts(self.subject) if not isinstance(part, nn.Module | Tensor)]

    def log_prob(self, x: Tensor, context: Any) -> Tensor:
        subject = self.subject
        try:
            if isinstance(subject, ConditionalTransformedDistribution):
                return subject.condition(context).log_prob(x)
            if isinstance(subject, ConditionalTransform | Transform):
                # A lone transform is taken to standard normal noise.
                f = _given(subject, context)
                z = f.inv(x)
                ladj: Tensor = f.log_abs_det_jacobian(z, x)
                return normal_log_prob(z) - ladj
            if not hasattr(subject, "log_prob"):
                return self.held_log_prob(x, context)
            density: Tensor = (
                subject.log_prob(x) if context is None else subject.log_prob(x, context)
            )
        except KeyError as error:  # so do Pyro's transforms without an inverse
            raise NotImplementedError(*error.args) from error
        return density

    def _given(self, context: Any) -> list[Any] | None:
        subject = self.subject
        if isinstance(subject, ConditionalTransformedDistribution):
            return list(subject.condition(context).transforms)
        if isinstance(subject, TransformedDistribution):
            return list(subject.transforms)
        if isinstance(subject, ConditionalTransform | Transform):
            return [_given(subject, context)]
        return None

    def encode(self, x: Tensor, context: Any) -> Tensor | None:
        transforms = self._given(context)
        if transforms is None:
            return None
        for f in reversed(transforms):
            x = f.inv(x)
        return x

    def decode(self, z: Tensor, context: Any) -> Tensor:
        for f in self._given(context) or ():
            z = f(z)
        return z

    def sites(self) -> list[Site]:
        return [
            _Layer(self, self._called(name, module), module)
            for name, module in self.model.named_modules()
            if type(module) in MIGRATED
        ]

    def _called(self, name: str, part: Any) -> str:
        r"""The name of a layer: that within the model, or its place in a distribution."""
        listed = getattr(self.given, "transforms", ())
        if isinstance(self.given, nn.Module) or not isinstance(listed, list):
            return name
        places = [i for i, t in enumerate(listed) if getattr(t, "transform", t) is part]
        return f"transforms.{places[0]}" if places else name

    def kept(self) -> dict[str, str]:
        names = {id(module): name for name, module in self.model.named_modules()}
        kept = {}
        for part in parts(self.subject):
            if not isinstance(part, Transform | ConditionalTransform) or isinstance(
                part, CONTAINERS
            ):
                continue
            if why := _why_not(part):
                name = self._called(names.get(id(part), ""), part)
                kept[f"{name} ({type(part).__name__})"] = why
        return kept


def _given(transform: Any, context: Any) -> Any:
    conditional = isinstance(transform, ConditionalTransform)
    return transform.condition(context) if conditional else transform


holder(*MIGRATED, *MIGRATED.values())(_Pyro)
for _flow in (ConditionalTransformedDistribution, TransformedDistribution):
    surgeon.register(_flow, _Pyro)
