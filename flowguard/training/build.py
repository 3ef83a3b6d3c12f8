r"""The models that are trained from a folder: fresh ones, and trained ones that go on."""

__all__ = ["TASKS", "begun", "build"]

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from flowguard.image.maps import Coupling
from flowguard.models import LowLightFlow, SuperResolutionFlow
from flowguard.models.base import MARGIN, ImageModel
from flowguard.training.encoders import encoder_for

M = TypeVar("M", bound=ImageModel)

#: What can be trained.
TASKS = ("superres", "lowlight")


def build(
    task: str,
    *,
    coupling: Coupling = "robust",
    scale: int = 4,
    levels: int = 2,
    steps: int = 4,
    hidden: int = 64,
    features: int | None = None,
    blocks: int | None = None,
    encoder: str | nn.Module | None = None,
    weights: Path | None = None,
    margin: float | None = MARGIN,
    residual: bool = True,
) -> SuperResolutionFlow | LowLightFlow:
    r"""Returns an untrained model.

    Arguments:
        task: ``"superres"`` or ``"lowlight"``.
        coupling: The elementwise map of the couplings.
        scale: The factor of super-resolution.
        levels: The number of levels.
        steps: The number of steps at each level.
        hidden: The number of channels of the hidden layers of the couplings.
        features: The number of channels of the encoder's maps; see :func:`encoder_for`.
        blocks: The number of blocks of the encoder.
        encoder: What the encoder is, or itself.
        weights: Where the encoder gets its weights from.
        margin: How far from :math:`[0, 1]` images may lie; see :meth:`ImageModel.limit`.
        residual: Whether the flow models what an image adds to the bicubic enlargement or, in low
            light, to a first guess.

    Raises:
        ValueError: If there is no such task, or an option does not fit.

    Example:
        >>> model = build("superres", levels=1, steps=1, hidden=8, features=8, blocks=1)
        >>> model.scale
        4
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    made: Any = encoder
    if not isinstance(encoder, nn.Module):
        made = encoder_for(
            task,
            encoder,
            scale=scale,
            levels=levels,
            features=features,
            blocks=blocks,
            weights=weights,
        )
    if task == "lowlight":
        return LowLightFlow(
            levels=levels,
            steps=steps,
            hidden=hidden,
            coupling=coupling,
            encoder=made,
            margin=margin,
            residual=residual,
        )
    return SuperResolutionFlow(
        scale=scale,
        levels=levels,
        steps=steps,
        hidden=hidden,
        features=made.channels,
        coupling=coupling,
        encoder=made,
        margin=margin,
        residual=residual,
    )


def begun(model: M, margin: float | None) -> M:
    r"""Returns a trained model as training begins with it: in float32 and training mode, and without
    its guard, which knows what its encoder made before.

    Arguments:
        model: The model, which is changed.
        margin: How far from :math:`[0, 1]` images may lie; see :meth:`ImageModel.limit`.

    Raises:
        ValueError: If the margin does not fit.

    Example:
        >>> from flowguard.models import SuperResolutionFlow
        >>> model = begun(SuperResolutionFlow.from_pretrained("superres-x4"), margin=0.25)
        >>> model.training, model.conditioner.fitted
        (True, False)
    """
    conditioner = model.conditioner
    conditioner.guard, conditioner.policy = conditioner.guard.fresh(), "warn"
    return model.float().requires_grad_().limit(margin).train()
