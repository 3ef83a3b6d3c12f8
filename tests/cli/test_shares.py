r"""Several processes: whose share is what, and what they tell each other. Threads stand for them."""

import json
import threading
import time

import pytest

from flowguard.cli import shares
from flowguard.cli.shares import FOLDER, Account, Ledger, Share, SignOfLife, share_of


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(shares, "BEAT", 0.02)
    monkeypatch.setattr(shares, "POLL", 0.01)


ENVIRONMENTS = {
    "none": ({}, Share()),
    "torchrun": (
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        Share(5, 8, 1, 4),
    ),
    "srun": (
        {
            "SLURM_PROCID": "6",
            "SLURM_STEP_NUM_TASKS": "7",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        },
        Share(6, 7, 0, 2),
    ),
    "a job without srun": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
        Share(),
    ),
    "torchrun within srun": (
        {"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        Share(3, 4),
    ),
    "half of it": ({"RANK": "1"}, Share()),
}


@pytest.mark.parametrize(("environment", "share"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_launchers_say_which_process_it_is(environment, share):
    assert share_of(environment) == share


@pytest.mark.parametrize("rank", ["2", "-1", "one", "1.0"])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(ValueError, match=f"RANK must be .* WORLD_SIZE.*got '{rank}' and '2'"):
        share_of({"RANK": rank, "WORLD_SIZE": "2"})


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
def test_each_item_is_in_one_share(world):
    items = list(range(17))
    parts = [Share(rank, world).of(items) for rank in range(world)]
    assert sorted(i for part in parts for i in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def told_of(folder, world, absent=()):
    r"""All processes at once: what rank 0 gathers, and whether the others were heard."""
    heard = {}

    def other(rank):
        with Ledger(folder, Share(rank, world), 60.0) as ledger:
            heard[rank] = ledger.hand_in(Account(rank, "work", [f"by {rank}"]))

    others = {r: threading.Thread(target=other, args=(r,)) for r in range(1, world)}
    for rank in absent:
        del others[rank]
    for thread in others.values():
        thread.start()
    with Ledger(folder, Share(0, world), 0.2 if absent else 60.0) as ledger:
        while absent and not all(ledger.account_of(rank) for rank in others):
            time.sleep(0.01)  # that only those are given up who never come
        found = ledger.gather(Account(0, "work", ["by 0"]))
    for thread in others.values():
        thread.join()
    return *found, heard


def test_rank_0_gathers_all_accounts(tmp_path):
    accounts, lost, heard = told_of(tmp_path, 4)
    assert accounts == [Account(rank, "work", [f"by {rank}"]) for rank in range(4)]
    assert lost == []
    assert heard == {1: True, 2: True, 3: True}
    assert list(tmp_path.iterdir()) == []


def test_who_gives_no_sign_of_life_is_given_up(tmp_path):
    accounts, lost, heard = told_of(tmp_path, 3, absent=(1,))
    assert [a.rank for a in accounts] == [0, 2]
    assert lost == [1]
    assert heard == {2: True}


def test_what_a_killed_run_left_is_taken_for_nothing(tmp_path):
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "0.alive").write_text(json.dumps({"run": "old", "beat": 7}))
    for rank in (1, 2):
        (folder / f"{rank}.alive").write_text(json.dumps({"run": "old", "beat": 7}))
        told = {"run": "old", "work": "old", "told": ["old"]}
        (folder / f"{rank}.json").write_text(json.dumps(told))
    accounts, lost, heard = told_of(tmp_path, 3, absent=(2,))
    assert [a.told for a in accounts] == [["by 0"], ["by 1"]]
    assert (lost, heard) == ([2], {1: True})
    assert list(tmp_path.iterdir()) == []


class Clock:
    r"""A clock that goes only while somebody sleeps, and what happens meanwhile."""

    def __init__(self, happens, seconds):
        self.now, self.slept, self.happens, self.seconds = 0.0, 0, happens, seconds

    def monotonic(self):
        return self.now

    def sleep(self, _):
        self.now += self.seconds
        self.slept += 1
        self.happens(self.slept)


def test_rank_0_waits_for_whom_gives_signs_of_life(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, Share(0, 2), patience=10.0)
    ledger.folder.mkdir()

    def other(slept):
        alive = {"run": ledger.run, "beat": slept}
        (ledger.folder / "1.alive").write_text(json.dumps(alive))
        if slept == 7:
            told = {"run": ledger.run, "work": "work", "told": "late"}
            (ledger.folder / "1.json").write_text(json.dumps(told))

    clock = Clock(other, 9.0)
    monkeypatch.setattr(shares, "time", clock)
    accounts, lost = ledger.gather(Account(0, "work", ""))
    assert clock.now > 6 * ledger.patience
    assert [a.told for a in accounts] == ["", "late"]
    assert lost == []


def test_a_sign_that_does_not_change_is_no_sign_of_life(tmp_path, monkeypatch):
    file = tmp_path / "alive"
    file.write_text('{"beat": 1}')
    clock = Clock(lambda slept: file.write_text('{"beat": 2}') if slept == 2 else None, 1.0)
    monkeypatch.setattr(shares, "time", clock)
    watch = SignOfLife(file)
    found = []
    for _ in range(4):
        found.append((watch.silence(), watch.changed))
        clock.sleep(0)
    assert found == [(0, False), (1, False), (0, True), (1, True)]
    file.unlink()  # which is no change either
    assert watch.silence() == 2


def test_without_rank_0_a_process_is_not_heard_and_leaves_nothing(tmp_path):
    with Ledger(tmp_path, Share(1, 2), 0.1) as ledger:
        assert not ledger.hand_in(Account(1, "work", ""))
        ledger.await_end()  # there is nothing to wait for
    assert list(tmp_path.iterdir()) == []


def test_a_process_can_wait_for_the_end_of_rank_0(tmp_path):
    order = []

    def failed():
        with Ledger(tmp_path, Share(1, 2), 30.0) as ledger:
            ledger.hand_in(Account(1, "work", ""))
            ledger.await_end()
            order.append(1)

    thread = threading.Thread(target=failed)
    thread.start()
    with Ledger(tmp_path, Share(0, 2), 30.0) as ledger:
        ledger.gather(Account(0, "work", ""))
        order.append(0)
    thread.join()
    assert order == [0, 1]


def test_it_can_be_ended_while_others_are_awaited(tmp_path):
    with pytest.raises(KeyboardInterrupt), Ledger(tmp_path, Share(0, 2), 30.0):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
