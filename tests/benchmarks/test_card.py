"""What the card of a model says, from the command line."""

import re
import sys

import numpy as np
import pytest
import torch

for needed in ("matplotlib", "scipy", "skimage", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)
Image = pytest.importorskip("PIL.Image")

import card  # noqa: E402
import lowlight  # noqa: E402
from imaging.measure import Options  # noqa: E402

from flowguard import data, metrics  # noqa: E402
from flowguard.models import PyramidEncoder, SuperResolutionFlow  # noqa: E402
from flowguard.training.validation import luma_psnr, restored  # noqa: E402


@pytest.fixture
def sets(tmp_path):
    rng = np.random.default_rng(0)
    for place in ("set5/a_HR", "set14/a_HR", "bsd100/a_HR", "kodak24/a", "realsrset/a"):
        file = tmp_path / "data" / f"{place}.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file)
        if place.endswith("_HR"):
            small = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(small).save(file.with_name("a_LRx4.png"))
    return tmp_path / "data"


def told_of(model, sets, monkeypatch, capsys):
    argv = ["card.py", str(model), "--data", str(sets), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(card, "STEPS", 2)
    for name in ("SPOILT", "MIDDLE"):
        monkeypatch.setattr(card, name, 32)
    card.main()
    told = capsys.readouterr().out
    rows = {
        cells[0]: cells[1:]
        for cells in re.findall(r"^\| (.*) \|$", told, re.M)
        for cells in [cells.split(" | ")]
    }
    return rows, float(re.search(r"^certified \w+: (.*)$", told, re.M)[1])


def reached(rows):
    (found,) = (cells for name, cells in rows.items() if "attack" in name)
    return float(found[-1])


@pytest.mark.parametrize("margin", [0.25, None])
def test_the_card_tells_of_quality_artefacts_and_attack(
    sets, tmp_path, margin, monkeypatch, capsys
):
    torch.manual_seed(0)
    encoder = PyramidEncoder(4, scale=4, levels=2, blocks=0)
    model = SuperResolutionFlow(levels=2, steps=1, hidden=4, encoder=encoder, margin=margin)
    model(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 8, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.eval().conditioner.fit(torch.rand(16, 3, 8, 8), progress=False)
    model.conditioner.calibrate(torch.rand(1999, 3, 8, 8), progress=False)
    model.save_pretrained(tmp_path / "model")
    rows, certified = told_of(tmp_path / "model", sets, monkeypatch, capsys)

    large, small = (data.read_image(sets / "set5" / f"a_{n}.png")[None] for n in ("HR", "LRx4"))
    bicubic = luma_psnr(restored(small, 4), large, 4)
    assert rows["Set5"][0] == f"{bicubic:.3f}"
    with torch.no_grad():
        mean = luma_psnr(model.sample(small, 1, 0.0)[0], large, 4)
    assert rows["Set5"][1] == f"{mean:.3f}"
    assert {"Set14", "BSD100", "Kodak24", "RealSRSet", "checkerboard 1", "gain 20"} <= rows.keys()
    assert 0 < reached(rows) <= certified
    if margin is not None:
        assert certified == 1.25
        assert max(float(cells[3]) for name, cells in rows.items() if "gain" in name) <= 1.25
    else:
        assert all(cells[1] == "0 %" for name, cells in rows.items() if "gain" in name)


def test_the_card_of_a_model_for_low_light(dark_sets, dark_model, tmp_path, monkeypatch, capsys):
    model = dark_model(margin=0.25)
    model.save_pretrained(tmp_path / "model")
    rows, certified = told_of(tmp_path / "model", dark_sets, monkeypatch, capsys)

    study = lowlight.LowLightStudy(dark_sets, Options())
    pairs = [*study.pictures("lol-pairs")]
    with torch.no_grad():
        found = [metrics.low_light(model.sample(h.condition, 1, 0.0)[0], h.target) for h in pairs]
    assert rows["LOL pairs"][3] == f"{np.mean([float(f['psnr']) for f in found]):.3f}"
    assert rows["LOL pairs"][6] == f"{np.mean([float(f['psnr_gt_mean']) for f in found]):.2f}"
    assert {"dark photographs (SCI)", "dark photographs (LOL)", "inversion 3"} <= rows.keys()
    # What is attacked, and certified, is the picture itself.
    assert certified == 1.25
    assert 0 < reached(rows) <= 1.25


def test_a_model_of_another_scale_is_refused(sets, tmp_path, monkeypatch, capsys):
    model = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=4, features=4)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        told_of(tmp_path / "model", sets, monkeypatch, capsys)
    assert "the model must enlarge by 4; it does by 2" in capsys.readouterr().err
