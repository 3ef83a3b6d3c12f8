r"""The libraries that flowguard plugs into: the only place of the core that names them.

The adapters (``flowguard.integrations.<host>``) import the core, so the core looks for them only
when it is asked to. An adapter is a package named after its host. It imports the host at its own
top and holds ``EXPORTS``, which maps a namespace of the host to the names that belong there, and
``SPLINES``, the switch for its splines, if it has any; its rules of bounds are in its module ``rules``, its
surgeon for migrations in ``migration``.

Some libraries hold flows of the hosts in classes of their own (:data:`WRAPPERS`). Their adapters
have rules and surgeons too, but no names to register.
"""

__all__ = [
    "HOSTS",
    "WRAPPERS",
    "Opened",
    "install",
    "load",
    "missing",
    "of_a_host",
    "opened",
    "register",
    "rivals",
    "unregister",
]

import re
import sys
from collections.abc import Callable, Iterator
from functools import singledispatch
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, NamedTuple

ADAPTERS = "flowguard.integrations"
#: The libraries whose flows have an adapter of the same name.
HOSTS = ("nflows", "normflows", "pyro", "zuko")

#: The libraries whose classes hold flows of the hosts.
WRAPPERS = ("dingo", "lampe", "sbi")

#: The packages that an adapter can work with, where that is not the one it is named after alone.
PACKAGES = {"nflows": ("nflows", "glasflow")}

#: The module that knows a library whose adapter is that of another one.
FORKS = {"glasflow": "nflows.glasflow"}


def load(model: Any, part: Literal["rules", "migration"]) -> None:
    r"""Imports what the adapters know of the library that a class, or one of its bases, comes from.

    Arguments:
        model: The object of that class.
        part: The module of the adapter.

    Raises:
        ImportError: If an adapter cannot be imported.

    Example:
        >>> import sys, zuko
        >>> load(zuko.flows.MAF(2), "rules")
        >>> "flowguard.integrations.zuko.rules" in sys.modules
        True
    """
    for library in _libraries(model):
        if library in FORKS:
            import_module(f"{ADAPTERS}.{FORKS[library]}")
        elif library in HOSTS or library in WRAPPERS:
            import_module(f"{ADAPTERS}.{library}.{part}")


def of_a_host(part: Any) -> bool:
    r"""Whether the class of an object, or one of its bases, is of a library that has an adapter.

    Arguments:
        part: The object.

    Example:
        >>> import zuko
        >>> of_a_host(zuko.flows.MAF(2)), of_a_host(torch.nn.Linear(2, 2))
        (True, False)
    """
    return not _libraries(part).isdisjoint({*HOSTS, *FORKS})


def _libraries(model: Any) -> set[str]:
    return {c.__module__.partition(".")[0] for c in type(model).__mro__}


class Opened(NamedTuple):
    r"""A module, and how to put another one in its place.

    Arguments:
        module: The module.
        closed: What makes the same of another module.

    Example:
        >>> first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> opened(first).closed(second) is second
        True
    """

    module: Any
    closed: Callable[[Any], Any]


@singledispatch
def opened(model: Any) -> Opened:
    r"""Returns the module in what is no module itself but holds one, such as a posterior, and how to
    put another one there; of anything else, the thing itself. Adapters register the classes of
    their library here, in their package.

    Arguments:
        model: The model, or what holds one.

    Example:
        A class of one's own that holds a flow is made known like this.

        >>> import dataclasses
        >>> @dataclasses.dataclass
        ... class Bundle:
        ...     flow: torch.nn.Module
        ...     name: str
        >>> @opened.register(Bundle)
        ... def _(bundle):
        ...     return Opened(bundle.flow, lambda flow: dataclasses.replace(bundle, flow=flow))
        >>> bundle = Bundle(flowguard.image.ConditionalMultiscaleFlow(3, 8, levels=1, hidden=8), "mine")
        >>> flowguard.certify(opened(bundle).module).certified
        True
        >>> opened(bundle).closed(torch.nn.Identity())
        Bundle(flow=Identity(), name='mine')
    """
    before = len(opened.registry)
    for library in _libraries(model) & set(WRAPPERS):
        import_module(f"{ADAPTERS}.{library}")
    if len(opened.registry) > before:
        return opened(model)
    return Opened(model, lambda module: module)


def register(host: str | None = None, *, splines: bool = False) -> None:
    r"""Puts the public names of an adapter into the namespaces of its host.

    ``register("zuko")`` puts :class:`flowguard.RobustSpline` into ``zuko.transforms`` and
    ``RobustNSF`` and others into ``zuko.flows``. It can be called again and taken back with
    :func:`unregister`. Either all names are put in place, or none.

    With `splines`, the host's own rational-quadratic splines are computed by flowguard from then
    on, in all threads: the same map of the same parameters, without its assertions, and faster.
    ``flowguard.integrations.nflows.splines()``, and likewise of ``normflows`` and ``zuko``, does so
    for a while.

    Arguments:
        host: ``"zuko"``, ``"nflows"``, ``"normflows"`` or ``"pyro"``. If :py:`None`, all that are
            installed.
        splines: Whether to replace what computes the host's splines too. Without it nothing changes
            in that respect.

    Raises:
        ValueError: If there is no host of that name.
        ImportError: If the host is not installed, or none is.
        RuntimeError: If the host has something else under one of the names; or if its splines are
            to be replaced and are not those that flowguard knows.

    Example:
        >>> flowguard.register("zuko")
        >>> import zuko
        >>> zuko.flows.RobustNSF(3, 4, bins=8)  # doctest: +ELLIPSIS
        RobustNSF(...
        >>> flowguard.unregister("zuko")
    """
    hosts = [h for h in HOSTS if _available(h)] if host is None else [_known(host)]
    if not hosts:
        raise ImportError(
            "none of the libraries that flowguard has an adapter for is installed;"
            f" try: {install('zuko')}"
        )
    names = [entry for h in hosts for entry in _exports(_adapter(h))]
    for namespace, name, ours in names:
        if getattr(namespace, name, ours) is not ours:
            raise RuntimeError(
                f"{namespace.__name__} has a {name} of its own, which flowguard does not hide;"
                f" nothing was registered. Import flowguard's from {ours.__module__}."
            )
    if splines:
        # Of one host it is asked for, of all only where there is one.
        having = [h for h in hosts if host is not None or hasattr(_adapter(h), "SPLINES")]
        switches = [_switch(h) for h in having]
        for switch in switches:
            switch.check()
        for switch in switches:
            switch.turn_on()
    for namespace, name, ours in names:
        setattr(namespace, name, ours)
        listed = getattr(namespace, "__all__", None)
        if isinstance(listed, list) and name not in listed:
            listed.append(name)


def unregister(host: str | None = None) -> None:
    r"""Takes the names of an adapter out of its host again, and gives the host its own splines back;
    does nothing if there is nothing to be taken back.

    What the host or the user has put under one of the names meanwhile stays.

    Arguments:
        host: ``"zuko"``, ``"nflows"``, ``"normflows"`` or ``"pyro"``. If :py:`None`, all of them.

    Raises:
        ValueError: If there is no host of that name.

    Example:
        >>> flowguard.register("zuko")
        >>> flowguard.unregister("zuko")
        >>> import zuko
        >>> hasattr(zuko.flows, "RobustNSF")
        False
    """
    for h in HOSTS if host is None else [_known(host)]:
        adapter = sys.modules.get(f"{ADAPTERS}.{h}")
        switch = getattr(adapter, "SPLINES", None)
        if switch is not None:
            switch.turn_off()
        for namespace, name, ours in () if adapter is None else _exports(adapter):
            if getattr(namespace, name, None) is ours:
                delattr(namespace, name)
                listed = getattr(namespace, "__all__", None)
                if isinstance(listed, list) and name in listed:
                    listed.remove(name)


def install(extra: str) -> str:
    r"""Returns the command that installs an optional part of the package, and what it is in a clone.

    Arguments:
        extra: The name of the extra.

    Example:
        >>> install("train")
        'pip install "flowguard-nf[train]" (in a clone: pip install -e ".[train]")'
    """
    return f'pip install "flowguard-nf[{extra}]" (in a clone: pip install -e ".[{extra}]")'


def rivals(name: str = "flowguard", ours: str = "flowguard-nf") -> list[str]:
    r"""Returns the other distributions that are installed and bring a package of the same name: the
    files of one overwrite those of the other.

    Arguments:
        name: The name of the package.
        ours: The distribution that it should come from.

    Example:
        >>> rivals("torch", ours="torch")
        []
    """
    from importlib.metadata import distributions  # not for each import of the package

    found = set()
    for distribution in distributions():
        named = distribution.metadata["Name"]
        if named and re.sub(r"[-_.]+", "-", named).lower() != ours and _brings(distribution, name):
            found.add(named)
    return sorted(found)


def _brings(distribution: Any, name: str) -> bool:
    top = (distribution.read_text("top_level.txt") or "").split()
    if top:
        return name in top
    return any(file.parts[0] == name for file in distribution.files or ())


def missing(host: str) -> ImportError:
    r"""Returns the error that says how to install a host.

    Arguments:
        host: The name of the host.

    Example:
        >>> print(missing("zuko"))  # doctest: +ELLIPSIS
        flowguard.integrations.zuko needs zuko, which could not be imported; try: pip install ...
    """
    return ImportError(
        f"flowguard.integrations.{host} needs {host}, which could not be imported;"
        f" try: {install(host)}",
        name=host,
    )


def _known(host: str) -> str:
    if host not in HOSTS:
        raise ValueError(f"host must be one of {', '.join(HOSTS)}, or None; got {host!r}")
    return host


def _available(host: str) -> bool:
    packages = PACKAGES.get(host, (host,))
    return any(map(find_spec, packages)) and find_spec(f"{ADAPTERS}.{host}") is not None


def _adapter(host: str) -> ModuleType:
    name = f"{ADAPTERS}.{host}"
    if find_spec(name) is None:
        raise ImportError(
            f"this version of flowguard has no adapter for {host}. In a clone, flowguard/integrations"
            " must be a link to integrations: git config core.symlinks true, and check it out again",
            name=name,
        )
    return import_module(name)


def _switch(host: str) -> Any:
    switch = getattr(_adapter(host), "SPLINES", None)
    if switch is None:
        raise RuntimeError(
            f"flowguard replaces no splines of {host}; nothing was registered. Leave `splines` out."
        )
    return switch


def _exports(adapter: ModuleType) -> Iterator[tuple[ModuleType, str, type]]:
    r"""Yields namespace, name and object of each name that the adapter registers."""
    exports: dict[str, tuple[str, ...]] = adapter.EXPORTS
    for namespace, names in exports.items():
        for name in names:
            yield import_module(namespace), name, getattr(adapter, name)
