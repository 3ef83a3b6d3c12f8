r"""The precision of the networks of image models, and what it leaves alone."""

import pytest
import torch
import torch.nn as nn

from flowguard.bounds import certify
from flowguard.image import ActNorm, ZeroConv2d
from flowguard.models import LowLightEncoder, LowLightFlow, SuperResolutionFlow
from flowguard.models.encoders.rrdb import DenseBlock
from flowguard.models.precision import PRECISIONS, fastest, networks, wanted


def moved(model):
    r"""A model that does not start as the identity."""
    for layer in model.modules():
        if isinstance(layer, ZeroConv2d):
            nn.init.normal_(layer.weight, std=0.03)
        if isinstance(layer, ActNorm):
            nn.init.normal_(layer.logs, std=0.1)
            layer.initialized.fill_(True)
    return model.eval()


def published():
    return SuperResolutionFlow.published(
        steps=2, blocks=2, stacked=(0, 1), hidden=16, residual=True, noise_std=0.03
    )


def superres():
    return SuperResolutionFlow(scale=2, levels=2, steps=2, hidden=8, features=8)


def low_light():
    encoder = LowLightEncoder(8, growth=4, blocks=2, stacked=(0,), levels=2)
    return LowLightFlow(levels=2, steps=2, hidden=8, encoder=encoder)


MODELS = {"superres": superres, "published": published, "low light": low_light}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    torch.manual_seed(0)
    return moved(request.param())


def pair(model, rows=2):
    y = torch.rand(rows, 3, 16, 12)
    return y, [torch.randn(rows, *shape) for shape in model.latent_shapes(y)]


def psnr(a, b):
    return float(-10 * (a - b).detach().square().mean().log10())


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, 16])
def test_images_in_bf16_are_those_of_float32_but_for_rounding(model, tile):
    y, z = pair(model)
    expected = model.decode(z, y, tile=tile)
    found = model.decode(z, y, tile=tile, precision="bf16")
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)  # it did compute otherwise
    assert psnr(found, expected) > 45


def test_the_flow_in_bf16_is_undone_but_for_rounding(model):
    # On the way back a network's input may be rounded to the next number of half precision.
    y, z = pair(model)
    condition = model.condition(y, precision="bf16")
    again, _ = model.encode(model.decode(z, condition), condition)
    # The image is cut to the size of the condition, which loses nothing of one of this size.
    for a, b in zip(again, z, strict=True):
        assert (a - b).abs().median() < 1e-3


def test_networks_are_half_and_their_ends_are_not(model):
    y, _ = pair(model)
    with torch.no_grad():
        condition = model.condition(y, precision="bf16")
    for step in (s for level in condition.maps.steps for s in level):
        assert step.hidden.dtype == torch.bfloat16
        assert {layer.weight.dtype for layer in (*step.rest, *step.told)} == {torch.bfloat16}
        assert step.injected.dtype == step.mix.there.dtype == torch.float32
    x = torch.rand(2, 3, *(model.scale * n for n in y.shape[-2:]))
    latents, ladj = model.encode(x, y, precision="bf16")
    assert {t.dtype for t in (*latents, ladj)} == {torch.float32}


def test_a_spline_is_prepared_in_bf16_too():
    model = moved(superres())
    with torch.no_grad():
        condition = model.condition(torch.rand(1, 3, 8, 8), precision="bf16")
    assert {type(s.map).__name__ for level in condition.maps.steps for s in level} == {"Ahead"}


def test_float32_switches_autocast_off(model):
    y, z = pair(model)
    expected = model.decode(z, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model.decode(z, y), expected)
        torch.testing.assert_close(model.decode(z, y, precision="float32"), expected)


def test_none_is_what_autocast_says(model):
    y, z = pair(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.decode(z, y)
    torch.testing.assert_close(found, model.decode(z, y, precision="bf16"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_samples_of_a_condition_are_those_of_its_image(model, rows):
    y, _ = pair(model, rows)
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    with torch.no_grad():  # as within `sample`: weights are folded, which rounds them otherwise
        condition = model.condition(y, precision="bf16")
    a = model.sample(condition, 4, 0.7, draws[0])
    b = model.sample(y, 4, 0.7, draws[1], precision="bf16")
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_several_samples_of_several_conditions_keep_their_rows(model):
    y, _ = pair(model, 2)
    z = [torch.randn(6, *shape) for shape in model.latent_shapes(y)]
    with torch.no_grad():
        together = model.decode(z, y)
        for i in range(6):
            alone = model.decode([t[i : i + 1] for t in z], y[i % 2 : i % 2 + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)


def test_gradients_pass_in_bf16(model):
    y, z = pair(model)
    y.requires_grad_()
    model.decode(z, y, precision="bf16").square().mean().backward()
    assert bool(y.grad.isfinite().all())
    assert bool(y.grad.any())


def test_an_empty_batch_in_bf16(model):
    y = torch.rand(0, 3, 16, 12)
    assert model.sample(y, 2, precision="bf16").shape[:2] == (2, 0)


def test_what_blocks_add_to_stays_in_single_precision():
    torch.manual_seed(0)
    block, x = DenseBlock(8, 4), torch.randn(1, 8, 6, 6)
    nn.init.zeros_(block.conv5.weight)
    nn.init.zeros_(block.conv5.bias)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_the_certificate_holds_in_bf16():
    torch.manual_seed(0)
    model = moved(superres())
    bound = certify(model.flow).bound(4.0)
    far = 1e6 * torch.randn(2, 3, 16, 12)
    z = [torch.randn(2, *shape).clamp(-4, 4) for shape in model.latent_shapes(far)]
    with torch.no_grad():
        condition = model.condition(far, precision="bf16")
        image, _ = model.flow.inverse(z, condition.maps)
    assert image.abs().max() <= bound


# -- the guard -------------------------------------------------------------------------------------


def test_scores_in_bf16_are_those_of_float32_to_a_hundredth(model):
    y = torch.rand(32, 3, 16, 12)
    guard = model.conditioner
    guard.policy = "report"
    guard.fit(y, progress=False)
    with pytest.warns(UserWarning, match="too few"):
        guard.calibrate(torch.rand(32, 3, 16, 12), progress=False)
    seen = torch.rand(4, 3, 16, 12)
    with torch.no_grad():
        model.condition(seen)
        expected = guard.report
        model.condition(seen, precision="bf16")
    for name, level in expected.levels.items():
        found = guard.report.levels[name].map
        assert found.dtype == torch.float32
        assert ((found - level.map).abs() / level.map).median() < 0.02
        flagged = (found > level.boundary) ^ (level.map > level.boundary)
        assert flagged.float().mean() <= 0.001 + 1 / flagged.numel()


# -- which one it takes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("slow", "expected"), [("float32", "bf16"), ("bf16", "float32")])
def test_auto_takes_the_quicker(slow, expected, monkeypatch):
    model = moved(superres())
    state = {"time": 0.0}

    def sample(y, *, precision, **options):
        state["time"] += 2.0 if precision == slow else 1.0
        return y

    monkeypatch.setattr(model, "sample", sample)
    trial = fastest(model, clock=lambda: state["time"])
    assert trial.precision == expected
    assert trial.seconds == {slow: 2.0, expected: 1.0}
    assert str(trial).startswith(f"{expected}, the quickest on a tile here (float32 ")
    assert wanted(model, "auto") == PRECISIONS[expected]


def test_auto_tries_once_for_each_model(monkeypatch):
    model, other = moved(superres()), moved(superres())
    calls = []
    sample = SuperResolutionFlow.sample
    for m in (model, other):
        monkeypatch.setattr(
            m, "sample", lambda *a, m=m, **k: calls.append(m) or sample(m, *a, **k)
        )
    first, second = fastest(model), fastest(model)
    assert first is second
    assert set(map(id, calls)) == {id(model)}
    fastest(other)
    assert {id(m) for m in calls} == {id(model), id(other)}


def test_the_trial_draws_no_random_number_and_tells_nothing(model):
    model.conditioner.policy = "raise"  # which refuses all calls before it is calibrated
    model.train()
    state = torch.get_rng_state()
    fastest(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_is_one_of_both(model):
    y, z = pair(model)
    found = model.decode(z, y, precision="auto")
    assert any(
        torch.allclose(found, model.decode(z, y, precision=p), atol=1e-5)
        for p in ("bf16", "float32")
    )
    condition = model.condition(y, precision="bf16")
    torch.testing.assert_close(  # a condition has chosen
        model.decode(z, condition, precision="auto"), model.decode(z, condition)
    )


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["half", "fp16", "bfloat16", torch.bfloat16, 16, True, ""])
def test_another_precision_is_refused(given):
    model = superres().eval()
    message = "precision must be one of auto, bf16, float16, float32, or None"
    for call in (model.sample, model.condition):
        with pytest.raises(ValueError, match=message):
            call(torch.rand(1, 3, 8, 8), precision=given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_dtype_is_refused(dtype):
    model = superres().eval().to(dtype)
    with pytest.raises(TypeError, match=r"precision is for models in torch\.float32; got 'bf16'"):
        model.sample(torch.rand(1, 3, 8, 8, dtype=dtype), precision="bf16")


def test_a_condition_is_used_as_it_was_made():
    model = moved(superres())
    y, z = pair(model)
    half, single = model.condition(y, precision="bf16"), model.condition(y)
    message = "a condition is used in the precision that it was made in, {}; got precision={!r}"
    with pytest.raises(ValueError, match=message.format("bf16", "float32")):
        model.decode(z, half, precision="float32")
    with pytest.raises(ValueError, match=message.format("float32", "bf16")):
        model.sample(single, precision="bf16")
    assert torch.equal(model.decode(z, single, precision="float32"), model.decode(z, single))


def test_no_tensor_is_refused_in_the_model_s_words():
    model = superres().eval()
    with pytest.raises(TypeError, match="lr must be a tensor of LR images"):
        model.sample("picture.png", precision="bf16")


def test_networks_leaves_alone_what_is_set():
    x = torch.zeros(1)
    with networks(torch.bfloat16, x):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        with networks(None, x):
            assert torch.is_autocast_enabled("cpu")
        with networks(torch.float32, x):
            assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


# -- autocast around a call ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "auto", "float32"])
def test_a_condition_of_float32_stays_in_float32_under_autocast(model, precision):
    y, z = pair(model)
    with torch.no_grad():
        condition = model.condition(y)
        expected = model.decode(z, condition)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.decode(z, condition, precision=precision)
    assert torch.equal(found, expected)


def test_the_likelihood_is_computed_in_the_precision_of_its_condition(model):
    y, _ = pair(model)
    x = torch.rand(2, 3, *(model.scale * n for n in y.shape[-2:]))
    with torch.no_grad():
        condition = model.condition(y, precision="bf16")
    found = model.nll(x, condition, dequantize=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.nll(x, condition, dequantize=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("precision", ["bf16", "float16", "float32"])
def test_conditions_of_another_dtype_are_refused_in_any_precision(dtype, precision):
    model = superres().eval()
    message = f"lr must have the dtype torch.float32 of the model; got {dtype}"
    with pytest.raises(TypeError, match=message):
        model.sample(torch.rand(1, 3, 8, 8, dtype=dtype), precision=precision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_autocast_takes_no_images_of_a_third_dtype(dtype):
    model = superres().eval()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            TypeError, match=r"the dtype torch\.float32 of the model, or the torch\.b"
        ):
            model.sample(torch.rand(1, 3, 8, 8, dtype=dtype))
        assert model.sample(torch.rand(1, 3, 8, 8).bfloat16()).isfinite().all()
