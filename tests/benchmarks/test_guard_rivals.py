"""Tests for the comparison of the guard with its rivals."""

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

import guard_rivals
import rival_pictures
from rival_pictures import Gathered, Part


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


def part(count, strange=None):
    """Features of two levels; those of strange pixels are far in a direction of little variance."""
    scale = torch.tensor([3.0, 1.0, 0.1])[:, None, None]
    levels = [scale * torch.randn(count, 3, 8, 8) + 2 for _ in range(2)]
    mask = torch.zeros(count, 8, 8, dtype=torch.bool)
    if strange is not None:
        mask[:, strange:] = True
        for level in levels:
            level[:, 2] += 2.0 * mask
    back = 0.01 * torch.rand(count, 8, 8) + mask.float()
    return Part(levels, torch.arange(count) // 2, mask, back, -mask.float().mean((1, 2)))


@pytest.fixture
def found():
    parts = {"fit": part(16), "calibration": part(200), "photographs": part(20)}
    return Gathered(parts | {"RealSRSet": part(4, 6), "gain 5": part(4, 2)}, 1.0, 0.1)


def test_each_score_finds_what_is_strange_in_its_sense(found):
    rows = guard_rivals.compare(found)
    assert set(guard_rivals.RIVALS) < set(rows)
    for name in ("Mahalanobis", "nearest neighbours, whitened"):
        assert min(rows[name].artefacts) > 0.99
        assert rows[name].source == rows[name].worlds == 1
        assert len(rows[name].artefacts) == 3  # two levels, and both
        assert rows[name].spearman > 0.8
        assert rows[name].cost > 0
    returned = rows["reconstruction of the condition"]
    assert returned.artefacts == [1.0]
    assert math.isnan(returned.cost)
    assert rows["log-density of a sample"].source == 1
    text = guard_rivals.lines(rows, levels=2)
    assert len(text.splitlines()) == 2 + len(rows)
    assert "| reconstruction of the condition | – | – | 1.000 | 0." in text


def test_the_scale_orders_what_lies_beyond_the_calibration():
    scale = guard_rivals.Scale.of(torch.linspace(-1, 1, 1001))
    values = scale(torch.tensor([-5.0, 0.0, 1.0, 3.0, 30.0, torch.inf]))
    assert (values.diff() > 0).all()
    assert values.isfinite().all()
    assert values[0] == 0
    assert values[1] == pytest.approx(0.5, abs=1e-3)


def test_false_alarms_are_counted_by_crop_and_by_picture(found):
    low, high = torch.zeros(200, 8, 8), torch.zeros(20, 8, 8)
    low[:] = torch.linspace(0, 1, 200)[:, None, None]
    high[:2] = 2.0  # both crops of one photograph, beyond all of the calibration
    maps = {"calibration": low, "photographs": high}
    others = {name: torch.ones(4, 8, 8) for name in ("RealSRSet", "gain 5")}
    level = guard_rivals.calibrated(maps | others)
    row = guard_rivals.row(found, [level], 0.0)
    assert row.crops == pytest.approx(2 / 20)
    assert row.pictures == pytest.approx(1 / 10)
    # Two levels share α = 0.01: the least p-value of 200 images is then twice 1 / 201.
    assert guard_rivals.combined([level, level]).p_values["photographs"].min() == pytest.approx(
        2 / 201
    )


def test_maps_of_all_sizes_are_read_at_the_same_places():
    size = rival_pictures.CROP
    image = torch.arange((4 * size) ** 2).reshape(1, 1, 4 * size, 4 * size)
    fine = image[..., ::2, ::2]
    at = rival_pictures.at_pixels(image, 4)
    assert at.shape == (1, 1, size, size)
    assert at[0, 0, 3, 5] == image[0, 0, 13, 22]
    assert rival_pictures.at_pixels(fine, 4)[0, 0, 3, 5] == fine[0, 0, 6, 11]


def test_what_was_gathered_is_read_again(found, tmp_path):
    file = tmp_path / "found.safetensors"
    rival_pictures.save(file, found)
    again = rival_pictures.load(file)
    assert list(again.parts) == list(found.parts)
    assert again.sampling == 1.0
    for name, one in found.parts.items():
        other = again.parts[name]
        assert all(torch.equal(a, b) for a, b in zip(one.levels, other.levels, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


@pytest.mark.slow
def test_a_model_is_compared_and_what_was_gathered_kept(tmp_path, monkeypatch):
    from PIL import Image

    from flowguard.models import SuperResolutionFlow

    monkeypatch.setattr(rival_pictures, "CROP", 8)
    for folder in ("bsds400", "bsd100", "kodak24", "realsrset"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            noise = torch.randint(256, (40, 48, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(tmp_path / folder / f"{number}.png")
    model = SuperResolutionFlow(
        scale=4, levels=2, steps=1, hidden=8, features=8, coupling="affine"
    )
    model.save_pretrained(tmp_path / "model")
    page = tmp_path / "guard.md"
    page.write_text("<!-- rivals:start --><!-- rivals:end -->")
    command = [str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--page", str(page)]
    guard_rivals.main([*command, "--data", str(tmp_path), "--pictures", "2"])
    first = page.read_text(encoding="utf-8")
    assert all(f"| {name} |" in first for name in guard_rivals.RIVALS)
    guard_rivals.main(command)  # without the pictures
    assert "| Mahalanobis |" in page.read_text(encoding="utf-8")
