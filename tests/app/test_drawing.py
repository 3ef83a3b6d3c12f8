r"""Pictures as HTML that holds them."""

import re

import pytest
import torch

from flowguard.app import drawing
from flowguard.app.toy import FRAME
from flowguard.ood.report import TICKS


def test_samples_beyond_the_frame_are_marked_at_its_edge():
    points = torch.tensor(
        [[1.0, 2.0], [1e9, 0.0], [-9.0, 18.0], [torch.nan, 0.0], [0, -torch.inf]]
    )
    made = drawing.scatter("a <flow>", points, 0.8)
    assert made.count('class="in"') == 1
    assert made.count('class="out"') == 4
    for x, y in re.findall(r'cx="([^"]*)" cy="([^"]*)"', made):
        assert max(abs(float(x)), abs(float(y))) <= FRAME
    assert "80 % have left the frame" in made
    assert "a &lt;flow&gt;" in made


def test_the_colour_bar_names_all_quantiles():
    pytest.importorskip("matplotlib")
    made = drawing.bar()
    assert re.findall(r"<span[^>]*>([\d.]*)</span>", made) == list(TICKS.values())
    assert "#000004" in made  # where it begins


def test_sentences_are_escaped():
    assert "<img" not in drawing.sentence('<img src="x" onerror="alert(1)">')
