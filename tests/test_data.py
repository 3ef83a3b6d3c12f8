r"""Pictures as tensors."""

import itertools

import numpy as np
import pytest
import torch

from flowguard import data
from flowguard.io.folder import Columns, PictureFiles
from flowguard.io.pictures import Picture, write

pytest.importorskip("PIL.Image")


def images():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(256, size, generator=generator) / 255
        for size in ((3, 50, 61), (3, 33, 90), (3, 32, 36))
    ]


def reference(images, *, scale, size, batch, seed):
    """Crops of LR images that are all made beforehand."""
    pairs = []
    for image in images:
        hr = data.crop_to_multiple(image, scale)
        pairs.append((hr, data.downsample(hr[None], scale)[0]))
    return data.AlignedCrops(pairs, scale=scale, size=size, batch=batch, seed=seed)


@pytest.mark.parametrize(("scale", "size"), [(1, 8), (2, 16), (3, 24), (4, 32), (8, 32)])
def test_crops_of_the_lr_image_are_made_as_those_of_the_whole(scale, size):
    options = {"scale": scale, "size": size, "batch": 12, "seed": 3}
    made = itertools.islice(data.PairedCrops(images(), **options), 4)
    for found, expected in zip(made, reference(images(), **options), strict=False):
        for part, whole in zip(found, expected, strict=True):
            assert torch.equal(part, whole)


def test_crops_of_files_are_those_of_tensors(tmp_path):
    for i, image in enumerate(images()):
        write(tmp_path / f"{i}.png", Picture(image))
    files = PictureFiles(sorted(tmp_path.iterdir()))
    options = {"scale": 4, "size": 16, "batch": 8, "seed": 3}
    first = next(iter(data.PairedCrops(files, **options)))
    for part, expected in zip(
        first, next(iter(data.PairedCrops(images(), **options))), strict=True
    ):
        assert torch.equal(part, expected)


def test_no_more_of_a_picture_is_made_than_a_crop_needs():
    asked = []

    class Large:
        sizes = ((10**6, 10**6),)  # a list of tensors of it would take 12 terabytes

        def window(self, index, top, left, height, width):
            asked.append((top, left, height, width))
            return torch.zeros(3, height, width)

    hr, lr = next(iter(data.PairedCrops(Large(), scale=4, size=32, batch=5, seed=0)))
    assert hr.shape == (5, 3, 32, 32)
    assert lr.shape == (5, 3, 8, 8)
    assert {(height, width) for *_, height, width in asked} == {(48, 48)}
    assert not [n for place in asked for n in place if n % 4]


def test_columns_are_those_of_the_pictures(tmp_path):
    for i, image in enumerate(images()):
        write(tmp_path / f"{i}.png", Picture(image))
    files = PictureFiles(sorted(tmp_path.iterdir()))
    left, right = Columns(files, 0, 3 / 4), Columns(files, 3 / 4, numbers=[2, 0])
    assert left.sizes == [(50, 45), (33, 67), (32, 27)]
    assert right.sizes == [(32, 9), (50, 16)]
    assert torch.equal(left.window(1, 2, 3, 4, 5), images()[1][:, 2:6, 3:8])
    assert torch.equal(right.window(1, 2, 3, 4, 5), images()[0][:, 2:6, 48:53])
    assert (left.whole(0) == np.rint(255 * images()[0][:, :, :45].numpy())).all()
    assert len(right) == 2
    assert right.headers[0].width == 9
    (tmp_path / "2.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"2\.png"), pytest.raises(ValueError, match="no picture"):
        right.whole(0)
    assert (files.broken(), left.broken(), right.broken()) == ([2], [2], [0])


def test_jpeg_blocks():
    image = torch.rand(3, 32, 32)
    made = data.jpeg(image, 5)
    step = (made[..., 1:] - made[..., :-1]).abs().mean(dim=(0, 1))
    edges = torch.arange(31) % 8 == 7
    assert step[edges].mean() > step[~edges].mean()


def test_blur_keeps_what_is_flat_and_the_sum_within():
    flat = torch.full((3, 9, 7), 0.3)
    assert torch.allclose(data.blur(flat, 2.0), flat)
    dot = torch.zeros(1, 33, 33)
    dot[0, 16, 16] = 1.0
    blurred = data.blur(dot, 1.5)
    assert abs(float(blurred.sum()) - 1) < 1e-5
    rows = (torch.arange(33) - 16.0).square() @ blurred[0].sum(dim=1)
    assert abs(float(rows) - 1.5**2) < 0.1  # the kernel ends at three standard deviations
    assert data.blur(dot, 0.0) is dot
    with pytest.raises(ValueError, match="sigma must be finite and not negative; got -1"):
        data.blur(dot, -1)
