r"""Which images look as if they were not divided by 255."""

import pytest
import torch

from flowguard.models import SuperResolutionFlow
from flowguard.models.ranges import advice, mistaken
from flowguard.ood import OODConditioner

FILES = {
    "bytes": lambda: torch.randint(0, 256, (2, 3, 4, 4)).float(),
    "16 bits": lambda: torch.randint(0, 65536, (2, 3, 4, 4)).float(),
    "dark": lambda: torch.randint(0, 12, (2, 3, 4, 4)).float(),
    "resized": lambda: 255 * torch.rand(2, 3, 4, 4),
    "half": lambda: torch.randint(0, 256, (2, 3, 4, 4)).half(),
}
OTHERS = {
    "images": lambda: torch.rand(2, 3, 4, 4),
    "a gain of 20": lambda: 20 * torch.rand(2, 3, 4, 4),
    "noise": lambda: torch.rand(2, 3, 4, 4) + 100 * torch.randn(2, 3, 4, 4),
    "overshoot": lambda: 1.8 * torch.rand(2, 3, 4, 4),
    "huge": lambda: 1e30 * torch.rand(2, 3, 4, 4),
    "black": lambda: torch.zeros(2, 3, 4, 4),
    "one bright pixel": lambda: torch.rand(2, 3, 40, 40).index_fill(3, torch.tensor([0]), 30.5),
    "NaN": lambda: torch.full((2, 3, 4, 4), torch.nan),
    "infinite": lambda: torch.full((2, 3, 4, 4), torch.inf),
    "nothing": lambda: torch.zeros(0, 3, 4, 4),
    "no data": lambda: torch.full((2, 3, 4, 4), 255.0, device="meta"),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_values_of_files(make):
    image = make()
    assert mistaken([image]) == [image.max().item()]
    assert mistaken([torch.rand(3), image])[0] == 0


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_values_that_are_meant(make):
    assert mistaken([make()]) == [0]


def test_nothing_is_looked_at_under_vmap():
    images = torch.full((2, 3, 4, 4), 255.0)
    found = []
    torch.func.vmap(lambda x: found.append(mistaken([x])) or x)(images)
    assert found == [[0]]


def test_the_device_is_waited_for_once(monkeypatch):
    read = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: read.append(t.shape) or tolist(t))
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    assert mistaken([torch.rand(3), torch.rand(4)]) == [0, 0]
    assert read == [(2,)]


def test_the_advice_names_the_divisor():
    assert advice("hr", 255.0).endswith("got a maximum of 255: divide by 255")
    assert advice("hr", 60000.0).endswith("got a maximum of 60000: divide by 65535")


@pytest.mark.parametrize("method", ["fit", "calibrate"])
def test_the_guard_of_an_image_model_is_not_made_of_values_of_files(method):
    guard = SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=8).eval().conditioner
    images = torch.rand(64, 3, 8, 8)
    whole = (255 * images).round()
    guard.fit(images, progress=False)
    with pytest.raises(ValueError, match=r"in \[0, 1\]; got a maximum of 255: divide by 255"):
        getattr(guard, method)(whole, progress=False)
    assert guard.fitted
    assert not guard.calibrated
    guard.calibrate(images, progress=False)  # what else it is asked is scored
    assert guard.score(whole[:2]).flagged.all()


def test_a_guard_of_something_else_takes_any_values():
    guard = OODConditioner().fit((255 * torch.rand(64, 3)).round(), progress=False)
    assert guard.fitted
