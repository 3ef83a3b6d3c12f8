r"""Flows over large images, a tile at a time."""

import math

import pytest
import torch

from flowguard.image.tiling import bar, tile_size, tiled_forward, tiled_inverse, tiles
from flowguard.models import RRDBEncoder, SuperResolutionFlow

COUPLINGS = ("affine", "reparametrized", "robust", "bspline")


def shaken(model, scale=0.02):
    r"""A model that is not the identity, and does not amplify rounding errors much."""
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(scale * torch.randn_like(p))
    return model.double().eval()


def published(levels=3, **kw):
    encoder = RRDBEncoder(features=8, growth=4, blocks=1, stacked=(0,), levels=levels)
    kw = {"levels": levels, "steps": 2, "hidden": 8, "architecture": "published", **kw}
    return shaken(SuperResolutionFlow(encoder=encoder, **kw))


MODELS = {
    **{name: (lambda name=name: published(coupling=name)) for name in COUPLINGS},
    "noise": lambda: published(noise_std=0.05, noise_steps=[0, 1, 2]),
    "no residual": lambda: published(residual=False, levels=2),
    "bounded": lambda: shaken(SuperResolutionFlow(levels=2, steps=2, hidden=8, features=8)),
}


def latents_of(model, lr, rows):
    return [torch.randn(rows, *s, dtype=lr.dtype) for s in model.latent_shapes(lr)]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("size", [(13, 9), (16, 22)])
def test_tiles_give_what_the_whole_image_gives(build, size):
    model = build()
    lr = torch.rand(2, 3, *size, dtype=torch.float64)
    latents = latents_of(model, lr, 6)  # three samples of each image
    with torch.no_grad():
        x = model.decode(latents, lr)
        z, ladj = model.encode(x[:2], lr)
    for tile in (16, 32, 1000):
        assert torch.allclose(model.decode(latents, lr, tile=tile), x, rtol=1e-9, atol=1e-9)
        tiled, total = model.encode(x[:2], lr, tile=tile)
        assert torch.allclose(total, ladj, rtol=1e-9)
        for a, b in zip(tiled, z, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_samples_do_not_depend_on_tiles():
    model = published()
    lr = torch.rand(1, 3, 20, 30, dtype=torch.float64)
    draws = [
        model.sample(lr, 2, 0.8, torch.Generator().manual_seed(7), tile=tile)
        for tile in (None, 32, "auto")
    ]
    assert draws[0].shape == (2, 1, 3, 80, 120)
    for draw in draws[1:]:
        assert torch.allclose(draw, draws[0], rtol=1e-9, atol=1e-9)


def test_a_noise_map_is_that_of_the_whole_image():
    model = published(noise_std=0.05)
    lr = torch.rand(1, 3, 24, 24, dtype=torch.float64)
    noise = 0.05 * torch.randn(1, 3, 50, 70, dtype=torch.float64)
    latents = latents_of(model, lr, 1)
    with torch.no_grad():
        features = model.conditioner(lr)
        whole, _ = model.flow.inverse(latents, model.flow.condition(features, noise))
        plain, _ = model.flow.inverse(latents, model.flow.condition(features))
    tiled = tiled_inverse(model.flow, latents, features, 32, noise)
    assert torch.allclose(tiled, whole, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain, whole)


def test_infinite_contexts_stay_bounded_in_tiles():
    model = published()
    lr = torch.rand(1, 3, 24, 24, dtype=torch.float64)
    features = [torch.full_like(f, math.inf) for f in model.conditioner(lr)]
    latents = latents_of(model, lr, 1)
    with torch.no_grad():
        whole, _ = model.flow.inverse(latents, features)
    tiled = tiled_inverse(model.flow, latents, features, 32)
    assert whole.isfinite().all()
    assert torch.allclose(tiled, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("height", "width", "size"), [(1, 1, 8), (16, 16, 16), (37, 53, 8)])
def test_tiles_cover_a_map_once(height, width, size):
    seen = torch.zeros(height, width)
    for tile in tiles((height, width), size):
        seen[tile.place] += 1
        index = torch.arange(height * width).view(height, width)
        assert torch.equal(index[tile.outer][tile.inner], index[tile.place])
    assert (seen == 1).all()


def test_the_progress_bar_ends_at_its_total():
    model = published()
    lr = torch.rand(1, 3, 24, 16, dtype=torch.float64)
    told = []
    tiled_inverse(
        model.flow, latents_of(model, lr, 2), model.conditioner(lr), 32, progress=told.append
    )
    assert sum(told) == 3 * 2 * 96 * 64  # levels, steps, pixels
    with bar(model.flow, 96, 64, False) as update:
        assert update.__self__.total == sum(told)


def test_more_memory_gives_larger_tiles():
    flow = published().flow
    sizes = [tile_size(flow, m) for m in (2**25, 2**28, 2**30)]
    assert sizes == sorted(set(sizes))
    assert tile_size(flow, 2**30, rows=16) < sizes[2]
    with pytest.raises(ValueError, match="allow more memory"):
        tile_size(flow, 1000)


def test_mistakes_are_told():
    model = published()
    lr = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    latents = latents_of(model, lr, 1)
    with pytest.raises(ValueError, match="tile must be a positive number of pixels"):
        model.decode(latents, lr, tile=0)
    with pytest.raises(ValueError, match="tile must be a positive number of pixels"):
        model.sample(lr, tile="large")
    with pytest.raises(TypeError, match="give the LR images"):
        model.decode(latents, model.condition(lr), tile=32)
    with pytest.raises(ValueError, match="multiple of the contexts' number"):
        model.decode([torch.cat((z, z, z)) for z in latents], lr.expand(2, -1, -1, -1), tile=32)
    with pytest.raises(ValueError, match="one latent for each"):
        model.decode(latents[:1], lr, tile=32)
    features = model.conditioner(lr)
    with pytest.raises(ValueError, match="multiple of 8 pixels"):
        tiled_inverse(model.flow, latents, features, 12)
    with pytest.raises(ValueError, match="one map for each of the 3 levels"):
        tiled_forward(model.flow, torch.rand(1, 3, 64, 64).double(), features[:2], 32)
    with pytest.raises(RuntimeError, match="call eval"):
        model.train().decode(latents, lr, tile=32)


def test_an_empty_batch_stays_empty():
    model = published()
    lr = torch.rand(0, 3, 16, 16, dtype=torch.float64)
    assert model.sample(lr, 2, tile=32).shape == (2, 0, 3, 64, 64)
