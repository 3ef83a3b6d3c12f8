r"""What a conditional base of zuko's flows becomes when a flow is made robust."""

__all__ = ["BoundedNormal", "depends", "normal_of"]

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributions import Independent, Normal
from zuko.distributions import DiagNormal
from zuko.flows import GMM
from zuko.lazy import LazyDistribution, UnconditionalDistribution

from flowguard.migration.moments import BoundedMoments


def normal_of(distribution: Any) -> Normal | None:
    r"""Returns the normal distributions of the features, if these are independent and normal.

    Arguments:
        distribution: What a lazy distribution returned.
    """
    if type(distribution) not in (DiagNormal, Independent):
        return None
    base = distribution.base_dist
    vector = distribution.reinterpreted_batch_ndims == 1
    return base if type(base) is Normal and vector else None


def depends(base: Any) -> bool:
    r"""Whether the distribution of a base depends on the context, as far as it can be told.

    Arguments:
        base: The base of a flow.
    """
    return not isinstance(base, UnconditionalDistribution) and not (
        type(base) is GMM and not hasattr(base, "hyper")
    )


class BoundedNormal(LazyDistribution):
    r"""Creates the normal base with bounded mean and scale that takes the place of another.

    Weights of the base that it holds load into it, under the names that they had.

    Arguments:
        base: A lazy distribution that returns independent normal features.
        moments: The bounds.

    Raises:
        TypeError: From a call, if the base returns another distribution.
    """

    def __init__(self, base: LazyDistribution, moments: BoundedMoments) -> None:
        super().__init__()
        self.base = base
        self.moments = moments

    def forward(self, c: Tensor | None = None) -> DiagNormal:
        r"""Returns the bounded normal distribution given a context.

        Arguments:
            c: The context, with shape :math:`(*, C)`.

        Raises:
            TypeError: If the base returns something else than independent normal features.
        """
        normal = normal_of(self.base(c))
        if normal is None:
            raise TypeError(
                "the base must return independent normal features, such as"
                f" zuko.distributions.DiagNormal(...); got {self.base(c)}"
            )
        mean, log_scale = self.moments(normal.loc, normal.scale.log())
        return DiagNormal(mean, log_scale.exp())

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Children are loaded next, of what stands here then.
        if not any(name.startswith(f"{prefix}moments.") for name in state_dict):
            names = [name for name in state_dict if name.startswith(prefix)]
            for name in names:
                value = state_dict.pop(name)  # type: ignore[attr-defined]
                state_dict[f"{prefix}base.{name.removeprefix(prefix)}"] = value  # type: ignore[index]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
