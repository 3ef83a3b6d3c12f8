r"""The attack: it finds what there is to find, stays in its ball, and survives an overflow."""

import math

import pytest
import torch
import torch.nn as nn

from flowguard.bounds import attack, certify
from flowguard.image import ConditionalMultiscaleFlow
from flowguard.models import SuperResolutionFlow

NORMS = ("linf", "l2")


def flow_and_maps(coupling="robust"):
    flow = ConditionalMultiscaleFlow(3, 4, levels=2, steps=2, hidden=8, coupling=coupling)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return flow.eval(), [torch.randn(2, 4, 4, 4), torch.randn(2, 4, 2, 2)]


def product(z, y):
    return y * z


@pytest.mark.parametrize(("norm", "best"), [("linf", 3.0 * 4), ("l2", (1 + 2.0) * 4)])
def test_it_finds_the_corner_of_a_bilinear_map(norm, best):
    result = attack(
        product, torch.ones(1, 3), radius=2.0, norm=norm, latents=torch.zeros(1, 3), steps=60
    )
    assert result.value == pytest.approx(best, rel=0.02)
    assert result.noise.abs().max().item() <= 4.0


@pytest.mark.parametrize("norm", NORMS)
def test_it_stays_in_the_ball_and_the_cube(norm):
    flow, y = flow_and_maps("affine")
    result = attack(flow, y, radius=0.3, norm=norm, noise=1.5, steps=10, restarts=3)
    distances = [
        torch.cat([(a - b[i]).flatten() for a, b in zip(result.context, y, strict=True)])
        for i in range(2)  # the row that was the worst is not told
    ]
    order = math.inf if norm == "linf" else 2
    assert min(d.norm(order).item() for d in distances) <= 0.3 * (1 + 1e-5)
    assert max(t.abs().max().item() for t in result.noise) <= 1.5


def test_what_it_returns_gives_the_value_again():
    flow, y = flow_and_maps("affine")
    result = attack(flow, y, radius=1.0, steps=10, restarts=2)
    x, _ = flow.inverse(result.noise, result.context)
    assert x.abs().max().item() == pytest.approx(result.value, rel=1e-4)
    assert result.sample.shape == (1, 3, 8, 8)
    assert result.sample.abs().max().item() == result.value


def test_the_trace_starts_where_it_was_asked_and_ends_higher():
    flow, y = flow_and_maps("affine")
    result = attack(flow, y, radius=3.0, steps=30, restarts=2)
    assert result.trace.shape == (2, 31)
    assert result.value == result.trace.max().item()
    assert result.value > 5 * result.trace[0, 0].item()


def test_an_affine_flow_explodes_where_a_robust_one_keeps_its_certificate():
    reached = {}
    for coupling in ("affine", "robust"):
        torch.manual_seed(0)
        flow, y = flow_and_maps(coupling)
        reached[coupling] = attack(flow, y, radius=10.0, steps=50, restarts=1)
        bound = certify(flow).bound(4.0)
        assert not reached[coupling].value > bound
    assert reached["affine"].value > 1e3 > 2 * reached["robust"].value


def test_without_radius_the_context_is_not_restricted():
    result = attack(product, torch.ones(1, 1), latents=torch.zeros(1, 1), steps=100, restarts=1)
    assert result.value > 1e3


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_an_overflow_counts_as_success_and_leaves_the_last_finite_sample(wrong):
    def sample(z, y):
        return torch.where(y.abs() > 1.0, wrong, y + 0 * z)

    y = torch.full((1, 1), 0.1)
    result = attack(sample, y, radius=4.0, latents=torch.zeros(1, 1), steps=20)
    assert result.overflowed
    assert result.value == math.inf
    assert 0.1 <= result.sample.abs().item() <= 1.0
    assert result.context.abs().item() <= 1.0
    assert bool(result.trace.isinf().any())


def test_an_overflow_of_one_row_does_not_stop_the_others():
    def sample(z, y):
        return torch.where(torch.tensor([[True], [False]]), math.inf, y + 0 * z)

    y = torch.full((2, 1), 0.1)
    result = attack(sample, y, radius=3.0, latents=torch.zeros(2, 1), steps=50)
    assert result.sample.abs().item() == pytest.approx(3.1)


def test_gradients_that_overflow_still_point_somewhere():
    def sample(z, y):
        return 1e36 * torch.exp(y).sum(1, keepdim=True) + 0 * z

    result = attack(
        sample, torch.zeros(1, 2), radius=1.0, norm="l2", latents=torch.zeros(1, 1), steps=40
    )
    assert result.context.norm().item() == pytest.approx(1.0, rel=1e-3)


def test_a_gradient_that_is_nan_is_no_overflow():
    def sample(z, y):
        return y[:, :1].abs().sqrt() + y[:, 1:] + 1 + 0 * z  # not differentiable at the start

    y, z = torch.zeros(1, 2), torch.zeros(1, 1)
    result = attack(sample, y, radius=1.0, norm="l2", latents=z, steps=40, restarts=1)
    assert not result.overflowed
    assert result.value == pytest.approx(2.0, rel=1e-3)


def test_a_sample_that_does_not_depend_on_anything_is_returned():
    result = attack(
        lambda z, y: torch.ones(1, 2), torch.zeros(1, 1), radius=1.0, latents=torch.zeros(1, 1)
    )
    assert result.value == 1.0


def test_the_model_is_left_as_it_was():
    flow, y = flow_and_maps()
    flow.train()
    flow.steps[0].eval()
    modes = [m.training for m in flow.modules()]
    y[0].requires_grad_()
    attack(flow, y, radius=1.0, steps=3, restarts=1)
    assert [m.training for m in flow.modules()] == modes
    assert all(p.grad is None for p in flow.parameters())
    assert y[0].grad is None
    assert not bool(flow.get_buffer("steps.0.0.actnorm.initialized"))


def test_it_works_without_gradients_around_it():
    flow, y = flow_and_maps("affine")
    with torch.no_grad():
        result = attack(flow, y, radius=3.0, steps=10, restarts=1)
    assert result.trace[0, -1] > result.trace[0, 0]


def test_a_generator_makes_it_repeatable():
    flow, y = flow_and_maps()
    values = {
        attack(
            flow, y, radius=1.0, steps=3, restarts=2, generator=torch.Generator().manual_seed(1)
        ).value
        for _ in range(2)
    }
    assert len(values) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_attacked_through_the_encoder(dtype):
    model = SuperResolutionFlow(levels=2, steps=1, hidden=8, features=8, coupling="affine")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    lr = torch.rand(2, 3, 4, 5, dtype=dtype)
    result = attack(model.to(dtype), lr, radius=8 / 255, steps=5, restarts=1)
    assert result.context.shape == (1, 3, 4, 5)
    assert result.sample.shape == (1, 3, 16, 20)
    assert result.sample.dtype == dtype
    assert (result.context - lr).abs().amax((1, 2, 3)).min() <= 8 / 255 + 1e-6
    assert result.trace[0, -1] > result.trace[0, 0]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"norm": "l1"}, ValueError, "'linf' or 'l2'"),
        ({"radius": -1.0}, ValueError, "radius must be finite"),
        ({"radius": math.inf}, ValueError, "None for no limit"),
        ({"noise": math.nan}, ValueError, "noise must be finite"),
        ({"steps": -1}, ValueError, "steps"),
        ({"restarts": 0}, ValueError, "restarts"),
    ],
)
def test_wrong_arguments_are_refused(options, error, match):
    flow, y = flow_and_maps()
    with pytest.raises(error, match=match):
        attack(flow, y, **options)


def test_an_unknown_model_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match="does not know how to sample from Linear"):
        attack(nn.Linear(2, 2), torch.zeros(1, 2))


def test_what_an_attack_has_reached_equals_itself_alone():
    result = attack(product, torch.ones(2, 3), latents=torch.zeros(2, 3), steps=1, restarts=1)
    assert result == result
    assert result != attack(
        product, torch.ones(2, 3), latents=torch.zeros(2, 3), steps=1, restarts=1
    )
