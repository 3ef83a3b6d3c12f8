r"""``flowguard inspect``."""

__all__ = ["HELP", "parser", "run"]

from collections.abc import Iterator
from typing import Any

import torch.nn as nn

from flowguard.cli.machine import threads
from flowguard.cli.parsing import Parser, UserError, folder, number, paths

#: What the command does, in one line.
HELP = "tell of a model: architecture, certificate, calibration"


def parser() -> Parser:
    r"""Returns the parser."""
    inspect = Parser(
        description=(
            "Tell what a model folder holds: its architecture with the number of parameters, what"
            " no element of the flow's output can exceed whatever the condition is, and whether the"
            " guard is fitted and calibrated."
        )
    )
    inspect.add_argument(
        "folder",
        type=folder,
        metavar="DIR",
        help="folder of a model, or the name of one that the package brings",
    )
    inspect.add_argument(
        "--radius",
        type=number(0, 1e6),
        default=4.0,
        metavar="R",
        help="largest noise that the certificate is for (default: 4)",
    )
    inspect.add_config()
    return inspect


def run(args: Any) -> int:
    r"""Tells of a model.

    Arguments:
        args: The arguments.

    Raises:
        UserError: If what was asked for cannot be done.
    """
    from flowguard.models import store
    from flowguard.ood.conditioner import conditioners

    paths(args, "folder")
    try:
        found = store.located(args.folder)
        config = store.read_config(found) if found.is_dir() else {}
        model = store.load(found)
    except store.PretrainedError as error:
        raise UserError(f"DIR: {error}") from None
    print(f"{args.folder}: {config['class']}, written by flowguard {config['flowguard']}\n")
    for name, value in config["arguments"].items():
        print(f"  {name} = {_short(value)}")
    print("\n" + columns(list(architecture(model))))
    with threads(None):
        told = certificate(model, args.radius)
    print("\n" + told)
    print("\n" + "\n\n".join(calibration(n, c) for n, c in conditioners(model).items()))
    return 0


def columns(rows: list[tuple[str, ...]]) -> str:
    r"""Returns rows as a table of plain text.

    Arguments:
        rows: The rows, the first of them the head.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def parameters(module: nn.Module) -> str:
    r"""Returns the number of a module's parameters."""
    return f"{sum(p.numel() for p in module.parameters()):,}"


def architecture(model: nn.Module) -> Iterator[tuple[str, ...]]:
    r"""Yields rows of what the model is made of.

    Arguments:
        model: The model.
    """
    yield "part", "what", "parameters"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    yield "model", f"{type(model).__name__}, {dtype}", parameters(model)
    for name, module in model.named_modules():
        if name.startswith("conditioner.guard") or parameters(module) == "0":
            continue
        depth, last = name.count("."), name.rpartition(".")[2]
        if depth == 1 and not last.isdecimal():
            yield name, _kind(module), parameters(module)
        elif depth == 2 and last.isdecimal() and name.startswith("flow."):
            yield name, _kind(module), parameters(module)
    maps = sorted({repr(m.map) for m in model.modules() if hasattr(m, "map")})
    for shown in maps:
        yield "coupling", shown, ""


def _short(value: Any) -> str:
    if isinstance(value, dict) and "type" in value:
        rest = ", ".join(f"{k}={_short(v)}" for k, v in value.items() if k != "type")
        return f"{value['type']}({rest})"
    return repr(value)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.ModuleList):
        kinds = [type(m).__name__ for m in module]
        if len(set(kinds)) == 1:
            return f"{len(kinds)} × {kinds[0]}"
    return type(module).__name__


def certificate(model: nn.Module, radius: float) -> str:
    r"""Returns what the certificate says.

    Arguments:
        model: The model.
        radius: The largest noise.
    """
    from flowguard.bounds import certify

    found = certify(model)
    lines = [f"Certificate, for noise up to {radius:g}, whatever the condition is:"]
    if found.certified:
        lines.append(f"no element of the flow's output exceeds {found.bound(radius):.4g}.")
        margin = getattr(model, "margin", None)
        if margin is not None:
            lines.append(f"Images lie within {-margin:g} and {1 + margin:g}: see the row margin.")
    else:
        first = found.refused[0]
        lines.append(
            f"none: {len(found.refused)} layer(s) are not bounded, the first is {first.name}"
            f" ({first.reason})."
        )
    return "\n".join([*lines, str(found.table(radius))])


def calibration(name: str, conditioner: Any) -> str:
    r"""Returns what a guard knows.

    Arguments:
        name: The name of the guard.
        conditioner: The guard.
    """
    state = (
        "fitted and calibrated"
        if conditioner.calibrated
        else "fitted, not calibrated"
        if conditioner.fitted
        else "not fitted: it cannot tell which conditions are out of distribution"
    )
    lines = [
        f"Guard {name}: {state}; policy {conditioner.policy}, alpha {conditioner.alpha:g},"
        f" boundary {conditioner.boundary:g}"
    ]
    if not conditioner.fitted:
        return lines[0]
    rows: list[tuple[str, ...]] = [("level", "features", "fitted on", "calibrated on")]
    for level_name, level in conditioner.guard.items():
        gaussian, scores = level.gaussian, level.calibration.scores
        images = f"{len(scores)} images" if level.calibration.calibrated else "nothing"
        count = f"{int(gaussian.n):,} vectors"
        rows.append((level_name, str(gaussian.features), count, images))
    return "\n".join([*lines, columns(rows)])
