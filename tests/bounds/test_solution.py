r"""Bounds of computed solutions: they hold where first-order bounds do not, and are tight elsewhere."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowguard.bounds import Refused
from flowguard.bounds.regions import Region
from flowguard.bounds.solution import Solution, solution

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-50}


def cube(n, radius=1.0):
    return Region.cube(torch.full((1, n), radius, dtype=torch.float64))


def substituted(b, *factors):
    r"""The solution, in the dtype of the factors."""
    x = b.T
    for t in factors:
        upper = torch.equal(t, t.triu())
        x = torch.linalg.solve_triangular(t, x, upper=upper)
    return x.T


def corners(n, rows, dtype):
    return (2 * torch.rand(rows, n, dtype=dtype) - 1).sign()


def graded(n, size, generator):
    r"""A triangular matrix with a unit diagonal, and elements of this size beside it."""
    return torch.eye(n) + size * torch.randn(n, n, generator=generator).tril(-1)


@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.1, 1.0, 1e2, 1e4, 1e6]))
def test_substitution_stays_within_its_region(seed, size):
    generator = torch.Generator().manual_seed(seed)
    for dtype, unit in UNIT.items():
        lower = graded(5, size, generator).to(dtype)
        upper = graded(5, size, generator).T.to(dtype) * 0.01
        step = solution(lower, upper)
        assert isinstance(step, Solution)
        region = step.through(cube(5), 1.0, unit)
        x = substituted(corners(5, 64, dtype), lower, upper)
        # Beyond the largest number there is no bound, as certificates report it.
        within = x.abs() <= region.box[0]
        assert bool((within | (region.box[0] > torch.finfo(dtype).max)).all())


@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.1, 1.0, 1e2, 1e4]))
def test_read_backwards_it_is_as_far_off_as_it_may_be(seed, size):
    generator = torch.Generator().manual_seed(seed)
    lower = graded(5, size, generator)
    upper = graded(5, size, generator).T * 0.01
    step = solution(lower, upper)
    link = step.link(cube(5), 1.0, 2.0**-24)
    if link is None:
        return  # no bound either
    b = corners(5, 64, torch.float32)
    x = substituted(b, lower, upper).double()
    away = (x - b.double() @ link.matrix.T).abs()
    assert bool((away <= link.slack).all())


def test_read_backwards_there_is_nothing_where_there_is_no_bound():
    lower = torch.eye(2)
    lower[1, 0] = 1e30
    step = solution(lower, lower.T)
    assert math.isinf(step.through(cube(2), 1.0, 2.0**-24).largest)
    assert step.link(cube(2), 1.0, 2.0**-24) is None


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1.0, 1e-2, 1e-4, 1e-6]))
def test_a_general_system_stays_within_its_region(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.ones(4, 4) + scale * torch.randn(4, 4, generator=generator)
    step = solution(matrix)
    b = corners(4, 64, torch.float32)
    x = torch.linalg.solve(matrix, b.T).T
    assert bool((x.abs() <= step.through(cube(4), 1.0, 2.0**-24).box[0]).all())
    fine = (torch.linalg.inv(matrix.double()).float() @ b.T).T
    step = solution(matrix, work=2.0**-53)
    region = step.through(cube(4), 1.0, 2.0**-24)
    assert bool((fine.abs() <= region.box[0]).all())
    exact = torch.linalg.inv(matrix.double()).abs().sum(1)
    if scale >= 1e-4:
        assert bool((region.box[0] <= 1.001 * exact).all())


def test_a_well_conditioned_system_costs_no_more_than_its_rounding():
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    region = solution(q).through(cube(8), 1.0, 2.0**-24)
    assert region.largest == pytest.approx(q.T.abs().sum(1).max().item(), rel=1e-3)
    exact = solution(q).through(cube(8), 1.0, 0.0).largest
    assert exact == pytest.approx(q.T.abs().sum(1).max().item(), rel=1e-12)


def test_a_system_and_its_product_cancel():
    matrix = 10 * torch.randn(6, 6, dtype=torch.float64)
    region = cube(6).linear(matrix, matrix.abs(), 0.0)
    assert solution(matrix).through(region, 1.0, 0.0).largest == pytest.approx(1.0)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(2, 2),
        torch.ones(3, 3),
        torch.diag(torch.tensor([1.0, 0.0])),
        torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64),
        torch.ones(3, 3, dtype=torch.float64) + 1e-16 * torch.arange(9.0).view(3, 3) ** 2,
        torch.full((2, 2), math.nan),
    ],
)
def test_a_singular_system_is_refused(matrix):
    step = solution(torch.eye(len(matrix)), matrix)
    assert isinstance(step, Refused)
    assert "singular" in step.reason


@pytest.mark.parametrize("roundoff", [2.0**-8, 2.0**-24])
def test_a_solution_that_may_be_anything_has_no_bound(roundoff):
    matrix = torch.ones(3, 3, dtype=torch.float64) + 1e-9 * torch.randn(3, 3, dtype=torch.float64)
    step = solution(matrix)
    assert step.through(cube(3), 1.0, roundoff).largest == math.inf
    assert math.isfinite(step.through(cube(3), 1.0, 2.0**-50).largest)


def test_numbers_too_large_for_the_bound_are_no_bound():
    step = solution(torch.tensor([[1.0, 0.0], [-1e200, 1e-200]], dtype=torch.float64))
    assert isinstance(step, Refused) or not step.finite


def test_a_solution_that_overflows_on_the_way_has_no_bound():
    tiny = 1e-30 * torch.eye(2)
    step = solution(tiny, 1e30 * torch.eye(2))
    b = torch.full((1, 2), 1e10)
    assert not bool(substituted(b, tiny, 1e30 * torch.eye(2)).isfinite().any())
    assert step.through(cube(2, 1e10), 1.0, 2.0**-24).largest == math.inf
    assert step.through(cube(2, 1e6), 1.0, 2.0**-24).largest == pytest.approx(1e6, rel=1e-4)
    assert step.through(cube(2, 1e60), 1.0, 2.0**-24).largest == pytest.approx(1e60, rel=1e-4)


def test_an_infinite_region_is_not_a_large_one():
    box = torch.tensor([[1.0, math.inf]], dtype=torch.float64)
    assert Region.cube(box).largest == math.inf
