r"""Modules that take the place of others, whatever the library."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn as nn

from flowguard.migration.exchange import exchange, overhear, successor


class Layer(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("unit", torch.ones(2), persistent=False)
        self.option = 3

    def inverse(self, z):
        return self(z)


class Robust(Layer):
    def __init__(self):
        raise AssertionError("no constructor runs")

    def forward(self, x):
        return super().forward(x) + self.head(x)


def test_a_successor_has_all_but_what_differs():
    old = Layer().eval()
    old.weight.requires_grad_(False)
    calls = []
    hook = old.register_forward_hook(lambda module, inputs, output: calls.append(module))
    before, had = copy.deepcopy(old.state_dict()), set(vars(old))
    new = successor(old, Robust, without=("option",), head=nn.Linear(2, 2))
    assert type(new) is Robust
    assert new.weight is old.weight
    assert new.unit is old.unit
    assert not new.training
    assert not hasattr(new, "option")
    assert list(new.state_dict()) == ["weight", "bias", "head.weight", "head.bias"]
    new(torch.ones(1, 2))
    assert calls == [new]
    # The old one is as it was.
    assert list(old.state_dict()) == list(before)
    assert set(vars(old)) == had
    assert old.option == 3
    hook.remove()  # pickle refuses its lambda
    for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(successor(old)))):
        assert torch.equal(again.weight, old.weight)


def test_hooks_that_know_their_module_know_the_new_one():
    seen = []
    old = Layer()
    old.register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    new = successor(old)
    gone = weakref.ref(old)
    del old
    gc.collect()
    assert gone() is None
    new.load_state_dict(new.state_dict())
    assert seen == [new]


def test_an_exchange_reaches_every_reference():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.first = self.layers[0]
            self.plain = [self.layers[0], 1]
            self.named = {"it": self.layers[0]}
            vars(self)["hidden"] = self.layers[0]

    model = Model()
    old, other = model.layers
    new = successor(old)
    assert exchange(model, old, new) is model
    found = (model.layers[0], model.first, model.plain[0], model.named["it"], model.hidden)
    assert all(m is new for m in found)
    assert model.layers[1] is other
    assert model.plain[1] == 1
    assert exchange(old, old, new) is new


@pytest.mark.parametrize("own", [False, True])
def test_what_is_overheard(own):
    layer = Layer()
    if own:  # a method of the object alone is put back
        vars(layer)["inverse"] = lambda z: z - 1
    before = dict(vars(layer))
    told = []
    with overhear(layer, None, lambda *what: told.append(what)):
        x = torch.ones(1, 2)
        layer.inverse(x)
    directions = [what[0] for what in told]
    assert directions == (["inverse"] if own else ["forward", "inverse"])
    assert all(what[1] is x and what[3] is None for what in told)
    assert vars(layer) == before


def test_a_network_is_overheard_before_anyone_writes_into_it():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

        def forward(self, x):
            return self.net(x).mul_(0)

        def inverse(self, x):
            raise RuntimeError("not today")

    layer, told = Writing(), []
    x = torch.randn(3, 2)
    with overhear(layer, layer.net, lambda *what: told.append(what)):
        layer(x)
        with pytest.raises(RuntimeError, match="not today"):
            layer.inverse(x)
    assert len(told) == 1
    assert torch.equal(told[0][3], layer.net(x))
    assert not set(vars(layer)) & {"forward", "inverse"}
    assert not layer.net._forward_hooks


class Called(nn.Module):
    r"""A network that is called past the hooks of its module."""

    def __call__(self, x):
        return 3 * x


def test_a_network_that_is_called_past_its_hooks_is_heard():
    layer = Layer()
    layer.net = Called()
    layer.forward = lambda x: layer.net(x)
    told = []
    with overhear(layer, layer.net, lambda *all: told.append(all)):
        layer(torch.ones(1, 2))
    ((direction, _, _, said),) = told
    assert direction == "forward"
    assert torch.equal(said, torch.full((1, 2), 3.0))
    assert type(layer.net) is Called
    layer(torch.ones(1, 2))
    assert len(told) == 1
