r"""What the robust spline costs in training and in sampling, beside the affine map.

Trains the demo's two models side by side, a step of the one after a step of the other, then
samples an image from both by turns. The ratio of each pair of turns is taken, and of these the
median, so that other work on the machine falls on both. Then samples with networks in half
precision, by turns with those in float32, and how much further from the photograph that takes the
image of temperature zero.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --threads 1 --processor-time    # on a machine at work
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from common import by_turns
from torch import Tensor

from flowguard import data
from flowguard.models import SuperResolutionFlow
from flowguard.models.precision import Precision

COUPLINGS = ("affine", "robust")
PRECISIONS: tuple[Precision, Precision] = ("bf16", "float32")
SCALE, CROP, BATCH, TEMPERATURE = 4, 32, 16, 0.8  # as in the demo
SIZES = {"scale": SCALE, "levels": 2, "steps": 4, "hidden": 64, "features": 64}


def step(model: SuperResolutionFlow, optimizer: torch.optim.Optimizer) -> Callable[..., None]:
    r"""One step of training, as `flowguard.training.loop.train` does it."""

    def run(hr: Tensor, lr: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = model.nll(hr, lr).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if bool(torch.isfinite(norm) & torch.isfinite(loss)):
            optimizer.step()

    return run


def report(what: str, times: dict[str, list[float]], names: Sequence[str] = COUPLINGS) -> None:
    (first, affine), (second, robust) = ((name, times[name]) for name in names)
    ratios = sorted(r / a for a, r in zip(affine, robust, strict=True))
    quarter = len(ratios) // 4
    print(
        f"{what}: {first} {1e3 * statistics.median(affine):.1f} ms,"
        f" {second} {1e3 * statistics.median(robust):.1f} ms,"
        f" ratio {statistics.median(ratios):.2f}"
        f" (half of the turns within {ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processor-time", action="store_true", help="instead of the time on the wall"
    )
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    torch.set_num_threads(args.threads)

    photographs = [data.photograph(name) for name in data.TRAINING_PHOTOGRAPHS]
    models, steps = {}, {}
    for name in COUPLINGS:
        torch.manual_seed(args.seed)
        models[name] = SuperResolutionFlow(**SIZES, coupling=name)
        optimizer = torch.optim.Adam(models[name].parameters(), lr=1e-3)
        run = step(models[name].train(), optimizer)
        crops = iter(
            data.PairedCrops(photographs, scale=SCALE, size=CROP, batch=BATCH, seed=args.seed)
        )
        steps[name] = lambda run=run, crops=crops: run(*next(crops))
    report("training step", by_turns(steps, args.steps, warm=5, clock=clock))

    hr = data.crop_to_multiple(data.photograph(data.HELD_OUT_PHOTOGRAPH), SCALE)[None]
    lr = data.downsample(hr, SCALE)

    def sample(model: SuperResolutionFlow, precision: Precision) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(args.seed)
        return lambda: model.eval().sample(lr, 1, TEMPERATURE, generator, precision=precision)

    size = "x".join(str(SCALE * n) for n in lr.shape[-2:])
    samples = {name: sample(model, "float32") for name, model in models.items()}
    report(f"sampling {size}", by_turns(samples, args.samples, warm=1, clock=clock))
    for name, model in models.items():
        precisions = {p: sample(model, p) for p in PRECISIONS}
        times = by_turns(precisions, args.samples, warm=1, clock=clock)
        report(f"sampling {size}, {name}", times, PRECISIONS)
        images = [model.sample(lr, 1, 0.0, precision=p)[0] for p in PRECISIONS]
        half, single = (-10 * (x - hr).square().mean().log10().item() for x in images)
        print(f"{name}, temperature 0: PSNR {single:.3f} dB in float32, {half:.3f} dB in bf16")


if __name__ == "__main__":
    main()
