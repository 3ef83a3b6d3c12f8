r"""Files in ncnn's format: what is read of them, and what is refused."""

import re
import struct

import pytest
import torch

from flowguard.models import RRDBEncoder
from flowguard.models.checkpoints import CheckpointError
from flowguard.models.ncnn import read_ncnn


def small():
    torch.manual_seed(0)
    return RRDBEncoder(features=3, growth=3, blocks=1, stacked=(0,), long_skip="first")


@pytest.fixture
def files(ncnn, tmp_path):
    return ncnn.Writer().encoder(small()).write(tmp_path)


@pytest.mark.parametrize("suffix", [".param", ".bin"])
@pytest.mark.parametrize("half", [True, False])
def test_the_weights_are_those_that_were_written(ncnn, half, suffix, tmp_path):
    file = ncnn.Writer(half=half).encoder(small()).write(tmp_path)
    network = read_ncnn(str(file.with_suffix(suffix)))
    convs = [m for m in small().modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(network.weights) == len(convs) == 1 + 15 + 1 + 2 + 2
    for read, conv in zip(network.weights.values(), convs, strict=True):
        wanted = conv.weight.half().float() if half else conv.weight
        assert read.weight.dtype == read.bias.dtype == torch.float32
        assert torch.equal(read.weight, wanted)  # an odd count of halves is padded
        assert torch.equal(read.bias, conv.bias)


def test_options_and_arrays_are_read(files):
    layers = {layer.kind: layer for layer in read_ncnn(files).layers}
    assert layers["Eltwise"].options == {0: 1.0, 1: (0.2, 1.0)}
    assert layers["Interp"].options == {0: 1.0, 1: 2.0, 2: 2.0}


def param(old, new, count=1):
    def change(file):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, count))

    return change


def data(edit):
    def change(file):
        binary = file.with_suffix(".bin")
        binary.write_bytes(edit(binary.read_bytes()))

    return change


def flag(value):
    return data(lambda b: struct.pack("<I", value) + b[4:])


BROKEN = {
    "no .bin": (lambda f: f.with_suffix(".bin").unlink(), "net.bin must lie beside net.param"),
    "words for the .param": (lambda f: f.write_text("hello\n"), "first line is 7767517"),
    "nothing": (lambda f: f.write_text(""), "first line is 7767517"),
    "a binary .param": (lambda f: f.write_bytes(b"\x85\xff" * 99), "first line is 7767517"),
    "no counts": (lambda f: f.write_text("7767517\n"), "cannot be read as a graph"),
    "a cut .param": (
        lambda f: f.write_text(f.read_text()[: f.read_text().rindex("\nConv") + 1]),
        "must have 42 layers.*it is truncated",
    ),
    "a line cut short": (
        lambda f: f.write_text(f.read_text().rstrip().rsplit(" ", 6)[0]),
        "cannot be read as a graph",
    ),
    "a blob from nowhere": (param("Concat_3 2 1 b1 ", "Concat_3 2 1 x "), "reads x, .* not made"),
    "an array cut short": (param("-23310=1,2", "-23310=2,2"), "as many values as it says"),
    "a cut .bin": (data(lambda b: b[:-8]), r"net.bin ends within .*it is truncated"),
    "half a .bin": (data(lambda b: b[: len(b) // 2]), "it is truncated, or of another network"),
    "an empty .bin": (data(lambda b: b""), "ends within Convolution_1.*0 are left"),
    "more than the graph": (data(lambda b: b + b"more"), "4 bytes are left over"),
    "int8 weights": (flag(0x000D4B38), "float32 or float16.*0x000d4b38: they are quantised"),
    "any flag": (flag(1), "must be float32 or float16"),
    "another kernel": (param("1=3 ", "1=5 "), "3×3 convolution.*option 1 is 5"),
    "a stride": (param("4=1 ", "3=2 4=1 "), "3×3 convolution.*option 3 is 2"),
    "no padding": (param("4=1 ", ""), "option 4 is 0"),
    "padding on one side": (param("4=1 ", "4=1 15=0 "), "option 15 is 0"),
    "an unknown option": (param("4=1 ", "4=1 77=1 "), "option 77 is 1"),
    "no bias": (param("5=1 ", ""), "option 5 is 0"),
    "a wrong count": (param("6=81", "6=80"), "9 numbers for each pair of channels; got 80"),
    "more than there is": (param("0=3 ", "0=3000000000 "), "numbers for each pair"),
    "a huge layer": (param("6=81", "6=81000000000"), "ends within Convolution_1"),
    "not a number": (param("0=3 ", "0=nan "), "9 numbers|how many channels"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(change, message, files):
    change(files)
    with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)):
        read_ncnn(files)


def test_other_files_are_refused(files):
    with pytest.raises(CheckpointError, match=r"a pair NAME.param and NAME.bin; got net.pth"):
        read_ncnn(files.with_suffix(".pth"))
