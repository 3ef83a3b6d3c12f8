r"""The flow inside of what holds one: wrappers of torch's, and modules of users' own.

A wrapper of torch's calls what it holds, and does nothing else. Of a module of a user's own, the
source tells whether what the flow samples is handed on as it is: an expression of its methods that
makes something of a sample is a reason to refuse it, and so is one that cannot be read.
"""

__all__ = [
    "Held",
    "HeldConditions",
    "conditioned",
    "held",
    "steps_within",
    "unwrapped",
    "wrapped_again",
]

import ast
import copy
import inspect
import textwrap
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from flowguard.bounds.rules import compiled, departure, has_rule, hooks_of, steps, within
from flowguard.bounds.steps import Refused, Remark, Step
from flowguard.hosts import of_a_host
from flowguard.numerics import instead

#: What samples, what scores, what only rearranges a sample, and what concerns the weights alone.
SAMPLING = {"rsample", "rsample_and_log_prob", "sample", "sample_and_log_prob"}
SCORING = {"forward_kld", "log_prob", "reverse_kld"}
SHAPING = {"cpu", "detach", "flatten", "movedim", "numpy", "permute", "reshape", "squeeze"}
SHAPING |= {"swapaxes", "transpose", "unbind", "unflatten", "unsqueeze", "view"}
AVERAGES = {"double", "exp", "float", "item", "logsumexp", "mean", "neg", "sum"}
WEIGHTS = {"batch_shape", "buffers", "eval", "event_shape", "named_parameters", "parameters"}
WEIGHTS |= {"requires_grad_", "state_dict", "train", "training"}

#: What hands weights out, to be changed perhaps; what a module changes its own by; and blocks that
#: leave these as they are.
WRITABLE = {"buffers", "get_buffer", "get_parameter", "named_buffers", "named_parameters"}
WRITABLE |= {"parameters", "state_dict"}
CHANGING = {"__delattr__", "__setattr__", "_apply", "add_module", "apply", "bfloat16", "double"}
CHANGING |= {"float", "half", "load_state_dict", "register_buffer", "register_forward_hook"}
CHANGING |= {"register_forward_pre_hook", "register_module", "register_parameter"}
CHANGING |= {"set_submodule", "to", "type"}
BLOCKS = {"autocast", "catch_warnings", "device", "enable_grad", "fork_rng", "inference_mode"}
BLOCKS |= {"kernels", "no_grad", "nullcontext", "record_function", "set_grad_enabled"}

#: Decorators that leave what a method returns as it is.
HARMLESS = ("property", "torch.no_grad", "torch.inference_mode", "torch.enable_grad", "override")

#: What reaches parts of a module in ways that its source does not show.
BUILTINS = {"delattr", "eval", "exec", "getattr", "globals", "locals", "setattr", "vars"}
HIDDEN = {"__dict__", "__getattr__", "__getattribute__", "_modules", "children"}
HIDDEN |= {"get_submodule", "modules", "named_children", "named_modules"}
HIDDEN |= {"_call_impl", "_wrapped_call_impl"}
OPAQUE = {"__call__", "__getattr__", "__getattribute__", "__setattr__"}
OPAQUE |= {"_call_impl", "_wrapped_call_impl"}

#: What is looked at of noise without changing it; and what returns the module that it was called of.
LOOKED = {"device", "dtype", "is_cuda", "ndim", "shape"}
ITSELF = {"eval", "requires_grad_", "train"}

#: Where a module keeps its parts, and whose objects lead from a module back to it.
PARTS = ("_modules", "_parameters", "_buffers")
TRAINERS = {"lightning", "lightning_fabric", "pytorch_lightning", "torch"}

_CONDITIONED: list[type] = []


class Held(NamedTuple):
    r"""What a module holds.

    Arguments:
        path: The name of the flow within it; empty where there is none.
        flow: The flow; the module itself where there is none.
        reason: Why the flow does not stand for the module, in words; empty if it does.
    """

    path: str
    flow: Any
    reason: str = ""


def conditioned(*classes: type) -> None:
    r"""Registers flows that are called with a condition alone, and return a distribution.

    Arguments:
        classes: The classes of a library.
    """
    _CONDITIONED.extend(classes)


def unwrapped(model: Any) -> tuple[tuple[str, ...], Any]:
    r"""Returns the names of the wrappers of torch's around a model, from the outside in, and what
    they hold: compiled modules, data-parallel and averaged ones, and a `Sequential` of one.

    Arguments:
        model: The model.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> names, inner = unwrapped(torch.nn.Sequential(torch.nn.DataParallel(layer)))
        >>> names, inner is layer
        (('0', 'module'), True)
    """
    names: list[str] = []
    while name := _wrapped(model):
        names.append(name)
        model = getattr(model, name) if name != "0" else model[0]
    return tuple(names), model


def _wrapped(model: Any) -> str:
    if compiled(model) is not model:
        return "_orig_mod"
    if isinstance(model, nn.DataParallel | DistributedDataParallel | AveragedModel):
        return "module"
    return "0" if type(model) is nn.Sequential and len(model) == 1 else ""


def held(model: Any) -> Held | None:
    r"""Returns the flow that a module of a user's own holds, and whether its samples are those of
    the module; :py:`None` for what is a flow or a layer itself, and for what holds none.

    Arguments:
        model: The model.
    """
    module = type(model).__module__.partition(".")[0]
    known = module in ("torch", "flowguard") or of_a_host(model) or has_rule(model)
    if known or not isinstance(model, nn.Module):
        return None
    found = list(_outermost("", model))
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(name for name, _ in found[:4]) + (", ..." if len(found) > 4 else "")
        return Held("", model, f"it holds several parts that have a rule: {names}{_advice(found)}")
    ((path, flow),) = found
    reason = departure(model, type(model)) or _why_not(model, path, flow)
    return Held(path, flow, f"{reason}{_advice(found)}" if reason else "")


def _advice(found: list[tuple[str, Any]]) -> str:
    return f"; give the one that is meant, such as model.{found[0][0]}"


def _outermost(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    r"""The outermost parts that have a rule."""
    for name, part in module.named_children():
        if has_rule(part):
            yield prefix + name, part
        else:
            yield from _outermost(f"{prefix}{name}.", part)


def _why_not(model: nn.Module, path: str, flow: Any) -> str:
    r"""Says why the samples of a module may not be those of the flow in it."""
    if "." in path:
        return f"{path} is a part of a part, and what is made of its samples is not looked at"
    if path.startswith("_") and "__" in path:
        return f"its {path} is private: its source spells that otherwise"
    if place := _elsewhere(model, path, flow):
        return f"its {place} keeps {path}, or a part of it, elsewhere too"
    own = type(model).__module__.partition(".")[0]
    conditional = isinstance(flow, tuple(_CONDITIONED))
    known = _Known(frozenset(), frozenset(), frozenset())
    while True:
        readers: dict[str, list[_Reader]] = {}
        for cls in type(model).__mro__:
            if cls in (nn.Module, object):
                continue
            theirs = cls.__module__.partition(".")[0] != own
            for name, function, foreign in _functions(cls):
                if name == "__init__" or (theirs and not _uses(function, path, known.handing)):
                    continue
                if name.startswith(f"_{cls.__name__.lstrip('_')}__"):
                    return f"it has a private {name}, which its source spells otherwise"
                if name in OPAQUE:
                    return f"it has a {name} of its own"
                why, reader = _reads(function, path, conditional, known)
                if foreign and not why:
                    why = "is wrapped by a function that may change what it returns"
                if why:
                    return f"its {name} {why}"
                if reader is not None:
                    readers.setdefault(name, []).append(reader)
        before, known = known, _Known.of(readers, known)
        if known == before:
            return _doubt(readers, known.handing) or _changed(model, path, flow, readers, known)


class _Known(NamedTuple):
    r"""Which methods return what the flow returned, which of these something with it, and which
    return what is made of a density, whichever class they are of."""

    handing: frozenset[str]
    mixed: frozenset[str]
    scoring: frozenset[str]

    @classmethod
    def of(cls, readers: "dict[str, list[_Reader]]", before: "_Known") -> "_Known":
        handing = {name for name, found in readers.items() if any(r.hands for r in found)}
        mixed = {name for name, found in readers.items() if any(r.mixed for r in found)}
        scoring = {
            name
            for name, found in readers.items()
            if any(r.densities for r in found) and not any(r.hands or r.elsewise for r in found)
        }
        # What hands on stays so: otherwise two methods that call one another might go on for ever.
        return cls(before.handing | handing, before.mixed | mixed, frozenset(scoring - handing))


def _doubt(readers: "dict[str, list[_Reader]]", handing: frozenset[str]) -> str:
    r"""Says which of the methods that hand on a sample, or are called so, may return something else,
    here or in another class."""
    for name in sorted(readers.keys() & (handing | SAMPLING)):
        for reader in readers[name]:
            if reader.doubt:
                return f"its {name} {reader.doubt}"
    return ""


def _changed(
    model: nn.Module,
    path: str,
    flow: nn.Module,
    readers: "dict[str, list[_Reader]]",
    known: _Known,
) -> str:
    r"""Says which of the methods that hand on a sample, or that these call, may change the weights."""
    ahead, called = sorted(known.handing), set[str]()
    while ahead:
        name = ahead.pop()
        called.add(name)
        for reader in readers.get(name, ()):
            if why := reader.changes or _reaching(model, path, flow, reader.used):
                return f"its {name} {why}"
            # A module is put in evaluation mode by `train`.
            used = reader.used | ({"train"} if "eval" in reader.used else set())
            ahead += sorted((used & readers.keys()) - called)
    return ""


def _reaching(model: nn.Module, path: str, flow: nn.Module, used: set[str]) -> str:
    r"""Says which of the objects that a method uses keeps the flow's weights, which it may change."""
    known = {*map(id, flow.modules()), *map(_place, (*flow.parameters(), *flow.buffers()))}
    for name in sorted(used - {path}):
        kept = [*(vars(c).get(name) for c in type(model).__mro__), vars(model).get(name)]
        kept += [getattr(model, where).get(name) for where in PARTS]
        if any(_place(part) in known for part in _all_kept(kept)):
            return f"uses its {name}, which keeps {path}, or weights of it, and may change these"
    return ""


def _place(part: Any) -> int:
    r"""What tells whether something is the same: of tensors, the memory that they look at."""
    if isinstance(part, Tensor) and part.device.type != "meta":
        return part.untyped_storage().data_ptr() or id(part)
    return id(part)


def _all_kept(values: list[Any]) -> Iterator[Any]:
    r"""All that some values keep, and what that keeps, with these themselves."""
    ahead, seen = [*values], set[int]()
    while ahead:
        part = ahead.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            ahead += _kept(part)


def _elsewhere(model: nn.Module, path: str, flow: Any) -> str:
    r"""The name under which a module keeps its flow beside `path`, in lists and functions too."""
    inside = {id(module) for module in flow.modules()}
    known = {id(m) for m in flow.modules() if not type(m).__module__.startswith("torch.")}
    known.add(id(model))
    for prefix, module in model.named_modules():
        if id(module) in inside:
            continue
        entries = {**vars(module), **module._modules}
        for name in ("_modules", "_parameters", "_buffers", *((path,) if module is model else ())):
            entries.pop(name, None)
        for name, value in entries.items():
            if any(id(part) in known for part in _all_kept([value])):
                return f"{prefix}.{name}" if prefix else name
    return ""


def _kept(value: Any) -> list[Any]:
    r"""What a collection, something that can be called or an object keeps."""
    if isinstance(value, type | ModuleType | Tensor | str | bytes) or _of_trainer(value):
        return []
    if isinstance(value, Mapping):
        return [*value.values()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [*value]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if c != CellType()]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, BuiltinMethodType):
        return [value.__self__]
    slots = [getattr(c, "__slots__", ()) for c in type(value).__mro__]
    names = [n for s in slots for n in ((s,) if isinstance(s, str) else s)]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, n, None) for n in names)]


def _of_trainer(value: Any) -> bool:
    r"""Whether it is one of the objects that a trainer leaves in a module, which lead back to it."""
    trainer = type(value).__module__.partition(".")[0] in TRAINERS
    return trainer and not isinstance(value, nn.Module) and not hasattr(value, "__wrapped__")


def _uses(function: FunctionType | None, path: str, handing: frozenset[str]) -> bool:
    r"""Whether a method of a library's base class may have to do with the flow."""
    if function is None:
        return False
    named = {path, *SAMPLING, *handing} - {"forward"}
    if not _names(function.__code__).isdisjoint(named):
        return True
    return "forward" in handing and _calls_its_module(function)


def _parsed(function: FunctionType) -> ast.stmt | None:
    r"""The source of a function, if it can be read."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return node


def _calls_its_module(function: FunctionType) -> bool:
    r"""Whether a method may call the module that it is of, which no name tells."""
    node = _parsed(function)
    if node is None:
        return True
    me = function.__code__.co_varnames[:1]
    return any(
        isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in me
        for part in ast.walk(node)
    )


def _functions(cls: type) -> Iterator[tuple[str, FunctionType | None, bool]]:
    r"""The methods of a class, and what its properties call; nothing where that is not known. And
    whether something that is not torch's is put around them."""
    for name, member in vars(cls).items():
        properties = isinstance(member, property)
        for function in (member.fget, member.fset) if properties else (member,):
            function = getattr(function, "__func__", function)
            if isinstance(wrapped := inspect.unwrap(function), FunctionType):
                yield name, wrapped, _is_foreign(inspect.unwrap(function, stop=_is_foreign))
            elif hasattr(member, "__get__") and function is not None:
                if not name.startswith("__") or name in OPAQUE:
                    yield name, None, False


def _is_foreign(function: Any) -> bool:
    r"""Whether a function is put around another one, and not by torch."""
    home = getattr(function, "__globals__", {}).get("__name__", "")
    return hasattr(function, "__wrapped__") and not home.startswith("torch.")


def _names(code: CodeType) -> set[str]:
    r"""The names that a function uses, and those within it."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return {*code.co_names}.union(*map(_names, inner))


def _reads(
    function: FunctionType | None,
    path: str,
    conditional: bool,
    known: _Known,
) -> "tuple[str, _Reader | None]":
    r"""Says what a method makes of a sample, if anything; and what else was read of it."""
    if function is None:
        return "is no plain method", None
    node = _parsed(function)
    if node is None:
        return "has no source that can be read", None
    # `eval` of a module is another thing.
    called = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & BUILTINS
    if hidden := (HIDDEN & _names(function.__code__)) | called:
        return f"reaches parts by {min(hidden)}, which may be the flow", None
    if not isinstance(node, ast.FunctionDef):
        return "is no plain method", None
    decorators = [ast.unparse(getattr(d, "func", d)) for d in node.decorator_list]
    if strange := [d for d in decorators if d not in HARMLESS]:
        return f"is decorated by {strange[0]}, which may change what it returns", None
    if not (node.args.posonlyargs or node.args.args):
        return "takes its module by *args" if node.args.vararg else "", None
    reader = _Reader(node, path, conditional, known)
    return reader.complaint, reader


class _Reader(ast.NodeVisitor):
    r"""What a method does with the flow that its module holds, statement by statement.

    Whatever comes of the flow and is no density may be named, returned, and reshaped. A method that
    returns it returns nothing else on other ways, but densities.
    """

    def __init__(self, node: ast.FunctionDef, path: str, conditional: bool, known: _Known) -> None:
        first, *others = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        self.me, self.path, self.conditional = first.arg, path, conditional
        self.handing, self.known = known.handing, known
        self.hands = False
        self.mixed = False  # whether that comes with something else
        self.given = {arg.arg for arg in others} - self._touched(node)
        self.made: set[str] = set()  # names of what comes of the flow
        self.sure: set[str] = set()  # those that are of nothing else, whatever way was taken
        self.scored: set[str] = set()  # names of what is made of a density
        self.constants = {self.me, "math", "np", "torch"}
        self.constants |= self._constant_names(node)
        self.weights: set[str] = set()  # names of a weight, of which the device is asked
        self.used: set[str] = set()  # what the module has beside the flow
        self.elsewise = False  # whether something that is neither is returned
        self.densities = 0  # how often one is returned
        self.complaint = ""
        self.doubt = ""  # a complaint as far as is known which methods hand on a sample
        self.changes = ""  # what may change the weights
        # A name that is given something in a loop may have been used before: twice is enough.
        for _ in range(2):
            self.sure = set()
            for statement in node.body:
                self.visit(statement)

    def _touched(self, node: ast.AST) -> set[str]:
        r"""The names that are put to any other use than to be handed to the flow."""
        flow = f"{self.me}.{self.path}"
        handed: set[int] = set()
        for part in ast.walk(node):
            match part:
                case ast.Call(func=called, args=[ast.Name() as name, *_]):
                    if ast.unparse(called) in (flow, f"{flow}.inverse"):
                        handed.add(id(name))
                case ast.Attribute(value=ast.Name() as name, attr=attr) if attr in LOOKED:
                    handed.add(id(name))
        names = (part for part in ast.walk(node) if isinstance(part, ast.Name))
        return {name.id for name in names if id(name) not in handed}

    def _complain(self, node: ast.AST) -> None:
        words = f"does more than hand on what {self.path} samples: {ast.unparse(node)[:60]}"
        self.complaint = self.complaint or words

    def _doubt_return(self, node: ast.AST) -> None:
        words = f"may return something else than {self.path} samples: {ast.unparse(node)[:60]}"
        self.doubt = self.doubt or words

    def _doubt_weights(self, node: ast.AST) -> None:
        words = f"may change the weights of {self.path}: {ast.unparse(node)[:60]}"
        self.changes = self.changes or words

    def comes_of_it(self, node: ast.AST | None) -> bool:
        r"""Whether an expression is the flow, or what it returned, and nothing made of that."""
        match node:
            case ast.Name(id=name):
                return name in self.made
            case ast.Attribute(value=ast.Name(id=self.me), attr=self.path):
                return isinstance(node.ctx, ast.Load)
            case ast.Subscript(value=value, slice=index):
                self.visit(index)
                return self.comes_of_it(value)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                found = [self.comes_of_it(part) for part in parts]
                for part, comes in zip(parts, found, strict=True):
                    if not comes:
                        self.visit(part)
                if any(found) and not all(found):
                    self._doubt_return(node)
                return any(found)
            case ast.IfExp(test=test, body=one, orelse=other):
                self.visit(test)
                found = [self.comes_of_it(part) for part in (one, other)]
                if any(found) and not all(found):
                    self._doubt_return(node)
                return any(found)
            case ast.Call(func=called) if self._is_own(called):
                if self._is_mixed(called):
                    self._doubt_return(node)
                for part in (*node.args, *(keyword.value for keyword in node.keywords)):
                    self.visit(part)
                return True
            case ast.Call(func=called):
                return self._called(node, called)
            case ast.Attribute():
                return self._is_own(node)  # a property
        return False

    def _is_own(self, node: ast.expr) -> bool:
        r"""Whether it is one of the methods that return what the flow returned."""
        match node:
            case ast.Name(id=self.me):
                return "forward" in self.handing
            case ast.Attribute(value=ast.Name(id=self.me), attr="__call__"):
                return "forward" in self.handing
            case ast.Attribute(value=ast.Name(id=self.me), attr=name):
                return name in self.handing
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                return name in self.handing
        return False

    def _is_mixed(self, called: ast.expr) -> bool:
        r"""Whether it is one of those that return something else with it."""
        name = called.attr if isinstance(called, ast.Attribute) else "forward"
        return name in self.known.mixed

    def _called(self, node: ast.Call, called: ast.expr) -> bool:
        rest = [*node.args, *(keyword.value for keyword in node.keywords)]
        if isinstance(called, ast.Attribute) and self.comes_of_it(called.value):
            name = called.attr
            if name in ITSELF and ast.unparse(called.value) == f"{self.me}.{self.path}":
                return True
            if name == "view" and not _is_a_shape(node):
                self._complain(node)
            known = name in SAMPLING | SCORING | SHAPING | WEIGHTS or self._plain(name, node)
        elif self.comes_of_it(called):
            name, known = "", self.conditional or self._plain("inverse", node)
        else:
            return False
        if not known:
            self._complain(node)
        for part in rest:
            self.visit(part)
        return name not in SCORING | WEIGHTS

    def _plain(self, name: str, node: ast.Call) -> bool:
        r"""Whether noise is handed to the flow as it was given."""
        first = node.args[0] if node.args else None
        plain = isinstance(first, ast.Name) and first.id in self.given - self.made
        return name == "inverse" and plain

    def visit_Name(self, node: ast.Name) -> None:
        r"""Refuses what comes of the flow where it is not handed on, and the whole module."""
        if isinstance(node.ctx, ast.Load) and (node.id in self.made or node.id == self.me):
            self._complain(node)
        elif isinstance(node.ctx, ast.Load) and node.id in self.weights:
            self._doubt_weights(node)
        elif isinstance(node.ctx, ast.Store):
            self._name(node, False)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        r"""Refuses the flow itself where it is not called, and what else it returned."""
        if self.comes_of_it(node.value) and node.attr in WEIGHTS:
            return
        named = isinstance(node.value, ast.Name) and node.value.id in self.weights
        if node.attr in LOOKED and (named or self._is_weight(node.value)):
            return
        mine = ast.unparse(node.value) in (self.me, "super()")
        if (mine and node.attr in WRITABLE | CHANGING) or self._hands_weights(node):
            self._doubt_weights(node)
        if mine:
            self.used.add(node.attr)
        if isinstance(node.value, ast.Name) and node.value.id == self.me:
            if node.attr == self.path:
                self._complain(node)
        else:
            self.visit(node.value)

    def _hands_weights(self, node: ast.expr) -> bool:
        r"""Whether it is what hands out the weights of the flow."""
        return (
            isinstance(node, ast.Attribute)
            and node.attr in WRITABLE
            and self.comes_of_it(node.value)
        )

    def _is_weight(self, node: ast.expr) -> bool:
        r"""Whether it is some weight of the module or the flow, which may be looked at."""
        match node:
            case ast.Call(func=ast.Name(id="next"), args=[ast.Call() as given]):
                match given:
                    case ast.Call(func=ast.Name(id="iter"), args=[ast.Call() as within]):
                        given = within
                called = ast.unparse(given.func)
                owners = (self.me, f"{self.me}.{self.path}")
                return called in {f"{owner}.{name}" for owner in owners for name in WRITABLE}
        return False

    def visit_Call(self, node: ast.Call) -> None:
        r"""Looks at a call whose result is put to use."""
        if ast.unparse(node.func) == "super":
            return
        if self._hands_weights(node.func):
            self._doubt_weights(node)
        if self.comes_of_it(node):
            self._complain(node)
        elif isinstance(node.func, ast.Name) and node.func.id == self.me:
            for part in (*node.args, *(keyword.value for keyword in node.keywords)):
                self.visit(part)
        elif not self._is_known(node):
            self.generic_visit(node)

    def _is_known(self, node: ast.Call) -> bool:
        r"""Whether a call is one of the flow that gives a density, and was looked at."""
        called = node.func
        return isinstance(called, ast.Attribute) and self.comes_of_it(called.value)

    def visit_Return(self, node: ast.Return) -> None:
        r"""Notes what is returned: what comes of the flow, a density, or something else."""
        self._returned(node.value)

    def _returned(self, value: ast.expr | None) -> None:
        if isinstance(value, ast.IfExp):
            self.visit(value.test)
            self._returned(value.body)
            self._returned(value.orelse)
        elif value is None or ast.unparse(value) in ("None", self.me):
            return
        elif isinstance(value, ast.Call) and self._is_own(value.func):
            self.hands, self.mixed = True, self.mixed or self._is_mixed(value.func)
            for part in (*value.args, *(keyword.value for keyword in value.keywords)):
                self.visit(part)
        elif isinstance(value, ast.Tuple) and any(map(self.comes_of_it, value.elts)):
            for part in value.elts:  # a sample, and what goes with it
                if self.comes_of_it(part):
                    self._handed(part)
                else:
                    self.visit(part)
                    self.mixed = True
        elif self.comes_of_it(value):
            self._handed(value)
        else:
            self.visit(value)
            if self._is_density(value):
                self.densities += 1
            else:
                self.elsewise = True
                self._doubt_return(value)

    def _handed(self, value: ast.expr) -> None:
        self.hands = True
        if self._names_in(value) & self.made - self.sure:
            self._doubt_return(value)

    @staticmethod
    def _names_in(node: ast.AST) -> set[str]:
        return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}

    def _is_density(self, node: ast.AST) -> bool:
        r"""Whether an expression is a density, or made of densities and constants alone."""
        match node:
            case ast.Name(id=name):
                return name in self.scored & self.sure
            case ast.UnaryOp(operand=one) | ast.Subscript(value=one):
                return self._is_density(one)
            case ast.BinOp(left=one, right=other):
                both = self._is_density(one), self._is_density(other)
                return all(both) or (any(both) and self._is_constant(other if both[0] else one))
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Dict(values=parts):
                return bool(parts) and all(map(self._is_density, parts))
            case ast.Call(func=ast.Attribute(value=owner, attr=name)):
                if name in SCORING:
                    return True
                if ast.unparse(owner) in (self.me, "super()"):
                    return name in self.known.scoring
                if ast.unparse(owner) == "torch":
                    return name in AVERAGES and all(map(self._is_density, node.args[:1]))
                return name in AVERAGES | SHAPING and self._is_density(owner)
            case ast.Call(func=ast.Name(id=self.me)):
                return "forward" in self.known.scoring
        return False

    def _is_constant(self, node: ast.AST) -> bool:
        r"""Whether an expression has to do with numbers and with weights alone."""
        return self._names_in(node) <= self.constants

    def _constant_names(self, node: ast.FunctionDef) -> set[str]:
        r"""The names that are never given anything but such an expression."""
        parts = [*ast.walk(node)]
        given: dict[str, set[str]] = {}
        for part in parts:
            match part:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    given[name] = given.get(name, set()) | self._names_in(value)
        places = [id(p.targets[0]) for p in parts if isinstance(p, ast.Assign)]
        stored = [p for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)]
        taken = {p.id for p in stored if id(p) not in places}
        taken |= {part.arg for part in parts if isinstance(part, ast.arg)}
        found = {*given} - taken
        while wrong := {name for name in found if not given[name] <= found | self.constants}:
            found -= wrong
        return found

    def _ways(self, *ways: list[ast.stmt]) -> None:
        r"""Visits statements of which one or another list is run."""
        before, after = self.sure, list[set[str]]()
        for way in ways:
            self.sure = {*before}
            for statement in way:
                self.visit(statement)
            if not (way and isinstance(way[-1], ast.Return | ast.Raise)):
                after.append(self.sure)
        self.sure = set.intersection(*after) if after else before

    def _unsettle(self, *nodes: ast.AST) -> None:
        r"""Takes names as unsure that are given something in statements which may end halfway."""
        parts = [part for node in nodes for part in ast.walk(node)]
        stored = [p.id for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)]
        binding = ast.ExceptHandler | ast.MatchAs | ast.MatchStar
        bound = [p.name for p in parts if isinstance(p, binding)]
        rest = [p.rest for p in parts if isinstance(p, ast.MatchMapping)]
        self.sure -= {*stored, *bound, *rest}

    def visit_If(self, node: ast.If) -> None:
        r"""Goes both ways."""
        self.visit(node.test)
        self._ways(node.body, node.orelse)

    def visit_For(self, node: ast.For | ast.While) -> None:
        r"""Goes through a loop, which may end before it began."""
        self._unsettle(node)
        if isinstance(node, ast.For):
            self.visit(node.iter)
            self.visit(node.target)
        else:
            self.visit(node.test)
        self._ways(node.body, [])
        self._unsettle(node)
        self._ways(node.orelse, [])

    visit_While = visit_For

    def visit_Try(self, node: ast.Try) -> None:
        r"""Goes the usual way and that of each error, which may happen anywhere."""
        self._unsettle(node)
        before = {*self.sure}
        self._ways([*node.body, *node.orelse], *(handler.body for handler in node.handlers))
        # What comes last comes after an error, too.
        after, self.sure = self.sure, before
        for statement in node.finalbody:
            self.visit(statement)
        self.sure = after
        self._unsettle(*node.finalbody)

    visit_TryStar = visit_Try  # type: ignore[assignment]

    def visit_Match(self, node: ast.Match) -> None:
        r"""Goes the way of each case, and of none."""
        self.visit(node.subject)
        self._unsettle(node)
        for case in node.cases:
            if case.guard is not None:
                self.visit(case.guard)
        self._ways(*(case.body for case in node.cases), [])

    def visit_With(self, node: ast.With) -> None:
        r"""Looks at what a block is within, which may change weights for a while, or end it
        halfway."""
        halfway = False
        for item in node.items:
            called = item.context_expr
            while isinstance(called, ast.Call):
                called = called.func
            names = ast.unparse(called).split(".")
            known = names[0] != self.me and names[-1] in BLOCKS
            if names[0] != self.me and not known:
                self._doubt_weights(item.context_expr)
            self.visit(item)
            halfway = halfway or not known
        for statement in node.body:
            self.visit(statement)
        if halfway:
            self._unsettle(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        r"""Looks at a call whose result is dropped."""
        if not self.comes_of_it(node.value):
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        r"""Refuses what changes a sample."""
        self.visit(node.value)
        if self._is_of_it(node.target):
            self._complain(node)

    def _is_of_it(self, target: ast.expr) -> bool:
        r"""Whether what is written to is a part of what comes of the flow."""
        while isinstance(target, ast.Subscript | ast.Attribute | ast.Starred):
            # Written to, it is not loaded itself: what it belongs to is.
            target = target.value
            if self.comes_of_it(target):
                return True
        return isinstance(target, ast.Name) and target.id in self.made

    def visit_Global(self, node: ast.Global) -> None:
        r"""Refuses names that other methods see."""
        self._complain(node)

    visit_Nonlocal = visit_Global  # type: ignore[assignment]

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        r"""Forgets names that are given to what is imported."""
        self.sure -= {alias.asname or alias.name for alias in node.names}

    visit_ImportFrom = visit_Import

    def visit_Yield(self, node: ast.Yield | ast.YieldFrom) -> None:
        r"""Takes what is yielded as something else."""
        self._doubt_return(node)
        self.generic_visit(node)

    visit_YieldFrom = visit_Yield

    def _refuse_inner(self, node: ast.AST) -> None:
        r"""Refuses functions within the method that may have to do with the flow."""
        self.sure.discard(getattr(node, "name", ""))
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if names & {self.me, *self.made}:
            self._complain(node)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = _refuse_inner

    def visit_Assign(self, node: ast.Assign) -> None:
        r"""Remembers the names of what comes of the flow, and of densities."""
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)) if len(
                names
            ) == len(values) and not any(
                isinstance(part, ast.Starred) for part in (*names, *values)
            ):
                pairs = [([name], value) for name, value in zip(names, values, strict=True)]
            case _:
                pairs = [(node.targets, node.value)]
        found = [(targets, value, *self._made_of(value)) for targets, value in pairs]
        for targets, value, comes, density in found:
            for target in targets:
                self._name(target, comes)
                if isinstance(target, ast.Name):
                    self.weights.discard(target.id)
                    if self._is_weight(value):
                        self.weights.add(target.id)
                if density:
                    self.scored |= self._names_in(target)
                    self.sure |= self._names_in(target)

    def _made_of(self, value: ast.expr) -> tuple[bool, bool]:
        r"""Whether an expression comes of the flow, and whether it is made of a density."""
        if self.comes_of_it(value):
            return True, False
        if not self._is_weight(value):
            self.visit(value)
        return False, self._is_density(value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        r"""Remembers the name of what comes of the flow."""
        comes = self.comes_of_it(node.value)
        if node.value is not None and not comes:
            self.visit(node.value)
        self._name(node.target, comes)

    def _name(self, target: ast.expr, comes: bool) -> None:
        r"""Once a name is that of a sample, it stays one."""
        if isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self._name(part, comes)
        elif isinstance(target, ast.Name):
            self.given.discard(target.id)
            if comes:
                self.made.add(target.id)
                self.sure.add(target.id)
            else:
                self.sure.discard(target.id)
        elif comes or self._is_of_it(target):
            self._complain(target)
        else:
            self.visit(target)


def _is_a_shape(view: ast.Call) -> bool:
    r"""Whether what is viewed takes another shape; if not, another dtype may it be."""
    if view.keywords or len(view.args) != 1:
        return not view.keywords
    match view.args[0]:
        case ast.Constant(value=int()) | ast.UnaryOp() | ast.Tuple() | ast.List():
            return True
        case ast.Attribute(attr="shape") | ast.Call(func=ast.Attribute(attr="size")):
            return True
    return False


def steps_within(model: Any, sampling: bool = True) -> list[Step]:
    r"""Returns the steps of a model; of a module that only holds a flow, those of the flow.

    Arguments:
        model: The model.
        sampling: Whether it runs towards data. A holder tells of nothing else.
    """
    inner = compiled(model)
    found = held(inner) if sampling and not hooks_of(model) else None
    if found is None:
        return steps(model, sampling)
    kind = type(inner).__name__
    if found.reason:
        return [Refused(kind=kind, reason=found.reason)]
    remark = Remark(kind=kind, depends=f"hands on what its {found.path} samples")
    return [*within(found.path, found.flow), remark]


def wrapped_again(wrapper: nn.Module, inner: nn.Module) -> nn.Module:
    r"""Returns a wrapper, or several, as another one is, around another model.

    Arguments:
        wrapper: The wrapper, which stays as it is.
        inner: The model that comes into the innermost one.
    """
    _, old = unwrapped(wrapper)
    return copy.deepcopy(wrapper, {id(old): inner})


class HeldConditions:
    r"""Creates a function from the condition of a holder to that of the flow in it.

    The holder is called as its users do, with the condition, or with data and the condition in
    either order, until it calls the flow; what the flow is told then must not depend on the data.

    Arguments:
        model: The holder.
        path: The name of the flow.
    """

    def __init__(self, model: Any, path: str) -> None:
        self.model, self.path = model, path
        self.way: Callable[[Any, Any], Any] | None = None

    def __call__(self, y: Any, x: Tensor | None = None) -> Any:
        r"""Returns what the flow is told.

        Arguments:
            y: The condition of the holder.
            x: The data; if :py:`None`, some zeros.

        Raises:
            TypeError: If no way to call the holder is found.
        """
        if y is None:
            return None
        if x is None:
            first = y if isinstance(y, Tensor) else y[0]
            x = first.new_zeros(len(first), 1)
        if self.way is None:
            self.way = self._found(y, x)
        return self._told(self.way, y, x)

    def ways(self) -> list[Callable[[Any, Any], Any]]:
        r"""Returns how the holder may be called with a condition and data."""
        model = self.model
        return [
            lambda y, x: model(y),
            lambda y, x: model(x, y),
            lambda y, x: model(y, x),
            lambda y, x: model.log_prob(x, y),
            lambda y, x: model.sample(y),
        ]

    def _found(self, y: Any, x: Tensor) -> Callable[[Any, Any], Any]:
        for way in self.ways():
            try:
                with torch.no_grad():
                    one, other = (self._told(way, y, data) for data in (x, x + 1))
            except (AttributeError, LookupError, NotImplementedError, TypeError):
                continue
            except (RuntimeError, ValueError):  # shapes that do not go together
                continue
            if one is not None and _same(one, other):
                return way
        raise TypeError(
            f"flowguard does not see how {type(self.model).__name__} tells its {self.path} of a"
            f" condition; give model.{self.path}, and what it is told"
        )

    def _told(self, way: Callable[[Any, Any], Any], y: Any, x: Any) -> Any:
        flow = self.model.get_submodule(self.path)
        heard = _listen(flow, lambda: way(y, x))
        if heard is None:
            raise LookupError(f"{self.path} was not called")
        name, arguments, options = heard
        given = (*arguments, *options.values())
        alone = name == "forward" and isinstance(flow, tuple(_CONDITIONED))
        return given[0 if alone else 1]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return all(map(_same, one, other))


def _listen(flow: Any, call: Callable[[], Any]) -> "Heard | None":
    r"""What a flow is called with by some call. The flow is not run."""
    with ExitStack() as stack:
        for name in ("forward", *sorted(SAMPLING | SCORING)):
            if hasattr(flow, name):
                stack.enter_context(instead(flow, name, partial(_stop, name)))
        try:
            call()
        except _Stop as stop:
            return stop.heard
    return None


class Heard(NamedTuple):
    r"""What a flow was called with, when its holder was called.

    Arguments:
        method: The name of its method.
        arguments: The arguments, without the flow.
        options: The arguments by name.
    """

    method: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Stop(Exception):
    r"""What ends a call of a holder, as soon as it calls the flow."""

    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self.heard = heard


def _stop(name: str, *arguments: Any, **options: Any) -> Any:
    raise _Stop(Heard(name, arguments, options))
