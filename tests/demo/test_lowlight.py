r"""The low-light half of the demo: its camera, its conditions, and a run of it."""

import json
import math

import pytest
import torch

from flowguard import data
from flowguard.cli import main as cli
from flowguard.demo.lowlight import HELD_OUT, LowLightTask
from flowguard.models import load


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_light_and_srgb_are_each_others_inverse():
    grey = torch.linspace(0, 1, 1001, dtype=torch.float64)
    light = data.linearize(grey)
    torch.testing.assert_close(data.delinearize(light), grey, rtol=0, atol=1e-7)
    assert bool((light.diff() > 0).all())
    # Half of the grey levels stand for about a fifth of the light.
    assert abs(float(data.linearize(torch.tensor(0.5))) - 0.2140) < 1e-4


@pytest.mark.parametrize("exposure", [0.05, 0.5])
def test_the_camera_counts_photons(generator, exposure):
    """Far from black, white and quantisation: the light's mean and variance are the sensor's."""
    bright = torch.full((1, 200, 200), 0.6, dtype=torch.float64)
    made = data.expose(bright, exposure, generator, full_well=1000.0, read_noise=2.0)
    light = 1000 * data.linearize(made)
    electrons = 1000 * exposure * float(data.linearize(bright[0, 0, 0]))
    assert abs(float(light.mean()) / electrons - 1) < 0.01
    assert abs(float(light.var()) / (electrons + 4) - 1) < 0.05


def test_the_camera_stores_bytes_and_cuts_what_is_too_bright(generator):
    image = torch.rand(3, 40, 50)
    dark, over = data.expose(image, 0.1, generator), data.expose(image, 50.0, generator)
    for made in (dark, over):
        levels = 255 * made
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        assert made.min() >= 0
        assert made.max() <= 1
    assert float(dark.mean()) < 0.4 * float(image.mean())
    bright = 50 * data.linearize(image) > 1.3  # nine standard deviations beyond the range
    assert bool(bright.any())
    assert bool((over[bright] == 1).all())
    again = data.expose(image, 0.1, generator.manual_seed(0))
    assert torch.equal(again, dark)


def test_the_exact_gain_undoes_the_exposure(generator):
    image = torch.rand(1, 3, 30, 30)
    dark = data.expose(image, HELD_OUT, generator, full_well=1e9, read_noise=0.0)
    restored = LowLightTask().restored(dark)
    assert float((restored - image).abs().mean()) < 0.02  # quantisation is what remains


def test_crops_are_aligned_with_prepared_images():
    task = LowLightTask()
    torch.manual_seed(0)
    parts = [torch.rand(3, 48, 56)]
    target, prepared = next(iter(task.crops(parts, 0)))
    assert target.shape == (16, 3, 32, 32)
    assert prepared.shape == (16, 6, 32, 32)
    # What is bright in a target is bright in its condition.
    light = data.linearize(target).mean(dim=1).flatten(1)
    dark = (prepared[:, :3].exp() - 1e-3).mean(dim=1).flatten(1)
    for a, b in zip(light, dark, strict=True):
        assert float(torch.corrcoef(torch.stack((a, b)))[0, 1]) > 0.4


def test_mistakes_of_pairs():
    a, b = torch.rand(3, 40, 40), torch.rand(6, 40, 41)
    with pytest.raises(ValueError, match=r"got \(40, 40\) and \(40, 41\)"):
        data.AlignedCrops([(a, b)], size=8, batch=1, seed=0)


def test_conditions_are_within_and_beyond_the_training_world():
    task = LowLightTask()
    _, held_out = task.held_out(0)
    asked = list(task.conditions(held_out, 0, quick=False))
    names = [c.name for c in asked]
    assert len(set(names)) == len(names)
    for word in ("dark", "lit", "exposure 1/1000", "lamp", "cast", "JPEG", "gain"):
        assert any(word in name for name in names), word
    assert all(torch.isfinite(c.image).all() for c in asked)
    by_name = {c.name: c.image for c in asked}
    assert by_name["exposure 1/1000"].mean() < 0.2 * held_out.mean()
    lamp = by_name[task.headline]
    assert 0.01 < float((lamp == 1).float().mean()) < 0.5
    warm = by_name["warm cast 5"].mean(dim=(0, 2, 3))
    assert warm[0] > 2 * warm[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dark")
    arguments = ["demo", "--task", "lowlight", "--quick", "--steps", "10", "--threads", "1"]
    assert cli.main([*arguments, "--out", str(folder)]) == 0
    return folder


def test_a_quick_run_writes_what_it_says(run):
    numbers = json.loads((run / "metrics.json").read_text())
    assert numbers["options"]["task"] == "lowlight"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "low-light enhancement" in page
    assert "with GT mean" in page
    assert len(list(run.glob("panel-*.png"))) == len(numbers["conditions"])
    for name in ("affine", "robust"):
        measured = numbers["models"][name]
        assert 0 < measured["bits_per_dim"] < 8
        # The gain that fits the brightness can be a better picture, and must be told apart.
        assert measured["psnr_temperature_0"] > 10
        assert measured["psnr_gt_mean_temperature_0"] > 10
    assert numbers["exact_gain_psnr"] > 15
    for condition in numbers["conditions"]:
        robust = condition["models"]["robust"]
        assert robust["non_finite"] == 0, condition["name"]
        assert math.isfinite(robust["max_abs"])
    assert math.isfinite(float(numbers["models"]["robust"]["certified_residual"]))
    assert numbers["models"]["affine"]["certified_residual"] == "inf"


@pytest.mark.parametrize("name", ["affine", "robust"])
def test_the_models_load_with_their_guards(run, name):
    model = load(run / name)
    assert model.conditioner.calibrated
    assert torch.isfinite(model.sample(torch.rand(1, 3, 9, 10))).all()
