r"""What a file may ask for: values of the kinds that are told, and no more than its weights hold."""

__all__ = ["check_counts", "check_dtypes", "check_kinds", "other_dtype", "within"]

import contextlib
import threading
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

#: Arguments that count parts of a model, each of which has a tensor of its own at least.
COUNTS = ("blocks", "levels", "steps", "transition_steps")
#: The dtypes that a model may have.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A model that is migrated is made as it was before, so it may need a little more on the way.
ROOM = 2  # times what the weights hold,
SPARE = 2**16  # numbers and
PARTS = 64  # tensors more


def check_kinds(maker: type[Any], fields: Mapping[str, Any]) -> None:
    r"""Refuses values that are not of the kinds that a constructor's annotations tell.

    A whole number will do for any number, but true and false are none.

    Arguments:
        maker: The class.
        fields: The arguments.

    Raises:
        TypeError: If one of them is of another kind.

    Example:
        >>> check_kinds(nn.Dropout, {"p": 1})
        >>> check_kinds(nn.Dropout, {"p": True})
        Traceback (most recent call last):
        TypeError: p of Dropout must be float; got True
    """
    hints = typing.get_type_hints(maker.__init__)
    for name, value in fields.items():
        if name in hints and not _fits(value, hints[name]):
            hint = hints[name]
            told = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise TypeError(f"{name} of {maker.__name__} must be {told}; got {value!r:.60}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in inner)
    if origin is typing.Literal:
        return any(value == known and type(value) is type(known) for known in inner)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value)
    if isinstance(hint, type) and hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if not isinstance(hint, type) or getattr(hint, "_is_protocol", False):
        return not isinstance(value, bool | int | float | str | list | None)
    return isinstance(value, hint)


def check_counts(fields: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    r"""Refuses more levels, steps or blocks than the weights can have, before any is made.

    Arguments:
        fields: The arguments of a model or an encoder.
        state: The weights.

    Raises:
        ValueError: If there are too many.
    """
    for name in COUNTS:
        value = fields.get(name)
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, int) and count > len(state):
                raise ValueError(f"{name} is {count}, but the weights are {len(state)} tensors")


@contextlib.contextmanager
def within(state: Mapping[str, Tensor]) -> Iterator[None]:
    r"""Refuses parameters beyond what the weights hold, as they are made: before they are drawn.

    Arguments:
        state: The weights.

    Raises:
        ValueError: If a module that is made in the block has more, or larger ones.
    """
    held = sum(t.numel() for t in state.values())
    most, numbers, tensors = ROOM * held + SPARE, 0, 0
    maker = threading.get_ident()

    def see(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal numbers, tensors
        if parameter is None or threading.get_ident() != maker:
            return
        numbers, tensors = numbers + parameter.numel(), tensors + 1
        if numbers > most or tensors > ROOM * len(state) + PARTS:
            raise ValueError(
                "the configuration describes a larger model than the weights, which are"
                f" {len(state)} tensors of {held} numbers"
            )

    handle = register_module_parameter_registration_hook(see)
    try:
        yield
    finally:
        handle.remove()


def check_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    r"""Refuses tensors of another dtype than that of the model's weights.

    What the model itself holds in a dtype of its own stays so: flags, moments in float64, an
    encoder that was given.

    Arguments:
        model: The model that is to hold the weights.
        state: The weights.

    Raises:
        TypeError: If a tensor differs.
    """
    parameters = dict(model.named_parameters())
    found = Counter(state[name].dtype for name in parameters if name in state)
    dtype = found.most_common(1)[0][0] if found else torch.get_default_dtype()
    if dtype not in DTYPES:
        raise TypeError(f"weights must be floating-point numbers of 16 bits or more; got {dtype}")
    usual = torch.get_default_dtype()
    for name, own in (*parameters.items(), *model.named_buffers()):
        allowed = {dtype} if own.dtype == usual else {own.dtype}
        if own.is_floating_point():
            allowed |= {dtype} if name in parameters else {own.dtype}
        if name in state and state[name].dtype not in allowed:
            wanted = f"the model {dtype}" if dtype in allowed else f"and not {own.dtype}"
            raise other_dtype(name, state[name].dtype, wanted)


def other_dtype(name: str, dtype: torch.dtype, wanted: str) -> TypeError:
    r"""Returns the error of a tensor of another dtype than it must have, which says what to do.

    Arguments:
        name: The name of the tensor.
        dtype: The dtype that it has.
        wanted: Which it must have, in words.

    Example:
        >>> str(other_dtype("bias", torch.float16, "the model torch.float32")).partition(";")[0]
        'bias has the dtype torch.float16, the model torch.float32'
    """
    return TypeError(
        f"{name} has the dtype {dtype}, {wanted}; convert the model as a whole, by"
        " model.to(dtype), and save it again, never single tensors of its file"
    )
