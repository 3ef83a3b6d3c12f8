r"""Tests for the course of a migration, whatever the library."""

import pytest
import torch

from flowguard.image import ConditionalMultiscaleFlow
from flowguard.migration import migrate
from flowguard.migration.run import typical


def test_an_absurd_row_is_no_typical_one():
    torch.manual_seed(0)
    likely = -torch.randn(2000, 4).square().sum(1) / 2
    likely[3] = -450.0
    likely[4] = torch.nan
    assert (~typical(likely)).nonzero()[:, 0].tolist() == [3, 4]


@pytest.mark.parametrize("n", [2, 8, 19, 20, 100, 2000])
def test_ordinary_rows_are_all_typical(n):
    torch.manual_seed(n)
    for law in (torch.distributions.Normal(0.0, 1.0), torch.distributions.StudentT(2.0)):
        assert typical(law.log_prob(law.sample((n, 4))).sum(1)).all()
    assert typical(torch.zeros(n)).all()


def test_many_absurd_rows_are_a_part_of_the_data():
    likely = torch.zeros(1000)
    likely[:11] = -1e6
    assert typical(likely).all()
    likely[10] = 0.0
    assert (~typical(likely)).sum() == 10


def test_of_few_rows_none_is_an_outlier():
    assert typical(torch.tensor([-1e6, *[0.0] * 18])).all()
    assert not typical(torch.tensor([-1e6, *[0.0] * 19])).all()


def test_a_single_row_is_refused_with_the_rule():
    flow = ConditionalMultiscaleFlow(3, 8, levels=1, steps=1, hidden=8, coupling="affine")
    x, y = torch.rand(1, 3, 4, 4), [torch.randn(1, 8, 2, 2)]
    with pytest.raises(ValueError, match=r"at least two rows.*got \(1, 3, 4, 4\)"):
        migrate(flow, x, y)


@pytest.mark.parametrize(
    "given", ["flow.pt", torch.nn.Linear(2, 2).state_dict()], ids=["file", "state"]
)
def test_weights_without_their_flow_are_refused(given):
    with pytest.raises(
        TypeError, match=r"must be a module; got .*: build the flow that the weights"
    ):
        migrate(given, torch.rand(9, 2))


def test_of_what_is_no_flow_the_libraries_are_named():
    with pytest.raises(
        TypeError, match=r"migrate Linear: give a flow of .*nflows, normflows, pyro"
    ):
        migrate(torch.nn.Linear(2, 2), torch.rand(9, 2))
