r"""The page that a run of training ends with."""

import re
from xml.etree import ElementTree

import pytest

from flowguard.demo.training_report import chart, page, write


def svg(text):
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", text)[0])


def places(text):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in svg(text).iter("polyline")
    ]


def test_a_chart_shows_what_it_is_given():
    made = chart("a & b", {"up": [(0, 1.0), (10, 2.0)], "down": [(0, 2.0), (5, 1.5), (10, 1.0)]})
    assert "<b>a &amp; b</b>" in made
    up, down = places(made)
    assert up[0][0] == down[0][0] < down[1][0] < up[1][0] == down[2][0]
    assert up[0][1] == down[2][1] > up[1][1] == down[0][1]  # rows are counted from above
    words = [t.text for t in svg(made).iter("text")]
    assert {"up", "down", "1", "2", "0", "10"} <= {*words}


@pytest.mark.parametrize(
    "points", [[(7, 0.0)], [(7, 3.5)], [(1, 2.0), (2, 2.0)], [(1, -1e-9), (2, 1e9)]], ids=str
)
def test_charts_of_few_or_equal_numbers_are_whole(points):
    made = chart("x", {"y": points})
    for x, y in (point for line in places(made) for point in line):
        assert 0 <= x <= 460
        assert 0 <= y <= 240
    assert "nan" not in made


def test_words_are_within_a_chart_and_cross_no_curve():
    made = chart("x", {"loss": [(1, 1.0), (20_000, 2.0)], "other": [(1, 2.0), (20_000, 1.5)]})
    words = {t.text: t for t in svg(made).iter("text")}
    assert float(words["20000"].get("x")) + 5 * 7 / 2 <= 460  # seven pixels a figure
    highest = min(y for line in places(made) for _, y in line)
    assert float(words["other"].get("y")) < highest


@pytest.mark.parametrize("points", [[(1, 0.954), (9, 0.954)], [(1, 5.0), (9, 90.0)]], ids=str)
def test_a_scale_has_two_numbers_or_more(points):
    made = chart("x", {"y": points})
    assert sum(t.get("text-anchor") == "end" for t in svg(made).iter("text")) >= 3  # and the name


def test_the_first_sentence_tells_of_strange_conditions_too(tmp_path):
    (tmp_path / "outside.csv").write_text(
        "step,artefacts,certificate\n9,0.02,inf\n10,0.0125,61.5\n"
    )
    lead = re.search(r'<p class="lead">(.*?)</p>', page(tmp_path))[1]
    assert "1.2 % of the pixels are artefacts; the certified bound is 61.5." in lead
    (tmp_path / "outside.csv").write_text("step,artefacts,certificate\n9,nan,inf\n")
    assert 'class="lead"' not in page(tmp_path)


def test_nothing_is_no_chart():
    assert chart("x", {"y": []}) == ""


def run(tmp_path):
    lines = ["step,loss,lr,norm,seconds,skipped"]
    lines += [f"{i},{'inf' if i == 3 else 5 - i / 1000},0.001,1,1,0" for i in range(1, 1001)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "validation.csv").write_text("step,psnr_y,ssim\n1,20,\n2,21,0.5\n")
    (tmp_path / "config.yaml").write_text("data: <here>\n")
    return tmp_path


def test_the_page_draws_the_tables_that_there_are(tmp_path):
    made = page(run(tmp_path))
    assert "<b>training, bits/dim</b>" in made
    assert "<b>PSNR Y, dB</b>" in made
    assert "AUROC</b>" not in made
    assert "data: &lt;here&gt;" in made
    assert "<summary>The last rows of validation.csv</summary>" in made
    assert "AUROC" not in re.search(r'<p class="lead">(.*?)</p>', made)[1]
    (line,) = places(made)[:1]
    assert 200 < len(line) <= 400  # a thousand steps are averaged, the infinite one is left out
    assert line == sorted(line)


def test_a_folder_without_tables_is_a_page(tmp_path):
    assert write(tmp_path) == tmp_path / "report.html"
    assert "<svg" not in (tmp_path / "report.html").read_text(encoding="utf-8")
