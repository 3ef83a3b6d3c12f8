r"""The super-resolution flow, its data and its training."""

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch

from flowguard import data, migrate
from flowguard.bounds import attack, certify
from flowguard.models import PyramidEncoder, SuperResolutionFlow
from flowguard.training.loop import train


def small(**kwargs):
    options = {"scale": 4, "levels": 2, "steps": 1, "hidden": 8, "features": 8, **kwargs}
    return SuperResolutionFlow(**options)


@pytest.mark.parametrize("size", [(37, 53), (64, 64), (101, 40), (4, 4), (1, 9)], ids=str)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_round_trip_at_any_size(size, levels):
    model = small(levels=levels)
    hr = torch.rand(2, 3, *size)
    lr = torch.rand(2, 3, *(math.ceil(n / 4) for n in size))
    assert torch.isfinite(model.nll(hr, lr)).all()  # initialises
    model.eval()
    with torch.no_grad():
        latents, _ = model.encode(hr, lr)
        back = model.decode(latents, lr)
    assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes(lr)
    assert back.shape[-2:] == (4 * lr.shape[-2], 4 * lr.shape[-1])
    assert (back[..., : size[0], : size[1]] - hr).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scales(scale):
    model = small(scale=scale, levels=2)
    lr = torch.rand(1, 3, 5, 7)
    assert model.sample(lr).shape == (1, 1, 3, 5 * scale, 7 * scale)


def test_samples_belong_to_their_images():
    model = small(steps=2)
    lr = torch.rand(3, 3, 6, 5)
    model.nll(torch.rand(3, 3, 24, 20), lr)
    model.eval()
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    together = model.sample(lr, 4, 0.7, torch.Generator().manual_seed(3))
    assert together.shape == (4, 3, 3, 24, 20)
    shapes = model.latent_shapes(lr)
    generator = torch.Generator().manual_seed(3)
    latents = [0.7 * torch.randn(12, *s, generator=generator) for s in shapes]
    with torch.no_grad():
        one = model.decode([z[3 * 2 + 1 : 3 * 2 + 2] for z in latents], lr[1:2])
    assert torch.allclose(together[2, 1], one[0], atol=1e-5)


ON_THREADS = """
import sys, torch
from flowguard.models import SuperResolutionFlow

torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
model = SuperResolutionFlow.published(scale=8, steps=2, blocks=1, stacked=(0,)).double().eval()
with torch.no_grad():
    for p in model.flow.parameters():
        p.add_(0.01 * torch.randn_like(p))
    condition = model.condition(torch.rand(1, 3, 4, 6, dtype=torch.float64))
    samples = model.sample(condition, 2, 0.9, torch.Generator().manual_seed(0))
assert model.flow.steps[-1][0].mix.weight.shape == (192, 192)
assert torch.get_num_threads() == int(sys.argv[1])
torch.save(samples, sys.argv[2])
"""


@pytest.mark.slow
def test_the_widest_published_model_does_not_depend_on_threads(tmp_path):
    # Batches of its matrices of 192 columns would never return with two threads, on some machines.
    found = []
    for threads in ("1", "2", "4"):
        file = tmp_path / threads
        command = [sys.executable, "-c", ON_THREADS, threads, str(file)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        assert done.returncode == 0, done.stderr
        found.append(torch.load(file))
    assert found[0].shape == (2, 1, 3, 32, 48)
    assert found[0].isfinite().all()
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-12, atol=1e-12)


def test_an_empty_batch_has_empty_samples():
    model = small()
    lr = torch.rand(0, 3, 4, 4)
    assert model.sample(lr, 5).shape == (5, 0, 3, 16, 16)
    assert model.nll(torch.rand(0, 3, 16, 16), lr).shape == (0,)


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    from PIL import Image

    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="8 bits per channel"):
        data.read_image(tmp_path / "deep.png")


def test_temperature_zero_has_no_randomness():
    model = small()
    lr = torch.rand(1, 3, 6, 6)
    assert torch.equal(model.sample(lr, 2, 0.0)[0], model.sample(lr, 2, 0.0)[1])


def test_nll_is_in_bits_per_dimension():
    """Of the untrained flow, which is a rotation of the residual, by hand."""
    model = small(levels=1, margin=None)
    model.eval()
    lr = torch.rand(2, 3, 4, 4)
    hr = model.upsample(lr) + 0.3
    bits = model.nll(hr, lr)
    # z is a rotation of 0.3 (and of noise of a grey level): log N(z; 0, 1) per dimension
    expected = (0.5 * 0.3**2 + 0.5 * math.log(2 * math.pi)) / math.log(2) + math.log2(255)
    assert torch.allclose(bits, torch.full((2,), expected), atol=0.01)


def test_dequantised_likelihood_of_a_discrete_image_is_a_bound():
    """exp(-nll) summed over all grey levels may not exceed one."""
    model = small(levels=1, features=4).eval()
    lr = torch.zeros(1, 3, 1, 1)
    # On one axis of the image space, the density of the untrained flow is a unit normal. The
    # total over the 256 grey levels of one value is then at most that of the axis.
    grey = torch.arange(256.0) / 255
    hr = torch.zeros(256, 3, 4, 4)
    hr[:, 0, 0, 0] = grey
    bits = model.nll(hr, lr.expand(256, -1, -1, -1)) * 48
    rest = 47 * (0.5 * math.log2(2 * math.pi) + math.log2(255))
    assert torch.exp2(-(bits - rest)).sum() <= 1


@pytest.mark.parametrize("coupling", ["affine", "robust"])
def test_training_on_a_real_crop_improves_the_likelihood(coupling):
    photo = data.photograph("coffee.png")[:, 100:228, 200:328]
    model = small(steps=2, hidden=16, features=16, coupling=coupling)
    crops = data.PairedCrops([photo], scale=4, size=16, batch=4, seed=0)
    result = train(model, crops, steps=200, progress=False)
    assert result.skipped == 0
    assert not model.training
    first, last = sum(result.losses[:20]) / 20, sum(result.losses[-20:]) / 20
    assert last < first - 1.0  # about 6 to 4 bits per dimension


def test_training_repeats_with_its_seed():
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        crops = data.PairedCrops([torch.rand(3, 32, 32)], scale=4, size=16, batch=2, seed=1)
        torch.manual_seed(6)
        losses.append(train(small(), crops, steps=3, progress=False).losses)
    crops_again = [t for _, t in zip(range(3), crops, strict=False)]
    assert losses[0] == losses[1]
    for (a, _), (b, _) in zip(crops_again, crops, strict=False):
        assert torch.equal(a, b)


def test_a_step_that_is_not_finite_changes_nothing():
    model = small()
    good = (torch.rand(2, 3, 16, 16), torch.rand(2, 3, 4, 4))
    bad = (torch.full((2, 3, 16, 16), torch.nan), torch.rand(2, 3, 4, 4))
    train(model, [good], steps=1, progress=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert train(model, [bad], steps=1, progress=False).skipped == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_conditioner_tells_strange_conditions():
    model = small().eval()
    lr = torch.rand(64, 3, 8, 8)
    model.conditioner.alpha = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.conditioner.fit(lr[:32], progress=False).calibrate(lr[32:], progress=False)
    model.sample(torch.cat((lr[:1], 20 * lr[:1])))
    report = model.conditioner.report
    assert report.flagged.tolist() == [False, True]
    assert report.levels["level1"].map.shape == (2, 16, 16)
    assert report.levels["level2"].map.shape == (2, 8, 8)


def test_state_dict_with_the_guard_reloads():
    model = small().eval()
    lr = torch.rand(64, 3, 8, 8)
    model.conditioner.alpha = 0.1
    model.conditioner.fit(lr, progress=False).calibrate(lr, progress=False)
    fresh = small().eval()
    fresh.conditioner.alpha = 0.1
    fresh.load_state_dict(model.state_dict())
    a, b = (m.conditioner.score(lr).p_value for m in (model, fresh))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("scale", "levels"), [(1, 2), (2, 3), (4, 1), (4, 3), (8, 2), (16, 4)])
def test_encoder_gives_one_map_for_each_level(scale, levels):
    encoder = PyramidEncoder(6, scale=scale, levels=levels)
    h, w = 16, 32
    maps = encoder(torch.rand(1, 3, h, w))
    expected = [(1, 6, scale * h >> k, scale * w >> k) for k in range(1, levels + 1)]
    assert [tuple(m.shape) for m in maps] == expected


MODEL = small()
LR = torch.rand(1, 3, 4, 4)
ERRORS = {
    "scale": (lambda: small(scale=3), ValueError, "power of two"),
    "lr channels": (lambda: MODEL.sample(LR[:, :1]), ValueError, r"\(B, 3, H, W\); got"),
    "lr without batch": (lambda: MODEL.sample(LR[0]), ValueError, r"\(B, 3, H, W\); got"),
    "empty image": (lambda: MODEL.sample(LR[..., :0]), ValueError, "got"),
    "hr size": (lambda: MODEL.nll(torch.rand(1, 3, 12, 16), LR), ValueError, r"\(1, 3, 16, 16\)"),
    "hr batch": (lambda: MODEL.nll(torch.rand(2, 3, 16, 16), LR), ValueError, "hr must"),
    "hr dimensions": (lambda: MODEL.nll(torch.rand(16), LR), ValueError, "hr must"),
    "bytes": (lambda: MODEL.sample((255 * LR).byte()), TypeError, "lr must have the dtype"),
    "float64": (lambda: MODEL.nll(torch.rand(1, 3, 16, 16).double(), LR), TypeError, "hr must"),
    "grey levels": (lambda: MODEL.nll(torch.rand(1, 3, 16, 16), LR, 1), ValueError, "grey levels"),
    "no images": (
        lambda: data.PairedCrops([], scale=4, size=32, batch=1, seed=0),
        ValueError,
        "at least one image",
    ),
    "too few batches": (
        lambda: train(small(), [], steps=3, progress=False),
        ValueError,
        "a batch for each of the 3 steps; got 0",
    ),
    "samples": (lambda: MODEL.sample(LR, 0), ValueError, "num_samples must be positive"),
    "temperature": (lambda: MODEL.sample(LR, 1, -1.0), ValueError, "temperature"),
    "samples of a half": (lambda: MODEL.sample(LR, 2.0), TypeError, "num_samples must be an int"),
    "samples by name": (lambda: MODEL.sample(LR, "3"), TypeError, "num_samples must be an int"),
    "warm": (lambda: MODEL.sample(LR, 1, math.inf), ValueError, "finite and not negative"),
    "hot": (lambda: MODEL.sample(LR, 1, "hot"), TypeError, "temperature must be a number"),
    "no hr": (lambda: MODEL.nll(None, LR), TypeError, "hr must be a tensor of HR images"),
    "no memory": (
        lambda: MODEL.sample(LR, tile="auto", memory=-1),
        ValueError,
        "positive and finite number of bytes; got -1",
    ),
    "all memory": (
        lambda: MODEL.sample(LR, tile="auto", memory=math.inf),
        ValueError,
        "positive and finite number of bytes; got inf",
    ),
    "some memory": (
        lambda: MODEL.sample(LR, tile="auto", memory="1 GB"),
        TypeError,
        "memory must be a number of bytes",
    ),
    "latents of another number": (
        lambda: MODEL.decode([torch.randn(4, 6, 8, 8), torch.randn(2, 24, 4, 4)], LR),
        ValueError,
        r"latents must have the shapes \[\(6, 8, 8\), \(24, 4, 4\)\]",
    ),
    "latents of other channels": (
        lambda: MODEL.decode([torch.randn(1, 5, 8, 8), torch.randn(1, 24, 4, 4)], LR, tile=8),
        ValueError,
        r"latents must have the shapes \[\(6, 8, 8\), \(24, 4, 4\)\]",
    ),
    "latents in float64": (
        lambda: MODEL.decode([torch.randn(1, *s).double() for s in MODEL.latent_shapes(LR)], LR),
        TypeError,
        "the latents must have the dtype torch.float32 of the model",
    ),
    "latents in one": (
        lambda: MODEL.decode(torch.randn(2, 24, 4, 4), LR),
        TypeError,
        "the latents must be a list of tensors; got Tensor",
    ),
    "latents by name": (lambda: MODEL.decode(["a", "b"], LR), TypeError, "list of tensors; got"),
    "another coupling": (
        lambda: small(coupling="affine").sample(MODEL.condition(LR)),
        ValueError,
        "that made it; got one of another",
    ),
    "no hidden channels": (lambda: small(hidden=0), ValueError, "must be positive; got 0 and 8"),
    "no features": (lambda: small(features=0), ValueError, "features must be positive; got 0"),
    "nan temperature": (lambda: MODEL.sample(LR, 1, math.nan), ValueError, "temperature"),
    "crop size": (
        lambda: data.PairedCrops([torch.rand(3, 64, 64)], scale=4, size=30, batch=1, seed=0),
        ValueError,
        "multiple of the scale",
    ),
    "small image": (
        lambda: data.PairedCrops([torch.rand(3, 20, 64)], scale=4, size=32, batch=1, seed=0),
        ValueError,
        "at least 32",
    ),
    "no such photograph": (
        lambda: data.photograph("x.png"),
        FileNotFoundError,
        "ships no 'x.png'",
    ),
    "downsample": (lambda: data.downsample(torch.rand(1, 3, 6, 8), 4), ValueError, "multiples"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_mistakes_are_told(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_base_of_the_residual_stays_within_the_image():
    model = small(margin=None)
    lr = torch.rand(3, 3, 8, 8).round()
    lr[1] = 5 * lr[1] - 2
    lr[2, 0, 0, 0] = torch.nan
    free = torch.nn.functional.interpolate(lr, scale_factor=float(model.scale), mode="bicubic")
    assert free[0].min() < -0.1  # it overshoots
    base = model.upsample(lr)
    assert base[0].min() == 0
    assert base[0].max() == 1
    assert base[1].min() == -2
    assert base[1].max() == 3
    assert torch.equal(base.isnan(), free.isnan())
    smooth = 0.5 + 0.1 * torch.rand(1, 3, 8, 8)
    inside = torch.nn.functional.interpolate(smooth, scale_factor=4.0, mode="bicubic")
    assert model.scale == 4
    assert torch.equal(model.upsample(smooth), inside)
    published = SuperResolutionFlow.published(steps=1, blocks=1, stacked=(0,), hidden=4)
    assert torch.equal(published.upsample(lr[:1]), free[:1])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, hr, lr: m.nll(hr), r"nll\(\): missing a required argument: 'lr'"),
        (lambda m, hr, lr: m.nll(hr, lr, step=1), r"nll\(\): got an unexpected .* 'step'"),
        (lambda m, hr, lr: m.nll(hr, lr, hr=hr), r"nll\(\): multiple values .* 'hr'"),
        (lambda m, hr, lr: m.nll(hr.double(), lr), "hr must have the dtype"),
    ],
    ids=["missing", "unknown", "twice", "not about arguments"],
)
def test_arguments_are_called_as_the_model_calls_them(call, match):
    model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
    with pytest.raises(TypeError, match=match):
        call(model, torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4))


def test_with_a_margin_the_base_is_that_of_the_condition_as_a_picture():
    model = small()
    assert model.margin == 0.25
    lr = torch.rand(4, 3, 8, 8).round()
    lr[1] = 20 * lr[1] - 2
    lr[2, 0, 0, 0] = torch.inf
    lr[3, 0, 0, 0] = torch.nan
    base = model.upsample(lr)
    assert torch.equal(base[:3], model.upsample(lr[:3].clamp(0, 1)))
    assert base[:3].min() == 0
    assert base[:3].max() == 1
    assert base[3].isnan().any()  # never hidden
    inside = torch.rand(1, 3, 8, 8)
    assert torch.equal(model.upsample(inside), small(margin=None).upsample(inside))


@pytest.mark.parametrize("margin", [None, 0.25])
@pytest.mark.parametrize("residual", [True, False])
def test_the_certificate_tells_of_the_upsampled_condition_if_it_is_added(residual, margin):
    assert ("upsample" in str(certify(small(residual=residual, margin=margin)))) == residual


@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_no_residual_exceeds_the_certificate_of_a_margin(residual):
    torch.manual_seed(0)
    model = small(residual=residual, steps=2).eval()
    for p in model.flow.parameters():
        p.add_(0.2 * torch.randn_like(p))
    bound = certify(model).bound(4.0)
    assert 1.25 <= bound <= 2
    y = torch.rand(2, 3, 6, 6)
    z = [4 * torch.randn(2, *s).sign() for s in model.latent_shapes(y)]
    for condition in (y, 20 * y, -5 * y, y + torch.randn_like(y), 1e30 * (y - 0.5)):
        x = model.decode(z, condition)
        assert (x - model.upsample(condition) if residual else x).abs().max() <= bound
        assert x.min() >= -0.25
        assert x.max() <= 1.25


def test_published_models_are_unchanged_until_they_are_limited():
    model = SuperResolutionFlow.published(steps=1, blocks=1, stacked=(0,), hidden=4)
    assert model.margin is None
    lr = torch.rand(1, 3, 4, 4).round()
    assert model.upsample(lr).min() < 0  # it overshoots
    assert model.limit().margin == 0.25
    assert model.upsample(lr).min() == 0
    assert SuperResolutionFlow.published(steps=1, blocks=1, stacked=(0,), margin=0.5).margin == 0.5


def test_a_model_that_migrates_keeps_its_margin():
    torch.manual_seed(0)
    model = small(coupling="affine")
    hr, lr = torch.rand(8, 3, 16, 16), torch.rand(8, 3, 4, 4)
    model.nll(hr, lr)
    robust, _ = migrate(model.eval(), hr, lr)
    assert robust.margin == 0.25
    assert 1.25 <= certify(robust).bound(4.0) < 1.26
    assert not certify(model).certified  # infinity and NaN are still within reach


def test_an_attack_stays_within_the_margin():
    torch.manual_seed(0)
    model = small().eval()
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
    found = attack(model, torch.rand(1, 3, 4, 4), steps=3, restarts=2)
    assert 1 < found.value <= 1.25


@pytest.mark.parametrize("margin", [0.25, 0.1, 0.01])
@torch.no_grad()
def test_the_noise_of_training_leaves_no_margin(margin):
    """White pictures with noise have a likelihood, whatever the noise is."""
    torch.manual_seed(0)
    model = small(noise_std=0.3, margin=margin).train()
    hr, lr = torch.ones(8, 3, 32, 32), torch.ones(8, 3, 8, 8)
    assert model.nll(hr, lr).isfinite().all()
    noisy, _ = model.perturbed(hr, lr)
    assert noisy.max() <= 1 + margin
    torch.manual_seed(1)
    free, _ = model.limit(None).perturbed(hr, lr)
    torch.manual_seed(1)
    noisy, _ = model.limit(margin).perturbed(hr, lr)
    inside = (free >= -margin / 2) & (free <= 1 + margin / 2)
    assert not inside.all()
    assert torch.equal(noisy[inside], free[inside])
