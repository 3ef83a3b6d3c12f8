r"""What several wings need to compute."""

__all__ = [
    "FARTHEST",
    "cut",
    "evaluating",
    "evaluation_mode",
    "full_precision",
    "inv",
    "inv_and_logabsdet",
    "inv_ex",
    "logabsdet",
    "lu",
    "network_dtype",
    "normal_log_prob",
    "repeat_rows",
    "solve",
    "sum_rows",
    "trains",
    "unhooked",
    "watchable",
]

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

#: What contexts are cut at: infinite ones would become NaN (∞ - ∞) in the networks.
FARTHEST = 1e20
# Hooks that are called as a module runs, also those of all modules; those around its state do not
# matter here.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def cut(context: Any) -> Any:
    r"""Cuts a context at :math:`\pm 10^{20}`, so that infinite ones are finite. NaN stays NaN.

    Arguments:
        context: The context. What is no floating point tensor is returned as it is.

    Example:
        >>> cut(torch.tensor([-torch.inf, 2.0]))
        tensor([-1.0000e+20,  2.0000e+00])
    """
    if not isinstance(context, Tensor) or not context.is_floating_point():
        return context
    farthest = min(FARTHEST, torch.finfo(context.dtype).max)
    return context.clamp(-farthest, farthest)


def repeat_rows(t: Tensor, x: Tensor) -> Tensor:
    r"""Repeats the batch of a tensor until it has as many rows as another.

    Arguments:
        t: The tensor, with shape :math:`(B, *)`.
        x: The other one, with :math:`n B` rows. Its row :math:`i` belongs to row
            :math:`i \bmod B` of `t`.

    Raises:
        ValueError: If the number of rows of `x` is no multiple of that of `t`.

    Example:
        >>> repeat_rows(torch.tensor([1, 2]), torch.zeros(4))
        tensor([1, 2, 1, 2])
    """
    if t.shape[0] == x.shape[0]:
        return t
    if t.shape[0] == 0 or x.shape[0] % t.shape[0]:
        raise ValueError(
            "the batch must be a multiple of the contexts' number;"
            f" got a batch of {x.shape[0]} and {t.shape[0]} contexts"
        )
    if t.shape[0] == 1:
        return t.expand(x.shape[0], *t.shape[1:])
    return t.repeat(x.shape[0] // t.shape[0], *(1,) * (t.dim() - 1))


def sum_rows(ladj: Tensor) -> Tensor:
    r"""Sums over all but the batch, in float32 at least, and returns that precision.

    The log-determinant of an image is a sum of :math:`10^5` numbers and more.

    Arguments:
        ladj: The numbers, with shape :math:`(B, *)`.

    Example:
        >>> sum_rows(torch.ones(2, 300, dtype=torch.bfloat16))
        tensor([300., 300.])
    """
    return ladj.flatten(1).sum(1, dtype=torch.promote_types(ladj.dtype, torch.float32))


#: The modes of dispatch under which there are no numbers, or none that may be looked at.
_NUMBERLESS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def _has_mode(key: Any) -> bool:
    return torch._C._get_dispatch_mode(key) is not None


def watchable() -> bool:
    r"""Whether a program may look at the numbers that it computes, and write over them: neither
    what is compiled or traced nor the transforms of `torch.func` let it, nor fake tensors, which
    hold none.

    Example:
        >>> watchable()
        True
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return not (torch._C._len_torch_dispatch_stack() and any(map(_has_mode, _NUMBERLESS)))


def normal_log_prob(latents: Tensor | Sequence[Tensor]) -> Tensor:
    r"""Returns the standard normal log-density of each row, in nats.

    Arguments:
        latents: The rows, with shape :math:`(B, *)`; or a list of such parts of each row.

    Example:
        >>> normal_log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """
    parts = [latents] if isinstance(latents, Tensor) else latents
    terms = ((-0.5 * (z.square() + math.log(2 * math.pi))).flatten(1).sum(1) for z in parts)
    total = next(terms)
    for term in terms:
        total = total + term
    return total


# What is changed for a while is changed and brought back by one thread at a time. Else one could
# note what another has changed for itself, and put that "back" for good.
_lock = threading.Lock()

#: Modules that are in training mode but for callers who want them evaluated, and how many these are.
_evaluating: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_some_evaluated = False  # whether there are any; compiled code can guard on it


@contextmanager
def evaluation_mode(module: Any) -> Iterator[None]:
    r"""Evaluation mode within, every module's own mode back afterwards.

    Where several threads are within, a module gets its mode back when the last one leaves.

    Arguments:
        module: The module. Nothing is done for what is none.

    Example:
        >>> layer = torch.nn.Dropout()
        >>> with evaluation_mode(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    global _some_evaluated
    with _lock:
        modules = module.modules() if isinstance(module, nn.Module) else ()
        held = [m for m in modules if m.training or (_evaluating and m in _evaluating)]
        for m in held:
            _evaluating[m] = _evaluating.get(m, 0) + 1
            m.training = False
        _some_evaluated = bool(_evaluating)
    try:
        yield
    finally:
        with _lock:
            for m in held:
                _evaluating[m] -= 1
                if not _evaluating[m]:
                    del _evaluating[m]
                    m.training = True
            _some_evaluated = bool(_evaluating)


def trains(module: nn.Module) -> bool:
    r"""Whether any part of a module is in training mode, or may be so again at any moment, as
    another thread holds it in evaluation mode for a while.

    Arguments:
        module: The module.

    Example:
        >>> trains(torch.nn.Dropout()), trains(torch.nn.Dropout().eval())
        (True, False)
    """
    return _some_evaluated or any(m.training for m in module.modules())


def unhooked(*modules: nn.Module) -> bool:
    r"""Whether nobody listens to any of these modules, has put another `forward` into it or has
    compiled it, so that they may be run in parts.

    Arguments:
        modules: The modules.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> unhooked(layer)
        True
        >>> handle = layer.register_forward_hook(lambda module, inputs, output: None)
        >>> unhooked(layer)
        False
    """
    if any(getattr(nn.modules.module, f"_global{name}") for name in HOOKS):
        return False
    return not any(
        "forward" in vars(m) or m._compiled_call_impl or any(getattr(m, name) for name in HOOKS)
        for m in modules
    )


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    r"""Evaluation mode and no gradients within, every module's own mode back afterwards.

    Arguments:
        module: The module. Gradients are off also for what is none.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> with evaluating(layer):
        ...     layer(torch.zeros(1, 2)).requires_grad
        False
    """
    with evaluation_mode(module), torch.no_grad():
        yield


@contextmanager
def instead(layer: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    r"""Puts a function in place of a method of a module, within the context.

    Arguments:
        layer: The module, or another object.
        name: The name of the method.
        function: The function, which is called without the module.
    """
    own = vars(layer)  # not by `setattr`, of which a module makes more
    before = {name: own[name]} if name in own else {}
    own[name] = function
    try:
        yield
    finally:
        del own[name]
        own.update(before)


# Factorisations by LU go matrix by matrix: with two threads, those of a batch of large matrices (two
# of 192 columns suffice) never return on some processors. No other file of the package has any.


def inv(matrices: Tensor) -> Tensor:
    r"""Returns the inverses of matrices, one by one.

    Arguments:
        matrices: The matrices, with shape :math:`(*, N, N)`.

    Raises:
        RuntimeError: If one is singular.

    Example:
        >>> inv(2 * torch.eye(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    return _one_by_one(torch.linalg.inv, matrices)


def inv_and_logabsdet(matrices: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the inverses of matrices and :math:`\log |\det A|`, one by one.

    Each is factorised once for both.

    Arguments:
        matrices: The matrices :math:`A`, with shape :math:`(*, N, N)`.

    Raises:
        RuntimeError: If one is singular.

    Example:
        >>> inverse, ladj = inv_and_logabsdet(torch.eye(2).expand(3, 2, 2))
        >>> inverse.shape, ladj
        (torch.Size([3, 2, 2]), tensor([0., 0., 0.]))
    """
    return _one_by_one(_inv_and_logabsdet, matrices)


def _inv_and_logabsdet(matrix: Tensor) -> tuple[Tensor, Tensor]:
    factors, pivots = torch.linalg.lu_factor(matrix)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.lu_solve(factors, pivots, eye)
    return inverse, factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def inv_ex(matrices: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns the inverses of matrices, one by one, and which of them are singular.

    Arguments:
        matrices: The matrices, with shape :math:`(*, N, N)`.

    Returns:
        The inverses, and integers of shape :math:`(*)` that are zero for matrices that have one.

    Example:
        >>> inv_ex(torch.zeros(2, 2))[1].item() > 0
        True
    """
    return _one_by_one(torch.linalg.inv_ex, matrices)


def logabsdet(matrices: Tensor) -> Tensor:
    r"""Returns :math:`\log |\det A|` of matrices, one by one.

    Arguments:
        matrices: The matrices :math:`A`, with shape :math:`(*, N, N)`.

    Example:
        >>> logabsdet(torch.eye(2).expand(3, 2, 2))
        tensor([0., 0., 0.])
    """
    return _one_by_one(lambda matrix: torch.linalg.slogdet(matrix).logabsdet, matrices)


def lu(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns the factors of matrices by LU with pivots, one by one.

    Arguments:
        matrices: The matrices, with shape :math:`(*, N, N)`.

    Returns:
        Permutations, lower and upper triangular matrices, each with shape :math:`(*, N, N)`.

    Example:
        >>> p, lower, upper = lu(torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
        >>> p @ lower @ upper
        tensor([[0., 2.],
                [1., 3.]])
    """
    return _one_by_one(torch.linalg.lu, matrices)


def solve(matrices: Tensor, sides: Tensor) -> Tensor:
    r"""Returns the solutions :math:`X` of :math:`A X = B`, one by one.

    Arguments:
        matrices: The matrices :math:`A`, with shape :math:`(*, N, N)`.
        sides: The right sides :math:`B`, with shape :math:`(*, N, M)`.

    Raises:
        RuntimeError: If a matrix is singular.

    Example:
        >>> solve(2 * torch.eye(2), torch.ones(2, 1))
        tensor([[0.5000],
                [0.5000]])
    """
    return _one_by_one(torch.linalg.solve, matrices, sides)


def _one_by_one(f: Callable[..., Any], *stacks: Tensor) -> Any:
    batch = stacks[0].shape[:-2]
    if not batch or 0 in batch:  # one, or none
        return f(*stacks)
    found = [f(*row) for row in zip(*(t.flatten(0, -3) for t in stacks), strict=True)]
    if isinstance(found[0], Tensor):
        return torch.stack(found).unflatten(0, batch)
    return tuple(torch.stack(t).unflatten(0, batch) for t in zip(*found, strict=True))


def network_dtype(x: Tensor) -> torch.dtype:
    r"""Returns the dtype that networks compute in with such an input: that of autocast, where it is
    on, and else that of the input. Autocast leaves double precision alone.

    Arguments:
        x: The input, of any shape.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     network_dtype(torch.zeros(1)), network_dtype(torch.zeros(1).double())
        (torch.bfloat16, torch.float64)
    """
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    r"""Products of float32 matrices in float32 within, whatever the user's settings let them be.

    Under autocast, ``torch.set_float32_matmul_precision("medium")`` or TensorFloat-32 matrices are
    rounded to 7 or 10 bits before they are multiplied: good enough to train a network, and too
    coarse to whiten by, or to undo one matrix by another. Here autocast is off on the device of
    `x`, and torch is asked for full precision. Of convolutions this holds on the CPU alone.

    The settings belong to the process, not to the thread: what other threads multiply meanwhile
    is precise too, and the last that leaves brings the settings back, but for what was set
    meanwhile. Gradients are computed later, as the user has it. In compiled code autocast alone is
    off, for there the settings hold for whole graphs.

    Arguments:
        x: A tensor on the device in question, of any shape.

    Example:
        >>> with torch.autocast("cpu"), full_precision(x := torch.eye(2)):
        ...     (x @ x).dtype
        torch.float32
    """
    device = x.device.type
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    return _Exact(device)


class _ForAll:
    r"""torch's setting of what float32 matrices are rounded to before they are multiplied."""

    full = inherit = "highest"

    def read(self) -> str | None:
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:  # single operations are set otherwise, and they are all that counts
            return None

    def turn(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


class _ForOne(NamedTuple):
    r"""The same for one operation of one backend, since torch 2.9."""

    backend: Any
    operation: str
    full: str = "ieee"
    inherit: str = "none"  # lets more general settings hold

    def read(self) -> str | None:
        return getattr(getattr(self.backend, self.operation, None), "fp32_precision", None)

    def turn(self, value: str) -> None:
        getattr(self.backend, self.operation).fp32_precision = value


# The one for all comes first, as it changes the others. cuDNN's convolutions are left out: torch
# refuses to tell of any user's setting while they are exact and its recurrent networks are not.
_ALL, _CONVOLUTIONS = _ForAll(), _ForOne(torch.backends.mkldnn, "conv")
_SETTINGS = (
    _ALL,
    _ForOne(torch.backends.mkldnn, "matmul"),
    _CONVOLUTIONS,
    _ForOne(torch.backends.cuda, "matmul"),
)
_COARSE = ("bf16", "tf32", "medium", "high")

_within = 0
_held: list[tuple[_ForAll | _ForOne, str, str | None]] = []  # with the values before and within


class _Exact:
    r"""The context of :func:`full_precision`, for one use."""

    def __init__(self, device: str) -> None:
        # To ask is cheaper than to enter, and most often autocast is off.
        on = torch.is_autocast_enabled(device)
        self.autocast = torch.autocast(device, enabled=False) if on else None
        self.counted = False

    def __enter__(self) -> None:
        self.counted = _enter()
        if self.autocast is not None:
            self.autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.autocast is not None:
            self.autocast.__exit__(*error)
        if self.counted:
            _leave()


def _enter() -> bool:
    r"""Asks for full precision; returns whether there was anything to ask for."""
    global _within
    with _lock:
        if not _within:
            # The quick answer: the setting for all says nothing while a product differs from it.
            if _ALL.read() == _ALL.full and _CONVOLUTIONS.read() not in _COARSE:
                return False
            before = [(s, value) for s in _SETTINGS if (value := s.read()) is not None]
            coarse = [setting for setting, value in before if value in _COARSE]
            for setting in coarse:
                setting.turn(setting.full)
            _held[:] = [(s, value, s.read()) for s, value in before] if coarse else []
        _within += bool(_held)
        return bool(_held)


def _leave() -> None:
    global _within
    with _lock:
        _within -= 1
        if _within:
            return
        # What has another value by now was set by the user meanwhile.
        for setting, before in [(s, before) for s, before, held in _held if s.read() == held]:
            for value in (setting.inherit, before):
                if setting.read() != before:
                    setting.turn(value)
        _held.clear()
