"""Reports: numbers, tables, pictures."""

import json
import pickle
import sys

import pytest
import torch
from torch import nn

from flowguard.ood import OODConditioner
from flowguard.ood.report import NINES, nines


class Levels(nn.Module):
    def forward(self, y):
        return [y, y[:, :2, ::2, ::2]]


def images(n, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def report():
    conditioner = OODConditioner(Levels(), "report", alpha=0.01)
    conditioner.fit(images(64), progress=False).calibrate(images(256, 1), progress=False)
    y = images(4, 2)
    y[1, :, :2] = 30
    y[3, 0, 5, 5] = torch.nan
    return conditioner.score(y)


def test_json_is_strict_and_complete(report):
    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(report.to_json(maps=True), parse_constant=refuse)
    assert read["flagged"] == [False, True, False, True]
    assert read["non_finite"] == [False, False, False, True]
    level = read["levels"]["level2"]
    assert level["score"][3] == "inf"
    assert level["score"][0] == pytest.approx(float(report.levels["level2"].score[0]))
    assert len(level["map"][0]) == 4
    assert "map" not in report.to_dict()["levels"]["level1"]


def test_the_table_names_the_worst(report):
    table = report.table()
    lines = table.splitlines()
    assert "level1" in lines[2]
    assert "2 / 4" in lines[2]
    assert "2 of 4 contexts are out of distribution (alpha = 0.01)" in lines[-1]
    assert "worst is context 3" in lines[-1]
    assert "1 not finite (NaN or inf): 3." in lines[-1]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_rich_shows_the_same(report):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=140, record=True, file=open(sys.platform and "/dev/null", "w"))
    console.print(report)
    text = console.export_text()
    assert "level2" in text
    assert "2 / 4" in text


def test_a_report_survives_pickling(report):
    again = pickle.loads(pickle.dumps(report))
    assert again.table() == report.table()


def test_pictures_are_drawn_on_the_calibrated_scale(report):
    figure = report.plot(images(4, 2), index=1)
    image, *maps, bar = figure.axes
    assert image.images
    assert len(maps) == 2
    for axis, (name, level) in zip(maps, report.levels.items(), strict=True):
        (drawn,) = axis.images
        assert drawn.get_clim() == (0, NINES)
        assert name in axis.get_title()
        torch.testing.assert_close(
            torch.as_tensor(drawn.get_array()), nines(level)[1], check_dtype=False
        )
    assert [label.get_text() for label in bar.get_yticklabels()][-2:] == ["0.999", "0.9999"]
    assert "quantile" in bar.get_ylabel()
    ordinary = report.plot(index=0).axes[0].images[0]
    assert ordinary.get_clim() == (0, NINES)  # the same scale for an image without anomalies
    assert ordinary.get_array().max() < NINES


def test_the_scale_counts_nines(report):
    level = report.levels["level1"]
    exact = nines(level)
    assert torch.equal(exact[1, 0] == NINES, torch.ones(8, dtype=torch.bool))
    inside = level.quantile < 0.999
    torch.testing.assert_close((1 - 10**-exact)[inside].float(), level.quantile[inside])


def test_tensorboard_gets_scores_and_maps(report):
    written = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            written[tag] = (float(value), step)

        def add_images(self, tag, value, step):
            written[tag] = (value, step)

    report.to_tensorboard(Writer(), 7)
    assert written["ood/flagged"] == (0.5, 7)
    picture, step = written["ood/level1/map"]
    assert picture.shape == (4, 1, 8, 8)
    assert step == 7
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1


def test_a_real_tensorboard_writer_takes_it(report, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        report.to_tensorboard(writer, 0)
    assert list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_said(report, monkeypatch):
    vectors = OODConditioner(policy="report", alpha=0.1)
    vectors.fit(torch.randn(99, 2), progress=False).calibrate(torch.randn(99, 2), progress=False)
    told = vectors.score(torch.randn(3, 2))
    with pytest.raises(ValueError, match="level with a map, or an image"):
        told.plot()
    with pytest.raises(ValueError, match="got 'level1', which scores vectors"):
        nines(told.levels["level1"])
    with pytest.raises(ValueError, match="hold a context to be drawn; got none"):
        vectors.score(torch.empty(0, 2)).plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "flowguard-nf\[plot\]"'):
        report.plot()
