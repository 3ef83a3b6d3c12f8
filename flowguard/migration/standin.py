r"""Functions of a host that are computed by flowguard for a while, without touching its models."""

__all__ = [
    "SLOPES",
    "UNCONSTRAINED",
    "StandIn",
    "Switch",
    "disagreement",
    "draw",
    "straight",
    "unconstrained",
]

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowguard.functional import (
    LEAST,
    straight_rational_quadratic_spline,
    unconstrained_rational_quadratic_spline,
)

#: The parameters of the functions that many libraries have copied from each other.
TENSORS = dict.fromkeys(
    ("inputs", "unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives"),
    Parameter.empty,
)
MINIMA = dict.fromkeys(("min_bin_width", "min_bin_height", "min_derivative"), LEAST)
#: The arguments of splines with unconstrained parameters, with what they are by default.
UNCONSTRAINED = {**TENSORS, "inverse": False, "tails": "linear", "tail_bound": 1.0, **MINIMA}
BOX = {"left": 0.0, "right": 1.0, "bottom": 0.0, "top": 1.0}
STRAIGHT = {**TENSORS, "inverse": False, **BOX, **MINIMA}

#: How many slopes there are beside those of the bins, by the kind of the tails.
SLOPES = {"linear": -1, "circular": 0}


class StandIn(NamedTuple):
    r"""What takes the place of a function of a host.

    Arguments:
        owner: The module or the class that holds the function.
        name: The name of the function there.
        make: From the host's function to ours, which is called with the same arguments.
        refuse: From the host's function to why it is not the one that flowguard knows, in words;
            empty if it is.
    """

    owner: Any
    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    refuse: Callable[[Callable[..., Any]], str]


# Not in the switch itself, which the compiler would have to know.
_EVERYWHERE: set[str] = set()  # the names of the switches that are on for all threads
_SOMEWHERE: set[str] = set()  # that are on for any thread
_HERE: ContextVar[frozenset[str]] = ContextVar("here", default=frozenset())  # for this one


def _is_on(name: str) -> bool:
    if torch.compiler.is_compiling():  # which knows nothing of threads
        return name in _EVERYWHERE or name in _SOMEWHERE
    return name in _EVERYWHERE or name in _HERE.get()


def _asking(name: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (ours if _is_on(name) else theirs)(*args, **kwargs)

    return choose


class Switch:
    r"""Creates a switch by which functions of a host are computed by flowguard, as long as it is on.

    While it is on in any thread, the host holds functions that ask which to call: inside of
    :meth:`on` they call ours for the thread (or the asynchronous task) that entered, after
    :meth:`turn_on` for all. Threads that were started inside of :meth:`on`, such as those of
    `torch.nn.DataParallel`, do not know of it. What is compiled is on as long as any thread is
    inside. Who has kept such a function calls the host's after the switch is off.

    Arguments:
        name: The name of the switch, which no other one has.
        find: Returns what is to be replaced, whenever the switch goes on.
    """

    def __init__(self, name: str, find: Callable[[], Iterable[StandIn]]) -> None:
        self._name = name
        self._find = find
        self._entered = 0
        self._lock = threading.RLock()
        self._placed: list[tuple[Any, str, Any, Any]] = []  # owner, name, theirs and ours

    @property
    def active(self) -> bool:
        r"""Whether the thread that asks is to be answered by our functions."""
        return _is_on(self._name)

    def check(self) -> None:
        r"""Refuses functions of the host that are not those which flowguard knows.

        Raises:
            RuntimeError: If there is one.
        """
        with self._lock:
            known = []
            for owner, name, _, refuse in () if self._placed else self._find():
                theirs = getattr(owner, name)
                # What was known once may rest on something else today.
                reason = "" if theirs in known else refuse(theirs)
                if reason:
                    raise RuntimeError(
                        f"{owner.__name__}.{name} is not the function that flowguard knows, as"
                        f" {reason}; nothing was replaced. Call"
                        " flowguard.functional.unconstrained_rational_quadratic_spline where that"
                        " is right."
                    )
                known.append(theirs)

    def theirs(self, owner: Any, name: str) -> Callable[..., Any]:
        r"""Returns the host's function, whether the switch is on or not.

        Arguments:
            owner: The module or class that holds it.
            name: Its name.
        """
        with self._lock:
            placed = {(id(where), what): function for where, what, function, _ in self._placed}
            function: Callable[..., Any] = placed.get((id(owner), name)) or getattr(owner, name)
            return function

    def turn_on(self) -> None:
        r"""Lets all threads use our functions until :meth:`turn_off`.

        Raises:
            RuntimeError: If the host's functions are not known.
        """
        with self._lock:
            self._place()
            _EVERYWHERE.add(self._name)

    def turn_off(self) -> None:
        r"""Takes :meth:`turn_on` back. Who is inside of :meth:`on` stays there."""
        with self._lock:
            _EVERYWHERE.discard(self._name)
            self._take_back()

    @contextmanager
    def on(self) -> Iterator[None]:
        r"""Lets this thread use our functions inside of it. Can be nested.

        Raises:
            RuntimeError: If the host's functions are not known.
        """
        with self._lock:
            self._place()
            self._entered += 1
            _SOMEWHERE.add(self._name)
        token = _HERE.set(_HERE.get() | {self._name})
        try:
            yield
        finally:
            _HERE.reset(token)
            with self._lock:
                self._entered -= 1
                if not self._entered:
                    _SOMEWHERE.discard(self._name)
                self._take_back()

    def _place(self) -> None:
        if self._placed:
            return
        self.check()
        for owner, name, make, _ in self._find():
            theirs = getattr(owner, name)
            ours = _asking(self._name, theirs, make(theirs))
            setattr(owner, name, ours)
            self._placed.append((owner, name, theirs, ours))

    def _take_back(self) -> None:
        if self._name in _EVERYWHERE or self._entered:
            return
        for owner, name, theirs, ours in self._placed:
            if vars(owner).get(name) is ours:  # else somebody has put something else there
                setattr(owner, name, theirs)
        self._placed.clear()


def disagreement(
    theirs: Callable[..., Any],
    ours: Callable[..., Any],
    calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    *,
    parameters: Mapping[str, Any],
    signature: Callable[..., Any] | None = None,
) -> str:
    r"""Returns why a function is not the same as another, in words; empty if none is found.

    It is the same if it has the same parameters with the same defaults, and if it returns the same
    tensors, up to :math:`10^{-9}` of one and their size, whenever it is tried. How it is written
    does not matter.

    Arguments:
        theirs: The function of a host.
        ours: The other one.
        calls: The positional and keyword arguments to try both with.
        parameters: The names of all parameters in their order, and their defaults;
            ``inspect.Parameter.empty`` where there is none.
        signature: What has these parameters, if it is not the function itself.
    """
    known = inspect.signature(signature or theirs)
    found = {p.name: p.default for p in known.parameters.values()}
    if list(found.items()) != list(parameters.items()):
        return f"it has other parameters or defaults: {known}"
    for args, options in calls:
        told = ", ".join(f"{name}={value}" for name, value in options.items())
        try:
            with torch.no_grad():
                pairs = [*zip(theirs(*args, **options), ours(*args, **options), strict=True)]
        except Exception as error:  # whatever it raises, it is not what we know
            return f"with {told} it raises {type(error).__name__}: {error}"
        for a, b in pairs:
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-9, atol=1e-9):
                return f"with {told} it returns other numbers"
    return ""


def draw(bins: int, slopes: int, scale: float, features: int = 1) -> list[Tensor]:
    r"""Returns numbers to try a spline with, the same ones each time: inputs, logits and slopes.

    Arguments:
        bins: The number of bins.
        slopes: The number of slopes.
        scale: How far the inputs reach.
        features: The number of features.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.linspace(-scale, scale, 32, dtype=torch.float64, device="cpu")
    x = x.unsqueeze(1).repeat(1, features)
    sizes = bins, bins, slopes
    shapes = [(32, features, size) for size in sizes]
    return [x, *(torch.randn(s, generator=generator, dtype=x.dtype, device="cpu") for s in shapes)]


def unconstrained(owner: Any, kinds: Sequence[str] = ("linear",)) -> StandIn:
    r"""Returns what takes the place of a module's ``unconstrained_rational_quadratic_spline``.

    Arguments:
        owner: The module.
        kinds: The tails that it knows; with circular ones, lists of both and tensors of bounds too.
    """
    return StandIn(
        owner,
        "unconstrained_rational_quadratic_spline",
        lambda _: unconstrained_rational_quadratic_spline,
        functools.partial(_refuse_unconstrained, kinds=kinds),
    )


def straight(owner: Any, error: type[Exception] | None = None) -> StandIn:
    r"""Returns what takes the place of a module's ``rational_quadratic_spline``.

    Arguments:
        owner: The module.
        error: What it raises for inputs outside of the box, if it does.
    """

    def within(
        inputs: Tensor,
        unnormalized_widths: Tensor,
        unnormalized_heights: Tensor,
        unnormalized_derivatives: Tensor,
        inverse: bool = False,
        left: float = 0.0,
        right: float = 1.0,
        *args: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        if error is not None and inputs.numel() and (inputs.min() < left or inputs.max() > right):
            raise error
        params = unnormalized_widths, unnormalized_heights, unnormalized_derivatives
        ours = straight_rational_quadratic_spline
        return ours(inputs, *params, inverse, left, right, *args, **options)

    return StandIn(owner, "rational_quadratic_spline", lambda _: within, _refuse_straight)


def _refuse_unconstrained(theirs: Callable[..., Any], kinds: Sequence[str]) -> str:
    options = {"tail_bound": 2.0, **dict(zip(MINIMA, (0.01, 0.02, 0.1), strict=True))}
    calls: list[tuple[list[Tensor], dict[str, Any]]] = [
        (draw(5, 5 + SLOPES[kind], 3.0), {"tails": kind, "inverse": inverse, **extra})
        for kind in kinds
        for inverse in (False, True)
        for extra in ({}, options)
    ]
    if len(kinds) > 1:  # of a list, values outside of the box are another matter
        bounds = torch.tensor([1.5, 2.0], dtype=torch.float64, device="cpu")
        both = {"tails": [*kinds], "tail_bound": bounds}
        calls += [(draw(5, 6, 1.5, len(kinds)), {"inverse": i, **both}) for i in (False, True)]
    ours = unconstrained_rational_quadratic_spline
    return disagreement(theirs, ours, calls, parameters=UNCONSTRAINED)


def _refuse_straight(theirs: Callable[..., Any]) -> str:
    box = {"left": -2.0, "right": 2.0, "bottom": -2.5, "top": 3.0}
    calls = [
        (draw(5, 6, 2.0), {"inverse": inverse, **box, "min_derivative": 0.1})
        for inverse in (False, True)
    ]
    return disagreement(theirs, straight_rational_quadratic_spline, calls, parameters=STRAIGHT)
