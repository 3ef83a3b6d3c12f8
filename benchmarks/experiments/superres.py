r"""The super-resolution experiment: all couplings under one budget, within and out of distribution.

Trains affine, reparametrised affine, B-spline and robust couplings with three seeds, makes of each
affine model one whose guard shrinks and one that is migrated, measures all by
``benchmarks/superres.py``, and writes tables and figures into docs/experiments/superres.md. What is
trained or measured already is left as it is: stop it whenever you like, and give the same command
again.

    python benchmarks/experiments/superres.py --data DIR --out DIR
    python benchmarks/experiments/superres.py --data DIR --out DIR --part superres-rrdb -- \
        --encoder-weights REALSR_DF2K_UP4X.param --freeze-encoder

The second is the same with a real, frozen encoder. For a look at all of it in minutes:

    python benchmarks/experiments/superres.py --data DIR --out DIR --page PAGE.md \
        --couplings affine robust2 --seeds 0 --steps 20 --crop 48 --pictures 1 --samples 2 -- \
        --flow-steps 1 --hidden 8 --features 8 --encoder-blocks 1
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from imaging.experiment import experiment
from superres import SuperResolutionStudy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "experiments" / "superres.md"


def main(argv: Sequence[str] | None = None) -> None:
    r"""Runs the experiment.

    Arguments:
        argv: The arguments; those of the process by default.
    """
    experiment(
        "superres",
        SuperResolutionStudy,
        str(__doc__),
        PAGE,
        "superres-pyramid",
        ["--val", "{data}/set5"],
        argv,
    )


if __name__ == "__main__":
    main()
