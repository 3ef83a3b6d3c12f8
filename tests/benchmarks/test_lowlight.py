"""The benchmark of low light, from the command line to its tables."""

import doctest
import json

import pytest
import torch

for needed in ("matplotlib", "scipy", "skimage", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)
pytest.importorskip("PIL")

import lowlight  # noqa: E402
from imaging.measure import Options  # noqa: E402


def test_the_examples_hold():
    assert doctest.testmod(lowlight).failed == 0


def test_the_tables_tell_of_all_sets_and_of_what_needs_no_model(dark_sets, dark_model, tmp_path):
    dark_model().save_pretrained(tmp_path / "models" / "robust-seed0")
    out = tmp_path / "out"
    asked = [
        str(tmp_path / "models"),
        "--data",
        str(dark_sets),
        "--out",
        str(out),
        "--samples",
        "2",
    ]
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


def test_held_out_are_those_that_training_holds_out(dark_sets):
    study = lowlight.LowLightStudy(dark_sets, Options())
    (held,) = study.pictures("bsds400")
    assert held.picture == "2"
    assert held.condition.shape == (1, 6, 32, 40)
    again = next(study.pictures("bsds400"))
    assert torch.equal(held.condition, again.condition)


def test_real_pairs_are_matched_by_their_numbers(dark_sets):
    study = lowlight.LowLightStudy(dark_sets, Options())
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
