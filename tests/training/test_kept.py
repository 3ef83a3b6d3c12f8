r"""Maps that are kept: found again by their pixels, and never those of something else."""

import pytest
import torch

from flowguard.models import PyramidEncoder
from flowguard.training.kept import KeptMaps


@pytest.fixture
def encoder():
    return PyramidEncoder(4, levels=2, blocks=1).requires_grad_(False).eval()


def maps(kept, encoder, y):
    with kept.serving(encoder):
        return encoder(y)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def kept_for(encoder, budget=10**6):
    kept = KeptMaps(budget)
    kept.renew(encoder)
    return kept


def test_a_picture_that_comes_again_is_found(encoder):
    kept, y = kept_for(encoder), torch.rand(3, 3, 8, 6)
    first = maps(kept, encoder, y)
    assert (kept.found, kept.made) == (0, 3)
    again = maps(kept, encoder, y[[2, 0]])
    assert (kept.found, kept.made) == (2, 3)
    assert equal(again, [level[[2, 0]] for level in first])
    assert equal(first, [torch.cat(m) for m in zip(*map(encoder, y.split(1)), strict=True)])
    assert kept.used == sum(level.numel() * 4 for level in first)
    assert "forward" not in vars(encoder)


def test_a_change_of_one_pixel_a_turn_or_a_dtype_is_another_picture(encoder):
    kept, y = kept_for(encoder), torch.rand(1, 3, 8, 8)
    other = y.clone()
    other[0, 0, 0, 0] += 1e-6
    for different in (y, other, y.flip(-1), y.mT, y[..., :4]):
        assert equal(maps(kept, encoder, different), encoder(different))
    assert (kept.found, kept.made) == (0, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert maps(kept, encoder, y)[0].dtype == torch.bfloat16
    assert (kept.found, kept.made) == (0, 6)


def test_what_is_beyond_the_budget_is_made_again(encoder):
    y = torch.rand(3, 3, 8, 8)
    size = sum(m.numel() * 4 for m in encoder(y[:1]))
    kept = kept_for(encoder, budget=2 * size + 1)
    for _ in range(2):
        assert equal(maps(kept, encoder, y[2:]), encoder(y[2:]))
        maps(kept, encoder, y)
    # The third has come first, and the first next: the second one finds no room, ever.
    assert (kept.used, kept.made, kept.found) == (2 * size, 1 + 2 + 1, 1 + 1 + 2)


def test_maps_of_other_weights_are_forgotten(encoder):
    kept, y = kept_for(encoder), torch.rand(1, 3, 8, 8)
    maps(kept, encoder, y)
    kept.renew(encoder)
    assert kept.used > 0
    with torch.no_grad():
        encoder.first.bias += 1
    kept.renew(encoder)
    assert kept.used == 0
    assert equal(maps(kept, encoder, y), encoder(y))


def test_gradients_with_respect_to_the_condition_are_computed(encoder):
    kept, y = kept_for(encoder), torch.rand(1, 3, 8, 8)
    maps(kept, encoder, y)
    y.requires_grad_()
    (given,) = torch.autograd.grad(maps(kept, encoder, y)[0].sum(), y)
    (wanted,) = torch.autograd.grad(encoder(y)[0].sum(), y)
    assert torch.equal(given, wanted)


def test_an_encoder_that_is_trained_is_refused(encoder):
    for trained in (encoder.requires_grad_(), encoder.requires_grad_(False).train()):
        with pytest.raises(ValueError, match="of an encoder that is frozen"):
            maps(KeptMaps(1), trained, torch.rand(1, 3, 8, 8))


def test_a_budget_below_zero_is_refused():
    with pytest.raises(ValueError, match="got -1"):
        KeptMaps(-1)
