r"""Comparisons of couplings, end to end."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch

from flowguard.cli import main as cli
from flowguard.demo import compare, compare_report
from flowguard.demo.run import TASKS
from flowguard.image.maps import Robust
from flowguard.models import store

for package in ("jsonargparse", "skimage", "matplotlib", "torchmetrics", "lightning"):
    pytest.importorskip(package)
Image = pytest.importorskip("PIL.Image")


def run(capsys, *arguments):
    try:
        code = cli.main(["compare", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = rng.integers(0, 256, (12, 48, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((400, 100), Image.Resampling.BICUBIC).save(
            folder / f"{i}.png"
        )
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / "small.png")
    (folder / "text.png").write_text("This is no picture.")
    return folder


@pytest.fixture(scope="module")
def done(pictures, tmp_path_factory):
    """A trained one and a loaded one, on a folder of pictures."""
    out = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    mine = TASKS["superres"].build(Robust(bins=3), quick=True)
    mine.save_pretrained(out / "mine")
    arguments = ["compare", "--quick", "--couplings", "affine", "robust8", "--models"]
    arguments += [out / "mine", "--images", pictures, "--steps", 3, "--samples", 2, "--out", out]
    arguments += ["--threads", 1]
    torch.set_num_threads(2)  # before and after
    try:
        assert cli.main([str(a) for a in arguments]) == 0
    finally:
        torch.set_num_threads(1)
    return out, mine


def test_it_writes_what_it_says(done):
    out, _ = done
    numbers = json.loads((out / "metrics.json").read_text())
    assert list(numbers["models"]) == ["affine", "robust8", "mine"]
    assert numbers["options"]["images"] == 3
    for name, found in numbers["models"].items():
        for key in ("psnr", "ssim", "bits_per_dim", "diversity", "lr_psnr", "sample_seconds"):
            assert math.isfinite(found[key]), (name, key)
        for where in ("in", "out"):
            for kind in ("error_rate", "error_pixels", "nan_rate", "nan_pixels"):
                assert 0 <= found[f"{where}_{kind}"] <= 1
    assert numbers["models"]["affine"]["certificate"] == "inf"
    assert numbers["models"]["robust8"]["certificate"] < 100
    assert numbers["models"]["affine"]["step_ms"] > 0
    assert numbers["models"]["mine"]["step_ms"] == "nan"  # it was not trained here
    page = (out / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) > 5
    assert all(s.startswith(("data:image/", "#")) for s in sources)
    for title in (
        "PSNR",
        "bits/dim",
        "diversity",
        "LR-PSNR",
        "certificate",
        "ms/step",
        "s/sample",
    ):
        assert f'<th scope="col">{title}</th>' in page


def test_the_threads_are_those_of_the_run(done):
    out, _ = done
    assert json.loads((out / "metrics.json").read_text())["threads"] == 1
    assert " 1 thread(s), " in (out / "report.html").read_text(encoding="utf-8")


def test_the_models_can_be_used(done):
    out, mine = done
    for name, coupling in (("affine", "affine"), ("robust8", Robust(bins=8))):
        model = store.load(out / name)
        assert model.arguments["coupling"] == coupling
        assert model.conditioner.calibrated
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    after = store.load(out / "mine").state_dict()  # loaded models are not written
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_low_light_task(pictures, tmp_path, capsys):
    arguments = ("--quick", "--task", "lowlight", "--couplings", "robust2", "--steps", 1)
    code, told, errors = run(
        capsys, *arguments, "--samples", 1, "--images", pictures, "--out", tmp_path
    )
    assert code == 0, errors
    assert "with GT mean" in told
    assert "LR-PSNR" not in told.splitlines()[0]
    assert "small.png: it is smaller than 96 × 384" in told
    assert "text.png: it is no picture" in told
    assert type(store.load(tmp_path / "robust2")).__name__ == "LowLightFlow"


def test_cells():
    assert compare_report._cell(None, ".2f") == ""
    assert compare_report._cell(math.nan, ".2f") == ""
    assert compare_report._cell(math.inf, ".4g") == "none"
    assert compare_report._cell(math.inf, ".2f") == "inf"
    assert compare_report._cell(0.125, "%") == "12.5 %"


image = torch.rand(3, 96, 384)
WRONG = {
    "unknown coupling": ({"couplings": ("cubic",)}, "got 'cubic'"),
    "nothing": ({"couplings": ()}, "got none"),
    "one picture": ({"images": [image]}, "got 1"),
    "small": ({"images": [image, image[..., 1:]]}, r"got \(96, 383\)"),
    "unknown task": ({"task": "deblur"}, "got 'deblur'"),
    "no steps": ({"steps": 0}, "got 0 and 5"),
    "same name": ({"loaded": {"affine": torch.nn.Identity()}}, "got 'affine'"),
}


@pytest.mark.parametrize(("options", "match"), WRONG.values(), ids=WRONG)
def test_wrong_options(options, match):
    with pytest.raises(ValueError, match=match):
        compare.CompareOptions(**options)


MISTAKES = {
    "unknown coupling": (["--couplings", "cubic"], "invalid choice: 'cubic'"),
    "nothing": (["--couplings"], "nothing to compare"),
    "no steps": (["--steps", "0"], "at least 1"),
    "absent model": (["--models", "absent"], "there is no folder absent"),
    "absent pictures": (["--images", "absent"], "there is no folder absent"),
    "no pictures": (["--images", "empty"], "two pictures or more"),
    "unknown task": (["--task", "deblur"], "invalid choice: 'deblur'"),
    "out is a file": (["--out", "file"], "--out must be a folder"),
    "device": (["--device", "abacus"], "cannot be used here"),
    "a model that would be lost": (
        ["--models", "out/affine", "--couplings", "affine", "--out", "out"],
        "would be replaced",
    ),
    "mistyped": (["--step", "3"], "there is no option --step; did you mean --steps?"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    TASKS["superres"].build("affine", quick=True).save_pretrained(tmp_path / "out" / "affine")
    monkeypatch.setattr(compare, "compare", lambda options: pytest.fail("it ran"))
    code, out, errors = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1


def test_pictures_in_files_are_compared_without_being_held(pictures, monkeypatch, tmp_path):
    """Whole ones are never made of those that are trained with, but for the conditions that the
    guard is fitted to."""
    from flowguard.io.folder import PictureFiles

    files = PictureFiles([pictures / f"{i}.png" for i in range(3)], budget=0)
    asked = []
    window = PictureFiles.window

    def watched(self, index, top, left, height, width):
        asked.append((index, height, width))
        return window(self, index, top, left, height, width)

    monkeypatch.setattr(PictureFiles, "window", watched)
    options = compare.CompareOptions(
        couplings=("robust2",), images=files, steps=2, samples=1, quick=True, progress=False
    )
    result = compare.compare(options)
    assert asked == [(2, 100, 400)]  # the one that is held out
    assert result.to_dict()["options"]["images"] == 3
    again = compare.compare(options)
    numbers = [r.models["robust2"].numbers for r in (result, again)]
    for name in ("psnr", "bits_per_dim", "train_bits_per_dim", "certificate"):
        assert numbers[0][name] == numbers[1][name]


@pytest.mark.parametrize("task", ["superres", "lowlight"])
def test_parts_of_files_do_not_meet(pictures, task):
    """Left three quarters to train with, the rest to calibrate with."""
    from flowguard.io.folder import PictureFiles

    files = PictureFiles([pictures / f"{i}.png" for i in range(3)])
    options = compare.CompareOptions(couplings=("robust2",), images=files, task=task)
    first, rest = compare._parts(options)
    assert first.sizes == [(100, 300)] * 2
    assert rest.sizes == [(100, 100)] * 2
    target, condition = next(iter(TASKS[task].crops(first, 0)))
    assert target.shape == (16, 3, 32, 32)
    assert condition.shape[0] == 16
    calibration = list(TASKS[task].calibration(rest, 1, 16))
    assert len(calibration) == 2
    contexts = list(TASKS[task].contexts(first, 0))
    assert len(contexts) == 2
    assert contexts[0].shape[1] == condition.shape[1]


@pytest.mark.parametrize("command", ["compare", "demo"])
def test_lightning_is_asked_for_before_anything_is_made(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert cli.main([command, "--quick", "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    assert "lightning is missing: pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
