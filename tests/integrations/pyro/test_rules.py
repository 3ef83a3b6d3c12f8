r"""Certificates know Pyro's distributions and transforms, and flowguard's maps within them."""

import math

import pytest
import torch

import flowguard
from flowguard import RobustSpline
from flowguard.bounds import certify

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
import pyro.distributions.transforms as T  # noqa: E402

D, CONTEXT = 3, 2


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


def base(d=D):
    return dist.Normal(torch.zeros(d), torch.ones(d))


def spline(shift_bound=2.0):
    return RobustSpline(
        *(3 * torch.randn(D, 3) for _ in range(3)), torch.randn(D), shift_bound=shift_bound
    )


def batch_norm():
    layer = T.batchnorm(D)
    with torch.no_grad():
        for t in (layer.gamma, layer.moving_variance):
            t.uniform_(0.5, 2)
        for t in (layer.beta, layer.moving_mean):
            t.normal_()
    return layer


CONSTANT = {
    "batch norm": batch_norm,
    "compose": lambda: T.ComposeTransformModule([T.permute(D), batch_norm()]),
    "affine": lambda: T.LowerCholeskyAffine(
        torch.randn(D), torch.randn(D, D).tril(-1) + torch.diag(torch.rand(D) + 0.5)
    ),
    "inverse": lambda: (
        T.LowerCholeskyAffine(
            torch.randn(D), torch.randn(D, D).tril(-1) + torch.diag(torch.rand(D) + 0.5)
        ).inv
    ),
    "permutation": lambda: T.permute(D),
    "inverse batch norm": lambda: batch_norm().eval().inv,
}


@pytest.mark.parametrize("name", CONSTANT)
def test_bounds_of_constant_transforms_hold_and_are_reached(name):
    transform = CONSTANT[name]()
    flow = dist.TransformedDistribution(base(), [transform])
    certificate = certify(flow)
    assert certificate.certified
    corners = 4.0 * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * D)
    with torch.no_grad():
        reached = transform(corners).abs().max().item()
    assert reached <= certificate.bound(4.0) <= 1.001 * reached


def test_robust_splines_work_in_flows_of_pyro():
    flow = dist.TransformedDistribution(base(), [spline(), T.permute(D), spline().inv])
    x = flow.sample((2000,))
    assert flow.log_prob(x).shape == (2000, *([] if flow.event_shape else [D]))
    certificate = certify(flow)
    assert certificate.certified
    assert certificate.event_size == D
    z = 4 * (2 * torch.rand(2000, D) - 1)
    y = z
    for t in flow.transforms:
        y = t(y)
    assert y.abs().max() <= certificate.bound(4.0) <= 5.0 + 2 + 2 + 1e-3
    # A conditional flow of a user's own transform that returns one.
    holder = dist.ConditionalTransformedDistribution(base(), [Conditioned(), T.permute(D)])
    assert holder.condition(torch.randn(CONTEXT)).log_prob(y[:4]).shape == (4,)
    assert "no rule for" in certify(holder).refused[0].reason
    assert certify(holder.condition(torch.randn(CONTEXT))).certified
    flowguard.register("pyro")
    assert T.RobustSpline is RobustSpline
    flowguard.unregister("pyro")
    assert not hasattr(T, "RobustSpline")


class Conditioned(dist.conditional.ConditionalTransformModule):
    """A conditional transform of a robust spline, as a user of Pyro writes it."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(CONTEXT, D * 10)

    def condition(self, context):
        w, h, d, t = self.net(context).unflatten(-1, (D, 10)).split([3, 3, 3, 1], -1)
        return RobustSpline(w, h, d, t.squeeze(-1))


def test_affine_layers_are_refused_and_their_gain_is_told():
    for layer, gain in (
        (T.conditional_affine_autoregressive(D, CONTEXT), math.exp(4)),
        (T.conditional_affine_coupling(D, CONTEXT, log_scale_max_clip=1.0), math.exp(2)),
        (T.conditional_affine_autoregressive(D, CONTEXT, stable=True), 1.0),
    ):
        (refused,) = certify(dist.ConditionalTransformedDistribution(base(), [layer])).refused
        assert refused.gain == pytest.approx(gain)
        assert "shift is free" in refused.reason
    given = T.conditional_affine_coupling(D, CONTEXT).condition(torch.zeros(CONTEXT))
    (refused,) = certify(dist.TransformedDistribution(base(), [given])).refused
    assert refused.gain == pytest.approx(math.exp(4))


def test_the_gain_is_that_of_clips_as_pyro_computes_them():
    layer = T.affine_autoregressive(D)
    (refused,) = certify(layer.inv).refused
    raw = torch.tensor([2.0**k * (1 + j / 64) for k in range(-2, 40) for j in range(64)])
    z = torch.ones(len(raw), D)
    vars(layer)["arn"] = lambda x: (torch.zeros_like(x), raw[:, None].expand_as(x))
    reached = layer(z).max().item()
    assert reached == pytest.approx(refused.gain, rel=1e-4)
    assert reached > 2 * math.exp(3)  # which it is clipped at


def test_the_constant_units_of_a_normal_base_count():
    normal = dist.Normal(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 2.0, 3.0]))
    certificate = certify(dist.TransformedDistribution(normal, [T.permute(D)]))
    assert certificate.bound(4.0) == pytest.approx(12.0, rel=1e-3)
    assert certificate.bound(confidence=0.99) > 0
    uniform = dist.Uniform(-torch.ones(D), torch.ones(D))
    certificate = certify(dist.TransformedDistribution(uniform, [T.permute(D)]))
    assert certificate.bound(1.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="not standard normal"):
        certificate.bound(confidence=0.99)


def test_a_normal_base_whose_rows_differ_is_refused():
    loc, scale = torch.tensor([[5.0, 0.0], [1.0, 1.0]]), torch.tensor([[70.0, 1.0], [1.0, 1.0]])
    layers = [T.Permute(torch.tensor([1, 0]))]
    for base in (dist.Normal(loc, torch.ones(2)), dist.Normal(torch.zeros(2), scale)):
        for kind in (dist.TransformedDistribution, dist.ConditionalTransformedDistribution):
            certificate = certify(kind(base.to_event(1), layers))
            assert "differ from one row" in certificate.refused[0].reason


class FromContext(dist.conditional.ConditionalDistribution):
    def condition(self, context):
        return dist.Normal(context.sum(-1, keepdim=True).expand(D), torch.ones(D))


def test_a_base_that_depends_on_the_context_is_refused():
    flow = dist.ConditionalTransformedDistribution(FromContext(), [T.permute(D)])
    assert "depends on the context" in certify(flow).refused[0].reason


class Louder(T.Permute):
    def _call(self, x):
        return 10 * super()._call(x)


def test_what_works_in_its_own_way_is_refused_and_named():
    (refused,) = certify(dist.TransformedDistribution(base(), [Louder(torch.randperm(D))])).refused
    assert "Louder overrides _call of Permute" in refused.reason
    layer = batch_norm()
    layer.register_forward_hook(lambda *a: None)
    (refused,) = certify(dist.TransformedDistribution(base(), [layer])).refused
    assert "hooks" in refused.reason
    batch = T.LowerCholeskyAffine(torch.zeros(2, D), torch.eye(D).expand(2, D, D))
    assert not certify(dist.TransformedDistribution(base(), [batch])).certified
    wild = batch_norm()
    wild.train()
    assert (
        "training mode"
        in certify(dist.TransformedDistribution(base(), [wild.inv])).refused[0].reason
    )
    with torch.no_grad():
        wild.gamma.fill_(math.nan)
    assert not certify(dist.TransformedDistribution(base(), [wild])).certified


def test_distributions_of_torch_with_a_base_of_pyro_and_the_other_way_round():
    loc, scale = torch.full((D,), 7.0), torch.ones(D)
    for flow in (torch.distributions.TransformedDistribution, dist.TransformedDistribution):
        for normal in (torch.distributions.Normal, dist.Normal):
            certificate = certify(
                flow(normal(loc, scale), [torch.distributions.AffineTransform(0.0, 2.0)])
            )
            assert certificate.bound(1.0) == pytest.approx(16.0, rel=1e-4)
    louder = dist.Normal(loc, scale)
    louder.sample = lambda *a: 1e9 * torch.ones(D)
    (refused,) = certify(dist.TransformedDistribution(louder, [T.permute(D)])).refused
    assert "has a sample of its own" in refused.reason
