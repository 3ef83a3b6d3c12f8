"""What is measured of one picture agrees with what training and the core measure of it."""

import doctest
import json

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")

from imaging import measure
from imaging.measure import (
    EDGES,
    Held,
    Options,
    Strange,
    artefact_auroc,
    artefact_spearman,
    strange_row,
)
from superres import SuperResolutionStudy

from flowguard.demo.run import artefact_mask
from flowguard.models import PyramidEncoder, SuperResolutionFlow
from flowguard.ood.metrics import auroc, decile_curve, level_maps
from flowguard.training import validation


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    encoder = PyramidEncoder(4, scale=4, levels=2, blocks=0)
    made = SuperResolutionFlow(
        levels=2, steps=1, hidden=4, encoder=encoder, coupling="affine", margin=None
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        made.train().nll(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 8, 8))
    made.conditioner.policy = "report"
    made.eval().conditioner.fit(torch.rand(16, 3, 8, 8), progress=False)
    made.conditioner.calibrate(torch.rand(49, 3, 8, 8), progress=False)
    return made


def study(tmp_path, **options):
    return SuperResolutionStudy(tmp_path, Options(**options))


def test_the_examples_hold():
    assert doctest.testmod(measure).failed == 0


def test_a_picture_is_measured_as_in_training(model, tmp_path):
    x, y = torch.rand(1, 3, 64, 48), torch.rand(1, 3, 16, 12)
    torch.manual_seed(3)
    theirs = validation.measure(model, x, y)
    row = measure.held_row(study(tmp_path, seed=3, samples=3), model, Held("one", x, y))
    for name in ("bits_per_dim", "psnr_y", "lr_psnr"):
        assert row[name] == pytest.approx(theirs[name], abs=1e-9)
    assert {"sample_psnr_y", "sample_lr_psnr", "ssim_y", "diversity", "score"} <= {*row}
    assert row["sample_psnr_y"] != row["psnr_y"]
    assert json.loads(json.dumps(row)) == row


def test_artefacts_are_counted_by_the_rule_of_the_demo(model, tmp_path):
    y = 30 * torch.rand(1, 3, 12, 16)
    row = strange_row(study(tmp_path), model, Strange("one", "gain 30", y))
    x = model.sample(y, 1, 0.8, torch.Generator().manual_seed(0))[0]
    mask = artefact_mask(x, y)
    assert 0 < row["artefacts"] == int(mask.sum()) < row["pixels"] == 48 * 64
    assert row["largest"] == float(x.abs().max())
    # What was counted ranks pixels as the maps themselves do, but for ties within a bin.
    scores = level_maps(model.conditioner.report, (48, 64))["combined"]
    assert artefact_auroc([row["counts"]]) == pytest.approx(auroc(scores, mask), abs=0.02)


def test_values_that_are_not_finite_are_counted(tmp_path):
    class Broken:
        scale = multiple = 1
        conditioner = type("Guard", (), {"report": None})

        def sample(self, y, *rest, tile=None):
            x = y.clone()
            x[..., 0, 0] = torch.nan
            return x[None]

    row = strange_row(study(tmp_path), Broken(), Strange("one", "k", torch.rand(1, 3, 4, 4)))
    assert row == {"pixels": 16, "artefacts": 1, "non_finite": 1, "largest": float("inf")}


def test_counts_of_several_pictures_are_those_of_all_pixels():
    quantiles = torch.rand(4, 500, dtype=torch.float64) * 3
    scores = quantiles + (quantiles > 1)  # beyond all of the calibration it is 2 at least
    wrong = torch.rand(4, 500) < scores / 5
    texts = []
    for s, w in zip(scores, wrong, strict=True):
        bins = torch.bucketize(s, EDGES)
        texts.append(
            " ".join(
                f"{b}:{int(w[bins == b].sum())}:{int((~w)[bins == b].sum())}"
                for b in bins.unique().tolist()
            )
        )
    assert artefact_auroc(texts) == pytest.approx(auroc(scores, wrong), abs=2e-3)
    assert artefact_auroc(["3:0:10"]) is None
    assert artefact_spearman(texts) == pytest.approx(decile_curve(scores, wrong).spearman)
    assert artefact_spearman(["3:0:10"]) is artefact_spearman(["3:5:5"]) is None


def test_of_a_set_some_pictures_are_taken_evenly():
    assert list(measure.some(range(7), 3)) == [0, 2, 4]
    assert list(measure.some(range(3), 5)) == [0, 1, 2]


def test_there_are_three_strengths_of_each_corruption():
    assert measure.three((0.3, 1.0)) == (0.3, 0.55, 1.0)
    assert measure.three((2.0, 5.0, 20.0)) == (2.0, 5.0, 20.0)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="samples must be positive; got 0"):
        Options(samples=0)
