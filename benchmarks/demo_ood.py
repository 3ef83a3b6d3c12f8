r"""Do the OOD maps tell where the affine flow explodes, and does ``shrink`` prevent it?

Reads the model that the demo wrote, with an encoder that was trained with it:

    flowguard demo --encoder-weights none --out DIR
    python benchmarks/demo_ood.py DIR [--figure docs/images/ood-and-artefacts.png]
"""

import argparse
import warnings
from pathlib import Path
from statistics import median

import torch
from common import by_turns
from torch import Tensor

from flowguard.demo.run import artefact_mask
from flowguard.demo.superres import SuperResolutionTask
from flowguard.metrics import psnr
from flowguard.models import load
from flowguard.ood import OODReport, metrics

TEMPERATURE = 0.8


def draw(curves: dict[str, metrics.DecileCurve], aurocs: dict[str, float], file: Path) -> None:
    r"""Draws the share of artefact pixels in each score decile."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        label = f"{name}: AUROC {aurocs[name]:.3f}, Spearman {curve.spearman:.3f}"
        axis.plot(range(1, 11), [100 * r for r in curve.rates], "o-", label=label)
    axis.set_xlabel("decile of the Mahalanobis score, over all pixels")
    axis.set_ylabel("artefact pixels of the affine flow, %")
    axis.set_xticks(range(1, 11))
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    task = SuperResolutionTask()
    model = load(args.folder / "affine")
    hr, lr = task.held_out(args.seed)
    held, *strange = task.conditions(lr, args.seed, quick=False)

    def sample(y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(args.seed)
        return model.sample(y, 1, TEMPERATURE, generator)[0]

    reports: list[OODReport] = []
    masks: list[Tensor] = []
    maps: dict[str, list[Tensor]] = {}
    for condition in strange:
        mask = artefact_mask(sample(condition.image), condition.image)
        report = model.conditioner.score(condition.image)
        reports.append(report)
        masks.append(mask)
        for name, m in metrics.level_maps(report, (mask.shape[-2], mask.shape[-1])).items():
            maps.setdefault(name, []).append(m)
    found = metrics.evaluate_maps(reports, masks)
    print(f"{len(strange)} conditions, {sum(m.numel() for m in masks)} pixels")
    for name, numbers in found.items():
        print(f"{name:10s}", "  ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
    curves = {name: metrics.decile_curve(m, masks) for name, m in maps.items()}
    for name, curve in curves.items():
        print(f"{name:10s} artefact rate by decile", [round(r, 4) for r in curve.rates])
    if args.figure:
        draw(curves, {k: v["auroc"] for k, v in found.items()}, args.figure)

    print("\npolicy 'shrink' on the unchanged affine model")
    plain = float(psnr(sample(lr), hr))
    model.conditioner.policy = "shrink"
    warnings.simplefilter("ignore")
    worst, bad = 0.0, 0
    for condition in (held, *strange):
        x = sample(condition.image)
        share = float(artefact_mask(x, condition.image).float().mean())
        worst, bad = max(worst, share), bad + int((~torch.isfinite(x)).sum())
        print(f"  {condition.name:24s} artefacts {100 * share:6.3f} %  max|x| {x.abs().max():.3g}")
    print(
        f"non-finite values {bad}, worst share {100 * worst:.3f} %; held-out PSNR {plain:.3f} dB"
        f" without, {float(psnr(sample(lr), hr)):.3f} dB with"
    )

    model.conditioner.policy = "report"
    y = torch.rand(1, 3, 64, 64)
    encoder = model.conditioner.encoder
    assert encoder is not None
    functions = {
        "sampling, scored": lambda: model.sample(y),
        "encoder and score": lambda: model.conditioner.score(y),
        "encoder": torch.no_grad()(lambda: encoder(y)),
    }
    print("\n256x256, one image, median of 15 turns")
    times = by_turns(functions, turns=15, warm=2)
    medians = {name: 1e3 * median(t) for name, t in times.items()}
    score = medians["encoder and score"] - medians["encoder"]
    rest = medians["sampling, scored"] - score
    print("  ".join(f"{k} {v:.1f} ms" for k, v in medians.items()))
    print(f"scoring adds {100 * score / rest:.1f} % to sampling")


if __name__ == "__main__":
    main()
