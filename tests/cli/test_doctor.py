r"""What is told of an installation, and when something will not work."""

import sys
from importlib import metadata

import pytest

from flowguard import hosts
from flowguard.cli import doctor
from flowguard.cli import main as cli


def lines(findings):
    return [(f.text, f.wrong) for f in findings]


@pytest.fixture
def light(monkeypatch):
    """No library of flows is imported, which takes long and is not what most tests are about."""
    monkeypatch.setattr(doctor, "_broken", lambda module: "")


def test_all_parts_are_told_of(light, capsys):
    code = doctor.report()
    told = capsys.readouterr().out
    for part in ("Versions:", "Libraries of flows:", "Machine:", "Kernels:", "Extras:"):
        assert part in told
    assert f"torch {metadata.version('torch')}" in told
    assert "off by" in told
    assert (code == 0) == ("All that is installed works." in told)
    assert "! " not in told or code == 1


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torch>=2.6", ("torch", (), ">=2.6", "")),
        ('zuko>=1.4; extra == "zuko"', ("zuko", (), ">=1.4", "zuko")),
        ('flowguard-nf[cli]; extra == "train"', ("flowguard-nf", ("cli",), "", "train")),
        ("furo; extra == 'docs'", ("furo", (), "", "docs")),
        (
            'flowguard-nf[demo,hub]; extra == "test"',
            ("flowguard-nf", ("demo", "hub"), "", "test"),
        ),
    ],
)
def test_requirements_are_read(line, found):
    assert doctor.requirements([line]) == [doctor.Requirement(*found)]


@pytest.mark.parametrize(
    ("version", "wanted", "fine"),
    [
        ("1.10.0", ">=1.4", True),
        ("1.3.9", ">=1.4", False),
        ("2.13.0+cpu", ">=2.6", True),
        ("2.4.1", "==2.4.1", True),
        ("2.4.2", "==2.4.1", False),
        ("3.0", ">=1,<3", False),
        ("0.1", "", True),
    ],
)
def test_versions_are_compared(version, wanted, fine):
    assert doctor.fits(version, wanted) is fine


NEEDS = [
    doctor.Requirement("torch", (), ">=2.6", ""),
    doctor.Requirement("lightning", (), ">=2.6.6", "train"),
    doctor.Requirement("flowguard-nf", ("cli",), "", "train"),
    doctor.Requirement("pillow", (), ">=10", "cli"),
]


def test_what_is_missing_is_wrong_only_where_it_is_needed(monkeypatch):
    there = {"torch": "2.7", "lightning": "2.7"}
    monkeypatch.setattr(doctor, "installed", there.get)
    told = dict(lines(doctor.extras(NEEDS)))
    assert list(told.values()) == [False, False]
    assert f"train: missing pillow: {hosts.install('train')}" in told
    needed = dict(lines(doctor.extras(NEEDS, ["train"])))
    assert needed[f"train: missing pillow: {hosts.install('train')}"]
    (unknown, *_) = lines(doctor.extras(NEEDS, ["trian"]))
    assert unknown == ("there is no extra trian; there are train, cli", True)


def test_what_is_too_old_is_wrong(monkeypatch):
    there = {"torch": "2.5", "lightning": "2.5", "pillow": "11"}
    monkeypatch.setattr(doctor, "installed", there.get)
    monkeypatch.setattr(hosts, "rivals", list)
    (train, wrong), (cli_extra, fine) = lines(doctor.extras(NEEDS))
    assert "lightning 2.5 (needed is >=2.6.6)" in train
    assert wrong
    assert (cli_extra, fine) == ("cli: complete", False)
    assert lines(doctor.versions(NEEDS))[-1] == (
        'torch 2.5, needed is >=2.6: pip install "torch>=2.6"',
        True,
    )


def test_a_library_that_cannot_be_imported_is_wrong(monkeypatch):
    monkeypatch.setattr(hosts, "HOSTS", ("nflows",))
    monkeypatch.setattr(hosts, "WRAPPERS", ())
    pytest.importorskip("nflows")
    monkeypatch.setattr(doctor, "_broken", lambda module: "ImportError: of another time")
    ((text, wrong),) = lines(doctor.libraries())
    assert text.startswith("nflows")
    assert text.endswith("cannot be used: ImportError: of another time")
    assert wrong


def test_why_a_module_cannot_be_imported(monkeypatch):
    assert doctor._broken("flowguard.numerics") == ""
    assert "No module named" in doctor._broken("flowguard.there_is_no_such")


def test_a_device_that_cannot_be_used_is_wrong():
    (text,) = [text for text, wrong in lines(doctor.machine("nowhere")) if wrong]
    assert text.startswith("device nowhere cannot be used: RuntimeError")
    assert any(wrong for _, wrong in lines(doctor.kernels("nowhere")))


def test_another_distribution_of_the_name_is_wrong(monkeypatch):
    monkeypatch.setattr(hosts, "rivals", lambda: ["flowguard"])
    (text,) = [text for text, wrong in lines(doctor.versions([])) if wrong]
    assert "pip uninstall flowguard, and install flowguard-nf again" in text


def test_the_exit_code_is_one_if_something_will_not_work(light, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "rivals", lambda: ["flowguard"])
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "1 thing(s) will not work:" in told
    assert told.count("pip uninstall flowguard") == 2  # where it belongs, and in the end


def test_it_runs_without_the_packages_of_the_command_line(light, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "flowguard.cli.parsing", raising=False)
    assert cli.main(["doctor"]) == doctor.report()
    assert "Versions:" in capsys.readouterr().out
