"""What is held out, and what is measured of it."""

import math

import numpy as np
import pytest
import torch

from flowguard import metrics
from flowguard.models import SuperResolutionFlow
from flowguard.training.pictures import CropBatches, pairs_of
from flowguard.training.validation import (
    Part,
    Wholes,
    luma,
    luma_psnr,
    luma_ssim,
    measure,
    restored,
    sound,
    split_off,
)

Image = pytest.importorskip("PIL.Image")


def folder_of(path, count):
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (32 + 4 * i % 12, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i:03}.png")
    return path


def test_each_twentieth_picture_is_held_out(tmp_path):
    pairs, _ = pairs_of(folder_of(tmp_path, 41), scale=4, crop=16)
    training, held_out = split_off(pairs)
    assert [held_out.file(i).stem for i in range(2)] == ["019", "039"]
    assert len(training.sizes) == 39
    names = {training.file(i) for i in range(39)}
    assert not names & {held_out.file(i) for i in range(2)}
    first, second = (
        held_out.whole(1, np.random.default_rng(0)),
        pairs.whole(39, np.random.default_rng(0)),
    )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_of_few_pictures_the_last_is_held_out_and_one_is_refused(tmp_path):
    pairs, _ = pairs_of(folder_of(tmp_path, 3), scale=4, crop=16)
    assert [part.file(0).stem for part in split_off(pairs)] == ["000", "002"]
    with pytest.raises(ValueError, match=r"one of which is held out; got 1 picture\(s\)"):
        split_off(Part(pairs, [0]))


def test_corrupt_pictures_are_not_validated_with(tmp_path):
    folder_of(tmp_path, 3)
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[: len(whole) // 2])
    pairs, _ = pairs_of(tmp_path, scale=4, crop=16)
    kept, faults = sound(pairs)
    assert [fault.path.stem for fault in faults] == ["001"]
    assert [kept.file(i).stem for i in range(len(kept.sizes))] == ["000", "002"]
    with pytest.raises(ValueError, match="got 1 that cannot"):
        sound(Part(pairs, [1]))


def test_a_part_has_the_corrupt_pictures_that_are_in_it(tmp_path):
    """One of two is enough to draw from, whatever is broken elsewhere."""
    folder_of(tmp_path, 3)
    for name in ("000", "002"):
        whole = (tmp_path / f"{name}.png").read_bytes()
        (tmp_path / f"{name}.png").write_bytes(whole[: len(whole) // 2])
    pairs, _ = pairs_of(tmp_path, scale=4, crop=16)
    training, held_out = split_off(pairs)
    with pytest.raises(ValueError, match="got 1 that cannot"):
        sound(held_out)
    with pytest.warns(UserWarning, match=r"left out: .*000\.png"):
        made = CropBatches(training, size=16, batch=20, seed=0)[0]
    assert made[0].shape == (20, 3, 16, 16)
    assert training.lost() == {0}
    assert training.usable()
    assert not held_out.usable()


def test_dark_shots_are_the_same_whenever_they_are_asked_for(tmp_path):
    pairs, _ = pairs_of(folder_of(tmp_path, 2), task="lowlight", crop=16)
    first, again = Wholes(pairs, 3), Wholes(pairs, 3)
    again[0]
    assert first[1][1].equal(again[1][1])
    assert not first[1][1].equal(Wholes(pairs, 4)[1][1])


def test_luminance_is_that_of_video():
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0]]).reshape(3, 3, 1, 1)
    wanted = torch.tensor([16, 235, 16 + 65.481]) / 255
    assert torch.allclose(luma(corners).flatten(), wanted, atol=1e-6)


def test_the_border_is_left_out_of_what_is_measured():
    image, target = torch.zeros(2, 1, 3, 12, 12)
    image[..., 0, :] = 1.0
    assert luma_psnr(image, target, 1) == math.inf
    assert luma_psnr(image, target, 0) < 20
    grey = torch.full_like(target, 51 / 255)
    wanted = -20 * math.log10(51 / 255 * 219 / 255)
    assert luma_psnr(grey, target, 4) == pytest.approx(wanted)


def test_a_picture_that_is_all_border_is_measured_in_its_middle():
    target = torch.zeros(1, 3, 5, 6)
    image = torch.ones_like(target)
    image[..., 2, 2:4] = 0
    assert luma_psnr(image, target, 8) == math.inf


def test_an_untrained_model_measures_as_bicubic():
    torch.manual_seed(0)
    model = SuperResolutionFlow(scale=4, levels=1, steps=1, hidden=8, features=8).eval()
    x, y = torch.rand(1, 3, 32, 24), torch.rand(1, 3, 8, 6)
    found = measure(model, x, y)
    quality = ("psnr_y", "psnr", "ssim", "lr_psnr")
    samples = {f"sample_{name}" for name in quality}
    assert found.keys() == {"bits_per_dim", "bicubic_psnr_y", *quality, *samples}
    assert found["psnr_y"] == pytest.approx(found["bicubic_psnr_y"], abs=0.1)
    assert found["bicubic_psnr_y"] == luma_psnr(restored(y, 4), x, 4)
    assert all(map(math.isfinite, found.values()))
    mean = model.sample(y, 1, 0.0)[0]
    assert found["psnr"] == float(metrics.psnr(mean, x))
    assert found["ssim"] == float(metrics.ssim(mean, x))
    assert found["lr_psnr"] == float(metrics.lr_psnr(mean, y, 4))
    # Samples at temperature 0.8 are rougher.
    assert found["sample_psnr"] < found["psnr"]
    assert found["sample_lr_psnr"] < found["lr_psnr"]


def test_the_ssim_of_the_luminance_sees_no_border_and_whole_numbers_alone():
    target = torch.rand(1, 3, 40, 36)
    image = (target + 0.1 * torch.randn_like(target)).clamp(0, 1)
    inner = [luma((255 * i.double()).round() / 255)[..., 4:-4, 4:-4] for i in (image, target)]
    wanted = metrics.ssim(*inner).item()
    assert luma_ssim(image, target, border=4) == pytest.approx(wanted, abs=1e-12)
    image[..., :4, :] = torch.nan
    image[..., -4:] = 7.0
    assert luma_ssim(image, target, border=4) == pytest.approx(wanted, abs=1e-12)


def test_of_a_small_picture_a_window_is_left_by_the_border():
    target = torch.rand(1, 3, 13, 40)
    assert luma_ssim(target, target, border=4) == 1
    image = target.clone()
    image[..., 0, :] = 1 - image[..., 0, :]  # a row of the border that there is room for
    assert luma_ssim(image, target, border=4) == 1
    with pytest.raises(ValueError, match="needs images of at least 11"):
        luma_ssim(target[..., :9, :], target[..., :9, :], border=4)
