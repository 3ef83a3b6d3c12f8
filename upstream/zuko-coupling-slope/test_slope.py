import pytest
import torch

zuko = pytest.importorskip("zuko")

REFUSED = pytest.RaisesExc(TypeError, match="unexpected keyword argument 'slope'")


@pytest.mark.parametrize("slope", [0.5, 0.1, 1e-3])
@pytest.mark.wound("zuko", "1.6.0", raises=REFUSED)
def test_no_condition_makes_a_coupling_steeper(change, slope):
    torch.manual_seed(0)
    flow = zuko.flows.RealNVP(2, context=1, transforms=1, slope=slope)
    far = torch.tensor([[-1e6], [1e6]]).expand(100, 2, 1)  # out of distribution
    x = torch.randn(100, 2, 2)
    t = flow(far).transform
    # Less the rounding of the logarithm's product.
    least, most = slope * (1 - 1e-4), (1 + 1e-4) / slope
    ladj = t.log_abs_det_jacobian(x, t(x)).exp()
    assert ladj.min() >= least
    assert ladj.max() <= most
    assert ladj.max() / ladj.min() > 1.5  # the condition does something


@pytest.mark.wound("zuko", "1.6.0", raises=REFUSED)
def test_what_is_given_as_a_map_comes_first(change):
    univariate = zuko.transforms.AdditiveTransform
    flow = zuko.flows.NICE(2, slope=0.1, univariate=univariate, shapes=[()])
    assert flow.transform.transforms[0].univariate is univariate


def test_the_default_is_what_it_was(fix):
    def run():
        torch.manual_seed(0)
        flow = zuko.flows.RealNVP(3, context=2)
        return flow(torch.ones(2)).log_prob(torch.randn(5, 3)), repr(flow)

    before = run()
    with fix.applied():
        after = run()
    assert torch.equal(after[0], before[0])
    assert after[1] == before[1]
