"""The benchmark of low light, from the command line to its tables."""

import doctest
import json

import numpy as np
import pytest
import torch

for needed in ("matplotlib", "scipy", "skimage", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)
Image = pytest.importorskip("PIL.Image")

import lowlight  # noqa: E402
from imaging.measure import Options  # noqa: E402

from flowguard.models import LowLightEncoder, LowLightFlow  # noqa: E402


def picture(file, brightness=255):
    pixels = np.random.default_rng(0).integers(0, brightness, (32, 40, 3), dtype=np.uint8)
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    top = tmp_path_factory.mktemp("data")
    for number in range(3):
        picture(top / "bsds400" / f"{number}.png")
    for number in (2, 493):
        picture(top / "lol-pairs" / f"test_targets_{number}.png")
        picture(top / "lol-pairs" / f"test_imgs_{number}.png", 40)
    picture(top / "dark-sci" / "hard.png", 30)
    picture(top / "lol15-low" / "1.png", 30)
    return top


def test_the_examples_hold():
    assert doctest.testmod(lowlight).failed == 0


def test_the_tables_tell_of_all_sets_and_of_what_needs_no_model(sets, tmp_path):
    encoder = LowLightEncoder(features=4, growth=4, blocks=1, stacked=(0,), levels=2)
    made = LowLightFlow(levels=2, steps=1, hidden=4, encoder=encoder)
    with torch.no_grad():
        made.train().nll(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16))
    made.eval().conditioner.fit(0.1 * torch.rand(16, 3, 16, 16), progress=False)
    made.conditioner.calibrate(0.1 * torch.rand(49, 3, 16, 16), progress=False)
    made.save_pretrained(tmp_path / "models" / "robust-seed0")
    out = tmp_path / "out"
    asked = [str(tmp_path / "models"), "--data", str(sets), "--out", str(out), "--samples", "2"]
    lowlight.run(lowlight.LowLightStudy, "Told.", asked)
    text = (out / "table.md").read_text(encoding="utf-8")
    rivals = ("input", "histogram equalisation", "gamma fitted to the truth")
    for kind in (*rivals, "robust"):
        assert text.count(f"\n| {kind} |") == 2 + 4 * (kind == "robust")
    for name in ("dark photographs (SCI)", "dark photographs (LOL)", "gain 20"):
        assert f"\n| {name} |" in text
    found = json.loads((out / "numbers.json").read_text())
    pairs = {name: found["rivals"][name]["lol-pairs"] for name in rivals}
    # The same noise, once dark: a gamma, and the mean of the truth, bring it closer.
    assert pairs["gamma fitted to the truth"]["psnr"][0] > pairs["input"]["psnr"][0] + 1
    assert pairs["input"]["psnr_gt_mean"][0] > pairs["input"]["psnr"][0] + 1
    assert (out / "figure.png").exists()
    assert (out / "gallery.png").exists()


def test_held_out_are_those_that_training_holds_out(sets):
    study = lowlight.LowLightStudy(sets, Options())
    (held,) = study.pictures("bsds400")
    assert held.picture == "2"
    assert held.condition.shape == (1, 6, 32, 40)
    again = next(study.pictures("bsds400"))
    assert torch.equal(held.condition, again.condition)


def test_real_pairs_are_matched_by_their_numbers(sets):
    study = lowlight.LowLightStudy(sets, Options())
    assert [h.picture for h in study.pictures("lol-pairs")] == [
        "test_targets_2",
        "test_targets_493",
    ]
    with pytest.raises(ValueError, match=r"pictures \*_targets_\* in .*; got none"):
        study.pairs("dark-sci")


def test_an_equalised_picture_uses_the_whole_range_and_keeps_its_hue():
    dark = 0.1 * torch.rand(1, 3, 32, 32)
    bright = lowlight.equalised(dark)
    assert bright.amax() == 1
    assert bright.amax(1).mean() == pytest.approx(0.5, abs=0.05)
    assert torch.allclose(bright / bright.amax(1, True), dark / dark.amax(1, True), atol=1e-5)
