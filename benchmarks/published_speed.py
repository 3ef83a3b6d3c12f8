r"""Times the published super-resolution architecture with affine and robust couplings.

A scale of 4, 16 steps at each of 3 levels, an encoder of 23 blocks: samples of one 160×160 image,
a training step on such images, and for comparison a sample of the same model by the plain path,
which computes every layer by itself and anew for each sample, as the published code does. All run
in one process, in turns; the table gives medians of wall-clock and of processor time, and the
ratios of processor time are medians over the turns. On a loaded machine the processor time is the
one to read; with one thread it is what the wall clock would show on an idle one.

    python benchmarks/published_speed.py
    python benchmarks/published_speed.py --threads 2 --repeats 5 --size 160
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flowguard.image import ZeroConv2d
from flowguard.models import SuperResolutionFlow

COUPLINGS = ("affine", "robust")


def build(coupling: str, blocks: int, steps: int) -> SuperResolutionFlow:
    torch.manual_seed(0)
    stacked = tuple(min(b, blocks - 1) for b in (1, 8, 15, 22))
    model = SuperResolutionFlow.published(
        coupling=coupling, blocks=blocks, stacked=stacked, steps=steps, residual=False
    )
    for layer in model.flow.modules():
        if isinstance(layer, ZeroConv2d):
            torch.nn.init.normal_(layer.weight, std=0.01)
    return model


def plain_sample(model: SuperResolutionFlow, lr: Tensor) -> Tensor:
    r"""A sample by the path that training takes."""
    latents = [torch.randn(len(lr), *shape) for shape in model.latent_shapes(lr)]
    model.requires_grad_(False)  # no graph is built
    with torch.enable_grad():
        image = model.decode(latents, lr)
    model.requires_grad_(True)
    return image


def train_step(model: SuperResolutionFlow, hr: Tensor, lr: Tensor) -> None:
    model.train()
    with torch.enable_grad():
        model.nll(hr, lr).mean().backward()
    model.zero_grad(set_to_none=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=160, help="of the HR image")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=23)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-size", type=int, default=64)
    parser.add_argument("--only", nargs="*", help="names of the runs to keep")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    lr = torch.rand(1, 3, args.size // 4, args.size // 4)
    small = torch.rand(2, 3, args.train_size // 4, args.train_size // 4)
    large = torch.rand(2, 3, args.train_size, args.train_size)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for coupling in COUPLINGS:
        model = build(coupling, args.blocks, args.steps)
        # Normalisations take their values from a first batch; the first step may not be timed.
        train_step(model, large, small)
        condition = torch.no_grad()(model.condition)(lr)
        rows: dict[str, Callable[[], object]] = {
            "encoder": lambda m=model: m.conditioner(lr),
            "condition": lambda m=model: m.condition(lr),
            "a further sample": lambda m=model, c=condition: m.sample(c),
            "the first sample": lambda m=model: m.sample(lr),
            f"{args.samples} samples": lambda m=model: m.sample(lr, args.samples),
            "plain sample": lambda m=model: plain_sample(m, lr),
            "training step": lambda m=model: train_step(m, large, small),
        }
        runs |= {(name, coupling): run for name, run in rows.items()}
    names = [n for n in dict.fromkeys(n for n, _ in runs) if not args.only or n in args.only]

    wall: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    cpu: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(args.repeats + 1):
        for name in names:
            for coupling in COUPLINGS:
                key = (name, coupling)
                with torch.no_grad():
                    started, worked = time.perf_counter(), time.process_time()
                    runs[key]()
                    ended, done = time.perf_counter(), time.process_time()
                if turn > 0:
                    wall[key].append(ended - started)
                    cpu[key].append(done - worked)

    print(f"torch {torch.__version__}, {args.threads} threads, {args.size}x{args.size}, seconds")
    print(
        f"{'':18} {'affine':>8} {'robust':>8} {'affine cpu':>11} {'robust cpu':>11} {'ratio':>6}"
    )
    for name in names:
        a, b = ((name, c) for c in COUPLINGS)
        medians = [statistics.median(t[k]) for t in (wall, cpu) for k in (a, b)]
        ratio = statistics.median(y / x for x, y in zip(cpu[a], cpu[b], strict=True))
        print(
            f"{name:18} {medians[0]:8.3f} {medians[1]:8.3f} {medians[2]:11.3f} {medians[3]:11.3f}"
            f" {ratio:6.2f}"
        )


if __name__ == "__main__":
    main()
