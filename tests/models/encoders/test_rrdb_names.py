r"""The names that RRDB networks' weights have had."""

import re

import pytest
import torch

from flowguard.models import RRDBEncoder
from flowguard.models.checkpoints import CheckpointError
from flowguard.models.encoders.rrdb_names import published_names


def small(scale=4):
    torch.manual_seed(0)
    return RRDBEncoder(features=6, growth=4, blocks=2, stacked=(0, 1), scale=scale)


def basicsr(state):
    r"""The names of BasicSR's class."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"RRDB_trunk\.(\d+)\.RDB(\d)", r"body.\1.rdb\2", key)
        key = key.replace("trunk_conv", "conv_body").replace("HRconv", "conv_hr")
        renamed[re.sub(r"upconv(\d)", r"conv_up\1", key)] = value
    return renamed


def first_kind(state, scale=4):
    r"""The names of the first ESRGAN: a chain, whose parts are numbered."""
    doublings = scale.bit_length() - 1
    parts = {"conv_first": 0, "HRconv": 3 * doublings + 2, "conv_last": 3 * doublings + 4}
    parts |= {f"upconv{i}": 3 * i for i in range(1, doublings + 1)}
    renamed = {}
    for key, value in state.items():
        head, _, leaf = key.rpartition(".")
        if head in parts:
            key = f"model.{parts[head]}.{leaf}"
        key = re.sub(r"RRDB_trunk\.(\d+)\.(RDB\d\.conv\d)", r"model.1.sub.\1.\2.0", key)
        renamed[key.replace("trunk_conv", "model.1.sub.2")] = value
    return renamed


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("style", [basicsr, first_kind])
def test_all_names_of_the_same_weights_make_the_same_encoder(style, scale):
    encoder = small(scale)
    state = encoder.state_dict()
    theirs = style(state) if style is basicsr else style(state, scale)
    assert len(theirs) == len(state)
    made = RRDBEncoder.from_esrgan({"params_ema": theirs}, stacked=(0, 1))
    assert made.scale == scale
    for name, weight in state.items():
        assert torch.equal(made.state_dict()[name], weight)
    assert made.import_report.keys.keys() == theirs.keys()
    y = torch.rand(1, 3, 5, 6)
    assert not torch.equal(made.image(y), encoder.image(y))  # these skip from the first one
    encoder.long_skip = "first"
    assert torch.equal(made.image(y), encoder.image(y))


def test_where_the_long_skip_starts_can_be_said():
    state = small().state_dict()
    assert RRDBEncoder.from_esrgan(state, stacked=(0,)).long_skip == "last"
    assert RRDBEncoder.from_esrgan(state, stacked=(0,), long_skip="first").long_skip == "first"
    said = RRDBEncoder.from_esrgan(basicsr(state), stacked=(0,), long_skip="last")
    assert said.long_skip == "last"


@pytest.mark.parametrize("squared", [4, 16])
def test_networks_of_squares_of_pixels_are_refused(squared):
    state = basicsr(small().state_dict())
    state["conv_first.weight"] = torch.zeros(6, 3 * squared, 3, 3)
    with pytest.raises(CheckpointError, match=f"fed pixels of {3 * squared} channels"):
        RRDBEncoder.from_esrgan(state)


def test_a_chain_of_other_parts_is_refused():
    state = first_kind(small().state_dict())
    state["model.9.weight"] = state.pop("model.6.weight")
    state["model.9.bias"] = state.pop("model.6.bias")
    with pytest.raises(CheckpointError, match=r"it has model.0, model.3, model.8, model.9"):
        RRDBEncoder.from_esrgan(state)


@pytest.mark.parametrize("style", [basicsr, first_kind])
def test_what_is_missing_or_too_much_is_named(style):
    state = style(small().state_dict())
    last = [k for k in state if "sub.1" in k or "body.1" in k][-1]
    del state[last]
    with pytest.raises(CheckpointError, match=r"1 missing: RRDB_trunk.1.RDB3.conv5.bias"):
        RRDBEncoder.from_esrgan(state, stacked=())
    state = style(small().state_dict()) | {"more.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"1 unexpected: more.weight"):
        RRDBEncoder.from_esrgan(state, stacked=())


def test_names_that_are_none_of_these_are_kept():
    assert published_names(["a", "body.0.rdb1.conv9", "conv_first.weight"], "x")[0] == {
        "a": "a",
        "body.0.rdb1.conv9": "body.0.rdb1.conv9",
        "conv_first.weight": "conv_first.weight",
    }
