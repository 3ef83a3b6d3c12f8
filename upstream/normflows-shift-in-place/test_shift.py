import pytest
import torch

nf = pytest.importorskip("normflows")


@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_the_likelihood_of_a_batch_is_the_same_twice(change):
    q0 = nf.distributions.DiagGaussian(2)
    flow = nf.MultiscaleFlow([q0], [[]], [], transform=nf.transforms.Shift(), class_cond=False)
    x = torch.rand(4, 2)
    assert torch.equal(flow.log_prob(x, None), flow.log_prob(x, None))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_the_argument_stays_as_it_was(change, direction):
    x = torch.zeros(4, 2)
    moved, _ = getattr(nf.transforms.Shift(), direction)(x)
    assert torch.equal(x, torch.zeros(4, 2))
    assert torch.equal(moved.abs(), torch.full((4, 2), 0.5))


@pytest.mark.wound("normflows", "1.7.3", raises=pytest.RaisesExc(RuntimeError, match="in-place"))
def test_a_leaf_that_takes_gradients_can_be_shifted(change):
    x = torch.zeros(4, 2, requires_grad=True)
    nf.transforms.Shift()(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 2))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.wound("normflows", "1.7.3", raises=pytest.RaisesExc(RuntimeError, match="cast"))
def test_bytes_are_shifted_to_numbers_with_a_point(change, direction):
    z, log_det = getattr(nf.transforms.Shift(), direction)(torch.ones(4, 2, dtype=torch.uint8))
    assert z.dtype == log_det.dtype == torch.float32
