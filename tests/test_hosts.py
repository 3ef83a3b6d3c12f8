r"""Tests for the registry of hosts."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import flowguard.integrations
from flowguard import hosts
from flowguard.hosts import HOSTS, PACKAGES, register, unregister

ADAPTERS = [
    host
    for host in HOSTS
    if hosts._available(host)  # installed, and flowguard has an adapter for it
]


def known(host: str) -> bool:
    """Whether the host that is installed has the splines that flowguard knows."""
    try:
        hosts._adapter(host).SPLINES.check()
    except RuntimeError:
        return False
    return True


HAVING_SPLINES = [host for host in ADAPTERS if host != "pyro"]
WITH_SPLINES = [host for host in HAVING_SPLINES if known(host)]


@pytest.fixture(autouse=True)
def clean():
    unregister()
    yield
    unregister()


def exports(host: str) -> list[tuple[ModuleType, str, type]]:
    return list(hosts._exports(hosts._adapter(host)))


@pytest.mark.parametrize("host", ADAPTERS)
def test_import_of_adapter_touches_nothing(host):
    for namespace, name, _ in exports(host):
        assert not hasattr(namespace, name)


@pytest.mark.parametrize("host", ADAPTERS)
def test_register_is_idempotent_and_reversible(host):
    before = {m: (set(vars(m)), list(getattr(m, "__all__", ()))) for m, _, _ in exports(host)}
    register(host)
    register(host)
    for namespace, name, ours in exports(host):
        assert getattr(namespace, name) is ours
        assert list(getattr(namespace, "__all__", [name])).count(name) == 1
    unregister(host)
    unregister(host)
    for m, (names, listed) in before.items():
        assert (set(vars(m)), list(getattr(m, "__all__", ()))) == (names, listed)


@pytest.mark.parametrize("host", ADAPTERS)
def test_register_hides_nothing_and_then_registers_nothing(host, monkeypatch):
    *others, (namespace, name, _) = exports(host)
    theirs = object()
    monkeypatch.setattr(namespace, name, theirs, raising=False)
    with pytest.raises(RuntimeError, match=f"{name} of its own"):
        register(host)
    assert getattr(namespace, name) is theirs
    for other, other_name, _ in others:
        assert not hasattr(other, other_name)


@pytest.mark.parametrize("host", ADAPTERS)
def test_unregister_leaves_what_others_put_there(host, monkeypatch):
    register(host)
    namespace, name, _ = exports(host)[0]
    theirs = object()
    monkeypatch.setattr(namespace, name, theirs)
    unregister(host)
    assert getattr(namespace, name) is theirs
    monkeypatch.undo()


@pytest.mark.parametrize("host", WITH_SPLINES)
def test_splines_are_replaced_on_demand_and_taken_back(host):
    switch = hosts._adapter(host).SPLINES
    register(host)
    assert not switch.active
    register(host, splines=True)
    register(host, splines=True)
    register(host)
    assert switch.active
    unregister(host)
    unregister(host)
    assert not switch.active


@pytest.mark.parametrize("host", WITH_SPLINES)
def test_where_splines_are_refused_nothing_is_registered(host, monkeypatch):
    adapter = hosts._adapter(host)

    def check():
        raise RuntimeError("another one")

    monkeypatch.setattr(adapter.SPLINES, "check", check)
    with pytest.raises(RuntimeError, match="another one"):
        register(splines=True)
    monkeypatch.undo()
    monkeypatch.delattr(adapter, "SPLINES")
    with pytest.raises(RuntimeError, match=f"replaces no splines of {host}; nothing was"):
        register(host, splines=True)
    assert not any(hasattr(space, name) for h in ADAPTERS for space, name, _ in exports(h))
    assert not any(hosts._adapter(h).SPLINES.active for h in WITH_SPLINES if h != host)
    register(host)  # without them it can do
    unregister(host)


@pytest.mark.skipif(WITH_SPLINES != HAVING_SPLINES, reason="a host is too old for splines")
def test_of_all_hosts_those_that_have_splines_get_others():
    register(splines=True)
    assert all(hosts._adapter(h).SPLINES.active for h in WITH_SPLINES)
    unregister()
    assert not any(hosts._adapter(h).SPLINES.active for h in WITH_SPLINES)


@pytest.mark.skipif(not ADAPTERS, reason="no host is installed")
def test_register_without_a_name_takes_all_that_are_installed():
    hosts.register()
    for host in ADAPTERS:
        for namespace, name, ours in exports(host):
            assert getattr(namespace, name) is ours
    hosts.unregister()
    for host in ADAPTERS:
        for namespace, name, _ in exports(host):
            assert not hasattr(namespace, name)


@pytest.mark.parametrize("call", [register, unregister, hosts.register, hosts.unregister])
def test_unknown_host(call):
    with pytest.raises(
        ValueError, match="one of nflows, normflows, pyro, zuko, or None; got 'zucchini'"
    ):
        call("zucchini")


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("host", HOSTS)
def test_without_the_host_the_error_names_the_pip_command(host):
    run(
        f"""
import sys
for package in {PACKAGES.get(host, (host,))!r}:
    sys.modules[package] = None  # what the import system sees of a package that is not there
import flowguard
from flowguard.hosts import register, unregister
unregister()
unregister({host!r})
try:
    register({host!r})
except ImportError as error:
    assert 'pip install "flowguard-nf[{host}]"' in str(error) or "no adapter" in str(error), error
else:
    raise SystemExit("no error")
"""
    )


def test_without_any_host():
    run(
        f"""
import sys
for host in {(*HOSTS, *PACKAGES["nflows"])!r}:
    sys.modules[host] = None
from flowguard.hosts import register
try:
    register()
except ImportError as error:
    assert "pip install" in str(error), error
else:
    raise SystemExit("no error")
"""
    )


def test_import_of_flowguard_imports_no_host():
    run(
        f"""
import sys
import flowguard, flowguard.integrations, flowguard.hosts
assert not any(host in sys.modules for host in {HOSTS!r})
"""
    )


@pytest.mark.skipif(importlib.util.find_spec("glasflow") is None, reason="glasflow is missing")
def test_the_fork_in_glasflow_stands_in_for_nflows():
    run(
        """
import sys
sys.modules["nflows"] = None
import flowguard, glasflow.nflows.transforms as host
flowguard.register("nflows")
assert issubclass(host.RobustSplineCouplingTransform, host.coupling.CouplingTransform)
flowguard.unregister()
assert not hasattr(host, "RobustSplineCouplingTransform")
"""
    )


def test_every_command_that_installs_says_how_in_a_clone_too():
    for name, package in (("flowguard", flowguard), ("integrations", flowguard.integrations)):
        for file in Path(package.__file__).parent.rglob("*.py"):
            code = ast.parse(file.read_text(encoding="utf-8"))
            docs = {
                node.body[0].value
                for node in ast.walk(code)
                if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
                and ast.get_docstring(node, clean=False)
            }
            for node in ast.walk(code):
                if isinstance(node, ast.Constant) and node not in docs and file.stem != "hosts":
                    assert "flowguard-nf[" not in str(node.value), f"{name}: {file}"
    assert hosts.install("zuko") in str(hosts.missing("zuko"))


def installed(folder, name, **files):
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    for file, text in files.items():
        (info / file.replace("_txt", ".txt")).write_text(text)


def test_other_distributions_of_the_same_package_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    installed(tmp_path, "flowguard_nf", RECORD="flowguard/__init__.py,,\n")
    installed(tmp_path, "numbers", top_level_txt="numbers\n", RECORD="numbers/__init__.py,,\n")
    assert hosts.rivals() == []
    installed(tmp_path, "flowguard", RECORD="flowguard/__init__.py,,\n")
    installed(tmp_path, "older", top_level_txt="flowguard\n")
    assert hosts.rivals() == ["flowguard", "older"]
