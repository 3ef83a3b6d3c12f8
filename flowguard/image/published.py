r"""The multiscale flow of the published architectures."""

__all__ = ["published_flow"]

from collections.abc import Sequence

from flowguard.image.flow import ConditionalMultiscaleFlow
from flowguard.image.maps import Coupling
from flowguard.image.steps import Split


def published_flow(
    channels: int,
    context_channels: int,
    *,
    levels: int = 3,
    steps: int | Sequence[int] = 16,
    hidden: int = 64,
    coupling: Coupling = "robust",
    mix: str = "free",
    transition_steps: int = 2,
    splits: int | None = None,
    noise_channels: int = 0,
    noise_steps: Sequence[int] | None = None,
) -> ConditionalMultiscaleFlow:
    r"""Returns a flow of the published architecture, with any coupling.

    The hidden layers are normalised, two steps without coupling start each level, and channels
    leave at all levels but the last two, with a free prior that does not see the context.

    References:
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200
        | Noise Conditional Flow Model for Learning the Super-Resolution Space (Kim & Son, 2021)
        | https://arxiv.org/abs/2106.04428

    Arguments:
        channels: The number of channels of the image.
        context_channels: The number of channels of the context map of each level.
        levels: The number of levels :math:`L`.
        steps: The number of steps :math:`K` at each level, or one number for each level.
        hidden: The number of channels of the hidden layers of the couplings.
        coupling: The elementwise map of the couplings.
        mix: The 1×1 convolutions.
        transition_steps: The number of steps without coupling at the start of each level.
        splits: The number of levels at whose end channels leave. If :py:`None`, all but two.
        noise_channels: The number of channels of the noise map; 3 in NCSR.
        noise_steps: For each level, how many of its last steps are given the noise map.

    Example:
        >>> flow = published_flow(3, 8, levels=3, steps=1, hidden=4)
        >>> flow.latent_shapes(16, 24)
        [(6, 8, 12), (96, 2, 3)]
    """
    return ConditionalMultiscaleFlow(
        channels,
        context_channels,
        levels=levels,
        steps=steps,
        hidden=hidden,
        coupling=coupling,
        mix=mix,
        transition_steps=transition_steps,
        splits=max(levels - 2, 0) if splits is None else splits,
        split=_published_split,
        normed=True,
        noise_channels=noise_channels,
        noise_steps=noise_steps,
    )


def _published_split(channels: int, context_channels: int) -> Split:
    return Split(channels, mean_bound=None, scale_bound=None)
