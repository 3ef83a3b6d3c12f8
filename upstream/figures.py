r"""The figures of the READMEs on discriminants and on contexts, within a minute.

python upstream/figures.py
"""

import importlib.util
from inspect import signature
from pathlib import Path

import normflows
import torch
from nflows.transforms.splines import rational_quadratic

HERE = Path(__file__).parent


def load(file: str):
    r"""A module of a contribution's folder."""
    spec = importlib.util.spec_from_file_location(
        file.translate({45: 95, 47: 95})[:-3], HERE / file
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_nflows() -> None:
    fix, test = (load(f"nflows-discriminant/{n}.py") for n in ("fix", "test_discriminant"))
    splines = test.logits(4000)
    y = test.below_a_knot(splines[1])

    def raises(i: int) -> bool:
        try:
            test.inverse(rational_quadratic, y[i : i + 1], [p[i : i + 1] for p in splines])
        except AssertionError:
            return True
        return False

    print("nflows: of 4000 splines at a flat knot raise", sum(map(raises, range(4000))))
    with fix.applied():
        x, _ = test.inverse(rational_quadratic, y, splines)
        exact, _ = test.inverse(rational_quadratic, y.double(), [p.double() for p in splines])
    print(f"nflows, changed: largest error against float64 {(x - exact).abs().max():.2g}")
    far = test.logits(20_000, width=30.0, slope=0.0, seed=1)
    far[2].mul_(10_000)
    y = test.BOUND * (2 * torch.rand(20_000, generator=torch.Generator().manual_seed(1)) - 1)
    released, _ = test.inverse(rational_quadratic, y, far)
    with fix.applied():
        changed, _ = test.inverse(rational_quadratic, y, far)
    for name, x in (("released", released), ("changed", changed)):
        print(f"nflows, {name}: far out |x| / B is up to {x.abs().max() / test.BOUND:.2f}")


def of_zuko() -> None:
    fix, test = (load(f"zuko-discriminant/{n}.py") for n in ("fix", "test_discriminant"))
    for width, slope in ((3.0, -8.0), (5.0, -20.0)):
        t, _ = test.spline(4000, width, slope)
        y = t.vertical[:, 4].clone()
        released = t.inv(y).isnan().sum().item()
        with fix.applied():
            changed = t.inv(y).isnan().sum().item()
        print(f"zuko, N(0, {width:.0f}²), N({slope:.0f}, 1): NaN {released}, changed {changed}")


def of_normflows() -> None:
    def below(made: type) -> set[type]:
        return set().union(*({c} | below(c) for c in made.__subclasses__()))

    layers = below(normflows.flows.Flow)
    without = [c for c in layers if "context" not in signature(c.forward).parameters]
    print(f"normflows: {len(without)} of {len(layers)} layers take no context")


if __name__ == "__main__":
    of_nflows()
    of_zuko()
    of_normflows()
