r"""Tests for the order in which features are worked out."""

import pytest
import torch
import torch.nn as nn

from flowguard.autoregression import (
    RowsOfFeatures,
    inverse_in_passes,
    invert,
    is_elementwise,
    order_of,
    replaced,
    schedule,
)
from flowguard.numerics import unhooked


def test_groups_come_in_the_order_of_what_they_depend_on():
    parents = torch.zeros(4, 4, dtype=torch.bool)
    parents[0, 2] = parents[1, 2] = parents[3, 0] = parents[3, 1] = True
    assert [g.tolist() for g in order_of(parents, 3)] == [[2], [0, 1], [3]]


def test_more_groups_than_passes_are_refused():
    assert order_of(torch.ones(4, 4).tril(-1) > 0, 3) is None


def test_features_that_wait_for_each_other_are_refused():
    parents = torch.zeros(3, 3, dtype=torch.bool)
    parents[0, 1] = parents[1, 0] = True
    assert order_of(parents, 3) is None


@pytest.mark.parametrize("grad", [False, True])
def test_a_context_of_more_rows_than_what_is_mapped_makes_as_many(grad):
    c = torch.arange(6.0).reshape(3, 2).requires_grad_(grad)

    def solve(x, features):
        return y[features] - c[:, features] - x.sum(-1, keepdim=True), None

    y = torch.tensor([1.0, 10.0])
    x, _ = invert(y, [torch.tensor([0]), torch.tensor([1])], solve)
    assert x.tolist() == [[1.0, 8.0], [-1.0, 8.0], [-3.0, 8.0]]
    if grad:
        x.sum().backward()
        assert c.grad.tolist() == [[0.0, -1.0]] * 3


def test_what_is_solved_with_and_what_is_returned_can_be_viewed():
    y, groups = torch.randn(5, 3), [torch.tensor([k]) for k in range(3)]

    def solve(x, features):  # networks of users may do so with their input
        return y[:, features] - x.view(-1).view(5, 3).sum(-1, keepdim=True), None

    def in_passes(values, told, features):
        return values - told, None

    made = invert(y, groups, solve)[0]
    known = torch.zeros(5, 1)

    def net(new):
        nonlocal known
        known = known + new.sum(-1, keepdim=True)
        return known

    again = inverse_in_passes(net, y, groups, in_passes)[0]
    assert torch.equal(made.view(-1), again.view(-1))


def test_a_narrowed_network_speaks_of_some_features_and_leaves_the_old_one_as_it_is():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6))
    net[2].mask = torch.randint(2, (6, 4)).float()
    rows = RowsOfFeatures(net[2], 3)
    twin = replaced(net, {net[2]: rows})
    x = torch.randn(5, 3)
    h = net[1](net[0](x))
    whole = nn.functional.linear(h, net[2].weight * net[2].mask, net[2].bias)
    rows.features = torch.tensor([2, 0])
    expected = whole.unflatten(-1, (3, 2))[:, [2, 0]].flatten(1)
    assert torch.allclose(twin(x), expected, atol=1e-6)
    assert type(net[2]) is nn.Linear


def test_who_is_listened_to_is_not_run_in_parts():
    layer = nn.Linear(2, 2)
    assert unhooked(layer)
    hook = layer.register_forward_hook(lambda *_: None)
    assert not unhooked(layer)
    hook.remove()
    assert unhooked(layer)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not unhooked(layer)
    finally:
        hook.remove()


def test_what_was_compiled_is_not_run_in_parts():
    layer = nn.Linear(2, 2)
    layer.compile(backend="eager")
    assert not unhooked(layer)


def test_a_schedule_is_kept_until_a_mask_changes():
    net, first, last = nn.Module(), torch.ones(3, 3).tril(), torch.ones(3, 3).tril(-1)
    found = schedule(net, [first], last, 3, 3)
    assert schedule(net, [first.clone()], last, 3, 3) is found
    assert schedule(net, [first], last, 3, 2) is None
    first.copy_(torch.ones(3, 3).triu())
    last.data.copy_(torch.ones(3, 3).triu(1))  # of which a tensor knows no version
    again = schedule(net, [first], last, 3, 3)
    assert [g.tolist() for g in again.groups] == [[2], [1], [0]]


def test_a_schedule_is_one_of_how_layers_follow_each_other_too():
    net, eye, swap = nn.Module(), torch.eye(2), torch.eye(2).flip(0)
    last = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert schedule(net, [eye, [swap, eye]], last, 2, 2) is None  # the sum tells of both
    found = schedule(net, [eye, swap, eye], last, 2, 2)
    assert [g.tolist() for g in found.groups] == [[0], [1]]


def test_units_are_known_with_the_last_feature_that_they_depend_on():
    first = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # a context is last
    last = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = schedule(nn.Module(), [first], last, 2, 2)
    assert [g.tolist() for g in found.groups] == [[0], [1]]
    hidden, told = found.places
    assert (hidden.taken.tolist(), hidden.taken_ends) == ([2, 0, 1], [1, 2])
    assert (hidden.told.tolist(), hidden.told_counts) == ([1, 2, 0], [1, 1])
    assert (told.told.tolist(), told.told_counts) == ([0, 1], [1, 1])


def test_a_sum_that_is_known_later_than_what_is_added_to_is_not_taken_apart():
    first, inner = torch.eye(4)[:, :3], torch.zeros(4, 4)
    first[3, 0] = 1.0
    last = torch.zeros(3, 4)
    last[1, 3] = last[2, 0] = 1.0
    chain = [first, [torch.eye(4), inner]]
    assert schedule(nn.Module(), chain, last, 3, 3).places is not None
    inner[0, 1] = 1.0  # the second unit tells the first one, which does not wait for it
    found = schedule(nn.Module(), chain, last, 3, 3)
    assert [g.tolist() for g in found.groups] == [[0], [1], [2]]
    assert found.places is None


def test_masks_without_numbers_have_no_schedule():
    mask = torch.ones(2, 2, device="meta")
    assert schedule(nn.Module(), [mask], mask, 2, 2) is None


@pytest.mark.parametrize(
    "f", [lambda x: x, nn.functional.softmax, nn.GLU(), nn.PReLU(), nn.Linear]
)
def test_what_is_not_known_to_be_elementwise(f):
    assert not is_elementwise(f)
