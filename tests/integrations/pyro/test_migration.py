r"""Tests for the migration of Pyro's flows."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn

from flowguard.bounds import attack, certify
from flowguard.migration import migrate

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
import pyro.distributions.transforms as T  # noqa: E402

D, CONTEXT = 2, 2


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


def pairs(n):
    """Two moons away from standard units, turned by the context."""
    c = torch.randn(n, CONTEXT)
    t = math.pi * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, t.cos(), 1 - t.cos()) - 0.5
    y = torch.where(upper, t.sin(), 0.5 - t.sin()) - 0.25
    points = torch.stack((x, y), -1) + 0.1 * torch.randn(n, 2)
    cos, sin = c[:, 0].cos(), c[:, 0].sin()
    turned = torch.stack(
        (cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]), -1
    )
    return 3 * torch.exp(0.3 * c[:, 1:]) * turned + 5, c


def base():
    return dist.Normal(torch.zeros(D), torch.ones(D))


def conditional(kind):
    """Conditional transforms, as Pyro's users stack them."""
    layers = [T.AffineTransform(torch.full((D,), 5.0), torch.full((D,), 3.0))]
    for _ in range(2):
        if kind == "autoregressive":
            layers[:0] = [T.conditional_affine_autoregressive(D, CONTEXT, [32])]
        elif kind == "stable":
            layers[:0] = [T.conditional_affine_autoregressive(D, CONTEXT, [32], stable=True)]
        else:
            layers[:0] = [T.conditional_affine_coupling(D, CONTEXT, [32])]
        layers[:0] = [T.permute(D, torch.tensor([1, 0]))]
    return layers


def unconditional(kind):
    layers = [T.AffineTransform(torch.full((D,), 5.0), torch.full((D,), 3.0))]
    for _ in range(2):
        if kind == "autoregressive":
            layers[:0] = [T.affine_autoregressive(D, [32])]
        elif kind == "stable":
            layers[:0] = [T.affine_autoregressive(D, [32], stable=True)]
        else:
            layers[:0] = [T.affine_coupling(D, [32])]
        layers[:0] = [T.batchnorm(D).eval(), T.permute(D, torch.tensor([1, 0]))]
    return layers


def fit(layers, density, steps=150):
    modules = nn.ModuleList(t for t in layers if isinstance(t, nn.Module))
    optimizer = torch.optim.Adam(modules.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-density(*pairs(256)).mean()).backward()
        optimizer.step()
        for t in layers:
            if hasattr(t, "clear_cache"):
                t.clear_cache()
    return modules


KINDS = ("autoregressive", "stable", "coupling")


@pytest.mark.parametrize("kind", KINDS)
def test_a_conditional_flow_becomes_robust_at_the_same_likelihood(kind):
    layers = conditional(kind)
    flow = dist.ConditionalTransformedDistribution(base(), layers)
    modules = fit(layers, lambda x, c: flow.condition(c).log_prob(x))
    state = copy.deepcopy(modules.state_dict())
    x, c = pairs(4096)
    robust, report = migrate(flow, x, c)
    assert type(robust) is dist.ConditionalTransformedDistribution
    assert len(report.replaced) == 2
    assert not report.certificate_before.certified
    assert report.certificate_after.certified
    x, c = pairs(4096)  # pairs that the migration has not seen
    with torch.no_grad():
        gap = flow.condition(c).log_prob(x) - robust.condition(c).log_prob(x)
    assert gap.mean().abs() < 1e-3
    assert report.sample_error.median < 1e-4
    # Far contexts make the old one explode, the new one has its bound, by Pyro's own sampling.
    far = 1e6 * torch.randn(256, CONTEXT)
    with torch.no_grad():
        old, new = (d.condition(far).sample((256,)) for d in (flow, robust))
    assert new.isfinite().all()
    assert new.abs().max() <= report.certificate_after.bound(6.0)
    assert old.nan_to_num(math.inf).abs().max() > report.certificate_after.bound(6.0)
    # Nothing happened to the flow that was given.
    assert all(torch.equal(v, state[k]) for k, v in modules.state_dict().items())
    # What the attack reaches stays below the bound.
    assert attack(robust, c[:8], steps=10, restarts=1).value <= report.certificate_after.bound(4.0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unconditional_flow_becomes_robust_at_the_same_likelihood(kind):
    layers = unconditional(kind)
    flow = dist.TransformedDistribution(base(), layers)
    fit(layers, lambda x, c: flow.log_prob(x))
    robust, report = migrate(flow, pairs(4096)[0])
    assert type(robust) is dist.TransformedDistribution
    assert report.certificate_after.certified
    x, _ = pairs(4096)
    with torch.no_grad():
        assert (flow.log_prob(x) - robust.log_prob(x)).mean().abs() < 1e-3
        samples = robust.sample((1000,))
    assert samples.abs().max() <= report.certificate_after.bound(6.0)


def test_log_prob_is_that_of_the_samples_whether_cached_or_not():
    layers = conditional("autoregressive")
    flow = dist.ConditionalTransformedDistribution(base(), layers)
    fit(layers, lambda x, c: flow.condition(c).log_prob(x), 20)
    robust, _ = migrate(flow, *pairs(512))
    c = torch.randn(64, CONTEXT)
    given = robust.condition(c)
    x = given.sample((64,))
    again = robust.condition(c).log_prob(x.clone())
    assert torch.allclose(given.log_prob(x), again, atol=1e-4)
    # The log-determinant is that of the Jacobian.
    t = robust.transforms[1].condition(c[0])
    z = torch.randn(D, dtype=torch.float32)
    jacobian = torch.autograd.functional.jacobian(t, z)
    assert jacobian.det().abs().log().item() == pytest.approx(
        t.log_abs_det_jacobian(z, t(z)).item(), abs=1e-4
    )


def test_images_are_coupled_along_their_channels():
    layer = T.affine_coupling((3, 4, 4), [16], dim=-3)
    normal = dist.Normal(torch.zeros(3, 4, 4), torch.ones(3, 4, 4)).to_event(3)
    flow = dist.TransformedDistribution(normal, [layer])
    x = flow.sample((512,))
    robust, report = migrate(flow, x)
    assert report.certificate_after.certified
    with torch.no_grad():
        assert torch.allclose(robust.log_prob(x), flow.log_prob(x), atol=1e-2)
        assert robust.sample((64,)).abs().max() <= report.certificate_after.bound(6.0)
    assert report.certificate_after.event_size == 48


def test_a_lone_transform_and_a_stack_are_migrated():
    for build in (T.affine_coupling, T.affine_autoregressive):
        robust, report = migrate(build(D, [16]), torch.randn(512, D))
        assert isinstance(robust, nn.Module)
        assert report.certificate_after.certified
        x = torch.randn(64, D)
        assert torch.allclose(robust.inv(robust(x).clone()), x, atol=1e-4)
    stack = dist.conditional.ConditionalComposeTransformModule(
        [T.conditional_affine_coupling(D, CONTEXT, [16]), T.permute(D)], cache_size=1
    )
    flow = dist.ConditionalTransformedDistribution(base(), [stack])
    robust, report = migrate(flow, *pairs(512))
    assert len(report.replaced) == 1
    assert report.certificate_after.certified
    assert robust.condition(torch.zeros(CONTEXT)).sample((3,)).shape == (3, D)


class Posterior(nn.Module):
    """What users write around Pyro's transforms."""

    def __init__(self):
        super().__init__()
        self.transforms = nn.ModuleList(
            T.conditional_affine_autoregressive(D, CONTEXT, [16]) for _ in range(2)
        )

    def log_prob(self, x, y):
        return (
            dist.ConditionalTransformedDistribution(base(), list(self.transforms))
            .condition(y)
            .log_prob(x)
        )


def test_a_module_of_ones_own_that_holds_transforms_is_migrated():
    model = Posterior()
    x, y = pairs(512)
    robust, report = migrate(model, x, y)
    assert type(robust) is Posterior
    assert len(report.replaced) == 2
    with torch.no_grad():
        assert torch.allclose(robust.log_prob(x, y), model.log_prob(x, y), atol=0.05)


def test_old_weights_load_and_new_ones_do_too():
    layers = conditional("coupling")
    flow = dist.ConditionalTransformedDistribution(base(), layers)
    modules = fit(layers, lambda x, c: flow.condition(c).log_prob(x), 20)
    x, c = pairs(512)
    robust, _ = migrate(flow, x, c)
    held = nn.ModuleList(t for t in robust.transforms if isinstance(t, nn.Module))
    held.load_state_dict(modules.state_dict())  # weights from before fit
    with torch.no_grad():
        gap = flow.condition(c).log_prob(x) - robust.condition(c).log_prob(x)
    assert gap.mean().abs() < 1e-3
    fresh = dist.ConditionalTransformedDistribution(base(), conditional("coupling"))
    again, _ = migrate(fresh, x, c, state_dict=modules.state_dict())
    again_held = nn.ModuleList(t for t in again.transforms if isinstance(t, nn.Module))
    again_held.load_state_dict(held.state_dict())
    with torch.no_grad():
        assert torch.equal(again.condition(c).log_prob(x), robust.condition(c).log_prob(x))
    loaded = pickle.loads(pickle.dumps(held))
    assert [*loaded.state_dict()] == [*held.state_dict()]


def test_fine_tuning_and_autograd_go_through_the_robust_layers():
    layers = conditional("stable")
    flow = dist.ConditionalTransformedDistribution(base(), layers)
    x, c = pairs(512)
    robust, report = migrate(flow, x, c, steps=20, lr=1e-2)
    assert report.nll_after < report.nll_swapped
    assert report.certificate_after.certified
    (-robust.condition(c).log_prob(x).mean()).backward()
    held = nn.ModuleList(t for t in robust.transforms if isinstance(t, nn.Module))
    assert all(p.grad is not None for p in held.parameters())


def test_infinite_outputs_of_a_network_are_bounded_and_nan_is_kept():
    flow, _ = migrate(T.affine_autoregressive(D, [16]), torch.randn(512, D))
    bound = certify(flow.inv).bound(4.0)
    for value in (math.inf, -math.inf):
        with torch.no_grad():
            flow.arn.layers[-1].bias.fill_(value)
            assert flow(torch.randn(64, D).clamp(-4, 4)).abs().max() <= bound
    with torch.no_grad():
        flow.arn.layers[-1].bias.fill_(math.nan)
        assert flow(torch.zeros(1, D)).isnan().all()


def test_what_is_kept_is_named_with_the_reason():
    layers = [*unconditional("coupling"), T.spline_coupling(D), T.planar(D)]
    flow = dist.TransformedDistribution(base(), layers[:-1])
    _, report = migrate(flow, pairs(256)[0])
    reasons = {name.partition("(")[2]: why for name, why in report.reasons.items()}
    assert reasons["BatchNorm)"] == "no condition reaches it"
    assert reasons["Permute)"] == "no condition reaches it"
    assert "flowguard does not know it" in reasons["SplineCoupling)"]
    robust, _ = migrate(dist.TransformedDistribution(base(), layers[:2]), torch.randn(256, D))
    _, report = migrate(robust, torch.randn(256, D))
    assert report.replaced == ()
    flow = dist.TransformedDistribution(base(), [T.planar(D)])
    with pytest.raises(TypeError, match="does not go from data to noise"):
        migrate(flow, torch.randn(256, D))


def test_a_dry_run_tells_the_layers_without_data():
    flow = dist.ConditionalTransformedDistribution(base(), conditional("coupling"))
    same, report = migrate(flow, dry_run=True)
    assert same is flow
    assert [r.before for r in report.replaced] == ["ConditionalAffineCoupling"] * 2
    assert [r.name for r in report.replaced] == ["transforms.1", "transforms.3"]
