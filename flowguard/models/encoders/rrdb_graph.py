r"""Whether a network in ncnn's format is an RRDB network, and which convolution is which.

Both graphs, that of the file and that of the network it is taken for, are written as expressions
of the input by the same words, and must be the same expression.
"""

__all__ = ["RRDBGraph", "recognise"]

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flowguard.models.checkpoints import CheckpointError
from flowguard.models.ncnn import Layer, Network

SUM, PRODUCT = 1, 2  # of `Eltwise` the first, of `BinaryOp` 0 and the second
NEAREST = 1


@dataclass(frozen=True)
class RRDBGraph:
    r"""What the graph of an RRDB network tells.

    Arguments:
        names: The published name of each convolution by the name that it has in the file.
        in_channels: The number of channels of the input.
        features: The number of channels of the trunk.
        growth: The number of channels that each convolution of a dense block adds.
        blocks: The number of blocks.
        doublings: How many times the size is doubled.
        long_skip: Where the long skip starts: ``"first"`` or ``"last"``.
    """

    names: Mapping[str, str]
    in_channels: int
    features: int
    growth: int
    blocks: int
    doublings: int
    long_skip: str


class _Words:
    r"""Expressions as numbers: the same for those that compute the same."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.parts: list[tuple[Hashable, ...]] = []
        self.scaled: dict[int, tuple[int, float]] = {}

    def _word(self, *parts: Hashable) -> int:
        if parts not in self.numbers:
            self.numbers[parts] = len(self.parts)
            self.parts.append(parts)
        return self.numbers[parts]

    def input(self) -> int:
        return self._word("input")

    def conv(self, x: int, index: int, channels: int) -> int:
        # The weights are what tells convolutions apart, so each is its own.
        return self._word("conv", x, index, channels)

    def leaky(self, x: int, slope: float) -> int:
        return self._word("leaky", x, slope)

    def cat(self, xs: Sequence[int]) -> int:
        flat: list[Hashable] = []
        for x in xs:
            kind, *inner = self.parts[x]
            flat += inner if kind == "cat" else [x]
        return self._word("cat", *flat)

    def sum(self, *terms: tuple[int, float]) -> int:
        r"""A sum with factors, whose order does not matter; a factor may have a layer of its own."""
        found: list[tuple[int, float]] = []
        for x, factor in terms:
            if x in self.scaled:
                x, own = self.scaled[x]
                factor *= own
            found.append((x, factor))
        word = self._word("sum", *sorted(found))
        if len(found) == 1:
            self.scaled[word] = found[0]
        return word

    def double(self, x: int) -> int:
        return self._word("double", x)


def recognise(network: Network) -> RRDBGraph:
    r"""Returns what the graph of an RRDB network tells.

    Arguments:
        network: The network.

    Raises:
        CheckpointError: If it computes anything else than an RRDB network does, with the first
            layer that departs from it.
    """
    sizes = [tuple(w.weight.shape) for w in network.weights.values()]
    doublings = sum(layer.kind == "Interp" for layer in network.layers)
    blocks, rest = divmod(len(sizes) - 4 - doublings, 15)
    if blocks < 1 or rest:
        raise CheckpointError(
            f"{network.label} is no RRDB network: it must have 15 convolutions for each block, 4"
            f" more, and one for each doubling; it has {len(sizes)}, and {doublings} doublings"
        )
    features, growth = sizes[0][0], sizes[1][0]
    words = _Words()
    found = _of_file(network, words)
    departures = []
    for skip in ("first", "last"):
        wanted = _wanted(words, features, growth, blocks, doublings, sizes[0][1], skip)
        departs = [layer for layer, x in found if x not in wanted]
        if not departs and found[-1][1] == wanted[-1]:
            names = dict(zip(network.weights, _names(blocks, doublings), strict=True))
            return RRDBGraph(names, sizes[0][1], features, growth, blocks, doublings, skip)
        departures.append(departs[0] if departs else found[-1][0])
    layer = max(departures, key=network.layers.index)
    raise CheckpointError(
        f"{network.label} is no RRDB network: it departs from one of {features} features, growth"
        f" {growth}, {blocks} blocks and {doublings} doublings at {layer.kind} {layer.name}"
    )


def _names(blocks: int, doublings: int) -> Iterator[str]:
    r"""The published names of the convolutions, in the order in which they compute."""
    yield "conv_first"
    for block in range(blocks):
        for dense in range(1, 4):
            for conv in range(1, 6):
                yield f"RRDB_trunk.{block}.RDB{dense}.conv{conv}"
    yield "trunk_conv"
    for i in range(doublings):
        yield f"upconv{i + 1}"
    yield from ("HRconv", "conv_last")


def _wanted(
    words: _Words,
    features: int,
    growth: int,
    blocks: int,
    doublings: int,
    out: int,
    skip: str,
) -> list[int]:
    r"""All that an RRDB network computes, its result last."""
    made = [words.input()]
    count = 0

    def keep(x: int) -> int:
        made.append(x)
        return x

    def conv(x: int, channels: int, activated: bool = False) -> int:
        nonlocal count
        count += 1
        x = keep(words.conv(x, count - 1, channels))
        return keep(words.leaky(x, 0.2)) if activated else x

    def added(x: int, by: int) -> int:
        keep(words.sum((by, 0.2)))  # where the factor has a layer of its own
        return keep(words.sum((x, 1.0), (by, 0.2)))

    first = x = conv(made[0], features)
    for _ in range(blocks):
        start = x
        for _ in range(3):
            seen = [x]
            for _ in range(4):
                seen.append(conv(keep(words.cat(seen)) if len(seen) > 1 else x, growth, True))
            x = added(x, conv(keep(words.cat(seen)), features))
        x = added(start, x)
    x = keep(words.sum((first if skip == "first" else x, 1.0), (conv(x, features), 1.0)))
    for _ in range(doublings):
        x = conv(keep(words.double(x)), features, True)
    conv(conv(x, features, True), out)
    return made


def _of_file(network: Network, words: _Words) -> list[tuple[Layer, int]]:
    r"""What each layer of a file computes."""
    index = {name: i for i, name in enumerate(network.weights)}
    blobs: dict[str, int] = {}
    made = []
    for layer in network.layers:
        inputs = [blobs[b] for b in layer.inputs]
        if layer.kind != "Split" and len(layer.outputs) != 1:
            raise _unknown(network, layer)
        x = _of_layer(network, layer, inputs, index, words)
        blobs |= dict.fromkeys(layer.outputs, x)
        made.append((layer, x))
    return made


def _of_layer(
    network: Network, layer: Layer, inputs: list[int], index: Mapping[str, int], words: _Words
) -> int:
    options = dict(layer.options)
    match layer.kind, len(inputs):
        case "Input", 0:
            return words.input()
        case "Split", 1 if not options:
            return inputs[0]
        case "Convolution", 1:
            x = words.conv(
                inputs[0], index[layer.name], network.weights[layer.name].weight.shape[0]
            )
            match options.get(9, 0), options.get(10):
                case 0, _:
                    return x
                case 2, (float(slope),):
                    return words.leaky(x, slope)
        case "ReLU", 1 if options.keys() == {0}:
            return words.leaky(inputs[0], options[0])  # type: ignore[arg-type]
        case "Concat", _ if options.get(0, 0) == 0 and options.keys() <= {0}:
            return words.cat(inputs)
        case "Eltwise", n if options.get(0) == SUM and options.keys() <= {0, 1}:
            factors = options.get(1) or (1.0,) * n
            if isinstance(factors, tuple) and len(factors) == n:
                return words.sum(*zip(inputs, factors, strict=True))
        case "BinaryOp", 2 if options.get(0, 0) == 0 and not any(options.values()):
            return words.sum((inputs[0], 1.0), (inputs[1], 1.0))
        case "BinaryOp", 1 if options.keys() == {0, 1, 2} and options[0] == PRODUCT:
            return words.sum((inputs[0], options[2]))  # type: ignore[arg-type]
        case "Interp", 1 if options == {0: NEAREST, 1: 2.0, 2: 2.0}:
            return words.double(inputs[0])
    raise _unknown(network, layer)


def _unknown(network: Network, layer: Layer) -> CheckpointError:
    told = " ".join(f"{n}={v}" for n, v in layer.options.items())
    return CheckpointError(
        f"{network.label} is no RRDB network: none has a layer such as {layer.kind} {layer.name}"
        f" of {len(layer.inputs)} inputs with the options {told or 'of the default'}"
    )
