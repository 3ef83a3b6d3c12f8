r"""Golden numbers of the published two-bin spline and of the couplings' univariate maps."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowguard.functional import rational_quadratic_spline
from flowguard.transforms import AffineTransform, ReparametrizedAffineTransform, RobustSpline

mpmath = pytest.importorskip("mpmath")  # torch needs it

GOLDEN = Path(__file__).parents[1] / "golden"


def two_bins(g, x, inverse, rows=""):
    w, h, d = (g[rows + name].unsqueeze(-1) for name in ("w", "h", "d"))
    return rational_quadratic_spline(x, w, h, d, bound=0.5, slope=None, inverse=inverse)


def exact(y, w, h, d):
    r"""The inverse of the published spline and its log-derivative, with 50 digits."""
    with mpmath.workdps(50):
        y, w, h, d = map(mpmath.mpf, (y, w, h, d))
        least = mpmath.mpf("0.001")
        w, h = (least + (1 - 2 * least) / (1 + mpmath.exp(-p)) for p in (w, h))
        d = least + (1 - least) * mpmath.exp(d)
        low = y < h - 0.5
        x0, y0 = (mpmath.mpf(-0.5),) * 2 if low else (w - 0.5, h - 0.5)
        w, h, d0, d1 = (w, h, 1, d) if low else (1 - w, 1 - h, d, 1)
        s, u = h / w, y - y0
        q = d0 + d1 - 2 * s
        a, b, c = u * q + h * (s - d0), h * d0 - u * q, -s * u
        t = 2 * c / (-b - mpmath.sqrt(b * b - 4 * a * c))
        r = 1 - t
        slope = s**2 * (d1 * t**2 + 2 * s * t * r + d0 * r**2) / (s + q * t * r) ** 2
        return float(x0 + w * t), -float(mpmath.log(slope))


def test_two_bins_forward():
    g = load_file(GOLDEN / "rqs_two_bin.safetensors")
    y, ladj = two_bins(g, g["x"], inverse=False)

    torch.testing.assert_close(y, g["fwd_out"], rtol=0, atol=1e-12)
    torch.testing.assert_close(ladj, g["fwd_ladj"], rtol=0, atol=1e-12)


def test_two_bins_inverse():
    g = load_file(GOLDEN / "rqs_two_bin.safetensors")
    x, ladj = two_bins(g, g["y"], inverse=True)

    torch.testing.assert_close(x, g["inv_out"], rtol=0, atol=1e-12)
    # With 50 digits, the published log-derivatives of the inverse are off by up to 5e-11 ...
    torch.testing.assert_close(ladj, g["inv_ladj"], rtol=0, atol=1e-10)

    # ... and ours, on the rows where those are worst, by less than the bar.
    worst = (ladj - g["inv_ladj"]).abs().argsort(descending=True)[:200]
    rows = zip(*(g[name][worst].tolist() for name in ("y", "w", "h", "d")), strict=True)
    out, out_ladj = torch.tensor([exact(*row) for row in rows], dtype=torch.float64).unbind(-1)
    inside = g["y"][worst].abs() < 0.5
    torch.testing.assert_close(x[worst][inside], out[inside], rtol=0, atol=1e-12)
    torch.testing.assert_close(ladj[worst][inside], out_ladj[inside], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", ["edge_", "edge_knot_"])
def test_two_bins_at_the_edges(rows):
    g = load_file(GOLDEN / "rqs_two_bin.safetensors")
    for way in ("fwd", "inv"):
        y, ladj = two_bins(g, g[f"{rows}{way}_in"], way == "inv", "edge_")

        torch.testing.assert_close(y, g[f"{rows}{way}_out"], rtol=0, atol=1e-12)
        # Derivatives are up to e^30 here: an ulp of the input is worth 1e-4 beside the knot.
        torch.testing.assert_close(ladj, g[f"{rows}{way}_ladj"], rtol=0, atol=2e-4)


def affine(raw):
    return AffineTransform(raw[..., 0], raw[..., 1])


def reparametrized(raw):
    return ReparametrizedAffineTransform(raw[..., 0], raw[..., 1])


def spline(raw):
    w, h, d, shift = raw.split(1, dim=-1)
    return RobustSpline(w, h, d, shift[..., 0], bound=0.5, shift_bound=None, slope=None)


@pytest.mark.parametrize(
    ("name", "build", "size"),
    [("affine", affine, 2), ("affine_reparam", reparametrized, 2), ("rqs", spline, 4)],
)
@pytest.mark.parametrize(
    # The summed log-derivatives are of up to 1152 terms.
    ("dtype", "atol", "ladj_atol"),
    [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-3)],
    ids=["float64", "float32"],
)
def test_coupling(name, build, size, dtype, atol, ladj_atol):
    g = load_file(GOLDEN / f"coupling_{name}.safetensors")

    def invert(y, raw):
        raw = raw.unflatten(1, (-1, size)).movedim(2, -1).to(y)
        return build(raw).inverse_and_ladj(y)

    y = g["y"].to(dtype)
    second, ladj_second = invert(y[:, 6:], g["self_raw"])
    x, ladj = invert(torch.cat([y[:, :6], second], dim=1), g["features_raw"])
    total = ladj.sum(dim=(1, 2, 3)) + ladj_second.sum(dim=(1, 2, 3))

    torch.testing.assert_close(x.double(), g["rev"], rtol=0, atol=atol)
    torch.testing.assert_close(total.double(), g["rev_ladj"], rtol=0, atol=ladj_atol)
