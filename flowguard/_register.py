r"""The two calls that tie flowguard to the libraries it plugs into.

The adapters import the core, so the core may look for them only when it is asked to.
"""

__all__ = ["register", "unregister"]

from importlib import import_module

ADAPTERS = "flowguard.integrations"


def register(host: str | None = None) -> None:
    r"""Puts flowguard's names into the namespaces of a library that people already use.

    See :func:`flowguard.integrations.register`.

    Arguments:
        host: ``"zuko"``, ``"nflows"`` or ``"normflows"``. If :py:`None`, all that are installed.

    Raises:
        ValueError: If there is no host of that name.
        ImportError: If the host is not installed, or none is.
        RuntimeError: If the host has something else under one of the names.

    Example:
        >>> flowguard.register("zuko")
        >>> import zuko
        >>> zuko.flows.RobustNSF(3, 4, bins=8)  # doctest: +ELLIPSIS
        RobustNSF(...
        >>> flowguard.unregister("zuko")
    """
    import_module(ADAPTERS).register(host)


def unregister(host: str | None = None) -> None:
    r"""Takes the names out again; see :func:`register`.

    Arguments:
        host: ``"zuko"``, ``"nflows"`` or ``"normflows"``. If :py:`None`, all of them.

    Raises:
        ValueError: If there is no host of that name.

    Example:
        >>> flowguard.register("zuko")
        >>> flowguard.unregister("zuko")
        >>> import zuko
        >>> hasattr(zuko.flows, "RobustNSF")
        False
    """
    import_module(ADAPTERS).unregister(host)
