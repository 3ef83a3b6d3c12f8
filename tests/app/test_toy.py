r"""Two moons and flows that learn them."""

import math

import pytest
import torch

from flowguard.app import toy


@pytest.fixture(scope="module")
def flows():
    torch.manual_seed(0)
    return {name: toy.trained(name, steps=40) for name in ("affine", "robust")}


@pytest.mark.parametrize("name", ["affine", "robust"])
def test_density_and_samples_are_of_one_flow(name, flows):
    flow = flows[name]
    y = toy.parallelogram(20, torch.Generator().manual_seed(1))
    z = torch.randn(20, 2)
    x = flow.sample(y, z).requires_grad_(True)

    def ladj(x, y):
        back = lambda x: _noise(flow, x[None], y[None])[0]  # noqa: E731
        return torch.autograd.functional.jacobian(back, x).det().abs().log()

    assert torch.allclose(_noise(flow, x, y), z, atol=1e-5)
    expected = torch.stack([ladj(a, b) for a, b in zip(x.detach(), y, strict=True)])
    expected = expected - z.square().sum(-1) / 2 - math.log(2 * math.pi)
    assert torch.allclose(flow.log_prob(x, y), expected, atol=1e-5)


def _noise(flow, x, y):
    r"""The noise of points, found by undoing what sampling does, with gradients."""
    embedding = flow.conditioner.encoder(y)
    for block in range(len(flow.networks) // 2):
        x = x * flow.scales[block].exp()
        for k in (0, 1):
            found = flow.networks[2 * block + k](
                torch.cat((x[:, 1 - k][:, None], embedding), dim=-1)
            ).split(flow.sizes, dim=-1)
            parts = [p[:, 0] if s else p for p, s in zip(found, flow.scalar, strict=True)]
            moved = flow.univariate(*parts)(x[:, k])
            x = torch.stack((moved, x[:, 1]) if k == 0 else (x[:, 0], moved), dim=-1)
    return x


def test_training_leaves_the_generator_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    toy.trained("affine", steps=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_far_from_training_the_affine_flow_flies_off_and_the_robust_one_stays():
    near, far = toy.drawn(0, 0), toy.drawn(12, 12)
    assert near.gone("affine") < 0.05
    assert not bool(near.report.flagged[0])
    assert far.gone("affine") > 0.5
    assert far.gone("affine, its guard shrinks") < 0.05
    assert far.gone("robust") == 0
    assert bool(far.report.flagged[0])


def test_a_condition_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="a condition must be finite; got nan, 0"):
        toy.drawn(math.nan, 0)
