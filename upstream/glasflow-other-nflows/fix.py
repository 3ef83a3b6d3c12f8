r"""Coupling transforms of either copy of nflows, for glasflow 0.4.1.

with applied():
    flow = CouplingFlow(nflows.transforms.AffineCouplingTransform, n_inputs=2, n_transforms=4)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

from glasflow.flows import coupling


def coupling_transforms() -> tuple[type, ...]:
    r"""The base class of couplings in the copy of nflows in use, and in one that is installed."""
    names = ["glasflow.nflows", *(["nflows"] if find_spec("nflows") else [])]
    modules = (import_module(f"{name}.transforms.coupling") for name in names)
    return tuple(dict.fromkeys(module.CouplingTransform for module in modules))


@contextmanager
def applied() -> Iterator[None]:
    r"""Puts the classes into glasflow's check, and takes them out again."""
    with patch.object(coupling, "CouplingTransform", coupling_transforms()):
        yield
