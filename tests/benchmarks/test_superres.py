"""The benchmark of super-resolution, from the command line to its tables."""

import doctest
import json
import shutil

import numpy as np
import pytest
import torch

for needed in ("matplotlib", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)
Image = pytest.importorskip("PIL.Image")

import superres  # noqa: E402
from imaging import bench  # noqa: E402

from flowguard import data, metrics  # noqa: E402
from flowguard.models import PyramidEncoder, SuperResolutionFlow  # noqa: E402
from flowguard.training.validation import luma_psnr, restored  # noqa: E402


def picture(file, *size):
    pixels = np.random.default_rng(len(file.name)).integers(0, 256, (*size, 3), dtype=np.uint8)
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(file)
    return torch.from_numpy(pixels).movedim(-1, 0)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    top = tmp_path_factory.mktemp("data")
    for number in (1, 2):
        large = picture(top / "set5" / f"img_00{number}_HR.png", 40, 48)
        small = metrics.imresize(large, 1 / 4) // 2  # not what would be made of the large one
        file = top / "set5" / f"img_00{number}_LRx4.png"
        Image.fromarray(small.movedim(0, -1).numpy()).save(file)
        picture(top / "kodak24" / f"0{number}.png", 48, 40)
    picture(top / "realsrset" / "old.png", 13, 11)
    return top


def save(folder, seed, coupling):
    torch.manual_seed(seed)
    encoder = PyramidEncoder(4, scale=4, levels=2, blocks=0)
    made = SuperResolutionFlow(levels=2, steps=1, hidden=4, encoder=encoder, coupling=coupling)
    with torch.no_grad():
        made.train().nll(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 8, 8))
    made.eval().conditioner.fit(torch.rand(16, 3, 8, 8), progress=False)
    made.conditioner.calibrate(torch.rand(49, 3, 8, 8), progress=False)
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save(top / f"affine-seed{seed}", seed, "affine")
    save(top / "robust", 0, "robust")
    return top


@pytest.fixture(scope="module")
def measured(models, sets, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    superres.run(superres.SuperResolutionStudy, "Told.", options(models, sets, out))
    return out


def options(models, sets, out):
    there = ["set5", "kodak24", "realsrset", "corruptions", "checkerboards"]
    asked = [str(models), "--data", str(sets), "--out", str(out), "--sets", *there]
    return [*asked, "--samples", "2", "--crop", "40", "--outside-crop", "32"]


def test_the_examples_hold():
    assert doctest.testmod(superres).failed == 0


def test_the_tables_tell_of_all_sets(measured):
    text = (measured / "table.md").read_text(encoding="utf-8")
    assert text.startswith("Mean ± standard deviation over seeds.")
    for title in ("Set5", "Kodak24", "RealSRSet", "corruptions of Kodak24", "checkerboards"):
        assert f"\n| {title} |" in text
    assert text.count("\n| bicubic |") == 2
    for kind in ("clamped noise σ 0.55", "saturation 20", "checkerboard 8", "RealSRSet"):
        assert f"\n| {kind} |" in text
    assert "nan" not in text
    for name in ("figure.png", "gallery.png"):
        with Image.open(measured / name) as image:
            assert min(image.size) > 100


def test_bicubic_of_the_table_is_that_of_the_small_pictures_in_the_folder(measured, sets):
    found = json.loads((measured / "numbers.json").read_text())["rivals"]["bicubic"]["set5"]
    wanted = []
    for number in (1, 2):
        large, small = (
            data.read_image(sets / "set5" / f"img_00{number}_{name}.png")
            for name in ("HR", "LRx4")
        )
        # The middle 40 columns.
        image = restored(small[None, :, :, 1:11], 4)
        wanted.append(luma_psnr(image, large[None, :, :, 4:44], 4))
    assert found["psnr_y"] == [pytest.approx(sum(wanted) / 2, abs=1e-9)]


def test_a_row_is_kept_for_each_picture_and_condition(measured):
    rows = json.loads((measured / "rows" / "robust.json").read_text())["rows"]
    counts = {name: sum(row["set"] == name for row in rows) for name in {r["set"] for r in rows}}
    corruptions = 3 * len(data.corruptions(0))
    assert counts == {
        "model": 1,
        "set5": 2,
        "kodak24": 2,
        "realsrset": 1,
        "corruptions": 2 * corruptions,
        "checkerboards": 8,
    }
    one = next(row for row in rows if row["picture"] == "old")
    assert one["pixels"] == 32 * 32  # the middle of what is made


def test_what_was_measured_is_not_measured_again(measured, models, sets, tmp_path, monkeypatch):
    out = shutil.copytree(measured, tmp_path / "out")
    rows = json.loads((out / "rows" / "robust.json").read_text())
    last = rows["rows"].pop()
    (out / "rows" / "robust.json").write_text(json.dumps(rows))
    asked = []
    once = bench.strange_row

    def watched(study, model, strange):
        asked.append(strange.kind)
        return once(study, model, strange)

    monkeypatch.setattr(bench, "strange_row", watched)
    monkeypatch.setattr(bench, "held_row", None)
    monkeypatch.setattr(bench, "model_row", None)
    monkeypatch.setattr(bench, "gallery", lambda *_: None)
    superres.run(superres.SuperResolutionStudy, "Told.", options(models, sets, out))
    assert asked == [last["kind"]]
    assert (out / "table.md").read_text() == (measured / "table.md").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"--crop": "16"}, "measured by the same options"),
        ({"--samples": "0"}, "must be positive; got 0"),
        ({"--data": "nowhere"}, "there is no folder nowhere"),
        ({"--sets": "set6"}, "invalid choice: 'set6'"),
    ],
)
def test_mistakes_are_told_in_one_line(measured, models, sets, capsys, change, told):
    asked = options(models, sets, measured)
    for name, value in change.items():
        asked[asked.index(name) + 1] = value
    with pytest.raises(SystemExit) as end:
        superres.run(superres.SuperResolutionStudy, "Told.", asked)
    assert end.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_pictures_that_are_not_asked_of_are_not_counted(
    measured, models, sets, tmp_path, monkeypatch
):
    out = shutil.copytree(measured, tmp_path / "out")
    monkeypatch.setattr(bench, "gallery", lambda *_: None)
    kept = json.loads((out / "rows" / "robust.json").read_text())
    first, second = (row for row in kept["rows"] if row["set"] == "set5")
    second["psnr_y"] = first["psnr_y"] + 1
    (out / "rows" / "robust.json").write_text(json.dumps(kept))
    superres.run(
        superres.SuperResolutionStudy, "Told.", [*options(models, sets, out), "--pictures", "1"]
    )
    found = json.loads((out / "numbers.json").read_text())["kinds"]["robust"]["set5"]
    assert found["psnr_y"] == [first["psnr_y"]]
    assert json.loads((out / "rows" / "robust.json").read_text()) == kept  # nor forgotten


def test_ctrl_c_tells_how_to_go_on(measured, models, sets, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "held_row", stopped)
    with pytest.raises(SystemExit) as end:
        superres.run(superres.SuperResolutionStudy, "Told.", options(models, sets, tmp_path))
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith("is kept: the same command goes on\n")


def test_a_folder_without_models_is_refused(sets, tmp_path, capsys):
    with pytest.raises(SystemExit):
        superres.run(superres.SuperResolutionStudy, "Told.", options(sets, sets, tmp_path))
    assert "there must be a model in" in capsys.readouterr().err


def test_models_that_enlarge_by_another_factor_are_left_out(models, sets, tmp_path, capsys):
    other = tmp_path / "models" / "twice"
    encoder = PyramidEncoder(4, scale=2, levels=1, blocks=0)
    SuperResolutionFlow(scale=2, levels=1, steps=1, hidden=4, encoder=encoder).save_pretrained(
        other
    )
    asked = options(other.parent, sets, tmp_path / "out")
    with pytest.raises(SystemExit):
        superres.run(superres.SuperResolutionStudy, "Told.", asked)
    told = capsys.readouterr().err
    assert "twice enlarges by 2" in told
    assert "there must be a SuperResolutionFlow" in told


def test_a_checkerboard_alternates_by_cells():
    board = superres.checkerboard(12, 3)
    assert board.shape == (1, 3, 12, 12)
    assert board.mean() == 0.5
    assert board[0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert torch.equal(board[0, 0, 3], 1 - board[0, 0, 2])
