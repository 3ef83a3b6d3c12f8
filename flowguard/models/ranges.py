r"""Images that have the values of files, 0 to 255 say, where models take those in [0, 1]."""

__all__ = ["ImageConditioner", "advice", "mistaken"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowguard.ood import OODConditioner

MOST = 2**16 - 1  # of the whole numbers of a picture, with 16 bits
HIGH = 2.0  # up to here, a value can be one of [0, 1] that was resized, or made brighter
BRIGHT = 32.0  # the maximum of an image of fractions that is told by its mean alone


def mistaken(images: Sequence[Tensor]) -> list[float]:
    r"""Returns the largest value of each image that looks as if it were not divided by 255; zero
    for all others.

    It does if no value is negative, the largest is beyond 2 and at most 65535, and all are whole
    numbers, or bright. What conditions out of distribution are made of, noise, large gains,
    infinity, seldom looks so. Nothing is looked at where that cannot be done: in compiled code,
    under vmap, while a GPU records.

    The device is waited for once, but for images that are suspicious.

    Arguments:
        images: The images, of any shapes.

    Example:
        >>> mistaken([torch.rand(3, 4, 4), torch.tensor([0.0, 80.0, 255.0]), torch.tensor([1e30])])
        [0.0, 255.0, 0.0]
    """
    found = [0.0] * len(images)
    if not images or not all(map(_can_be_read, images)):
        return found
    with torch.no_grad():
        try:
            highest = torch.stack([image.amax().float() for image in images]).tolist()
        except RuntimeError:  # under a transform of torch.func, or without data
            return found
        for i, (image, high) in enumerate(zip(images, highest, strict=True)):
            if HIGH < high <= MOST and _is_of_a_file(image, high):
                found[i] = high
    return found


def _can_be_read(image: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    recording = image.is_cuda and torch.cuda.is_current_stream_capturing()
    return image.numel() > 0 and not image.is_meta and not recording


def _is_of_a_file(image: Tensor, high: float) -> bool:
    if not bool(image.amin() >= 0):
        return False
    return bool((image == image.round()).all()) or (
        high > BRIGHT and bool(image.float().mean() > HIGH)
    )


def advice(name: str, high: float) -> str:
    r"""Returns what is said of such images.

    Arguments:
        name: What they are called.
        high: Their largest value.
    """
    by = 255 if high <= 255 else MOST
    return f"{name} must have values in [0, 1]; got a maximum of {high:g}: divide by {by}"


class ImageConditioner(OODConditioner):
    r"""Creates the conditioner of an image model, which takes images of values in [0, 1]: it is
    neither fitted to nor calibrated with others. Its arguments are those of
    :class:`flowguard.OODConditioner`.

    Example:
        >>> conditioner = ImageConditioner(policy="report")
        >>> conditioner.fit(255 * torch.rand(64, 3, 4, 4), progress=False)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: the conditions must have values in [0, 1]; got a maximum of ...: divide by 255
    """

    def check(self, y: Any) -> None:
        r"""Refuses images that look as if they were not divided by 255.

        Arguments:
            y: The images; what there is beside three channels has a range of its own.

        Raises:
            ValueError: If they look so.
        """
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return
        (high,) = mistaken([y[:, :3] if y.dim() == 4 else y])
        if high:
            raise ValueError(advice("the conditions", high))
