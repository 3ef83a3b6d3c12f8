r"""The metrics: golden numbers, other libraries, cases worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flowguard import metrics

GOLDEN = Path(__file__).parent / "golden"


def image_of(array):
    return array.movedim(-1, 0)[None]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "metrics.safetensors")


@pytest.fixture(scope="module")
def resized():
    return load_file(GOLDEN / "imresize.safetensors")


@pytest.mark.parametrize("kind", ["uint8", "float64", "float32"])
def test_psnr_is_that_of_the_literature(golden, kind):
    a, b = image_of(golden["A"]), image_of(golden["B"])
    if kind != "uint8":
        a, b = (t.to(getattr(torch, kind)) / 255 for t in (a, b))
    found = metrics.psnr(b, a)
    assert found.shape == (1,)
    for name in ("psnr_skimage_uint8", "psnr_llflow_util", "psnr_utils_calculate_psnr"):
        assert abs(found.item() - golden[name].item()) < 1e-6


def test_psnr_of_the_published_brightness_matching(golden):
    found = metrics.psnr(image_of(golden["llflow_test_adjusted_uint8"]), image_of(golden["A"]))
    assert abs(found.item() - golden["llflow_test_psnr_adjusted"].item()) < 1e-6


def test_lr_psnr(golden):
    a, b = image_of(golden["A"]), image_of(golden["B"])
    found = metrics.lr_psnr(b / 255.0, metrics.imresize(a, 1 / 4), 4)
    assert abs(found.item() - golden["lrpsnr_x4_sr_B_gt_A"].item()) < 1e-6


SCALES = {"d2": 1 / 2, "d4": 1 / 4, "d8": 1 / 8, "u2": 2, "u4": 4}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["a", "b"])
def test_resizing_bytes_is_that_of_matlab(resized, name, scale):
    found = metrics.imresize(image_of(resized[f"{name}_uint8"]), SCALES[scale])
    wanted = image_of(resized[f"{name}.{scale}"])
    assert found.dtype == torch.uint8
    assert found.shape == wanted.shape
    difference = (found.int() - wanted.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3  # ties of rounding only


@pytest.mark.parametrize("scale", ["d2", "d4", "d8"])
def test_resizing_floats_is_that_of_matlab(resized, scale):
    found = metrics.imresize(image_of(resized["e_f64"]), SCALES[scale])
    torch.testing.assert_close(found, image_of(resized[f"e.{scale}"]), atol=1e-12, rtol=0)


def test_resizing_is_the_antialiased_bicubic_of_torch_over_symmetric_padding():
    x = torch.rand(2, 3, 32, 40, dtype=torch.float64)
    padded = torch.cat((x[..., :8].flip(-1), x, x[..., -8:].flip(-1)), -1)
    padded = torch.cat((padded[..., :8, :].flip(-2), padded, padded[..., -8:, :].flip(-2)), -2)
    wanted = torch.nn.functional.interpolate(
        padded, scale_factor=0.25, mode="bicubic", antialias=True
    )
    torch.testing.assert_close(
        metrics.imresize(x, 0.25), wanted[..., 2:-2, 2:-2], atol=1e-6, rtol=0
    )


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    scale=st.sampled_from([1 / 8, 1 / 4, 1 / 3, 1 / 2, 1, 2, 3]),
)
@settings(max_examples=50)
def test_resizing_keeps_constants_and_any_size(height, width, scale):
    x = torch.full((1, 2, height, width), 0.25, dtype=torch.float64)
    y = metrics.imresize(x, scale)
    assert y.shape[-2:] == (math.ceil(height * scale - 1e-9), math.ceil(width * scale - 1e-9))
    torch.testing.assert_close(y, torch.full_like(y, 0.25))


def test_resizing_keeps_dtype_layout_and_gradient():
    x = torch.rand(3, 8, 12, 2).movedim(-1, 0)  # not contiguous
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert metrics.imresize(x.to(dtype), 0.5).dtype == dtype
    x = x.clone().requires_grad_()
    metrics.imresize(x, 0.5).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("size", [(72, 100), (11, 11), (37, 53)])
def test_ssim_is_that_of_scikit_image(size):
    similarity = pytest.importorskip("skimage.metrics").structural_similarity
    rng = np.random.default_rng(0)
    a = rng.random((*size, 3))
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape), 0, 1)
    options = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 1.0,
    }
    first, second = (image_of(torch.from_numpy(t)) for t in (a, b))
    assert metrics.ssim(first, second).item() == pytest.approx(
        similarity(a, b, channel_axis=2, **options), abs=1e-6
    )
    weights = [0.299, 0.587, 0.114]
    assert metrics.ssim(first, second, grey=True).item() == pytest.approx(
        similarity(a @ weights, b @ weights, **options), abs=1e-6
    )


def test_ssim_of_bytes_is_that_of_their_floats(golden):
    a, b = image_of(golden["A"]), image_of(golden["B"])
    torch.testing.assert_close(metrics.ssim(a, b), metrics.ssim(a.double() / 255, b / 255.0))


def test_batches_are_measured_image_by_image():
    a, b = torch.rand(2, 4, 3, 16, 16)
    for measure in (metrics.psnr, metrics.ssim):
        together = measure(a, b)
        alone = torch.cat([measure(a[i : i + 1], b[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(together, alone)
        assert measure(a[:0], b[:0]).shape == (0,)


def test_what_is_shown_is_measured():
    target = torch.zeros(1, 3, 16, 16)
    image = torch.full_like(target, -5.0)
    image[0, 0, 0, 0] = torch.nan
    assert metrics.psnr(image, target).item() == math.inf
    image[0, 1, 0, 0] = torch.inf  # white
    assert metrics.psnr(image, target).item() == pytest.approx(10 * math.log10(3 * 256))


def test_gt_mean_undoes_a_change_of_brightness():
    target = 0.2 + 0.3 * torch.rand(2, 3, 16, 16, dtype=torch.float64)
    found = metrics.low_light(target * 0.5, target)
    assert (found["psnr"] < 20).all()
    assert (found["psnr_gt_mean"] > 100).all()
    assert (found["ssim_gt_mean"] > 0.9999).all()
    assert (found["ssim"] < 0.99).all()
    black = metrics.gt_mean(torch.zeros_like(target), target)
    assert (black == 0).all()


def test_one_exploded_value_does_not_darken_the_picture():
    target = torch.full((1, 3, 16, 16), 0.4)
    image = target.clone()
    image[0, 0, 0, 0] = 1e6
    assert metrics.low_light(image, target)["psnr_gt_mean"].item() > 30


def test_gt_mean_of_bytes_and_floats_is_the_same(golden):
    a, b = image_of(golden["A"]), image_of(golden["B"])
    bytes_, floats = metrics.low_light(b, a), metrics.low_light(b.double() / 255, a.double() / 255)
    for name in bytes_:
        torch.testing.assert_close(bytes_[name], floats[name])


def test_diversity_by_hand():
    target = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    left = torch.tensor([0.1, 0.3]).double().reshape(1, 1, 1, 2)
    right = torch.tensor([0.4, 0.1]).double().reshape(1, 1, 1, 2)
    # squared errors (1, 9) and (16, 1) hundredths: best mean 5, mean of the best 1
    found = metrics.diversity(torch.stack((left, right)), target)
    torch.testing.assert_close(found, torch.tensor([80.0], dtype=torch.float64))

    def absolute(image, truth):
        return (image - truth).abs().sum(1)

    # absolute errors (1, 3) and (4, 1): best mean 2, mean of the best 1
    found = metrics.diversity(torch.stack((left, right)), target, absolute)
    torch.testing.assert_close(found, torch.tensor([50.0], dtype=torch.float64))


def test_diversity_of_equal_samples_and_of_the_truth_is_zero():
    target = torch.rand(2, 3, 8, 8)
    same = torch.rand(1, 2, 3, 8, 8).expand(4, -1, -1, -1, -1)
    assert metrics.diversity(same, target).tolist() == [0, 0]
    assert metrics.diversity(target[None], target).tolist() == [0, 0]


def test_error_and_nan_rate_by_hand():
    x = torch.full((4, 3, 2, 2), 0.5)
    x[1, 0, 0, 0] = 1.5  # at the limit: no error
    x[2, 2, 0, 1] = -0.51
    x[3, 1, 1, 1] = torch.nan
    x[3, 0, 1, 0] = -torch.inf
    assert metrics.error_rate(x).item() == 2 / 4
    assert metrics.error_rate(x, per_pixel=True).item() == 3 / 16
    assert metrics.nan_rate(x).item() == 1 / 4
    assert metrics.nan_rate(x, per_pixel=True).item() == 2 / 16
    assert metrics.error_rate(x.unflatten(0, (2, 2))).item() == 2 / 4


def test_bits_per_dim_of_a_uniform_density_is_that_of_its_levels():
    # Uniform over [0, 1] after dequantisation: density 1, 8 bits (but for the half level of edge).
    found = metrics.bits_per_dim(torch.zeros(3), dims=12)
    torch.testing.assert_close(found, torch.full((3,), math.log2(255)))
    assert metrics.bits_per_dim(torch.tensor(12 * math.log(2)), 12, 2).item() == -1


def test_bits_per_dim_is_that_of_the_model():
    from flowguard.models import SuperResolutionFlow

    torch.manual_seed(0)
    model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=4, features=4).eval()
    model.conditioner.policy = "report"
    hr, lr = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4, 4)
    torch.manual_seed(1)
    wanted = model.nll(hr, lr)
    torch.manual_seed(1)
    noisy = hr + (torch.rand_like(hr) - 0.5) / 255
    log_prob = model.flow.log_prob(noisy - model.upsample(lr), model.conditioner(lr))
    torch.testing.assert_close(metrics.bits_per_dim(log_prob, 3 * 64), wanted)


@pytest.mark.parametrize("function", [metrics.lpips, metrics.lpips_map])
def test_lpips_says_what_it_needs(function):
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install torchvision"):
            function(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))
    else:
        pytest.skip("torchvision is installed, and its weights would be downloaded")


x = torch.rand(1, 3, 16, 16)
MISTAKES = {
    "sizes differ": (lambda: metrics.psnr(x, x[..., 1:]), ValueError, "same shape"),
    "no batch": (lambda: metrics.psnr(x[0], x[0]), ValueError, r"\(B, C, H, W\)"),
    "whole numbers": (lambda: metrics.psnr(x.int(), x.int()), TypeError, "uint8; got torch.int32"),
    "too small": (lambda: metrics.ssim(x[..., :9], x[..., :9]), ValueError, "at least 11×11"),
    "grey of two": (lambda: metrics.ssim(x[:, :2], x[:, :2], grey=True), ValueError, "1 or 3"),
    "scale zero": (lambda: metrics.imresize(x, 0), ValueError, "positive; got 0"),
    "LR of scale zero": (lambda: metrics.lr_psnr(x, x, 0), ValueError, "positive; got 0"),
    "resize ints": (lambda: metrics.imresize(x.long(), 2), TypeError, "int64"),
    "resize nothing": (lambda: metrics.imresize(x[..., :0], 2), ValueError, "shape"),
    "no samples": (lambda: metrics.diversity(x[None, :0], x), ValueError, "n positive"),
    "samples of one axis": (lambda: metrics.error_rate(x[0, 0]), ValueError, "samples must"),
    "no dims": (lambda: metrics.bits_per_dim(x, 0), ValueError, "dims=0"),
}


@pytest.mark.parametrize(("call", "error", "match"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, error, match):
    with pytest.raises(error, match=match):
        call()
