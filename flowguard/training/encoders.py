r"""The encoder that a flow is trained with: made, read from elsewhere, frozen or tuned, and kept."""

__all__ = ["ENCODERS", "encoder_for", "groups", "keep_encoder", "kept_encoder"]

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from flowguard.io.atomic import atomic, save_tensors
from flowguard.models import LowLightEncoder, PyramidEncoder, RRDBEncoder, load
from flowguard.models.base import ImageModel
from flowguard.models.store import located

#: The encoders that can be asked for, by name.
ENCODERS: dict[str, type[nn.Module]] = {
    "pyramid": PyramidEncoder,
    "rrdb": RRDBEncoder,
    "lowlight": LowLightEncoder,
}
#: The encoders of each task, the usual one first.
OF_TASK = {"superres": ("pyramid", "rrdb"), "lowlight": ("lowlight",)}
#: The channels of an encoder's maps (of its trunk), and its blocks.
DEFAULTS = {"pyramid": (64, 8), "rrdb": (64, 23), "lowlight": (32, 4)}
STACKED = 4  # blocks of an RRDB trunk whose outputs the flow sees, as many as there are


def encoder_for(
    task: str,
    kind: str | None = None,
    *,
    scale: int = 4,
    levels: int = 2,
    features: int | None = None,
    blocks: int | None = None,
    weights: Path | None = None,
) -> nn.Module:
    r"""Returns an encoder for a flow.

    Arguments:
        task: ``"superres"`` or ``"lowlight"``.
        kind: ``"pyramid"`` or ``"rrdb"``, for super-resolution. If :py:`None`, that of the
            weights, or a pyramid.
        scale: The factor of super-resolution.
        levels: The number of levels of the flow.
        features: The number of channels of the maps, or, of an RRDB network, those of its trunk.
            If :py:`None`, that of the weights, or 64 and 32 for low light.
        blocks: The number of blocks. If :py:`None`, that of the weights, or 8, and 23 of an RRDB
            network, and 4 for low light.
        weights: Where it gets its weights: a checkpoint of an RRDB network, see
            :meth:`RRDBEncoder.from_esrgan`, the ``.param`` or ``.bin`` of one in ncnn's format, or
            the folder of a model that was saved, whose encoder is taken. The part of an RRDB
            network that makes pictures is left out.

    Raises:
        ValueError: If task and encoder do not go together, or the weights are of an encoder of
            another kind, scale, number of levels, features or blocks.
        OSError: If the weights cannot be read.

    Example:
        >>> encoder_for("superres", "rrdb", features=8, blocks=2).RRDB_trunk.stacked
        (0, 1)
    """
    kinds = OF_TASK[task]
    if kind is not None and kind not in kinds:
        raise ValueError(f"the encoder of {task} must be one of {', '.join(kinds)}; got {kind!r}")
    if weights is None:
        return _fresh(kind or kinds[0], scale, levels, features, blocks)
    encoder = _read(located(weights), levels)
    found = next((name for name, cls in ENCODERS.items() if type(encoder) is cls), None)
    if found is None or found not in ([kind] if kind else kinds):
        raise ValueError(
            f"the weights must be of an encoder of {task}, {kind or ' or '.join(kinds)};"
            f" {weights} holds a {type(encoder).__name__}"
        )
    wanted: dict[str, int | None] = {"scale": scale if task == "superres" else 1}
    wanted |= {"levels": levels, "features": features, "blocks": blocks}
    own = encoder.arguments
    held = {"scale": 1, **own, "features": own.get("features", own.get("channels"))}
    for name, value in wanted.items():
        if value is not None and held[name] != value:
            raise ValueError(
                f"the weights of {weights} are of an encoder of {name} {held[name]}; got {value}"
            )
    return encoder


def _fresh(
    kind: str, scale: int, levels: int, features: int | None, blocks: int | None
) -> nn.Module:
    usual = DEFAULTS[kind]
    features = usual[0] if features is None else features
    blocks = usual[1] if blocks is None else blocks
    if kind == "pyramid":
        return PyramidEncoder(features, scale=scale, levels=levels, blocks=blocks)
    if blocks < 1:
        raise ValueError(f"the encoder {kind} must have at least 1 block; got {blocks}")
    growth = max(4, features // 2)
    if kind == "lowlight":
        stacked = (min(1, blocks - 1),)
        return LowLightEncoder(
            features, growth=growth, blocks=blocks, stacked=stacked, levels=levels
        )
    return RRDBEncoder(
        features=features,
        growth=growth,
        blocks=blocks,
        stacked=_stacked(blocks),
        scale=scale,
        levels=levels,
        head=False,
        long_skip="first",
    )


def _stacked(blocks: int) -> tuple[int, ...]:
    r"""Which blocks are stacked: those of the published configurations, or the last of each part."""
    if blocks > 22:
        return 1, 8, 15, 22
    count = min(STACKED, blocks)
    return tuple((i + 1) * blocks // count - 1 for i in range(count))


def _read(file: Path, levels: int) -> Any:
    if file.is_dir():
        return load(file).conditioner.encoder
    if file.suffix in (".param", ".bin"):
        read = RRDBEncoder.from_ncnn(file, stacked=(), levels=levels)
    else:
        read = RRDBEncoder.from_esrgan(file, stacked=(), levels=levels)
    stacked = _stacked(read.arguments["blocks"])
    return _rebuilt(RRDBEncoder, {**read.arguments, "stacked": stacked, "head": False}, read)


def _rebuilt(cls: type[nn.Module], arguments: dict[str, Any], source: nn.Module) -> nn.Module:
    r"""An encoder with those weights of another that it has."""
    with torch.random.fork_rng(devices=[]):  # drawing weights must not disturb what is drawn after
        made = cls(**arguments)
    theirs = source.state_dict()
    made.load_state_dict({name: theirs[name] for name in made.state_dict()})
    return made


def keep_encoder(encoder: nn.Module, file: Path) -> None:
    r"""Writes an encoder into a file; see :func:`kept_encoder`.

    Arguments:
        encoder: The encoder, one of flowguard's own.
        file: The file, a safetensors file that says how the encoder is made.
    """
    (kind,) = (name for name, cls in ENCODERS.items() if type(encoder) is cls)
    made: Any = encoder
    told = {"encoder": kind, "arguments": json.dumps(made.arguments)}
    tensors = {name: t.detach().cpu().contiguous() for name, t in encoder.state_dict().items()}
    with atomic(file) as temporary:
        save_tensors(temporary, tensors, told)


def kept_encoder(file: Path) -> nn.Module:
    r"""Returns the encoder of a file that :func:`keep_encoder` wrote.

    Arguments:
        file: The file.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        with torch.random.fork_rng(devices=[]):
            made = ENCODERS[told["encoder"]](**json.loads(told["arguments"]))
        made.load_state_dict(tensors)
    except OSError:
        raise
    except Exception as error:  # safetensors, JSON and torch each have errors of their own
        raise ValueError(f"{file} must hold the encoder of a run, and cannot be read") from error
    return made


def groups(model: ImageModel, lr: float, encoder_lr: float | None) -> Iterator[dict[str, Any]]:
    r"""Yields the parameters that are trained, in groups for an optimiser: those of the encoder,
    where they have a learning rate of their own, apart.

    Arguments:
        model: The model.
        lr: The greatest learning rate.
        encoder_lr: That of the encoder; :py:`None` for the same.
    """
    encoder = set(model.conditioner.get_submodule("encoder").parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    if encoder_lr is None:
        yield {"params": trained, "lr": lr}
        return
    yield {"params": [p for p in trained if p not in encoder], "lr": lr}
    tuned = [p for p in trained if p in encoder]
    if tuned:
        yield {"params": tuned, "lr": encoder_lr}
