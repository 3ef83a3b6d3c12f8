r"""What became of each picture, and how that is told."""

__all__ = ["Outcome", "packed", "tell", "unpacked"]

import base64
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowguard.demo.page import Drawn


@dataclass
class Outcome:
    r"""What became of a picture."""

    source: Path
    targets: tuple[Path, ...]
    status: str = "written"  # or "skipped", "failed"
    reason: str = ""
    size: tuple[int, int] = (0, 0)  # rows and columns of the result
    seconds: float = 0.0
    p_value: float | None = None
    flagged: bool = False
    excess: float | None = None  # the guard's score over its threshold, at the level where most
    calibration: int = 0  # the pictures that the guard was calibrated with
    artefacts: float = 0.0  # the largest share of erroneous pixels of a sample
    pictures: list[Drawn] = field(default_factory=list)  # of the first sample, for the report


def packed(outcome: Outcome) -> dict[str, Any]:
    r"""Returns an outcome as JSON holds it; see :func:`unpacked`.

    Arguments:
        outcome: The outcome.
    """
    pictures = [asdict(p) | {"data": base64.b64encode(p.data).decode()} for p in outcome.pictures]
    told = {"source": str(outcome.source), "targets": [str(t) for t in outcome.targets]}
    return {**asdict(outcome), **told, "pictures": pictures}


def unpacked(told: Mapping[str, Any]) -> Outcome:
    r"""Returns the outcome that was packed.

    Arguments:
        told: What :func:`packed` made of it.
    """
    found = Outcome(Path(told["source"]), tuple(map(Path, told["targets"])))
    found.status, found.reason, found.flagged = told["status"], told["reason"], told["flagged"]
    found.size = (told["size"][0], told["size"][1])
    found.seconds, found.artefacts = float(told["seconds"]), float(told["artefacts"])
    # JSON has no NaN: it is a word there.
    found.p_value = None if told["p_value"] is None else float(told["p_value"])
    found.excess = None if told["excess"] is None else float(told["excess"])
    found.calibration = told["calibration"]
    found.pictures = [
        Drawn(**{**p, "data": base64.b64decode(p["data"])}) for p in told["pictures"]
    ]
    return found


def tell(outcomes: list[Outcome], args: Any, left_out: list[Path], by: str = "") -> int:
    r"""Prints what was done and what was not; returns the exit code.

    Arguments:
        outcomes: What became of each picture.
        args: The arguments.
        left_out: The pictures that were not looked at.
        by: By whom it was done, if not by this process alone.
    """
    by_status = {
        s: [o for o in outcomes if o.status == s] for s in ("written", "skipped", "failed")
    }
    counts = ", ".join(f"{len(found)} {status}" for status, found in by_status.items())
    print(f"{len(outcomes)} picture(s){by}: {counts}. Output: {args.output}")
    if by_status["skipped"]:
        print("Skipped pictures were made before; --overwrite writes them again.")
    if left_out:
        print(
            f"Left out: {len(left_out)} picture(s) in OUTPUT that flowguard wrote itself, such as"
            f" {left_out[0]}."
        )
    for o in outcomes:
        if o.flagged:
            print(f"unlike the training set: {o.source} (p = {o.p_value:.2g})")
        if o.artefacts > 0:
            print(
                f"artefacts: {o.source}, up to {100 * o.artefacts:.2g} % of the pixels of a sample"
            )
    if args.report is not None:
        print(f"Report: {args.report}")
    for o in by_status["failed"]:
        print(f"flowguard: failed: {o.source}: {o.reason}", file=sys.stderr)
    return 1 if by_status["failed"] else 0
