r"""Looks for models whose samples exceed what their certificates say, and for bugs that it misses.

    python benchmarks/fuzz.py models --models 20000       # random models, each from its number
    python benchmarks/fuzz.py mutants                     # rules with a bug planted, one at a time
    python benchmarks/fuzz.py model --number 713          # one model again, in full

The models are those of ``tests/bounds/test_fuzz.py``, see the package ``fuzzing`` beside. They are
made in a process of their own: one that says nothing for `--patience` seconds is ended, and its
model counts as one that hangs. 20 000 models take some ten minutes of one core.
"""

import argparse
import json
import re
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from fuzzing import Case, Verdict, covered, fuzz
from torch import Tensor

from flowguard.bounds import Join, Linear, Permute, Pointwise, Refused, Scale, certify, rules

Line = dict[str, Any]


def named(cls: type) -> str:
    r"""Returns a name of a class that tells its library."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


# Random models


def work(first: int, models: int) -> None:
    r"""Judges models and prints a line for each.

    Arguments:
        first: The number of the first model.
        models: How many.
    """
    for number in range(first, first + models):
        print(json.dumps(told(number)), flush=True)


def told(number: int) -> Line:
    r"""Returns what is found of the model of that number, as plain data."""
    try:
        case, verdict = fuzz(Random(number))
    except Exception as error:  # the model cannot be made
        return {"number": number, "outcome": "not made", "found": "", "reason": repr(error)[:100]}
    return {
        "number": number,
        "outcome": verdict.outcome,
        "found": verdict.found,
        "reason": verdict.reasons[0] if verdict.reasons else "",
        "elements": verdict.elements,
        "nan": verdict.nan,
        "bounded": verdict.bounded,
        "tightened": verdict.tightened,
        "reach": verdict.reach,
        "tampered": case.tampered,
        "dtype": str(case.dtype),
        "made": sorted({named(cls) for cls in case.made}),
    }


def lines(first: int, models: int, patience: float) -> Iterator[Line]:
    r"""Goes over what a process of its own finds, another one after each that hangs or dies.

    Arguments:
        first: The number of the first model.
        models: How many.
        patience: The seconds after which a model hangs.
    """
    number, last = first, first + models
    while number < last:
        command = [sys.executable, __file__, "work", "--first", str(number)]
        command += ["--models", str(last - number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
            assert process.stdout is not None
            while number < last:
                ready, _, _ = select.select([process.stdout], [], [], patience)
                line = process.stdout.readline() if ready else ""
                if not line:
                    process.kill()
                    outcome = "died" if ready else "hangs"
                    yield {"number": number, "outcome": outcome, "found": f"it {outcome}"}
                    number += 1
                    break
                yield json.loads(line)
                number += 1


def report(results: list[Line]) -> None:
    r"""Prints counts."""
    outcomes = Counter(line["outcome"] for line in results)
    total = len(results)
    print(f"models: {total}")
    for outcome, n in outcomes.most_common():
        print(f"  {outcome}: {n} ({n / total:.1%})")
    print(f"  with a finite bound: {sum(line.get('bounded', False) for line in results)}")
    print(f"  with a tightened bound: {sum(line.get('tightened', False) for line in results)}")
    print(f"  tampered with: {sum(bool(line.get('tampered')) for line in results)}")
    print(f"elements compared: {sum(line.get('elements', 0) for line in results):,}")
    print(f"  NaN with an excuse: {sum(line.get('nan', 0) for line in results):,}")
    reached = sorted(line["reach"] for line in results if line.get("bounded"))
    print(f"share of the bound that is reached, median: {reached[len(reached) // 2]:.3f}")
    print("refused, by reason:")
    reasons = Counter(line["reason"] for line in results if line["outcome"] == "refused")
    for reason, n in reasons.most_common(20):
        print(f"  {n:6d}  {reason[:110]}")
    print("what cannot be made:")
    for reason, n in Counter(
        line["reason"] for line in results if line["outcome"] == "not made"
    ).most_common(10):
        print(f"  {n:6d}  {reason}")
    certified: Counter[str] = Counter()
    for line in results:
        if line["outcome"] == "certified" and line["bounded"]:
            certified.update(line["made"])
    print("certified, by class:")
    for cls in sorted(map(named, covered())):
        print(f"  {certified[cls]:6d}  {cls}")
    found = [line for line in results if line["found"]]
    print(f"FOUND: {len(found)}")
    kinds = Counter(re.sub(r"[-+]?\d[\d.e+-]*", "#", line["found"])[:90] for line in found)
    for kind, n in kinds.most_common():
        print(f"  {n:6d}  {kind}")
    for line in sorted(found, key=lambda line: len(line.get("made", [])))[:60]:
        what = ", ".join(line.get("made", [])[:5])
        print(f"  {line['number']} {line.get('dtype', '')} {line['found'][:110]}: {what}"
              f" {line.get('tampered', '')}")  # fmt: skip


# Planted bugs

Change = Callable[[Any], Any]


def _scaled(step: Any) -> Any:
    if isinstance(step, Scale):
        return replace(step, factor=step.factor / 2)
    if isinstance(step, Linear):
        return replace(step, matrix=step.matrix / 2)
    if isinstance(step, Pointwise):
        return replace(step, envelope=_halved(step.envelope))
    if isinstance(step, Join):
        return replace(step, scale_bound=step.scale_bound - 0.7)
    return step


def _halved(g: Any) -> Any:
    if g.limit is not None:
        return g._replace(limit=lambda radius: g.reach(radius) / 2)
    return g._replace(gain=g.gain / 2, floor=g.floor / 2)


def _unshifted(step: Any) -> Any:
    if isinstance(step, Scale):
        return replace(step, offset=torch.zeros_like(step.offset))
    if isinstance(step, Pointwise) and step.envelope.limit is None:
        return replace(step, envelope=step.envelope._replace(offset=0.0))
    if isinstance(step, Join):
        return replace(step, mean_bound=0.0)
    return step


def _unmasked(step: Any) -> Any:
    if isinstance(step, Pointwise) and step.mask is not None:
        return replace(step, mask=torch.zeros_like(step.mask))
    return step


def _misread(step: Any) -> Any:
    if isinstance(step, Permute):
        return replace(step, order=torch.argsort(step.order))
    if isinstance(step, Linear):
        return replace(step, matrix=step.matrix.T)
    return step


#: Bugs of rules: from the steps that a rule returns to other ones.
BUGS: dict[str, Change] = {
    "no offset": lambda steps: [_unshifted(s) for s in steps],
    "half a gain": lambda steps: [_scaled(s) for s in steps],
    "no mask": lambda steps: [_unmasked(s) for s in steps],
    "another order": lambda steps: [_misread(s) for s in steps],
    "the first step left out": lambda steps: steps[1:],
    "the last step left out": lambda steps: steps[:-1],
    "nothing refused": lambda steps: [s for s in steps if not isinstance(s, Refused)],
}
#: Bugs of envelopes.
SLIPS: dict[str, Change] = {
    "no offset": lambda g: g._replace(offset=0.0) if g.limit is None and not g.reason else g,
    "half a gain": lambda g: g if g.reason else _halved(g),
    "no floor": lambda g: g._replace(floor=0.0) if g.limit is None and not g.reason else g,
    "half a displacement": lambda g: g._replace(displacement=g.displacement / 2),
    "nothing refused": lambda g: (
        g._replace(reason="", offset=0.0, displacement=0.0, gain=1.0) if g.reason else g
    ),
}


class Mutant:
    r"""Creates a rule with a bug.

    Arguments:
        lookup: The rules.
        cls: The class whose rule it is.
        change: The bug; if :py:`None`, that the rule takes the other direction.
    """

    def __init__(self, lookup: dict[type, Any], cls: type, change: Change | None) -> None:
        self.lookup, self.cls, self.change = lookup, cls, change
        self.true = lookup[cls]
        self.harmful = False

    def __call__(self, layer: Any, sampling: bool) -> Any:
        if self.change is None:
            return self.true(layer, not sampling)
        true = self.true(layer, sampling)
        return self.change(true if isinstance(true, tuple) else list(true))

    def certify(self, model: Any) -> Any:
        r"""Certifies with the bug, and remembers whether it makes a bound smaller."""
        true = certify(model)
        with patch.dict(self.lookup, {self.cls: self}):
            wrong = certify(model)
        self.harmful = wrong.certified and any(
            wrong.bound(r) < (1 - 1e-3) * true.bound(r) for r in (0.01, 4.0, 1e3)
        )
        if not self.harmful:
            raise Harmless
        return wrong


class Harmless(Exception):
    r"""What a bug is that makes no bound of a model smaller: sampling it would show nothing."""


def killed(mutant: Mutant, tries: int) -> tuple[str, int]:
    r"""Returns whether the fuzzer finds a bug, in words, and how many models it had done harm to.

    Arguments:
        mutant: The bug.
        tries: The number of models.
    """
    harmed = 0
    for number in range(tries):
        mutant.harmful = False
        found = _judged(number, mutant.cls, mutant.certify)
        harmed += mutant.harmful
        if mutant.harmful and found and not _judged(number, mutant.cls, certify):
            return "found", harmed
        if number == 30 and not harmed:
            break
    return ("NOT FOUND" if harmed else "harmless"), harmed


def _judged(number: int, cls: type, prove: Any) -> str:
    try:
        return fuzz(Random(number), cls, plain=True, certify=prove)[1].found
    except Exception:  # the model cannot be made
        return ""


def mutants(tries: int, only: str) -> None:
    r"""Plants each bug in each rule, and prints which ones the fuzzer finds.

    Arguments:
        tries: The number of models that a bug may be hidden in.
        only: What the names of the classes must hold.
    """
    counts: Counter[str] = Counter()
    lookups: list[tuple[str, dict[type, Any], dict[str, Change]]] = [
        ("rule", rules._RULES, BUGS),
        ("envelope", rules._ENVELOPES, SLIPS),
    ]
    for kind, lookup, changes in lookups:
        for cls in sorted({*lookup} & covered(), key=named):
            if only not in named(cls):
                continue
            bugs: dict[str, Change | None] = {**changes, "the other direction": None}
            for bug, change in bugs.items():
                outcome, harmed = killed(Mutant(lookup, cls, change), tries)
                counts[outcome] += 1
                if outcome != "harmless":
                    print(
                        f"{outcome:10s} after {harmed:4d}  {kind} of {named(cls)}: {bug}",
                        flush=True,
                    )
    print(dict(counts))


def show(number: int) -> None:
    r"""Prints a model and what is found of it."""
    made: tuple[Case, Verdict] = fuzz(Random(number))
    case, verdict = made
    print(case.model, case.dtype, case.tampered, verdict, sep="\n")
    for name, t in getattr(case.model, "state_dict", dict)().items():
        if isinstance(t, Tensor) and t.numel() < 30:
            print(name, t.dtype, t.tolist())
    print(certify(case.model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["models", "mutants", "model", "work"])
    parser.add_argument("--models", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--only", default="")
    parser.add_argument("--patience", type=float, default=300.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "work":
        work(args.first, args.models)
    elif args.what == "models":
        report(list(lines(args.first, args.models, args.patience)))
    elif args.what == "mutants":
        mutants(args.tries, args.only)
    else:
        show(args.number)


if __name__ == "__main__":
    main()
