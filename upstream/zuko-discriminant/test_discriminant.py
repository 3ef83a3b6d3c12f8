import pytest
import torch

zuko = pytest.importorskip("zuko")


def spline(rows, width=5.0, slope=-20.0, seed=0, requires_grad=False):
    g = torch.Generator().manual_seed(seed)
    w, h = (width * torch.randn(rows, 8, generator=g) for _ in range(2))
    d = slope + torch.randn(rows, 7, generator=g)
    parameters = [p.requires_grad_(requires_grad) for p in (w, h, d)]
    return zuko.transforms.MonotonicRQSTransform(*parameters, bound=3.0), parameters


@pytest.mark.wound("zuko", "1.6.0", raises=AssertionError)
def test_the_inverse_at_a_flat_knot_is_finite(change):
    t, _ = spline(4000)
    y = t.vertical[:, 4].clone()
    x = t.inv(y)
    assert x.isfinite().all()
    # The end of the bin is its image; that the slope there is near 0 leaves it a few digits.
    assert (x - t.horizontal[:, 4]).abs().max() < 5e-3


@pytest.mark.wound("zuko", "1.6.0", raises=AssertionError)
def test_its_gradients_are_finite(change):
    t, parameters = spline(4000, requires_grad=True)
    y = t.vertical[:, 4].detach().requires_grad_()
    for gradient in torch.autograd.grad(t.inv(y).sum(), [y, *parameters]):
        assert gradient.isfinite().all()


@pytest.mark.wound("zuko", "1.6.0", raises=AssertionError)
def test_samples_stay_within_the_box(change):
    _, (w, h, d) = spline(20_000, width=30.0, slope=0.0)
    t = zuko.transforms.MonotonicRQSTransform(w, h, 1e4 * d, bound=3.0)
    y = 3 * (2 * torch.rand(20_000, generator=torch.Generator().manual_seed(1)) - 1)
    assert t.inv(y).abs().max() <= 3 * (1 + 1e-6)  # 1.0019 in the released one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elsewhere_nothing_changes(dtype, fix):
    g = torch.Generator().manual_seed(0)
    phi = [torch.randn(500, n, generator=g, dtype=dtype) for n in (8, 8, 7)]
    t = zuko.transforms.MonotonicRQSTransform(*phi)
    y = torch.linspace(-6, 6, 500, dtype=dtype)
    before = t.inv(y)
    with fix.applied():
        after = t.inv(y)
    assert torch.equal(after, before)
