r"""Models as folders: a JSON configuration and safetensors weights, nothing that can run code.

A configuration names classes of three registries, and no others: the elementwise maps that flowguard
has (`MAPS`), what derives from :class:`Recorded` (models and encoders), and the layers that a
migration puts in the place of others (`REPLACED`).
"""

__all__ = ["Pretrained", "PretrainedError", "Recorded", "load", "located"]

import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from itertools import zip_longest
from numbers import Integral
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowguard._version import __version__
from flowguard.hosts import install
from flowguard.image.maps import Affine, CubicBSpline, ReparametrizedAffine, Robust
from flowguard.image.migration import BoundedSplit, InscribedCoupling
from flowguard.io.atomic import atomic, save_tensors
from flowguard.migration.exchange import exchange
from flowguard.models.strict import check_counts, check_dtypes, check_kinds, other_dtype, within
from flowguard.ood import OODConditioner
from flowguard.ood.conditioner import conditioners

try:
    from huggingface_hub import PyTorchModelHubMixin as _Hub

    HUB = True
except ImportError:  # the extra "hub"; saving and loading folders works without it
    HUB = False

    class _Hub:  # type: ignore[no-redef]
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__()


#: The newest format. A model is written in the oldest one that can hold it, so that an older
#: flowguard reads what it understands and refuses the rest by its number.
FORMAT = 6
PLAIN = 2  # what the constructor's arguments describe
MIGRATED = 3  # the same, and layers that took the place of others
LIMITED = 4  # the same, with or without such layers, and a margin for images
HALVED = 5  # the same, and some weights that are kept in half precision: see `halved`
GUESSED = 6  # the same, with or without such weights, and a first guess of dark images
#: The format that an argument takes which folders need not tell, where it is not a margin's.
SINCE = {"residual": GUESSED}
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TYPE = "type"  # the key that names the class of an object
FOREIGN = "foreign"  # an object that whoever loads has to give
#: The key that says what tensors of float16 are read as, and the one thing that it may say.
HALVES, SINGLE = "halves", "float32"
#: Where the models lie that the package brings.
SHIPPED = Path(__file__).with_name("shipped")
LEGIBLE = 300  # characters of a name that are repeated in an error
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
REGISTRY: dict[str, type[Any]] = {}

#: The elementwise maps that a file may name; their fields are their arguments.
MAPS: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (Affine, CubicBSpline, ReparametrizedAffine, Robust)
}

#: The layers that :func:`flowguard.migrate` puts in the place of others; see
#: :mod:`flowguard.image.migration`.
REPLACED: dict[str, type[BoundedSplit] | type[InscribedCoupling]] = {
    cls.__name__: cls for cls in (BoundedSplit, InscribedCoupling)
}

P = TypeVar("P", bound="Pretrained")


def known_as(cls: type[Any]) -> str:
    r"""Returns the name of a class in files; no class of a user's takes the name of one of ours."""
    ours = cls.__module__.startswith("flowguard.")
    return cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"


class PretrainedError(ValueError):
    r"""Raised when a folder does not hold a model that can be loaded, or a model cannot be saved.
    Nothing was executed and nothing was overwritten.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> flowguard.models.load(folder.name)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        flowguard.models.store.PretrainedError: ...
    """


class Recorded:
    r"""Creates an object that remembers the arguments of its constructor, so that it can be
    saved as a part of a model: an encoder, say.

    A class of yours that derives from it (and from :class:`torch.nn.Module`) can be saved, and
    loaded wherever it has been imported.

    Example:
        >>> class Embedding(Recorded, torch.nn.Linear):
        ...     pass
        >>> Embedding(3, 2).arguments["in_features"]
        3
    """

    arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, nn.Module):
            REGISTRY[known_as(cls)] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        hub = issubclass(cls, _Hub) and HUB
        self = super().__new__(cls, *args, **kwargs) if hub else super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:  # a mistake, of which the constructor will tell; or a copy in the making
            return self
        bound.apply_defaults()
        found = dict(list(bound.arguments.items())[1:])
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                found |= found.pop(name)
        # Not through `Module.__setattr__`: an encoder among the arguments is not one more child.
        self.__dict__["arguments"] = found
        return self


class Pretrained(
    Recorded,
    _Hub,
    library_name="flowguard",
    tags=["normalizing-flows", "uncertainty"],
    paper_url="https://arxiv.org/abs/2212.04319",
):
    r"""Gives a model :meth:`save_pretrained` and :meth:`from_pretrained`.

    Where ``huggingface_hub`` is installed it is its ``PyTorchModelHubMixin``, so that models can
    be pushed to the Hub and loaded from it. Folders need neither that package nor a network.
    """

    @classmethod
    def _encode_arg(cls, arg: Any) -> Any:
        # The mixin would take the class of a coupling for a coupling.
        made = arg() if isinstance(arg, type) and dataclasses.is_dataclass(arg) else arg
        return super()._encode_arg(made)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        r"""Saves the model in a folder: ``config.json`` and ``model.safetensors``.

        The state of the guard (fit, calibration, policy) and the layers that a migration replaced
        are included. What could not be restored is refused. Whenever the process may end, the
        folder holds the earlier model or this one: the weights, which know how their model is
        built, take the place of the earlier ones at once, and ``config.json``, which says the
        same, follows.

        Arguments:
            save_directory: The folder; it is made if it is missing.
            config: Not taken: the configuration is that of the model.
            repo_id: See ``PyTorchModelHubMixin.save_pretrained``, as for all that follow.
            push_to_hub: Whether to push the folder to the Hub.
            model_card_kwargs: What the model card says.
            push_to_hub_kwargs: Passed to ``push_to_hub``.

        Raises:
            PretrainedError: If the model was changed such that its constructor's arguments do not
                describe it, or the folder is a file.
            ImportError: If it shall be pushed and huggingface_hub is not installed.
            ValueError: If a configuration is given.
        """
        if config is not None:
            raise ValueError("config is made from the model; leave it out")
        if not HUB and (push_to_hub or push_to_hub_kwargs or repo_id is not None):
            raise ImportError(f"pushing to the Hub needs huggingface_hub: {install('hub')}")
        folder, model = Path(save_directory), _module(self)
        described, state = describe(model), _state(model)
        _check_twin(model, described, state)
        write(folder, described, state)
        if not HUB:
            return None
        card = folder / "README.md"
        if not card.exists():
            with atomic(card) as temporary:
                self.generate_model_card(**(model_card_kwargs or {})).save(temporary)
        if not push_to_hub:
            return None
        url: str = self.push_to_hub(
            repo_id=repo_id or folder.name,
            model_card_kwargs=model_card_kwargs,
            **push_to_hub_kwargs,
        )
        return url

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
        **foreign: Any,
    ) -> Self:
        r"""Loads a model that :meth:`save_pretrained` saved, in evaluation mode.

        Every number comes back bit for bit. No code is run, whatever the files hold.

        Arguments:
            pretrained_model_name_or_path: The folder, the name of a model that the package brings
                (``"superres-x4"`` or ``"lowlight"``), or that of one on the Hub.
            force_download: See ``PyTorchModelHubMixin.from_pretrained``, as for all that follow;
                they concern the Hub only.
            token: The token for the Hub.
            cache_dir: Where downloads are kept.
            local_files_only: Whether to use nothing but earlier downloads.
            revision: Which revision on the Hub.
            map_location: The device.
            foreign: The arguments of the constructor that could not be saved, such as an
                ``encoder`` of your own.

        Raises:
            PretrainedError: If the folder holds no such model, or a file is truncated, foreign,
                or of a newer flowguard.
        """
        name = os.fspath(pretrained_model_name_or_path)
        folder = located(name)
        if not folder.is_dir():
            download = {
                "force_download": force_download,
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "revision": revision,
            }
            folder = _downloaded(name, download)
        return _loaded(cls, folder, torch.device(map_location), foreign)


def located(name: str | os.PathLike[str]) -> Path:
    r"""Returns the folder of a model that the package brings, or the one that is named itself.

    Arguments:
        name: A folder, or a name such as ``"superres-x4"``. A model in a folder of that name
            comes first.

    Raises:
        PretrainedError: If nothing can have that name, or it cannot be looked what has it.

    Example:
        >>> sorted(file.name for file in located("superres-x4").iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    text = os.fspath(name)
    if not text.strip() or "\0" in text:
        got = "a name with a zero byte" if text.strip() else "an empty name"
        raise PretrainedError(f"a model must be named by its folder; got {got}")
    folder = Path(name)
    own = any(_is_there(folder / file) for file in (CONFIG, WEIGHTS))  # not one of pictures
    brought = not own and len(folder.parts) == 1 and (SHIPPED / folder / CONFIG).is_file()
    return SHIPPED / folder if brought else folder


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # of names that are too long, of folders that are closed
        raise PretrainedError(f"{_shown(path.parent)} cannot be read: {error.strerror}") from None
    return True


def _shown(path: Path) -> str:
    r"""A name in one short line, which every terminal can print."""
    text = str(path)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= LEGIBLE else f"{text[:60]}… ({len(text)} characters)"


def load(
    folder: str | os.PathLike[str], map_location: str | torch.device = "cpu", **foreign: Any
) -> Any:
    r"""Loads a model of whichever class was saved in a folder.

    Arguments:
        folder: The folder that ``save_pretrained`` wrote, or the name of a model that the package
            brings.
        map_location: The device.
        foreign: The arguments that could not be saved; see :meth:`flowguard.models.store.Pretrained.from_pretrained`.

    Raises:
        PretrainedError: If the folder holds no such model.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> model = flowguard.models.SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8, features=8)
        >>> model.save_pretrained(folder.name)
        >>> type(flowguard.models.load(folder.name)).__name__
        'SuperResolutionFlow'
    """
    folder = located(folder)
    if not folder.is_dir():
        raise PretrainedError(_no_folder(folder))
    return _loaded(Pretrained, folder, torch.device(map_location), foreign)


# -- describing ------------------------------------------------------------------------------


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be a torch.nn.Module; got {type(model).__name__}")
    return model


def encode(value: Any) -> Any:
    r"""Returns a value as what JSON can hold."""
    value = getattr(value, "_orig_mod", value)  # of torch.compile
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Integral):  # of NumPy
        return int(value)
    if isinstance(value, float | np.floating):
        value = float(value)
        return value if math.isfinite(value) else {TYPE: "float", "value": str(value)}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if isinstance(value, Mapping) and TYPE not in value and all(isinstance(k, str) for k in value):
        return {k: encode(v) for k, v in value.items()}
    maker = value.func if isinstance(value, functools.partial) else value
    if isinstance(maker, type) and maker in MAPS.values():
        value = value()  # stands for the coupling that it makes
    name = known_as(type(value))
    if MAPS.get(name) is type(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {TYPE: name, **encode(fields)}
    if REGISTRY.get(name) is type(value):
        return {TYPE: name, **encode(value.arguments)}
    return {TYPE: FOREIGN, "class": type(value).__name__}


def decode(value: Any, where: str, foreign: Mapping[str, Any]) -> Any:
    r"""Returns what :func:`encode` encoded; objects are of known classes only.

    Arguments:
        value: What JSON held.
        where: The name of the argument.
        foreign: The objects that could not be encoded, by the name of the argument.
    """
    if isinstance(value, list):
        return [decode(v, where, foreign) for v in value]
    if not isinstance(value, dict):
        return value
    fields = {k: v for k, v in value.items() if k != TYPE}
    name = value.get(TYPE)
    if name is None:
        return {k: decode(v, k, foreign) for k, v in fields.items()}
    if name == "float":
        return float(fields["value"])
    if name == FOREIGN:
        if where not in foreign:
            raise PretrainedError(
                f"the model was saved with a {fields['class']} as `{where}`, which a file cannot"
                f" hold; pass {where}=... to from_pretrained"
            )
        return foreign[where]
    kind = MAPS.get(name) or REGISTRY.get(name)
    if kind is None:
        raise PretrainedError(
            f"`{where}` is a {name}, which this flowguard ({__version__}) does not know; import"
            " the module that defines it, or upgrade flowguard"
        )
    return kind(**_checked(kind, fields, where, foreign))


def _checked(
    kind: type[Any], fields: dict[str, Any], where: str, foreign: Mapping[str, Any]
) -> dict[str, Any]:
    r"""The arguments of a constructor, of the kinds that it tells where it is one of ours."""
    made: dict[str, Any] = decode(fields, where, foreign)
    if known_as(kind) == kind.__name__:
        check_kinds(kind, made)
    return made


def _options(conditioner: OODConditioner) -> dict[str, Any]:
    guard = conditioner.guard
    return {
        "policy": conditioner.policy,
        "levels": conditioner.level_names,
        "alpha": conditioner.alpha,
        "boundary": conditioner.boundary,
        "shrinkage": guard.shrinkage,
        "normalize": guard.normalize,
        "statistic": guard.statistic,
        "required": conditioner.required,
    }


def _set_options(conditioner: OODConditioner, options: Mapping[str, Any]) -> None:
    # A fresh one checks the options, and its empty guard is shaped by what it will load.
    fresh = OODConditioner(None, **options)
    conditioner.level_names, conditioner.guard = fresh.level_names, fresh.guard
    conditioner.alpha, conditioner.boundary = fresh.alpha, fresh.boundary
    conditioner.policy, conditioner.required = fresh.policy, fresh.required


def describe(model: nn.Module) -> dict[str, Any]:
    r"""Returns the configuration of a model.

    Arguments:
        model: The model.
    """
    arguments = dict(getattr(model, "arguments", {}))
    conditioner = getattr(model, "conditioner", None)
    if arguments.get("encoder") is not None and isinstance(conditioner, OODConditioner):
        arguments["encoder"] = conditioner.encoder  # it may have been exchanged
    unsaid = _unsaid(type(model))
    arguments |= {name: getattr(model, name) for name in unsaid}  # it may have been changed
    for name in [name for name, value in unsaid.items() if arguments[name] == value]:
        del arguments[name]
    newer = [SINCE.get(name, LIMITED) for name in unsaid if name in arguments]
    config = {
        "format": max([PLAIN, *newer]),
        "flowguard": __version__,
        "class": known_as(type(model)),
        "arguments": encode(arguments),
        "conditioners": {n: encode(_options(c)) for n, c in conditioners(model).items()},
    }
    replaced = {
        _eager(name): {TYPE: type(layer).__name__, **encode(layer.changes())}
        for name, layer in model.named_modules()
        if isinstance(layer, BoundedSplit | InscribedCoupling)
    }
    if not replaced:
        return config
    return {**config, "format": max([MIGRATED, *newer]), "replaced": replaced}


def _unsaid(kind: type[Any]) -> dict[str, Any]:
    r"""What a configuration means that does not say it: what models had before they could have
    anything else."""
    return dict(getattr(kind, "unsaid", {}))


def _takes(kind: type[Any], name: str) -> bool:
    r"""Whether the constructor of a class takes an argument of that name."""
    parameters = inspect.signature(kind.__init__).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise PretrainedError(
                f"{name} is a {type(value).__name__}, which safetensors cannot hold; keep it in a"
                " tensor"
            )
        # A clone: tensors that share memory would be refused.
        plain = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        state[_eager(name)] = plain
    return state


def _eager(name: str) -> str:
    r"""The name of what is within a model, without what torch.compile wraps it in."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _build(
    config: Mapping[str, Any], foreign: Mapping[str, Any], state: Mapping[str, Tensor]
) -> nn.Module:
    kind = REGISTRY[config["class"]]
    for fields in _records(config["arguments"]):
        check_counts(fields, state)
    # The weights that are drawn here are replaced.
    with torch.random.fork_rng(devices=[]), within(state):
        unsaid = _unsaid(kind)
        told = {**unsaid, **config["arguments"]}
        later = {name: told.pop(name) for name in unsaid if not _takes(kind, name)}
        fields = _checked(kind, told, "arguments", foreign)
        model: nn.Module = kind(**fields)
        for name, value in later.items():
            setattr(model, name, value)
    _set_conditioners(model, config["conditioners"])
    for name, told in config.get("replaced", {}).items():
        _replace_layer(model, name, told)
    return model


def _records(value: Any) -> Iterator[dict[str, Any]]:
    r"""The dictionaries within a value, itself included."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _records(part)


def _set_conditioners(model: nn.Module, told: Mapping[str, Any]) -> None:
    found = conditioners(model)
    _check_names("conditioners", told, found)
    for name, conditioner in found.items():
        options = told[name]
        if isinstance(options, dict):  # earlier files say all but that
            options = {"required": conditioner.required, **options}
        _check_names(name, options, _options(conditioner))
        _set_options(conditioner, _checked(OODConditioner, options, name, {}))


def _replace_layer(model: nn.Module, name: str, told: Mapping[str, Any]) -> None:
    changes = decode({k: v for k, v in told.items() if k != TYPE}, name, {})
    for option, value in (pair for r in _records(changes) for pair in r.items()):
        if isinstance(value, bool):
            raise TypeError(f"{option} of {name} must be a number; got {value}")
    old = model.get_submodule(name)
    new = REPLACED[told[TYPE]].restore(old, **changes)
    for mine, its in zip(_records(new.changes()), _records(changes), strict=True):
        _check_names(name, its, mine)  # what is left out would be some default
    exchange(model, old, new)


def _check_names(where: str, told: Any, wanted: Mapping[str, Any]) -> None:
    r"""Refuses a record that lacks anything, or has anything else."""
    if not isinstance(told, dict):
        raise TypeError(f"{where} must be a record; got {told!r:.60}")
    lacking = [repr(name) for name in wanted if name not in told]
    if lacking:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    unknown = [repr(name) for name in told if name not in wanted]
    if unknown:
        raise ValueError(f"{where} has {', '.join(unknown)}, which there is not")


def _check_twin(model: nn.Module, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    r"""Builds the model once more and loads it: what cannot be restored is not saved."""
    foreign = {
        name: value
        for name, value in getattr(model, "arguments", {}).items()
        if isinstance(config["arguments"].get(name), dict)
        and config["arguments"][name].get(TYPE) == FOREIGN
    }
    if "encoder" in foreign:  # a copy: the twin's encoder is loaded into
        foreign["encoder"] = copy.deepcopy(model.conditioner.encoder)  # type: ignore[union-attr]
    try:
        twin = _build(config, foreign, state)
        _fill(twin, state)
        for mine, its in zip_longest(_parts(model), _parts(twin), fillvalue="nothing"):
            if mine != its:
                raise PretrainedError(f"{mine} instead of {its}")
    except Exception as error:
        raise PretrainedError(
            f"this {type(model).__name__} cannot be saved: it was changed after its construction,"
            f" so that its arguments do not describe it any more ({_first_line(error)})"
        ) from error


def _parts(model: nn.Module) -> list[str]:
    r"""What each part of a model is, in words, without what torch.compile wraps it in."""
    return [
        f"{_eager(name)}: {type(part).__name__}({part.extra_repr()})"
        for name, part in model.named_modules()
        if not hasattr(part, "_orig_mod")
    ]


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    r"""Loads a state bit for bit: first each tensor takes the dtype of what it will hold."""
    check_dtypes(model, state)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        saved = state.get(name)
        if saved is not None and saved.dtype != tensor.dtype:
            tensor.data = tensor.data.to(saved.dtype)
    model.load_state_dict(dict(state), strict=True)
    for name, value in model.state_dict().items():  # a guard makes its levels as it loads them
        saved = state.get(name)  # a guard of an earlier format lacks what it had not yet
        if saved is not None and saved.dtype != value.dtype:
            raise other_dtype(name, saved.dtype, f"and not {value.dtype}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


# -- files -----------------------------------------------------------------------------------


def halved(
    config: Mapping[str, Any], state: Mapping[str, Tensor], names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    r"""Returns a configuration and weights some of which are kept in half precision, to be small.

    The configuration says so, wherever the folder goes: what loads it makes them float32 again,
    rounded as they are.

    Arguments:
        config: The configuration of a model in float32.
        state: Its weights.
        names: Which of them are kept so.

    Raises:
        ValueError: If one of them is missing, not in float32, or not finite in half precision, or
            another one is in half precision already, which would be widened too.

    Example:
        >>> config, state = halved({"format": PLAIN}, {"weight": torch.ones(2)}, {"weight"})
        >>> config, state["weight"].dtype
        ({'format': 5, 'halves': 'float32'}, torch.float16)
    """
    unknown = sorted(set(names) - state.keys())
    if unknown:
        raise ValueError(f"names must name weights; got {unknown[0]!r}, which there is not")
    kept = {name: t.half() if name in names else t for name, t in state.items()}
    for name, tensor in state.items():
        fits = tensor.dtype == torch.float32 if name in names else tensor.dtype != torch.float16
        if not fits:
            raise ValueError(f"models in float32 alone are kept so; got {tensor.dtype} for {name}")
        if name in names and not kept[name].isfinite().all():
            raise ValueError(
                f"weights must be finite in half precision; got some of {name} beyond 65504"
            )
    return {**config, "format": max(HALVED, config["format"]), HALVES: SINGLE}, kept


def write(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    r"""Writes configuration and weights, each whole or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise PretrainedError(f"{folder} is, or lies below, a file; name a folder") from None
    for name in (WEIGHTS, CONFIG):  # before the first of the two is replaced
        if (folder / name).is_dir():
            raise PretrainedError(f"{folder / name} is a folder, and shall become a file")
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    # The weights know their configuration, so that a pair of two saves is told apart; and they
    # know the file that lies beside them until the new one follows, should the process end there.
    metadata = {
        "format": "pt",
        "flowguard": json.dumps(config, allow_nan=False),
        "replaces": _digest(_bytes_of(folder / CONFIG)),
    }
    with atomic(folder / CONFIG) as configuration, atomic(folder / WEIGHTS) as weights:
        configuration.write_text(text, encoding="utf-8")
        save_tensors(weights, state, metadata)


def _bytes_of(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PretrainedError(f"{file} cannot be read: {error.strerror}") from None


def _digest(data: bytes | None) -> str:
    return "" if data is None else hashlib.blake2b(data, digest_size=16).hexdigest()


def _no_folder(path: Path) -> str:
    shown = _shown(path)
    if path.is_file():
        return (
            f"there is no folder {shown}, but a file of that name; a model is a folder, which"
            " save_pretrained writes, and `flowguard convert` makes one of a published checkpoint"
        )
    if str(path).startswith("~"):  # `--model=~/mine` comes so from a shell
        whole = _shown(Path(os.path.expanduser(path)))
        return (
            f"there is no folder {shown}; ~ is taken as it stands: write {whole} if that is meant"
        )
    brought = " and ".join(sorted(file.parent.name for file in SHIPPED.glob(f"*/{CONFIG}")))
    return (
        f"there is no folder {shown}; the package brings the models {brought}, and those of the Hub"
        " are called OWNER/NAME"
    )


def _downloaded(name: str, options: dict[str, Any]) -> Path:
    r"""The folder of a model of the Hub."""
    parts, shown = name.split("/"), _shown(Path(name))
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")) or os.path.exists(name):
        raise PretrainedError(_no_folder(Path(name)))
    if not HUB:
        raise PretrainedError(
            f"there is no folder {shown}; to load a model of that name from the Hub install"
            f" huggingface_hub: {install('hub')}"
        )
    from huggingface_hub import hf_hub_download

    try:
        config, _ = (hf_hub_download(name, filename=f, **options) for f in (CONFIG, WEIGHTS))
    except Exception as error:  # the network's errors have no common class
        raise PretrainedError(
            f"there is no folder {shown}, and no such model could be loaded from the Hub:"
            f" {_first_line(error)}"
        ) from error
    return Path(config).parent


def read_config(folder: Path) -> dict[str, Any]:
    r"""Returns the configuration of a saved model, checked.

    Arguments:
        folder: The folder.

    Raises:
        PretrainedError: If it is missing, truncated, foreign or newer.
    """
    with _opened(folder) as opened:
        return _agreed(folder, opened.metadata() or {})


def _agreed(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    r"""The configuration that the weights know, once ``config.json`` says the same; or is missing,
    or is the one of the earlier model, as a save that was ended between the two leaves it."""
    file, weights = folder / CONFIG, folder / WEIGHTS
    data = _bytes_of(file)
    config = None
    if data is not None and _digest(data) != metadata.get("replaces"):
        try:
            config = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # ValueErrors of JSON and of UTF-8
            raise PretrainedError(f"{file} is truncated or no JSON: {error}") from None
        _check_config(config, file)
    if "flowguard" not in metadata:
        raise PretrainedError(
            f"{weights} is a safetensors file of something else: flowguard's save_pretrained did"
            " not write it"
        )
    written = json.loads(metadata["flowguard"])
    _check_config(written, weights)
    if config is not None and _exact(written) != _exact(config):
        raise PretrainedError(
            f"{weights} was not saved together with {file}: they describe different models; save"
            " the model again"
        )
    return dict(written)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    r"""The file of the weights, of which nothing is read yet."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise PretrainedError(_absent(folder, WEIGHTS if (folder / CONFIG).exists() else CONFIG))
    try:
        file.open("rb").close()  # what reads it calls a file that is closed to us missing
    except OSError as error:
        raise PretrainedError(f"{file} cannot be read: {error.strerror}") from None
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except PretrainedError:
        raise
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise PretrainedError(
            f"{file} is truncated, or no safetensors file: {_first_line(error)}"
        ) from error


def _check_config(config: Any, file: Path) -> None:
    wanted = {"format": int, "flowguard": str, "class": str}
    if not isinstance(config, dict) or not all(
        isinstance(config.get(k), t) and not isinstance(config[k], bool) for k, t in wanted.items()
    ):
        raise PretrainedError(f"{file} was not written by flowguard's save_pretrained")
    if not PLAIN <= config["format"] <= FORMAT:
        # Before format 2, two-bin splines were other maps of the same parameters.
        advice = (
            "upgrade flowguard"
            if config["format"] > FORMAT
            else "train the model, or import its checkpoint, again"
        )
        raise PretrainedError(
            f"{file} has format {config['format']}, written by flowguard {config['flowguard']};"
            f" this is flowguard {__version__}, which reads formats {PLAIN} to {FORMAT}: {advice}"
        )
    migrated = config["format"] == MIGRATED
    may_be = config["format"] >= MIGRATED
    for key in ("arguments", "conditioners", *(("replaced",) if migrated else ())):
        if not isinstance(config.get(key), dict):
            raise PretrainedError(f"{file} lacks {key!r}; it was changed, or written in part")
    if not may_be and "replaced" in config:
        raise PretrainedError(f"{file} has layers that format {PLAIN} does not; it was changed")
    if not isinstance(config.get("replaced", {}), dict):
        raise PretrainedError(f"{file} lacks 'replaced'; it was changed, or written in part")
    unknown = config.keys() - {
        "format",
        "flowguard",
        "class",
        "arguments",
        "conditioners",
        "replaced",
        HALVES,
    }
    if unknown:
        raise PretrainedError(
            f"{file} has {sorted(unknown)[0]!r}, which this flowguard ({__version__}) does not"
            " know; it was changed, or upgrade flowguard"
        )
    lacking = config["format"] == HALVED and HALVES not in config
    astray = HALVES in config and (config["format"] < HALVED or config[HALVES] != SINGLE)
    if lacking or astray:
        raise PretrainedError(
            f"{file} must have {HALVES!r}, as {SINGLE!r}, in format {HALVED}, and none before;"
            f" got {config.get(HALVES)!r} in format {config['format']}: it was changed, or written"
            " in part"
        )
    for name, told in config.get("replaced", {}).items():
        kind = told.get(TYPE) if isinstance(told, dict) else None
        if not isinstance(kind, str) or kind not in REPLACED:
            raise PretrainedError(
                f"`{name}` is a {kind}, which this flowguard ({__version__}) does not put in the"
                " place of a layer: upgrade flowguard"
            )


def _absent(folder: Path, name: str) -> str:
    try:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    rest = (
        f"; {pickles[0]} may be a pickle, which can run code, and is not opened (published"
        " checkpoints are converted by `flowguard convert`)"
        if pickles
        else ""
    )
    within = [p.parent.name for p in sorted(folder.glob(f"*/{name}"))]  # such as a run of training
    if within:
        rest += f"; its folder(s) {', '.join(within)} do: name one of them"
    return f"{folder} holds no {name}, which save_pretrained writes{rest}"


def _exact(config: dict[str, Any]) -> str:
    r"""A text that tells 1, 1.0 and true apart."""
    return json.dumps(config, sort_keys=True)


def _loaded(cls: type[P], folder: Path, device: torch.device, foreign: dict[str, Any]) -> P:
    with _opened(folder) as opened:
        config = _agreed(folder, opened.metadata() or {})
        state = {name: opened.get_tensor(name) for name in opened.keys()}
    if HALVES in config:
        state = {name: t.float() if t.dtype == torch.float16 else t for name, t in state.items()}
    kind = REGISTRY.get(config["class"])
    if kind is None or not issubclass(kind, Pretrained):
        raise PretrainedError(
            f"{folder} holds a {config['class']}, which this flowguard ({__version__}) does not"
            " know; import the module that defines it, or upgrade flowguard"
        )
    if not issubclass(kind, cls):
        raise PretrainedError(
            f"{folder} holds a {kind.__name__}; load it by {kind.__name__}.from_pretrained"
        )
    unknown = [k for k in foreign if not _is_foreign(config["arguments"].get(k))]
    if unknown:
        raise TypeError(
            f"{unknown[0]!r} is not taken: the folder says how the model is built, and only what"
            " it could not hold is given"
        )
    try:
        model = _build(config, foreign, state)
        _fill(model, state)
    except PretrainedError:
        raise
    except Exception as error:  # whatever a changed configuration makes of the constructor
        raise PretrainedError(
            f"the files of {folder} do not fit each other or this flowguard ({__version__}):"
            f" {_first_line(error)}"
        ) from error
    return model.to(device).eval()  # type: ignore[return-value]


def _is_foreign(value: Any) -> bool:
    return isinstance(value, dict) and value.get(TYPE) == FOREIGN
