r"""Which addresses a page is served on, and to which names it answers there."""

import socket

import pytest

from flowguard.app import address
from flowguard.app.address import place

LOCAL = {"localhost", "127.0.0.1", "[::1]"}


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
        ("LocalHost", "LocalHost"),
        pytest.param("::1", "[::1]", marks=IPV6),
        pytest.param("[::1]", "[::1]", marks=IPV6),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("[::FFFF:7f00:1]", "127.0.0.1"),
    ],
)
def test_what_this_machine_alone_reaches_answers_to_its_names_alone(given, host):
    found = place(given)
    assert found.host == host
    assert found.lonely
    assert set(found.names) >= LOCAL | {host.lower()}
    assert "*" not in found.names


@pytest.mark.parametrize("given", ["0.0.0.0", "::ffff:0.0.0.0", pytest.param("::", marks=IPV6)])
def test_what_others_reach_answers_to_any_name(given):
    found = place(given)
    assert not found.lonely
    assert found.names == ("*",)


def test_a_name_that_leads_to_this_machine_is_one_of_its_names(monkeypatch):
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k))
    assert set(place("Desk").names) >= LOCAL | {"desk"}


@pytest.mark.parametrize(
    ("given", "asked"),
    [("Bücher.lan", "xn--bcher-kva.lan"), ("\uff11\uff12\uff17.0.0.1", "127.0.0.1")],
)
def test_a_name_is_answered_to_as_browsers_ask_for_it(given, asked, monkeypatch):
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k))
    found = place(given)
    assert asked in found.names
    assert found.host == asked


def test_a_name_that_leads_to_this_machine_by_a_mapped_address_is_for_it_alone(monkeypatch):
    here = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::ffff:127.0.0.1", 0, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: here)
    monkeypatch.setattr(address, "_bound", lambda *a: True)
    assert place("desk").lonely


def test_a_name_that_leads_elsewhere_too_is_not_for_this_machine_alone(monkeypatch):
    here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in ("127.0.0.1", "0.0.0.0")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: here)
    assert not place("desk", ports=[0]).lonely


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(ValueError, match=f"port must be one of 1 to 65535; got {port}"):
        place("127.0.0.1", port)


RULE = "host must be an address of this machine or a name of it, without a scheme or a port; got "


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("", RULE + "nothing: leave it out for 127.0.0.1"),
        ("  ", RULE + "nothing"),
        ("999.1.1.1", RULE + "'999.1.1.1', which is not known here"),
        ("name.invalid", RULE + "'name.invalid', which is not known here"),
        ("http://127.0.0.1", RULE + "'http://127.0.0.1', which is not known here"),
        ("127.0.0.1:7860", RULE + "'127.0.0.1:7860', which is not known here"),
        ("a\0b", RULE + "'a\\x00b', which is not known here"),
        ("x" * 5000, RULE + "'xxx"),
        (
            "192.0.2.1",
            "host must be an address of this machine; got '192.0.2.1', on which it cannot",
        ),
    ],
)
def test_what_is_no_address_of_this_machine_is_refused(host, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        place(host)
    assert str(caught.value).startswith(told)
    assert len(str(caught.value)) < 240


def test_a_port_that_is_taken_is_refused(taken):
    told = (
        f"port must be free; got {taken}, which is taken here: choose another one, or leave it out"
    )
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        with pytest.raises(OSError, match=told):
            place(host, taken)


def test_the_first_free_port_is_taken(taken):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        free = other.getsockname()[1]
    assert place("127.0.0.1", ports=[taken, free]).port == free
    with pytest.raises(OSError, match="which are all taken here: choose another one"):
        place("127.0.0.1", ports=[taken])


def test_a_port_that_needs_more_rights_is_refused(monkeypatch):
    def bound(family, host, port):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(address, "_bound", bound)
    with pytest.raises(
        OSError, match="port must be one that all users may listen on; got 80, which"
    ):
        place("127.0.0.1", 80)
