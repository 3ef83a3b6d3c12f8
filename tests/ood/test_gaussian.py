"""The streaming Gaussian: moments, shrinkage, distances."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import OAS, EmpiricalCovariance, LedoitWolf

from flowguard.ood import NotFittedError, OODConditioner, StreamingGaussian
from flowguard.ood.gaussian import pull
from flowguard.ood.moments import ledoit_wolf


def correlated(n, features, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    rows = torch.randn(n, features, generator=generator, dtype=torch.float64) @ mixing
    return (rows + 3 * torch.randn(features, generator=generator, dtype=torch.float64)).to(dtype)


def fitted(rows, shrinkage=0.01, **kwargs):
    gaussian = StreamingGaussian(**kwargs)
    gaussian.update(rows)
    return gaussian.finalize(shrinkage)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def reference(gaussian, rows):
    delta = (rows - gaussian.mean).double()
    return (delta @ torch.linalg.inv(gaussian.covariance) * delta).sum(dim=1)


def test_moments_of_400000_vectors_with_mean_20_agree_with_numpy():
    rows = correlated(400_000, 64, dtype=torch.float32) + 20
    gaussian = StreamingGaussian()
    for batch in rows.split(1999):
        gaussian.update(batch)
    exact = rows.numpy().astype(np.float64)
    mean = torch.from_numpy(exact.mean(axis=0))
    covariance = torch.from_numpy(np.cov(exact.T, bias=True))
    assert gaussian.n == 400_000
    assert relative(gaussian.mean, mean) <= 1e-12
    assert relative(gaussian.scatter / gaussian.n, covariance) <= 1e-12


@given(cuts=st.lists(st.integers(1, 59), max_size=6), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_moments_do_not_depend_on_the_batches(cuts, seed):
    rows = correlated(60, 4, seed) + 100
    whole, parts = StreamingGaussian(), StreamingGaussian()
    whole.update(rows)
    for batch in rows.tensor_split(sorted(cuts)):
        parts.update(batch)
    for a, b in zip(parts.moments, whole.moments, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-7)


def test_merge_is_the_fit_of_the_union_and_empty_is_neutral():
    rows = correlated(500, 5)
    a, b, whole = StreamingGaussian(), StreamingGaussian(), StreamingGaussian()
    a.update(rows[:123])
    b.update(rows[123:])
    whole.update(rows)
    a.merge(StreamingGaussian()).merge(b)
    merged = StreamingGaussian().merge(a)
    for m, w in zip(merged.moments, whole.moments, strict=True):
        torch.testing.assert_close(m, w, rtol=1e-11, atol=1e-9)


def images_of_levels():
    return torch.rand(25, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=world
    )
    rows = correlated(1000, 6)
    gaussian = StreamingGaussian()
    gaussian.update(rows[:300] if rank == 0 else rows[300:])
    gaussian.merge_ranks().finalize("ledoit_wolf")
    maps = images_of_levels()
    mine = slice(0, 9) if rank == 0 else slice(9, None)
    conditioner = OODConditioner(policy="report", alpha=0.1)
    conditioner.fit(maps[mine], progress=False, distributed=True)
    conditioner.calibrate(maps[mine] + 0.1, progress=False, distributed=True)
    p_values = conditioner.score(maps + 0.2).p_value
    torch.save((gaussian.mean, gaussian.cholesky, p_values), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path):
    mp.spawn(_rank, (2, tmp_path), nprocs=2)  # raises what one of them raises, and ends the other
    single = fitted(correlated(1000, 6), "ledoit_wolf")
    maps = images_of_levels()
    conditioner = OODConditioner(policy="report", alpha=0.1)
    conditioner.fit(maps, progress=False).calibrate(maps + 0.1, progress=False)
    expected = conditioner.score(maps + 0.2).p_value
    for rank in (0, 1):
        mean, cholesky, p_values = torch.load(tmp_path / f"{rank}.pt")
        assert relative(mean, single.mean) <= 1e-12
        assert relative(cholesky, single.cholesky) <= 1e-12
        assert torch.equal(p_values, expected)


def test_merging_ranks_without_a_process_group_says_so():
    with pytest.raises(RuntimeError, match="init_process_group"):
        fitted(correlated(10, 2)).merge_ranks()


@pytest.mark.parametrize("n", [12, 50, 2000])
@pytest.mark.parametrize(
    ("shrinkage", "estimator"),
    [("oas", OAS()), ("ledoit_wolf", LedoitWolf()), (0.0, EmpiricalCovariance())],
)
def test_agrees_with_scikit_learn(n, shrinkage, estimator):
    if shrinkage == 0.0 and n < 50:
        pytest.skip("singular without shrinkage: scikit-learn takes a pseudo-inverse")
    rows = correlated(n, 16) + 5
    gaussian = StreamingGaussian()
    for batch in rows.split(7):
        gaussian.update(batch)
    gaussian.finalize(shrinkage)
    estimator.fit(rows.numpy())
    torch.testing.assert_close(
        gaussian.covariance, torch.from_numpy(estimator.covariance_), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        gaussian.mahalanobis(rows),
        torch.from_numpy(estimator.mahalanobis(rows.numpy())),
        rtol=1e-8,
        atol=1e-8,
    )


def test_ledoit_wolf_streams_exactly_far_from_zero():
    rows = correlated(3000, 8) + 1000
    gaussian = StreamingGaussian()
    for batch in rows.split(100):
        gaussian.update(batch)
    expected = LedoitWolf().fit(rows.numpy()).shrinkage_
    assert float(ledoit_wolf(gaussian.moments)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_scores_like_its_pixels(dtype):
    maps = correlated(2 * 11 * 7, 5, dtype=dtype).reshape(2, 11, 7, 5).permute(0, 3, 1, 2)
    gaussian = fitted(maps)
    assert gaussian.n == 2 * 11 * 7
    scores = gaussian.mahalanobis(maps)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 5)
    assert scores.dtype == dtype
    assert scores.shape == (2, 11, 7)
    torch.testing.assert_close(scores.flatten(), gaussian.mahalanobis(rows))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        scores.flatten().double(), reference(gaussian, rows), rtol=tolerance, atol=tolerance
    )


def test_a_map_larger_than_the_working_memory_scores_like_its_parts():
    maps = torch.randn(2, 8, 300, 400)
    gaussian = fitted(maps[:, :, :50])
    whole = gaussian.mahalanobis(maps)
    parts = [gaussian.mahalanobis(part) for part in maps.split(37, dim=2)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1))


def test_memory_format_does_not_matter():
    maps = torch.randn(2, 6, 20, 30)
    gaussian = fitted(maps)
    expected = gaussian.mahalanobis(maps)
    torch.testing.assert_close(
        gaussian.mahalanobis(maps.to(memory_format=torch.channels_last)), expected
    )
    strided = torch.randn(2, 6, 20, 60)[..., ::2].copy_(maps)
    torch.testing.assert_close(gaussian.mahalanobis(strided), expected)


def test_float32_is_as_good_as_float64_where_the_mean_is_large_and_directions_are_flat():
    """Mean 20, condition number 1e8: whitening in plain float32 would be off by 10 %."""
    scales = torch.logspace(0, -4, 8, dtype=torch.float64)
    rows = torch.randn(5000, 8, dtype=torch.float64) * scales + 20
    single = rows.float()
    gaussian = fitted(single, 0.0)
    exact = reference(gaussian, single.double())
    torch.testing.assert_close(gaussian.mahalanobis(single).double(), exact, rtol=1e-3, atol=1e-3)


def test_constant_and_dependent_channels():
    rows = correlated(500, 3, dtype=torch.float32)
    rows = torch.cat([rows, rows[:, :1] * 2, torch.full((500, 1), 7.0)], dim=1)
    gaussian = fitted(rows, 0.0)
    scores = gaussian.mahalanobis(rows)
    assert scores.isfinite().all()
    # Five numbers, three of them free: no direction without variance may add to the mean score.
    assert float(scores.mean()) == pytest.approx(3, abs=0.01)
    jitter = rows.clone()
    jitter[:, 4] *= 1 + 2e-7  # a rounding error is not strange
    assert float((gaussian.mahalanobis(jitter) - scores).abs().max()) < 0.5
    moved = rows.clone()
    moved[:, 4] += 0.5  # a dead channel that wakes up is
    assert float(gaussian.mahalanobis(moved).min()) > 100 * float(scores.max())


def test_features_that_are_all_constant_are_not_an_error():
    gaussian = fitted(torch.zeros(10, 3))
    assert float(gaussian.mahalanobis(torch.zeros(1, 3))) == 0
    assert float(gaussian.mahalanobis(torch.ones(1, 3))) > 1e6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inf_is_for_what_is_not_finite(dtype):
    gaussian = fitted(torch.randn(100, 3))
    rows = torch.zeros(5, 3, dtype=dtype)
    rows[1, 0] = torch.nan
    rows[2, 1] = torch.inf
    rows[3] = torch.finfo(dtype).max * torch.tensor([1, -1, 1], dtype=dtype)
    scores = gaussian.mahalanobis(rows)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    assert scores.isinf().tolist() == [False, True, True, False, False]
    assert scores.isfinite().logical_or(scores.isinf()).all()
    assert scores[3] > 1e8


def test_half_precision_models_and_autocast_do_not_round_the_statistics():
    rows = correlated(1000, 6, dtype=torch.float32) + 20
    gaussian = fitted(rows)
    expected = gaussian.mahalanobis(rows)
    holder = torch.nn.Sequential(copy.deepcopy(gaussian)).half().bfloat16().float()
    assert holder[0].mean.dtype == torch.float64
    assert torch.equal(holder[0].mahalanobis(rows), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian.mahalanobis(rows), expected)
        again = fitted(rows)
    assert torch.equal(again.cholesky, gaussian.cholesky)


def test_scores_and_fits_are_exact_where_products_are_of_medium_precision(medium):
    """Rounded to 7 bits, whitening is off by tens of per cent."""
    rows = correlated(1000, 64, dtype=torch.float32)
    gaussian = fitted(rows)
    expected = gaussian.mahalanobis(rows)
    moved = pull(rows * 100, gaussian.mahalanobis(rows * 100), gaussian, 9.0)
    with medium():
        scores, again = gaussian.mahalanobis(rows), fitted(rows)
        same = pull(rows * 100, gaussian.mahalanobis(rows * 100), gaussian, 9.0)
    assert torch.equal(scores, expected)
    assert torch.equal(again.cholesky, gaussian.cholesky)
    assert torch.equal(same, moved)


def test_scores_of_this_machine_are_the_same_at_medium_precision():
    """From 256 channels on the setting chooses another product, also without matrix units."""
    rows = torch.randn(2000, 256)
    gaussian = fitted(rows)
    expected = gaussian.mahalanobis(rows)
    torch.set_float32_matmul_precision("medium")
    try:
        scores = gaussian.mahalanobis(rows)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(scores, expected)


def test_l2_normalisation_ignores_length():
    rows = correlated(400, 5)
    gaussian = fitted(rows, normalize="l2")
    scores = gaussian.mahalanobis(rows)
    torch.testing.assert_close(gaussian.mahalanobis(rows * 1e30), scores, rtol=1e-6, atol=1e-6)
    unit = fitted(torch.nn.functional.normalize(rows))
    torch.testing.assert_close(unit.cholesky, gaussian.cholesky)


def test_state_loads_into_an_object_that_knows_no_sizes():
    gaussian = fitted(correlated(100, 5))
    fresh = StreamingGaussian()
    fresh.load_state_dict(gaussian.state_dict())
    rows = correlated(10, 5, seed=1)
    assert torch.equal(fresh.mahalanobis(rows), gaussian.mahalanobis(rows))
    reloaded = pickle.loads(pickle.dumps(gaussian))
    assert torch.equal(reloaded.mahalanobis(rows), gaussian.mahalanobis(rows))


def test_the_kernel_is_forgotten_when_the_state_changes():
    gaussian = fitted(correlated(100, 5))
    rows = correlated(10, 5, seed=1)
    before = gaussian.mahalanobis(rows)
    other = fitted(correlated(100, 5, seed=2))
    gaussian.load_state_dict(other.state_dict())
    assert torch.equal(gaussian.mahalanobis(rows), other.mahalanobis(rows))
    assert not torch.equal(gaussian.mahalanobis(rows), before)


def test_empty_batches_are_neutral():
    gaussian = fitted(correlated(100, 5))
    assert gaussian.mahalanobis(torch.empty(0, 5)).shape == (0,)
    assert gaussian.mahalanobis(torch.empty(0, 5, 4, 4)).shape == (0, 4, 4)
    n = int(gaussian.n)
    gaussian.update(torch.empty(0, 5))
    assert gaussian.n == n


def _bad(action):
    return lambda: action(fitted(torch.randn(20, 3)))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: StreamingGaussian().mahalanobis(torch.randn(2, 3)), NotFittedError, "finalize"),
        (lambda: StreamingGaussian().finalize(), NotFittedError, "at least 2 vectors; got 0"),
        (lambda: StreamingGaussian(normalize="l1"), ValueError, "None or 'l2'; got 'l1'"),
        (_bad(lambda g: g.update(torch.randn(2, 4))), ValueError, "3 channels of the fit; got 4"),
        (
            _bad(lambda g: g.mahalanobis(torch.randn(2, 4))),
            ValueError,
            "3 channels of the fit; got 4",
        ),
        (_bad(lambda g: g.update(torch.randn(2, 3, 4))), ValueError, r"\(2, 3, 4\)"),
        (_bad(lambda g: g.update(torch.ones(2, 3).int())), TypeError, "int32"),
        (_bad(lambda g: g.update(torch.full((2, 3), torch.nan))), ValueError, "NaN or inf"),
        (_bad(lambda g: g.finalize("lw")), ValueError, "; got 'lw'"),
        (_bad(lambda g: g.finalize(1.5)), ValueError, "; got 1.5"),
        (_bad(lambda g: g.merge(fitted(torch.randn(9, 2)))), ValueError, "; got 3 and 2"),
        (
            _bad(lambda g: g.merge(fitted(torch.randn(9, 3), normalize="l2"))),
            ValueError,
            "same way",
        ),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_an_update_withdraws_the_fit():
    gaussian = fitted(torch.randn(20, 3))
    gaussian.update(torch.randn(2, 3))
    with pytest.raises(NotFittedError):
        gaussian.mahalanobis(torch.randn(2, 3))
