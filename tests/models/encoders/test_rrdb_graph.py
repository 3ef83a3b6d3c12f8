r"""Graphs in ncnn's format: RRDB networks are recognised, and nothing else is."""

import re

import pytest
import torch

from flowguard.models import RRDBEncoder
from flowguard.models.checkpoints import CheckpointError
from flowguard.models.encoders.rrdb_graph import recognise
from flowguard.models.ncnn import read_ncnn


def small(**options):
    torch.manual_seed(0)
    return RRDBEncoder(**{"features": 6, "growth": 4, "blocks": 2, "stacked": ()} | options)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("long_skip", ["first", "last"])
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_all_is_told_by_the_graph(ncnn, scale, long_skip, fused, tmp_path):
    encoder = small(scale=scale, long_skip=long_skip)
    network = read_ncnn(ncnn.Writer(fused=fused).encoder(encoder).write(tmp_path))
    graph = recognise(network)
    assert (graph.in_channels, graph.features, graph.growth, graph.blocks) == (3, 6, 4, 2)
    assert (2**graph.doublings, graph.long_skip) == (scale, long_skip)
    weights = encoder.state_dict()
    for name, read in network.weights.items():
        assert torch.equal(read.weight, weights[f"{graph.names[name]}.weight"].half().float())
    assert len(set(graph.names.values())) == len(weights) // 2


def change(old, new, count=1):
    return lambda text: text.replace(old, new, count)


def swapped(text):
    r"""The second convolution of a dense block sees what it should not be the first to see."""
    return re.sub(r"(Concat Concat_\d+ 2 1) (b\d+) (b\d+)", r"\1 \3 \2", text, count=1)


def output_elsewhere(text):
    r"""A network whose last layer is not its result: one more looks at an earlier map."""
    lines = text.splitlines()
    head, blobs = lines[1].split()
    lines[1] = f"{int(head) + 1} {int(blobs) + 1}"
    return "\n".join([*lines, "Split more 1 1 b1 end"])


OTHERS = {
    "another slope": (change("-23310=1,2.0", "-23310=1,1.0"), "departs .* Convolution"),
    "no activation": (change(" 9=2 -23310=1,2.000000e-01", ""), "departs .* at Concat"),
    "another activation": (change("9=2 ", "9=1 "), "none has a layer such as Convolution"),
    "another factor": (change("2,2.000000e-01,1", "2,3.000000e-01,1"), "departs .* Eltwise"),
    "a product": (change("0=1 -23301", "0=0 -23301"), "such as Eltwise"),
    "a difference": (
        lambda text: re.sub(r"(BinaryOp .*) 0=0", r"\1 0=1", text),
        "such as BinaryOp",
    ),
    "bilinear": (change("0=1 1=2.0", "0=2 1=2.0"), "such as Interp"),
    "tripled": (change("1=2.000000e+00", "1=3.000000e+00"), "such as Interp"),
    "an unknown layer": (change("Concat ", "Slice "), "such as Slice"),
    "another order of channels": (swapped, "departs .* at Concat"),
    "another axis": (
        lambda text: re.sub(r"(Concat .*) 0=0", r"\1 0=1", text),
        "such as Concat",
    ),
    "a result from elsewhere": (output_elsewhere, "departs .* at Split more"),
}


@pytest.mark.parametrize(("edit", "message"), OTHERS.values(), ids=OTHERS)
def test_other_graphs_are_refused(ncnn, edit, message, tmp_path):
    file = ncnn.Writer().encoder(small()).write(tmp_path)
    text = file.read_text()
    assert edit(text) != text
    file.write_text(edit(text))
    network = read_ncnn(file)
    with pytest.raises(CheckpointError, match=f"net.param is no RRDB network.*{message}"):
        recognise(network)


def test_another_number_of_convolutions_is_refused(ncnn, tmp_path):
    writer = ncnn.Writer()
    x = writer.layer("Input", [])
    for _ in range(5):
        x = writer.conv(x, torch.nn.Conv2d(3, 3, 3))
    with pytest.raises(CheckpointError, match=r"15 convolutions for each block.*it has 5, and 0"):
        recognise(read_ncnn(writer.write(tmp_path)))
