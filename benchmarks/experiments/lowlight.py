r"""The low-light experiment: all couplings under one budget, within and out of distribution.

Trains affine, reparametrised affine, B-spline and robust couplings with three seeds on photographs
that a model of a camera darkens, makes of each affine model one whose guard shrinks and one that is
migrated, measures all by ``benchmarks/lowlight.py``, and writes tables and figures into
docs/experiments/lowlight.md. What is trained or measured already is left as it is: stop it whenever
you like, and give the same command again.

    python benchmarks/experiments/lowlight.py --data DIR --out DIR

For a look at all of it in minutes:

    python benchmarks/experiments/lowlight.py --data DIR --out DIR --page PAGE.md \
        --couplings affine robust2 --seeds 0 --steps 20 --crop 48 --pictures 1 --samples 2 -- \
        --flow-steps 1 --hidden 8 --features 8 --encoder-blocks 1
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from imaging.experiment import experiment
from lowlight import LowLightStudy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "experiments" / "lowlight.md"


def main(argv: Sequence[str] | None = None) -> None:
    r"""Runs the experiment.

    Arguments:
        argv: The arguments; those of the process by default.
    """
    experiment("lowlight", LowLightStudy, str(__doc__), PAGE, "lowlight", (), argv)


if __name__ == "__main__":
    main()
