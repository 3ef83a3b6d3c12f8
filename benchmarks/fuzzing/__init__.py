r"""Random models of every layer that has a rule, and the property that certificates must have.

All is drawn from one :class:`random.Random`, so that a number makes a model again, and hypothesis
can take its place.
"""

__all__ = ["Case", "Maker", "Verdict", "covered", "fuzz", "registered"]

import sys
import warnings
from functools import partial
from random import Random
from typing import Any

import torch
import torch.nn as nn

import flowguard.integrations.nflows.glasflow
import flowguard.integrations.normflows.rules
import flowguard.integrations.pyro.rules
import flowguard.integrations.sbi.rules
import flowguard.integrations.zuko.rules
import flowguard.models.rules  # noqa: F401
from flowguard.bounds import certify, rules
from flowguard.integrations.sbi import GuardedPosterior

from . import images, lazy, normflows_layers, pyro_layers, transforms
from .judge import Verdict, judge
from .maker import DTYPES, Case, Maker
from .nflows_layers import HOSTS, case_of_nflows, nflows_tables
from .sbi_estimators import ESTIMATORS, case_of_sbi
from .tampering import WRAPPERS, tampered, wrapped

FAMILIES = {
    "transforms": (transforms.case_of_transforms, set(transforms.TRANSFORMS)),
    "zuko": (lazy.case_of_lazy, {*lazy.LAZY, *lazy.GIVEN, *lazy.MIGRATED}),
    **{name: (partial(case_of_nflows, name=name), nflows_tables()) for name in HOSTS},
    "normflows": (normflows_layers.case_of_normflows, normflows_layers.normflows_tables()),
    "pyro": (pyro_layers.case_of_pyro, {*pyro_layers.PYRO, *pyro_layers.DISTRIBUTIONS}),
    "sbi": (case_of_sbi, ESTIMATORS),
    "images": (images.case_of_images, images.IMAGES),
}

#: Whose classes have to be covered.
LIBRARIES = {"flowguard", "glasflow", "nflows", "normflows", "pyro", "torch", "zuko"}


def covered() -> set[type]:
    r"""Returns the classes that models are made of."""
    return {*WRAPPERS}.union(*(classes for _, classes in FAMILIES.values()))


def registered() -> set[type]:
    r"""Returns the classes that have a rule."""
    lookups: list[dict[type, Any]] = [rules._RULES, rules._ENVELOPES]
    found = {cls for lookup in lookups for cls in lookup}
    found -= {nn.parallel.DistributedDataParallel}  # which needs a group of processes
    found -= {GuardedPosterior}  # bounded as the posterior that it guards, which is no module
    return {cls for cls in found if cls.__module__.partition(".")[0] in LIBRARIES and _lasts(cls)}


def _lasts(cls: type) -> bool:
    r"""Whether a class is found in its module, which those of examples are not."""
    return getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls


def make(random: Random, wanted: type | None = None, plain: bool = False) -> tuple[Case, Maker]:
    r"""Returns a random case, and what has made it.

    Arguments:
        random: The source of randomness.
        wanted: A class that shall be part of it.
        plain: Whether nothing unexpected is done to the model, and its dtype is float32.
    """
    maker = Maker(random, wild=random.randint(0, 99) < 35, wanted=wanted)
    anything = wanted is None or wanted in WRAPPERS
    names = [n for n, (_, classes) in FAMILIES.items() if anything or wanted in classes]
    if wanted in WRAPPERS:
        names = [n for n in names if n not in ("transforms", "pyro")]  # which are no modules
        maker.wanted = None
    library = "" if wanted is None else wanted.__module__.partition(".")[0]
    if library in {name.partition(".")[0] for name in HOSTS}:
        names = [n for n in names if n.partition(".")[0] == library]
    build, _ = FAMILIES[maker.pick(names)]
    dtype = torch.float32 if plain else maker.pick(DTYPES)
    case = build(maker, dtype)
    maker.wanted = wanted
    if wanted in WRAPPERS or maker.flip(0.03):
        case = wrapped(maker, case)
    if not plain and maker.flip(0.15):
        case = tampered(maker, case)
    case.made = maker.made
    if isinstance(case.model, nn.Module) and not case.model.state_dict():
        case.dtype = torch.float32  # what has no weights is taken to be of the default dtype
    return case, maker


def fuzz(
    random: Random, wanted: type | None = None, plain: bool = False, certify: Any = certify
) -> tuple[Case, Verdict]:
    r"""Makes a model and returns it with what was found of it.

    Arguments:
        random: The source of randomness.
        wanted: A class that shall be part of it.
        plain: Whether nothing unexpected is done to the model, and its dtype is float32.
        certify: What certifies.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case, maker = make(random, wanted, plain)
        return case, judge(case, maker, certify)
