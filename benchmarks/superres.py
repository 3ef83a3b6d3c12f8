r"""What models of ×4 super-resolution are worth: on the standard sets, and out of distribution.

Takes a folder of models, as ``save_pretrained`` and ``flowguard train`` leave them; those whose
names differ in their seed alone (``affine-seed0``, ``affine-seed1``) are one row. Of the data it
wants a folder for each set: ``set5``, ``set14`` and ``bsd100`` with ``NAME_HR`` and ``NAME_LRx4``
pictures, ``kodak24`` with large ones alone, ``realsrset`` with small ones alone. What is measured is
kept picture by picture, so that a command that was stopped goes on when it is given again.

    python benchmarks/superres.py MODELS --data DIR --out DIR
    python benchmarks/superres.py MODELS --data DIR --out DIR --crop 128 --pictures 4   # minutes

By PSNR and SSIM the luminance is meant, without a border of 4 pixels; an artefact pixel is not
finite, or more than 0.5 outside the range of [0, 1] and the condition; seconds are of the processor.
"""

from collections.abc import Callable, Iterator

import torch
from imaging.bench import run
from imaging.measure import Held, Strange, Study
from torch import Tensor

from flowguard import metrics
from flowguard.models import SuperResolutionFlow
from flowguard.training.pictures import Pairs, own_partners, pairs_of
from flowguard.training.validation import luma_psnr, luma_ssim, restored

SCALE = 4
CHECKERS = 96  # rows and columns of a checkerboard


def checkerboard(size: int, cells: int) -> Tensor:
    r"""Returns a checkerboard, with shape :math:`(1, 3, H, W)`.

    Arguments:
        size: Its rows and columns.
        cells: The rows and columns of a cell.

    Example:
        >>> checkerboard(4, 2)[0, 0, 0]
        tensor([0., 0., 1., 1.])
    """
    line = torch.arange(size) // cells
    return ((line[:, None] + line) % 2).float().expand(1, 3, -1, -1)


class SuperResolutionStudy(Study):
    r"""Creates what is asked of models that enlarge four times."""

    model = SuperResolutionFlow
    scale = SCALE
    held = {"set5": "Set5", "set14": "Set14", "bsd100": "BSD100", "kodak24": "Kodak24"}  # noqa: RUF012
    strange = {  # noqa: RUF012
        "realsrset": "RealSRSet",
        "corruptions": "corruptions of Kodak24",
        "checkerboards": "checkerboards",
    }
    spoilt = "kodak24"
    usual = tuple(held)
    score = "psnr_y"
    beside = "lr_psnr"
    bounded = "certified residual"
    measures = {  # noqa: RUF012
        "psnr_y": ("PSNR τ=0", ".2f"),
        "ssim_y": ("SSIM τ=0", ".4f"),
        "lr_psnr": ("LR-PSNR τ=0", ".1f"),
        "sample_psnr_y": ("PSNR τ=0.8", ".2f"),
        "sample_ssim_y": ("SSIM τ=0.8", ".4f"),
        "sample_lr_psnr": ("LR-PSNR τ=0.8", ".1f"),
        "bits_per_dim": ("bits/dim", ".3f"),
        "diversity": ("diversity, %", ".1f"),
        "seconds": ("CPU s", ".2f"),
    }

    def pairs(self, name: str) -> Pairs:
        r"""Returns the pictures of a set, whose small ones are made where there are none."""
        folder = self.folder / name
        return pairs_of(folder, scale=SCALE, crop=16, pairs=own_partners(folder))[0]

    def conditions(self, name: str) -> Iterator[Strange]:
        r"""Yields degraded photographs, spoilt ones, or checkerboards."""
        if name == "corruptions":
            yield from self.corrupted(self.spoilt)
        elif name == "checkerboards":
            for cells in range(1, 9):
                kind = f"checkerboard {cells}"
                yield Strange(kind, kind, checkerboard(CHECKERS, cells))
        else:
            files = self.files(name)
            for i, (height, width) in enumerate(files.sizes):
                picture = files.window(i, 0, 0, height, width)[None]
                yield Strange(files.files[i].stem, self.strange[name], picture)

    def quality(self, image: Tensor, held: Held) -> dict[str, float]:
        r"""Returns PSNR and SSIM of the luminance, and the LR-PSNR."""
        return {
            "psnr_y": luma_psnr(image, held.target, SCALE),
            "ssim_y": luma_ssim(image, held.target, SCALE),
            "lr_psnr": float(metrics.lr_psnr(image, held.condition, SCALE)),
        }

    def rivals(self) -> dict[str, Callable[[Held], Tensor]]:
        r"""Returns the bicubic enlargement."""
        return {"bicubic": lambda held: restored(held.condition, SCALE)}


if __name__ == "__main__":
    run(SuperResolutionStudy, str(__doc__))
