"""Metrics of a score against the faults it should find."""

import sys

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from flowguard.ood import OODConditioner, metrics


def sample(n=5000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, generator=generator) < 0.2
    scores = torch.randn(n, generator=generator) + labels
    return scores, labels


@pytest.mark.parametrize("stretch", [lambda s: s, lambda s: (10 * s).exp(), lambda s: s.round()])
def test_rankings_agree_with_scikit_learn_on_any_scale(stretch):
    scores, labels = sample()
    scores = stretch(scores)
    assert metrics.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert metrics.auprc(scores, labels) == pytest.approx(average_precision_score(labels, scores))


def test_infinite_scores_rank_highest():
    scores = torch.tensor([1.0, torch.inf, 2.0, 3e38])
    assert metrics.auroc(scores, torch.tensor([0, 1, 0, 1])) == 1.0
    assert metrics.auroc(scores, torch.tensor([0, 1, 0, 0])) == 1.0
    assert metrics.auroc(scores, torch.tensor([0, 0, 0, 1])) == pytest.approx(2 / 3)


def test_lists_of_different_sizes_are_pooled():
    scores, labels = sample()
    cut = (
        [scores[:100].reshape(10, 10), scores[100:]],
        [labels[:100].reshape(10, 10), labels[100:]],
    )
    assert metrics.auroc(*cut) == metrics.auroc(scores, labels)


def test_aupro_weighs_regions_equally():
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, :20, :20] = True  # 400 pixels
    mask[0, 30:32, 30:32] = True  # 4 pixels
    both = mask.float()
    assert metrics.aupro(both, mask) == pytest.approx(1, abs=1e-3)
    missed = both.clone()
    missed[0, 30:32, 30:32] = -1  # the small region is found last
    assert metrics.aupro(missed, mask) == pytest.approx(0.5, abs=1e-3)
    assert metrics.auroc(missed, mask) > 0.98  # which counts pixels
    diagonal = torch.eye(2, dtype=torch.bool)[None]
    scores = torch.tensor([[[2.0, 1.0], [0.0, 2.0]]])
    assert metrics.aupro(scores, diagonal) == 1.0


def test_aupro_of_noise_is_the_mean_false_positive_rate():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(4, 64, 64, dtype=torch.bool)
    mask[:, 10:30, 10:30] = True
    noise = torch.rand(4, 64, 64, generator=generator)
    assert metrics.aupro(noise, mask) == pytest.approx(0.15, abs=0.02)
    assert metrics.aupro(noise, mask, fpr_limit=1.0) == pytest.approx(0.5, abs=0.02)
    assert metrics.aupro(noise, mask, 1.0) == pytest.approx(metrics.auroc(noise, mask), abs=0.01)


def test_deciles():
    scores = torch.arange(100).flip(0)
    curve = metrics.decile_curve(scores, scores > 89)
    assert curve.rates == [0.0] * 9 + [1.0]
    assert curve.spearman == pytest.approx(0.5222, abs=1e-3)  # nine ties
    assert metrics.decile_curve(scores, scores).spearman == pytest.approx(1)
    assert metrics.decile_curve(scores, -scores).spearman == pytest.approx(-1)
    assert metrics.decile_curve(scores, torch.zeros(100)).spearman != 0  # undefined: NaN


def test_risk_and_coverage():
    risks = torch.tensor([0.0, 1.0, 0.0, 3.0])
    perfect = metrics.risk_coverage(risks, risks)
    assert perfect.excess == 0
    torch.testing.assert_close(perfect.coverage, torch.tensor([0.25, 0.5, 0.75, 1.0]).double())
    torch.testing.assert_close(perfect.risk, torch.tensor([0.0, 0.0, 1 / 3, 1.0]).double())
    worst = metrics.risk_coverage(-risks, risks)
    assert worst.risk[0] == 3
    assert worst.excess > 1


class Levels(nn.Module):
    def forward(self, y):
        return [y, nn.functional.avg_pool2d(y, 2)]


@pytest.fixture
def reports():
    generator = torch.Generator().manual_seed(0)
    conditioner = OODConditioner(Levels(), "report", alpha=0.05)
    conditioner.fit(torch.rand(64, 3, 8, 8, generator=generator), progress=False)
    conditioner.calibrate(torch.rand(64, 3, 8, 8, generator=generator), progress=False)
    wide, small = torch.rand(2, 3, 8, 12, generator=generator), torch.rand(1, 3, 8, 8)
    wide[:, :, :4, :4] += 3
    small[:, :, 2, 2] = torch.nan
    masks = [torch.zeros(2, 16, 24, dtype=torch.bool), torch.zeros(1, 16, 16, dtype=torch.bool)]
    masks[0][:, :8, :8] = True
    masks[1][:, 4:6, 4:6] = True
    return [conditioner.score(wide), conditioner.score(small)], masks


def test_evaluation_of_reports_against_masks(reports):
    table = metrics.evaluate_maps(*reports)
    assert list(table) == ["level1", "level2", "combined"]
    assert table["level1"]["auroc"] == 1.0
    assert table["level1"]["aupro"] == pytest.approx(1.0)
    assert table["combined"]["auroc"] > 0.98  # a NaN takes its neighbours along at level 2
    assert table["level2"]["spearman"] > 0.5
    one = metrics.evaluate_maps(reports[0][0], reports[1][0])
    assert one["level1"]["auprc"] == 1.0


def test_maps_are_brought_to_the_size_of_the_picture(reports):
    maps = metrics.level_maps(reports[0][0], (16, 24))
    assert {tuple(m.shape) for m in maps.values()} == {(2, 16, 24)}
    level = reports[0][0].levels["level2"].map
    assert torch.equal(maps["level2"], level.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert tuple(metrics.level_maps(reports[0][0])["combined"].shape) == (2, 8, 12)


def test_maps_are_averaged_over_what_a_flow_sees_around_a_pixel(reports):
    report = reports[0][0]
    plain = metrics.level_maps(report, (16, 24))
    wide = metrics.level_maps(report, (16, 24), reach=2)
    assert plain.keys() == wide.keys()
    for name in report.levels:
        m = plain[name]
        window = m[:, 3:8, 5:10]
        assert torch.allclose(wide[name][:, 5, 7], window.mean(dim=(1, 2)))
        corner = m[:, :3, -3:]  # at the border, over what there is
        assert torch.allclose(wide[name][:, 0, -1], corner.mean(dim=(1, 2)))
    for name, m in metrics.level_maps(report, (16, 24), reach=0).items():
        assert torch.equal(m, plain[name])
    largest = torch.stack([wide[name].flatten(1).amax(dim=1) for name in report.levels])
    assert (largest <= torch.stack([plain[n].flatten(1).amax(dim=1) for n in report.levels])).all()


def test_an_infinite_score_stays_so_and_no_map_is_nan(reports):
    level = reports[0][0].levels["level1"]
    level.map[0, 4, 4] = torch.inf
    maps = metrics.level_maps(reports[0][0], reach=1)
    assert maps["level1"][0].isinf().sum() == 9
    assert not any(m.isnan().any() for m in maps.values())


def test_artefacts_beside_strange_pixels_are_found_by_a_wider_reach(reports):
    report = reports[0][0]
    mask = metrics.level_maps(report)["level1"]
    strange = mask > mask.flatten(1).quantile(0.9, dim=1)[:, None, None]
    beside = torch.nn.functional.max_pool2d(strange.float()[:, None], 5, 1, 2)[:, 0] > 0
    near, wide = (
        metrics.evaluate_maps(report, beside, reach=r)["level1"]["auroc"] for r in (0, 2)
    )
    assert wide > near + 0.02


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: metrics.auroc(torch.rand(3), torch.rand(4)), "same shapes.*3 and 4"),
        (lambda: metrics.auroc(torch.rand(3), torch.zeros(3)), "with and without.*0 of 3"),
        (lambda: metrics.auprc(torch.rand(3), torch.ones(3)), "with and without.*3 of 3"),
        (lambda: metrics.auroc(torch.full((2,), torch.nan), torch.eye(2)[0]), "must not be NaN"),
        (lambda: metrics.aupro(torch.rand(2, 2), torch.eye(2)), r"shape \(B, H, W\)"),
        (lambda: metrics.aupro(torch.rand(1, 2, 2), torch.eye(2)[None], 0), "fpr_limit"),
        (lambda: metrics.decile_curve(torch.rand(5), torch.rand(5)), "; got 10 bins"),
        (lambda: metrics.risk_coverage(torch.rand(2), torch.full((2,), torch.inf)), "finite"),
        (lambda: metrics.risk_coverage(torch.rand(1), torch.rand(1)), "2 scores or more"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("reach", [-1, 1.5, True])
def test_a_reach_that_is_no_number_of_pixels_is_refused(reports, reach):
    with pytest.raises(ValueError, match=rf"reach must be a number of pixels.*; got {reach}"):
        metrics.level_maps(reports[0][0], reach=reach)


def test_one_batch_of_masks_for_each_report(reports):
    with pytest.raises(ValueError, match="; got 1 for 2"):
        metrics.evaluate_maps(reports[0], reports[1][0])


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("torchmetrics.functional.classification", lambda s, e: metrics.auroc(s, e)),
        ("sklearn.metrics", lambda s, e: metrics.risk_coverage(s, e.double())),
        ("scipy.stats", lambda s, e: metrics.decile_curve(s, e)),
    ],
)
def test_a_missing_extra_is_named(missing, call, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "flowguard-nf\[metrics\]"'):
        call(*sample(100))
