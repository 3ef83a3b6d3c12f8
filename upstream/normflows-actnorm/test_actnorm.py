import pytest
import torch

nf = pytest.importorskip("normflows")


def model():
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [nf.flows.ActNorm((2,))])


@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_sampling_in_evaluation_changes_no_weight(change):
    torch.manual_seed(0)
    flow = model().eval()
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    flow.sample(5)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_a_single_sample_before_training_is_finite(change):
    torch.manual_seed(0)
    z, log_q = model().sample()  # one is the default
    assert z.isfinite().all()
    assert log_q.isfinite().all()


@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_the_flag_stays_where_the_layer_is(change):
    layer = nf.flows.ActNorm((2,)).double()  # as with `.to("cuda")`, which few machines have
    flag = layer.data_dep_init_done
    layer(torch.randn(8, 2, dtype=torch.float64))
    assert layer.data_dep_init_done is flag
    assert flag.dtype == torch.float64
    assert flag > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.wound("normflows", "1.7.3", raises=AssertionError)
def test_the_flag_stays_on_its_device(change):
    layer = nf.flows.ActNorm((2,)).cuda()
    layer(torch.randn(8, 2, device="cuda"))
    assert layer.data_dep_init_done.is_cuda


@pytest.mark.parametrize("shape", [(2,), (3, 1, 1)])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_the_first_batch_of_training_initialises_as_before(shape, direction, fix):
    torch.manual_seed(0)
    z = 3 + 2 * torch.randn(16, *shape[:1], *(4 for _ in shape[1:]))

    def run():
        layer = nf.flows.ActNorm(shape)
        return getattr(layer, direction)(z), layer.state_dict()

    before = run()
    with fix.applied():
        after = run()
    torch.testing.assert_close(after, before)
