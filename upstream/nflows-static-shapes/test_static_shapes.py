from importlib import import_module

import pytest
import torch

pytest.importorskip("nflows")


@pytest.fixture(params=["nflows", "glasflow.nflows"])
def splines(request):
    pytest.importorskip(request.param.partition(".")[0])
    return import_module(f"{request.param}.transforms.splines.rational_quadratic")


def arguments(rows=300, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    y = 8 * torch.rand(rows, generator=g, dtype=dtype) - 4  # a box of 3, with tails on both sides
    return y, *(torch.randn(rows, n, generator=g, dtype=dtype) for n in (8, 8, 7))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.wound("nflows", "0.14", raises=torch._dynamo.exc.Unsupported)
def test_it_is_one_graph(change, splines, inverse):
    torch._dynamo.reset()

    def call(*args):
        return splines.unconstrained_rational_quadratic_spline(
            *args, inverse=inverse, tail_bound=3.0
        )

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments()), call(*arguments()))


@pytest.mark.wound("nflows", "0.14", raises=RuntimeError)
def test_it_can_be_mapped_over_batches(change, splines):
    def call(*args):
        return splines.unconstrained_rational_quadratic_spline(*args, tail_bound=3.0)

    torch.testing.assert_close(torch.vmap(call)(*arguments()), call(*arguments()))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_released_one(dtype, inverse, fix, splines):
    def results():
        args = [a.requires_grad_() for a in arguments(dtype=dtype)]
        out = splines.unconstrained_rational_quadratic_spline(
            *args, inverse=inverse, tail_bound=3.0
        )
        return *out, *torch.autograd.grad(sum(o.sum() for o in out), args)

    before = results()
    with fix.applied():
        after = results()
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
    eps = torch.finfo(dtype).eps  # the gradients are summed in another order
    torch.testing.assert_close(after[2:], before[2:], rtol=1e3 * eps, atol=1e3 * eps)


def test_far_out_nothing_is_nan_and_no_gradient_is(fix, splines):
    parameters = [a.requires_grad_() for a in arguments(4)[1:]]
    far = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf], requires_grad=True)
    with fix.applied():
        x, ladj = splines.unconstrained_rational_quadratic_spline(far, *parameters, inverse=True)
    assert torch.equal(x, far)
    assert torch.equal(ladj, torch.zeros(4))
    for gradient in torch.autograd.grad(x.sum() + ladj.sum(), [far, *parameters]):
        assert gradient.isfinite().all()


def test_it_refuses_what_the_released_one_refuses(fix, splines):
    with fix.applied(), pytest.raises(RuntimeError, match="circular tails"):
        splines.unconstrained_rational_quadratic_spline(*arguments(), tails="circular")
    with fix.applied(), pytest.raises(ValueError, match="bin width too large"):
        splines.unconstrained_rational_quadratic_spline(*arguments(), min_bin_width=0.2)
    with fix.applied(), pytest.raises(ValueError, match="bin height too large"):
        splines.unconstrained_rational_quadratic_spline(*arguments(), min_bin_height=0.2)


@pytest.mark.parametrize("inverse", [False, True])
def test_an_input_that_is_no_number_spoils_no_gradient(inverse, fix, splines):
    def results():
        parameters = [a.requires_grad_() for a in arguments(3)[1:]]
        x = torch.tensor([0.1, torch.nan, 5.0])
        y, ladj = splines.unconstrained_rational_quadratic_spline(x, *parameters, inverse=inverse)
        return y, ladj, *torch.autograd.grad((y + ladj)[[0, 2]].sum(), parameters)

    before = results()
    with fix.applied():
        after = results()
    assert all(gradient.isfinite().all() for gradient in before[2:])
    torch.testing.assert_close(after, before, equal_nan=True)
