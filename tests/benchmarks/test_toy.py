"""Tests for the toy experiment."""

import pytest
import torch

pytest.importorskip("zuko")
pytest.importorskip("sklearn")

import toy


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


def test_artefacts_lie_half_a_width_outside_or_are_not_finite():
    frame = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])
    inside = torch.tensor([[0.0, 0.0], [1.9, 5.9], [-1.9, -1.9]])
    outside = torch.tensor([[2.1, 0.0], [0.0, 6.1], [-2.1, 0.0], [torch.nan, 0], [0, torch.inf]])
    assert not toy.artefacts(inside, frame).any()
    assert toy.artefacts(outside, frame).all()


def test_conditions_of_training_lie_in_a_thin_part_of_the_square():
    y = toy.parallelogram(4096)
    assert ((y[:, 1] - y[:, 0] / 2).abs() <= 0.3).all()
    asked = toy.square()
    assert asked.shape == (toy.SIDE**2, 2)
    inside = ((asked[:, 1] - asked[:, 0] / 2).abs() <= 0.3) & (asked[:, 0].abs() <= 2)
    assert 0 < inside.float().mean() < 0.05


def test_a_score_that_foretells_errors_is_reliable_and_one_that_does_not_is_flat():
    scores = torch.linspace(1, 100, toy.SIDE**2)[torch.randperm(toy.SIDE**2)]
    rates = scores / 100
    foretold, seen, error = toy.reliability(scores, rates)
    assert error < 0.01
    assert abs(foretold - seen).max() < 0.01
    foretold, _, error = toy.reliability(scores, torch.rand(toy.SIDE**2).round())
    assert error < 0.1
    assert foretold.max() - foretold.min() < 0.3


@pytest.mark.slow
def test_the_experiment_fills_its_page_and_is_not_done_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy, "SIDE", 12)
    monkeypatch.setattr(toy, "SAMPLES", 4)
    monkeypatch.setattr(toy, "PAIRS", 512)
    page = tmp_path / "docs" / "experiments" / "toy.md"
    for folder in (page.parent, page.parents[1] / "images"):
        folder.mkdir(parents=True)
    page.write_text("Before.\n<!-- toy:start -->\n<!-- toy:end -->\nAfter.\n")
    options = ["--out", str(tmp_path / "out"), "--seeds", "0", "--steps", "20"]
    toy.main(options)
    first = capsys.readouterr().out
    assert all(f"seed 0, {name}:" in first for name in toy.NAMES)
    toy.main(options)
    assert "seed 0" not in capsys.readouterr().out
    toy.main([*options, "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert all(f"| {name} |" in text for name in toy.NAMES)
    found = toy.kept(tmp_path / "out")
    assert found["affine"][0].numbers["certified"] == float("inf")
    for name in (toy.MIGRATED, "robust, 2 bins", "robust, 8 bins"):
        numbers = found[name][0].numbers
        assert numbers["largest"] <= numbers["certified"] < 100
        assert numbers["non_finite"] == 0
    for name in toy.FIGURES:
        assert (page.parents[1] / "images" / f"toy-{name}.png").stat().st_size > 5000
