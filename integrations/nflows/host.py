r"""The host: nflows, or its maintained fork in glasflow, whichever is installed.

Both have the same modules and the same classes. Where both are installed, nflows is the host
whose classes ours inherit from, and the rules for certificates and attacks know both.
"""

__all__ = ["CANDIDATES", "HOST", "part"]

from importlib import import_module
from types import ModuleType
from typing import Any

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


HOST = _find()


def part(name: str, host: str = HOST) -> Any:
    r"""Returns a module of the host, such as ``part("transforms.coupling")``.

    Arguments:
        name: The name of the module within the host.
        host: The name of the host.
    """
    module: ModuleType = import_module(f"{host}.{name}")
    return module
