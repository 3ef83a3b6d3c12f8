import pytest
import torch

zuko = pytest.importorskip("zuko")

FLOWS = {
    "MAF": lambda: zuko.flows.MAF(3, context=2),
    "RealNVP": lambda: zuko.flows.RealNVP(3, context=2),
    "NICE": lambda: zuko.flows.NICE(
        3, context=2, univariate=zuko.transforms.AdditiveTransform, shapes=[()]
    ),
}


@pytest.mark.parametrize("shapes", [((3,), (7, 2)), ((5, 1, 3), (7, 2)), ((7, 3), (5, 1, 2))])
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.wound(
    "zuko", "1.6.0", raises=pytest.RaisesExc(RuntimeError, match="expand|broadcast")
)
def test_an_input_meets_many_conditions(change, name, shapes):
    torch.manual_seed(0)
    flow = FLOWS[name]()
    x, c = (torch.randn(s) for s in shapes)
    batch = torch.broadcast_shapes(x.shape[:-1], c.shape[:-1])
    each = flow(c.expand(*batch, 2)).log_prob(x.expand(*batch, 3))
    torch.testing.assert_close(flow(c).log_prob(x), each)
    z = flow(c).transform(x)
    back = flow(c).transform.inv(z)
    torch.testing.assert_close(back, x.expand(*batch, 3), rtol=1e-4, atol=1e-5)


def test_a_spline_did_so_before():
    flow = zuko.flows.NSF(3, context=2)
    assert flow(torch.randn(7, 2)).log_prob(torch.randn(3)).shape == (7,)


@pytest.mark.parametrize("name", FLOWS)
def test_equal_batches_are_as_before(name, fix):
    torch.manual_seed(0)
    flow, x, c = FLOWS[name](), torch.randn(7, 3), torch.randn(7, 2)
    before = flow(c).log_prob(x)
    with fix.applied():
        after = flow(c).log_prob(x)
    assert torch.equal(after, before)


def test_the_determinant_of_a_shift_is_no_view_of_one_number(fix):
    shift = zuko.transforms.AdditiveTransform(torch.ones(7, 3))
    with fix.applied():
        ladj = shift.log_abs_det_jacobian(torch.ones(3), torch.ones(7, 3))
    ladj[0] += 1  # what the released one gives may be written to
    assert ladj.sum() == 3
