r"""Robust conditional normalizing flows, and a warning where the condition is unknown."""

__all__ = [
    "Certificate",
    "Migration",
    "OODConditioner",
    "OODContextError",
    "OODContextWarning",
    "RobustSpline",
    "__version__",
    "attack",
    "bounds",
    "certify",
    "functional",
    "image",
    "kernels",
    "migrate",
    "models",
    "monitor",
    "ood",
    "register",
    "transforms",
    "unregister",
]

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowguard import functional, transforms
from flowguard._version import __version__
from flowguard.functional import kernels
from flowguard.hosts import register, unregister
from flowguard.transforms import RobustSpline

if TYPE_CHECKING:
    from flowguard import bounds, image, models, ood
    from flowguard.bounds.attack import attack
    from flowguard.bounds.certificate import Certificate, certify
    from flowguard.migration import Migration, migrate
    from flowguard.ood import OODConditioner, OODContextError, OODContextWarning, monitor

#: The wings that are imported when they are first asked for, and the names of theirs that are ours.
_LATER = {
    "bounds": ("Certificate", "attack", "certify"),
    "image": (),
    "migration": ("Migration", "migrate"),
    "models": (),
    "ood": ("OODConditioner", "OODContextError", "OODContextWarning", "monitor"),
}


if not TYPE_CHECKING:  # checkers shall see what there is, and no more

    def __getattr__(name: str) -> Any:
        if name == "persistence":  # as `flowguard.models.store` was called
            return import_module(f"{__name__}.models.store")
        for wing, names in _LATER.items():
            if name == wing or name in names:
                module = import_module(f"{__name__}.{wing}")
                return module if name == wing else getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
