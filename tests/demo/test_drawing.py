r"""Pictures of pages."""

import io

import numpy as np
import pytest
import torch

from flowguard.demo.drawing import encoded, guard_map, marked, seen
from flowguard.metrics import span
from flowguard.ood import OODConditioner
from flowguard.ood.report import nines

Image = pytest.importorskip("PIL.Image")


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("webp", [True, False])
def test_pictures_are_small_files_that_look_the_same(webp, monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: webp)
    image = torch.linspace(0, 1, 64).expand(3, 64, 64)
    data = encoded(image)
    assert len(data) < 3 * 64 * 64 / 4
    assert np.abs(pixels(data)[..., 0] - 255 * image[0].numpy()).mean() < 4


def test_black_to_white_is_the_range_of_the_condition():
    condition = torch.tensor([-1.0, 3.0])
    assert seen(condition, span(condition)).tolist() == [0.0, 1.0]


def test_values_that_are_not_finite_can_be_drawn():
    image = torch.full((3, 16, 16), torch.nan)
    image[:, 8:] = torch.inf
    shown = pixels(encoded(image))
    assert shown[:6].max() < 20
    assert shown[10:].min() > 235


def test_a_single_artefact_is_seen():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[20, 20] = True
    shown = pixels(marked(torch.full((3, 40, 40), 0.5), mask, 95))
    pink = (shown[..., 0] > 180) & (shown[..., 1] < 90)
    assert pink.sum() >= 4
    assert pink[18:23, 18:23].sum() == pink.sum()


def test_maps_are_coloured_by_the_calibrated_quantile():
    torch.manual_seed(0)
    guard = OODConditioner(policy="report").fit(torch.randn(8, 2, 8, 8), progress=False)
    guard.calibrate(torch.randn(20, 2, 8, 8), progress=False)
    y = torch.randn(1, 2, 8, 8)
    y[..., 0, 0] = 100.0
    (level,) = guard.score(y).levels.values()
    shown = pixels(guard_map(level))
    assert shown.shape == (8, 8, 3)
    assert shown[0, 0].tolist() == [252, 255, 164]  # beyond all calibration pixels
    order = nines(level)[0].flatten().argsort().numpy()
    assert (np.diff(shown.sum(-1).flatten()[order]) >= -2).all()  # brighter is farther
