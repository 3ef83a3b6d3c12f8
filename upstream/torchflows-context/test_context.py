import pytest
import torch

multiscale = pytest.importorskip("torchflows.bijections.finite.multiscale.architectures")

NAMES = ["MultiscaleRealNVP", "MultiscaleNICE", "MultiscaleRQNSF"]
SHAPES = [(4,), (2, 3)]


def model(name, shape, **options):
    torch.manual_seed(0)
    made = getattr(multiscale, name)((2, 8, 8), context_shape=shape, n_layers=2, **options)
    made.forward(torch.randn(16, 2, 8, 8), context=torch.randn(16, *shape))  # initialises
    return made.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.wound("torchflows", "1.2.1", raises=AssertionError)
def test_another_context_is_another_map(change, name, shape):
    flow, x = model(name, shape), torch.randn(3, 2, 8, 8)
    one, _ = flow.forward(x, context=torch.zeros(3, *shape))
    other, _ = flow.forward(x, context=torch.full((3, *shape), 10.0))
    assert (one - other).abs().max() > 1e-3  # exactly 0 in the released one


@pytest.mark.parametrize("options", [{}, {"use_resnet": True}])
@pytest.mark.wound("torchflows", "1.2.1", raises=AssertionError)
def test_every_coupling_reads_it_and_inverts(change, options):
    flow = model("MultiscaleRealNVP", (4,), **options).double()
    x, context = torch.randn(3, 2, 8, 8).double(), torch.randn(3, 4).double().requires_grad_()
    z, log_det = flow.forward(x, context=context)
    back, log_back = flow.inverse(z, context=context)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_back, -log_det, rtol=1e-6, atol=1e-6)
    layers = [p for n, p in flow.named_parameters() if "context_layer.weight" in n]
    assert len(layers) == 3 + 3 + 4  # of both levels
    gradients = torch.autograd.grad(z.square().sum(), layers)
    assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.wound("torchflows", "1.2.1", raises=pytest.RaisesExc(pytest.fail.Exception))
def test_a_missing_context_is_told(change):
    with pytest.raises(ValueError, match="context must have shape"):
        model("MultiscaleRealNVP", (4,)).forward(torch.randn(3, 2, 8, 8))


def test_without_a_context_nothing_changes(fix):
    def run():
        torch.manual_seed(0)
        flow = multiscale.MultiscaleRealNVP((2, 8, 8), n_layers=2)
        return *flow.forward(torch.randn(16, 2, 8, 8)), len(flow.state_dict())

    before = run()
    with fix.applied():
        after = run()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_network_of_its_own_reads_its_context(fix):
    torch.manual_seed(0)
    x, contexts = torch.randn(5, 2, 8, 8), torch.randn(2, 5, 3)
    for made in fix.CONDITIONERS:
        with fix.applied():
            net = made((2, 8, 8), (4,), context_shape=(3,)).eval()
            one, other = (net.predict_theta_flat(x, context=c) for c in contexts)
            assert one.shape == (5, 4)
            assert not torch.equal(one, other)
            with pytest.raises(ValueError, match="context must have shape"):
                net.predict_theta_flat(x)


def test_what_was_made_before_is_as_before(fix):
    torch.manual_seed(0)
    net = fix.CONDITIONERS[0]((2, 8, 8), (4,), context_shape=(3,)).eval()
    x, context = torch.randn(5, 2, 8, 8), torch.randn(5, 3)
    before = net.predict_theta_flat(x, context=context)
    with fix.applied():
        after = net.predict_theta_flat(x, context=context)
    assert torch.equal(after, before)
