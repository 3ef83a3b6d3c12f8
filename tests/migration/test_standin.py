r"""Functions that are computed by flowguard for a while: what is put in place, for whom and when."""

import asyncio
import inspect
import threading
from types import SimpleNamespace

import pytest
import torch

from flowguard.migration.standin import StandIn, Switch, disagreement

EMPTY = inspect.Parameter.empty


def theirs(x, by=1.0):
    return (x + by,)


def ours(x, by=1.0):
    return (by + x,)


class Host(SimpleNamespace):
    __name__ = "host"


@pytest.fixture
def host():
    return Host(f=lambda: "theirs", g=lambda: "their g")


@pytest.fixture
def switch(host):
    made = Switch("test", lambda: [StandIn(host, "f", lambda _: lambda: "ours", lambda _: "")])
    yield made
    made.turn_off()


def test_on_and_off(host, switch):
    before = host.f
    assert not switch.active
    switch.turn_on()
    switch.turn_on()
    assert (switch.active, host.f(), host.g()) == (True, "ours", "their g")
    assert switch.theirs(host, "f") is before
    switch.turn_off()
    switch.turn_off()
    assert host.f is before
    assert switch.theirs(host, "f") is before


def test_the_last_one_to_leave_takes_it_back(host, switch):
    before = host.f
    inside, leave = threading.Event(), threading.Event()
    said = []

    def other():
        with switch.on():
            said.append(host.f())
            inside.set()
            leave.wait(60)
            said.append(host.f())

    thread = threading.Thread(target=other)
    with switch.on():
        thread.start()
        assert inside.wait(60)
    assert host.f is not before
    assert host.f() == "theirs"  # for this thread
    leave.set()
    thread.join()
    assert said == ["ours", "ours"]
    assert host.f is before


def test_tasks_have_their_own(host, switch):
    async def inside():
        with switch.on():
            await asyncio.sleep(0)
            return host.f()

    async def outside():
        await asyncio.sleep(0)
        return host.f()

    async def both():
        return await asyncio.gather(inside(), outside(), inside(), outside())

    assert asyncio.run(both()) == ["ours", "theirs", "ours", "theirs"]


def test_all_or_nothing(host):
    before = host.f, host.g
    refused = [
        StandIn(host, "f", lambda _: lambda: "ours", lambda _: ""),
        StandIn(host, "g", lambda _: lambda: "ours", lambda _: "it is green"),
    ]
    switch = Switch("test", lambda: refused)
    for turn in (switch.turn_on, switch.on().__enter__, switch.check):
        with pytest.raises(RuntimeError, match=r"host\.g is not .*, as it is green; nothing was"):
            turn()
    assert (host.f, host.g) == before
    assert not switch.active


def test_what_was_known_once_is_looked_at_again(host):
    reasons = [""]
    switch = Switch("test", lambda: [StandIn(host, "f", lambda f: f, lambda _: reasons[0])])
    with switch.on():
        pass
    reasons[0] = "it has changed"
    with pytest.raises(RuntimeError, match="it has changed"), switch.on():
        pass


PARAMETERS = {"x": EMPTY, "by": 1.0}
CALLS = [([torch.ones(3, dtype=torch.float64)], {"by": by}) for by in (1.0, 2.0)]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (theirs, ""),
        (lambda x, by=2.0: (x + by,), "it has other parameters or defaults: (x, by=2.0)"),
        (lambda x, by=1.0: (x + 1,), "with by=2.0 it returns other numbers"),
        (lambda x, by=1.0: (x[:2] + by,), "with by=1.0 it returns other numbers"),
        (lambda x, by=1.0: (x + by, x), "with by=1.0 it raises ValueError"),
        (lambda x, by=1.0: 1 / 0, "with by=1.0 it raises ZeroDivisionError: division by zero"),
        (lambda x, by=1.0: (x + by + 1e-7,), "with by=1.0 it returns other numbers"),
    ],
)
def test_a_disagreement_is_told_in_words(function, words):
    told = disagreement(function, ours, CALLS, parameters=PARAMETERS)
    assert told.startswith(words)
    assert bool(told) == bool(words)
