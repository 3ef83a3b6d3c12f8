r"""Estimators that are robust from the start, with sbi's own keywords."""

__all__ = ["MODELS", "EstimatorBuilder", "posterior_nn"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from sbi.neural_nets.estimators import ZukoFlow
from sbi.neural_nets.net_builders.flow import build_zuko_maf, build_zuko_nice
from torch import Tensor, nn

from flowguard.functional import SLOPE
from flowguard.transforms import SHIFT_BOUND, RobustSpline

from .conditioners import lenient

#: The box: that of the spline of zuko's, in standard deviations of the parameters.
TAIL_BOUND = 5.0


class Model(NamedTuple):
    r"""A model that can be built.

    Arguments:
        build: sbi's function that builds a flow of such layers.
        bins: The number of bins, where the caller does not say.
    """

    build: Callable[..., ZukoFlow]
    bins: int


#: What :func:`posterior_nn` builds.
MODELS = {
    "robust_coupling": Model(build_zuko_nice, 10),
    "robust_maf": Model(build_zuko_maf, 2),
    "robust_nsf": Model(build_zuko_maf, 10),
}


@dataclass(frozen=True)
class EstimatorBuilder:
    r"""Creates what sbi's trainers call with simulations to get an estimator. It can be pickled.

    Arguments:
        model: The name of the model.
        embedding_net: The embedding network.
        options: Keywords of sbi's builder.
    """

    model: str
    embedding_net: nn.Module
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, batch_theta: Tensor, batch_x: Tensor, **unknown: Any) -> ZukoFlow:
        r"""Returns an estimator for such parameters and observations.

        Arguments:
            batch_theta: Parameters :math:`\theta`, with shape :math:`(N, D)`.
            batch_x: Their observations :math:`x`, with shape :math:`(N, *)`.
            unknown: Nothing: what NPE-A asks its mixture for.

        Raises:
            TypeError: If it is asked for a mixture, as by NPE-A.
        """
        if unknown:
            raise TypeError(
                f"{self.model!r} builds a flow, where a mixture of Gaussians is asked for (with"
                f" {', '.join(unknown)}), as NPE_A does: use it with NPE_B or NPE_C, or NPE_A with"
                " its own 'mdn_snpe_a'"
            )
        return MODELS[self.model].build(
            batch_x=batch_theta, batch_y=batch_x, embedding_net=self.embedding_net, **self.options
        )


def posterior_nn(
    model: str = "robust_nsf",
    z_score_theta: str | None = "independent",
    z_score_x: str | None = "independent",
    hidden_features: int | Sequence[int] = 50,
    num_transforms: int = 5,
    num_bins: int | None = None,
    embedding_net: nn.Module | None = None,
    *,
    tail_bound: float = TAIL_BOUND,
    shift_bound: float | None = SHIFT_BOUND,
    slope: float | None = SLOPE,
    **kwargs: Any,
) -> EstimatorBuilder:
    r"""Returns a function that builds a robust estimator of the posterior, as sbi's
    ``posterior_nn`` does, for ``NPE(prior, density_estimator=...)``.

    ``"robust_nsf"`` is sbi's ``"zuko_nsf"`` with :class:`flowguard.RobustSpline`, and
    ``"robust_coupling"`` the same with couplings, which sample faster. ``"robust_maf"`` has splines
    of two bins, the map that the paper puts in place of the affine one. Their samples are bounded
    for every observation; see :func:`flowguard.certify`.

    The estimator trains, samples, saves and pickles as sbi's own flows of zuko. It works in
    ``NPE_B`` and ``NPE_C``, in one round or several; ``NPE_A`` has mixtures of Gaussians alone.

    Where an :class:`flowguard.OODConditioner` in the embedding network knows no simulations yet, it
    lets every observation pass, until :func:`calibrate` is called.

    References:
        | On the Robustness of Normalizing Flows for Inverse Problems in Imaging (Hong et al., 2023)
        | https://arxiv.org/abs/2212.04319

    Arguments:
        model: ``"robust_nsf"``, ``"robust_maf"`` or ``"robust_coupling"``.
        z_score_theta: How the parameters are standardised: ``"independent"``, ``"structured"``,
            ``"transform_to_unconstrained"`` (with `x_dist`) or ``"none"``, under which the splines
            only bend what lies within `tail_bound`.
        z_score_x: How the observations are standardised: ``"independent"``, ``"structured"`` or
            ``"none"``.
        hidden_features: The number of hidden features of each network.
        num_transforms: The number of transforms.
        num_bins: The number of bins :math:`K` of the splines. If :py:`None`, 10, or 2 for
            ``"robust_maf"``.
        embedding_net: The network that embeds the observations. If :py:`None`, there is none.
        tail_bound: The bound :math:`B` of the splines' box.
        shift_bound: The bound of the splines' shift. If :py:`None`, the shift is free, and the
            samples are not bounded.
        slope: The least slope of the splines.
        kwargs: Keywords of sbi's and zuko's flows, such as `x_dist`, `randperm` or `activation`.

    Raises:
        TypeError: If a keyword is unknown.
        ValueError: If there is no such model, or an option is out of range.

    Example:
        >>> build = posterior_nn("robust_nsf", hidden_features=16, num_transforms=2)
        >>> theta, x = torch.randn(100, 2), torch.randn(100, 3)
        >>> estimator = build(theta, x)  # NPE(prior, density_estimator=build) does this
        >>> flowguard.certify(estimator).certified
        True
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(map(repr, MODELS))}; got {model!r}")
    kwargs.pop("num_components", None)  # of mixtures, which sbi ignores for flows too
    bins = MODELS[model].bins if num_bins is None else num_bins
    options: dict[str, Any] = {"bound": tail_bound, "shift_bound": shift_bound, "slope": slope}
    builder = EstimatorBuilder(
        model,
        nn.Identity() if embedding_net is None else embedding_net,
        {
            "z_score_x": z_score_theta,  # sbi's flows are of x given y
            "z_score_y": z_score_x,
            "hidden_features": hidden_features,
            "num_transforms": num_transforms,
            "univariate": partial(RobustSpline, **options),
            "shapes": RobustSpline.shapes(bins),
            **kwargs,
        },
    )
    _try(builder, options)
    return EstimatorBuilder(model, lenient(builder.embedding_net), builder.options)


def _try(builder: EstimatorBuilder, options: Mapping[str, Any]) -> None:
    r"""Builds something small, so that what is wrong is told now, and not when training begins."""
    parameters: Any = [torch.zeros(shape) for shape in builder.options["shapes"]]
    RobustSpline(*parameters, **options)
    if builder.options["num_transforms"] < 1:
        raise ValueError(
            f"num_transforms must be positive; got {builder.options['num_transforms']}"
        )
    small = {**builder.options, "num_transforms": 1}
    if small["z_score_x"] == "transform_to_unconstrained":
        small["z_score_x"] = "none"
    with torch.random.fork_rng(devices=[]):
        try:
            EstimatorBuilder(builder.model, nn.Identity(), small)(*torch.randn(2, 3, 2))
        except TypeError as error:
            raise TypeError(
                f"posterior_nn({builder.model!r}, ...) must be given keywords that it, or zuko's flow,"
                f" knows: {error}"
            ) from error
