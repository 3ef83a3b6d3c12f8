r"""How many threads there are, and who says so."""

import os

import pytest
import torch

pytest.importorskip("jsonargparse")
from flowguard.cli import machine


@pytest.fixture(autouse=True)
def _nobody_has_chosen(monkeypatch):
    for name in machine.CHOICES:
        monkeypatch.delenv(name, raising=False)


def stat(*idle, total=100):
    r"""What Linux tells of cores that idled so long."""
    lines = [f"cpu{i} {total - n} 0 0 {n} 0 0 0 0 0 0" for i, n in enumerate(idle)]
    return "\n".join([f"cpu  {len(idle) * total} 0 0 0", *lines, "intr 1 2 3", "ctxt 4"])


@pytest.mark.parametrize(
    ("had", "free", "wanted"), [(4, 4, 4), (4, 3, 3), (2, 8, 2), (4, 0, 1), (1, 0, 1)]
)
def test_as_many_as_are_free_and_it_is_said(had, free, wanted, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_cores", lambda: (free, 8))
    before = torch.get_num_threads()
    torch.set_num_threads(had)
    try:
        with machine.threads(None):
            assert torch.get_num_threads() == wanted
        assert torch.get_num_threads() == had
    finally:
        torch.set_num_threads(before)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"flowguard: {wanted} thread(s), as {free} of 8 core(s) are free;")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize(("free", "processes", "wanted"), [(8, 2, 4), (7, 2, 3), (1, 4, 1)])
def test_processes_of_one_machine_share_its_cores(free, processes, wanted, monkeypatch):
    monkeypatch.setattr(machine, "free_cores", lambda: (free, 8))
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        with machine.threads(None, processes):
            assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "local_rank", "wanted"),
    [
        ("cuda", "1", "cuda:1"),
        ("cuda", "5", "cuda:1"),
        ("cuda:0", "1", "cuda:0"),
        ("cpu", "1", "cpu"),
    ],
)
def test_processes_of_one_machine_share_its_devices(name, local_rank, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.own_device("cuda") == "cuda"  # a process alone takes what is named
    for variable, value in {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(variable, value)
    assert machine.own_device(name) == wanted


@pytest.mark.parametrize("name", machine.CHOICES)
def test_what_was_chosen_wins(name, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_cores", lambda: (1, 8))
    with machine.threads(3):
        assert torch.get_num_threads() == 3
    monkeypatch.setenv(name, "2")
    before = torch.get_num_threads()
    with machine.threads(None):
        assert torch.get_num_threads() == before  # torch has heard of it
    assert capsys.readouterr().err == ""


def test_the_number_is_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), machine.threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


def test_cores_that_idle_are_counted(tmp_path):
    file = tmp_path / "stat"
    file.write_text(stat(10, 10, 10, 10))
    before = machine.idle_and_total(file)
    assert before[0] == (10, 100)
    file.write_text(stat(60, 55, 10, 110, total=200))  # of a hundred ticks 50, 45, 0 and 100
    after = machine.idle_and_total(file)
    assert machine.at_leisure(before, after, {0, 1, 2, 3}) == 1
    assert machine.at_leisure(before, after, {0, 1, 2}) == 0
    assert machine.at_leisure(before, after, {3, 9}) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("max 100000", None), ("200000 100000", 2), ("50000 100000", 1), ("", None), ("1 0", None)],
)
def test_the_limit_of_a_container(text, wanted, tmp_path):
    (tmp_path / "cpu.max").write_text(text)
    assert machine.group_limit(tmp_path / "cpu.max") == wanted
    assert machine.group_limit(tmp_path / "absent") is None


def test_a_file_that_says_something_else(tmp_path):
    assert machine.idle_and_total(tmp_path / "absent") == {}
    (tmp_path / "stat").write_text("cpu0 words\ncpu1")
    assert machine.idle_and_total(tmp_path / "stat") == {}


@pytest.mark.parametrize(("load", "free"), [(0.2, 4), (1.6, 2), (9.0, 0)])
def test_where_only_the_load_is_known(load, free, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "STAT", tmp_path / "absent")
    monkeypatch.setattr(machine, "GROUP", tmp_path / "absent")
    monkeypatch.setattr(machine, "OLD_GROUPS", ())
    monkeypatch.setattr(machine, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
    assert machine.free_cores() == (free, 4)


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_where_nothing_is_known_all_cores_are_free(error, tmp_path, monkeypatch):
    def nothing():
        raise error

    monkeypatch.setattr(machine, "STAT", tmp_path / "absent")
    monkeypatch.setattr(machine, "GROUP", tmp_path / "absent")
    monkeypatch.setattr(machine, "OLD_GROUPS", ())
    monkeypatch.setattr(machine, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(os, "getloadavg", nothing, raising=False)
    assert machine.free_cores() == (4, 4)


def test_where_no_time_is_counted_the_load_is_asked(tmp_path, monkeypatch):
    """gVisor has the file, with zeros in it."""
    (tmp_path / "stat").write_text(stat(0, 0, 0, 0, total=0))
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    monkeypatch.setattr(machine, "GROUP", tmp_path / "absent")
    monkeypatch.setattr(machine, "OLD_GROUPS", ())
    monkeypatch.setattr(machine, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 0, 0), raising=False)
    assert machine.free_cores() == (3, 4)


def test_a_container_has_no_more_than_its_share(tmp_path, monkeypatch):
    (tmp_path / "stat").write_text(stat(0, 0, 0, 0))
    (tmp_path / "cpu.max").write_text("200000 100000")
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    monkeypatch.setattr(machine, "GROUP", tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "usable_cores", lambda: {0, 1, 2, 3})
    later = {core: (90, 200) for core in range(4)}
    monkeypatch.setattr(
        machine.time,
        "sleep",
        lambda _: monkeypatch.setattr(machine, "idle_and_total", lambda file: later),
    )
    assert machine.free_cores() == (2, 2)


@pytest.mark.parametrize(
    ("quota", "period", "wanted"),
    [("-1", "100000", None), ("200000", "100000", 2), ("50000", "100000", 1), ("1", "", None)],
)
def test_the_limit_of_a_container_in_the_older_groups(quota, period, wanted, tmp_path):
    """The first version of control groups has two files, in one of several places."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n")
    assert machine.old_group_limit(tmp_path / "cpu") == wanted
    assert machine.old_group_limit(tmp_path / "absent") is None


def test_a_container_of_the_older_groups_has_no_more_than_its_share(tmp_path, monkeypatch):
    (tmp_path / "cpu.cfs_quota_us").write_text("200000")
    (tmp_path / "cpu.cfs_period_us").write_text("100000")
    monkeypatch.setattr(machine, "STAT", tmp_path / "absent")
    monkeypatch.setattr(machine, "GROUP", tmp_path / "absent")
    monkeypatch.setattr(machine, "OLD_GROUPS", (tmp_path / "nowhere", tmp_path))
    monkeypatch.setattr(machine, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0, 0), raising=False)
    assert machine.free_cores() == (2, 2)
