r"""Robust flows beside zuko's own on two moons, turned and scaled by the context.

For each flow: the negative log-likelihood on held-out pairs after training, and, for contexts
away from the training contexts, the share of samples that are not finite, that are larger than 30,
and that are above the certificate, with the largest value. Then what migration makes of the last
two, trained, and of zuko's NSF.

    python benchmarks/zuko_toy.py            # five flows, about ten minutes on one core
    python benchmarks/zuko_toy.py --steps 300 --flows RobustNSF NSF
"""

import argparse
import time

import common
import torch
import zuko
from common import moons
from torch import Tensor

from flowguard.bounds import certify
from flowguard.integrations.zuko import RobustCouplingFlow, RobustNSF
from flowguard.migration import migrate

DISTANCES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e30)  # in standard deviations of the contexts
FLOWS = {
    "RobustNSF": lambda: RobustNSF(2, 2, transforms=4),
    "NSF": lambda: zuko.flows.NSF(2, 2, transforms=4),
    "RobustCouplingFlow": lambda: RobustCouplingFlow(2, 2, transforms=8),
    "RealNVP": lambda: zuko.flows.NICE(2, 2, transforms=8),
    "MAF": lambda: zuko.flows.MAF(2, 2, transforms=8),
}
MIGRATED = ("MAF", "NSF", "RealNVP")


def train(flow: zuko.lazy.Flow, steps: int, batch: int = 512, lr: float = 2e-3) -> None:
    r"""Trains a flow on fresh pairs."""

    def loss(x: Tensor, c: Tensor) -> Tensor:
        return -flow(c).log_prob(x).mean()

    common.train(flow, loss, steps, batch=batch, lr=lr)


@torch.no_grad()
def sample(flow: zuko.lazy.Flow, distance: float) -> tuple[float, float, float, float]:
    r"""Samples away from the training contexts: what share is not finite, above 30, above the
    certificate, and the largest value that is finite."""
    direction = torch.randn(100, 2)
    d = flow(distance * direction / direction.norm(dim=-1, keepdim=True))
    z = d.base.sample((100,))
    x = d.transform.inv(z)
    wrong = ~x.isfinite()
    largest = torch.where(wrong, 0.0, x).abs().max().item()
    above = (x.abs() > certify(flow).bound(z.abs().max().item())).any(-1)
    return (
        wrong.any(-1).float().mean().item(),
        (~(x.abs() <= 30)).any(-1).float().mean().item(),
        above.float().mean().item(),
        largest,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--flows", nargs="*", choices=list(FLOWS), default=list(FLOWS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(10_000)
    x_test, c_test = moons(20_000)
    print(f"zuko {zuko.__version__}, torch {torch.__version__}, {args.steps} steps")
    for name in args.flows:
        torch.manual_seed(args.seed)
        flow = FLOWS[name]()
        start = time.perf_counter()
        train(flow, args.steps)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            nll = -flow(c_test).log_prob(x_test).mean().item()
        print(f"\n{name}: NLL {nll:.4f} nats, trained in {seconds:.0f} s")
        print("    distance  not finite      > 30  > bound     largest")
        for distance in DISTANCES:
            wrong, large, above, largest = sample(flow, distance)
            print(
                f"    {distance:8.0e}    {wrong:8.2%}  {large:8.2%} {above:8.2%}  {largest:10.4g}"
            )
        if name in MIGRATED:
            robust, report = migrate(flow, *moons(32_768), steps=200)
            print(f"{report}")
            with torch.no_grad():
                after = -robust(c_test).log_prob(x_test).mean().item()
            print(f"{name}, migrated and fine-tuned: NLL {after:.4f} nats, was {nll:.4f}")


if __name__ == "__main__":
    main()
