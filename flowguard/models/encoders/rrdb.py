r"""The residual-in-residual dense encoder of the published super-resolution flows."""

__all__ = ["RRDBEncoder", "ResidualDenseTrunk", "conv3x3", "leaky", "stack_maps"]

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowguard.models.base import pad_to_multiple
from flowguard.models.checkpoints import (
    CheckpointError,
    Entry,
    ImportReport,
    Source,
    count_blocks,
    load,
    plan_module,
    read_state,
)
from flowguard.models.encoders.rrdb_graph import recognise
from flowguard.models.encoders.rrdb_names import published_names
from flowguard.models.ncnn import read_ncnn
from flowguard.models.store import Recorded
from flowguard.numerics import full_precision, network_dtype

LONG_SKIPS = ("last", "first")


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    r"""Returns a 3×3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def leaky(x: Tensor) -> Tensor:
    r"""Applies the activation of these encoders to what a convolution made, which it may overwrite."""
    return F.leaky_relu(x, 0.2, inplace=not torch.is_grad_enabled())


class DenseBlock(nn.Module):
    r"""Creates a residual block of five densely connected 3×3 convolutions.

    Each convolution sees the input and the output of all convolutions before it; a fifth of the
    last one's output is added to the input.

    Arguments:
        features: The number of channels of input and output.
        growth: The number of channels that each of the first four convolutions adds.
    """

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(features, growth)
        self.conv2 = conv3x3(features + growth, growth)
        self.conv3 = conv3x3(features + 2 * growth, growth)
        self.conv4 = conv3x3(features + 3 * growth, growth)
        self.conv5 = conv3x3(features + 4 * growth, features)

    def forward(self, x: Tensor) -> Tensor:
        r"""Returns maps with the shape of the input."""
        # Under autocast the convolutions take half precision, and what is added up does not.
        seen = x.to(network_dtype(x))
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat((seen, leaky(conv(seen))), dim=1)
        return torch.add(x, self.conv5(seen), alpha=0.2)


class ResidualDenseBlock(nn.Module):
    """Three dense blocks; a fifth of what they make is added to the input."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.RDB1 = DenseBlock(features, growth)
        self.RDB2 = DenseBlock(features, growth)
        self.RDB3 = DenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        r"""Returns maps with the shape of the input."""
        return torch.add(x, self.RDB3(self.RDB2(self.RDB1(x))), alpha=0.2)


class ResidualDenseTrunk(nn.Sequential):
    r"""Creates a chain of residual-in-residual dense blocks that also gives what some of them made.

    References:
        | ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks (Wang et al., 2018)
        | https://arxiv.org/abs/1809.00219

    Arguments:
        features: The number of channels.
        growth: The number of channels that each convolution of a dense block adds.
        blocks: The number of blocks.
        stacked: Which blocks' outputs are also given, by their index from 0.

    Raises:
        ValueError: If there is no block, or one to be stacked that there is not.

    Example:
        >>> trunk = ResidualDenseTrunk(8, 4, blocks=2, stacked=(0,))
        >>> last, stack = trunk(torch.rand(1, 8, 5, 6))
        >>> last.shape, len(stack)
        (torch.Size([1, 8, 5, 6]), 1)
    """

    def __init__(
        self, features: int, growth: int, *, blocks: int, stacked: Sequence[int] = ()
    ) -> None:
        if blocks < 1 or features < 1 or growth < 1:
            raise ValueError(
                "blocks, features and growth must be positive;"
                f" got {blocks}, {features} and {growth}"
            )
        wrong = [i for i in stacked if not 0 <= i < blocks]
        if wrong:
            raise ValueError(
                f"stacked must name blocks from 0 to {blocks - 1} (there are {blocks});"
                f" got {tuple(stacked)}"
            )
        super().__init__(*(ResidualDenseBlock(features, growth) for _ in range(blocks)))
        self.stacked = tuple(stacked)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        r"""Returns the last maps and those of the stacked blocks."""
        made = {}
        for i, block in enumerate(self):
            x = block(x)
            if i in self.stacked:
                made[i] = x
        return x, [made[i] for i in self.stacked]


def stack_maps(own: Tensor, others: Sequence[Tensor]) -> Tensor:
    r"""Concatenates a map with maps of other sizes, which are brought to its size by their
    nearest neighbours."""
    size = own.shape[-2:]
    resized = [o if o.shape[-2:] == size else F.interpolate(o, size=size) for o in others]
    return torch.cat((own, *resized), dim=1)


class RRDBEncoder(Recorded, nn.Module):
    r"""Creates the encoder of SRFlow, NCSR and their kin: residual-in-residual dense blocks.

    The map of level :math:`l` (1 is the finest) has `scale` :math:`/ 2^l` times the size of the
    condition. It holds the trunk's features, upsampled or averaged to that size, and beside them
    the outputs of the `stacked` blocks at their nearest pixels. The parameters bear the published
    names, so that published weights load as they are.

    References:
        | ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks (Wang et al., 2018)
        | https://arxiv.org/abs/1809.00219
        | SRFlow: Learning the Super-Resolution Space with Normalizing Flow (Lugmayr et al., 2020)
        | https://arxiv.org/abs/2006.14200

    Arguments:
        in_channels: The number of channels of the condition.
        features: The number of channels of the trunk.
        growth: The number of channels that each convolution of a dense block adds.
        blocks: The number of blocks :math:`n_b`.
        stacked: The blocks whose outputs are stacked onto each map, by their index from 0.
        scale: The upscaling factor, a power of two.
        levels: The number of levels :math:`L`.
        head: Whether to keep the head that makes an image of the features; see :meth:`image`.
        long_skip: What is added to the trunk's features: ``"last"``, the output of the last
            block, as SRFlow and its kin do, or ``"first"``, that of the first convolution, as
            ESRGAN does and networks trained for themselves were.

    The condition has shape :math:`(B, in\_channels, H, W)` with any :math:`H, W \geq 1`. A size
    that is no multiple of :math:`m = \max(1, 2^L /` `scale` :math:`)` is padded by replication at
    the bottom and on the right, and the maps are those of the padded condition.

    Attributes:
        channels: The number of channels of each map, `features` times one more than there are
            stacked blocks.

    Raises:
        ValueError: If a size is not positive, `scale` is no power of two, a stacked block does
            not exist, `long_skip` is another word, or a condition has another shape than said
            above.

    Example:
        >>> encoder = RRDBEncoder(features=8, growth=4, blocks=2, stacked=(0, 1), levels=3)
        >>> [tuple(f.shape) for f in encoder(torch.rand(1, 3, 8, 10))]
        [(1, 24, 16, 20), (1, 24, 8, 10), (1, 24, 4, 5)]
        >>> encoder.image(torch.rand(1, 3, 8, 10)).shape
        torch.Size([1, 3, 32, 40])
    """

    def __init__(
        self,
        in_channels: int = 3,
        features: int = 64,
        growth: int = 32,
        blocks: int = 23,
        stacked: Sequence[int] = (1, 8, 15, 22),
        scale: int = 4,
        levels: int = 3,
        *,
        head: bool = True,
        long_skip: str = "last",
    ) -> None:
        super().__init__()
        if long_skip not in LONG_SKIPS:
            raise ValueError(
                f"long_skip must be one of {', '.join(LONG_SKIPS)}; got {long_skip!r}"
            )
        if scale < 1 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two; got {scale}")
        if levels < 1 or in_channels < 1:
            raise ValueError(
                f"levels and in_channels must be positive; got {levels} and {in_channels}"
            )
        self.in_channels = in_channels
        self.channels = features * (1 + len(stacked))
        self.import_report: ImportReport | None = None
        self.scale = scale
        self.levels = levels
        doublings = scale.bit_length() - 1
        self.conv_first = conv3x3(in_channels, features)
        self.RRDB_trunk = ResidualDenseTrunk(features, growth, blocks=blocks, stacked=stacked)
        self.trunk_conv = conv3x3(features, features)
        # The last doubling reaches the size of the image, which is no level's: it is the head's.
        for i in range(1, doublings + 1 if head else doublings):
            self.add_module(f"upconv{i}", conv3x3(features, features))
        if head:
            self.HRconv = conv3x3(features, features)
            self.conv_last = conv3x3(features, in_channels)
        self.head = head
        self.long_skip = long_skip

    def extra_repr(self) -> str:
        r"""Returns scale, levels, stacked blocks and channels, for the printed module."""
        return (
            f"scale={self.scale}, levels={self.levels}, stacked={self.RRDB_trunk.stacked},"
            f" channels={self.channels}, long_skip={self.long_skip!r}"
        )

    @property
    def multiple(self) -> int:
        r"""What the size of a condition is padded to a multiple of."""
        return max(1, 2**self.levels // self.scale)

    def _check(self, y: Tensor) -> None:
        if y.dim() != 4 or y.shape[1] != self.in_channels or 0 in y.shape[-2:]:
            raise ValueError(
                f"the condition must have shape (B, {self.in_channels}, H, W) with H and W at"
                f" least 1; got {tuple(y.shape)}"
            )

    def _trunk(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        # So few channels take no time: single precision here is what all blocks add to.
        with full_precision(y):
            first = self.conv_first(y)
        last, stack = self.RRDB_trunk(first)
        # That of the published flows starts at the last block, not at the first convolution.
        start = first if self.long_skip == "first" else last
        return start + self.trunk_conv(last), stack

    def _double(self, x: Tensor, i: int) -> Tensor:
        conv: Callable[[Tensor], Tensor] = getattr(self, f"upconv{i}")
        return leaky(conv(F.interpolate(x, scale_factor=2.0)))

    def forward(self, y: Tensor) -> list[Tensor]:
        r"""Returns the map of each level, finest first, of images with shape :math:`(B, 3, H, W)`."""
        self._check(y)
        own, stack = self._trunk(pad_to_multiple(y, self.multiple))
        doublings = self.scale.bit_length() - 1  # the level that has the condition's own size
        finer = [own]
        for i in range(1, doublings):
            finer.insert(0, self._double(finer[0], i))
        coarser = [
            F.interpolate(own, scale_factor=0.5**i, mode="bilinear")
            for i in range(1, self.levels - doublings + 1)
        ]
        maps = (finer if doublings else []) + coarser
        return [stack_maps(m, stack) for m in maps[: self.levels]]

    def image(self, y: Tensor) -> Tensor:
        r"""Returns the image that the encoder's own head makes: what ESRGAN's network is for.

        Arguments:
            y: The condition, with shape :math:`(B, in\_channels, H, W)`.

        Returns:
            The image, with shape :math:`(B, in\_channels, sH, sW)`.

        Raises:
            RuntimeError: If the encoder was made without a head.
        """
        self._check(y)
        if not self.head:
            raise RuntimeError("this encoder has no head: make it with head=True")
        x, _ = self._trunk(y)
        for i in range(1, self.scale.bit_length()):
            x = self._double(x, i)
        image: Tensor = self.conv_last(leaky(self.HRconv(x)))
        return image

    @classmethod
    def from_esrgan(
        cls,
        source: Source,
        *,
        stacked: Sequence[int] | None = None,
        levels: int | None = None,
        long_skip: str | None = None,
    ) -> Self:
        r"""Returns an encoder with the weights of a published one, for evaluation.

        Those are the networks that were trained for themselves, before the flows. The weights of
        a whole flow's encoder are loaded too, if their names start with ``RRDB.``. Names are
        those of ESRGAN and SRFlow, of BasicSR and Real-ESRGAN, or of the first ESRGAN. All but
        `stacked`, `levels` and `long_skip` is inferred from names and shapes; what each key
        became is told by the attribute `import_report`.

        The encoders of SRFlow and its kin lack the long skip from the first convolution, which
        ESRGAN's own network has, under the same names. The features then are those that SRFlow's
        code makes of the weights, but :meth:`image` is not ESRGAN's unless `long_skip` is
        ``"first"``.

        Arguments:
            source: The path of the checkpoint, or the state dict: raw or nested, with or without
                ``module.`` before its names.
            stacked: The blocks whose outputs are stacked. If :py:`None`, 1, 8, 15 and 22, or
                1, 3, 5 and 7 of fewer than 23 blocks.
            levels: The number of levels. If :py:`None`, 3 up to a scale of 4, and 4 beyond.
            long_skip: Where the long skip starts. If :py:`None`, what the names tell, which is
                ``"last"`` for those of SRFlow, and ``"first"`` for all others.

        Raises:
            CheckpointError: If it is no such checkpoint: if keys are missing, unexpected, or of
                another shape, with their names. It is a :class:`ValueError`.

        Example:
            >>> small = RRDBEncoder(features=8, growth=4, blocks=2, stacked=())
            >>> encoder = RRDBEncoder.from_esrgan(small.state_dict(), stacked=(0, 1))
            >>> encoder.channels, encoder.scale, encoder.levels
            (24, 4, 3)
        """
        state, label = read_state(source)
        if any(k.startswith("RRDB.") for k in state):
            state = {k[5:]: v for k, v in state.items() if k.startswith("RRDB.")}
        names, told = published_names(state, label)
        keys = {name: k for k, name in names.items()}
        named = {name: state[k] for name, k in keys.items()}
        shapes = {name: t.shape for name, t in named.items()}
        first, growing = "conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight"
        lacking = [k for k in (first, growing) if len(shapes.get(k, ())) != 4]
        if lacking:
            some = ", ".join(list(state)[:4])
            raise CheckpointError(
                f"{label} is no checkpoint of an RRDB network with the published names: it lacks"
                f" {lacking[0]}; it has {some}, ..."
            )
        features, in_channels = shapes[first][:2]
        made = shapes.get("conv_last.weight", (in_channels,))[0]
        if in_channels in (4 * made, 16 * made):
            raise CheckpointError(
                f"{label} is of a network that is fed pixels of {in_channels} channels, each a"
                f" square of the image's: a Real-ESRGAN of a scale of 2 or 1. Take one of 4"
            )
        options = {
            "in_channels": in_channels,
            "features": features,
            "growth": shapes[growing][0],
            "blocks": count_blocks(named, "RRDB_trunk."),
            "scale": 2 ** count_blocks(named, "upconv"),
            "long_skip": long_skip or told or "last",
        }
        return cls._imported(options, state, keys, label, stacked, levels)

    @classmethod
    def from_ncnn(
        cls,
        source: str | PathLike[str],
        *,
        stacked: Sequence[int] | None = None,
        levels: int | None = None,
    ) -> Self:
        r"""Returns an encoder with the weights of an RRDB network in ncnn's format, for evaluation.

        The graph tells all but `stacked` and `levels`, the long skip too, so that :meth:`image`
        is what the network computes; a graph that computes anything else is refused. What the
        weights of each layer became is told by the attribute `import_report`.

        Arguments:
            source: The ``.param``, or the ``.bin`` of the same name beside it, of images in
                :math:`[0, 1]`. Weights of float16 become float32.
            stacked: The blocks whose outputs are stacked; see :meth:`from_esrgan`.
            levels: The number of levels; see :meth:`from_esrgan`.

        Raises:
            CheckpointError: If they are no such files; if they are truncated, of different
                networks, or quantised; or if the graph is not that of an RRDB network, with the
                first layer that departs from it. It is a :class:`ValueError`.
            OSError: If a file cannot be read.

        Example:
            >>> encoder = RRDBEncoder.from_ncnn("REALSR_DF2K_UP4X.param")  # doctest: +SKIP
            >>> larger = encoder.image(torch.rand(1, 3, 40, 40))  # doctest: +SKIP
        """
        network = read_ncnn(source)
        graph = recognise(network)
        options = {
            "in_channels": graph.in_channels,
            "features": graph.features,
            "growth": graph.growth,
            "blocks": graph.blocks,
            "scale": 2**graph.doublings,
            "long_skip": graph.long_skip,
        }
        state, keys = {}, {}
        for name, weights in network.weights.items():
            for leaf, tensor in weights._asdict().items():
                state[f"{name}.{leaf}"] = tensor
                keys[f"{graph.names[name]}.{leaf}"] = f"{name}.{leaf}"
        return cls._imported(options, state, keys, network.label, stacked, levels)

    @classmethod
    def _imported(
        cls,
        options: Mapping[str, Any],
        state: Mapping[str, Tensor],
        keys: Mapping[str, str],
        label: str,
        stacked: Sequence[int] | None,
        levels: int | None,
    ) -> Self:
        r"""The encoder with the weights of a checkpoint, whose keys are given by the names here."""
        if stacked is None:
            stacked = (1, 8, 15, 22) if options["blocks"] > 22 else (1, 3, 5, 7)
        if levels is None:
            levels = 3 if options["scale"] <= 4 else 4
        # Drawing the weights that are overwritten must not disturb the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            encoder = cls(**options, stacked=stacked, levels=levels)
        encoder.to(state[keys["conv_first.weight"]].dtype)
        plan: dict[str, Entry] = {
            keys.get(name, name): entry for name, entry in plan_module(encoder, "", "").items()
        }
        inferred = {**options, "stacked": tuple(stacked), "levels": levels}
        encoder.import_report = load(encoder, plan, state, label=label, dead=(), inferred=inferred)
        return encoder.eval()
