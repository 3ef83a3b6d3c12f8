r"""``flowguard train``: what its options come to."""

from types import SimpleNamespace

import pytest
import torch

from flowguard.cli import train
from flowguard.cli.parsing import UserError
from flowguard.image.maps import Robust
from flowguard.io.pictures import Picture, write
from flowguard.training import pictures

pytest.importorskip("PIL.Image")


def test_the_processes_of_a_machine_share_the_cache(tmp_path, monkeypatch):
    for name in "ab":
        write(tmp_path / f"{name}.png", Picture(torch.rand(3, 40, 40)))
    asked, pairs_of = [], pictures.pairs_of

    def watched(*args, budget, **options):
        asked.append(budget)
        return pairs_of(*args, budget=budget, **options)

    monkeypatch.setattr(pictures, "pairs_of", watched)
    args = SimpleNamespace(
        data=str(tmp_path), pairs=None, val=None, task="superres", crop=16, batch=4, seed=0
    )
    for devices in (1, 4):
        train._pictures(SimpleNamespace(**vars(args), cache=1.0, devices=devices), 4)
    assert asked == [10**9, 10**9 // 4]


def test_bins_are_those_of_the_robust_spline():
    options = SimpleNamespace(coupling="robust", bins=8)
    assert train._coupling(options) == Robust(bins=8)
    assert train._coupling(SimpleNamespace(coupling="bspline", bins=None)) == "bspline"


def test_bins_of_another_coupling_are_refused():
    with pytest.raises(
        UserError, match=r"--bins must come with --coupling robust.*got it with aff"
    ):
        train._coupling(SimpleNamespace(coupling="affine", bins=8))


def test_a_run_that_knew_of_no_bins_goes_on_with_the_usual_ones():
    given = train.parser().saved({"data": "pictures", "coupling": "robust"})
    assert given["bins"] is None
