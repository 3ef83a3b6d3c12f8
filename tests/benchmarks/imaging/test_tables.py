"""Tables and verdicts of rows that are given."""

import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from imaging import tables
from imaging.measure import Options
from superres import SuperResolutionStudy

STUDY = SuperResolutionStudy(Path(), Options())


def rows(psnr, bits, artefacts):
    held = [
        {"set": "set5", "picture": p, "kind": "", "psnr_y": psnr + d, "bits_per_dim": bits}
        | {"sample_psnr_y": psnr - 2, "score": 1.0 + d}
        for p, d in (("a", -1.0), ("b", 1.0))
    ]
    strange = [
        {"set": "corruptions", "picture": "a", "kind": kind, "pixels": 100}
        | {"artefacts": n, "non_finite": 0, "largest": "inf" if n else 1.0, "score": 9.0}
        | {"counts": f"1:0:{100 - n} 9:{n}:0"}
        for kind, n in (("gain 2", 0), ("gain 5", artefacts))
    ]
    model = {
        "set": "model",
        "picture": "",
        "kind": "",
        "parameters": 1234567,
        "certificate": "inf",
    }
    return [model, *held, *strange]


ROWS = {
    "affine-seed0": rows(30.0, 3.5, 40),
    "affine-seed1": rows(30.2, 3.6, 60),
    "robust2-seed0": rows(30.1, 3.4, 0),
    "robust2-seed1": rows(30.3, 3.4, 0),
    "poor": rows(20.0, 5.0, 0),
}


def test_seeds_of_a_kind_are_one_row_of_mean_and_deviation():
    text = tables.markdown(STUDY, tables.by_kind(STUDY, ROWS))
    assert "| Set5 | PSNR τ=0 | PSNR τ=0.8 | bits/dim |" in text
    assert "| affine | 30.10 ± 0.14 | 28.10 ± 0.14 | 3.550 ± 0.071 |" in text
    assert "| poor | 20.00 | 18.00 | 5.000 |" in text
    assert "| affine | 25 ± 7.07 | 50 | 0 | 0 | inf | 1.000 | 1.000 | 0.747 ± 0.072 |" in text
    assert "| model | parameters | certified residual |" in text
    assert "| poor | 1234567 | inf |" in text
    # Where nothing is an artefact, nothing can be told apart.
    assert "| poor | 0 | 0 | 0 | 0 | 1 | 1.000 | – | – |" in text
    assert "| gain 5 | 50 ± 14.1 | 0 | 0 |" in text


def test_a_set_that_was_not_measured_is_left_out():
    text = tables.markdown(STUDY, tables.by_kind(STUDY, ROWS))
    assert not any(name in text for name in ("Set14", "BSD100", "RealSRSet", "diversity"))
    assert "nan" not in text


def test_a_rival_without_a_model_has_a_row_of_its_own():
    bicubic = [{"set": "set5", "picture": "a", "kind": "", "psnr_y": 28.0}]
    kinds = tables.by_kind(STUDY, {"poor": ROWS["poor"]})
    text = tables.markdown(STUDY, kinds, tables.by_kind(STUDY, {"bicubic": bicubic}))
    assert "| bicubic | 28.00 | – | – |" in text


def test_verdicts_hold_each_kind_against_the_affine_one():
    lines = tables.verdicts(STUDY, tables.by_kind(STUDY, ROWS))
    found = {line.split("**")[1]: line for line in lines}
    assert (
        "PSNR τ=0 on Set5 +0.10 (not worse by more than one standard deviation" in found["robust2"]
    )
    assert (
        "bits/dim on Set5 -0.150 (not worse by more than one standard deviation"
        in found["robust2"]
    )
    assert "artefact pixels on corruptions of Kodak24 0 % against 25 %" in found["robust2"]
    assert "PSNR τ=0 on Set5 -10.10 (worse by more than one standard deviation" in found["poor"]
    assert "bits/dim on Set5 +1.450 (worse by more than one standard deviation" in found["poor"]
    assert tables.verdicts(STUDY, {"robust2": {}}) == []


def test_the_figure_is_drawn_of_any_part(tmp_path):
    kinds = tables.by_kind(STUDY, ROWS)
    parts = {"both": kinds}
    for of in ("set5", "corruptions"):
        parts[of] = {
            kind: {p: n for p, n in f.items() if p.partition("/")[0] == of}
            for kind, f in kinds.items()
        }
    for name, part in parts.items():
        tables.draw(STUDY, part, {}, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_largest_value_of_a_set_is_that_of_any_picture():
    kinds = tables.by_kind(STUDY, ROWS)
    assert kinds["affine"]["corruptions"]["largest"] == [math.inf, math.inf]
    assert kinds["affine"]["corruptions/gain 2"]["largest"] == [1.0, 1.0]
