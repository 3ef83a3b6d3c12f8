"""What tests of several benchmarks measure, and on what."""

import numpy as np
import pytest
import torch

from flowguard.models import LowLightEncoder, LowLightFlow


def picture(file, brightness=255):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, brightness, (32, 40, 3), dtype=np.uint8)
    file.parent.mkdir(exist_ok=True)
    image.fromarray(pixels).save(file)


@pytest.fixture(scope="session")
def dark_sets(tmp_path_factory):
    """The sets of the benchmark of low light."""
    top = tmp_path_factory.mktemp("data")
    for number in range(3):
        picture(top / "bsds400" / f"{number}.png")
    for number in (2, 493):
        picture(top / "lol-pairs" / f"test_targets_{number}.png")
        picture(top / "lol-pairs" / f"test_imgs_{number}.png", 40)
    picture(top / "dark-sci" / "hard.png", 30)
    picture(top / "lol15-low" / "1.png", 30)
    return top


@pytest.fixture
def dark_model():
    """Makes a small model for low light, whose guard is calibrated."""

    def make(**options):
        encoder = LowLightEncoder(features=4, growth=4, blocks=1, stacked=(0,), levels=2)
        model = LowLightFlow(levels=2, steps=1, hidden=4, encoder=encoder, **options)
        with torch.no_grad():
            model.train().nll(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16))
        model.eval().conditioner.fit(0.1 * torch.rand(16, 3, 16, 16), progress=False)
        model.conditioner.calibrate(0.1 * torch.rand(49, 3, 16, 16), progress=False)
        return model

    return make
