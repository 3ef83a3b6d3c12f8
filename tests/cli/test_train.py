r"""``flowguard train``: what its options come to."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("PIL.Image")

from flowguard.cli import train
from flowguard.io.pictures import Picture, write
from flowguard.training import pictures


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
