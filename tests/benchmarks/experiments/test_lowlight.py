"""The experiment from training to its page, as small as can be."""

import pytest
import torch

for needed in ("lightning", "matplotlib", "scipy", "skimage", "sklearn", "torchmetrics"):
    pytest.importorskip(needed)
Image = pytest.importorskip("PIL.Image")

from experiments import lowlight  # noqa: E402

from flowguard.io.pictures import Picture, write  # noqa: E402

TINY = "--flow-steps 1 --hidden 8 --features 8 --encoder-blocks 1 --batch 2 --threads 1".split()
TINY += "--guard-pictures 2 --accelerator cpu".split()


@pytest.mark.slow
def test_a_coupling_is_trained_measured_and_told_of(tmp_path):
    data = tmp_path / "data"
    for name, count in (("bsds400", 3), ("dark-sci", 1)):
        (data / name).mkdir(parents=True)
        for i in range(count):
            write(data / name / f"{i}.png", Picture(torch.rand(3, 40, 48)))
    page = tmp_path / "page.md"
    page.write_text("<!-- lowlight:start -->\n<!-- lowlight:end -->\n")
    asked = ["--data", str(data), "--out", str(tmp_path / "out"), "--page", str(page)]
    asked += "--couplings affine --seeds 0 --steps 4 --crop-size 16".split()
    asked += "--sets bsds400 dark-sci --crop 32 --samples 2".split()
    lowlight.main([*asked, "--", *TINY])
    text = page.read_text(encoding="utf-8")
    for kind in ("affine", "affine+migrated", "affine+shrink"):
        assert text.count(f"\n| {kind} |") == 3
    for kind in ("input", "histogram equalisation", "gamma fitted to the truth"):
        assert text.count(f"\n| {kind} |") == 1
    assert (tmp_path / "images" / "lowlight-gallery.jpg").exists()


def test_its_page_has_the_markers():
    text = lowlight.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- lowlight:start -->") == text.count("<!-- lowlight:end -->") == 1
