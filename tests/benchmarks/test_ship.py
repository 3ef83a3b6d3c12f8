"""What puts a model in the package."""

import numpy as np
import pytest
import ship
import torch
from PIL import Image
from safetensors.torch import load_file

from flowguard.models import SuperResolutionFlow, store


def test_convolutions_are_kept_in_half_precision_and_the_guard_knows_them(tmp_path, monkeypatch):
    torch.manual_seed(0)
    options = {"scale": 2, "levels": 1, "steps": 1, "hidden": 8, "features": 8, "margin": 0.25}
    model = SuperResolutionFlow(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # layers that begin with zeros would hide it
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.conditioner.policy, model.conditioner.boundary = "shrink", 0.9
    model.save_pretrained(tmp_path / "trained")
    for folder in ("train", "held-out"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (50, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(ship, "ROOT", tmp_path)
    (tmp_path / "docs" / "models").mkdir(parents=True)
    (tmp_path / "docs" / "models" / "small.md").write_text("# A card\n")
    folder = ship.ship(
        tmp_path / "trained", "small", tmp_path / "train", tmp_path / "held-out", 0.8, crops=30
    )
    assert (folder / "README.md").read_text() == "# A card\n"
    held, full = load_file(folder / store.WEIGHTS), load_file(tmp_path / "trained" / store.WEIGHTS)
    halves = {name for name, value in held.items() if value.dtype == torch.float16}
    assert halves
    assert not [name for name in halves if "guard" in name or "actnorm" in name]
    own = {n: v.to(held[n].dtype) for n, v in full.items() if ".guard" not in n}
    assert all(torch.equal(held[name], value) for name, value in own.items())
    assert store.read_config(folder)["halves"] == "float32"
    loaded = SuperResolutionFlow.from_pretrained("small")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert (loaded.conditioner.policy, loaded.conditioner.boundary) == ("shrink", 0.8)
    assert loaded.conditioner.guard.calibrated
    y = torch.rand(1, 3, 24, 24)
    model.conditioner.policy = loaded.conditioner.policy = "report"
    mine, its = (m.sample(y, temperature=0.0) for m in (model, loaded))
    assert 0 < float((mine - its).abs().max()) < 1 / 255
    assert 0 < float(loaded.conditioner.report.p_value) <= 1


def test_a_model_without_a_card_is_not_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(FileNotFoundError, match=r"nocard\.md"):
        ship.ship(tmp_path / "trained", "nocard", tmp_path, tmp_path)
    assert not (tmp_path / "shipped").exists()
