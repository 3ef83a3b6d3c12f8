r"""normflows' multiscale flow with a context everywhere, for images of any size."""

__all__ = ["ConditionalMultiscaleFlow", "Context"]

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from normflows import MultiscaleFlow
from normflows.flows import Flow, Squeeze
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowguard.io.atomic import atomic
from flowguard.numerics import cut, repeat_rows

from .adapter import accepts, route, run_layer
from .bases import from_noise

#: A vector, an image, maps by level, or nothing.
Context = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None


class Wants(NamedTuple):
    r"""What a base distribution takes besides its latent."""

    context: bool
    given: bool
    y: bool
    size: bool


class ConditionalMultiscaleFlow(MultiscaleFlow):
    r"""Creates a multiscale flow that takes a context at every level.

    It is :class:`normflows.MultiscaleFlow` with `context` in place of the class `y`: level
    :math:`i` starts from a latent of the base :py:`q0[i]`, merged with what the coarser levels
    made, and passes :py:`flows[i]`; level 0 is the coarsest. The context is passed to each layer
    and each base that takes one, by its signature, which is read once, here; the others,
    among them most layers of normflows, do without. A base may also take

    - `given`, the latents that the coarser levels made: then it is the prior of a split that looks
      at what remains, such as :class:`GaussianPrior`;
    - `size`, the height and width of its latent: then the flow takes images of any size. Bases of
      normflows have a fixed shape, which fixes that of the images;
    - `y`, as the class-conditional ones of normflows do: they get the context itself, which must
      then be classes, with shape :math:`(B)`, or one-hot vectors.

    The context is one of

    - a map with shape :math:`(B, C', H', W')`, which is resized to each level;
    - a list, or dictionary, with one map for each level, coarsest first as :py:`flows` is, or
      finest first as elsewhere in flowguard: the sizes tell. None is resized;
    - a vector with shape :math:`(B, C')` for all positions.

    Its :math:`B` rows are shared by the rows of the input: row :math:`i` belongs to row
    :math:`i \bmod B` of the context, so that the number of rows must be a multiple of :math:`B`.

    References:
        | Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018)
        | https://arxiv.org/abs/1807.03039
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200

    Arguments:
        q0: The base of each level.
        flows: The layers of each level.
        merges: What merges the latent of each level but the first with what came before, such as
            :class:`normflows.flows.Merge`.
        transform: A last layer, such as :class:`normflows.transforms.Logit`.
        p: The target distribution, for :meth:`reverse_kld` alone.

    Raises:
        TypeError: If a level is a layer rather than a list of layers.
        ValueError: If the numbers of bases, levels and merges do not fit.

    Example:
        >>> import normflows
        >>> from . import GaussianPrior, RobustGlowBlock
        >>> bases = [GaussianPrior(24), GaussianPrior(6, context_channels=3, given_channels=6)]
        >>> flows = [
        ...     [RobustGlowBlock(24, 16, context_channels=3), normflows.flows.Squeeze()],
        ...     [RobustGlowBlock(12, 16, context_channels=3), normflows.flows.Squeeze()],
        ... ]
        >>> flow = ConditionalMultiscaleFlow(bases, flows, [normflows.flows.Merge()])
        >>> x, context = torch.randn(4, 3, 16, 24), torch.randn(4, 3, 16, 24)
        >>> flow.log_prob(x, context).shape
        torch.Size([4])
        >>> x, log_q = flow.sample(8, context, temperature=0.8)
        >>> x.shape
        torch.Size([8, 3, 16, 24])
    """

    #: How many times as large as a single map images were, of all that the flow was given.
    _ratios: frozenset[tuple[Fraction, ...]] = frozenset()

    def __init__(
        self,
        q0: Sequence[nn.Module],
        flows: Sequence[Sequence[nn.Module]],
        merges: Sequence[nn.Module],
        transform: nn.Module | None = None,
        p: nn.Module | None = None,
    ) -> None:
        if not len(q0) == len(flows) == len(merges) + 1:
            raise ValueError(
                "there must be one base and one list of layers for each level, and one merge fewer;"
                f" got {len(q0)} bases, {len(flows)} lists of layers and {len(merges)} merges"
            )
        if any(isinstance(level, Flow) for level in flows):
            raise TypeError("flows must hold one list of layers for each level; got a layer")
        super().__init__(q0, flows, merges, transform, class_cond=False)
        self.p = p
        self._routes = [[route(layer) for layer in level] for level in self.flows]
        self._merge_routes = [route(merge) for merge in self.merges]
        self._transform_route = None if transform is None else route(transform)
        self._wants = [_wants(base) for base in self.q0]
        squeezes = [sum(isinstance(m, Squeeze) for m in level.modules()) for level in self.flows]
        #: How many times larger the image is than the latent of each level.
        self.scales = [2 ** sum(squeezes[i:]) for i in range(len(squeezes))]

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        r"""Returns the negative log-density of each image, as normflows' multiscale flow does.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            context: The context.
        """
        return -self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Context = None) -> Tensor:
        r"""Returns the log-density of each image, with shape :math:`(B)`.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            context: The context.

        Raises:
            ValueError: If the size of the images or the context does not fit.
        """
        maps = self._maps(context, len(x))
        z, known, log_q = self._inverse(x, maps)
        for i, base in enumerate(self.q0):
            if self._wants[i].y and maps[i] is None:
                raise ValueError(
                    "the log-density given classes needs classes as context; got None"
                )
            told = self._told(i, maps[i], known[i], z[i].shape[2:])
            log_q = log_q + base.log_prob(z[i], **told)
        return log_q

    def sample(
        self,
        num_samples: int | None = None,
        context: Context = None,
        temperature: float | None = None,
        *,
        size: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Returns samples and their log-density.

        Arguments:
            num_samples: The number of all samples, a multiple of the number :math:`B` of contexts:
                sample :math:`i` belongs to context :math:`i \bmod B`. If :py:`None`, one for each.
            context: The context.
            temperature: The factor of the standard deviation of all bases. At 0 there is one
                sample for each context, and no density.
            size: The height and width of the samples, for bases of any size. If :py:`None`, what
                the maps of the context tell: a list the sizes of its levels; a single map as many
                times its own as the images were that came with such maps, in training say. A flow
                that has seen none, as one that was just loaded, takes its own.

        Raises:
            ValueError: If number, size or temperature do not fit bases and context, or if images
                of several sizes came with maps of one.

        Returns:
            The samples, with shape :math:`(num\_samples, C, H, W)`, and their log-density in nats, with
            shape :math:`(num\_samples)`.
        """
        num_samples = self._number(num_samples, context)
        maps = self._maps(context, num_samples)
        if temperature is not None and not temperature >= 0:
            raise ValueError(f"temperature must not be negative; got {temperature}")
        sizes = self._sizes(maps, size)
        with self._tempered(temperature):
            return self._sample(num_samples, maps, sizes)

    def _sample(
        self, num_samples: int, maps: list[Any], sizes: list[tuple[int, ...]] | None
    ) -> tuple[Tensor, Tensor]:
        z: Any = None
        total: Any = 0
        for i, base in enumerate(self.q0):
            size = None if sizes is None else sizes[i]
            told = self._told(i, maps[i], z, size if z is None else z.shape[2:])
            if self._wants[i].size:
                told["size"] = size
            latent, log_q = base(num_samples, **told)
            total = total + log_q
            z, log_det = self._level(i, z, latent, maps)
            total = total - log_det
        z, log_det = self._last(z, maps)
        return z, total - log_det

    def noise_shapes(
        self, context: Context = None, *, size: Sequence[int] | None = None
    ) -> list[tuple[int, ...]]:
        r"""Returns the shape of the noise of each level, coarsest first; see :meth:`decode`.

        Arguments:
            context: The context.
            size: The height and width of the images; see :meth:`sample`.
        """
        sizes = self._sizes(self._maps(context, self._number(None, context)), size)
        return [
            (base.num_channels, *sizes[i]) if sizes is not None and wants.size else base.shape
            for i, (base, wants) in enumerate(zip(self.q0, self._wants, strict=True))
        ]

    def decode(self, noise: Sequence[Tensor], context: Context = None) -> Tensor:
        r"""Takes standard normal noise to images.

        Arguments:
            noise: The noise of each level, coarsest first, with the shapes of
                :meth:`noise_shapes`. Where the base of a level is no Gaussian that flowguard
                knows, a sample of the base.
            context: The context.
        """
        maps = self._maps(context, len(noise[0]))
        z: Any = None
        for i, eps in enumerate(noise):
            told = self._told(i, maps[i], z, eps.shape[2:])
            z, _ = self._level(i, z, from_noise(self.q0[i], eps, told), maps)
        return self._last(z, maps)[0]

    def forward_and_log_det(
        self, z: Sequence[Tensor], context: Context = None
    ) -> tuple[Tensor, Tensor]:
        r"""Takes latents to images, and returns the log-determinant.

        Arguments:
            z: The latent of each level, coarsest first.
            context: The context.

        Raises:
            ValueError: If the number of latents or the context does not fit.

        Returns:
            The images, with shape :math:`(B, C, H, W)`, and the log-determinant, with shape :math:`(B)`.
        """
        if len(z) != self.num_levels:
            raise ValueError(f"there must be {self.num_levels} latents; got {len(z)}")
        maps = self._maps(context, len(z[0]))
        total = z[0].new_zeros(len(z[0]))
        x: Any = None
        for i, latent in enumerate(z):
            x, log_det = self._level(i, x, latent, maps)
            total = total + log_det
        x, log_det = self._last(x, maps)
        return x, total + log_det

    def inverse_and_log_det(
        self, x: Tensor, context: Context = None
    ) -> tuple[list[Tensor], Tensor]:
        r"""Takes images to latents, and returns the log-determinant.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            context: The context.
        """
        z, _, log_det = self._inverse(x, self._maps(context, len(x)))
        return z, log_det

    def forward_kld(self, x: Tensor, context: Context = None) -> Tensor:
        r"""Returns the mean negative log-density, the loss of maximum likelihood.

        Arguments:
            x: The images, with shape :math:`(B, C, H, W)`.
            context: The context.
        """
        return -self.log_prob(x, context).mean()

    def reverse_kld(
        self,
        num_samples: int | None = None,
        context: Context = None,
        beta: float = 1.0,
        score_fn: bool = True,
        *,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        r"""Estimates the reverse Kullback-Leibler divergence to the target distribution.

        Arguments:
            num_samples: The number of samples; see :meth:`sample`.
            context: The context.
            beta: The weight of the target's log-density.
            score_fn: Whether the gradient includes the score function; see
                https://arxiv.org/abs/1703.09194.
            size: The height and width of the samples.

        Raises:
            ValueError: If the flow has no target distribution.

        Returns:
            The estimate in nats, a scalar with shape :math:`()`.
        """
        if self.p is None:
            raise ValueError("reverse_kld needs a target distribution: construct the flow with p")
        num_samples = self._number(num_samples, context)
        x, log_q = self.sample(num_samples, context, size=size)
        if not score_fn:
            constants = {name: p.detach() for name, p in self.named_parameters()}
            log_q = -torch.func.functional_call(self, constants, (x, context))
        if accepts(self.p.log_prob, "context"):  # type: ignore[arg-type]
            maps = self._maps(context, num_samples)
            rows = maps[0].context if isinstance(maps[0], _Resized) else maps
            log_p = self.p.log_prob(x, context=rows)  # type: ignore[operator]
        else:
            log_p = self.p.log_prob(x)  # type: ignore[operator]
        return log_q.mean() - beta * log_p.mean()

    def save(self, path: Path | str) -> None:
        r"""Saves the weights, whole or not at all: as safetensors if `path` ends in
        ``.safetensors``, else in torch's own format.

        Arguments:
            path: The file to write.
        """
        with atomic(path) as temporary:
            if Path(path).suffix == ".safetensors":
                state = {k: v.detach().clone().contiguous() for k, v in self.state_dict().items()}
                save_file(state, temporary)
            else:
                torch.save(self.state_dict(), temporary)

    def load(self, path: Path | str) -> None:
        r"""Loads weights, and runs no code that a file may hold.

        Arguments:
            path: The file to read, as :meth:`save` has written it.

        Raises:
            ValueError: If the file holds anything but weights.
        """
        if Path(path).suffix == ".safetensors":
            self.load_state_dict(load_file(path))
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"a file must hold weights alone to be loaded; got {path}, which holds more"
            ) from error
        self.load_state_dict(state)

    # What follows works on maps: for each level the context, with the rows of the input.

    def _number(self, num_samples: int | None, context: Context) -> int:
        _check_number(num_samples)
        _check_context(context)
        rows = 1 if context is None else len(_first(context))
        if num_samples is None:
            return rows
        if num_samples < 0 or (rows == 0 and num_samples > 0) or (rows and num_samples % rows):
            raise ValueError(
                f"num_samples must be a multiple of the number of contexts, {rows}, as sample i"
                f" belongs to context i mod {rows}; got {num_samples}"
            )
        return num_samples

    def _maps(self, context: Context, rows: int) -> list[Any]:
        _check_context(context)
        if context is None or isinstance(context, Tensor):
            fitted = None if context is None else _Resized(_rows(context, rows))
            return [fitted] * self.num_levels
        maps = [_rows(t, rows) for t in _values(context)]
        if len(maps) != self.num_levels:
            raise ValueError(
                f"the context must hold one map for each of the {self.num_levels} levels, or be one"
                f" map for all; got {len(maps)}"
            )
        areas = [t.shape[2:].numel() for t in maps]
        return maps[::-1] if areas[0] > areas[-1] else maps

    def _level(self, i: int, z: Any, latent: Tensor, maps: list[Any]) -> tuple[Any, Any]:
        r"""The level from noise to data."""
        total: Any = 0
        if i == 0:
            z = latent
        else:
            z, total = run_layer(
                self.merges[i - 1], self._merge_routes[i - 1], [z, latent], maps[i], False
            )
        for layer, way in zip(self.flows[i], self._routes[i], strict=True):
            z, log_det = run_layer(layer, way, z, maps[i], inverse=False)
            total = total + log_det
        return z, total

    def _last(self, z: Any, maps: list[Any]) -> tuple[Any, Any]:
        if self.transform is None or self._transform_route is None:
            return z, 0
        # Some transforms of normflows write into their input.
        return run_layer(self.transform, self._transform_route, z.clone(), maps[-1], inverse=False)

    def _inverse(
        self, x: Tensor, maps: list[Any]
    ) -> tuple[list[Tensor], list[Tensor | None], Tensor]:
        r"""All levels from data to noise: the latent of each, what was left beside it, and the
        log-determinant."""
        if any(n % self.scales[0] for n in x.shape[2:]):
            raise ValueError(
                f"height and width must be multiples of {self.scales[0]}; got {tuple(x.shape[2:])}"
            )
        if isinstance(maps[0], _Resized) and not torch.compiler.is_compiling():
            self._ratios |= maps[0].ratio_to(x.shape[2:])
        total = x.new_zeros(len(x))
        if self.transform is not None and self._transform_route is not None:
            way = self._transform_route
            x, log_det = run_layer(self.transform, way, x.clone(), maps[-1], inverse=True)
            total = total + log_det
        z: list[Any] = [None] * self.num_levels
        known: list[Tensor | None] = [None] * self.num_levels
        for i in reversed(range(self.num_levels)):
            for layer, way in reversed(list(zip(self.flows[i], self._routes[i], strict=True))):
                x, log_det = run_layer(layer, way, x, maps[i], inverse=True)
                total = total + log_det
            if i == 0:
                z[i] = x
            else:
                merge, way = self.merges[i - 1], self._merge_routes[i - 1]
                (x, z[i]), log_det = run_layer(merge, way, x, maps[i], inverse=True)
                known[i] = x
                total = total + log_det
        return z, known, total

    def _told(
        self, i: int, context: Any, known: Tensor | None, size: Sequence[int] | None
    ) -> dict[str, Any]:
        r"""What the base of a level is told, besides the size of a sample."""
        wants = self._wants[i]
        told: dict[str, Any] = {}
        if wants.given:
            told["given"] = known
        if wants.context:
            told["context"] = context.fit(size) if isinstance(context, _Resized) else context
        if wants.y:
            told["y"] = context.context if isinstance(context, _Resized) else context
            if told["y"] is not None and told["y"].dim() > 2:
                raise ValueError(
                    f"{type(self.q0[i]).__name__} takes classes, with shape (B) or one-hot, as the"
                    f" context; got shape {tuple(told['y'].shape)}"
                )
            if told["y"] is not None and told["y"].dim() == 2:  # one-hot, as integers too
                told["y"] = told["y"].to(next(self.q0[i].parameters(), torch.empty(0)).dtype)
        return told

    def _sizes(self, maps: list[Any], size: Sequence[int] | None) -> list[tuple[int, ...]] | None:
        r"""The size of each level's latent, :py:`None` if the bases must know it."""
        adapts = any(wants.size for wants in self._wants)
        if size is not None and not adapts:
            raise ValueError(
                "the bases of this flow have a fixed shape: leave size out, or use bases for any"
                " size, such as GaussianPrior"
            )
        if size is None:
            if isinstance(maps[0], Tensor) and maps[0].dim() == 4:
                return self._listed_sizes([tuple(t.shape[2:]) for t in maps])
            size = self._size_of(maps[0], adapts) if isinstance(maps[0], _Resized) else None
        if size is None or len(size) != 2:
            if adapts:
                raise ValueError(
                    "the size of the samples is not known: give size=(height, width), or maps as"
                    f" the context; got {size}"
                )
            return None
        if any(n % self.scales[0] or n < 1 for n in size):
            if adapts:
                raise ValueError(
                    f"height and width must be multiples of {self.scales[0]}; got {tuple(size)}"
                )
            return None
        return [tuple(n // scale for n in size) for scale in self.scales]

    def _size_of(self, context: "_Resized", adapts: bool) -> tuple[Any, ...] | None:
        r"""The size of the images that come with a single map."""
        if context.size is None or not adapts:
            return context.size
        if len(self._ratios) > 1:
            told = " and ".join(" × ".join(map(str, ratio)) for ratio in sorted(self._ratios))
            raise ValueError(
                "a single map tells the size of samples if all images were as many times as large"
                f" as theirs; got images {told} times as large: give size=(height, width)"
            )
        ratio = next(iter(self._ratios), (Fraction(1), Fraction(1)))
        size = tuple(n * times for n, times in zip(context.size, ratio, strict=True))
        if set(ratio) != {1} and any(n % self.scales[0] for n in size):
            raise ValueError(
                f"height and width must be multiples of {self.scales[0]}; got {context.size} times"
                f" {' × '.join(map(str, ratio))}, as with the images before:"
                " give size=(height, width)"
            )
        return tuple(map(int, size))

    def _listed_sizes(self, sizes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        ratios = [self.scales[0] // scale for scale in self.scales]
        expected = [tuple(n * ratio for n in sizes[0]) for ratio in ratios]
        if sizes != expected:
            raise ValueError(
                f"the maps of the levels must have the sizes {expected}, coarsest first or finest"
                f" first; got {sizes}"
            )
        return sizes

    @contextmanager
    def _tempered(self, temperature: float | None) -> Iterator[None]:
        r"""Sets the temperature of all bases, and takes it back whatever happens."""
        if temperature is None:
            yield
            return
        stiff = [type(base).__name__ for base in self.q0 if not hasattr(base, "temperature")]
        if stiff:
            raise ValueError(f"all bases must know a temperature; got {', '.join(stiff)}")
        before = [base.temperature for base in self.q0]
        try:
            self.set_temperature(temperature)
            yield
        finally:
            for base, value in zip(self.q0, before, strict=True):
                base.temperature = value


class _Resized:
    r"""A context for all levels, as a map resized to each of them."""

    def __init__(self, context: Tensor) -> None:
        self.context = context
        self._fitted: dict[tuple[int, ...], Tensor] = {}

    @property
    def size(self) -> tuple[int, ...] | None:
        r"""The height and width, :py:`None` where one position stands for all."""
        size = tuple(self.context.shape[2:])
        return size if len(size) == 2 and size != (1, 1) else None

    def ratio_to(self, size: Sequence[int]) -> frozenset[tuple[Fraction, ...]]:
        r"""How many times as large an image is; nothing where one position stands for all."""
        if self.size is None or 0 in self.size:
            return frozenset()
        return frozenset([tuple(map(Fraction, size, self.size))])

    def fit(self, size: Sequence[int] | None) -> Tensor:
        r"""Returns the context with this height and width."""
        if size is None or self.size in (None, tuple(size)):
            return self.context
        key = tuple(size)
        if key not in self._fitted:
            self._fitted[key] = F.interpolate(self.context, key, mode="bilinear", antialias=True)
        return self._fitted[key]

    def __call__(self, z: Any) -> Tensor:
        like = z if isinstance(z, Tensor) else z[0]
        return self.fit(like.shape[2:] if like.dim() == 4 else None)


def _wants(base: nn.Module) -> Wants:
    sample, density = base.forward, base.log_prob

    def both(name: str) -> bool:
        return accepts(sample, name) and accepts(density, name)  # type: ignore[arg-type]

    return Wants(
        context=both("context") and getattr(base, "context_channels", 0) is not None,
        given=both("given") and getattr(base, "given_channels", 0) is not None,
        y=both("y") and getattr(base, "class_cond", True),
        size=accepts(sample, "size"),
    )


def _check_number(num_samples: Any) -> None:
    if num_samples is not None and not isinstance(num_samples, Integral):
        raise TypeError(f"num_samples must be an integer, or None; got {num_samples!r}")


def _check_context(context: Any) -> None:
    if context is None or isinstance(context, Tensor):
        return
    levels = _values(context) if isinstance(context, Mapping | list | tuple) else []
    if not levels or not all(isinstance(t, Tensor) for t in levels):
        raise TypeError(
            "the context must be a tensor, a list or dictionary with a tensor for each level, or"
            f" None; got {context!r:.60}"
        )


def _rows(t: Tensor, rows: int) -> Tensor:
    t = cut(t)  # before it is resized, which adds infinities up
    if t.shape[0] == 1:
        return t.expand(rows, *t.shape[1:])
    return repeat_rows(t, t.new_empty(rows, 0))


def _values(context: Any) -> list[Tensor]:
    return list(context.values() if isinstance(context, Mapping) else context)


def _first(context: Any) -> Tensor:
    return context if isinstance(context, Tensor) else _values(context)[0]
