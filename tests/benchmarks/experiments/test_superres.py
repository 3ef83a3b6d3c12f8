"""The experiment from training to its page, as small as can be."""

import pytest
import torch

for needed in ("lightning", "matplotlib", "scipy", "skimage", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)
Image = pytest.importorskip("PIL.Image")

from experiments import superres  # noqa: E402
from imaging import runs  # noqa: E402

from flowguard.io.pictures import Picture, write  # noqa: E402

TINY = "--flow-steps 1 --hidden 8 --features 8 --encoder-blocks 1 --batch 2 --threads 1".split()
TINY += "--guard-pictures 2 --accelerator cpu".split()


@pytest.mark.slow
def test_two_couplings_are_trained_measured_and_told_of(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for name, count in (("bsds400", 3), ("kodak24", 1), ("set5", 1)):
        (data / name).mkdir(parents=True)
        for i in range(count):
            write(data / name / f"{i}.png", Picture(torch.rand(3, 48, 56)))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    marks = "<!-- superres-pyramid:start -->\n<!-- superres-pyramid:end -->"
    page.write_text(f"# Before\n\n{marks}\n\nAfter.\n")
    asked = ["--data", str(data), "--out", str(tmp_path / "out"), "--page", str(page)]
    asked += "--couplings affine robust8 --seeds 0 1 --steps 4 --crop-size 16".split()
    asked += "--sets set5 corruptions --crop 40 --samples 2".split()
    superres.main([*asked, "--", *TINY])
    text = page.read_text(encoding="utf-8")
    assert text.startswith(
        "# Before\n\n<!-- superres-pyramid:start -->\nEach coupling was trained"
    )
    assert text.endswith("<!-- superres-pyramid:end -->\n\nAfter.\n")
    for kind in ("affine", "affine+migrated", "affine+shrink", "robust8", "robust8+bare"):
        assert text.count(f"\n| {kind} |") == 3  # of the model, of Set5, of corruptions
    assert "- **robust8** against affine: PSNR τ=0 on Set5" in text
    assert "Measured on the middle 40² of each." in text
    assert "for 4 steps with the seeds 0, 1" in text
    assert str(tmp_path) not in text
    assert "*Crops of the first pictures: Set5, corruptions of Kodak24.*" in text
    for name in ("figure.png", "gallery.jpg"):
        file = f"images/superres-pyramid-{name}"
        assert file in text
        with Image.open(page.parent / file) as image:
            assert min(image.size) > 100

    # Nothing is trained or measured again.
    monkeypatch.setattr(runs, "main", None)
    for row in ("model_row", "held_row"):
        monkeypatch.setattr(f"imaging.bench.{row}", None)
    monkeypatch.setattr("imaging.bench.strange_row", None)
    superres.main([*asked, "--", *TINY])
    assert page.read_text(encoding="utf-8") == text


def test_its_page_has_the_markers_of_both_encoders():
    text = superres.PAGE.read_text(encoding="utf-8")
    for part in ("superres-pyramid", "superres-rrdb"):
        assert text.count(f"<!-- {part}:start -->") == text.count(f"<!-- {part}:end -->") == 1


def test_a_page_without_markers_is_told_of_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "train", None)
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit):
        superres.main(["--data", "d", "--out", str(tmp_path / "out"), "--page", str(page)])
    assert "must hold the markers <!-- superres-pyramid:start -->" in capsys.readouterr().err
