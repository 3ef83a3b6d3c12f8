r"""Networks in ncnn's format: a graph in words (``.param``) and its weights (``.bin``).

Nothing is run. What is read is the list of layers, and for each convolution its numbers; whatever
could mean something that is not known here is refused.
"""

__all__ = ["Layer", "Network", "Weights", "read_ncnn", "read_param"]

import os
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowguard.models.checkpoints import CheckpointError

MAGIC = "7767517"
HALF = 0x01306B47  # the weights that follow are float16
ARRAY = -23300  # an option of many numbers: its key is this minus its number

Option = float | tuple[float, ...]

#: What an option is if it is not given; those of a convolution that are not here must be given.
CONVOLUTION: dict[int, float] = {2: 1, 3: 1, 4: 0, 5: 0, 8: 0, 9: 0, 18: 0, 19: 0}
SAME = {11: 1, 12: 2, 13: 3, 14: 4, 15: 4, 16: 14}  # whose default is another's value


@dataclass(frozen=True)
class Layer:
    r"""A layer of a network, as the ``.param`` names it.

    Arguments:
        kind: Its kind, such as ``"Convolution"``.
        name: Its name.
        inputs: The blobs that it reads.
        outputs: The blobs that it makes.
        options: Its options by their numbers.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[int, Option]


class Weights(NamedTuple):
    r"""The numbers of a convolution, in float32."""

    weight: Tensor  # (out, in, 3, 3)
    bias: Tensor  # (out)


@dataclass(frozen=True)
class Network:
    r"""A network in ncnn's format.

    Arguments:
        label: What to call it in messages.
        layers: Its layers, each after those that it reads from.
        weights: The numbers of its convolutions by their names, in the order of the layers.
    """

    label: str
    layers: tuple[Layer, ...]
    weights: Mapping[str, Weights]


def read_ncnn(source: str | PathLike[str]) -> Network:
    r"""Reads a network of 3×3 convolutions in ncnn's format.

    Arguments:
        source: The ``.param``, or the ``.bin`` of the same name beside it.

    Returns:
        The layers and their weights. Those of float16 become float32, which changes no number.

    Raises:
        CheckpointError: If it is no such pair of files; if a layer has weights of another kind
            than float32 or float16, or options that are not those of a 3×3 convolution with
            bias that keeps the size; or if the weights are not just as many as the graph asks.
    """
    param, weights = _pair(Path(source))
    layers = read_param(param)
    convolutions = [layer for layer in layers if layer.kind == "Convolution"]
    read: dict[str, Weights] = {}
    with weights.open("rb") as stream:
        left = _Numbers(stream, weights.name)
        for layer in convolutions:
            read[layer.name] = _convolution(layer, left)
        if left.rest:
            raise CheckpointError(
                f"{weights.name} must end with the last of the {len(convolutions)} convolutions"
                f" of {param.name}; {left.rest} bytes are left over: it is of another network"
            )
    return Network(param.name, layers, read)


def _pair(source: Path) -> tuple[Path, Path]:
    if source.suffix not in (".param", ".bin"):
        raise CheckpointError(
            f"a network in ncnn's format is a pair NAME.param and NAME.bin; got {source.name}"
        )
    param, weights = source.with_suffix(".param"), source.with_suffix(".bin")
    for file in (param, weights):
        if not file.is_file():
            raise CheckpointError(
                f"a network in ncnn's format is a pair of files; {file.name} must lie beside"
                f" {source.name}, and does not"
            )
    return param, weights


def read_param(file: Path) -> tuple[Layer, ...]:
    r"""Reads the graph of a network.

    Arguments:
        file: The ``.param``.

    Raises:
        CheckpointError: If it is none: if it starts otherwise, has another number of layers or
            blobs than it says, or reads blobs before they are made.
    """
    try:
        lines = [line for line in file.read_text(encoding="ascii").splitlines() if line.strip()]
    except UnicodeDecodeError:
        lines = []
    if not lines or lines[0].strip() != MAGIC:
        raise CheckpointError(
            f"{file.name} must be a graph in words whose first line is {MAGIC}, as ncnn writes"
            " them; it starts otherwise"
        )
    try:
        count, blobs = map(int, lines[1].split())
        layers = tuple(map(_layer, lines[2:]))
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read as a graph: {error}") from None
    made: list[str] = []
    known: set[str] = set()
    for layer in layers:
        early = [blob for blob in layer.inputs if blob not in known]
        if early:
            raise CheckpointError(
                f"in {file.name} {layer.name} reads {early[0]}, which is not made yet"
            )
        made += layer.outputs
        known.update(layer.outputs)
    names = {layer.name for layer in layers}
    if (count, blobs) != (len(layers), len(made)) or len(known) < blobs or len(names) < count:
        raise CheckpointError(
            f"{file.name} must have {count} layers and {blobs} blobs of different names, as its"
            f" second line says; it has {len(layers)} and {len(made)}: it is truncated or changed"
        )
    return layers


def _layer(line: str) -> Layer:
    words = line.split()
    if len(words) < 4:
        raise ValueError(f"a layer has a kind, a name and two counts; got {line!r}")
    kind, name, ins, outs = words[0], words[1], int(words[2]), int(words[3])
    blobs, options = words[4 : 4 + ins + outs], words[4 + ins + outs :]
    if min(ins, outs) < 0 or len(blobs) < ins + outs or any("=" in blob for blob in blobs):
        raise ValueError(f"{name} must name {ins} blobs that it reads and {outs} that it makes")
    found = dict(map(_option, options))
    return Layer(kind, name, tuple(blobs[:ins]), tuple(blobs[ins:]), found)


def _option(text: str) -> tuple[int, Option]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"options are written as number=value; got {text!r}")
    number = int(key)
    if number > ARRAY:
        return number, float(value)
    count, *values = value.split(",")
    if int(count) != len(values):
        raise ValueError(f"an array must have as many values as it says; got {text!r}")
    return ARRAY - number, tuple(map(float, values))


class _Numbers:
    r"""The numbers of a file, read one array after the other."""

    def __init__(self, stream: BinaryIO, label: str) -> None:
        self.stream, self.label = stream, label
        self.rest = os.fstat(stream.fileno()).st_size

    def take(
        self, count: int, dtype: str, layer: str
    ) -> "np.ndarray[tuple[int], np.dtype[np.generic]]":
        r"""Returns the next numbers; where they are stored in 4-byte steps, what is over is
        passed by."""
        size = -(-count * np.dtype(dtype).itemsize // 4) * 4
        if size > self.rest:
            raise CheckpointError(
                f"{self.label} ends within {layer}, which needs {size} bytes more;"
                f" {self.rest} are left: it is truncated, or of another network"
            )
        self.rest -= size
        return np.frombuffer(self.stream.read(size), dtype, count)


def _convolution(layer: Layer, numbers: _Numbers) -> Weights:
    out, inner = _sizes(layer)
    (flag,) = numbers.take(1, "<u4", layer.name).tolist()
    if flag not in (0, HALF):
        raise CheckpointError(
            f"in {numbers.label} the weights of {layer.name} must be float32 or float16 (a flag of"
            f" 0 or {HALF:#010x}); got {flag:#010x}: they are quantised, or the file is of another"
            " network"
        )
    count = out * inner * 9
    weight = numbers.take(count, "<f2" if flag else "<f4", layer.name).astype(np.float32)
    bias = numbers.take(out, "<f4", layer.name).astype(np.float32)
    shaped = torch.from_numpy(weight).view(out, inner, 3, 3)
    return Weights(shaped, torch.from_numpy(bias))


def _sizes(layer: Layer) -> tuple[int, int]:
    r"""The channels that come out and go in; refuses what is no plain 3×3 convolution."""

    def value(number: int) -> Option:
        if number in layer.options:
            return layer.options[number]
        return value(SAME[number]) if number in SAME else CONVOLUTION.get(number, -1)

    known = {0, 1, 6, 10, *CONVOLUTION, *SAME}
    wanted = {1: 3, 11: 3, 2: 1, 12: 1, 3: 1, 13: 1, 4: 1, 14: 1, 15: 1, 16: 1}
    wanted |= {5: 1, 8: 0, 18: 0, 19: 0}
    wrong = [n for n, v in wanted.items() if value(n) != v]
    wrong += [n for n in layer.options if n not in known]
    if wrong:
        raise CheckpointError(
            f"{layer.name} must be a 3×3 convolution with bias that keeps the size, which is what"
            f" is known here; its option {wrong[0]} is {value(wrong[0])}"
        )
    out, count = value(0), value(6)
    if not isinstance(out, float) or not isinstance(count, float) or out < 1:
        raise CheckpointError(f"{layer.name} must say how many channels and numbers it has")
    inner = count / (9 * out)
    if inner < 1 or not inner.is_integer() or not out.is_integer():
        raise CheckpointError(
            f"{layer.name} must have 9 numbers for each pair of channels; got {count:g} for"
            f" {out:g} channels"
        )
    return int(out), int(inner)
