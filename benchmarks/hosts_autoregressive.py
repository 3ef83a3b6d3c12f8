r"""Times the inverse of robust autoregressive layers beside those of nflows and normflows.

Each is one layer with a masked network of two residual blocks of 64 units, 8 bins, and a context of
four numbers, without gradients, on one thread. All run in one process, in turns; the table gives
medians of processor time, and of the ratios of each turn.

    python benchmarks/hosts_autoregressive.py --points 256 1024 --features 16
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import nflows.transforms
import normflows
import torch
from common import by_turns

from flowguard.integrations.nflows import MaskedRobustSplineAutoregressiveTransform
from flowguard.integrations.normflows import RobustSplineAutoregressive

HIDDEN, CONTEXT, BLOCKS = 64, 4, 2


def inverses(host: str, features: int) -> dict[str, Any]:
    r"""What takes one feature after the other, in each kind of layer of a library."""
    if host == "nflows":
        T: Any = nflows.transforms
        own = T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        layers = {
            "robust": MaskedRobustSplineAutoregressiveTransform(features, HIDDEN, CONTEXT),
            "affine": T.MaskedAffineAutoregressiveTransform(features, HIDDEN, CONTEXT),
            "spline": own(features, HIDDEN, CONTEXT, num_bins=8, tails="linear", tail_bound=3.0),
        }
        return {name: layer.inverse for name, layer in layers.items()}
    N = normflows.flows
    sizes = features, BLOCKS, HIDDEN, CONTEXT
    return {
        "robust": RobustSplineAutoregressive(*sizes).forward,
        "affine": N.MaskedAffineAutoregressive(features, HIDDEN, CONTEXT).inverse,
        "spline": N.AutoregressiveRationalQuadraticSpline(*sizes).forward,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--features", type=int, nargs="+", default=[16])
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for host in ("nflows", "normflows"):
        for features in args.features:
            torch.manual_seed(0)
            layers = inverses(host, features)
            for points in args.points:
                z, c = torch.randn(points, features), torch.randn(points, CONTEXT)
                runs = {name: partial(inverse, z, c) for name, inverse in layers.items()}
                with torch.no_grad():
                    times = by_turns(runs, args.turns, clock=time.process_time)
                cells = [f"{host}, {points} samples of {features} features:"]
                for name, theirs in times.items():
                    pairs = zip(times["robust"], theirs, strict=True)
                    ratio = statistics.median(a / b for a, b in pairs)
                    cells.append(f"{name} {statistics.median(theirs) * 1e3:.1f} ms ({ratio:.2f})")
                print(" ".join(cells), flush=True)


if __name__ == "__main__":
    main()
