r"""Where the page is served: an address that can be listened on, and by which names it is asked for.

A page of another site can have its own name lead to this machine, and then read what a server here
answers to that name (DNS rebinding). A server for this machine alone therefore answers to the names
of this machine, and to no others.
"""

__all__ = ["PORTS", "Place", "place"]

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

#: The ports of which the first free one is taken.
PORTS = range(7860, 7960)
#: The names that a machine has for itself, as a browser sends them. The last is all that some
#: releases of starlette see of an address in brackets, to which no name can lead.
OWN = ("localhost", "127.0.0.1", "[::1]", "[")


class Place(NamedTuple):
    r"""An address that can be listened on.

    Arguments:
        host: The address, in brackets if it is one of IPv6.
        port: The port.
        names: The names that are answered to, in lower case; any, if others than this machine can
            reach the address.

    Example:
        >>> Place("192.0.2.1", 7860, ("*",)).lonely
        False
    """

    host: str
    port: int
    names: tuple[str, ...]

    @property
    def lonely(self) -> bool:
        r"""Whether this machine alone reaches the address."""
        return "*" not in self.names


def place(host: str, port: int | None = None, ports: Sequence[int] = PORTS) -> Place:
    r"""Returns where a page can be served.

    Arguments:
        host: An address of this machine, or a name of it.
        port: The port; the first free one if :py:`None`.
        ports: Of which that one is taken.

    Raises:
        ValueError: If nothing of this machine is called so, or if there is no such port.
        OSError: If the port is taken or not for all users.

    Example:
        >>> place("localhost").lonely
        True
        >>> place("999.1.1.1")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: host must be an address of this machine or a name of it...
    """
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"port must be one of 1 to 65535; got {port}")
    bare = _unmapped(host.strip().removeprefix("[").removesuffix("]"))
    found = _addresses(bare, host)
    tried = ports if port is None else [port]
    free = next((number for number in tried if _free(found, number, host)), None)
    if free is None and port is None:
        raise OSError(
            f"port must be free; got {ports[0]} to {ports[-1]}, which are all taken here: choose"
            " another one"
        )
    if free is None:
        raise OSError(
            f"port must be free; got {port}, which is taken here: choose another one, or leave it"
            " out for the first that is free"
        )
    own = all(ipaddress.ip_address(_unmapped(address)).is_loopback for _, address in found)
    bare = bare.encode("idna").decode()  # as browsers ask for it
    shown = f"[{bare}]" if ":" in bare else bare
    names = tuple(dict.fromkeys((*OWN, shown.lower()))) if own else ("*",)
    return Place(shown, free, names)


def _unmapped(address: str) -> str:
    r"""The address of IPv4 if it is written as one of IPv6, whose own rules do not tell what it is;
    what is none stays as it is."""
    try:
        return str(getattr(ipaddress.ip_address(address), "ipv4_mapped", None) or address)
    except ValueError:
        return address


def _addresses(bare: str, host: str) -> list[tuple[socket.AddressFamily, str]]:
    r"""The addresses that a name stands for, each with its family."""
    rule = "host must be an address of this machine or a name of it, without a scheme or a port"
    if not bare:
        raise ValueError(f"{rule}; got nothing: leave it out for 127.0.0.1")
    try:
        # Names that are too long for any resolver are errors of the encoding.
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        raise ValueError(f"{rule}; got {host!r:.80}, which is not known here") from None
    pairs = ((family, str(address[0])) for family, _, _, _, address in found)
    return list(dict.fromkeys(pairs))


def _free(found: Sequence[tuple[socket.AddressFamily, str]], port: int, host: str) -> bool:
    r"""Whether a port is free, on all addresses and, as gradio looks there, on the usual one."""
    heard = 0
    for family, address in found:
        try:
            heard += _bound(family, address, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            if error.errno in (errno.EACCES, errno.EPERM):
                raise OSError(
                    f"port must be one that all users may listen on; got {port}, which needs more"
                    " rights: choose one from 1024"
                ) from None
    if not heard:
        raise ValueError(
            f"host must be an address of this machine; got {host!r:.80}, on which it cannot listen:"
            " 0.0.0.0 stands for all that it has"
        )
    with contextlib.suppress(OSError):
        return _bound(socket.AF_INET, "127.0.0.1", port)
    return False


def _bound(family: socket.AddressFamily, address: str, port: int) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # a port that was just left counts as free; elsewhere it means more
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
    return True
