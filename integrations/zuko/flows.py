r"""Robust flows over vectors, and the guard around any flow."""

__all__ = ["GuardedFlow", "RobustCouplingFlow", "RobustNSF"]

from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.distributions import Distribution
from zuko.distributions import NormalizingFlow
from zuko.flows import MAF, NICE
from zuko.lazy import LazyDistribution

from flowguard.functional import SLOPE
from flowguard.ood import OODConditioner, OODReport
from flowguard.transforms import SHIFT_BOUND, RobustSpline

from .autoregressive import grouped

#: The box: that of zuko's own spline, and of :class:`flowguard.RobustSpline`.
BOUND = 5.0


class RobustNSF(MAF):
    r"""Creates a neural spline flow whose samples are bounded for *every* context.

    It is :class:`zuko.flows.NSF` with :class:`flowguard.RobustSpline` in place of the spline. By
    default, transformations are fully autoregressive. Coupling transformations can be obtained by
    setting :py:`passes=2`; :class:`RobustCouplingFlow` is faster than that.

    Warning:
        Features outside of :math:`[-B, B]` are shifted, and not transformed otherwise. It is
        recommended to standardize features (zero mean, unit variance) before training.

    References:
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        features: The number of features.
        context: The number of context features.
        bins: The number of bins :math:`K`.
        bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound of the splines' shift. If :py:`None`, the shift is free, and the
            samples are not bounded.
        slope: The minimum slope of the spline transformation(s).
        kwargs: Keyword arguments passed to :class:`zuko.flows.MAF`.

    Example:
        >>> flow = RobustNSF(2, 3, transforms=1, hidden_features=[16])
        >>> flow
        RobustNSF(
          (transform): LazyComposedTransform(
            (0): MaskedAutoregressiveTransform(
              (base): RobustSpline(bins=8)
              (order): [0, 1]
              (hyper): MaskedMLP(
                (0): MaskedLinear(in_features=5, out_features=16, bias=True)
                (1): ReLU()
                (2): MaskedLinear(in_features=16, out_features=44, bias=True)
              )
            )
          )
          (base): UnconditionalDistribution(DiagNormal(loc: torch.Size([2]), scale: torch.Size([2])))
        )
        >>> c = torch.randn(3)
        >>> x = flow(c).sample((64,))
        >>> flow(c).log_prob(x).shape
        torch.Size([64])
        >>> z = flow(1e30 * c).transform(x)
        >>> bool(flow(1e30 * c).transform.inv(z).isfinite().all())
        True
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        bins: int = 8,
        bound: float = BOUND,
        shift_bound: float | None = SHIFT_BOUND,
        slope: float | None = SLOPE,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            features=features,
            context=context,
            univariate=partial(RobustSpline, bound=bound, shift_bound=shift_bound, slope=slope),
            shapes=RobustSpline.shapes(bins),
            **kwargs,
        )

    def forward(self, c: Tensor | None = None) -> NormalizingFlow:
        r"""Returns the distribution given a context, whose samples cost one spline for each
        feature; see :class:`flowguard.integrations.zuko.autoregressive.GroupedAutoregressiveTransform`.

        Arguments:
            c: The context, with shape :math:`(*, C)`.
        """
        flow = super().forward(c)
        if type(flow) is NormalizingFlow:
            flow.transform = grouped(flow.transform)
        return flow


class RobustCouplingFlow(NICE):
    r"""Creates a coupling flow whose samples are bounded for *every* context.

    It is :class:`zuko.flows.NICE` (RealNVP) with :class:`flowguard.RobustSpline` in place of the affine
    map, whose inverse explodes for contexts away from the training set.

    References:
        | Density estimation using Real NVP (Dinh et al., 2016)
        | https://arxiv.org/abs/1605.08803
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        features: The number of features.
        context: The number of context features.
        bins: The number of bins :math:`K`.
        bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound of the splines' shift. If :py:`None`, the shift is free, and the
            samples are not bounded.
        slope: The minimum slope of the spline transformation(s).
        kwargs: Keyword arguments passed to :class:`zuko.flows.NICE`.

    Example:
        >>> flow = RobustCouplingFlow(3, 4, transforms=2)
        >>> flow.transform.transforms[0]
        GeneralCouplingTransform(
          (base): RobustSpline(bins=8)
          (mask): [1, 0, 1]
          (hyper): MLP(
            (0): Linear(in_features=6, out_features=64, bias=True)
            (1): ReLU()
            (2): Linear(in_features=64, out_features=64, bias=True)
            (3): ReLU()
            (4): Linear(in_features=64, out_features=22, bias=True)
          )
        )
        >>> c = torch.randn(5, 4)
        >>> flow(c).sample((64,)).shape
        torch.Size([64, 5, 3])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        bins: int = 8,
        bound: float = BOUND,
        shift_bound: float | None = SHIFT_BOUND,
        slope: float | None = SLOPE,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            features=features,
            context=context,
            univariate=partial(RobustSpline, bound=bound, shift_bound=shift_bound, slope=slope),
            shapes=RobustSpline.shapes(bins),
            **kwargs,
        )


class GuardedFlow(LazyDistribution):
    r"""Creates a flow that tells when its context is out of distribution, and may act on it.

    ``guarded(y)`` runs the conditioner on `y`, which acts by its policy, and returns the flow's
    distribution :math:`p(X | c)` given the embedding :math:`c`: with the policy ``"shrink"``,
    the embedding pulled back to ground that the flow knows. Conditioner and flow train together.

    Arguments:
        flow: A lazy distribution, such as any flow of zuko. Its context is what the conditioner's
            encoder returns.
        conditioner: The conditioner; see :class:`flowguard.OODConditioner`.

    Raises:
        TypeError: If the flow is no lazy distribution, or the conditioner another module.

    Example:
        >>> conditioner = flowguard.OODConditioner(nn.Linear(5, 4), policy="report", alpha=0.01)
        >>> guarded = GuardedFlow(RobustNSF(3, 4), conditioner)
        >>> y = torch.randn(2048, 5)
        >>> guarded(y).log_prob(torch.randn(2048, 3)).shape
        torch.Size([2048])
        >>> _ = guarded.conditioner.fit(y[:1024], progress=False)
        >>> _ = guarded.conditioner.calibrate(y[1024:], progress=False)
        >>> guarded(1000 * y[:2]).sample().shape
        torch.Size([2, 3])
        >>> guarded.report.flagged
        tensor([True, True])
    """

    def __init__(self, flow: LazyDistribution, conditioner: OODConditioner) -> None:
        super().__init__()
        if not isinstance(flow, nn.Module):
            raise TypeError(
                "flow must be a lazy distribution, such as zuko.flows.NSF(...);"
                f" got {type(flow).__name__}"
            )
        if not isinstance(conditioner, OODConditioner):
            raise TypeError(
                "conditioner must be a flowguard.OODConditioner;"
                f" got {type(conditioner).__name__}, perhaps an encoder that needs wrapping:"
                " OODConditioner(encoder)"
            )
        self.conditioner = conditioner
        self.flow = flow

    @property
    def report(self) -> OODReport | None:
        r"""The report on the contexts of the last call, :py:`None` before any; see
        :attr:`flowguard.OODConditioner.report`."""
        return self.conditioner.report

    def forward(self, c: Any = None, **kwargs: Any) -> Distribution:
        r"""Returns the flow's distribution given the embedding of a context.

        Arguments:
            c: The context :math:`y` before its encoder.
            kwargs: Keyword arguments passed to the flow.

        Returns:
            The distribution :math:`p(X | y)`.
        """
        return self.flow(self.conditioner(c), **kwargs)
