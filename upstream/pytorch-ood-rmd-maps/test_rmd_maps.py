import pytest
import torch

detector = pytest.importorskip(
    "pytorch_ood.detector", reason="pytorch-ood needs torchvision", exc_type=ImportError
)


@pytest.fixture
def fitted():
    torch.manual_seed(0)
    y = torch.arange(500) % 3
    z = torch.randn(500, 6) + 3 * torch.eye(3, 6)[y]
    return detector.RMD(encoder=None).fit_features(z, y), z, y


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (6, 6), (2, 5)])
@pytest.mark.wound(
    "pytorch-ood", "0.4.0", raises=pytest.RaisesExc(RuntimeError, match="must match the size")
)
def test_maps_are_averaged_over_space(change, fitted, size):
    rmd, z, _ = fitted
    noise = torch.randn(4, 6, *size)
    maps = z[:4, :, None, None] + noise - noise.mean((2, 3), keepdim=True)
    torch.testing.assert_close(rmd.predict_features(maps), rmd.predict_features(z[:4]))


def test_features_are_scored_as_before(fitted, fix):
    rmd, z, _ = fitted
    before = rmd.predict_features(z)
    with fix.applied():
        after = rmd.predict_features(z)
    torch.testing.assert_close(after, before)


def test_both_covariances_are_on_one_scale(fitted):
    r"""In the source of October 2024 one was divided by N and the other not; now neither is."""
    rmd, z, y = fitted
    within = sum(torch.cov(z[y == k].T, correction=0) * (y == k).sum() for k in range(3))
    torch.testing.assert_close(rmd.cov, within + 1e-6 * torch.eye(6), rtol=1e-4, atol=1e-2)
    between = torch.cov(z.T, correction=0) * len(z)
    expected = between + 1e-6 * torch.eye(6)
    torch.testing.assert_close(rmd.background_cov, expected, rtol=1e-4, atol=1e-2)
