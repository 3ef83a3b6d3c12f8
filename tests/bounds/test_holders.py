r"""The flow within a wrapper of torch's, or a module of a user's own, stands for it, or is refused."""

import collections
import contextlib
import copy
import functools
import re
import threading
import weakref

import pytest
import torch
import torch.nn as nn

from flowguard import monitor
from flowguard.bounds import attack, certify
from flowguard.bounds.holders import held, unwrapped
from flowguard.migration import migrate
from flowguard.ood import OODConditioner

zuko = pytest.importorskip("zuko")

from flowguard.integrations.zuko import RobustNSF  # noqa: E402

D, CONTEXT = 2, 3


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        yield torch.random.manual_seed(0)


def scaled(model, y):
    return 10 * model.flow(model.embed(y)).sample()


class Mixin:
    """A base class of some library's, as far as its module tells."""

    __module__ = "library.mixins"

    def louder(self, y):
        return 10 * self(y).sample()


class Holder(nn.Module):
    """What most users write."""

    def __init__(self, flow):
        super().__init__()
        self.embed = nn.Linear(5, CONTEXT)
        self.flow = flow

    def forward(self, x, y):
        return self.flow(self.embed(y)).log_prob(x)


class Given(Holder):
    def forward(self, y):
        return self.flow(self.embed(y))

    @torch.no_grad()
    def sample(self, y, n=1):
        d = self.flow(self.embed(y))
        x = d.sample((n,))
        return x.transpose(0, 1)

    def loss(self, x, y):
        return -self(y).log_prob(x).mean() + 0.1 * self.embed.weight.square().sum()

    def optimizer(self):
        return torch.optim.Adam(self.flow.parameters())


class Scaled(Holder):
    def sample(self, y):
        return 10 * self.flow(self.embed(y)).sample()


class ScaledLater(Given):
    def rescaled(self, y):
        x = self.sample(y)
        x *= 10
        return x


class ScaledBySuper(Given):
    def sample(self, y, n=1):
        return 10 * super().sample(y, n)


class InPlace(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample()
        x.mul_(10)
        return x


class HandedAway(Holder):
    def sample(self, y):
        return scaled(self, y)


class Nested(Holder):
    def sample(self, y):
        def inner():
            return self.flow(self.embed(y)).sample()

        return 10 * inner()


class ByName(Holder):
    def sample(self, y):
        return 10 * getattr(self, "fl" + "ow")(self.embed(y)).sample()


def decorated(f):
    return lambda *args: 10 * f(*args)


def wrapping(f):
    @functools.wraps(f)
    def louder(*args):
        return 10 * f(*args)

    return louder


class Decorated(Holder):
    @decorated
    def sample(self, y):
        return self.flow(self.embed(y)).sample()


class Wrapping(Holder):
    @wrapping
    def sample(self, y):
        return self.flow(self.embed(y)).sample()


class Partial(Given):
    louder = functools.partialmethod(scaled)


class Mixed(Given, Mixin):
    pass


class Amplifier:
    """Another one, whose method calls the module and names nothing of the flow."""

    __module__ = "library.amplifiers"

    def louder(self, y):
        return 10 * self(y)


class Amplified(Holder, Amplifier):
    def forward(self, y):
        return self.flow(self.embed(y)).sample()


class TransformOnly(Holder):
    def decode(self, z, y):
        return self.flow(self.embed(y)).transform.inv(10 * z)


class Opaque(Holder):
    def __getattr__(self, name):
        return super().__getattr__(name)


class IndexedInPlace(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample()
        x[...] *= 10
        return x


class DataInPlace(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample()
        x.data *= 10
        return x


class Reinterpreted(Holder):
    def sample(self, y):
        return self.flow(self.embed(y)).sample().view(torch.int32)


class Shared(Holder):
    def sample(self, y):
        global LAST
        LAST = self.flow(self.embed(y)).sample()

    def louder(self, y):
        return 10 * LAST


class Locals(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample()
        return 10 * locals()["x"]


class ByDunder(Holder):
    def sample(self, y):
        return 10 * self.__getattr__("flow")(self.embed(y)).sample()


class Called(Given):
    def __call__(self, y):
        return 10 * super().__call__(y).sample()


class CalledByName(Given):
    def sample(self, y):
        return 10 * self.__call__(y).sample()


class InTraining(Holder):
    def sample(self, y):
        return 10 * self.flow.requires_grad_()(self.embed(y)).sample()


class PartReplaced(Holder):
    def sample(self, y):
        self.flow.train().transform = None
        return self.flow(self.embed(y)).sample()


class PositionalOnly(Holder):
    def sample(self, y, /):
        return 10 * self.flow(self.embed(y)).sample()


def closed(f):
    def louder(*args):
        return 10 * f(*args)

    return louder


class Closed(Holder):
    @closed
    def sample(self, y):
        return self.flow(self.embed(y)).sample()


def property_of(f):
    return wrapping(f)


class NearlyHarmless(Holder):
    @property_of
    def sample(self, y):
        return self.flow(self.embed(y)).sample()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.prior, self.posterior = RobustNSF(D, 0), RobustNSF(D, CONTEXT)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Given(RobustNSF(D, CONTEXT, transforms=1))


@pytest.mark.parametrize("cls", [Holder, Given])
def test_a_module_that_only_holds_a_flow_is_certified_as_that(cls):
    model = cls(RobustNSF(D, CONTEXT))
    certificate = certify(model)
    assert certificate.certified
    assert certificate.model == cls.__name__
    assert certificate.bound(4.0) == certify(model.flow).bound(4.0)
    assert certificate.bound(confidence=0.999) == certify(model.flow).bound(confidence=0.999)
    row = certificate.table()[-1]
    assert "hands on" in row.depends
    assert certificate.table()[1].name.startswith("flow.")


def test_an_embedding_of_layers_is_no_second_flow():
    model = Given(RobustNSF(D, CONTEXT))
    model.embed = zuko.nn.MLP(5, CONTEXT, [8])  # a class of its own, derived from a Sequential
    assert certify(model).certified
    (refused,) = certify(
        zuko.flows.GMM(D, CONTEXT)
    ).refused  # which has such a network, and no rule
    assert "no rule for zuko.mixtures.GMM" in refused.reason


DEPARTING = {
    Scaled: "sample does more than hand on what flow samples",
    ScaledLater: "rescaled does more",
    ScaledBySuper: "sample does more",
    InPlace: "sample does more",
    HandedAway: "sample does more",
    Nested: "sample does more",
    ByName: "by getattr",
    Decorated: "no plain method",
    Wrapping: "decorated by wrapping",
    Partial: "louder is no plain method",
    Mixed: "louder does more",
    Amplified: "louder does more",
    TransformOnly: "decode does more",
    Opaque: "__getattr__",
    IndexedInPlace: "sample does more",
    DataInPlace: "sample does more",
    Reinterpreted: "sample does more",
    Shared: "sample does more",
    Locals: "by locals",
    ByDunder: "by __getattr__",
    Called: "__call__ of its own",
    CalledByName: "sample does more",
    InTraining: "sample does more",
    PartReplaced: "sample does more",
    PositionalOnly: "sample does more",
    Closed: "by *args",
    NearlyHarmless: "decorated by property_of",
}


@pytest.mark.parametrize("cls", DEPARTING)
def test_a_module_that_does_more_than_hold_is_refused_with_advice(cls):
    model = cls(RobustNSF(D, CONTEXT))
    (refused,) = certify(model).refused
    assert DEPARTING[cls] in refused.reason
    assert "model.flow" in refused.reason
    for call in (
        lambda: migrate(model, torch.randn(64, D), torch.randn(64, 5)),
        lambda: attack(model, torch.randn(2, 5), steps=1),
    ):
        with pytest.raises(TypeError, match=r"model\.flow"):
            call()


class Private(nn.Module):
    def __init__(self):
        super().__init__()
        self.__flow = RobustNSF(D, 0)

    def louder(self):
        return 10 * self.__flow().sample()


class PrivateMethod(Given):
    def __louder(self, y):
        return 10 * self.flow(self.embed(y)).sample()


def test_what_the_source_spells_otherwise_is_refused():
    for model in (Private(), PrivateMethod(RobustNSF(D, CONTEXT))):
        (refused,) = certify(model).refused
        assert "private" in refused.reason


def test_holders_of_several_flows_and_of_hidden_ones_are_refused_with_advice():
    (refused,) = certify(Two()).refused
    assert "prior, posterior" in refused.reason
    (refused,) = certify(Deep()).refused
    assert "model.inner.flow" in refused.reason
    with pytest.raises(TypeError, match="several"):
        migrate(Two(), torch.randn(64, D), torch.randn(64, 5))
    assert held(nn.Linear(2, 2)) is None


class Unrelated(Holder):
    """Samples something that is not of the flow."""

    def sample(self, y):
        return 1e9 * y


class Kept(Holder):
    """Reaches the flow by another way than its name."""

    def __init__(self, keep):
        super().__init__(RobustNSF(D, CONTEXT))
        keep(self)

    def sample(self, y):
        return 10 * self.other[0](self.embed(y)).sample()


class Behind(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flows = {"one": flow}


class Sampler:
    __slots__ = ("flow",)

    def __init__(self, flow):
        self.flow = flow


KEEPING = {
    "an object": lambda m: vars(m).update(other=[Sampler(m.flow)]),
    "an object that keeps the module": lambda m: vars(m).update(other=[Sampler(m)]),
    "a weak reference": lambda m: vars(m).update(other=[weakref.ref(m)]),
    "a queue": lambda m: vars(m).update(other=collections.deque([m.flow])),
    "a list": lambda m: vars(m).update(other=[m.flow]),
    "a list of methods": lambda m: vars(m).update(other=[m.flow.forward]),
    "a function": lambda m: vars(m).update(other=[lambda y, flow=m.flow: flow(y)]),
    "a closure": lambda m: vars(m).update(other=(lambda flow: [lambda y: flow(y)])(m.flow)),
    "a partial": lambda m: vars(m).update(other=[functools.partial(m.flow)]),
    "another name": lambda m: setattr(m, "again", m.flow),
    "another module": lambda m: setattr(m, "behind", Behind(m.flow)),
    "a part of it": lambda m: vars(m).update(other=[m.flow.transform]),
}


@pytest.mark.parametrize("keep", KEEPING.values(), ids=KEEPING)
def test_a_holder_that_keeps_its_flow_elsewhere_too_is_refused(keep):
    (refused,) = certify(Kept(keep)).refused
    assert "keeps flow, or a part of it, elsewhere too" in refused.reason


def test_what_holders_keep_beside_their_flow_is_no_reason():
    def keep(model):
        model.other = [model.embed, len, {"lr": 0.1}, torch.zeros(2), functools.partial(len, [])]

    model = Given(RobustNSF(D, CONTEXT))
    keep(model)
    assert certify(model).certified


class Elsewise(Holder):
    """Returns something else on some way."""

    def sample(self, y):
        return self.flow(self.embed(y)).sample() if bool(y.isfinite().all()) else y.nan_to_num()


class EarlyReturn(Holder):
    def sample(self, y):
        if self.training:
            return 1e9 * y
        return self.flow(self.embed(y)).sample()


class Overwritten(Holder):
    def sample(self, y):
        x = y.nan_to_num()
        if bool(y.isfinite().all()):
            x = self.flow(self.embed(y)).sample()
        return x


class OverwrittenLater(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample()
        if not bool(y.isfinite().all()):
            x = y.nan_to_num()
        return x.unsqueeze(0)


class Looped(Holder):
    def sample(self, y):
        x = y
        for _ in range(len(y)):
            x = self.flow(self.embed(y)).sample()
        return x


class Failing(Holder):
    def sample(self, y):
        try:
            x = self.flow(self.embed(y)).sample()
        except ValueError:
            x = y
        return x


class Matched(Holder):
    def sample(self, y):
        match len(y):
            case 0:
                x = y
            case _:
                x = self.flow(self.embed(y)).sample()
        return x


class Fallback(Holder):
    def other(self, y):
        return y.nan_to_num()

    def sample(self, y):
        return self.flow(self.embed(y)).sample() if self.training else self.other(y)


class Chosen(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample() if self.training else y
        return x.flatten(1)


class Constant(Holder):
    def sample(self, y):
        x = 1e9 * torch.ones(D)
        if self.training:
            x = self.flow(self.embed(y)).sample()
        return x


class Walrus(Holder):
    def sample(self, y):
        if (x := y).sum() > 0:
            x = self.flow(self.embed(y)).sample()
        return x


class Swapped(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample()
        x, z = y, x
        return x if self.training else z


class Indexed(Holder):
    def sample(self, y):
        return (self.flow(self.embed(y)).sample(), y)[1]


class Unpacked(Holder):
    def sample(self, y):
        x, far = self.flow(self.embed(y)).sample(), 1e9 * y
        return x if self.training else far


class Imported(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample()
        if self.training:
            import math as x
        return x


class Defined(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample()
        if self.training:

            def x():
                return 1e9

        return x


class Yielding(Holder):
    def sample(self, y):
        yield 1e9 * y
        return self.flow(self.embed(y)).sample()


class AtLast(Holder):
    def sample(self, y):
        try:
            return self.flow(self.embed(y)).sample()
        finally:
            return 1e9 * y  # noqa: B012


class NoDensity(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).log_prob(y[:, :D])
        if self.training:
            x = 1e9 * y
            return x.flatten(1)
        return self.flow(self.embed(y)).sample()


class Both(Holder):
    def both(self, y):
        return self.flow(self.embed(y)).sample(), 1e9 * y


class IndexedLater(Both):
    def sample(self, y):
        return self.both(y)[1]


class UnpackedLater(Both):
    def sample(self, y):
        x, other = self.both(y)
        return x if self.training else other


class InTheEnd(Holder):
    def sample(self, y):
        x = 1e9 * y
        try:
            x = self.flow(self.embed(y)).sample()
        finally:
            return x  # noqa: B012


class Overridden(Given):
    def sample(self, y, n=1):
        return self.draw(y)

    def draw(self, y):
        return self.flow(self.embed(y)).sample()


class Overriding(Overridden):
    def draw(self, y):
        return 1e9 * y


class Chosen2(Holder):
    def sample(self, y):
        good = self.flow(self.embed(y)).log_prob(y[:, :D])[:, None] > 0
        if self.training:
            return torch.where(good, 1e9 * y, y)
        return self.flow(self.embed(y)).sample()


class Suppressed(Holder):
    def __init__(self, flow):
        super().__init__(flow)
        self.guard = contextlib.suppress(ValueError)

    def sample(self, y):
        x = y
        with self.guard:
            x = self.flow(self.embed(y)).sample()
        return x.flatten(1)


class Captured(Holder):
    def sample(self, y):
        x = self.flow(self.embed(y)).sample()
        match [1, 2]:
            case [_, *x]:
                pass
        return x


@pytest.mark.parametrize(
    "cls",
    [
        Unrelated,
        IndexedLater,
        UnpackedLater,
        InTheEnd,
        Chosen2,
        Suppressed,
        Captured,
        Constant,
        Walrus,
        Swapped,
        Indexed,
        Unpacked,
        Imported,
        Defined,
        Yielding,
        AtLast,
        NoDensity,
        Elsewise,
        EarlyReturn,
        Overwritten,
        OverwrittenLater,
        Looped,
        Failing,
        Matched,
        Fallback,
        Chosen,
    ],
)
def test_a_holder_that_returns_something_else_on_some_way_is_refused(cls):
    (refused,) = certify(cls(RobustNSF(D, CONTEXT))).refused
    assert "its sample may return something else than flow samples" in refused.reason


def test_what_a_subclass_overrides_counts_too():
    assert certify(Overridden(RobustNSF(D, CONTEXT))).certified
    (refused,) = certify(Overriding(RobustNSF(D, CONTEXT))).refused
    assert "its draw may return something else" in refused.reason


class WrappedLater(Holder):
    def sample(self, y):
        return self.flow(self.embed(y)).sample()

    sample = wrapping(sample)


def test_a_method_that_is_wrapped_without_a_decorator_is_refused():
    (refused,) = certify(WrappedLater(RobustNSF(D, CONTEXT))).refused
    assert "its sample is wrapped by a function" in refused.reason


class OneOrTheOther(Holder):
    """Samples and densities, on several ways, and nothing else."""

    def density(self, x, y):
        return self.flow(self.embed(y)).log_prob(x)

    def loss(self, x, y):
        mean = self.density(x, y).mean()
        decay = self.embed.weight.square().sum()
        return {"loss": 0.1 * decay - mean, "mean": mean}

    def forward(self, y, x=None):
        if x is not None:
            return self.loss(x, y)
        weight = next(iter(self.parameters()))
        device = weight.device
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self.first(y.to(device)) if len(y) == 1 else self.later(y)

    def first(self, y):
        try:
            x = self.flow(self.embed(y)).sample()
        except ValueError:
            x = self.flow(self.embed(y.nan_to_num())).sample()
        return x

    def fit(self, x, y):
        optimizer = torch.optim.Adam(self.parameters())
        self.loss(x, y)["loss"].backward()
        optimizer.step()
        return self

    def later(self, y):
        match len(y):
            case 0:
                return None
            case _:
                x = self.flow(self.embed(y)).sample()
                return x, y

    def until(self, y):
        while True:
            x = self.flow(self.embed(y)).sample()
            if self.training:
                return x


def test_a_holder_that_returns_samples_and_densities_is_certified():
    assert certify(OneOrTheOther(RobustNSF(D, CONTEXT))).certified


class Averages:
    """Weights of another time, put in place for a while."""

    def __init__(self, parameters):
        self.held = [weakref.ref(p) for p in parameters]

    @contextlib.contextmanager
    def __call__(self):
        live = [p().detach().clone() for p in self.held]
        for p in self.held:
            p().data.mul_(1e3)
        yield
        for p, before in zip(self.held, live, strict=True):
            p().data.copy_(before)


@contextlib.contextmanager
def other_weights():
    yield


class Averaged(Holder):
    def __init__(self, flow):
        super().__init__(flow)
        self.averages = Averages(self.flow.parameters())

    def sample(self, y):
        with self.averages():
            return self.flow(self.embed(y)).sample()


class Within(Holder):
    def sample(self, y):
        with other_weights():
            return self.flow(self.embed(y)).sample()


class Copied(Holder):
    def sample(self, y):
        torch._foreach_mul_(list(self.flow.parameters()), 2.0)
        return self.flow(self.embed(y)).sample()


class Moving(nn.Module):
    """Averages as a module, in other memory that is the same."""

    def __init__(self, parameters):
        super().__init__()
        self.live = [p.data for p in parameters]

    @contextlib.contextmanager
    def swapped(self):
        yield


class AveragedByModule(Holder):
    def __init__(self, flow):
        super().__init__(flow)
        self.averages = Moving(self.flow.parameters())

    def sample(self, y):
        with self.averages.swapped():
            return self.flow(self.embed(y)).sample()


class ChangedByMode(Holder):
    def train(self, mode=True):
        for p in self.parameters():
            p.data.mul_(10)
        return super().train(mode)

    def sample(self, y):
        self.eval()
        return self.flow(self.embed(y)).sample()


class Hooked(Holder):
    def sample(self, y):
        self.register_forward_hook(lambda module, inputs, output: 10 * output)
        return self.flow(self.embed(y)).sample()


class Loaded(Holder):
    def sample(self, y):
        self.load_state_dict(torch.load("other.pt"))
        return self.flow(self.embed(y)).sample()


class ChangedBefore(Holder):
    def louder(self):
        for p in self.parameters():
            p.data.mul_(1e3)

    def sample(self, y):
        self.louder()
        return self.flow(self.embed(y)).sample()


CHANGING = {
    AveragedByModule: "sample uses its averages, which keeps flow, or weights of it",
    ChangedByMode: "train may change the weights of flow: self.parameters",
    Hooked: "sample may change the weights of flow: self.register_forward_hook",
    Loaded: r"sample may change the weights of flow: self.load_state_dict",
    ChangedBefore: r"louder may change the weights of flow: self.parameters",
    Averaged: "sample uses its averages, which keeps flow, or weights of it",
    Within: r"sample may change the weights of flow: other_weights\(\)",
    Copied: r"sample may change the weights of flow: self.flow.parameters\(\)",
}


@pytest.mark.parametrize("cls", CHANGING)
def test_a_holder_that_may_sample_with_other_weights_is_refused(cls):
    (refused,) = certify(cls(RobustNSF(D, CONTEXT))).refused
    assert re.search(f"its {CHANGING[cls]}", refused.reason)


def test_what_leaves_the_weights_as_they_are_may_be_used():
    class Locked(Holder):
        def __init__(self, flow):
            super().__init__(flow)
            self.lock = threading.Lock()
            self.options = {"rows": [1, 2], "averages": Averages(self.embed.parameters())}

        def sample(self, y):
            with self.lock, torch.inference_mode():
                return self.flow(self.embed(y)).sample((self.options["rows"][0],))

    assert certify(Locked(RobustNSF(D, CONTEXT))).certified


class Undecided(nn.Module):
    """A layer that its noise is handed to, as it was given or not."""

    def __init__(self):
        super().__init__()
        pytest.importorskip("nflows")
        from flowguard.integrations.nflows import RobustSplineCDF

        self.flow = RobustSplineCDF([D])


class LouderNoise(Undecided):
    def decode(self, z):
        z.mul_(10)
        return self.flow.inverse(z)


class RenamedNoise(Undecided):
    def decode(self, z):
        w = z
        w += 10
        return self.flow.inverse(z)


class FilledNoise(Undecided):
    def decode(self, z):
        z[...] = 10
        return self.flow.inverse(z)


class NoiseAsGiven(Undecided):
    def decode(self, z):
        if z.shape[-1] != D:
            raise ValueError("as many features as the flow has")
        return self.flow.inverse(z)


@pytest.mark.parametrize("cls", [LouderNoise, RenamedNoise, FilledNoise])
def test_noise_that_is_changed_before_the_flow_has_it_is_refused(cls):
    (refused,) = certify(cls()).refused
    assert "decode does more" in refused.reason


def test_noise_that_is_handed_on_as_it_was_given_is_certified():
    assert certify(NoiseAsGiven()).certified


class LooksCompiled(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self._orig_mod = flow

    def forward(self, y):
        return 10 * self._orig_mod(y).sample()


def test_what_only_looks_like_a_compiled_module_is_no_wrapper():
    model = LooksCompiled(RobustNSF(D, CONTEXT))
    assert unwrapped(model) == ((), model)
    (refused,) = certify(model).refused
    assert "forward does more" in refused.reason


def test_a_holder_whose_instance_or_hooks_change_it_is_refused():
    model = Given(RobustNSF(D, CONTEXT))
    model.sample = lambda y: scaled(model, y)
    assert "sample of its own" in certify(model).refused[0].reason
    model = Given(RobustNSF(D, CONTEXT))
    model.register_forward_hook(lambda *a: None)
    assert "hooks" in certify(model).refused[0].reason


@pytest.mark.parametrize("cls", [Holder, Given])
@pytest.mark.parametrize("kind", ["MAF", "NSF"])
def test_a_holder_is_migrated_as_a_whole(cls, kind):
    model = cls(getattr(zuko.flows, kind)(D, CONTEXT, transforms=2, hidden_features=(16,)))
    x, y = torch.randn(1024, D), torch.randn(1024, 5)
    before = copy.deepcopy(model.state_dict())
    robust, report = migrate(model, x, y)
    assert type(robust) is cls
    assert robust is not model
    assert [r.name for r in report.replaced] == [f"flow.transform.transforms.{i}" for i in (0, 1)]
    assert certify(robust).certified
    assert report.certificate_after.bound(4.0) == certify(robust).bound(4.0)
    assert not report.certificate_before.certified
    score = lambda m: m(x, y) if cls is Holder else m(y).log_prob(x)  # noqa: E731
    with torch.no_grad():
        assert (score(robust) - score(model)).mean().abs() < 1e-3
    assert report.sample_error is None or report.sample_error.median < 1e-4
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    tuned, report = migrate(model, x, y, steps=5)
    assert report.nll_after < report.nll_swapped
    assert not torch.equal(tuned.embed.weight, model.embed.weight)  # it is trained with the flow
    assert attack(robust, y[:4], steps=5, restarts=1).value <= certify(robust).bound(4.0)


def test_the_attack_ascends_the_condition_that_the_holder_takes():
    model = Given(zuko.flows.MAF(D, CONTEXT, transforms=3))
    y = torch.randn(4, 5)
    result = attack(model, y, steps=20, restarts=1)
    assert result.context.shape == (1, 5)
    with torch.no_grad():
        again = model(result.context).transform.inv(result.noise)
    assert again.abs().max().item() == pytest.approx(result.value, rel=1e-4)
    assert result.trace[0, -1] > 10 * result.trace[0, 0]


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "sequential": nn.Sequential,
    "several": lambda m: nn.DataParallel(torch.optim.swa_utils.AveragedModel(m)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_as_what_they_hold(wrap):
    flow = zuko.flows.MAF(D, CONTEXT, transforms=2, hidden_features=(16,))
    holding = wrap is WRAPPERS["averaged"]
    inner = Given(flow) if holding else flow
    model = wrap(inner)
    x, y = torch.randn(512, D), torch.randn(512, 5 if holding else CONTEXT)
    robust, report = migrate(model, x, y)
    assert type(robust) is type(model)
    names, found = unwrapped(robust)
    assert names == unwrapped(model)[0]
    assert type(found) is type(inner)
    assert report.replaced[0].name.startswith(".".join(names))
    assert report.certificate_after.certified
    assert certify(robust).bound(4.0) == certify(found).bound(4.0)
    value = attack(robust, y[:4], steps=2, restarts=1).value
    assert value <= certify(robust).bound(4.0)
    assert torch.equal(robust(y[:3]).log_prob(x[:3]), found(y[:3]).log_prob(x[:3]))
    assert certify(unwrapped(model)[1]).certified is False  # the model itself is not changed


def test_distributed_models_are_wrapped_again(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        flow = zuko.flows.MAF(D, CONTEXT, transforms=2, hidden_features=(16,))
        model = nn.parallel.DistributedDataParallel(flow)
        robust, report = migrate(model, torch.randn(512, D), torch.randn(512, CONTEXT), bins=4,
                                 fit_steps=5)  # fmt: skip
        assert type(robust) is type(model)
        assert report.certificate_after.certified
        (-robust(torch.randn(8, CONTEXT)).log_prob(torch.randn(8, D)).mean()).backward()
        assert all(p.grad is not None for p in robust.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_weights_of_a_wrapper_load_and_the_users_own_density_gets_the_wrapper():
    flow = zuko.flows.MAF(D, CONTEXT, transforms=2, hidden_features=(16,))
    model, other = nn.DataParallel(flow), nn.DataParallel(copy.deepcopy(flow))
    nn.init.normal_(next(other.parameters()))
    seen = []

    def log_prob(m, x, y):
        seen.append(type(m))
        return m.module(y).log_prob(x)

    x, y = torch.randn(256, D), torch.randn(256, CONTEXT)
    robust, _ = migrate(model, x, y, state_dict=other.state_dict(), log_prob=log_prob)
    assert set(seen) == {nn.DataParallel}
    first = next(robust.parameters())
    assert torch.equal(first, next(other.parameters()))


@pytest.mark.parametrize("wrap", [Given, nn.DataParallel, nn.Sequential])
def test_a_monitor_finds_the_conditioners_within(wrap):
    class Encoded(nn.Module):
        def __init__(self):
            super().__init__()
            self.guard = OODConditioner(nn.Linear(5, CONTEXT), policy="report")

        def forward(self, y):
            return self.guard(y)

    inner = Encoded()
    inner.guard.fit(torch.randn(256, 5), progress=False).calibrate(
        torch.randn(1024, 5), progress=False
    )
    model = wrap(inner)
    call = model.flow if wrap is Given else model
    with monitor(model) as watch:
        call(torch.randn(2, 5))
    assert len(watch.report.flagged) == 2


@pytest.mark.slow
def test_a_lightning_module_that_holds_a_flow_is_certified_and_migrated():
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, CONTEXT)
            self.flow = zuko.flows.MAF(D, CONTEXT, transforms=1, hidden_features=(16,))

        def forward(self, y):
            return self.flow(self.embed(y))

        def training_step(self, batch, index):
            x, y = batch
            loss = -self(y).log_prob(x).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    model = Lit()
    robust, report = migrate(model, torch.randn(256, D), torch.randn(256, 5))
    assert type(robust) is Lit
    assert report.certificate_after.certified


class Density(nn.Module):
    """A loss, with data and condition in the other order."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, y, x):
        return -self.flow(y).log_prob(x).mean()


class Standardised(Density):
    def forward(self, y, x):
        return self.flow(y).log_prob(x / 2) - 2 * torch.tensor(2.0).log()


def test_the_density_of_a_holder_is_checked_against_that_of_its_flow():
    flow = zuko.flows.MAF(D, D, transforms=1, hidden_features=(16,))
    x, y = torch.randn(256, D), torch.randn(256, D)  # of one shape: the order is told by the flow
    _, report = migrate(Density(flow), x, y)
    with torch.no_grad():
        assert report.nll_before == pytest.approx(-flow(y).log_prob(x).mean().item(), abs=1e-4)
    with pytest.raises(TypeError, match=r"does more than hold its flow.*migrate model\.flow"):
        migrate(Standardised(flow), x, y)


def test_holders_of_flows_of_other_libraries():
    nflows = pytest.importorskip("nflows")
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import MaskedAffineAutoregressiveTransform as Masked

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, CONTEXT)
            self.flow = Flow(Masked(D, 16, context_features=CONTEXT), StandardNormal([D]))

        def forward(self, x, y):
            return self.flow.log_prob(x, context=self.embed(y))

        def sample(self, n, y):
            return self.flow.sample(n, self.embed(y))

    assert nflows
    model, x, y = Model(), torch.randn(256, D), torch.randn(256, 5)
    robust, report = migrate(model, x, y)
    assert report.certificate_after.certified
    assert attack(robust, y[:4], steps=3, restarts=1).value <= certify(robust).bound(4.0)
    with torch.no_grad():
        assert (robust(x, y) - model(x, y)).mean().abs() < 1e-3
