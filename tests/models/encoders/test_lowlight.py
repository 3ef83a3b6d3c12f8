r"""The low-light encoder: its input, its numbers, its sizes, its mistakes."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowguard.models.encoders.lowlight import (
    LowLightEncoder,
    color_map,
    equalize_histogram,
    low_light_input,
    noise_map,
)

DEAD = ("HRconv", "awb_para", "conv_last", "downconv3")  # published, but used by nothing


@pytest.fixture(scope="module")
def large(golden):
    return load_file(golden("llflow_tiny.safetensors"))


def images(bytes_):
    r"""Bytes of shape (…, H, W, 3) as images in [0, 1]."""
    return bytes_.movedim(-1, -3).float() / 255


def small(**options):
    torch.manual_seed(0)
    return LowLightEncoder(**{"features": 8, "growth": 4, "blocks": 2, "stacked": (1,)} | options)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (24, 40)], ids=str)
@pytest.mark.parametrize("top", [1, 5, 60, 256])
def test_the_input_follows_the_published_formulas(published, size, top):
    low = torch.randint(top, (2, 3, *size), dtype=torch.uint8)
    made, expected = low_light_input(low.double() / 255), published.lowlight_input(low)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_maps_follow_the_published_formulas(published):
    options = {"features": 8, "growth": 4, "blocks": 2, "stacked": (0, 1)}
    net = published.Net(lowlight=True, splits=0, steps=1, hidden=4, **options)
    state = published.random_state(net)
    encoder = LowLightEncoder(**options).double()
    own = {k[5:]: v for k, v in state.items() if k.startswith("RRDB.")}
    encoder.load_state_dict({k: v for k, v in own.items() if k.partition(".")[0] not in DEAD})
    y = published.lowlight_input(torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8))
    maps, colors = published.lowlight_maps(state, net, y)
    found = encoder(y)
    for made, expected in zip(found, maps, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encoder.color_map(found), colors, rtol=0, atol=1e-12)


def test_published_input(large, published):
    low = images(large["val.low_uint8"])
    equalized = 255 * equalize_histogram(low)
    assert torch.equal(equalized.round(), 255 * images(large["val.histeq_uint8"]))
    assert torch.equal(low_light_input(low), large["lr"])
    formula = published.lowlight_input(large["val.low_uint8"].movedim(-1, 1))
    torch.testing.assert_close(formula.float(), large["lr"], rtol=0, atol=1e-6)


def test_published_input_of_a_training_crop(large):
    full = low_light_input(images(large["train.low_uint8"])[None])[0]
    row, column, flip = large["train.crop_row_col_flip"].tolist()
    crop = full[:, row : row + 160, column : column + 160]
    crop = crop.flip(-1) if flip else crop
    assert torch.equal(crop[:, ::4, ::4], large["train.LQ"])


def test_published_input_of_an_image_of_any_size(large):
    """There the image is padded first, and what was added counts in the histogram."""
    top, bottom, left, right = large["unpaired.pad_top_bottom_left_right"].tolist()
    padded = np.pad(
        large["unpaired.low_uint8"].numpy(), ((top, bottom), (left, right), (0, 0)), "symmetric"
    )
    made = low_light_input(images(torch.from_numpy(padded))[None])
    assert torch.equal(made, large["unpaired.lr"])


def test_published_numbers(large):
    encoder = LowLightEncoder(features=32, growth=32, blocks=2, stacked=(1,)).double()
    state = {
        key[8:]: value.double() * large.get(f"sdscale.{key[3:]}", torch.tensor(1.0)).double()
        for key, value in large.items()
        if key.startswith("sd.RRDB.") and key.split(".")[2] not in DEAD
    }
    encoder.load_state_dict(state)
    y = large["lr"].double()
    shares = color_map(y[:, :3].exp())
    noise = noise_map(shares)
    with torch.no_grad():
        maps = encoder(y)
    for name, made in zip(("fea_up2", "fea_up1", "fea_up0"), maps, strict=True):
        expected = large[f"f64.feat.{name}.sub"]
        torch.testing.assert_close(made[:, ::4, ::5, ::5], expected, rtol=0, atol=1e-12)
    for part, made in {
        "color_map_sub": shares[..., ::4, ::4],
        "noise_map_rows0_5": noise[..., :5, :],
        "noise_map_cols0_5": noise[..., :5],
        "noise_map_last_row": noise[..., -1, :],
        "noise_map_last_col": noise[..., -1],
    }.items():
        torch.testing.assert_close(made, large[f"f64.enc_in.{part}"], rtol=0, atol=1e-14)
    predicted = encoder.color_map(maps).float()  # stored in single precision
    torch.testing.assert_close(predicted, large["f64.color_map"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equalizing_keeps_dtype_and_does_not_care_for_layout(dtype):
    image = torch.rand(2, 3, 9, 7).to(dtype)
    made = equalize_histogram(image)
    assert made.dtype == dtype
    assert torch.equal(made, equalize_histogram(image.to(memory_format=torch.channels_last)))
    assert equalize_histogram(image[:0]).shape == (0, 3, 9, 7)


def test_equalizing_treats_each_channel_of_each_image_alone():
    image = torch.rand(2, 3, 9, 7)
    one = equalize_histogram(image[1:, 2:])
    assert torch.equal(equalize_histogram(image)[1:, 2:], one)


def test_equalizing_leaves_a_flat_channel_and_bears_what_no_image_holds():
    assert torch.equal(
        equalize_histogram(torch.full((1, 1, 4, 4), 51 / 255)), torch.full((1, 1, 4, 4), 51 / 255)
    )
    wild = torch.tensor([float("nan"), -3.0, float("inf"), 1e30]).reshape(1, 1, 2, 2)
    assert equalize_histogram(wild).flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_a_prepared_condition_gives_the_same():
    encoder, y = small(), torch.rand(2, 3, 10, 12)
    for a, b in zip(encoder(y), encoder(encoder.prepare(y)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (37, 53), (64, 64)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_one_map_for_each_level_at_any_size(size, levels):
    encoder = small(levels=levels)
    maps = encoder(torch.rand(2, 3, *size))
    h, w = (2**levels * -(-n // 2**levels) for n in size)
    assert [tuple(m.shape) for m in maps] == [
        (2, 16, h // 2**n, w // 2**n) for n in range(1, levels + 1)
    ]
    assert encoder.color_map(maps).shape == (2, 3, h, w)


def test_every_parameter_is_used():
    encoder = small()
    maps = encoder(torch.rand(1, 3, 16, 16))
    (sum(m.sum() for m in maps) + encoder.color_map(maps).sum()).backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("value", [0.0, 1.0, -5.0, 1e10, 3e38])
def test_what_is_finite_stays_finite(value):
    maps = small()(torch.full((1, 3, 8, 8), value))
    assert all(torch.isfinite(m).all() for m in maps)


MISTAKES = {
    "levels": (lambda: small(levels=0), "levels must be positive; got 0"),
    "stacked": (lambda: small(stacked=(2,)), r"from 0 to 1 \(there are 2\); got \(2,\)"),
    "channels": (
        lambda: small()(torch.rand(1, 4, 8, 8)),
        r"\(B, 3, H, W\), or \(B, 6, H, W\).*got \(1, 4, 8, 8\)",
    ),
    "no batch": (lambda: small()(torch.rand(3, 8, 8)), r"got \(3, 8, 8\)"),
    "no columns": (lambda: small()(torch.rand(1, 3, 8, 0)), "at least 1"),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
