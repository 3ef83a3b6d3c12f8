"""Calibration: what the p-values, thresholds and quantiles promise, on data nobody fitted."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import nn

from flowguard.ood import OODConditioner, OODContextWarning
from flowguard.ood.calibration import STATISTICS, Calibration, Calibrator, image_statistics

ALPHAS = (0.001, 0.01, 0.05)


def calibrated(scores, edge=torch.nan):
    calibrator = Calibrator(4, edge)
    for batch in scores.split(7):
        calibrator.add(batch)
    return calibrator.build()


@given(
    reference=st.lists(st.integers(0, 20), min_size=1, max_size=30),
    scores=st.lists(st.integers(0, 21), min_size=1, max_size=10),
    alpha=st.floats(0.01, 0.9),
)
@settings(max_examples=60)
def test_p_values_and_thresholds_count(reference, scores, alpha):
    calibration = calibrated(torch.tensor(reference).double())
    wanted = [(1 + sum(r >= s for r in reference)) / (len(reference) + 1) for s in scores]
    values = torch.tensor(scores).double()
    p = calibration.p_values(image_statistics(values, torch.inf))[:, 1]
    torch.testing.assert_close(p, torch.tensor(wanted, dtype=torch.float64))
    flagged = values > calibration.threshold("max", alpha)
    if alpha * (len(reference) + 1) >= 1:
        assert flagged.tolist() == [w <= alpha + 1e-12 for w in wanted]
    else:
        assert flagged.tolist() == [s > max(reference) for s in scores]


@pytest.mark.parametrize("rounding", [-1e-6, 0.0, 1e-6])
def test_ties_up_to_rounding_count_against_the_image(rounding):
    scores = torch.tensor([1.0, 3.0, 3.0, 3.0, 8.0])
    calibration = calibrated(scores)
    p = calibration.p_values(image_statistics(scores * (1 + rounding), torch.nan))[:, 1]
    torch.testing.assert_close(p, torch.tensor([6, 5, 5, 5, 2]) / 6)
    above = scores * (1 + rounding) > calibration.threshold("max", 1 / 6)
    assert not above.any()


def strange_images(n, chance, generator):
    """A few pixels that are very bright, with some chance, or many that are less so. All brightness
    is whole, so that scores tie."""
    rank = torch.rand(n, 1, 1, 1, generator=generator)
    share = torch.where(rank > 1 - chance, 2 / 64, 0.5)
    bright = torch.rand(n, 64, generator=generator).argsort(dim=1).reshape(n, 1, 8, 8) < 64 * share
    sign = torch.randn(n, 1, 8, 8, generator=generator).sign()
    return sign * torch.where(bright, (2 ** (10 * rank)).round(), 1.0)


def promised(n):
    """Shares of false alarms to ask for: those that n images can give exactly, and others."""
    exact = {k / (n + 1) for k in (1, 2, (n + 1) // 2, n)}
    return torch.tensor(sorted(exact | {0.03, 0.1, 0.25, 0.6}))


def false_alarms(statistic, n, calibrations):
    """How often p is at most each share, and the standard error: of images exchangeable with those
    of the calibration, each calibration being one draw."""
    generator = torch.Generator().manual_seed(n)
    conditioner = OODConditioner(policy="report", alpha=0.5, statistic=statistic)
    chance = 1 / (n + 1)
    conditioner.fit(strange_images(256, chance, generator), progress=False)
    alphas = promised(n)
    rates = torch.empty(calibrations, len(alphas), dtype=torch.float64)
    for rate in rates:
        conditioner.calibrate([strange_images(n, chance, generator)], progress=False)
        p = conditioner.score(strange_images(64, chance, generator)).p_value
        rate.copy_((p[:, None] <= alphas * (1 + 1e-6)).double().mean(dim=0))
    return alphas, rates.mean(dim=0), rates.std(dim=0) / calibrations**0.5


@pytest.mark.parametrize("n", [4, 9, 19])
@pytest.mark.parametrize("statistic", ["mean", "max", "share"])
def test_p_values_of_exchangeable_images_are_valid(statistic, n):
    alphas, rate, error = false_alarms(statistic, n, calibrations=400)
    assert (rate <= alphas + 3 * error).all(), list(zip(alphas, rate, error, strict=True))
    assert rate.max() > 0.05  # and say something


def false_alarms_of_many(n, calibrations, images=16):
    """The same for all statistics, with a column for each, without running a conditioner."""
    generator = torch.Generator().manual_seed(n)
    conditioner = OODConditioner(policy="report", statistic="share")
    chance = 1 / (n + 1)
    conditioner.fit(strange_images(256, chance, generator), progress=False)
    ((_, level),) = conditioner.guard.items()
    alphas = promised(n)
    rates = []
    for _ in range(calibrations):
        scores = level.scores(strange_images(n + images, chance, generator))
        statistics = image_statistics(scores, float(level.calibration.edge))
        calibration = Calibration()
        calibration.scores = statistics[:n].double().sort(dim=0).values
        p = calibration.p_values(statistics[n:])
        rates.append((p[..., None] <= alphas * (1 + 1e-6)).double().mean(dim=0))
    rates = torch.stack(rates)
    return alphas, rates.mean(dim=0), rates.std(dim=0) / calibrations**0.5


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 9, 19, 99, 400])
def test_p_values_are_valid_over_10000_calibrations(n):
    alphas, rates, errors = false_alarms_of_many(n, 10_000)
    for statistic, rate, error in zip(STATISTICS, rates, errors, strict=True):
        table = [
            f"{a:.4f}: {r:.4f} ± {e:.4f}" for a, r, e in zip(alphas, rate, error, strict=True)
        ]
        print(statistic, n, *table)
        assert (rate <= alphas + 3 * error).all(), (statistic, table)


def test_statistics_of_the_calibration_are_those_of_the_score():
    maps = torch.randn(30, 9, 8).square() * 9
    calibration = calibrated(maps, edge=50.0)
    again = image_statistics(maps, 50.0).double().sort(dim=0).values
    torch.testing.assert_close(calibration.scores, again)
    flat = maps.flatten(1)
    torch.testing.assert_close(again[:, 0], flat.mean(dim=1).double().sort().values)
    torch.testing.assert_close(again[:, 1], flat.amax(dim=1).double().sort().values)


def test_pixel_quantiles_are_exact_to_the_width_of_a_bin():
    maps = torch.randn(50, 100, 100).square() * 3
    calibration = calibrated(maps)
    order = maps.flatten().sort().values
    for q in (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999):
        exact = order[int(q * len(order))]
        # A bin is 0.27 % of a score; at 15, that is 2 % of what lies beyond it.
        tolerance = 0.02 * (1 - q) + 1 / len(order)
        assert float(calibration.quantile(exact[None])) == pytest.approx(q, abs=tolerance)
    assert calibration.quantile(order[-1:] * 1.01).tolist() == [1.0]
    assert calibration.quantile(torch.zeros(1)).tolist() == [0.0]
    assert (calibration.quantile(order).diff() >= 0).all()
    above = (maps > calibration.boundary(0.999)).double().mean()
    assert 0.0009 < float(above) <= 0.00101


def test_one_in_a_hundred_pixels_of_new_images_lies_above_the_edge_of_the_fit():
    conditioner = OODConditioner(policy="report", statistic="share", alpha=0.1)
    conditioner.fit(torch.randn(200, 3, 16, 16), progress=False)
    conditioner.calibrate(torch.randn(20, 3, 16, 16), progress=False)
    share = conditioner.score(torch.randn(200, 3, 16, 16)).levels["level1"].score
    assert 0.008 < float(share.mean()) < 0.012


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shrink_moves_as_many_pixels_as_asked_for_where_the_fit_has_seen_few_directions(dtype):
    """Three images of one colour each: all other colours are 10¹⁰ times as strange."""
    conditioner = OODConditioner(policy="shrink", shrinkage=0.0, boundary=0.99, alpha=0.1)
    colours = torch.randn(3, 8, 1, 1, dtype=dtype).expand(3, 8, 16, 16)
    conditioner.fit(colours, progress=False)
    conditioner.calibrate(torch.randn(50, 8, 16, 16, dtype=dtype), progress=False)
    y = torch.randn(50, 8, 16, 16, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OODContextWarning)
        moved = (conditioner(y) != y).any(dim=1).double().mean()
    assert conditioner.report.levels["level1"].boundary > 1e8
    assert 0.005 < float(moved) < 0.02


def test_order_and_batches_of_calibration_images_do_not_matter():
    maps = torch.rand(20, 6, 6)
    a, b = calibrated(maps, edge=0.9), calibrated(maps.flip(0), edge=0.9)
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name])


def test_the_share_of_false_alarms_is_alpha_where_chi2_is_far_off():
    """Skewed and heavy-tailed vectors; 100 000 of them, never used for fit or calibration."""
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        rows = torch.randn(n, 8, generator=generator)
        scale = torch.randn(n, 1, generator=generator).mul(0.5).exp()
        return torch.cat([rows[:, :4].exp(), rows[:, 4:] * scale], dim=1)

    conditioner = OODConditioner(policy="report")
    conditioner.fit(draw(20_000), progress=False).calibrate(draw(20_000), progress=False)
    fresh = draw(100_000)
    score = conditioner.score(fresh).levels["level1"].score
    for alpha in ALPHAS:
        conditioner.alpha = alpha
        ours = float(conditioner.score(fresh).flagged.double().mean())
        theirs = float((score > chi2.ppf(1 - alpha, 8)).double().mean())
        assert alpha / 2 <= ours <= 2 * alpha
        assert theirs > 2 * alpha or alpha == 0.05
    assert float((score > chi2.ppf(0.999, 8)).double().mean()) > 0.02


@pytest.fixture(scope="module")
def crops():
    data = pytest.importorskip("skimage.data")
    left, _, _ = data.stereo_motorcycle()
    photographs = [data.astronaut(), data.coffee(), data.rocket(), data.chelsea(), left]
    return [
        torch.from_numpy(photograph.copy())
        .permute(2, 0, 1)
        .unfold(1, 16, 16)
        .unfold(2, 16, 16)
        .permute(1, 2, 0, 3, 4)
        .reshape(-1, 3, 16, 16)
        .div(255)
        for photograph in photographs
    ]


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
    )


@pytest.mark.parametrize("statistic", ["mean", "max", "share"])
def test_the_share_of_false_alarms_on_crops_of_photographs_is_alpha(crops, statistic):
    """Calibration and test crops exchangeable; the mean of ten splits."""
    pool = torch.cat(crops)
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))]
    third = len(pool) // 3
    conditioner = OODConditioner(encoder(), "report", statistic=statistic, alpha=0.01)
    conditioner.fit(pool[:third], progress=False)
    rates = {alpha: 0.0 for alpha in ALPHAS}
    for split in range(10):
        order = torch.randperm(2 * third, generator=torch.Generator().manual_seed(split)) + third
        conditioner.calibrate(pool[order[:third]], progress=False)
        for alpha in ALPHAS:
            conditioner.alpha = alpha
            flagged = conditioner.score(pool[order[third:]]).flagged
            rates[alpha] += float(flagged.double().mean()) / 10
    for alpha, rate in rates.items():
        assert rate <= 2 * alpha
        assert rate >= alpha / 4
    scores = conditioner.score(pool[order[third:]]).levels["level1"].map
    assert float((scores > chi2.ppf(0.999, 16)).double().mean()) > 0.005  # χ² is off by 5


def test_on_photographs_never_seen_the_mean_share_of_false_alarms_holds(crops):
    """Crops of a new photograph are not exchangeable with the others': single ones may exceed."""
    rates = {alpha: [] for alpha in (0.01, 0.05)}
    for i in range(len(crops)):
        others = torch.cat(crops[:i] + crops[i + 1 :])
        others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(i))]
        conditioner = OODConditioner(encoder(), "report", alpha=0.01)
        half = len(others) // 2
        conditioner.fit(others[:half], progress=False)
        conditioner.calibrate(others[half:], progress=False)
        for alpha, found in rates.items():
            conditioner.alpha = alpha
            found.append(float(conditioner.score(crops[i]).flagged.double().mean()))
    for alpha, found in rates.items():
        assert sum(found) / len(found) <= 2 * alpha
        assert max(found) <= 4 * alpha


def test_bonferroni_over_levels_keeps_the_share_of_false_alarms():
    class Levels(nn.Module):
        def forward(self, y):
            return [y[:, :2], y[:, 2:4], y[:, 1:3].exp()]

    generator = torch.Generator().manual_seed(1)
    conditioner = OODConditioner(Levels(), "report", alpha=0.05)
    conditioner.fit(torch.randn(5000, 4, generator=generator), progress=False)
    conditioner.calibrate(torch.randn(5000, 4, generator=generator), progress=False)
    report = conditioner.score(torch.randn(20_000, 4, generator=generator))
    assert 0.02 < float(report.flagged.double().mean()) <= 0.06
    assert torch.equal(report.flagged, report.p_value <= 0.05)
