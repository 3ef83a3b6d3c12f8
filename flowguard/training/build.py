r"""The models that are trained from a folder."""

__all__ = ["DEFAULTS", "TASKS", "build"]

from flowguard.image.maps import Coupling
from flowguard.models import (
    LowLightEncoder,
    LowLightFlow,
    PyramidEncoder,
    SuperResolutionFlow,
)

TASKS = ("superres", "lowlight")
#: The channels of the encoder's maps, and its blocks.
DEFAULTS = {"superres": (64, 8), "lowlight": (32, 4)}


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
) -> SuperResolutionFlow | LowLightFlow:
    r"""Returns an untrained model.

    Arguments:
        task: ``"superres"`` or ``"lowlight"``.
        coupling: The elementwise map of the couplings.
        scale: The factor of super-resolution.
        levels: The number of levels.
        steps: The number of steps at each level.
        hidden: The number of channels of the hidden layers of the couplings.
        features: The number of channels of the encoder's maps. If :py:`None`, 64 for
            super-resolution, 32 for low light.
        blocks: The number of blocks of the encoder. If :py:`None`, 8 and 4.

    Raises:
        ValueError: If there is no such task, or an option does not fit.

    Example:
        >>> model = build("superres", levels=1, steps=1, hidden=8, features=8, blocks=1)
        >>> model.scale
        4
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    own = DEFAULTS[task]
    features = own[0] if features is None else features
    blocks = own[1] if blocks is None else blocks
    if task == "superres":
        return SuperResolutionFlow(
            scale=scale,
            levels=levels,
            steps=steps,
            hidden=hidden,
            features=features,
            coupling=coupling,
            encoder=PyramidEncoder(features, scale=scale, levels=levels, blocks=blocks),
        )
    if blocks < 1:
        raise ValueError(f"the encoder for low light must have at least 1 block; got {blocks}")
    encoder = LowLightEncoder(
        features,
        growth=max(4, features // 2),
        blocks=blocks,
        stacked=(min(1, blocks - 1),),
        levels=levels,
    )
    return LowLightFlow(
        levels=levels, steps=steps, hidden=hidden, coupling=coupling, encoder=encoder
    )
