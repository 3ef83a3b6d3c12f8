r"""The conditional multiscale flow."""

__all__ = ["ConditionalMultiscaleFlow", "Context", "FlowCondition"]

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch.nn as nn
from torch import Tensor

from flowguard.image.conditioning import (
    Origin,
    conditions,
    origin_of,
    transition_mixes,
)
from flowguard.image.coupling import Condition
from flowguard.image.layers import FoldedMix, Squeeze
from flowguard.image.maps import Coupling
from flowguard.image.steps import FlowStep, Split, TransitionStep
from flowguard.numerics import cut, normal_log_prob


class FlowCondition(NamedTuple):
    r"""What a flow needs to know of the context, level by level.

    :meth:`ConditionalMultiscaleFlow.condition` makes it. It serves the flow that made it, as long
    as its weights do not change.

    Attributes:
        features: The context maps themselves, each with shape :math:`(B, C, H, W)`.
        noise: The noise map.
        steps: What each step made of them, level by level.
        transitions: The steps without coupling, their weights folded.
        origin: What made it; none for what is used up at once.

    Example:
        >>> flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=2, hidden=8)
        >>> condition = flow.condition([torch.randn(1, 8, 4, 4)])
        >>> len(condition.steps[0])
        2
        >>> [flow.inverse([torch.randn(1, 12, 4, 4)], condition)[0].shape for _ in range(2)]
        [torch.Size([1, 3, 8, 8]), torch.Size([1, 3, 8, 8])]
    """

    features: list[Tensor]
    noise: Tensor | None
    steps: list[list[Condition]]
    transitions: list[list[FoldedMix | None]]
    origin: Origin | None = None


#: One map for each level, or what :meth:`ConditionalMultiscaleFlow.condition` made of them.
Context = Sequence[Tensor] | FlowCondition


class ConditionalMultiscaleFlow(nn.Module):
    r"""Creates a conditional multiscale flow over images.

    At each level the image is squeezed by two, passes `transition_steps` steps without coupling
    and `steps` conditional flow steps, and, but at the last level, half of its channels leave as
    that level's latent. Level 1 is the finest.

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200

    Arguments:
        channels: The number of channels of the image.
        context_channels: The number of channels of the context map of each level.
        levels: The number of levels :math:`L`.
        steps: The number of steps :math:`K` at each level, or one number for each level.
        hidden: The number of channels of the hidden layers of the couplings.
        coupling: The elementwise map of the couplings; see :func:`flowguard.image.elementwise`.
        mix: The 1×1 convolutions: ``"free"``, as in Glow; ``"orthogonal"``, learned rotations,
            which keep the bound of the samples small, see :func:`flowguard.certify`; or
            ``"fixed"``, rotations that are not trained.
        transition_steps: The number of steps without coupling at the start of each level.
        splits: The number of levels, from the finest, at whose end channels leave. If
            :py:`None`, all but the last.
        split: A callable that makes a split of the numbers of channels of image and context.
        normed: Whether the hidden layers are normalised; see
            :class:`flowguard.image.ConditionalCoupling`.
        noise_channels: The number of channels of the noise map, if the couplings know of noise.
        noise_steps: For each level, how many of its last steps are given the noise map. If
            :py:`None`, all.

    The context is a list with one map for each level: the map of level :math:`l` has shape
    :math:`(B, context\_channels, H / 2^l, W / 2^l)`; or it is what :meth:`condition` made of it.
    It may have fewer rows than the image: row :math:`i` of the image then belongs to row
    :math:`i \bmod B` of the context.

    Raises:
        ValueError: If a number of channels, levels or steps is out of range, or an option has no such
            value.

    Example:
        >>> flow = ConditionalMultiscaleFlow(3, 8, levels=2, steps=1, hidden=16)
        >>> x = torch.randn(2, 3, 8, 12)
        >>> context = [torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)]
        >>> latents, ladj = flow(x, context)
        >>> [tuple(z.shape) for z in latents]
        [(2, 6, 4, 6), (2, 24, 2, 3)]
        >>> torch.allclose(flow.inverse(latents, context)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        levels: int = 3,
        steps: int | Sequence[int] = 8,
        hidden: int = 64,
        coupling: Coupling = "robust",
        mix: str = "free",
        transition_steps: int = 0,
        splits: int | None = None,
        split: Callable[[int, int], Split] = Split,
        normed: bool = False,
        noise_channels: int = 0,
        noise_steps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        per_level = [steps] * levels if isinstance(steps, int) else list(steps)
        if levels < 1 or min(per_level, default=0) < 1:
            raise ValueError(f"levels and steps must be positive; got {levels} and {steps}")
        splits = levels - 1 if splits is None else splits
        given = per_level if noise_steps is None else list(noise_steps)
        if len(per_level) != levels or len(given) != levels:
            raise ValueError(
                f"there must be one number of steps for each of the {levels} levels;"
                f" got {steps} steps and {noise_steps} with noise"
            )
        if not 0 <= splits <= levels or transition_steps < 0 or min(given) < 0:
            raise ValueError(
                "the numbers of splits, transition steps and steps with noise must not be"
                f" negative, and there are {levels} levels to split at; got {splits},"
                f" {transition_steps} and {noise_steps}"
            )
        self.channels = channels
        self.levels = levels
        self.noise_channels = noise_channels
        self.noise_steps = tuple(given)
        self.squeeze = Squeeze()
        self.transitions = nn.ModuleList()
        self.steps = nn.ModuleList()
        self.splits = nn.ModuleList()
        c = channels
        for level in range(levels):
            c = 4 * c
            self.transitions.append(
                nn.ModuleList(TransitionStep(c, mix=mix) for _ in range(transition_steps))
            )
            self.steps.append(
                nn.ModuleList(
                    FlowStep(
                        c,
                        context_channels,
                        hidden=hidden,
                        coupling=coupling,
                        mix=mix,
                        normed=normed,
                        noise_channels=noise_channels,
                    )
                    for _ in range(per_level[level])
                )
            )
            if level < splits:
                last = split(c, context_channels)
                self.splits.append(last)
                c = last.kept

    def steps_of(self, level: int) -> list[FlowStep]:
        r"""Returns the steps of a level, counted from 0, the finest."""
        # The type is quoted, as the compiler of torch 2.6 knows none with brackets.
        steps = self.steps[level]
        return list(cast("Iterable[FlowStep]", steps))

    def transitions_of(self, level: int) -> list[TransitionStep]:
        r"""Returns the transition steps of a level, in the order from data to noise."""
        return list(cast("Iterable[TransitionStep]", self.transitions[level]))

    def split_of(self, level: int) -> Split | None:
        r"""Returns the split at the end of a level, :py:`None` after the last."""
        return cast(Split, self.splits[level]) if level < len(self.splits) else None

    def is_noisy(self, level: int, step: int) -> bool:
        r"""Whether a step is given the noise map, where there is one."""
        return step >= len(self.steps_of(level)) - self.noise_steps[level]

    def check_context(self, context: Sequence[Tensor]) -> None:
        r"""Refuses a context that does not hold one map for each level.

        Arguments:
            context: The maps, each with shape :math:`(B, C, H, W)`.

        Raises:
            TypeError: If it is no list of tensors.
            ValueError: If there are fewer or more of them.
        """
        _check_list(context, "context", ", one map for each level, or what condition() made")
        if len(context) != self.levels:
            raise ValueError(
                f"the context must hold one map for each of the {self.levels} levels;"
                f" got {len(context)}"
            )

    def check_latents(self, z: Sequence[Tensor]) -> None:
        r"""Refuses latents of other numbers and shapes than :meth:`latent_shapes` lists.

        Arguments:
            z: The latents, each with shape :math:`(B, C, H, W)`.

        Raises:
            TypeError: If it is no list of tensors, or they have several dtypes.
            ValueError: If there are fewer or more of them, or one has another shape.
        """
        _check_list(z, "latents")
        if not self.splits and len(z) != 1:
            raise ValueError(f"there must be a list with one latent; got {len(z)}")
        if len(z) != len(self.splits) + 1:
            raise ValueError(
                f"there must be one latent for each of the {len(self.splits)} splits and one for"
                f" the last level; got {len(z)}"
            )
        shapes = [tuple(t.shape) for t in z]
        rows, _, height, width = shapes[-1] if len(shapes[-1]) == 4 else (0, 0, 0, 0)
        expected = self.latent_shapes(height << self.levels, width << self.levels)
        if shapes != [(rows, *s) for s in expected]:
            raise ValueError(
                f"the latents must have the shapes {expected} for each of as many images, if the"
                f" last is right; got {shapes}"
            )
        if len({t.dtype for t in z}) > 1:
            raise TypeError(f"the latents must have one dtype; got {[t.dtype for t in z]}")

    @property
    def multiple(self) -> int:
        r"""What height and width of an image must be a multiple of."""
        return 2**self.levels

    def latent_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        r"""Returns the shape :math:`(C, H, W)` of each latent for an image of this size.

        There is one for each split, finest first, and one for what is left after the last level.

        Arguments:
            height: The height of the image, a multiple of :math:`2^L`.
            width: The width of the image, a multiple of :math:`2^L`.

        Raises:
            ValueError: If height or width is no such multiple.

        Example:
            >>> ConditionalMultiscaleFlow(3, 8, levels=2, steps=1, hidden=16).latent_shapes(8, 12)
            [(6, 4, 6), (24, 2, 3)]
        """
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"height and width must be multiples of {self.multiple}; got {height} and {width}"
            )
        shapes, c = [], self.channels
        for level in range(self.levels):
            height, width, c = height // 2, width // 2, 4 * c
            split = self.split_of(level)
            if split is not None:
                shapes.append((split.dropped, height, width))
                c = split.kept
        return [*shapes, (c, height, width)]

    def condition(self, context: Sequence[Tensor], noise: Tensor | None = None) -> FlowCondition:
        r"""Computes all that depends on the context alone, to be shared by many calls.

        Contexts are cut at :math:`\pm 10^{20}`, so that infinite ones give finite images. NaN
        stays NaN. Without gradients, the steps of a level are computed together.

        What is made serves this flow as long as its weights do not change: a copy of the flow, or
        the same one after a step of training, refuses it with a :class:`ValueError`. Compiled
        code does not ask; what it made, :meth:`sign` vouches for.

        Arguments:
            context: One map for each level.
            noise: The noise map, with shape :math:`(B, noise\_channels, H', W')` of any size, one
                channel for all or :math:`(B, 1, 1, 1)`. If :py:`None`, the parts of the couplings
                that know of noise are left out, which is not the same as a noise of zero.

        Example:
            >>> flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=16)
            >>> condition = flow.condition([torch.randn(1, 8, 4, 4)])
            >>> x, ladj = flow.inverse([torch.randn(5, 12, 4, 4)], condition)
            >>> x.shape
            torch.Size([5, 3, 8, 8])
        """
        return self.sign(self.work_out(context, noise))

    def work_out(self, context: Sequence[Tensor], noise: Tensor | None = None) -> FlowCondition:
        r"""Returns what :meth:`condition` does, without a memory of the weights.

        Arguments:
            context: One map for each level, each with shape :math:`(B, C, H, W)`.
            noise: The noise map, with shape :math:`(B, C, H, W)`.

        Raises:
            TypeError: If the context is no list of tensors.
            ValueError: If there is not one map for each level, or a flow that knows of no noise is
                given some.
        """
        self.check_context(context)
        if noise is not None and not self.noise_channels:
            raise ValueError("this flow knows of no noise: give noise_channels when making it")
        features = [cut(c) for c in context]
        made = []
        for level, c in enumerate(features):
            steps = self.steps_of(level)
            noises = [noise if self.is_noisy(level, k) else None for k in range(len(steps))]
            made.append(conditions(steps, c, noises))
        transitions = [transition_mixes(self.transitions_of(n)) for n in range(self.levels)]
        return FlowCondition(features, noise, made, transitions)

    def sign(self, condition: FlowCondition) -> FlowCondition:
        r"""Returns a condition with the memory of the weights that went into it.

        Arguments:
            condition: What :meth:`work_out` made.
        """
        return condition._replace(origin=origin_of(self))

    def _conditions(self, context: Context | None) -> FlowCondition:
        if context is None:
            raise ValueError("a conditional flow needs a context; got None")
        if not isinstance(context, FlowCondition):
            return self.work_out(context)
        if context.origin is not None:
            context.origin.check(self)
        return context

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        r"""Takes images to latents.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`, `H` and `W` multiples of :math:`2^L`.
            context: The context maps, or what :meth:`condition` made of them.

        Returns:
            The latents, as :meth:`latent_shapes` lists them, and the log-determinant, with shape
            :math:`(B)`.

        Raises:
            ValueError: If image or context has another shape, or the condition was made by another flow
                or by other weights.
        """
        if x.dim() != 4:
            raise ValueError(f"x must have shape (B, C, H, W); got {tuple(x.shape)}")
        ready = self._conditions(context)
        self.latent_shapes(*x.shape[-2:])  # refuses a size that does not fit, before the work
        latents = []
        total = x.new_zeros(x.shape[0])
        for level, features in enumerate(ready.features):
            x, _ = self.squeeze(x)
            mixes = ready.transitions[level]
            for transition, mix in zip(self.transitions_of(level), mixes, strict=True):
                x, ladj = transition(x, mix)
                total = total + ladj
            for step, condition in zip(self.steps_of(level), ready.steps[level], strict=True):
                x, ladj = step(x, condition)
                total = total + ladj
            split = self.split_of(level)
            if split is not None:
                x, latent, ladj = split(x, features)
                total = total + ladj
                latents.append(latent)
        return [*latents, x], total

    def inverse(
        self,
        z: Sequence[Tensor],
        context: Context | None = None,
        *,
        ladj: bool = True,
    ) -> tuple[Tensor, Tensor]:
        r"""Takes latents to images.

        Arguments:
            z: The latents, as :meth:`latent_shapes` lists them.
            context: The context maps, or what :meth:`condition` made of them.
            ladj: Whether to compute the log-determinant. Images alone take less time.

        Returns:
            The images, with shape :math:`(B, C, H, W)`, and the log-determinant with shape
            :math:`(B)`, which is NaN if it is not wanted.
        """
        self.check_latents(z)
        ready = self._conditions(context)
        *latents, x = z
        total = x.new_zeros(x.shape[0])
        for level in reversed(range(self.levels)):
            split = self.split_of(level)
            if split is not None:
                x, more = split.inverse(x, latents[level], ready.features[level])
                total = total + more
            steps = list(zip(self.steps_of(level), ready.steps[level], strict=True))
            for step, condition in reversed(steps):
                x, more = step.inverse(x, condition, ladj)
                total = total + more
            mixes = ready.transitions[level]
            transitions = list(zip(self.transitions_of(level), mixes, strict=True))
            for transition, mix in reversed(transitions):
                x, more = transition.inverse(x, mix)
                total = total + more
            x, _ = self.squeeze.inverse(x)
        return x, total

    def log_prob(
        self,
        x: Tensor,
        context: Context | None = None,
    ) -> Tensor:
        r"""Returns the log-density :math:`\log p(x | y)` in nats, with shape :math:`(B)`.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            context: The context maps, or what :meth:`condition` made of them.

        Example:
            >>> flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=16)
            >>> flow.log_prob(torch.rand(5, 3, 8, 8), [torch.rand(5, 8, 4, 4)]).shape
            torch.Size([5])
        """
        latents, ladj = self(x, context)
        return ladj + normal_log_prob(latents)


def _check_list(given: object, name: str, which: str = "") -> None:
    parts = [type(t).__name__ for t in given] if isinstance(given, Sequence) else []
    if not isinstance(given, Sequence) or not all(isinstance(t, Tensor) for t in given):
        told = f" of {parts}" if parts else ""
        raise TypeError(
            f"the {name} must be a list of tensors{which}; got {type(given).__name__}{told}"
        )
