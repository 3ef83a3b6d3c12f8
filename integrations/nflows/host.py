r"""The host: nflows, or its maintained fork in glasflow, whichever is installed.

Both have the same modules and the same classes. Where both are installed, nflows is the host
whose classes ours inherit from, and the rules for certificates and attacks know both. What the flows
of glasflow take for one of theirs is of its class too, whose methods it does not use (:func:`kin`).
"""

__all__ = ["CANDIDATES", "HOST", "available", "kin", "part"]

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch.nn as nn

from flowguard.hosts import missing

#: The first that can be imported is the host.
CANDIDATES = ("nflows", "glasflow.nflows")


def _find() -> str:
    error: ImportError | None = None
    for name in CANDIDATES:
        try:
            import_module(f"{name}.transforms")
        except ImportError as reason:
            error = error or reason
        else:
            return name
    raise missing("nflows") from error


#: The library that is used: nflows, or glasflow where that alone is installed.
HOST = _find()


def part(name: str, host: str = HOST) -> Any:
    r"""Returns a module of the host, such as ``part("transforms.coupling")``.

    Arguments:
        name: The name of the module within the host.
        host: The name of the host.
    """
    module: ModuleType = import_module(f"{host}.{name}")
    return module


def available() -> list[str]:
    r"""Returns the names of all hosts that can be imported."""
    found = []
    for name in CANDIDATES:
        if find_spec(name.partition(".")[0]) is not None:
            try:
                import_module(f"{name}.transforms")
            except ImportError:  # it is there, and does not work: not our affair
                continue
            found.append(name)
    return found


class End(nn.Module):
    r"""Creates the last class of a host among the bases of another one: after it the constructors
    of that host do not go on to the other's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def kin(module: str, name: str) -> tuple[Any, ...]:
    r"""Returns the bases of a class that all installed hosts shall know for one of theirs: the class
    of the host, and then those of the others.

    Arguments:
        module: The name of the module within a host.
        name: The name of the class there.
    """
    first, *others = (getattr(part(module, host), name) for host in available())
    others = [cls for cls in others if cls is not first]  # a fork may be but another name
    return first, *((End, *others) if others else ())
