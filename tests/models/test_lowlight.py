r"""The low-light flow: published numbers and weights, sizes, likelihood, guards, mistakes."""

import copy
import json
import math
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file

import flowguard
from flowguard.models import LowLightEncoder, LowLightFlow, SuperResolutionFlow
from flowguard.models.checkpoints import CheckpointError
from flowguard.models.encoders.lowlight import FirstGuess, color_map, low_light_input
from flowguard.models.lowlight import rescale_brightness


@pytest.fixture(scope="module")
def large(golden):
    r"""The numbers that the published code computed."""
    return load_file(golden("llflow_tiny.safetensors"))


@pytest.fixture(scope="module")
def large_state(large):
    r"""The published state dict; int8 entries have a scale."""
    one = torch.tensor(1.0)
    return {
        k[3:]: v.double() * large.get(f"sdscale.{k[3:]}", one).double()
        for k, v in large.items()
        if k.startswith("sd.")
    }


@pytest.fixture(scope="module")
def net(published):
    r"""A small network of the published kind."""
    options = {"features": 8, "growth": 4, "hidden": 6, "steps": 2, "blocks": 2, "stacked": (1,)}
    return published.Net(lowlight=True, splits=0, **options)


@pytest.fixture(scope="module")
def state(published, net):
    return published.random_state(net)


def small(coupling="robust", *, levels=2, seed=0, **options):
    r"""A small model whose couplings are not the identity."""
    torch.manual_seed(seed)
    encoder = LowLightEncoder(8, growth=4, blocks=2, stacked=(1,), levels=levels)
    model = LowLightFlow(
        levels=levels, steps=2, hidden=8, coupling=coupling, encoder=encoder, **options
    )
    with torch.no_grad():
        for name, p in model.flow.named_parameters():
            if not name.endswith("mix.weight"):
                p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def images(*size, batch=2):
    torch.manual_seed(1)
    return torch.rand(batch, 3, *size), 0.1 * torch.rand(batch, 3, *size)


# -- the published model ---------------------------------------------------------------------

DTYPES = {
    torch.float64: {"z": 1e-12, "x": 1e-11, "ladj": 1e-6, "nll": 1e-11},
    torch.float32: {"z": 1e-5, "x": 1e-4, "ladj": 0.05, "nll": 1e-5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_imported_models_follow_the_published_formulas(published, net, state, dtype):
    model = LowLightFlow.from_llflow(state).to(dtype)
    low = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    lr = published.lowlight_input(low)
    high = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    maps, colors = published.lowlight_maps(state, net, lr)
    (z,), logdet = published.flow(state, net, high, maps)
    mean, own = (torch.nn.functional.pixel_unshuffle(t, 8) for t in (colors, color_map(high)))
    near = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0, "atol": 1e-4}

    condition = model.condition(lr.to(dtype))
    (ours,), ladj = model.encode(high.to(dtype), condition)
    torch.testing.assert_close(ours + condition.mean, z.to(dtype), **near)
    torch.testing.assert_close(condition.mean, mean.to(dtype), **near)
    torch.testing.assert_close(ladj, logdet.to(dtype), rtol=near["atol"], atol=near["atol"])
    back = model.decode([(z - mean).to(dtype)], condition)
    torch.testing.assert_close(back, high.to(dtype), rtol=0, atol=10 * near["atol"])
    for ratio, center in ((0.0, mean), (1.0, own)):
        model.train()
        model.target_ratio = ratio
        made = model.nll(high.to(dtype), lr.to(dtype), dequantize=False, bits_per="pixel")
        expected = published.bits(logdet, z, high, center).to(dtype)
        torch.testing.assert_close(made, expected, rtol=near["atol"], atol=near["atol"])


@torch.no_grad()
def test_the_formulas_give_the_published_numbers(published, large, large_state):
    options = {"features": 32, "steps": 2, "blocks": 2, "stacked": (1,), "dead": (384, 128)}
    net = published.Net(lowlight=True, splits=0, **options)
    assert {k: tuple(v.shape) for k, v in large_state.items()} == published.shapes(net)
    maps, colors = published.lowlight_maps(large_state, net, large["lr"].double())
    torch.testing.assert_close(colors.float(), large["f64.color_map"], rtol=0, atol=1e-7)
    for name, made in zip(("fea_up2", "fea_up1", "fea_up0"), maps, strict=True):
        expected = large[f"f64.feat.{name}.sub"]
        torch.testing.assert_close(made[:, ::4, ::5, ::5], expected, rtol=0, atol=1e-12)
    high = large["gt"].double()
    (z,), logdet = published.flow(large_state, net, high, maps)
    torch.testing.assert_close(z, large["f64.fwd.z"], rtol=0, atol=1e-12)
    torch.testing.assert_close(logdet, large["f64.logdet"], rtol=0, atol=1e-8)
    for name, shares in (("colormap", colors), ("gt", published.color_share(high))):
        bits = published.bits(logdet, z, high, torch.nn.functional.pixel_unshuffle(shares, 8))
        torch.testing.assert_close(bits, large[f"f64.mean_{name}.nll"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_published_numbers(large, large_state, dtype):
    model = LowLightFlow.from_llflow(large_state).to(dtype)
    high, low = large["gt"].to(dtype), large["lr"].to(dtype)
    near = DTYPES[dtype]

    def check(made, name, what):
        expected = large[f"f64.{name}"].double()
        torch.testing.assert_close(made.double(), expected, rtol=near[what], atol=near[what])

    with torch.no_grad():
        condition = model.condition(low)
        (z,), ladj = model.encode(high, condition)
        nll = model.nll(high, condition, dequantize=False, bits_per="pixel")
        own = torch.nn.functional.pixel_unshuffle(color_map(high), 8)
        log_prob = -0.5 * (z.double().square() + math.log(2 * math.pi)).sum()
        by_own = z + condition.mean - own
        own_log_prob = -0.5 * (by_own.double().square() + math.log(2 * math.pi)).sum()
        decoded = model.decode([torch.zeros_like(z)], condition)
    check(z + condition.mean, "fwd.z", "z")
    check(ladj, "logdet", "ladj")
    check(nll, "mean_colormap.nll", "nll")
    check(decoded, "rev.x", "x")
    check(log_prob[None], "logp_z_mean_colormap", "ladj")
    check(own_log_prob[None], "logp_z_mean_gt", "ladj")
    assert torch.equal(model.sample(low)[0], decoded)


def test_published_dequantisation(large, large_state):
    """Published noise and constant: a step of 1/32, counted once for each pixel."""
    model = LowLightFlow.from_llflow(large_state)
    noise = (large["f64.dequant.u"].double() - 0.5) / 32
    condition = model.condition(large["lr"].double())
    with torch.no_grad():
        (z,), ladj = model.encode(large["gt"].double() + noise, condition)
    z = z + condition.mean
    torch.testing.assert_close(
        ladj - math.log(32) * 160 * 160, large["f64.dequant.logdet"], rtol=0, atol=1e-3
    )
    # The golden's draw is stored in single precision.
    torch.testing.assert_close(z.sum(), large["f64.dequant.z_sum"], rtol=0, atol=1e-3)
    torch.testing.assert_close(z.square().sum(), large["f64.dequant.z_sqsum"], rtol=0, atol=1e-3)


def test_training_mixes_the_means_as_published(large, large_state):
    model = LowLightFlow.from_llflow(large_state)
    high, low = large["gt"].double(), large["lr"].double()
    model.train()
    for ratio, name in ((0.0, "colormap"), (1.0, "gt")):
        model.target_ratio = ratio
        nll = model.nll(high, low, dequantize=False, bits_per="pixel")
        torch.testing.assert_close(nll, large[f"f64.mean_{name}.nll"], rtol=1e-11, atol=0)


def test_training_draws_for_each_image_and_evaluation_never():
    model = small(target_ratio=0.5)
    high, low = (t.repeat(64, 1, 1, 1) for t in images(8, 8, batch=1))
    assert len(set(model.nll(high, low, dequantize=False).tolist())) == 1
    model.train()
    drawn = {round(v, 3) for v in model.nll(high, low, dequantize=False).tolist()}
    assert len(drawn) == 2


#: The published configurations, and how many parameters their checkpoints hold.
FULL_SIZE = {
    "LLFlow_LOL-pc": (
        {"blocks": 24, "stacked": (1, 3, 5, 7), "steps": 12, "dead": (384, 320)},
        38_859_481,
    ),
    "LLFlow_LOL_smallNet": (
        {"blocks": 4, "stacked": (1,), "steps": 4, "features": 32, "dead": (384, 128)},
        5_429_849,
    ),
}


def test_the_shapes_are_those_of_the_published_checkpoints(golden, published):
    for name, (options, count) in FULL_SIZE.items():
        text = golden(f"keys/{name}.txt").read_text()
        lines = re.findall(r"^(\S+) \[(.*)\] float32$", text, re.MULTILINE)
        listed = {key: tuple(int(n) for n in shape.split(", ")) for key, shape in lines}
        assert published.shapes(published.Net(lowlight=True, splits=0, **options)) == listed, name
        assert int(re.search(r"(\d+) parameters", text)[1]) == count


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_published_key_is_imported(published, name):
    options, count = FULL_SIZE[name]
    net = published.Net(lowlight=True, splits=0, **options)
    model = LowLightFlow.from_llflow({k: torch.zeros(s) for k, s in published.shapes(net).items()})
    report = model.import_report
    assert set(report.keys) == set(published.shapes(net))
    assert report.elements == count
    assert sum(p.numel() for p in model.parameters()) == count - report.unread
    # The keys without a target are those that the published code never reads.
    dead = {k.rpartition(".")[0] for k, names in report.keys.items() if not names}
    parts = ("HRconv", "awb_para", "conv_last", "downconv3")
    assert dead == {f"RRDB.{n}" for n in parts} | {"flowUpsamplerNet.f.0"}
    targets = [n for names in report.keys.values() for n in names]
    assert set(targets) == {n for n, _ in model.named_parameters()}
    assert len(targets) == len(set(targets))
    assert model.encoder.features == net.features
    assert len(model.encoder.RRDB_trunk) == net.blocks
    assert model.encoder.RRDB_trunk.stacked == net.stacked
    assert [len(level) for level in model.flow.steps] == [net.steps] * 3
    assert "never read by the published code" in str(report)


def test_files_and_wrappers(state, tmp_path):
    low = low_light_input(torch.rand(1, 3, 16, 24)).double()
    expected = LowLightFlow.from_llflow(state).sample(low)
    torch.save({"params": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "net.pth")
    made = LowLightFlow.from_llflow(tmp_path / "net.pth")
    assert torch.equal(made.sample(low), expected)


def without(key):
    return lambda s: {k: v for k, v in s.items() if k != key}


LAYER = "flowUpsamplerNet.layers"
FOREIGN = {
    "a missing key": (without(f"{LAYER}.3.actnorm.logs"), f"1 missing: {LAYER}.3.actnorm.logs"),
    "no colour map": (
        without("RRDB.fine_tune_color_map.0.bias"),
        "missing: RRDB.fine_tune_color_map.0.bias",
    ),
    "an unexpected key": (lambda s: s | {"RRDB.more": torch.zeros(2)}, "unexpected: RRDB.more"),
    "another shape": (
        lambda s: s | {"RRDB.trunk_conv.bias": torch.zeros(7)},
        r"RRDB.trunk_conv.bias \(7,\) instead of \(8,\)",
    ),
    "no encoder": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("RRDB")},
        "RRDB.conv_second.weight",
    ),
    "no flow": (lambda s: {k: v for k, v in s.items() if k.startswith("RRDB")}, "no key starts"),
    "nothing": (lambda s: {}, "holds no tensors"),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_checkpoints_are_refused(state, change, message):
    with pytest.raises(CheckpointError, match=message):
        LowLightFlow.from_llflow(change(state))


def test_a_super_resolution_checkpoint_is_refused(published):
    options = {"features": 8, "growth": 4, "hidden": 6, "steps": 1, "blocks": 2, "stacked": (1,)}
    foreign = published.random_state(published.Net(**options))
    with pytest.raises(CheckpointError, match="from_srflow"):
        LowLightFlow.from_llflow(foreign)


# -- any model -------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["affine", "robust", "reparametrized", "bspline"])
@pytest.mark.parametrize("size", [(37, 53), (64, 64), (101, 40)])
def test_round_trip_at_any_size(coupling, size):
    model = small(coupling, levels=3)
    high, low = images(*size)
    with torch.no_grad():
        latents, _ = model.encode(high, low)
        again = model.decode(latents, low)
    assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes(low)
    torch.testing.assert_close(again, high, rtol=0, atol=1e-4)


def test_the_log_determinant_is_that_of_the_map():
    model = small().double()
    high, low = (t.double() for t in images(4, 4, batch=1))

    def flat(x):
        return model.encode(x.reshape(1, 3, 4, 4), low)[0][0].flatten()

    jacobian = torch.autograd.functional.jacobian(flat, high.flatten())
    ladj = model.encode(high, low)[1]
    torch.testing.assert_close(jacobian.slogdet().logabsdet[None], ladj, rtol=0, atol=1e-9)


def test_bits_are_those_of_the_density():
    """With the same noise, the honest bits are the published number, scaled and offset."""
    model = small()
    high, low = images(8, 12)
    torch.manual_seed(3)
    noise = (torch.rand_like(high) - 0.5) / 31
    published = model.nll(high + noise, low, dequantize=False, bits_per="pixel")
    torch.manual_seed(3)
    honest = model.nll(high, low, levels=32)
    torch.testing.assert_close(honest, published / 3 + math.log2(31))
    quant = small(quant=32)
    torch.manual_seed(3)
    torch.testing.assert_close(quant.nll(high, low), honest)


def test_a_condition_is_computed_once():
    model = small()
    high, low = images(13, 10)
    with torch.no_grad():
        condition = model.condition(low)
    assert torch.allclose(
        model.nll(high, condition, dequantize=False), model.nll(high, low, dequantize=False)
    )
    g = torch.Generator()
    many = model.sample(condition, 3, 0.7, g.manual_seed(0))
    assert many.shape == (3, 2, 3, 13, 10)
    assert torch.equal(model.sample(low, 3, 0.7, g.manual_seed(0)), many)
    # Rows of a latent belong to the dark images in turn.
    z = torch.randn(6, *model.latent_shapes(low)[0])
    torch.testing.assert_close(
        model.decode([z], low).unflatten(0, (3, 2))[:, 1], model.decode([z[1::2]], low[1:])
    )


def test_tiles_agree_with_the_whole():
    model = small(levels=2)
    high, low = images(70, 90)
    (z,), ladj = model.encode(high, low)
    (tiled,), tiled_ladj = model.encode(high, low, tile=32)
    torch.testing.assert_close(tiled, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiled_ladj, ladj, rtol=1e-5, atol=1e-2)
    whole = model.decode([z], low)
    torch.testing.assert_close(model.decode([z], low, tile=32), whole, rtol=0, atol=1e-5)
    drawn = [
        model.sample(low, 2, 0.5, torch.Generator().manual_seed(0), tile=tile)
        for tile in (None, 40, "auto")
    ]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn[2], drawn[0], rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match="give the dark images"):
        model.decode([z], model.condition(low), tile=32)


def test_prepared_crops_know_the_whole_histogram():
    model = small()
    _, low = images(16, 16)
    prepared = low_light_input(low)
    assert torch.equal(model.sample(prepared), model.sample(low))
    assert model.sample(prepared[..., :8, :8]).shape == (1, 2, 3, 8, 8)
    assert not torch.equal(model.sample(prepared[..., :8, :8]), model.sample(low[..., :8, :8]))


def test_zero_temperature_decodes_the_mean():
    model = small()
    _, low = images(10, 9)
    first, second = model.sample(low, 2)
    assert torch.equal(first, second)
    assert model.color_map(low).shape == (2, 3, 10, 9)
    assert bool(((model.color_map(low) > 0) & (model.color_map(low) < 1)).all())


@pytest.mark.parametrize("value", [1e30, -1e30, math.inf, math.nan])
def test_one_bad_value_does_not_change_the_brightness_of_a_picture(value):
    image = torch.rand(2, 3, 20, 30) * 0.5
    clean = rescale_brightness(image, torch.tensor([0.6, 0.3]))
    bad = image.clone()
    bad[0, 1, 4, 7] = value
    made = rescale_brightness(bad, torch.tensor([0.6, 0.3]))
    keep = torch.ones_like(image, dtype=torch.bool)
    keep[0, 1, 4, 7] = False
    torch.testing.assert_close(made[keep], clean[keep], rtol=5e-3, atol=0)
    assert torch.equal(made[1], clean[1])
    assert torch.equal(made[0, 1, 4, 7].isnan(), torch.tensor(value).isnan())


def test_brightness_of_samples():
    model = small(margin=None)
    _, low = images(16, 16)
    plain = model.sample(low, 2, 0.3, torch.Generator().manual_seed(0))
    wanted = torch.tensor([0.2, 0.4])
    made = model.sample(low, 2, 0.3, torch.Generator().manual_seed(0), brightness=wanted)
    factor = made / plain
    for row in range(2):
        expected = wanted[row] / plain[:, row].clamp(0, 1).mean(dim=(1, 2, 3))
        torch.testing.assert_close(factor[:, row].mean(dim=(1, 2, 3)), expected, rtol=1e-3, atol=0)
    assert torch.isfinite(rescale_brightness(torch.zeros(1, 3, 4, 4), 0.5)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 100.0, 1e30, math.inf, -math.inf])
def test_a_robust_model_stays_finite_and_below_its_certificate(value):
    model = small(levels=3, seed=4)
    certificate = flowguard.certify(model)
    assert certificate.certified
    low = torch.full((1, 3, 16, 16), value)
    z = 8 * torch.rand(1, *model.latent_shapes(low)[0]) - 4
    x = model.decode([z], low)
    assert x.abs().max() <= certificate.bound(4.0)


class Brighter(LowLightEncoder):
    r"""An encoder whose colour map leaves [0, 1]."""

    def color_map(self, maps):
        return 100 * super().color_map(maps)


def test_a_colour_map_that_may_leave_its_range_is_refused():
    encoder = Brighter(8, growth=4, blocks=1, stacked=(0,), levels=2)
    refused = flowguard.certify(LowLightFlow(levels=2, steps=1, hidden=8, encoder=encoder)).refused
    assert [s.name for s in refused] == ["conditioner.encoder"]
    assert "overrides color_map" in refused[0].reason
    model = small()
    model.encoder.fine_tune_color_map[1] = torch.nn.Softplus()
    assert "Softplus" in flowguard.certify(model).refused[0].reason
    model = small()
    model.encoder.fine_tune_color_map.register_forward_hook(lambda m, i, o: 9 * o)
    assert "forward hooks" in flowguard.certify(model).refused[0].reason


def test_an_attack_stays_below_the_certificate():
    model = small()
    _, low = images(8, 8)
    reached = flowguard.attack(model, low[:1], radius=0.5, noise=4.0, steps=5, restarts=2)
    assert 1.0 < reached.value <= flowguard.certify(model).bound(4.0)


def test_an_affine_model_is_not_certified_before_it_migrates():
    model = small("affine")
    assert not flowguard.certify(model).certified
    high, low = images(16, 16, batch=4)
    robust, report = flowguard.migrate(model, high, low)
    assert report.certificate_after.certified
    # It follows on the pairs; samples of an untrained flow may lie anywhere.
    made, expected = (m.encode(high, low)[0][0] for m in (robust, model))
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    far = torch.full((1, 3, 16, 16), 1e4)
    assert robust.sample(far).abs().max() <= flowguard.certify(robust).bound(4.0)


def test_autocast_keeps_the_likelihood():
    model = small()
    high, low = images(16, 16)
    exact = model.nll(high, low, dequantize=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.nll(high, low, dequantize=False)
        sample = model.sample(low)
    assert rough.dtype == sample.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.01)
    torch.testing.assert_close(sample, model.sample(low), rtol=0, atol=0.05)


@pytest.mark.slow
def test_encode_and_decode_compile_without_breaks():
    model = small()
    high, low = images(16, 16)
    condition = model.condition(low)
    encode = torch.compile(model.flow.forward, fullgraph=True, backend="aot_eager")
    decode = torch.compile(model.flow.inverse, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        latents, ladj = model.flow(high, condition.maps)
        compiled, compiled_ladj = encode(high, condition.maps)
        again, _ = decode(compiled, condition.maps)
    torch.testing.assert_close(compiled[0], latents[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(compiled_ladj, ladj, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(again, high, rtol=0, atol=1e-4)


def test_gradients_reach_every_parameter():
    model = small().train()
    model.target_ratio = 0.0
    model.nll(*images(8, 8)).mean().backward()
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None]
    assert without_gradient == []


def test_a_fresh_model_trains_from_the_first_step():
    torch.manual_seed(0)
    encoder = LowLightEncoder(8, growth=4, blocks=1, stacked=(), levels=2)
    model = LowLightFlow(levels=2, steps=1, hidden=8, encoder=encoder)
    high, low = images(16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.nll(high, low).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0


# -- the first guess -------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["robust", "affine"])
def test_the_flow_models_what_an_image_adds_to_the_first_guess(coupling):
    model = small(coupling, margin=None).double()
    plain = small(coupling, margin=None, residual=False).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    high, low = (x.double() for x in images(16, 12))
    guess = model.guess(model.prepare(low))
    assert float(guess.min()) >= 0
    assert float(guess.max()) <= 1
    assert float(guess.std()) > 1e-3
    latents, ladj = model.encode(high, low)
    rest, rest_ladj = plain.encode(high - guess, low)
    torch.testing.assert_close(latents[0], rest[0])
    torch.testing.assert_close(ladj, rest_ladj)
    torch.testing.assert_close(model.decode(latents, low), high, rtol=0, atol=1e-9)


def test_the_first_guess_keeps_its_digits_in_half_precision():
    model = small()
    with torch.no_grad():
        model.guess.last.weight.mul_(20)  # a picture of contrast
    _, low = images(16, 16)
    fed = model.prepare(low)
    exact = model.guess(fed).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.guess(fed).detach()
    assert rough.dtype == torch.float32
    assert float(exact.std()) > 0.1
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.01)
    assert len(rough.unique()) > 0.9 * rough.numel()  # not rounded to grey levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepared", [False, True])
def test_models_and_conditions_in_half_precision_go_with_autocast(dtype, prepared):
    model = small()
    _, low = images(9, 11)
    fed = model.prepare(low) if prepared else low
    exact = model.sample(fed)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.to(dtype).sample(fed.bfloat16())
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("margin", [None, 0.25])
def test_the_certificate_counts_the_first_guess(margin):
    model, plain = small(margin=margin), small(margin=margin, residual=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    bound, without = (flowguard.certify(m).bound(4.0) for m in (model, plain))
    assert bound == pytest.approx(without + 1 if margin is None else 1 + margin)
    assert "guess" in str(flowguard.certify(model))


class Louder(FirstGuess):
    r"""A guess that leaves [0, 1]."""

    def forward(self, fed):
        return 100 * super().forward(fed)


def test_a_first_guess_that_may_leave_its_range_is_refused():
    model = small()
    model.guess = Louder()
    (refused,) = flowguard.certify(model).refused
    assert refused.name == "guess"
    assert "overrides forward" in refused.reason
    model = small()
    model.guess.last.register_forward_hook(lambda m, i, o: 9 * o)  # the sigmoid comes after it
    assert flowguard.certify(model).certified
    model.guess.register_forward_hook(lambda m, i, o: 9 * o)
    assert "forward hooks" in flowguard.certify(model).refused[0].reason


def test_folders_and_pickles_that_say_nothing_of_a_first_guess_have_none(tmp_path):
    model = small(residual=False)
    _, low = images(9, 11)
    expected = model.sample(low)
    model.save_pretrained(tmp_path)
    assert "residual" not in json.loads((tmp_path / "config.json").read_text())["arguments"]
    loaded = LowLightFlow.from_pretrained(tmp_path)
    assert torch.equal(loaded.sample(low), expected)
    assert not any("residual" in name or "guess" in name for name in vars(loaded))  # as before
    assert torch.equal(pickle.loads(pickle.dumps(loaded)).sample(low), expected)


def test_a_first_guess_comes_back_with_its_model(tmp_path):
    model = small()
    _, low = images(9, 11)
    model.save_pretrained(tmp_path)
    loaded = LowLightFlow.from_pretrained(tmp_path)
    assert loaded.residual
    assert torch.equal(loaded.sample(low), model.sample(low))


def test_a_first_guess_that_is_dropped_counts_no_more_and_comes_back_untrained():
    model = small(margin=None)
    _, low = images(9, 11)
    condition = model.condition(low)
    bound = flowguard.certify(model).bound(4.0)
    model.residual = False
    with pytest.raises(ValueError, match="make it again"):
        model.sample(condition)
    assert model.sample(low).shape == (1, 2, 3, 9, 11)
    assert flowguard.certify(model).bound(4.0) == pytest.approx(bound - 1)
    model.residual = True
    assert flowguard.certify(model).bound(4.0) == bound
    model.residual = False
    model.double().residual = True
    assert model.sample(low.double()).dtype == torch.float64


def test_a_first_guess_of_no_width_is_refused():
    with pytest.raises(ValueError, match="hidden must be positive; got 0"):
        FirstGuess(0)


def test_copies_states_and_empty_batches():
    model = small()
    _, low = images(9, 11)
    expected = model.sample(low)
    assert torch.equal(copy.deepcopy(model).sample(low), expected)
    other = small(seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.sample(low), expected)
    assert model.sample(low[:0]).shape == (1, 0, 3, 9, 11)
    torch.testing.assert_close(model.sample(low.mT.contiguous().mT), expected)


def test_the_guard_tells_of_strange_conditions():
    model = small()
    torch.manual_seed(0)
    dark = 0.1 * torch.rand(64, 3, 16, 16)
    model.conditioner.alpha = 0.1
    model.conditioner.fit([dark[:32]], progress=False).calibrate([dark[32:]], progress=False)
    model.sample(torch.ones(1, 3, 16, 16))
    assert bool(model.conditioner.report.flagged[0])


def test_a_model_in_half_precision_takes_light_of_any_strength():
    model = small().half().eval()
    low = torch.rand(1, 3, 8, 8).half()
    low[..., 0, 0] = torch.inf
    assert model.sample(low).dtype == torch.float16
    assert bool(low_light_input(low).isfinite().all())


SUPERRES = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=4, features=4)
MISTAKES = {
    "levels": (
        lambda: LowLightFlow(levels=2, encoder=LowLightEncoder(8, 4, 1, ())),
        ValueError,
        "2 levels of the flow; got 3",
    ),
    "encoder": (
        lambda: LowLightFlow(encoder=torch.nn.Identity()),
        TypeError,
        "LowLightEncoder.*got Identity",
    ),
    "ratio": (lambda: small(target_ratio=2.0), ValueError, r"\[0, 1\]; got 2.0"),
    "quant": (lambda: small(quant=1), ValueError, "at least 2 grey levels; got quant=1"),
    "coupling": (lambda: small("cubic"), ValueError, "got 'cubic'"),
    "channels": (
        lambda: small().sample(torch.rand(1, 1, 8, 8)),
        ValueError,
        r"got \(1, 1, 8, 8\)",
    ),
    "no batch": (lambda: small().sample(torch.rand(3, 8, 8)), ValueError, r"got \(3, 8, 8\)"),
    "dtype": (lambda: small().sample(torch.rand(1, 3, 8, 8).double()), TypeError, "torch.float64"),
    "bytes": (
        lambda: small().sample(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
        TypeError,
        "torch.uint8",
    ),
    "a name": (lambda: small().sample("x"), TypeError, "low must be a tensor of dark images"),
    "no images": (lambda: small().sample(None), TypeError, "low must be a tensor of dark images"),
    "the condition of super-resolution": (
        lambda: small().sample(SUPERRES.condition(torch.rand(1, 3, 8, 8))),
        ValueError,
        "serves the LowLightFlow that made it; got one of another",
    ),
    "no bright images": (
        lambda: small().nll(None, torch.rand(1, 3, 8, 8)),
        TypeError,
        "high must be a tensor of bright images; got NoneType",
    ),
    "a grey level": (
        lambda: rescale_brightness(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0.5),
        TypeError,
        "floating-point numbers; got torch.uint8",
    ),
    "brightness of NaN": (
        lambda: rescale_brightness(torch.rand(2, 3, 8, 8), torch.tensor([0.5, math.nan])),
        ValueError,
        "brightness must be finite and not negative",
    ),
    "negative brightness": (
        lambda: small().sample(torch.rand(1, 3, 8, 8), brightness=-1.0),
        ValueError,
        "brightness must be finite and not negative",
    ),
    "half a sample": (
        lambda: small().sample(torch.rand(1, 3, 8, 8), 0.5),
        TypeError,
        "num_samples must be an integer",
    ),
    "heat": (
        lambda: small().sample(torch.rand(1, 3, 8, 8), 1, math.inf),
        ValueError,
        "finite and not negative",
    ),
    "latent of another size": (
        lambda: small().decode([torch.zeros(1, 12, 4, 4)], torch.rand(1, 3, 8, 8)),
        ValueError,
        r"shapes \[\(48, 4, 4\)\]",
    ),
    "sizes": (
        lambda: small().nll(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9)),
        ValueError,
        r"\(1, 3, 8, 9\)",
    ),
    "batches": (
        lambda: small().encode(torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8)),
        ValueError,
        r"got \(2, 3, 8, 8\)",
    ),
    "grey levels": (lambda: small().nll(*images(8, 8), levels=1), ValueError, "at least 2"),
    "bits": (
        lambda: small().nll(*images(8, 8), bits_per="image"),
        ValueError,
        "dim, pixel; got 'image'",
    ),
    "latents": (
        lambda: small().decode([], torch.rand(1, 3, 8, 8)),
        ValueError,
        "one latent; got 0",
    ),
    "samples": (lambda: small().sample(torch.rand(1, 3, 8, 8), 0), ValueError, "got 0"),
    "temperature": (
        lambda: small().sample(torch.rand(1, 3, 8, 8), 1, -1.0),
        ValueError,
        "got -1.0",
    ),
    "brightness": (
        lambda: small().sample(torch.rand(2, 3, 8, 8), brightness=torch.ones(3)),
        ValueError,
        r"\(2,\).*got \(3,\)",
    ),
    "brightness of images": (
        lambda: rescale_brightness(torch.rand(2, 3, 8, 8), torch.ones(3)),
        ValueError,
        r"got \(3,\)",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@torch.no_grad()
def test_a_brightness_that_is_asked_for_leaves_no_margin():
    model = small().eval()
    assert model.margin == 0.25
    low = 0.2 * torch.rand(2, 3, 8, 8)
    bright = model.sample(low, 2, 0.0, brightness=0.9)
    free = model.limit(None).sample(low, 2, 0.0, brightness=0.9)
    inside = (free >= -0.125) & (free <= 1.125)
    assert not inside.all()
    assert torch.equal(bright[inside], free[inside])
    assert bright.max() <= 1.25


@pytest.mark.parametrize(("margin", "told"), [(0.25, "the margin, not"), (None, "no bound holds")])
def test_the_certificate_tells_what_a_brightness_does(margin, told):
    *_, last = flowguard.certify(small(margin=margin).eval()).table()
    assert last.name == "brightness"
    assert told in last.depends
    assert last.bound_out == last.bound_in
