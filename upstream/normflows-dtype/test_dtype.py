import pytest
import torch
from torch import nn

nf = pytest.importorskip("normflows")


def plain():
    q0 = nf.distributions.DiagGaussian(2)
    return nf.NormalizingFlow(q0, [nf.flows.AffineConstFlow((2,))]).double()


def conditional():
    q0 = nf.distributions.base.ConditionalDiagGaussian(2, nn.Linear(3, 4))
    return nf.ConditionalNormalizingFlow(q0, [nf.flows.InvertibleAffine(2)]).double()


CALLS = {
    "Composite": lambda x, c: nf.flows.Composite([nf.flows.AffineConstFlow((2,))]).double()(x)[1],
    "forward_and_log_det": lambda x, c: plain().forward_and_log_det(x)[1],
    "inverse_and_log_det": lambda x, c: plain().inverse_and_log_det(x)[1],
    "forward_kld": lambda x, c: plain().forward_kld(x),
    "conditional forward_and_log_det": lambda x, c: conditional().forward_and_log_det(x, c)[1],
    "conditional inverse_and_log_det": lambda x, c: conditional().inverse_and_log_det(x, c)[1],
    "conditional forward_kld": lambda x, c: conditional().forward_kld(x, c),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_float64_in_is_float64_out(change, name):
    x, context = (torch.randn(5, n, dtype=torch.float64) for n in (2, 3))
    assert CALLS[name](x, context).dtype == torch.float64


@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_the_determinant_is_on_the_device_of_the_data(change):
    flow = nf.flows.Composite([nf.flows.Permute(2)]).to("meta")  # as on a GPU
    try:
        _, log_det = flow(torch.empty(5, 2, device="meta"))
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(error) from error
    assert log_det.device.type == "meta"


def test_the_numbers_are_those_of_the_released_one(fix):
    x, context = (torch.randn(5, n, dtype=torch.float64) for n in (2, 3))

    def run():
        torch.manual_seed(0)
        return [call(x, context).double() for call in CALLS.values()]

    before = run()
    with fix.applied():
        after = run()
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # of float32, before
