r"""The page of many pictures."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from flowguard.cli import page
from flowguard.cli.outcomes import Outcome
from flowguard.cli.page import Shown, drawn, place, write_page
from flowguard.demo.page import Drawn

pytest.importorskip("PIL.Image")

ARGS = SimpleNamespace(model=Path("m"), temperature=0.8, seed=0)


def grow(image):
    return F.interpolate(image, scale_factor=4.0, mode="bicubic")


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (90, 70), (100, 300)])
def test_the_detail_is_where_the_detail_is_and_in_the_shape_of_the_whole(size):
    sample = torch.zeros(3, 4 * size[0], 4 * size[1])
    sample[:, -4:, -4::2] = 1.0
    top, left, height, width = place(sample, 4)
    assert all(n % 4 == 0 for n in (top, left, height, width))
    assert top + height <= 4 * size[0]
    assert left + width <= 4 * size[1]
    if min(size) > 4:
        assert abs(height / width - size[0] / size[1]) < 0.1


def test_bicubic_stands_beside_an_enlarged_picture_and_the_input_beside_a_bright_one():
    given = torch.rand(3, 8, 10)
    large = grow(given[None])[0]
    sides = [p.side for p in drawn(Shown(given, large, large, (), "x.png"), grow) if p.side]
    assert sides == ["bicubic", "sample"]
    same = drawn(Shown(given, given, given, (), "x.png"), lambda y: y)
    assert [p.side for p in same if p.side] == ["input", "sample"]


def test_artefacts_are_marked_as_they_were_before_they_were_cut():
    raw = torch.rand(3, 16, 16)
    raw[:, :8] = torch.inf
    told = [
        p.alt for p in drawn(Shown(raw.clamp(0, 1), raw, raw.clamp(0, 1), (), "x"), lambda y: y)
    ]
    assert "50 % artefact pixels before they were cut, in pink" in told


def outcome(name, **options):
    picture = Drawn(b"\x89PNG" + bytes(300), "c", "a")
    return Outcome(
        Path(name), (), size=(8, 8), excess=0.5, p_value=0.3, pictures=[picture], **options
    )


def test_what_is_strange_comes_first_and_the_page_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 1000)
    found = [outcome(f"{i}.png") for i in range(8)] + [outcome("odd.png", flagged=True)]
    write_page(tmp_path / "x.html", found, ARGS)
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert text.index("<h2>odd.png</h2>") < text.index("<h2>0.png</h2>")
    assert text.count("<img") == 2
    assert "The pictures of 7 more are left out" in text
    assert "the guard flags 1;" in text


def test_an_account_of_nothing_is_a_page(tmp_path):
    write_page(tmp_path / "x.html", [], ARGS)
    assert "0 picture(s)" in (tmp_path / "x.html").read_text(encoding="utf-8")
