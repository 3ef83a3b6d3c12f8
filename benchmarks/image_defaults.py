r"""Which box and which shift bound suit image models? Likelihood, PSNR and worst artefacts.

Trains the demo's model once for each setting:

    python benchmarks/image_defaults.py [--steps 300]
"""

import argparse

import torch

from flowguard import data
from flowguard.bounds import certify
from flowguard.demo.run import artefact_mask, bits_of
from flowguard.demo.superres import SuperResolutionTask
from flowguard.demo.task import BATCH, CROP, NOISE
from flowguard.image import Elementwise, Robust
from flowguard.metrics import psnr
from flowguard.models import SuperResolutionFlow
from flowguard.training.loop import train

TASK = SuperResolutionTask()
TEMPERATURE = 0.8
SETTINGS: dict[str, str | Elementwise] = {
    "affine": "affine",
    **{
        f"K = {k}, B = {b:g}, shift {t if t is None else format(t, 'g')}": Robust(k, b, t)
        for k, b, t in (
            (2, 5.0, 1.0),
            (2, 3.0, 1.0),
            (2, 8.0, 1.0),
            (2, 12.0, 1.0),
            (2, 5.0, 0.5),
            (2, 5.0, 3.0),
            (2, 5.0, None),
            (4, 5.0, 1.0),
        )
    },
}


def measure(coupling: str | Elementwise, steps: int, seed: int) -> list[str]:
    r"""Trains a model and returns its row of the table."""
    torch.manual_seed(seed)
    model = SuperResolutionFlow(
        scale=TASK.scale,
        levels=2,
        steps=4,
        hidden=64,
        features=64,
        coupling=coupling,
        margin=None,
    )
    photographs = [data.photograph(name) for name in data.TRAINING_PHOTOGRAPHS]
    crops = data.PairedCrops(photographs, scale=TASK.scale, size=CROP, batch=BATCH, seed=seed)
    result = train(model, crops, steps=steps, progress=False)
    hr, lr = TASK.held_out(seed)
    bits = bits_of(model, hr, lr, seed)
    share, largest = 0.0, 0.0
    for condition in TASK.conditions(lr, seed, quick=False):
        generator = torch.Generator().manual_seed(seed)
        x = model.sample(condition.image, 1, TEMPERATURE, generator)[0]
        share = max(share, float(artefact_mask(x, condition.image).float().mean()))
        largest = max(largest, float(x.abs().max().nan_to_num(torch.inf)))
    generator = torch.Generator().manual_seed(seed)
    quality = float(psnr(model.sample(lr, 1, TEMPERATURE, generator)[0], hr))
    return [
        f"{bits:.3f}",
        f"{quality:.2f}",
        f"{100 * share:.2f} %",
        f"{largest:.3g}",
        f"{certify(model).bound(NOISE):.3g}",
        f"{1e3 * result.seconds / steps:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| coupling | bits/dim | PSNR | worst artefacts | max abs | certificate | ms/step |")
    print("|---|---|---|---|---|---|---|")
    for name, coupling in SETTINGS.items():
        print("|", " | ".join([name, *measure(coupling, args.steps, args.seed)]), "|", flush=True)


if __name__ == "__main__":
    main()
