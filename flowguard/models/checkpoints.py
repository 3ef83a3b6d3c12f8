r"""The import of published checkpoints.

A checkpoint is compared with a *plan*, which says for every one of its keys what shape it must
have and where its numbers go. Nothing is loaded unless all keys agree.
"""

__all__ = [
    "DEAD",
    "Checkpoint",
    "CheckpointError",
    "Entry",
    "FlowLayout",
    "ImportReport",
    "count_blocks",
    "dtype_of",
    "kernel_of",
    "load",
    "plan_flow",
    "plan_module",
    "read_flow_layout",
    "read_state",
]

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from flowguard.image import (
    Affine,
    ConditionalMultiscaleFlow,
    CubicBSpline,
    Elementwise,
    FixedConv1x1,
    FlowStep,
    ReparametrizedAffine,
    Robust,
)

State = Mapping[str, Tensor]
Source = str | PathLike[str] | Mapping[str, Any]
Stacked = Sequence[int] | None

FLOW = "flowUpsamplerNet."
#: What every published flow carries along and none of them ever reads.
DEAD = (FLOW + "f.0.weight", FLOW + "f.0.bias")

#: The published couplings: their name in a step, that of their self-conditional net, their map.
COUPLINGS: dict[str, tuple[str, Callable[[], Elementwise]]] = {
    "affine": ("fAffine", Affine),
    "affinereparam": ("fAffine", ReparametrizedAffine),
    "rqspline": ("fRQspline", lambda: Robust(bound=0.5, shift_bound=None, slope=None)),
    "bspline": ("fBspline", lambda: CubicBSpline(bound=0.5, shift_bound=None)),
}


class CheckpointError(ValueError):
    r"""A checkpoint is not what it is taken for.

    Example:
        >>> flowguard.models.SuperResolutionFlow.from_srflow({"weight": torch.zeros(1)})
        Traceback (most recent call last):
        ...
        flowguard.models.checkpoints.CheckpointError: a state dict is no checkpoint of SRFlow, ...
    """


@dataclass(frozen=True)
class Entry:
    r"""Where the numbers of one key of a checkpoint go.

    Arguments:
        shape: The shape that they must have.
        parts: The names of the tensors that they go to, with what goes to each.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[str, Callable[[Tensor], Tensor]], ...]


Plan = dict[str, Entry]


@dataclass(frozen=True)
class ImportReport:
    r"""What was made of a checkpoint. It prints as a summary.

    Arguments:
        source: The file, or ``"a state dict"``.
        keys: For each key of the checkpoint, where its numbers are now: the names of tensors of
            the model, or none for a key that the published code carries along and never reads.
        elements: How many numbers the checkpoint holds.
        unread: How many of them belong to keys that are never read.
        inferred: What was inferred from the shapes, and what was assumed.

    Example:
        >>> report = ImportReport(
        ...     "model.pth", {"a": ("encoder.weight",), "b": ()}, elements=30, unread=10, inferred={"scale": 4}
        ... )
        >>> print(report)
        model.pth: 2 keys, 30 numbers
        imported: 1 keys, 20 numbers
        never read by the published code: b
        scale: 4
    """

    source: str
    keys: dict[str, tuple[str, ...]]
    elements: int
    unread: int
    inferred: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        dead = [k for k, names in self.keys.items() if not names]
        lines = [
            f"{self.source}: {len(self.keys)} keys, {self.elements} numbers",
            f"imported: {len(self.keys) - len(dead)} keys, {self.elements - self.unread} numbers",
            f"never read by the published code: {', '.join(dead) or 'none'}",
            *(f"{name}: {value}" for name, value in self.inferred.items()),
        ]
        return "\n".join(lines)


def read_state(source: Source) -> tuple[dict[str, Tensor], str]:
    r"""Returns the tensors of a checkpoint by their names, and what to call it in messages.

    Files are read with ``weights_only=True``, or as safetensors. Where the tensors lie in a
    dictionary within a dictionary, as under ``"state_dict"`` or ``"params_ema"``, they are taken
    from there; ``module.`` before all names is dropped.

    Arguments:
        source: A path, or what is in such a file.

    Raises:
        CheckpointError: If it holds no tensors, or several sets of them.

    Example:
        >>> read_state({"params": {"module.a": torch.zeros(2)}})
        ({'a': tensor([0., 0.])}, 'a state dict')
    """
    label, content = "a state dict", source
    if isinstance(source, str | PathLike):
        label = Path(source).name
        content = _read_file(Path(source))
    state = _tensors(content, label)
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state, label


def _read_file(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise  # a file that is missing or may not be read: its message says so
    except Exception as error:
        # pickle, zip files and safetensors each have errors of their own for what they cannot read
        raise CheckpointError(
            f"{file.name} cannot be read as a file of tensors: it is truncated, of another format,"
            " or holds more than tensors, which is not opened"
        ) from error


#: Which of several sets of weights is meant.
PREFERRED = ("params_ema", "ema", "params", "state_dict", "model", "netG", "generator")


def _tensors(content: Any, label: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{label} must hold a dictionary of tensors; it holds a {type(content).__name__}"
        )
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if tensors:
        return tensors
    inner = {k: v for k, v in content.items() if isinstance(v, Mapping) and v}
    for name in PREFERRED:
        if name in inner:
            return _tensors(inner[name], f"{name} in {label}")
    if len(inner) == 1:
        ((name, only),) = inner.items()
        return _tensors(only, f"{name} in {label}")
    raise CheckpointError(
        f"{label} holds no tensors, but {', '.join(map(repr, list(content)[:8])) or 'nothing'};"
        " give the file of the network's weights, not that of the training state"
    )


@dataclass(frozen=True)
class FlowLayout:
    r"""The layout of a published flow, as the shapes of its checkpoint tell it.

    Arguments:
        numbers: For each level, the numbers of its layers: the steps without coupling, the steps,
            and the split if there is one.
        coupling: The published name of the coupling.
        context_channels: The number of channels of the context.
        hidden: The number of channels of the hidden layers.
        noise_channels: The number of channels of the noise map; 0 if there is none.
        fixed: Whether the 1×1 convolutions are not trained.
    """

    numbers: tuple[tuple[tuple[int, ...], tuple[int, ...], int | None], ...]
    coupling: str
    context_channels: int
    hidden: int
    noise_channels: int
    fixed: bool

    @property
    def options(self) -> dict[str, Any]:
        r"""The arguments of :func:`flowguard.image.published_flow` for this layout."""
        return {
            "levels": len(self.numbers),
            "steps": [len(steps) for _, steps, _ in self.numbers],
            "transition_steps": len(self.numbers[0][0]),
            "splits": sum(split is not None for _, _, split in self.numbers),
            "hidden": self.hidden,
            "mix": "fixed" if self.fixed else "free",
        }

    @property
    def map(self) -> Elementwise:
        r"""The elementwise map of the coupling."""
        return COUPLINGS[self.coupling][1]()


class Checkpoint:
    r"""Creates what is known of a published checkpoint of encoder and flow from its shapes.

    Arguments:
        source: The path of the checkpoint, or the state dict; see :func:`read_state`.

    Attributes:
        state: The tensors.
        label: What to call the checkpoint in messages.
        layout: The layout of the flow.

    Raises:
        CheckpointError: If it is none of a published flow.
    """

    def __init__(self, source: Source) -> None:
        self.state, self.label = read_state(source)
        self.layout = read_flow_layout(self.state, self.label)

    def __contains__(self, key: str) -> bool:
        return key in self.state

    def trunk(self, stacked: Stacked) -> dict[str, Any]:
        r"""Returns the arguments of the encoder's trunk.

        Arguments:
            stacked: The blocks whose outputs are stacked, which no shape tells, if they are known.
        """
        first = kernel_of(self.state, "RRDB.conv_first.weight", self.label)
        growth = kernel_of(self.state, "RRDB.RRDB_trunk.0.RDB1.conv1.weight", self.label)[0]
        known = {} if stacked is None else {"stacked": tuple(stacked)}
        blocks = self.count("RRDB.RRDB_trunk.")
        return {"features": first[0], "growth": growth, "blocks": blocks, **known}

    def count(self, prefix: str) -> int:
        r"""Returns how many numbered blocks there are; see :func:`count_blocks`."""
        return count_blocks(self.state, prefix)

    def refused(self, why: str) -> CheckpointError:
        r"""Returns the error that refuses the checkpoint.

        Arguments:
            why: What comes after its name.
        """
        return CheckpointError(f"{self.label} {why}")


def read_flow_layout(state: State, label: str) -> FlowLayout:
    r"""Infers the layout of a published flow from the names and shapes of its tensors.

    Arguments:
        state: The tensors.
        label: What to call the checkpoint in messages.

    Raises:
        CheckpointError: If they are not those of a published flow.
    """
    layers = _group(state)
    if not layers:
        some = ", ".join(list(state)[:4])
        raise CheckpointError(
            f"{label} is no checkpoint of SRFlow, robustNF or LLFlow: no key starts with"
            f" {FLOW}layers; it has {some}, ..."
        )
    kinds = {n: _kind(part) for n, part in layers.items()}
    coupling = _only({k for k in kinds.values() if k in COUPLINGS}, "couplings", label)
    net = COUPLINGS[coupling][0]
    numbers = _levels(layers, kinds, label)
    if len({len(transitions) for transitions, _, _ in numbers}) > 1:
        raise CheckpointError(
            f"in {label} the levels begin with different numbers of steps without coupling"
        )
    parts = [layers[n] for n, kind in kinds.items() if kind == coupling]

    def shape(name: str) -> tuple[int, ...]:
        found = [tuple(p[name].shape) for p in parts if name in p]
        if not found:
            raise CheckpointError(f"{label} lacks {name} in every step")
        most = max(set(found), key=found.count)
        if len(most) != 4:
            raise CheckpointError(
                f"in {label} {name} must be the kernel of a convolution; it has shape {most}"
            )
        return most

    hidden, context_channels, *_ = shape(f"{coupling}.fFeatures.0.weight")
    std = [p for p in parts if any(k.startswith(f"{coupling}.{net}_std.") for k in p)]
    noise_channels = 0
    if std:
        first = next(n for n, kind in kinds.items() if kind == coupling)
        kept = _channels(layers[first]) // 2
        noise_channels = shape(f"{coupling}.{net}_std.0.weight")[1] - kept
    fixed = any("invconv.weight_transpose" in part for part in layers.values())
    return FlowLayout(numbers, coupling, context_channels, hidden, noise_channels, fixed)


def kernel_of(state: State, key: str, label: str) -> tuple[int, ...]:
    r"""Returns the shape of the kernel of an encoder's convolution.

    Arguments:
        state: The tensors.
        key: The name of the kernel.
        label: What to call the checkpoint in messages.

    Raises:
        CheckpointError: If it is missing, or not the kernel of a convolution.
    """
    if key not in state:
        raise CheckpointError(
            f"{label} has no encoder: the key {key} is missing. The weights of encoder and flow"
            " must be in one file"
        )
    shape = tuple(state[key].shape)
    if len(shape) != 4 or 0 in shape:
        raise CheckpointError(
            f"in {label} {key} must be the kernel of a convolution; it has shape {shape}"
        )
    return shape


def dtype_of(state: State, label: str) -> torch.dtype:
    r"""Returns the dtype of a checkpoint's weights.

    Arguments:
        state: The tensors.
        label: What to call the checkpoint in messages.

    Raises:
        CheckpointError: If no tensor is of floating-point numbers.
    """
    found = next((v.dtype for v in state.values() if v.is_floating_point()), None)
    if found is None:
        raise CheckpointError(
            f"{label} holds no floating-point numbers, which weights are: quantised ones must be"
            " brought back to them first"
        )
    return found


def count_blocks(state: State, prefix: str) -> int:
    r"""Returns how many numbered blocks a checkpoint has, without trust in the numbers.

    Where one is missing, the keys of the others are told to be unexpected.

    Arguments:
        state: The tensors.
        prefix: What comes before the numbers.
    """
    numbers = {k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)}
    return sum(n.isdecimal() for n in numbers)


def _group(state: State) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        number, _, rest = key.removeprefix(FLOW + "layers.").partition(".")
        if key.startswith(FLOW + "layers.") and number.isdecimal():
            layers.setdefault(int(number), {})[rest] = value
    return dict(sorted(layers.items()))


def _kind(part: Mapping[str, Tensor]) -> str:
    heads = {k.partition(".")[0] for k in part}
    for name in COUPLINGS:
        if name in heads:
            return name
    return "split" if "conv" in heads else "transition"


def _only(found: set[str], what: str, label: str) -> str:
    if len(found) != 1:
        raise CheckpointError(
            f"{label} must have one kind of {what}, of {', '.join(COUPLINGS)};"
            f" it has {', '.join(sorted(found)) or 'none'}"
        )
    return found.pop()


def _channels(part: Mapping[str, Tensor]) -> int:
    for name, axis in (("actnorm.bias", 1), ("actnorm.logs", 1), ("invconv.weight", 0)):
        if name in part and part[name].dim() > axis:
            return part[name].shape[axis]
    return 0


def _levels(
    layers: Mapping[int, Mapping[str, Tensor]], kinds: Mapping[int, str], label: str
) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int | None], ...]:
    r"""Cuts the list of layers into levels; a squeeze, which has no tensors, starts each."""
    levels: list[tuple[list[int], list[int], list[int]]] = []
    before = -1
    for n, kind in kinds.items():
        jump = n - before
        if jump == 2:
            levels.append(([], [], []))
        elif jump != 1 or not levels:
            raise CheckpointError(
                f"{label} lacks all keys of {FLOW}layers.{before + 1} to {FLOW}layers.{n - 1},"
                " or is no published flow"
            )
        transitions, steps, splits = levels[-1]
        before = n
        if splits or (kind == "transition" and steps):
            raise CheckpointError(
                f"{label} is no published flow: {FLOW}layers.{n} ({kind}) follows a split, or is"
                " a step without coupling after one with"
            )
        (splits if kind == "split" else transitions if kind == "transition" else steps).append(n)
    widths: list[int] = []
    for transitions, steps, _ in levels:
        channels = {_channels(layers[n]) for n in (*transitions, *steps)} - {0}
        if len(channels) != 1 or not steps or channels <= set(widths):
            first = next(iter((*transitions, *steps)), "")
            raise CheckpointError(
                f"{label} lacks all keys of a layer beside {FLOW}layers.{first}, or is no published"
                f" flow: the steps from there on have {sorted(channels) or 'no'} channels"
            )
        widths += channels
    return tuple((tuple(t), tuple(s), p[0] if p else None) for t, s, p in levels)


def plan_module(module: nn.Module, prefix: str, theirs: str) -> Plan:
    r"""Returns the plan of a module whose tensors bear the published names.

    Arguments:
        module: The module.
        prefix: What comes before its names within the model.
        theirs: What comes before its names in the checkpoint.
    """
    return {
        theirs + name: Entry(tuple(t.shape), ((prefix + name, _same),))
        for name, t in module.state_dict().items()
    }


def plan_flow(flow: ConditionalMultiscaleFlow, layout: FlowLayout, prefix: str = "flow.") -> Plan:
    r"""Returns the plan of a published flow.

    Arguments:
        flow: The flow, made of the options of `layout`.
        layout: The layout of the checkpoint.
        prefix: What comes before the names of the flow within the model.
    """
    plan: Plan = {}
    for level, (transitions, steps, split) in enumerate(layout.numbers):
        for kind, numbers in (("transitions", transitions), ("steps", steps)):
            for i, n in enumerate(numbers):
                name = f"{kind}.{level}.{i}"
                step = flow.get_submodule(name)
                _plan_step(plan, step, f"{FLOW}layers.{n}.", f"{prefix}{name}.", layout)
        if split is not None:
            name = f"splits.{level}.net"
            _plan_split(
                plan, flow.get_submodule(name), f"{FLOW}layers.{split}.conv.", prefix + name
            )
    return plan


def _plan_step(plan: Plan, step: nn.Module, theirs: str, ours: str, layout: FlowLayout) -> None:
    state = step.state_dict()
    channels = state["actnorm.bias"].shape[1]
    for leaf in ("bias", "logs"):
        plan[f"{theirs}actnorm.{leaf}"] = Entry(
            (1, channels, 1, 1), ((f"{ours}actnorm.{leaf}", _same),)
        )
    square = (channels, channels)
    if isinstance(step.get_submodule("mix"), FixedConv1x1):
        shape = (*square, 1, 1)
        for name, target in (("weight", "weight"), ("weight_transpose", "transpose")):
            plan[f"{theirs}invconv.{name}"] = Entry(shape, ((f"{ours}mix.{target}", _matrix),))
    else:
        plan[f"{theirs}invconv.weight"] = Entry(square, ((f"{ours}mix.weight", _same),))
    if not isinstance(step, FlowStep):
        return

    theirs, ours = f"{theirs}{layout.coupling}.", f"{ours}coupling."
    net = COUPLINGS[layout.coupling][0]
    tensors = {
        k.removeprefix("coupling."): v for k, v in state.items() if k.startswith("coupling.")
    }
    kept = step.coupling.kept
    for name, t in tensors.items():
        part, _, leaf = name.partition(".")
        if leaf.endswith("initialized"):
            continue
        published = leaf.replace("norm.", "actnorm.")
        entry = Entry(tuple(t.shape), ((ours + name, _same),))
        if part == "first_kept":
            hidden, _, *kernel = t.shape
            shape = (hidden, kept + layout.context_channels, *kernel)
            parts = (
                (f"{ours}first_kept.weight", lambda t, k=kept: t[:, :k]),
                (f"{ours}first_context.weight", lambda t, k=kept: t[:, k:]),
            )
            plan[f"{theirs}{net}.0.weight"] = Entry(shape, parts)
        elif part == "first_context" and leaf != "weight":
            plan[f"{theirs}{net}.0.{published}"] = entry
        elif part == "rest":
            # The first layer, and with it one position, stands apart.
            number, _, published = published.partition(".")
            plan[f"{theirs}{net}.{int(number) + 1}.{published}"] = entry
        elif part == "injector":
            plan[f"{theirs}fFeatures.{published}"] = entry
        elif part == "noise":
            plan[f"{theirs}{net}_std.{published}"] = entry


def _plan_split(plan: Plan, net: nn.Module, theirs: str, ours: str) -> None:
    for name, t in net.state_dict().items():
        # Published: mean and log-scale of each channel in turn. Here: all means, then all scales.
        plan[theirs + name] = Entry(tuple(t.shape), ((f"{ours}.{name}", _deinterleave),))


def _same(t: Tensor) -> Tensor:
    return t


def _matrix(t: Tensor) -> Tensor:
    return t.flatten(1)


def _deinterleave(t: Tensor) -> Tensor:
    return torch.cat((t[0::2], t[1::2]))


def load(
    model: nn.Module,
    plan: Plan,
    state: State,
    *,
    label: str = "the checkpoint",
    dead: Iterable[str] = DEAD,
    inferred: Mapping[str, Any] | None = None,
) -> ImportReport:
    r"""Loads a checkpoint into a model, by a plan, and marks its normalisations as initialised.

    Arguments:
        model: The model.
        plan: Where each key goes.
        state: The tensors of the checkpoint.
        label: What to call the checkpoint in messages.
        dead: Keys that may be there and are never read.
        inferred: What to say in the report about how the model was made.

    Raises:
        CheckpointError: If keys are missing, unexpected, of another shape, or hold numbers that
            are not finite, with their names. Then nothing was loaded.
    """
    ignored = set(dead) - set(plan)
    missing = [k for k in plan if k not in state]
    unexpected = [k for k in state if k not in plan and k not in ignored]
    misshapen = [
        f"{k} {tuple(state[k].shape)} instead of {e.shape}"
        for k, e in plan.items()
        if k in state and tuple(state[k].shape) != e.shape
    ]
    broken = [
        k
        for k in plan
        if k in state and not (state[k].is_floating_point() and bool(state[k].isfinite().all()))
    ]
    problems = [
        f"{len(found)} {what}: {_some(found)}"
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("not of finite real numbers", broken),
        )
        if found
    ]
    if problems:
        raise CheckpointError(f"the keys of {label} do not fit. " + "; ".join(problems))
    ours = model.state_dict()
    with torch.no_grad():
        for key, entry in plan.items():
            for name, part in entry.parts:
                ours[name].copy_(part(state[key]))
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] == "initialized":
                buffer.fill_(True)
    used = {k: tuple(name for name, _ in plan[k].parts) if k in plan else () for k in state}
    return ImportReport(
        source=label,
        keys=used,
        elements=sum(t.numel() for t in state.values()),
        unread=sum(t.numel() for k, t in state.items() if k not in plan),
        inferred=dict(inferred or {}),
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more
