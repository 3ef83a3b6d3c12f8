import pytest
import torch
from torch.nn import functional as F

splines = pytest.importorskip("normflows.utils.splines")

BOUND = 3.0
#: The bare assertion of the discriminant, and none of ours.
BARE = pytest.RaisesExc(AssertionError, check=lambda error: not str(error))


def logits(rows, width=3.0, slope=-8.0, dtype=torch.float32, seed=0):
    r"""Widths, heights and derivatives of a kind that networks do give."""
    g = torch.Generator().manual_seed(seed)
    w, h = (width * torch.randn(rows, 8, generator=g) for _ in range(2))
    d = slope + torch.randn(rows, 7, generator=g)
    return w.to(dtype), h.to(dtype), d.to(dtype)


def below_a_knot(h):
    r"""The number before the fourth inner knot, in the direction of samples."""
    shares = 1e-3 + (1 - 8e-3) * h.softmax(-1)
    knots = 2 * BOUND * F.pad(shares.cumsum(-1), (1, 0)) - BOUND
    return torch.nextafter(knots[:, 4], knots.new_tensor(-BOUND))


def inverse(y, parameters):
    return splines.unconstrained_rational_quadratic_spline(
        y, *parameters, inverse=True, tail_bound=BOUND
    )


@pytest.mark.wound("normflows", "1.7.3", raises=BARE)
def test_the_inverse_at_a_flat_knot_raises_no_assertion(change):
    parameters = logits(4000)
    y = below_a_knot(parameters[1])
    x, ladj = inverse(y, parameters)
    exact = inverse(y.double(), [p.double() for p in parameters])[0]
    assert x.isfinite().all()
    assert ladj.isfinite().all()
    # The slope there is 1/d = 1000: a rounding of y, 2e-7, is 2e-4 of x, and as a square root 1e-3.
    assert (x - exact).abs().max() < 5e-3


@pytest.mark.wound("normflows", "1.7.3", raises=BARE)
def test_its_gradients_are_finite(change):
    parameters = [p.requires_grad_() for p in logits(4000)]
    y = below_a_knot(parameters[1].detach()).requires_grad_()
    x, ladj = inverse(y, parameters)
    for gradient in torch.autograd.grad(x.sum() + ladj.sum(), [y, *parameters]):
        assert gradient.isfinite().all()


@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_samples_stay_within_the_box(change):
    # Logits of contexts far out: 2.3 times the box in the released one.
    parameters = logits(20_000, width=30.0, slope=0.0, seed=1)
    parameters[2].mul_(10_000)
    y = BOUND * (2 * torch.rand(20_000, generator=torch.Generator().manual_seed(1)) - 1)
    x, _ = inverse(y, parameters)
    assert x.abs().max() <= BOUND * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elsewhere_nothing_changes(dtype, fix):
    parameters = logits(500, 1.0, 0.0, dtype)
    y = torch.linspace(-BOUND - 1, BOUND + 1, 500, dtype=dtype)
    before = inverse(y, parameters)
    with fix.applied():
        after = inverse(y, parameters)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_bounds_that_are_tensors_are_taken(fix):
    w, h, d = logits(500, 1.0, 0.0)
    y = torch.linspace(-4, 4, 500)
    bound = torch.linspace(1, 5, 500)
    before = splines.unconstrained_rational_quadratic_spline(y, w, h, d, True, tail_bound=bound)
    with fix.applied():
        after = splines.unconstrained_rational_quadratic_spline(y, w, h, d, True, tail_bound=bound)
    torch.testing.assert_close(after, before)
