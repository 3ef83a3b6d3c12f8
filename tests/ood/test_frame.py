"""The frame: in distribution, maps are as bright at the border as inside."""

import pytest
import torch
from torch import nn

from flowguard.models import PyramidEncoder
from flowguard.ood import OODConditioner
from flowguard.ood.gaussian import StreamingGaussian
from flowguard.ood.sample import Sample


@pytest.fixture(scope="module")
def crops():
    """Crops of photographs: for the fit, the calibration and the score."""
    data = pytest.importorskip("skimage.data")
    photographs = [data.astronaut(), data.coffee(), data.rocket(), data.chelsea()]
    pool = torch.cat(
        [
            torch.from_numpy(photograph.copy())
            .permute(2, 0, 1)
            .unfold(1, 32, 32)
            .unfold(2, 32, 32)
            .permute(1, 2, 0, 3, 4)
            .reshape(-1, 3, 32, 32)
            .div(255)
            for photograph in photographs
        ]
    )
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))]
    return pool.tensor_split(3)


def convolutions(padding_mode="zeros"):
    settings = {"padding": 1, "padding_mode": padding_mode}
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, **settings), nn.ReLU(), nn.Conv2d(16, 16, 3, **settings)
    )


def guarded(encoder, crops, **kwargs):
    conditioner = OODConditioner(encoder, policy="report", alpha=0.05, **kwargs)
    conditioner.fit(crops[0], progress=False)
    return conditioner.calibrate(crops[1], progress=False)


def ring(maps, depth):
    """The mean score of the pixels of that depth."""
    sides = torch.ones(maps.shape[1:], dtype=torch.bool)
    end = maps.shape[1] - depth, maps.shape[2] - depth
    sides[depth + 1 : end[0] - 1, depth + 1 : end[1] - 1] = False
    sides[:depth] = sides[end[0] :] = sides[:, :depth] = sides[:, end[1] :] = False
    return float(maps[:, sides].mean())


ENCODERS = {
    "convolutions": convolutions,
    "pyramid of 3 levels": lambda: PyramidEncoder(16, scale=4, levels=3),
    "the photographs themselves": lambda: None,
    "convolutions that replicate": lambda: convolutions("replicate"),
}


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
def test_on_photographs_the_border_is_as_bright_as_the_inside(make, crops):
    report = guarded(make(), crops).score(crops[2])
    for level in report.levels.values():
        width = min(3, level.map.shape[1] // 8)
        inside = float(level.map[:, 8:-8, 8:-8].mean()) if level.map.shape[1] > 16 else None
        inside = float(level.map[:, 4:-4, 4:-4].mean()) if inside is None else inside
        for depth in range(width):
            assert ring(level.map, depth) == pytest.approx(inside, rel=0.15), (level.name, depth)


def test_the_border_of_a_strange_image_is_strange(crops):
    conditioner = guarded(convolutions(), crops)
    y = crops[2][:1].clone()
    y[:, :, :, :2] = torch.rand(1, 3, 32, 2)
    assert conditioner.score(y).levels["level1"].quantile[:, 4:-4, :2].mean() > 0.95


def test_encoders_that_do_not_pad_are_scored_as_they_are(crops):
    conditioner = guarded(nn.Conv2d(3, 8, 3), crops)
    gaussian = conditioner.guard.items()[0][1].gaussian
    level = conditioner.score(crops[2]).levels["level1"]
    assert torch.equal(level.map, gaussian.mahalanobis(conditioner.encoder(crops[2])))


def test_shrink_moves_the_border_onto_its_own_boundary(crops):
    conditioner = guarded(convolutions(), crops, boundary=0.9)
    conditioner.policy = "shrink"
    moved = conditioner(crops[2])
    level = conditioner.report.levels["level1"]
    features = conditioner.encoder(crops[2])
    inside = (level.map <= level.boundary)[:, None].expand_as(features)
    assert torch.equal(moved[inside], features[inside])
    conditioner.encoder, conditioner.guard.fingerprint = None, ""
    after = conditioner.score(moved.detach()).levels["level1"].map[level.map > level.boundary]
    torch.testing.assert_close(after, torch.full_like(after, level.boundary), rtol=1e-3, atol=0)


def test_other_threads_may_score_maps_of_another_size(crops):
    frame = guarded(convolutions(), crops).guard.items()[0][1].frame
    scores = torch.rand(1, 32, 32)
    ratios = frame.of(scores)

    class Interrupted(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            frame._maps = {}  # as where another thread scores maps of another size
            return found

    frame._maps = Interrupted(frame._maps)
    assert torch.equal(frame.of(scores), ratios)


def test_a_sample_of_many_batches_keeps_few_parts_and_the_same_pixels():
    gaussian = StreamingGaussian()
    maps = torch.randn(600, 3, 4, 4)
    gaussian.update(maps)
    gaussian.finalize()
    found = []
    for size in (1, 7, 600):
        sample = Sample(most=500)
        for batch in maps.split(size):
            sample.add(batch)
        assert len(sample.parts) <= 500
        assert sample.kept == sum(len(keys) for keys, _, _ in sample.parts) <= 500
        found.append(sample.scores(gaussian))
    for other in found[1:]:
        assert torch.equal(other.keys, found[0].keys)
        torch.testing.assert_close(other.scores, found[0].scores)
