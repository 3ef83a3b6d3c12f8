r"""What is measured of a model while it is trained."""

__all__ = ["Measured", "PictureFolder", "luma", "luma_psnr", "measure", "restored"]

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from flowguard.io.pictures import ImageError, whole_numbers
from flowguard.metrics import imresize
from flowguard.models.base import ImageModel
from flowguard.training.crops import Pair, list_pictures, pixels_of

#: The luminance of ITU-R BT.601 in the range of video, as super-resolution is measured by.
LUMA, LUMA_OFFSET = (65.481 / 255, 128.553 / 255, 24.966 / 255), 16 / 255

Measured = Mapping[str, float]


class PictureFolder(Dataset[Pair]):
    r"""Creates pairs of HR and LR images from a folder, one for each picture.

    Where there are files ``NAME_HR.png``, each is paired with ``NAME_LRx4.png``, with the scale in
    the place of the 4; else every picture is an HR image, and its LR image is made of it.

    Arguments:
        folder: The folder.
        scale: The downsampling factor.

    Raises:
        ValueError: If there is no picture, or one has no partner.
        ImageError: If a file holds no picture.
    """

    def __init__(self, folder: Path, *, scale: int) -> None:
        self.scale = scale
        found = list_pictures(folder)
        paired = [p for p in found if p.stem.endswith("_HR")]
        self.files: list[tuple[Path, Path | None]] = [(p, None) for p in found]
        if paired:
            self.files = [
                (p, p.with_name(re.sub("_HR$", f"_LRx{scale}", p.stem) + p.suffix)) for p in paired
            ]
        lonely = [p.name for p, lr in self.files if lr is not None and not lr.is_file()]
        if lonely or not self.files:
            lack = f"a file of _LRx{scale} for {lonely[0]}" if lonely else "a picture"
            raise ValueError(f"there must be {lack} in {folder}; got none")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Pair:
        r"""Returns HR and LR image, with shapes :math:`(3, sH, sW)` and :math:`(3, H, W)`."""
        path, partner = self.files[index]
        hr = pixels_of(path)
        if partner is None:
            height, width = (n - n % self.scale for n in hr.shape[-2:])
            hr = hr[:, :height, :width]
            lr = imresize(hr, 1 / self.scale)
        else:
            lr = pixels_of(partner)
            if tuple(self.scale * n for n in lr.shape[-2:]) != tuple(hr.shape[-2:]):
                raise ImageError(
                    f"{path.name} must be {self.scale} times as large as {partner.name}; got"
                    f" {tuple(hr.shape[-2:])} and {tuple(lr.shape[-2:])}"
                )
        return hr.float() / 255, lr.float() / 255


def luma(image: Tensor) -> Tensor:
    r"""Returns the luminance of an RGB image, with shape :math:`(B, 1, H, W)`.

    References:
        | ITU-R BT.601, in the range of video

    Arguments:
        image: The image in :math:`[0, 1]`, with shape :math:`(B, 3, H, W)`.

    Example:
        >>> luma(torch.ones(1, 3, 1, 1)).item()
        0.9215...
    """
    weights = image.new_tensor(LUMA).reshape(3, 1, 1)
    return (image * weights).sum(1, keepdim=True) + LUMA_OFFSET


def luma_psnr(image: Tensor, target: Tensor, border: int) -> float:
    r"""Returns the PSNR of the luminance in dB, of images as files would hold them.

    Arguments:
        image: The image, with shape :math:`(1, 3, H, W)`.
        target: The truth.
        border: The rows and columns that are left out on each side.
    """
    inner = slice(border, -border or None)
    first, second = (
        luma(whole_numbers(i.double()) / 255)[..., inner, inner] for i in (image, target)
    )
    return float(-10 * torch.log10((first - second).square().mean()))


def restored(lr: Tensor, scale: int) -> Tensor:
    r"""Returns the bicubic enlargement of an image.

    Arguments:
        lr: The image, with shape :math:`(B, 3, H, W)`.
        scale: The factor.
    """
    return F.interpolate(lr, scale_factor=float(scale), mode="bicubic")


@torch.no_grad()
def measure(model: ImageModel, x: Tensor, y: Tensor) -> Measured:
    r"""Returns bits per dimension, and the PSNR of the luminance at temperature 0, beside that of
    the bicubic enlargement where the model enlarges.

    Arguments:
        model: The model, in evaluation mode.
        x: The target, with shape :math:`(1, 3, sH, sW)`.
        y: Its condition, with shape :math:`(1, 3, H, W)`.
    """
    scale = model.scale
    border = scale if scale > 1 else 0
    with torch.autocast(x.device.type, enabled=False):
        found = {
            "bits_per_dim": float(model.nll(x, y).mean()),
            "psnr_y": luma_psnr(model.sample(y, 1, 0.0)[0], x, border),
        }
        if scale > 1:
            found["bicubic_psnr_y"] = luma_psnr(restored(y, scale), x, border)
    return found
