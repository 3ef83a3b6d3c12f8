r"""Times the published super-resolution architecture with affine and robust couplings.

A scale of 4, 16 steps at each of 3 levels, an encoder of 23 blocks: samples of one 160×160 image,
a training step on such images, and for comparison a sample of the same model by the plain path,
which computes every layer by itself and anew for each sample, as the published code does. All run
in one process, in turns; the table gives medians of wall-clock and of processor time, and the
ratios of processor time are medians over the turns. On a loaded machine the processor time is the
one to read; with one thread it is what the wall clock would show on an idle one.

`--precision bf16` adds runs whose networks compute in half precision, and the ratio of both times
(`train_step.py` tells what a trained model's images lose). `--peak` counts the products of each
run, and compares their rate with that of one large product of matrices: what the processor can do
at most by the same arithmetic.

    python benchmarks/published_speed.py
    python benchmarks/published_speed.py --threads 2 --repeats 5 --size 160
    python benchmarks/published_speed.py --precision bf16 --only "10 samples" "10 samples, bf16"
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowguard.image import ZeroConv2d
from flowguard.models import SuperResolutionFlow
from flowguard.models.precision import Precision

COUPLINGS = ("affine", "robust")
FIRST, GUARD, PLAIN = "the first sample", "the guard's score", "plain sample"


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


def score(
    model: SuperResolutionFlow, lr: Tensor, maps: list[Tensor], precision: Precision | None = None
) -> None:
    r"""What the guard does of maps that the encoder has made, in the precision given."""
    guard, encoder = model.conditioner, model.conditioner.encoder
    kept = encoder.forward
    encoder.forward = lambda y: maps  # type: ignore[method-assign]
    with model.computing(lr, precision):
        guard(lr)
    encoder.forward = kept  # type: ignore[method-assign]


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


def with_guard(model: SuperResolutionFlow, size: int) -> None:
    r"""Fits and calibrates the guard on pictures of noise, smooth ones among them."""
    torch.manual_seed(1)
    pictures = [torch.rand(1, 3, 1, 1) + 0.1 * torch.rand(1, 3, size, size) for _ in range(8)]
    model.conditioner.policy = "report"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eight pictures are few
        model.conditioner.fit(pictures[:4], progress=False)
        model.conditioner.calibrate(pictures[4:], progress=False)


def rate_of_products() -> float:
    r"""Returns how many operations a second one large product of float32 matrices makes."""
    a, b = torch.randn(2, 1024, 1024)
    times = []
    for _ in range(5):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    return 2 * 1024**3 / min(times)


def median_ratio(pairs: Iterable[tuple[float, float]]) -> float:
    return statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=160, help="of the HR image")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=23)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-size", type=int, default=64)
    parser.add_argument("--precision", choices=("bf16", "float16"))
    parser.add_argument("--peak", action="store_true", help="count the products of each run")
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
        with_guard(model, args.size // 4)
        condition = torch.no_grad()(model.condition)(lr)
        maps = torch.no_grad()(model.conditioner.encoder)(lr)
        rows: dict[str, Callable[[], object]] = {
            "encoder": lambda m=model: m.conditioner.encoder(lr),
            GUARD: lambda m=model, f=maps: score(m, lr, f),
            "condition": lambda m=model: m.condition(lr),
            "a further sample": lambda m=model, c=condition: m.sample(c),
            FIRST: lambda m=model: m.sample(lr),
            f"{args.samples} samples": lambda m=model: m.sample(lr, args.samples),
            PLAIN: lambda m=model: plain_sample(m, lr),
            "training step": lambda m=model: train_step(m, large, small),
        }
        if args.precision is not None:
            half = args.precision
            with torch.no_grad():
                condition = model.condition(lr, precision=half)
                with model.computing(lr, half):
                    rough = model.conditioner.encoder(
                        lr.contiguous(memory_format=torch.channels_last)
                    )
            rows |= {
                f"{GUARD}, {half}": lambda m=model, f=rough: score(m, lr, f, args.precision),
                f"a further sample, {half}": lambda m=model, c=condition: m.sample(c),
                f"{FIRST}, {half}": lambda m=model: m.sample(lr, precision=args.precision),
                f"{args.samples} samples, {half}": lambda m=model: m.sample(
                    lr, args.samples, precision=args.precision
                ),
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
        ratio = median_ratio(zip(cpu[b], cpu[a], strict=True))
        print(
            f"{name:18} {medians[0]:8.3f} {medians[1]:8.3f} {medians[2]:11.3f} {medians[3]:11.3f}"
            f" {ratio:6.2f}"
        )
    for name in names if args.precision is not None else []:
        other = f"{name}, {args.precision}"
        for key in ((name, c) for c in COUPLINGS if other in names):
            pairs = zip(cpu[key], cpu[other, key[1]], strict=True)
            print(f"{key[1]}, {name}: float32 / {args.precision} = {median_ratio(pairs):.2f}")
    several = f"{args.samples} samples"
    for coupling in COUPLINGS if {PLAIN, several} <= set(names) else ():
        pairs = zip(cpu[PLAIN, coupling], cpu[several, coupling], strict=True)
        print(
            f"{coupling}, {several}: {args.samples * median_ratio(pairs):.2f} times as fast as plain"
        )
    for end in ("", f", {args.precision}"):
        for coupling in COUPLINGS if {GUARD + end, FIRST + end} <= set(names) else ():
            pairs = zip(cpu[GUARD + end, coupling], cpu[FIRST + end, coupling], strict=True)
            print(f"{GUARD}{end}: {median_ratio(pairs):.1%} of {FIRST}, {coupling}")
    if args.peak:
        peak = rate_of_products()
        print(f"one product of float32 matrices: {peak / 1e9:.0f} GFLOP/s")
        for key in runs:
            if key[0] in names and "training" not in key[0]:
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    runs[key]()
                count, seconds = counter.get_total_flops(), statistics.median(cpu[key])
                print(
                    f"{key[0]}, {key[1]}: {count / 1e9:.1f} GFLOP, {count / seconds / 1e9:.0f}"
                    f" GFLOP/s, {count / seconds / peak:.0%} of it"
                )


if __name__ == "__main__":
    main()
