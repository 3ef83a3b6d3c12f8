r"""What the page shows of a photograph."""

import base64
import io
import re

import numpy as np
import pytest
import torch

from flowguard.app.answers import partners
from flowguard.app.panels import Asked, panel
from flowguard.models import SuperResolutionFlow

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
SMALL = {"levels": 2, "steps": 1, "hidden": 8, "features": 8}


def pictures(page):
    found = {}
    for alt, data in re.findall(r'alt="([^"]*)" src="data:image/png;base64,([^"]*)"', page):
        found[alt] = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    return found


@pytest.mark.filterwarnings("ignore::flowguard.ood.OODContextWarning")
def test_all_is_shown_side_by_side(model):
    both = partners(model("robust", 2), model("affine", 2, margin=None))
    asked = Asked(9 + torch.rand(3, 16, 20), "told <before>", torch.rand(3, 64, 80))
    page = panel(both, asked)
    found = pictures(page)
    names = ["affine", "affine, its guard shrinks", "robust"]
    assert list(found) == [
        "condition",
        "photograph",
        *names,
        "how strange, level1",
        "how strange, level2",
        *(f"artefacts, {name}" for name in names),
    ]
    assert found["robust"].shape == (64, 80, 3)
    assert "told &lt;before&gt;" in page
    assert "Out of distribution: p = " in page
    assert 'aria-label="colour bar"' in page
    assert page.count("Certificate: ") == 3


def test_artefacts_are_marked_red():
    class Explodes(SuperResolutionFlow):
        def sample(self, *args, **options):
            x = super().sample(*args, **options)
            x[..., :8, :] = torch.nan
            return x

    page = panel(partners(Explodes(**SMALL)), Asked(torch.rand(3, 16, 16)))
    mask = pictures(page)["artefacts, robust"]
    assert (mask[:8] == [242, 51, 51]).all()
    assert (mask[8:, :, 0] == mask[8:, :, 1]).all()
    assert "12.5 % artefacts; some values are not finite" in page


def test_without_a_guard_there_are_no_maps_and_it_is_said_why():
    page = panel(partners(SuperResolutionFlow(**SMALL)), Asked(torch.rand(3, 16, 16)))
    assert list(pictures(page)) == ["condition", "robust", "artefacts, robust"]
    assert "is not calibrated" in page
