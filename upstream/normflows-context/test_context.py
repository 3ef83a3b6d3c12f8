import pytest
import torch
from torch import nn

nf = pytest.importorskip("normflows")


def net(*sizes):
    return nf.nets.MLP(list(sizes), init_zeros=False)


class Conditional(nn.Module):
    r"""A network of what stays and of the context, as users bring it."""

    def __init__(self, inputs, context, outputs):
        super().__init__()
        self.line = nn.Linear(inputs + context, outputs)

    def forward(self, z, context=None):
        return self.line(torch.cat((z, context), -1))


VECTORS = {
    "ActNorm": lambda: nf.flows.ActNorm((2,)),
    "AffineConstFlow": lambda: nf.flows.AffineConstFlow((2,)),
    "AffineCouplingBlock": lambda: nf.flows.AffineCouplingBlock(net(1, 8, 2)),
    "Composite": lambda: nf.flows.Composite([nf.flows.Permute(2), nf.flows.ActNorm((2,))]),
    "Logit": lambda: nf.flows.Reverse(nf.transforms.Logit()),
    "MaskedAffineFlow": lambda: nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0]), net(2, 8, 2)),
    "PeriodicShift": lambda: nf.flows.PeriodicShift([0], shift=0.3),
    "PeriodicWrap": lambda: nf.flows.PeriodicWrap([0]),
    "Planar": lambda: nf.flows.Planar((2,), act="leaky_relu"),
    "Residual": lambda: nf.flows.Residual(nf.nets.LipschitzMLP([2, 8, 2], lipschitz_const=0.5)),
    "Reverse": lambda: nf.flows.Reverse(nf.flows.AffineConstFlow((2,))),
    "Shift": lambda: nf.transforms.Shift(),
}
IMAGES = {
    "GlowBlock": lambda: nf.flows.GlowBlock(4, 8),
    "Invertible1x1Conv": lambda: nf.flows.Invertible1x1Conv(4),
    "Squeeze": lambda: nf.flows.Composite(
        [nf.flows.Squeeze(), nf.flows.Reverse(nf.flows.Squeeze())]
    ),
}
REFUSED = pytest.RaisesExc(TypeError, match="unexpected keyword argument 'context'")


@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
@pytest.mark.wound("normflows", "1.7.3", raises=REFUSED)
def test_it_can_be_a_layer_of_a_conditional_flow(change, name):
    torch.manual_seed(0)
    layer = {**VECTORS, **IMAGES}[name]()
    shape = (2,) if name in VECTORS else (4, 4, 4)
    flow = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(shape), [layer])
    x, context = torch.rand(5, *shape), torch.randn(5, 3)
    flow.log_prob(x, context)  # initialises an ActNorm
    if name == "Residual":
        flow.eval()  # its determinant is drawn at random
    torch.manual_seed(1)
    with_one = flow.log_prob(x.clone(), context)
    torch.manual_seed(1)
    without = nf.NormalizingFlow(flow.q0, flow.flows).log_prob(x.clone())
    assert torch.equal(with_one, without)
    assert flow.sample(5, context)[0].shape == x.shape


@pytest.mark.wound("normflows", "1.7.3", raises=REFUSED)
def test_radial_samples(change):
    flow = nf.ConditionalNormalizingFlow(
        nf.distributions.DiagGaussian((2,)), [nf.flows.Radial((2,)), nf.flows.BatchNorm()]
    )
    assert flow.sample(5, torch.randn(5, 3))[0].shape == (5, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nf.flows.AffineCouplingBlock(Conditional(1, 3, 2)),
        lambda: nf.flows.MaskedAffineFlow(
            torch.tensor([1.0, 0]), Conditional(2, 3, 2), Conditional(2, 3, 2)
        ),
    ],
)
@pytest.mark.wound("normflows", "1.7.3", raises=REFUSED)
def test_couplings_give_it_to_networks_that_take_one(change, make):
    torch.manual_seed(0)
    flow = nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian((2,)), [make()])
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    assert not torch.equal(flow.log_prob(x, context), flow.log_prob(x, context + 1))
    z, _ = flow.inverse_and_log_det(x, context)
    torch.testing.assert_close(flow.forward(z, context), x)
    flow.log_prob(x, context).sum().backward()
    assert all(p.grad is not None for p in flow.flows.parameters())


@pytest.mark.wound("normflows", "1.7.3", raises=TypeError)
def test_split_and_merge_take_it(change):
    z, context = torch.randn(5, 4), torch.randn(5, 3)
    parts, _ = nf.flows.Split().forward(z, context=context)
    assert torch.equal(nf.flows.Merge().forward(parts, context)[0], z)


@pytest.mark.wound("normflows", "1.7.3", raises=TypeError)
def test_classes_are_a_condition(change):
    layer = nf.flows.CCAffineConst((2,), 3)
    nn.init.normal_(layer.t_cc)
    y = torch.eye(3)[torch.tensor([0, 2, 1])]
    z = torch.randn(3, 2)
    assert torch.equal(layer(z, context=y)[0], layer(z, y)[0])


@pytest.mark.wound("normflows", "1.7.3", raises=TypeError)
def test_the_base_of_glow_takes_it(change):
    base = nf.distributions.GlowBase((4, 2, 2))
    z, log_p = base(5, context=torch.randn(5, 3))
    torch.testing.assert_close(base.log_prob(z, context=torch.randn(5, 3)), log_p)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")]
)
def test_a_network_that_is_wrapped_is_given_it_too(wrap, fix):
    torch.manual_seed(0)
    net = Conditional(1, 3, 2)
    z, context = torch.randn(5, 2), torch.randn(5, 3)
    with fix.applied():
        plain, _ = nf.flows.AffineCouplingBlock(net)(z, context)
        wrapped, _ = nf.flows.AffineCouplingBlock(wrap(net))(z, context)
    assert torch.equal(wrapped, plain)


def test_a_wrapped_network_without_one_is_as_before(fix):
    torch.manual_seed(0)
    wrapped = nn.DataParallel(net(1, 8, 2))
    z = torch.randn(5, 2)
    before, _ = nf.flows.AffineCouplingBlock(wrapped)(z)
    with fix.applied():
        after, _ = nf.flows.AffineCouplingBlock(wrapped)(z, torch.randn(5, 3))
    assert torch.equal(after, before)
