import pytest
import torch

CouplingFlow = pytest.importorskip("glasflow.flows.coupling").CouplingFlow
theirs = pytest.importorskip("nflows.transforms.coupling")

MAPS = {
    theirs.AffineCouplingTransform: {},
    theirs.PiecewiseRationalQuadraticCouplingTransform: {"tails": "linear", "num_bins": 4},
}


@pytest.mark.parametrize("map", MAPS, ids=lambda made: made.__name__)
@pytest.mark.wound(
    "glasflow", "0.4.1", raises=pytest.RaisesExc(RuntimeError, match="does not inherit")
)
def test_couplings_of_the_nflows_that_is_installed_are_taken(change, map):
    torch.manual_seed(0)
    flow = CouplingFlow(map, n_inputs=3, n_transforms=4, n_conditional_inputs=2, **MAPS[map])
    x, c = torch.randn(50, 3), torch.randn(50, 2)
    z, _ = flow.forward(x, conditional=c)
    torch.testing.assert_close(flow.inverse(z, conditional=c)[0], x, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        loss = -flow.log_prob(x, conditional=c).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_other_classes_are_refused_still(fix):
    with fix.applied(), pytest.raises(RuntimeError, match="does not inherit"):
        CouplingFlow(torch.nn.Linear, n_inputs=2, n_transforms=2)
