r"""What low-light models are worth: on photographs darkened by a model of a camera, on real pairs,
and out of distribution.

Takes a folder of models, as ``save_pretrained`` and ``flowguard train`` leave them; those whose
names differ in their seed alone (``affine-seed0``, ``affine-seed1``) are one row. Of the data it
wants ``bsds400``, of which each twentieth photograph is held out as ``flowguard train`` does it,
``lol-pairs`` with ``*_imgs_N`` and ``*_targets_N``, and ``dark-sci`` and ``lol15-low``, dark
photographs without a truth. What is measured is kept picture by picture, so that a command that was
stopped goes on when it is given again.

    python benchmarks/lowlight.py MODELS --data DIR --out DIR
    python benchmarks/lowlight.py MODELS --data DIR --out DIR --crop 128 --pictures 4   # minutes

PSNR and SSIM are of the colours; "GT mean" scales a picture to the mean of the truth first, which
nobody has who brightens a photograph. The gamma is fitted to each truth too, and so an upper bound
of what one can do. An artefact pixel is not finite, or more than 0.5 outside the range of [0, 1] and
the condition; seconds are of the processor.
"""

from collections.abc import Callable, Iterator

import torch
from imaging.bench import run
from imaging.measure import Held, Strange, Study
from torch import Tensor

from flowguard import metrics
from flowguard.io.folder import PictureFiles, find
from flowguard.models import LowLightFlow
from flowguard.training.outside import raw_condition
from flowguard.training.pictures import DarkPairs, Pairs, pairs_of
from flowguard.training.validation import split_off

GAMMAS = (0.02, 1.5)  # what the fitted gamma lies between


class LowLightStudy(Study):
    r"""Creates what is asked of models that brighten what was taken in the dark."""

    model = LowLightFlow
    held = {"bsds400": "held-out of BSDS500, darkened", "lol-pairs": "LOL pairs"}  # noqa: RUF012
    strange = {  # noqa: RUF012
        "dark-sci": "dark photographs (SCI)",
        "lol15-low": "dark photographs (LOL)",
        "corruptions": "corruptions of the held-out",
    }
    spoilt = "bsds400"
    usual = ("bsds400",)
    score = "psnr"
    beside = "psnr_gt_mean"
    bounded = "certified sample"
    measures = {  # noqa: RUF012
        "psnr": ("PSNR τ=0", ".2f"),
        "psnr_gt_mean": ("with GT mean", ".2f"),
        "ssim": ("SSIM τ=0", ".3f"),
        "ssim_gt_mean": ("with GT mean", ".3f"),
        "sample_psnr": ("PSNR τ=0.8", ".2f"),
        "sample_psnr_gt_mean": ("with GT mean", ".2f"),
        "sample_ssim": ("SSIM τ=0.8", ".3f"),
        "bits_per_dim": ("bits/dim", ".3f"),
        "diversity": ("diversity, %", ".1f"),
        "seconds": ("CPU s", ".2f"),
    }

    def pairs(self, name: str) -> Pairs:
        r"""Returns the held-out photographs with dark shots of them, or real pairs."""
        folder = self.folder / name
        if name == "bsds400":
            return split_off(pairs_of(folder, task="lowlight", crop=16)[0])[1]
        bright = [file for file in find(folder) if "_targets_" in file.stem]
        dark = [file.with_name(file.name.replace("_targets_", "_imgs_")) for file in bright]
        if not bright:
            raise ValueError(f"there must be pictures *_targets_* in {folder}; got none")
        return DarkPairs(PictureFiles(bright, budget=0), PictureFiles(dark, budget=0))

    def conditions(self, name: str) -> Iterator[Strange]:
        r"""Yields dark photographs without a truth, or spoilt ones."""
        if name == "corruptions":
            yield from self.corrupted(self.spoilt)
            return
        files = self.files(name)
        for i, (height, width) in enumerate(files.sizes):
            picture = files.window(i, 0, 0, height, width)[None]
            yield Strange(files.files[i].stem, self.strange[name], picture)

    def quality(self, image: Tensor, held: Held) -> dict[str, float]:
        r"""Returns PSNR and SSIM, without and with the mean of the truth."""
        return {k: float(v) for k, v in metrics.low_light(image, held.target).items()}

    def rivals(self) -> dict[str, Callable[[Held], Tensor]]:
        r"""Returns the dark photograph as it is, equalised, and by the best gamma."""
        return {
            "input": lambda held: raw_condition(held.condition),
            "histogram equalisation": lambda held: equalised(raw_condition(held.condition)),
            "gamma fitted to the truth": lambda held: by_gamma(
                raw_condition(held.condition), held.target
            ),
        }


def equalised(image: Tensor) -> Tensor:
    r"""Returns an image with the histogram of its lightness equalised, colours kept.

    Arguments:
        image: The image in :math:`[0, 1]`, with shape :math:`(1, 3, H, W)`.
    """
    from skimage import color, exposure

    hsv = color.rgb2hsv(image[0].clamp(0, 1).movedim(0, -1).double().numpy())
    hsv[..., 2] = exposure.equalize_hist(hsv[..., 2])
    return torch.from_numpy(color.hsv2rgb(hsv)).movedim(-1, 0)[None].to(image)


def by_gamma(image: Tensor, target: Tensor) -> Tensor:
    r"""Returns an image to the power that brings it closest to the truth.

    Arguments:
        image: The image in :math:`[0, 1]`, with shape :math:`(1, 3, H, W)`.
        target: The truth.

    Example:
        >>> target = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(by_gamma(target**4, target), target, atol=1e-3)
        True
    """
    from scipy.optimize import minimize_scalar

    base = image.clamp(0, 1)

    def error(gamma: float) -> float:
        return float((base**gamma - target).square().mean())

    best: float = minimize_scalar(error, bounds=GAMMAS, method="bounded").x
    return base**best


if __name__ == "__main__":
    run(LowLightStudy, str(__doc__))
